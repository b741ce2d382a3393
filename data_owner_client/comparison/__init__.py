"""Rivals side by side: trained on one memory, evaluated on one test set."""

from data_owner_client.comparison.bench import Splits
from data_owner_client.comparison.compare import Comparison, compare
from data_owner_client.comparison.rows import Measured, Row
from data_owner_client.comparison.systems import SYSTEMS

__all__ = ["SYSTEMS", "Comparison", "Measured", "Row", "Splits", "compare"]
