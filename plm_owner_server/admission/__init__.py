"""Admission: authentication of the client, and the quotas that its call may use."""
