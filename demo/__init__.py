"""The demos: PEMA end to end on real data (`make demo`, `make demo-intents`)."""
