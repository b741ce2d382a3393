"""Answers of a `classify` task: the labels, scored along the tree of their tokens."""
