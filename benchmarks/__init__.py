"""Each module measures one claim against a peer in the same run: `python -m benchmarks.NAME [--quick]`."""
