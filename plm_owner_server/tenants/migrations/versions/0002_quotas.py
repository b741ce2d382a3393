"""Tenants' quotas and usage."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_QUOTAS = ("tokens_per_minute", "tokens_per_day", "concurrent_requests", "head_rows", "full_distributions")


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


def upgrade() -> None:
    """Create the tables, and give each tenant a secret."""
    with op.batch_alter_table("tenants") as tenants:
        for quota in _QUOTAS:
            tenants.add_column(sa.Column(quota, sa.BigInteger))
        tenants.add_column(sa.Column("text_secret", sa.LargeBinary(32)))
    table = sa.table("tenants", sa.column("name"), sa.column("text_secret", sa.LargeBinary))
    for name in op.get_bind().scalars(sa.select(table.c.name)).all():
        op.execute(sa.update(table).where(table.c.name == name).values(text_secret=secrets.token_bytes(32)))
    with op.batch_alter_table("tenants") as tenants:
        tenants.alter_column("text_secret", nullable=False)

    op.create_table(
        "usage",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("day", sa.Date, primary_key=True),
        *map(_count, ("requests", "refused", "tokens", "head_rows", "full_distributions")),
    )
    op.create_table(
        "minutes",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("minute", sa.BigInteger, primary_key=True),
        _count("tokens"),
    )
    op.create_table(
        "running",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(64), nullable=False, index=True),
        sa.Column("seen_at", sa.Float(53), nullable=False),
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("minute", sa.BigInteger, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "head_rows",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("model", sa.String(64), primary_key=True),
        sa.Column("given", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "full_distributions",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("text_hash", sa.LargeBinary(32), primary_key=True),
    )


def downgrade() -> None:
    """Drop them."""
    for table in ("full_distributions", "head_rows", "running", "minutes", "usage"):
        op.drop_table(table)
    with op.batch_alter_table("tenants") as tenants:
        for column in (*_QUOTAS, "text_secret"):
            tenants.drop_column(column)
