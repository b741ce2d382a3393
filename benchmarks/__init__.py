"""Each module measures one claim against a baseline in the same run: `python -m benchmarks.NAME [--quick]`."""
