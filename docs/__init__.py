"""Pages for readers, and the scripts that check and generate them."""
