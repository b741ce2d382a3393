"""Tenants, as the database holds them."""
