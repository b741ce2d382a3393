"""Servers, clients, proxies, tiny models, data sets and reports for tests, benchmarks and the demo. Not shipped."""
