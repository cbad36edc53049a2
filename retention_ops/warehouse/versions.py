"""Immutable versions of a table on disk, and which of them is in force. What is in one is not decided here.

    lake/orders/version=000001-0a1b2c3d4e5f/part-0.parquet    the orders, sorted, never changed
    lake/orders/version=000001-0a1b2c3d4e5f/refunds.parquet   what was refunded of them, where there was any: part of the version
    lake/orders/version=000001-0a1b2c3d4e5f/version.json      what they are and where they came from, kept for ever
    lake/orders/CURRENT                                       names the version in force

A version is complete and on disk before CURRENT names it, so a kill at any moment leaves the old one in force.
Customers and suppressions are kept the same way under lake/customers and lake/suppressions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date, datetime
from functools import cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import duckdb
from pydantic import TypeAdapter

from retention_ops.errors import InputRefused, RetentionOpsError
from retention_ops.settings import Settings
from retention_ops.warehouse.catalog import DUCKDB_TYPES, TABLES, Table
from retention_ops.warehouse.dialect import literal, parquet_scan
from retention_ops.warehouse.files import fsync_file, fsync_folder, locked, write_atomic
from retention_ops.warehouse.schema import check_lake, lake_schema, stamp

HASH_ROWS = 50_000
REFUNDS_FILE = "refunds.parquet"
"""beside the orders, because a result must say with one version what it was made from"""


@dataclass(frozen=True, kw_only=True)
class Version:
    """One immutable version. `files` are {name, sha256, records}; `parent` is the version it was built on.

    `id_hashing` is the setting hash_customer_ids it was made under, `id_key` the fingerprint of the key where ids were hashed.
    """

    version: str
    path: Path
    content_sha256: str
    parent: str | None
    created_at: datetime
    preset: str
    files: list[dict[str, Any]]
    records_read: int
    excluded: dict[str, int]
    customers: int
    added: int
    replaced: int
    removed: int
    unchanged: int
    id_hashing: Literal["emails", "all", "off"] = "off"
    id_key: str = ""


@dataclass(frozen=True, kw_only=True)
class OrdersVersion(Version):
    """Orders as of one ingest, with the `refunds` of them (rows of that table; its file is there only where there are any).

    `stale_from`: earliest date whose results differ from the parent's; None for the first.
    """

    complete_through: date
    first_date: date
    last_date: date
    orders: int
    currency: str
    stale_from: date | None
    refunds: int = 0

    @property
    def refunds_path(self) -> Path:
        return self.path.with_name(REFUNDS_FILE)


@dataclass(frozen=True, kw_only=True)
class CustomersVersion(Version):
    """Customer attributes as of one ingest."""


@dataclass(frozen=True, kw_only=True)
class SuppressionsVersion(Version):
    """Who must not be contacted, as of one ingest. `removed` were lifted by it."""


def current_orders(settings: Settings) -> OrdersVersion | None:
    """The orders version in force, None before the first ingest."""
    return orders_store(settings).current()


def orders_versions(settings: Settings) -> list[OrdersVersion]:
    """Every orders version, oldest first; the parquet file of old ones may be gone."""
    return orders_store(settings).versions()


def current_customers(settings: Settings) -> CustomersVersion | None:
    """The customers version in force, None when none were ingested."""
    return customers_store(settings).current()


def current_suppressions(settings: Settings) -> SuppressionsVersion | None:
    """The suppressions version in force, None when none were ingested."""
    return suppressions_store(settings).current()


# --- the folder of one table ----------------------------------------------------------------------------------------

V = TypeVar("V", bound=Version)
FORGET = "forget"
"""`preset` of a version that an erasure made"""
_NAMED = ("version", "path", "content_sha256", "parent", "created_at", "preset", "files", "records_read", "excluded", "customers", "added",
          "replaced", "removed", "unchanged", "orders", "stale_from", "refunds")
"""what a version without somebody does not take over from its parent"""


@cache
def _adapter(kind: type) -> TypeAdapter:
    """Turns a dataclass into plain JSON values and back."""
    return TypeAdapter(kind)


@dataclass(frozen=True)
class Draft:
    """A version that is written but not in force; `scan` is SQL for its rows, `refunds` counts those written beside them."""

    folder: Path
    scan: str
    rows: int
    content_sha256: str
    refunds: int = 0


@dataclass(frozen=True)
class Store(Generic[V]):
    """The versions of one table under one folder of the lake."""

    folder: Path
    kind: type[V]
    name: str

    @property
    def table(self) -> Table:
        return TABLES[self.name]

    def current(self) -> V | None:
        """The version CURRENT names. Raises RetentionOpsError when it cannot be read."""
        try:
            named = (self.folder / "CURRENT").read_bytes()
        except FileNotFoundError:  # asked once: another ingest may put the first one in place right after
            return None
        try:
            return self._read(self.folder / f"version={json.loads(named)['version']}")
        except FileNotFoundError as error:
            raise RetentionOpsError(f"{self.folder}/CURRENT names a version that is not there; restore it") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RetentionOpsError(f"{self.folder}/CURRENT or its version.json is damaged; restore it") from error

    def versions(self) -> list[V]:
        """Versions up to the current one, oldest first; a later folder is what a killed ingest left."""
        current = self.current()
        if current is None:
            return []
        folders = sorted(path.parent for path in self.folder.glob("version=*/version.json"))
        return [self._read(path) for path in folders if path.name <= f"version={current.version}"]

    def _read(self, folder: Path) -> V:
        values = json.loads((folder / "version.json").read_text())
        return _adapter(self.kind).validate_python({**values, "path": folder / "part-0.parquet"})

    @contextmanager
    def locked(self, progress: Callable[[str], None]) -> Iterator[None]:
        """Hold the table's lock, waiting for another ingest if need be, and clear what a killed one left."""
        check_lake(self.folder.parent)
        if not self.folder.is_dir():
            if lake_schema(self.folder.parent) is None:
                stamp(self.folder.parent)
            self.folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(self.folder.parent)
        with locked(self.folder / ".lock", before_waiting=lambda: progress("waiting for another ingest to finish")):
            self._clear_leftovers()
            yield

    def _clear_leftovers(self) -> None:
        """Remove what a killed ingest left: drafts, and a version that was complete but never in force."""
        current = self.current()
        if current is None and len(list(self.folder.glob("version=*"))) > 1:
            # only a first version can be complete without a CURRENT; anything else is somebody's history
            raise RetentionOpsError(f"{self.folder} holds versions but CURRENT is missing; restore it before ingesting")
        for path in self.folder.iterdir():
            unfinished = path.name.startswith((".incoming-", ".CURRENT"))
            never_in_force = path.name.startswith("version=") and (current is None or path.name > f"version={current.version}")
            if unfinished or never_in_force:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextmanager
    def writing(
        self, con: duckdb.DuckDBPyConnection, rows: str, order: str, progress: Callable[[str], None], *, may_be_empty: bool = False,
    ) -> Iterator[Draft]:
        """Write rows to a folder no reader looks at, prove the file is what the catalog says, and clean up on failure."""
        folder = self.folder / f".incoming-{os.getpid()}"
        folder.mkdir()
        try:
            path = folder / "part-0.parquet"
            progress(f"writing {self.name}")
            con.execute(
                f"COPY (SELECT * FROM ({rows}) ORDER BY {order}) TO {literal(path.absolute())} (FORMAT parquet, COMPRESSION zstd)"
            )
            count = self._prove(con, self.table, path, may_be_empty)
            progress(f"hashing {count:,} {self.name}")
            yield Draft(folder, parquet_scan(path), count, self._hash(con, self.table, path))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def with_refunds(self, con: duckdb.DuckDBPyConnection, draft: Draft, rows: str) -> Draft:
        """The draft with these refunds beside its orders, as part of its content; as it is where there are none."""
        path, table = draft.folder / REFUNDS_FILE, TABLES["refunds"]
        columns = ", ".join(table.column_names)
        con.execute(f"COPY (SELECT {columns} FROM ({rows}) ORDER BY customer_id, order_date, order_id, refund_date) "
                    f"TO {literal(path.absolute())} (FORMAT parquet, COMPRESSION zstd)")
        count = self._prove(con, table, path, may_be_empty=True)
        if not count:
            path.unlink()
            return draft
        stamp(self.folder.parent)
        # without refunds the hash stays that of the orders alone, as it was before there could be any
        both = hashlib.sha256(f"{draft.content_sha256}\n{self._hash(con, table, path)}".encode()).hexdigest()
        return replace(draft, content_sha256=both, refunds=count)

    def _prove(self, con: duckdb.DuckDBPyConnection, table: Table, path: Path, may_be_empty: bool) -> int:
        """Rows of the written file. Raises if its columns differ from the catalog's, a key repeats or a value is missing."""
        found = [(row[0], row[1]) for row in con.execute(f"DESCRIBE SELECT * FROM {parquet_scan(path)}").fetchall()]
        expected = [(column.name, DUCKDB_TYPES[column.type]) for column in table.columns]
        # a struct costs a count of distinct values twice as much as the one column that most keys are
        key = table.key[0] if len(table.key) == 1 else f"({', '.join(table.key)})"
        filled = " AND ".join(f"{column.name} IS NOT NULL" for column in table.columns if not column.nullable)
        count, distinct, complete = con.execute(
            f"SELECT count(*), count(DISTINCT {key}), coalesce(bool_and({filled}), true) FROM {parquet_scan(path)}"
        ).fetchone()
        if found != expected or count != distinct or not complete:
            raise RetentionOpsError(f"the new {table.name} version breaks the catalog (columns, unique {key}); not published")
        if not count and not may_be_empty:
            raise InputRefused(f"this would leave no {table.name} at all; nothing was written.\nCheck the file.")
        return count

    def _hash(self, con: duckdb.DuckDBPyConnection, table: Table, path: Path) -> str:
        """sha256 over the rows in stored order, fetched piece by piece so that memory does not grow with the table."""
        # values hold no control characters, so two different rows never give the same text
        text = " || chr(31) || ".join(f"coalesce(CAST({name} AS VARCHAR), '')" for name in table.column_names)
        digest = hashlib.sha256()
        con.execute(f"SELECT {text} || chr(10) FROM {parquet_scan(path)}")
        while rows := con.fetchmany(HASH_ROWS):
            digest.update("".join(row[0] for row in rows).encode())
        return digest.hexdigest()

    def publish(self, draft: Draft, parent: Version | None, **facts: Any) -> V:
        """Give the draft its final name, then point CURRENT at it; each step is on disk before the next."""
        numbers = [int(path.name[8:14]) for path in self.folder.glob("version=*")]
        name = f"{max(numbers, default=0) + 1:06d}-{draft.content_sha256[:12]}"
        target = self.folder / f"version={name}"
        version = self.kind(
            version=name, path=target / "part-0.parquet", content_sha256=draft.content_sha256,
            parent=parent.version if parent else None, **facts,
        )
        values = _adapter(self.kind).dump_python(version, mode="json", exclude={"path"})
        (draft.folder / "version.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for path in draft.folder.iterdir():
            fsync_file(path)
        fsync_folder(draft.folder)
        os.rename(draft.folder, target)
        fsync_folder(self.folder)
        write_atomic(self.folder / "CURRENT", json.dumps({"version": name}) + "\n")
        return version

    def holding(self, con: duckdb.DuckDBPyConnection, customer_ids: Sequence[str]) -> dict[str, int]:
        """Version -> rows of these customers, of every version whose file is still there."""
        there = [version for version in self.versions() if version.path.is_file()]
        counted = {version.version: con.execute(
            f"SELECT count(*) FROM {parquet_scan(version.path)} WHERE customer_id IN (SELECT unnest(?))", [list(customer_ids)],
        ).fetchone()[0] for version in there}
        return {version: rows for version, rows in counted.items() if rows}

    def erase(
        self, con: duckdb.DuckDBPyConnection, customer_ids: Sequence[str], order: str, now: datetime, progress: Callable[[str], None],
    ) -> int:
        """Puts a version without these customers in force and deletes the file of each older one that holds them; returns rows erased.

        No date becomes stale by it: what was computed from the older version stays what it was, less the customers' own rows. Raises
        RetentionOpsError where nobody would be left in the orders.
        """
        with self.locked(progress):
            parent, held = self.current(), self.holding(con, customer_ids)
            if parent is not None and parent.version in held:
                self._publish_without(con, parent, customer_ids, order, held[parent.version], now, progress)
            for version in self.versions()[:-1]:
                if version.version in held:
                    _drop(version)
            fsync_folder(self.folder)
        return held.get(parent.version, 0) if parent else 0

    def _publish_without(
        self, con: duckdb.DuckDBPyConnection, parent: V, customer_ids: Sequence[str], order: str, erased: int, now: datetime,
        progress: Callable[[str], None],
    ) -> None:
        con.execute("CREATE OR REPLACE TEMP TABLE erased_ids AS SELECT unnest(?) AS customer_id", [list(customer_ids)])
        rows = f"SELECT * FROM {parquet_scan(parent.path)} ANTI JOIN erased_ids USING (customer_id)"
        left = con.execute(f"SELECT count(*) FROM ({rows})").fetchone()[0]
        if self.name == "orders" and not left:
            raise RetentionOpsError("nobody would be left in the orders; delete the whole home instead")
        with self.writing(con, rows, order, progress, may_be_empty=True) as draft:
            customers = con.execute(f"SELECT count(DISTINCT customer_id) FROM {draft.scan}").fetchone()[0]
            if isinstance(parent, OrdersVersion) and parent.refunds:
                draft = self.with_refunds(
                    con, draft, f"SELECT * FROM {parquet_scan(parent.refunds_path)} ANTI JOIN erased_ids USING (customer_id)")
            kept = _adapter(self.kind).dump_python(parent)
            # first and last date stay those of the parent: the calendar of dates must not move because one person left
            counted = {"orders": draft.rows, "refunds": draft.refunds, "stale_from": None} if self.name == "orders" else {}
            self.publish(draft, parent, **{name: kept[name] for name in kept if name not in _NAMED}, **{
                "created_at": now, "preset": FORGET, "files": [], "records_read": 0, "excluded": {}, "customers": customers, "added": 0,
                "replaced": 0, "removed": erased, "unchanged": draft.rows, **counted})

    def prune(self, keep: int) -> None:
        """Delete the parquet file of all but the newest `keep` versions."""
        for version in self.versions()[:-keep]:
            _drop(version)


def _drop(version: Version) -> None:
    """Deletes the rows of a version; what it was stays."""
    # refunds first: orders without theirs would be another content, refunds without orders are none
    version.path.with_name(REFUNDS_FILE).unlink(missing_ok=True)
    version.path.unlink(missing_ok=True)


def orders_store(settings: Settings) -> Store[OrdersVersion]:
    return Store(settings.home / "lake" / "orders", OrdersVersion, "orders")


def customers_store(settings: Settings) -> Store[CustomersVersion]:
    return Store(settings.home / "lake" / "customers", CustomersVersion, "customers")


def suppressions_store(settings: Settings) -> Store[SuppressionsVersion]:
    return Store(settings.home / "lake" / "suppressions", SuppressionsVersion, "suppressions")
