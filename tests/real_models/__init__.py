"""Tests on real models that are installed as packages; about a minute each."""
