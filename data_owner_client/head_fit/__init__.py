"""Rows of an LM head that its owner does not give (head policy `none`), worked out from full distributions.

log P(v|c) + log Σ exp = W_v · f(c), and both f(c) and the log-sum-exp come with every representation. So the logits of
as many contexts as f is wide give the rows of all tokens by linear algebra, in whatever basis f comes; fewer give an
estimate. `contexts` chooses contexts that the owner has seen already, `asking` asks for their distributions, `store`
keeps the answers on disk, `least_squares` does the algebra.
"""
