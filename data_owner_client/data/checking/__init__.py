"""Checks of the user's files before anything is sent."""
