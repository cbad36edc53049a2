"""Is everything as it should be? Data, runs, answers, lists and what to do next, as plain values for any door to show."""

from __future__ import annotations

import csv
from datetime import date, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from retention_ops.clock import Clock, shop_day, system_clock
from retention_ops.detect.alerts import alerts_by_day, answered_rules
from retention_ops.errors import PackError
from retention_ops.execute import health, incidents, ledger
from retention_ops.execute.door import HALTED
from retention_ops.execute.gate import ARMED, ARMED_SHORTFALL
from retention_ops.execute.hold import why_held
from retention_ops.log import runs
from retention_ops.log.database import actions, ops_database, ops_events
from retention_ops.metrics import as_numbers, metrics
from retention_ops.package.audiences import TIERS, safe_text
from retention_ops.package.pack import Pack, find_pack, no_contact, pack_days, records
from retention_ops.settings import REAL_MODES, Settings
from retention_ops.warehouse.choice import open_warehouse
from retention_ops.warehouse.freshness import Changes, freshness
from retention_ops.warehouse.seam import Warehouse

RECENT = 30


def status(settings: Settings, clock: Clock = system_clock) -> dict[str, Any]:
    """Everything `retention-ops status` shows. `next` is the most useful command (without the program's name)."""
    lake, packs = open_warehouse(settings), _packs(settings)
    orders, customers = lake.orders(), lake.customers()
    built = lake.days("alert_logic")
    stored = records(lake.read_range("alert_logic", built[-RECENT:][0], built[-1])) if built else []
    recent = list(alerts_by_day(stored, answered_rules(settings)).values())
    facts: dict[str, Any] = {
        "home": settings.home,
        "mode": settings.mode,
        "source": settings.source,
        "today": shop_day(clock(), settings.shop_timezone),
        "orders": orders,
        "complete_through": orders.complete_through if orders else None,
        "customers": customers.customers if customers else None,
        "dates_built": len(built),
        "newest_date": built[-1] if built else None,
        "flagged": [row for row in recent if row["alert_flag"]],
        "last_run": None, "last_answer": None, "failed_answers": [], "audit": "no rows yet", "audit_broken_at": None,
        "unfinished_dates": [], "unanswered_dates": [], "mismatches": [],
        "open_incidents": [], "pending_approvals": [], "actions_in_trouble": [], "duplicates": [], "halted": None, "held": "",
        "armed": None, "shortfall_pilot_until": None, "precision": None, "health": [], "metrics": None,
        "packs_with_opted_out": packs_with_opted_out(lake, packs),
        "stale_packs": stale_packs(lake, packs),
    }
    fresh = freshness(lake)
    facts |= {"stale_dates": fresh.stale, "other_rules_dates": fresh.other_rules}
    if orders:
        with ops_database(settings) as engine:
            facts |= _runs(engine, lake, built, clock)
            facts |= _answers(engine, recent) | _response(engine, settings, clock())
            facts |= {"health": health.open_causes(engine), "metrics": as_numbers(metrics(engine, lake, settings, clock))}
    return facts | {"next": _next(facts)}


def _answers(engine: Engine, recent: list[dict[str, Any]]) -> dict[str, Any]:
    log = runs.rows(engine)
    broken = runs.first_broken_row(engine)
    newest = {row["alert_date"]: row for row in log}
    return {
        "last_answer": _last_answer(log),
        "failed_answers": runs.failed_dates(log),
        "audit": f"broken at row {broken[0]}, date {broken[1]['alert_date']}" if broken
        else f"{len(log):,} row{'' if len(log) == 1 else 's'}, hash chain whole",
        "audit_broken_at": broken[0] if broken else None,
        "unanswered_dates": [date.fromisoformat(row["alert_date"]) for row in recent
                             if row["alert_flag"] and date.fromisoformat(row["alert_date"]) not in newest],
    }


