"""What is held about one person, wherever it lies: counted for an erasure, told in full for the person who asks.

As plain values for any door to show. Nothing here changes anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Engine

from retention_ops.detect.verdict import FILE as VERDICT
from retention_ops.execute import ledger, withdrawals
from retention_ops.execute.redact import redact
from retention_ops.installation import FILE as INSTALLATION
from retention_ops.log import forgotten, runs
from retention_ops.log.traces import Traces, files_with
from retention_ops.metrics import metrics_path
from retention_ops.package.audiences import arm
from retention_ops.package.erasure import outbox_with, packs_with
from retention_ops.package.pack import records
from retention_ops.settings import Settings
from retention_ops.warehouse.dialect import parquet_scan
from retention_ops.warehouse.seam import PER_CUSTOMER, Warehouse
from retention_ops.warehouse.versions import Store, Version, customers_store, orders_store, suppressions_store

OPEN_OR_SENT = (*ledger.OPEN_STATES, ledger.SENT, ledger.NEEDS_HUMAN)
"""states in which an action may have arrived"""
STATUS = ("retention_status", "churn_risk_level")
NOT_OURS = (
    "lists that somebody downloaded, copied or printed",
    "backups of this machine, its ops database and its home",
    "the history of the shell that named the customer, unless the id came over standard input",
)
"""what no erasure can reach, in every installation"""


OURS = {
    "lake", "action_packs", "outbox", "dagster", "tmp", "ops.sqlite", "ops.sqlite-wal", "ops.sqlite-shm", "ops.sqlite-journal", ".ops.lock",
    "warehouse.duckdb", "settings_of_backup.json", INSTALLATION, VERDICT,
}
"""what lies in a home of its own accord: searched and cleared elsewhere, or never about a person"""


@dataclass(frozen=True)
class Trace:
    """Where a person is found: `places` counts rows, files or partitions that can be erased; `unreached` lies outside."""

    places: dict[str, int] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)


def stores(settings: Settings) -> dict[Store, str]:
    """The ingested tables and the order in which their rows are kept."""
    return {orders_store(settings): "customer_id, order_date, order_id", customers_store(settings): "customer_id",
            suppressions_store(settings): "customer_id"}


def trace(lake: Warehouse, engine: Engine, traces: Traces) -> Trace:
    """Every place that names the person. Reads everything there is; a year of a shop of 100,000 customers takes seconds."""
    ids, settings = sorted(traces.names), lake.settings
    places: dict[str, int] = {}
    with lake.connection() as con:
        for store in stores(settings):
            held = store.holding(con, ids)
            places[store.name] = sum(held.values())
    for table, _, _ in lake.parts_holding(ids):
        places[table] = places.get(table, 0) + 1
    places["packs"], places["outbox"] = len(packs_with(settings, traces)), len(outbox_with(settings, traces))
    with engine.connect() as connection:
        hand_overs, told = forgotten.exposed(connection, ids), forgotten.told(connection, traces)
        places["hand-overs under way"] = len(forgotten.pending(connection, ids))
        places["audit events"] = len(forgotten.events(connection, traces))
    places["exposures"], places["actions"] = len(hand_overs), len(told)
    places["worksheets"] = sum(len(intent.payload["worksheets"]) for intent in to_withdraw(engine, hand_overs))
    places["Dagster's storage"] = len(files_with(settings.home / "dagster", traces))
    return Trace({name: number for name, number in places.items() if number}, _unreached(lake, engine, traces, told))


def to_withdraw(engine: Engine, hand_overs: Sequence[dict[str, Any]]) -> list[ledger.Intent]:
    """What deletes the worksheets a person may be on: those of the dates and tiers they were handed over for.

    A row alone cannot be taken out safely while people sort and filter the worksheet.
    """
    tiers: dict[Any, set[str]] = {}
    for row in hand_overs:
        if row["arm"] == "treated":
            tiers.setdefault(row["alert_date"], set()).add(row["tier"])
    found = [withdrawals.withdrawal(row, withdrawals.ERASED, tiers[row["alert_date"]])
             for row in withdrawals.published(engine) if row["alert_date"] in tiers]
    return [intent for intent in found if intent.payload["worksheets"]]


def _unreached(lake: Warehouse, engine: Engine, traces: Traces, told: Sequence[dict[str, Any]]) -> list[str]:
    """What lies where nothing here can delete it, with the address by which a person finds it."""
    found = []
    for row in told:
        if row["destination"] not in ("local", "dagster", "sheets") and row["state"] in OPEN_OR_SENT and row["attempts"]:
            where = row["external_url"] or row["external_id"] or "sent, address unknown"
            found.append(f"{row['destination']} {row['kind']} of {row['alert_date']}: {where}")
    for book in sorted({row["target"] for row in withdrawals.published(engine)}):
        found.append(f"Google's version history of spreadsheet {book}, and copies people made of its worksheets")
    named = [row["alert_date"] for row in runs.rows(engine) if traces.in_value(row["error_message"] or "")]
    found += [f"the message of ops_runs_log for {day}: its hash chain forbids a change" for day in named]
    found += [f"{name}, ingested {at:%Y-%m-%d}: the shop's own file" for name, at in _source_files(lake.settings)]
    if lake.engine == "bigquery":
        found.append("BigQuery's time travel (at most 7 days) and fail-safe (7 days more), and staging tables of a killed run (a day)")
    if engine.dialect.name == "postgresql":
        found.append("the write-ahead log and backups of the Postgres server")
    home = lake.settings.home
    if where := _dagsters_server(home):
        found.append(f"Dagster's own storage in {where}: it holds counts and hashes, but what a failed run said may name a customer; "
                     "search its table event_logs")
    found += [f"{path.relative_to(home)} in {home}: not a file of ours" for path in _others(lake.settings, traces)]
    return [redact(text) for text in dict.fromkeys([*found, *NOT_OURS])]


def _dagsters_server(home: Path) -> str:
    """The kind of server Dagster keeps its events in, where that is not a file of the home."""
    config = home / "dagster" / "dagster.yaml"
    found = re.search(r"^storage:\s+(postgres|mysql)\b", config.read_text(encoding="utf-8"), flags=re.M) if config.is_file() else None
    return {"postgres": "Postgres", "mysql": "MySQL"}[found[1]] if found else ""


def _source_files(settings: Settings) -> Iterator[tuple[str, datetime]]:
    for store in stores(settings):
        for version in store.versions():
            yield from ((file["name"], version.created_at) for file in version.files)


def _others(settings: Settings, traces: Traces) -> Iterator[Path]:
    """Files of the home that are none of our state and name the person, such as exports somebody put there."""
    metrics = metrics_path(settings)
    for path in sorted(settings.home.glob("*")):
        if path.name in OURS or path == metrics:
            continue
        if path.is_dir():
            yield from files_with(path, traces)
        elif traces.in_bytes(path.read_bytes()):
            yield path


# -- everything, for the person ------------------------------------------------------------------------------------------


def export(lake: Warehouse, engine: Engine | None, customer_id: str, now: datetime) -> dict[str, Any]:
    """All that is held about a customer, as plain values; dates and counts in place of a row per stored day.

    `engine` is None where nothing was ever answered. `held` is false where nothing is known of the id.
    """
    settings, ids = lake.settings, [customer_id]
    traces = Traces(ids)
    orders = _rows(lake, orders_store(settings).current(), customer_id, "order_date, order_id")
    days = {table.name: records(lake.rows_of(table.name, ids)) for table in PER_CUSTOMER}
    newest = {name: rows[-1] if rows else None for name, rows in days.items()}
    hand_overs, told, asked = _from_database(engine, ids, traces)
    found: dict[str, Any] = {
        "customer_id": customer_id,
        "exported_at": now,
        "orders": orders,
        "refunds": _refunds(lake, customer_id),
        "attributes": next(iter(_rows(lake, customers_store(settings).current(), customer_id, "customer_id")), None),
        "suppression": next(iter(_rows(lake, suppressions_store(settings).current(), customer_id, "customer_id")), None),
        "facts": newest["base_customers"],
        "risk": newest["churn_detection"],
        "risk_over_time": _spans(days["churn_detection"], "as_of_date", STATUS),
        "priority": newest["customer_priority"],
        "priority_over_time": _spans(days["customer_priority"], "run_date", ("priority_tier", "recommended_action")),
        "stored_days": {name: {"days": len(rows), "from": rows[0][column], "to": rows[-1][column]} for name, rows in days.items()
                        if rows and (column := _date_column(name))},
        "current_list": newest["audience_current"],
        "hand_overs": [{name: row[name] for name in (
            "alert_date", "tier", "arm", "at", "incident_id", "destination", "target", "mode")} for row in hand_overs],
        "named_in": [{"date": row["alert_date"], "what": f"{row['slot']} {row['kind']}", "by": row["destination"], "state": row["state"],
                      "where": row["external_url"] or row["external_id"]} for row in told],
        "packs": {name.partition(".")[0]: files for name, files in packs_with(settings, traces).items()},
        "outbox": outbox_with(settings, traces),
        "asked_about": asked,
        "would_be_held_out": arm(customer_id, settings) == "holdout",
    }
    held = ("orders", "attributes", "suppression", "facts", "priority", "hand_overs", "named_in", "packs", "outbox", "asked_about")
    return {"held": any(found[name] for name in held), **found}


def _from_database(engine: Engine | None, ids: list[str], traces: Traces) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Hand-overs, actions that name the customer, and how many events do."""
    if engine is None:
        return [], [], 0
    with engine.connect() as connection:
        return (forgotten.exposed(connection, ids), forgotten.told(connection, traces), len(forgotten.events(connection, traces)))


