"""The adapter: its network, its card, and how its distribution is mixed with that of the PLM."""
