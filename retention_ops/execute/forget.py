"""Erases people: from orders and everything made of them, packs, ledger, worksheets, Dagster's storage. Aggregates and the log stay.

Begun by a record that holds a keyed mark and no id; every step finds what is still there and takes it out, so a kill at any moment is
healed by asking again. Nothing is sent by it but deletions of our own worksheets, through the one door like everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

from retention_ops.detect.compute import workspace
from retention_ops.errors import RetentionOpsError
from retention_ops.execute import ledger
from retention_ops.execute.respond import Responder
from retention_ops.log import forgotten, runs
from retention_ops.log.database import actions, lock_responses
from retention_ops.log.traces import Traces, scrub_files
from retention_ops.package.erasure import erase_from_outbox, erase_from_packs, relabel_lists
from retention_ops.person import Trace, stores, to_withdraw, trace
from retention_ops.sources.identity import Identity
from retention_ops.warehouse.files import clear_abandoned
from retention_ops.warehouse.versions import current_customers, current_suppressions


@dataclass(frozen=True)
class Outcome:
    """`erased` counts per place what was there; `waiting` are deletions of worksheets that are not done yet."""

    erased: dict[str, int]
    unreached: list[str]
    waiting: list[dict[str, Any]]
    before: list[dict[str, Any]]
    """requests for the same people that were known already, without their marks"""


def known_requests(responder: Responder, identity: Identity, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Earlier requests of the same people."""
    rows = forgotten.find(responder.engine, [identity.mark(each) for each in ids])
    return [{name: row[name] for name in ("requested_at", "finished_at", "progress", "unreached")} for row in rows]


def preview(responder: Responder, names: Sequence[str]) -> Trace:
    """What `forget` would erase and what it could not reach; changes nothing."""
    return trace(responder.lake, responder.engine, Traces(names))


def forget(
    responder: Responder, ids: Sequence[str], identity: Identity, names: Sequence[str] = (),
    progress: Callable[[str], None] = lambda step: None,
) -> Outcome:
    """Erases the customers held as `ids`; `names` are other spellings that a text may have, such as the address a hash was made of.

    Raises RetentionOpsError where nothing at all is held and nobody asked before, and where something is still there afterwards: a run
    that wrote meanwhile; asking again takes it out.
    """
    traces, marked = Traces([*ids, *names]), [identity.mark(each) for each in ids]
    before = known_requests(responder, identity, ids)
    progress("looking for every trace")
    found = trace(responder.lake, responder.engine, traces)
    if not found.places and not before:
        raise RetentionOpsError("nothing is held under these ids: not in orders, attributes, suppressions, packs or actions. Check them")
    forgotten.begin(responder.engine, marked, identity.fingerprint, responder.clock(), found.unreached)
    withdrawn = _erase(responder, ids, traces, marked, progress)
    progress("looking again")
    left = trace(responder.lake, responder.engine, traces).places
    if left:
        raise RetentionOpsError(f"still there, written meanwhile: {', '.join(left)}. Run the same command again")
    forgotten.compact(responder.engine)
    forgotten.finish(responder.engine, marked, responder.clock())
    unreached = list(dict.fromkeys(text for row in known_requests(responder, identity, ids) for text in row["unreached"]))
    waiting = [{"key": row["key"], "state": row["state"], "why": row["last_error"]} for row in withdrawn if row["state"] != ledger.SENT]
    return Outcome(found.places, unreached, waiting, before)


def _erase(
    responder: Responder, ids: Sequence[str], traces: Traces, marked: Sequence[str], progress: Callable[[str], None],
) -> list[ledger.Row]:
    """All steps; returns the deletions of worksheets."""
    lake, engine, settings = responder.lake, responder.engine, responder.settings

    def did(step: str, what: Any) -> None:
        forgotten.done(engine, marked, step, what)
        responder.checkpoint("forget", {"step": step})

    # worksheets first: who is on them is known from the hand-overs, which go with the database's rows
    progress("worksheets")
    with engine.connect() as connection:
        hand_overs = forgotten.exposed(connection, ids)
    withdrawn = responder.withdraw(to_withdraw(engine, hand_overs))
    did("worksheets", len(withdrawn))
    for store, order in stores(settings).items():
        progress(store.name)
        with lake.connection() as con:
            did(store.name, store.erase(con, ids, order, responder.clock(), progress))
    if lake.orders() is not None:
        with workspace(lake):  # derives customer_days of the new version, so that the views are never without it
            pass
    lake.refresh_views()
    _record_versions(responder)
    parts = lake.parts_holding(ids)
    for number, (table, part, _) in enumerate(parts, start=1):
        progress(f"{table} ({number:,} of {len(parts):,})")
        lake.erase_part(table, part, ids)
    lake.refresh_views()
    did("tables", len(parts))
    progress("Action Packs")
    did("packs", erase_from_packs(settings, traces, responder.clock()))
    relabel_lists(lake)
    did("outbox", erase_from_outbox(settings, traces))
    progress("ops database")
    did("ops database", _erase_from_database(responder, ids, traces))
    progress("Dagster's storage")
    did("Dagster's storage", scrub_files(settings.home / "dagster", traces))
    did("left by killed processes", clear_abandoned(settings.home))
    return withdrawn


def _record_versions(responder: Responder) -> None:
    settings = responder.settings
    for dataset, versions in (
        ("orders", responder.lake.orders_versions()), ("customers", [current_customers(settings)]),
        ("suppressions", [current_suppressions(settings)]),
    ):
        runs.record_ingestions(responder.engine, dataset, [version for version in versions if version])


def _erase_from_database(responder: Responder, ids: Sequence[str], traces: Traces) -> int:
    """Rows of the person, and what texts of actions and events say of them, in one transaction; returns how many rows were touched."""
    now = responder.clock()
    with responder.engine.begin() as connection:
        lock_responses(connection)
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA secure_delete = ON")
        told, left = forgotten.told(connection, traces), forgotten.pending(connection, ids)
        rewritten, held = forgotten.events(connection, traces), forgotten.exposed(connection, ids)
        for row in told:
            _rewrite(connection, row, traces, now, responder.run_id)
        forgotten.erase_rows(connection, ids, left, rewritten)
    return len(told) + len(left) + len(rewritten) + len(held)


def _rewrite(connection: Connection, row: ledger.Row, traces: Traces, now: datetime, actor: str) -> None:
    """An action as it was, less the person; the hash of what was sent stays in its story."""
    payload = traces.without_value(row["payload"])
    detail = traces.without_value(row["detail"]) if row["detail"] else row["detail"]
    connection.execute(actions.update().where(actions.c.key == row["key"]).values(
        payload=payload, payload_sha256=ledger.digest(payload), detail=detail,
        last_error=traces.without(row["last_error"]) if row["last_error"] else row["last_error"],
    ))
    ledger.note(connection, now, "erased", actor, f"a customer was taken out of its content, whose sha256 was {row['payload_sha256']}",
                action_key=row["key"], incident_id=row["incident_id"])
