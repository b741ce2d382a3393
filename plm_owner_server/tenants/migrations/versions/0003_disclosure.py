"""Disclosure of the model to each tenant."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns. Tenants that exist already keep full disclosure."""
    with op.batch_alter_table("tenants") as table:
        table.add_column(sa.Column("head_policy", sa.String(16), nullable=False, server_default="full"))
        table.add_column(sa.Column("rotated", sa.Boolean, nullable=False, server_default=sa.false()))


def downgrade() -> None:
    """Drop them."""
    with op.batch_alter_table("tenants") as table:
        table.drop_column("rotated")
        table.drop_column("head_policy")
