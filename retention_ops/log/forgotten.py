"""Requests to be forgotten: who asked (as a keyed mark, never as an id), how far the erasure got, what it could not reach.

The mark stays for good: it keeps the customer out of every later ingest. Without RETENTION_OPS_ID_KEY it cannot be compared with
anybody, which is why an ingest is refused where there are marks and the key is missing or another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from retention_ops.errors import SettingsError
from retention_ops.installation import has_database
from retention_ops.log.database import actions, erasures, exposures, ops_database, ops_events, pending_handovers
from retention_ops.log.exposures import insert_once
from retention_ops.log.traces import Traces
from retention_ops.settings import Settings

if TYPE_CHECKING:
    from retention_ops.sources.identity import Identity

Row = dict[str, Any]


def marks(settings: Settings, identity: Identity) -> frozenset[str]:
    """The marks of everybody forgotten here. Raises SettingsError where the key at hand cannot recognise them."""
    if not has_database(settings):
        return frozenset()
    with ops_database(settings) as engine, engine.connect() as connection:
        rows = connection.execute(sa.select(erasures.c.mark, erasures.c.key_fingerprint)).all()
    unknown = {row.key_fingerprint for row in rows} - {identity.fingerprint}
    if unknown:
        at_hand = f"is another one (fingerprint {identity.fingerprint})" if identity.key else "is not set"
        raise SettingsError(
            f"{len(rows):,} customers were forgotten here, and RETENTION_OPS_ID_KEY {at_hand}: they would come in again unnoticed. Nothing "
            f"was written.\nSet the key with the fingerprint {', '.join(sorted(unknown))} again.")
    return frozenset(row.mark for row in rows)


def begin(engine: Engine, marked: Iterable[str], fingerprint: str, now: datetime, unreached: Sequence[str]) -> None:
    """Writes the requests down before anything is touched. One that is known is taken up again; what it could not reach adds up."""
    with engine.begin() as connection:
        for mark in marked:
            connection.execute(insert_once(connection, erasures).values(
                mark=mark, key_fingerprint=fingerprint, requested_at=now, progress={}, unreached=[]))
            known = connection.execute(sa.select(erasures.c.unreached).where(erasures.c.mark == mark).with_for_update()).scalar_one()
            connection.execute(erasures.update().where(erasures.c.mark == mark).values(
                finished_at=None, unreached=list(dict.fromkeys([*known, *unreached]))))


def find(engine: Engine, marked: Iterable[str] | None = None) -> list[Row]:
    """Requests, oldest first; of these marks only, where they are given."""
    query = sa.select(erasures).order_by(erasures.c.requested_at)
    if marked is not None:
        query = query.where(erasures.c.mark.in_(list(marked)))
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def done(engine: Engine, marked: Iterable[str], step: str, what: Any) -> None:
    """Notes one step as done. `what` holds counts, never an id."""
    with engine.begin() as connection:
        for mark in marked:
            known = connection.execute(sa.select(erasures.c.progress).where(erasures.c.mark == mark).with_for_update()).scalar_one()
            connection.execute(erasures.update().where(erasures.c.mark == mark).values(progress={**known, step: what}))


def finish(engine: Engine, marked: Iterable[str], now: datetime) -> None:
    with engine.begin() as connection:
        connection.execute(erasures.update().where(erasures.c.mark.in_(list(marked))).values(finished_at=now))


# -- what the ops database says about a person ---------------------------------------------------------------------------


def exposed(connection: Connection, ids: Iterable[str]) -> list[Row]:
    """Hand-overs of these customers: exposures with the action's slot, destination, kind, state and target."""
    query = (
        sa.select(exposures, actions.c.slot, actions.c.destination, actions.c.kind, actions.c.state, actions.c.target, actions.c.mode,
                  actions.c.external_url)
        .join(actions, actions.c.key == exposures.c.action_key).where(exposures.c.customer_id.in_(list(ids)))
        .order_by(exposures.c.alert_date, exposures.c.incident_id)
    )
    return [dict(row) for row in connection.execute(query).mappings()]


ACTION_TEXTS = ("payload", "detail", "last_error")


def told(connection: Connection, traces: Traces) -> list[Row]:
    """Actions whose content, proof or error names the person."""
    rows = connection.execute(sa.select(actions).order_by(actions.c.position)).mappings()
    return [dict(row) for row in rows if any(traces.in_value(row[name]) for name in ACTION_TEXTS)]


def pending(connection: Connection, ids: Iterable[str]) -> list[tuple[str, Any]]:
    """(action key, arms without the person) of hand-overs under way that hold one of these customers."""
    gone, found = set(ids), []
    for key, arms in connection.execute(sa.select(pending_handovers.c.action_key, pending_handovers.c.arms)):
        left = {tier: {arm: [each for each in listed if each not in gone] for arm, listed in by_arm.items()}
                for tier, by_arm in arms.items()}
        if left != arms:
            found.append((key, left))
    return found


def events(connection: Connection, traces: Traces) -> list[tuple[int, str]]:
    """(id, text without the person) of events that name the person: mostly what an assistant asked for."""
    rows = connection.execute(sa.select(ops_events.c.id, ops_events.c.detail)).all()
    return [(row.id, traces.without_detail(row.detail)) for row in rows if traces.in_detail(row.detail)]


def erase_rows(connection: Connection, ids: Sequence[str], left: Sequence[tuple[str, Any]], rewritten: Sequence[tuple[int, str]]) -> None:
    """Deletes exposures and rewrites pending hand-overs and events. The database allows it only while a request is open."""
    connection.execute(exposures.delete().where(exposures.c.customer_id.in_(list(ids))))
    for key, arms in left:
        connection.execute(pending_handovers.update().where(pending_handovers.c.action_key == key).values(arms=arms))
    for number, detail in rewritten:
        connection.execute(ops_events.update().where(ops_events.c.id == number).values(detail=detail))


def compact(engine: Engine) -> None:
    """Gives back the pages and row versions that deleted rows leave behind: SQLite's file and journal, Postgres' dead rows."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if connection.dialect.name == "postgresql":
            for table in (exposures, pending_handovers, ops_events, actions):
                connection.execute(sa.text(f"VACUUM (FULL) {table.name}"))
    if engine.dialect.name == "sqlite" and engine.url.database:
        from retention_ops.log.traces import compact_sqlite

        compact_sqlite(engine.url.database)
