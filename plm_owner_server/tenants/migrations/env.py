"""Runs the migrations with alembic, on the connection that the store passes in."""

import sqlalchemy as sa
from alembic import context

from plm_owner_server.tenants.tables import METADATA

# Any number, the same in all processes: the migrating process holds this PostgreSQL lock.
_LOCK = 0x70656D61

connection = context.config.attributes["connection"]
if connection.dialect.name == "postgresql":
    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
context.configure(connection=connection, target_metadata=METADATA, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
