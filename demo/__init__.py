"""The demo: PEMA end to end on real data (`make demo`)."""
