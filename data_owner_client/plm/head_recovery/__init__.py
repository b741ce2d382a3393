"""Recovery of LM-head rows that the owner does not serve (head policy `none`), from full distributions.

log P(v|c) + log Σ exp = W_v · f(c), and both f(c) and the log-sum-exp come with every representation. The logits of
D contexts therefore determine the rows of all tokens by linear algebra, in any basis of f. Fewer contexts give an
estimate.
"""
