"""Training: memories and a server in; an adapter, and how to decode with it, out."""
