"""Unit tests of the server: engines, service, admission, tenants and operations, called in the same process."""
