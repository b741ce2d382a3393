"""Atomic files, progress reports, background work, memory usage and resumable output."""
