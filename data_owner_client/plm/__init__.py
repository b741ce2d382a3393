"""The remote model: connection, tokenizer, LM head and identity."""