def _date_column(name: str) -> str | None:
    return next(table.date_column for table in PER_CUSTOMER if table.name == name)


def _rows(lake: Warehouse, version: Version | None, customer_id: str, order: str) -> list[dict[str, Any]]:
    if version is None:
        return []
    with lake.connection() as connection:
        frame = connection.execute(
            f"SELECT * FROM {parquet_scan(version.path)} WHERE customer_id = ? ORDER BY {order}", [customer_id]).df()
    return records(frame)


def _refunds(lake: Warehouse, customer_id: str) -> list[dict[str, Any]]:
    version = orders_store(lake.settings).current()
    if version is None or not version.refunds:
        return []
    with lake.connection() as connection:
        return records(connection.execute(
            "SELECT order_id, refund_date, refund_cents, currency "
            f"FROM {parquet_scan(version.refunds_path)} JOIN {parquet_scan(version.path)} AS orders USING (order_id) "
            "WHERE orders.customer_id = ? ORDER BY refund_date, order_id", [customer_id]).df())


def _spans(rows: Iterable[dict[str, Any]], date_column: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of one customer as stretches over which nothing changed: first and last stored day, and how many."""
    spans = []
    for values, group in groupby(rows, key=lambda row: tuple(row[name] for name in columns)):
        days = [row[date_column] for row in group]
        spans.append({"from": days[0], "to": days[-1], "days": len(days), **dict(zip(columns, values, strict=True))})
    return spans


def as_markdown(found: dict[str, Any], currency: str) -> str:
    """An export as a page that a person can read."""
    lines = [f"# What is held about customer {found['customer_id']}", "", f"As of {found['exported_at']:%Y-%m-%d %H:%M} UTC.", ""]
    lines += _section("Orders", [f"{row['order_date']}: {row['order_cents'] / 100:,.2f} {row['currency']} (order {row['order_id']})"
                                 for row in found["orders"]])
    if found["refunds"]:
        lines += _section("Refunds", [f"{row['refund_date']}: {row['refund_cents'] / 100:,.2f} {row['currency']} (of order "
                                      f"{row['order_id']})" for row in found["refunds"]])
    for title, name in (
        ("Attributes", "attributes"), ("Do not contact", "suppression"), ("Facts, newest stored day", "facts"),
        ("Risk, newest stored day", "risk"), ("Priority, newest stored day", "priority"), ("On the current list", "current_list"),
    ):
        lines += _section(title, [f"{key}: {value}" for key, value in (found[name] or {}).items() if value is not None])
    lines += _section("Risk over time", [f"{_span(row)}: {row['retention_status']}, risk {row['churn_risk_level']}"
                                         for row in found["risk_over_time"]])
    lines += _section("Priority over time", [f"{_span(row)}: {row['priority_tier']}, {row['recommended_action']}"
                                             for row in found["priority_over_time"]])
    lines += _section("Handed over", [
        f"{row['alert_date']}: {row['tier']}, {'on the list' if row['arm'] == 'treated' else 'held out, not on the list'}, by "
        f"{row['destination']} ({row['mode']}), incident {row['incident_id']}" for row in found["hand_overs"]])
    lines += _section("Named in messages and tickets", [
        f"{row['date']}: {row['what']} by {row['by']}, {row['state']}" + (f", {row['where']}" if row["where"] else "")
        for row in found["named_in"]])
    lines += _section("Action Packs", [f"{day}: {', '.join(files)}" for day, files in found["packs"].items()])
    lines += _section("Outbox", found["outbox"])
    lines += _section("Questions of assistants about this customer", [str(found["asked_about"])] if found["asked_about"] else [])
    return "\n".join(lines)


def _section(title: str, entries: list[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {entry}" for entry in entries or ["nothing"]), ""]


def _span(row: dict[str, Any]) -> str:
    return str(row["from"]) if row["from"] == row["to"] else f"{row['from']} to {row['to']} ({row['days']} stored days)"
