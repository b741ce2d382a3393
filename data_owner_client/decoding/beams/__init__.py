"""Beam search over the mixture."""
