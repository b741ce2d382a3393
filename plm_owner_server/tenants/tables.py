"""Tables of the database, as the migrations make them."""

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
    # Quotas; NULL is no limit.
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Column("tokens_per_day", sa.BigInteger),
    sa.Column("concurrent_requests", sa.BigInteger),
    sa.Column("head_rows", sa.BigInteger),
    sa.Column("full_distributions", sa.BigInteger),
    # Key of the hashes in FULL_DISTRIBUTIONS.
    sa.Column("text_secret", sa.LargeBinary(32), nullable=False),
)
# Usage by day of UTC. The sums over all days are charged to lifetime budgets.
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
# Tokens of the last few minutes, which are counted from 1970.
MINUTES = sa.Table(
    "minutes",
    METADATA,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("minute", sa.BigInteger, primary_key=True),
    sa.Column("tokens", sa.BigInteger, nullable=False, server_default="0"),
)
# Calls that are being answered, with the tokens that are reserved for them.
RUNNING = sa.Table(
    "running",
    METADATA,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False, index=True),
    sa.Column("seen_at", sa.Float(53), nullable=False),  # Unix time; its server renews it
    sa.Column("day", sa.Date, nullable=False),
    sa.Column("minute", sa.BigInteger, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
)
# LM head rows that a tenant has received, one bit a row (`given`), by model digest.
HEAD_ROWS = sa.Table(
    "head_rows",
    METADATA,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("model", sa.String(64), primary_key=True),
    sa.Column("given", sa.LargeBinary, nullable=False),
)
# Texts whose full distribution a tenant has received, as HMACs under its text_secret.
FULL_DISTRIBUTIONS = sa.Table(
    "full_distributions",
    METADATA,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("text_hash", sa.LargeBinary(32), primary_key=True),
)
