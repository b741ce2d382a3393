"""Tests that need nothing but torch and tiny models in the same process: no server, no child process."""
