"""ops_runs_log: one row per answer, each carrying the hash of the row before it.

Whoever changes, removes or inserts a row breaks the chain from there on; `first_broken_row` names the place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from retention_ops.errors import LogError
from retention_ops.log.database import ingestions, lock_chain, ops_runs_log
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.files import locked
from retention_ops.warehouse.seam import Warehouse
from retention_ops.warehouse.versions import CustomersVersion, OrdersVersion

GENESIS = "0" * 64
ANSWERED_ALREADY = "already answered by run"
"""how the message of a row begins that found everything in order"""
COLUMNS = TABLES["ops_runs_log"].column_names
_ARROW_TYPES = {
    "STRING": pa.string(), "DATE": pa.date32(), "INT64": pa.int64(), "FLOAT64": pa.float64(), "BOOL": pa.bool_(),
    "TIMESTAMP": pa.timestamp("us", tz="UTC"),
}
_HASHED = [name for name in COLUMNS if name not in ("prev_hash", "row_hash")]


def _canonical(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds")
    if isinstance(value, date):
        return value.isoformat()
    return value


def row_hash(row: dict[str, Any], prev_hash: str) -> str:
    """sha256 over the previous row's hash and this row's columns in their declared order."""
    text = json.dumps([prev_hash, *(_canonical(row[name]) for name in _HASHED)], separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def append(engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
    """Adds one row (without its hashes) and returns it as stored; a row with the same key is returned, not doubled."""
    key = {name: row[name] for name in TABLES["ops_runs_log"].key}
    with engine.begin() as connection:
        lock_chain(connection)
        known = connection.execute(sa.select(ops_runs_log).filter_by(**key)).mappings().first()
        if known:
            return {name: known[name] for name in COLUMNS}
        last = connection.execute(sa.select(ops_runs_log.c.row_hash).order_by(ops_runs_log.c.position.desc()).limit(1)).scalar()
        prev_hash = last or GENESIS
        stored = {**row, "prev_hash": prev_hash, "row_hash": row_hash(row, prev_hash)}
        connection.execute(ops_runs_log.insert().values(stored))
    return stored


def rows(engine: Engine, *, first: date | None = None, last: date | None = None, newest: int | None = None) -> list[dict[str, Any]]:
    """Rows in the order they were written, of alert dates from `first` to `last`, or only the `newest` ones."""
    query = sa.select(ops_runs_log).order_by(ops_runs_log.c.position.desc())
    if first:
        query = query.where(ops_runs_log.c.alert_date >= first)
    if last:
        query = query.where(ops_runs_log.c.alert_date <= last)
    if newest:
        query = query.limit(newest)
    with engine.connect() as connection:
        found = connection.execute(query).mappings().all()
    return [{name: row[name] for name in COLUMNS} for row in reversed(found)]


def by_date(engine: Engine, first: date, last: date) -> dict[date, list[dict[str, Any]]]:
    """Rows of alert dates from `first` to `last`, in the order they were written."""
    found: dict[date, list[dict[str, Any]]] = {}
    for row in rows(engine, first=first, last=last):
        found.setdefault(row["alert_date"], []).append(row)
    return found


def response_failed(engine: Engine, run_id: str) -> bool:
    """Whether a run got as far as its response, and that failed."""
    query = sa.select(ops_runs_log.c.position).where(ops_runs_log.c.run_id == run_id, ops_runs_log.c.status == "failed").limit(1)
    with engine.connect() as connection:
        return connection.execute(query).first() is not None


def failed_dates(log: Iterable[Mapping[str, Any]]) -> list[date]:
    """Dates whose answer failed and did not succeed later, by rows in the order they were written."""
    failed: dict[date, None] = {}
    for row in log:
        # a response that finds everything of an earlier answer in order says so and counts as skipped
        if row["status"] == "success" or (row["error_message"] or "").startswith(ANSWERED_ALREADY):
            failed.pop(row["alert_date"], None)
        if row["status"] == "failed":
            failed[row["alert_date"]] = None
    return list(failed)


def first_broken_row(engine: Engine) -> tuple[int, dict[str, Any]] | None:
    """Position and content of the first row whose hash does not follow from the row before; None when all do."""
    prev_hash = GENESIS
    with engine.connect() as connection:
        for row in connection.execute(sa.select(ops_runs_log).order_by(ops_runs_log.c.position)).mappings():
            if row["prev_hash"] != prev_hash or row["row_hash"] != row_hash(dict(row), prev_hash):
                return row["position"], dict(row)
            prev_hash = row["row_hash"]
    return None


def export(engine: Engine, lake: Warehouse) -> int:
    """Writes the whole log as the lake table ops_runs_log; returns its rows.

    Raises LogError where the table holds a row the database does not: replacing it would remove the last trace of that row.
    """
    schema = pa.schema([(column.name, _ARROW_TYPES[column.type]) for column in TABLES["ops_runs_log"].columns])
    # under a lock, so that a slower export never replaces a newer one
    with locked(lake.root / ".ops_runs_log.lock"), lake.connection() as connection:
        stored = rows(engine)
        _refuse_losing(lake, {row["row_hash"] for row in stored})
        connection.register("log_rows", pa.Table.from_pylist(stored, schema=schema))
        connection.execute("CREATE TEMP TABLE ops_runs_log AS SELECT * FROM log_rows")
        return lake.write(connection, "ops_runs_log", None, {}, order_by="run_timestamp, alert_date")


def _refuse_losing(lake: Warehouse, known: set[str]) -> None:
    exported = lake.read("ops_runs_log")
    lost = exported[~exported["row_hash"].isin(known)]
    if len(lost):
        first = lost.iloc[0]
        raise LogError(
            f"{len(lost)} exported rows of ops_runs_log are missing in the ops database, the first of run {first['run_id']} for "
            f"{first['alert_date']:%Y-%m-%d}; `retention-ops audit verify` says more. If the database was replaced on purpose, move "
            f"{lake.path('ops_runs_log')} away"
        )


def record_ingestions(engine: Engine, dataset: str, versions: Iterable[OrdersVersion | CustomersVersion]) -> int:
    """Copies every version the database does not know yet; returns how many. The lake's version files are the truth."""
    added = 0
    with engine.begin() as connection:
        known = set(connection.execute(sa.select(ingestions.c.version).filter_by(dataset=dataset)).scalars())
        for version in versions:
            if version.version in known:
                continue
            connection.execute(ingestions.insert().values(
                dataset=dataset, version=version.version, ingested_at=version.created_at, preset=version.preset,
                rows=getattr(version, "orders", None) or getattr(version, "customers", 0),
                complete_through=getattr(version, "complete_through", None), stale_from=getattr(version, "stale_from", None),
                content_sha256=version.content_sha256,
            ))
            added += 1
    return added

