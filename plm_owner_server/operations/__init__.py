"""All that an operator watches: serving state, call log, metrics, traces, supervisor, shutdown."""
