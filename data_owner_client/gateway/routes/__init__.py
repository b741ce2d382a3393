"""The gateway's routes, a router a module."""
