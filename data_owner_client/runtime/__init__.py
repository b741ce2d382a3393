"""Atomic files, progress, background work and resumable output."""
