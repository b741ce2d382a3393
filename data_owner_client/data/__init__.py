"""The data owner's texts: pairs, tasks, retrieved examples, text metrics."""
