"""Scores of answers against references: one scorer for each kind of task."""
