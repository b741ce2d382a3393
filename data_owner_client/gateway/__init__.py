"""The gateway: the adapted model for applications that speak OpenAI's protocol."""
