"""Who was handed over when, and who was held out: one row per customer, incident and date, kept for measuring lift later."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from retention_ops.log.database import exposures

TREATED, HOLDOUT = "treated", "holdout"
REAL_MODES = ("pilot", "live")
"""modes in which a list really leaves; a rehearsal exposes nobody"""


def insert_once(connection: Connection, table: sa.Table):
    """An INSERT that leaves a row with the same key as it is."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table).on_conflict_do_nothing()


def last_handed_over(engine: Engine, before: date) -> dict[str, date]:
    """customer_id -> newest alert date before `before` for which the customer was on a list that left."""
    query = (
        sa.select(exposures.c.customer_id, sa.func.max(exposures.c.alert_date))
        .where(exposures.c.arm == TREATED, exposures.c.alert_date < before)
        .group_by(exposures.c.customer_id)
    )
    with engine.connect() as connection:
        return dict(connection.execute(query).tuples().all())


def record(
    connection: Connection, incident_id: int, alert_date: date, action_key: str, arms: Mapping[str, tuple[str, str]], at: datetime,
) -> int:
    """Records `arms` (customer_id -> tier, arm) of one hand-over; a customer already recorded for it stays as recorded."""
    if not arms:
        return 0
    rows = [
        {"incident_id": incident_id, "alert_date": alert_date, "customer_id": customer, "tier": tier, "arm": arm,
         "action_key": action_key, "at": at}
        for customer, (tier, arm) in arms.items()
    ]
    connection.execute(insert_once(connection, exposures), rows)
    return len(rows)
