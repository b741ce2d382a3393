"""The data owner's texts: pairs, tasks, retrieved examples and text metrics."""
