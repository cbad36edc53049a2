"""Is everything as it should be? Data, runs, answers, lists and what to do next, as plain values for any door to show."""

from __future__ import annotations

import csv
from datetime import date
from typing import Any

from retention_ops.errors import PackError
from retention_ops.log import runs
from retention_ops.log.database import ops_database
from retention_ops.package.audiences import TIERS, safe_text
from retention_ops.package.pack import find_pack, no_contact, pack_days, records
from retention_ops.settings import Settings
from retention_ops.warehouse.choice import open_warehouse
from retention_ops.warehouse.freshness import Changes, freshness
from retention_ops.warehouse.seam import Warehouse

RECENT = 30


def status(settings: Settings) -> dict[str, Any]:
    """Everything `retention-ops status` shows. `next` is the most useful command (without the program's name)."""
    lake = open_warehouse(settings)
    orders, customers = lake.orders(), lake.customers()
    built = lake.days("alert_logic")
    recent = records(lake.read_range("alert_logic", built[-RECENT:][0], built[-1])) if built else []
    facts: dict[str, Any] = {
        "home": settings.home,
        "mode": settings.mode,
        "orders": orders,
        "complete_through": orders.complete_through if orders else None,
        "customers": customers.customers if customers else None,
        "dates_built": len(built),
        "newest_date": built[-1] if built else None,
        "flagged": [row for row in recent if row["alert_flag"]],
        "last_run": None, "last_answer": None, "failed_answers": [], "audit": "no rows yet", "audit_broken_at": None,
        "unfinished_dates": [], "unanswered_dates": [], "mismatches": [],
        "packs_with_opted_out": packs_with_opted_out(lake),
        "stale_packs": stale_packs(lake),
    }
    fresh = freshness(lake)
    facts |= {"stale_dates": fresh.stale, "other_rules_dates": fresh.other_rules}
    if orders:
        facts |= _answers(lake, recent) | _runs(lake, built)
    return facts | {"next": _next(facts)}


def _answers(lake: Warehouse, recent: list[dict[str, Any]]) -> dict[str, Any]:
    with ops_database(lake.settings) as engine:
        log = runs.rows(engine)
        broken = runs.first_broken_row(engine)
    newest = {row["alert_date"]: row for row in log}
    return {
        "last_answer": log[-1] if log else None,
        "failed_answers": [day for day, row in newest.items() if row["status"] == "failed"],
        "audit": f"broken at row {broken[0]}, date {broken[1]['alert_date']}" if broken
        else f"{len(log):,} row{'' if len(log) == 1 else 's'}, hash chain whole",
        "audit_broken_at": broken[0] if broken else None,
        "unanswered_dates": [date.fromisoformat(row["alert_date"]) for row in recent
                             if row["alert_flag"] and date.fromisoformat(row["alert_date"]) not in newest],
    }


def _runs(lake: Warehouse, built: list[date]) -> dict[str, Any]:
    from retention_ops.launch import last_run, materialized_dates, mismatches  # Dagster only where there is something to ask

    packed = materialized_dates(lake.settings, "action_pack") if built else set()
    return {
        "last_run": last_run(lake.settings),
        "unfinished_dates": [day for day in built if day not in packed],
        "mismatches": mismatches(lake.settings, lake),
    }


def stale_packs(lake: Warehouse) -> list[date]:
    """Dates whose pack was built from orders that changed since; a run killed between tables and pack leaves such."""
    changed, found = Changes(lake), []
    for day in pack_days(lake.settings):
        try:
            pack = find_pack(lake.settings, day)
        except PackError:
            found.append(day)  # unreadable: building it again is the cure as well
            continue
        if pack and changed.since(pack.manifest["orders_version"], day):
            found.append(day)
    return found


def packs_with_opted_out(lake: Warehouse) -> list[date]:
    """Dates whose audience files list a customer who, by what is known now, refused consent or is suppressed."""
    customers, suppressions = lake.customers(), lake.suppressions()
    current = (customers.version if customers else "", suppressions.version if suppressions else "")
    found = []
    for day in pack_days(lake.settings):
        try:
            pack = find_pack(lake.settings, day)
        except PackError:
            continue  # an unreadable manifest is found where the pack is used
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
    """The first trouble's cure, else where to look."""
    orders, run = facts["orders"], facts["last_run"]
    if orders is None:
        return ["demo", "ingest orders.csv --preset orders"]
    if orders.complete_through < orders.first_date:  # all orders are from a day that is not over
        return ["ingest orders.csv --preset orders"]
    if run and run["status"] in ("failure", "canceled") and run["from"]:
        return [f"backfill --from {run['from']} --to {run['to']}"]
    for trouble in ("stale_dates", "stale_packs", "unfinished_dates", "unanswered_dates", "packs_with_opted_out", "failed_answers"):
        if facts[trouble]:
            return [f"backfill --from {min(facts[trouble])} --to {max(facts[trouble])}"]
    if facts["newest_date"] is None or facts["newest_date"] < orders.complete_through:
        return [f"run --date {orders.complete_through}"]
    return [f"explain --date {facts['newest_date']}", "ui"]
