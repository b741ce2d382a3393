"""Rivals side by side: trained on one memory, evaluated on one test set."""

from data_owner_client.comparison.compare import SYSTEMS, Comparison, Splits, compare
from data_owner_client.comparison.rows import Measured, Row

__all__ = ["SYSTEMS", "Comparison", "Measured", "Row", "Splits", "compare"]
