"""Engines, which run the model; `interface` defines what the service expects of one."""
