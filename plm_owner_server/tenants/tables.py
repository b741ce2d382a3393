"""The tables that the code uses; the migrations make the same ones."""

from __future__ import annotations

import sqlalchemy as sa

METADATA = sa.MetaData()

TENANTS = sa.Table(
    "tenants",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("key_id", sa.String(32), nullable=False, unique=True),
    sa.Column("key_hash", sa.String(64), nullable=False),
    sa.Column("scopes", sa.String(256), nullable=False),
    sa.Column("head_policy", sa.String(16), nullable=False, server_default="full"),
    sa.Column("rotated", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("disabled_at", sa.DateTime(timezone=True)),
    # Its quotas; none where there is no number.
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Column("tokens_per_day", sa.BigInteger),
    sa.Column("concurrent_requests", sa.BigInteger),
    sa.Column("head_rows", sa.BigInteger),
    sa.Column("full_distributions", sa.BigInteger),
    # Of the hashes by which texts are known again.
    sa.Column("text_secret", sa.LargeBinary(32), nullable=False),
)
# What was answered, in days of UTC. Its sums over all days are what lifetime budgets have spent.
USAGE = sa.Table(
    "usage",
    METADATA,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("refused", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("tokens", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("head_rows", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("full_distributions", sa.BigInteger, nullable=False, server_default="0"),
)
# The same for the last few minutes, counted from 1970.
MINUTES = sa.Table(
    "minutes",
    METADATA,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("minute", sa.BigInteger, primary_key=True),
    sa.Column("tokens", sa.BigInteger, nullable=False, server_default="0"),
)
# Calls that are being answered, with the tokens that they may come to cost.
RUNNING = sa.Table(
    "running",
    METADATA,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False, index=True),
    sa.Column("seen_at", sa.Float(53), nullable=False),  # seconds from 1970; its server renews it
    sa.Column("day", sa.Date, nullable=False),
    sa.Column("minute", sa.BigInteger, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
)
# Which rows of a model's LM head a tenant has, a bit each.
HEAD_ROWS = sa.Table(
    "head_rows",
    METADATA,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("model", sa.String(64), primary_key=True),
    sa.Column("given", sa.LargeBinary, nullable=False),
)
# Which texts' full distributions it has, by hashes under its own secret.
FULL_DISTRIBUTIONS = sa.Table(
    "full_distributions",
    METADATA,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("text_hash", sa.LargeBinary(32), primary_key=True),
)
