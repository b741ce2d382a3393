"""Model folders on disk: where they come from, their configuration, tokenizer and LM head."""
