"""All tests, sorted into folders by what they need; `support`, `guard` and `reference` serve several folders."""
