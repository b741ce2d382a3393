"""The way to a server: its address, the proxy before it, the roots that are trusted, and what goes wrong on it."""
