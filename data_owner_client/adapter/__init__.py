"""The adapter: its network, its card, and the interpolation of its distribution with that of the PLM."""
