"""Sensitivity of PEMA's gain to its settings, the memory and the model, on tasks of several kinds."""
