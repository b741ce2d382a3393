"""Baselines that need the PLM's weights, or a part of them, where the texts are."""
