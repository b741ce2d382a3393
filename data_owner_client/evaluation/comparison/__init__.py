"""PEMA beside its baselines: trained on one memory, evaluated on one test set."""
