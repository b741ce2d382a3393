"""Scores on a test set, and comparison with baselines."""
