"""The external memory E = {(f(c_i), y_i)}: how it is built, and how it lies on disk."""
