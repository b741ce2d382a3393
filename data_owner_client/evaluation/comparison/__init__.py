"""Comparison of PEMA with baselines that are trained on the same memory and evaluated on the same test set."""
