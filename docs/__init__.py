"""Checks and generators of the documentation."""
