"""Unit tests of the client: memory, training, decoding and evaluation, over a PLM in the same process."""