def _last_answer(log: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest alert date's that succeeded, whenever it was written: a backfill of older dates comes later; else the newest one's."""
    done = [row for row in log if row["status"] == "success"] or log
    return max(reversed(done), key=lambda row: row["alert_date"], default=None)  # of one date the row written last


def duplicates(engine: Engine) -> list[dict[str, Any]]:
    """Actions seen twice at their destination: key, the id on record, and what the late receipt said."""
    columns = actions.c.key, actions.c.alert_date, actions.c.destination, actions.c.external_id, ops_events.c.detail
    query = sa.select(*columns).join(ops_events, ops_events.c.action_key == actions.c.key).where(ops_events.c.event == "duplicate")
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query.order_by(ops_events.c.id)).mappings()]


def _response(engine: Engine, settings: Settings, now: datetime) -> dict[str, Any]:
    """What is going on, what waits for a person, the switches, and how often the alarm was right."""
    halted, armed, begun = (ledger.read_state(engine, name) for name in (HALTED, ARMED, ARMED_SHORTFALL))
    trouble = ledger.find(engine, state=(ledger.NEEDS_HUMAN, ledger.FAILED, ledger.UNKNOWN))
    return {
        "open_incidents": [
            {**{name: row[name] for name in ("id", "mode", "severity", "opened_on", "last_flagged_on", "owner", "ack_by", "acked_by")},
             "overdue": not row["acked_at"] and row["ack_by"] <= now}
            for row in incidents.find(engine, state="open")
        ],
        "pending_approvals": ledger.pending_approvals(engine),
        "actions_in_trouble": [
            {name: row[name] for name in ("key", "state", "mode", "alert_date", "slot", "kind", "destination", "last_error")}
            for row in trouble
        ],
        "duplicates": duplicates(engine),
        "held": why_held(engine),
        "halted": {name: halted[name] for name in ("by", "why", "at")} if halted and halted["value"] == "yes" else None,
        "armed": armed["value"] if armed else None,
        "shortfall_pilot_until": date.fromisoformat(begun["value"]) + timedelta(days=settings.shortfall_pilot_days) if begun else None,
        "precision": incidents.precision(engine),
    }


def _runs(engine: Engine, lake: Warehouse, built: list[date], clock: Clock) -> dict[str, Any]:
    from retention_ops.launch import instance, last_run, materialized_dates, mismatches  # Dagster only where there is something to ask
    from retention_ops.orchestration import record_ended_runs

    with instance(lake.settings) as stored:
        packed = materialized_dates(lake.settings, "action_pack", stored) if built else set()
        newest = last_run(lake.settings, stored)
        record_ended_runs(engine, stored, clock)
        return {
            "last_run": newest,
            "unfinished_dates": [day for day in built if day not in packed],
            "mismatches": mismatches(lake.settings, lake, stored),
        }


def _packs(settings: Settings) -> dict[date, Pack | None]:
    """Every pack by its date; None where the manifest cannot be read."""
    found: dict[date, Pack | None] = {}
    for day in pack_days(settings):
        try:
            pack = find_pack(settings, day)
        except PackError:
            found[day] = None
            continue
        if pack:
            found[day] = pack
    return found


def stale_packs(lake: Warehouse, packs: dict[date, Pack | None] | None = None) -> list[date]:
    """Dates whose pack was built from orders that changed since; a run killed between tables and pack leaves such."""
    changed = Changes(lake)
    packs = _packs(lake.settings) if packs is None else packs
    # an unreadable one is cured by building it again as well
    return [day for day, pack in packs.items() if pack is None or changed.since(pack.manifest["orders_version"], day)]


def packs_with_opted_out(lake: Warehouse, packs: dict[date, Pack | None] | None = None) -> list[date]:
    """Dates whose audience files list a customer who, by what is known now, refused consent or is suppressed."""
    customers, suppressions = lake.customers(), lake.suppressions()
    current = (customers.version if customers else "", suppressions.version if suppressions else "")
    found = []
    for day, pack in (_packs(lake.settings) if packs is None else packs).items():
        if pack and (pack.manifest.get("customers_version"), pack.manifest.get("suppressions_version", "")) != current:
            known = no_contact(lake, day)
            lists = (pack.folder / pack.manifest["audiences"][tier]["file"] for tier in TIERS)
            opted_out = {safe_text(customer_id) for customer_id in known.refused | known.suppressed}  # as the files have them
            if any(not opted_out.isdisjoint(_ids(path)) for path in lists if path.is_file()):
                found.append(pack.day)
    return found


def _ids(path) -> set[str]:
    with open(path, encoding="utf-8", newline="") as lines:
        return {row["customer_id"] for row in csv.DictReader(lines)}


def _next(facts: dict[str, Any]) -> list[str]:
    """What waits for a person, then the first trouble's cure, else where to look."""
    return [*_for_a_person(facts), *_cure(facts)]


def _for_a_person(facts: dict[str, Any]) -> list[str]:
    """At most one command: the oldest approval, held action, or incident that nobody acknowledged. Rehearsals wait for nobody."""
    if facts["held"]:  # nothing else can be done about what leaves
        return ["upgrade" if "upgrade" in facts["held"] else "actions reconcile"]
    waits = [f"actions show {row['action_key'][:12]}" for row in facts["pending_approvals"]]
    held = [row for row in facts["actions_in_trouble"] if row["mode"] in REAL_MODES]
    waits += [f"actions show {row['key'][:12]}" for row in held if row["state"] in ledger.HELD_STATES]
    waits += [
        f"incidents ack {row['id']} --by NAME" for row in facts["open_incidents"] if row["mode"] in REAL_MODES and not row["acked_by"]
    ]
    waits += ["actions work" for row in held if row["state"] == ledger.UNKNOWN]
    waits += ["health" for _ in facts["health"]]
    return waits[:1]


def _cure(facts: dict[str, Any]) -> list[str]:
    orders, run = facts["orders"], facts["last_run"]
    if orders is None:
        return ["source pull"] if facts["source"] else ["demo", "ingest orders.csv --preset orders"]
    if orders.complete_through < orders.first_date:  # all orders are from a day that is not over
        return ["source pull" if facts["source"] else "ingest orders.csv --preset orders"]
    if run and run["status"] in ("failure", "canceled") and run["from"]:
        return [f"backfill --from {run['from']} --to {run['to']}"]
    for trouble in ("stale_dates", "stale_packs", "unfinished_dates", "unanswered_dates", "packs_with_opted_out", "failed_answers"):
        if facts[trouble]:
            return [f"backfill --from {min(facts[trouble])} --to {max(facts[trouble])}"]
    if facts["newest_date"] is None or facts["newest_date"] < orders.complete_through:
        return [f"run --date {orders.complete_through}"]
    return [f"explain --date {facts['newest_date']}", "ui"]
