"""Real data sets for every kind of task, fetched from PyPI and npm when they are needed and never committed."""
