"""Engines run the model; `base` says what the service expects of one."""
