"""The wire forms of OpenAI's API: requests, answers, errors and server-sent events."""
