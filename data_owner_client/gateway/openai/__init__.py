"""OpenAI's wire forms."""
