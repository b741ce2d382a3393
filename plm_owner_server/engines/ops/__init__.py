"""Tensor operations that the engines share."""
