"""Unit tests of the messages, codecs, errors and formulas that both sides share."""
