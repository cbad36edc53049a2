"""Who was handed over when, and who was held out: one row per customer, incident and date, kept for measuring lift later."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from retention_ops.log.database import actions, exposures, pending_handovers
from retention_ops.settings import TEST_MODES

TREATED, HOLDOUT = "treated", "holdout"


def insert_once(connection: Connection, table: sa.Table):
    """An INSERT that leaves a row with the same key as it is."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table).on_conflict_do_nothing()


def last_handed_over(engine: Engine, before: date) -> dict[str, date]:
    """customer_id -> newest alert date before `before` for which the customer was on a list that left in live."""
    return _handed_over(engine, exposures.c.alert_date < before)


def handed_over_around(engine: Engine, day: date, days: int) -> dict[str, date]:
    """As `last_handed_over`, for a list of `day` that is about to leave.

    One that left already for a date up to `days` later counts as the day before: lists can leave in another order than their
    dates, and nobody is handed over twice for it.
    """
    later = _handed_over(engine, sa.and_(exposures.c.alert_date > day, exposures.c.alert_date <= day + timedelta(days=days)))
    return last_handed_over(engine, day) | dict.fromkeys(later, day - timedelta(days=1))


def _handed_over(engine: Engine, when: sa.ColumnElement[bool]) -> dict[str, date]:
    query = (
        sa.select(exposures.c.customer_id, sa.func.max(exposures.c.alert_date))
        .outerjoin(actions, actions.c.key == exposures.c.action_key)
        # a pilot's list went to a test sheet
        .where(exposures.c.arm == TREATED, sa.or_(actions.c.mode.is_(None), actions.c.mode.not_in(TEST_MODES)), when)
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


Arms = Mapping[str, Mapping[str, list[str]]]
"""tier -> arm -> customer ids"""


def remember(engine: Engine, action_key: str, arms: Arms) -> None:
    """Keeps who is about to be handed over, before it leaves: a kill after sending forgets nobody."""
    with engine.begin() as connection:
        connection.execute(pending_handovers.delete().where(pending_handovers.c.action_key == action_key))
        connection.execute(pending_handovers.insert().values(action_key=action_key, arms=arms))


def take_remembered(connection: Connection, action_key: str) -> Arms | None:
    """What `remember` kept, once; None where nothing was."""
    arms = connection.execute(sa.select(pending_handovers.c.arms).filter_by(action_key=action_key)).scalar()
    connection.execute(pending_handovers.delete().where(pending_handovers.c.action_key == action_key))
    return arms
