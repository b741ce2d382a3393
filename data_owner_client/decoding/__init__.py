"""Generation: drafts, rounds of calls to the server, token selection, and texts."""
