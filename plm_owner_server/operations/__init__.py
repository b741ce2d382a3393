"""Everything an operator watches: serving state, call log, metrics, traces, supervision, shutdown."""
