"""Redaction: spans of texts that the owner of the PLM may not see, and the surrogates that it sees in their place."""
