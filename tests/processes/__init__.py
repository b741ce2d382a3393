"""Tests that need child processes: `pema-server` and `pema-client` as they are run, killed and interrupted."""
