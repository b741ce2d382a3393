"""The calls that clients make, and the scheduler that batches them on the engine."""
