"""The external memory E = {(f(c_i), y_i)}: rows, files on disk, alignment and building."""
