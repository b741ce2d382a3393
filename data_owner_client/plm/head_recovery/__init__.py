"""Recovery of LM-head rows from full distributions, where the owner serves no rows (head policy `none`).

log P(v|c) + log Σ exp = W_v · f(c). Both f(c) and the log-sum-exp come with every representation. The logits of D
contexts therefore determine the rows of all tokens by linear algebra, in any basis of f. Fewer contexts give an
estimate.
"""
