"""what the quiet side remembers: ended runs, source checks, and health causes from their opening to their end"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def _time(name: str, nullable: bool = True) -> sa.Column:
    return sa.Column(name, sa.DateTime, nullable=nullable)


def upgrade() -> None:
    op.create_table(
        "loop_runs",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("run_id", sa.Text, nullable=False, unique=True),
        sa.Column("first_date", sa.Date),
        sa.Column("last_date", sa.Date),
        sa.Column("status", sa.Text, nullable=False),
        _time("started_at"), _time("ended_at", False), _time("seen_at", False),
    )
    op.create_table(
        "source_checks",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("ok", sa.Boolean, nullable=False),
        sa.Column("differences", sa.JSON, nullable=False),
        _time("checked_at", False),
    )
    op.create_table(
        "health_causes",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("cause", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        _time("opened_at", False), _time("closed_at"),
        sa.Column("opened_key", sa.Text),
        sa.Column("closed_key", sa.Text),
    )
    is_open = sa.text("closed_at IS NULL")
    op.create_index(
        "health_causes_one_open", "health_causes", ["cause", "subject"], unique=True, sqlite_where=is_open, postgresql_where=is_open,
    )
