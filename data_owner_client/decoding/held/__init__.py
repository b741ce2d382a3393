"""Answers held to a form: the tokens that are allowed, and the proof that the most probable one is chosen."""
