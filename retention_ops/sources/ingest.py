"""Takes order files in: reads, checks and combines them, and keeps the result as an immutable version.

    lake/orders/version=000001-0a1b2c3d4e5f/part-0.parquet    the orders, sorted, never changed
    lake/orders/version=000001-0a1b2c3d4e5f/version.json      what they are and where they came from, kept for ever
    lake/orders/CURRENT                                       names the version in force

A version is complete and on disk before CURRENT names it, so a kill at any moment leaves the old one in force.
Customers are kept the same way under lake/customers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import duckdb
from pydantic import TypeAdapter

from retention_ops.clock import Clock, system_clock
from retention_ops.errors import InputRefused, RetentionOpsError, UsageError
from retention_ops.settings import Settings
from retention_ops.sources.presets import Preset, get_preset
from retention_ops.sources.reading import InputFile, Progress, Source, literal, no_glob, open_files
from retention_ops.sources.validation import Bounds, Findings, Problem, bounds, check, load
from retention_ops.warehouse.catalog import DUCKDB_TYPES, TABLES, Table

CORRECT = "Correct the file and ingest it again; --show-values shows the values at fault."
CHANGES = ("added", "replaced", "removed", "unchanged")
HASH_ROWS = 50_000


# --- what callers see -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Version:
    """One immutable version. `files` are {name, sha256, records}; `parent` is the version it was built on."""

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


@dataclass(frozen=True, kw_only=True)
class OrdersVersion(Version):
    """Orders as of one ingest. `stale_from`: earliest date whose results differ from the parent's; None for the first."""

    complete_through: date
    first_date: date
    last_date: date
    orders: int
    currency: str
    stale_from: date | None


@dataclass(frozen=True, kw_only=True)
class CustomersVersion(Version):
    """Customer attributes as of one ingest."""


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What one ingest did. `rows`, `customers` and the dates describe CURRENT afterwards; `excluded` counts file records.

    `removed` are known orders that a file given with --replace says are worth nothing.
    """

    dataset: str
    version: str
    changed: bool
    files: list[dict[str, Any]]
    records_read: int
    excluded: dict[str, int]
    rows: int
    customers: int
    first_date: date | None
    last_date: date | None
    complete_through: date | None
    currency: str | None
    added: int
    replaced: int
    removed: int
    unchanged: int
    stale_from: date | None
    content_sha256: str
    ignored_columns: list[str] = field(default_factory=list)
    skipped_sheets: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values, dates as YYYY-MM-DD."""
        return _adapter(IngestReport).dump_python(self, mode="json")


def ingest(
    files: Sequence[Path],
    preset: str,
    settings: Settings,
    *,
    replace: bool = False,
    complete_through: date | None = None,
    show_values: bool = False,
    clock: Clock = system_clock,
    progress: Progress = lambda text: None,
) -> IngestReport:
    """Add the files' orders (or customers) to the current version.

    Raises InputRefused when any file breaks a rule, or brings a known order with other content and `replace` is not
    given; nothing is written then. Raises UsageError when the call itself makes no sense. Content that is already there
    changes nothing. Two ingests at the same time queue.
    """
    chosen = get_preset(preset)
    limits = bounds(settings, clock)
    _check_call(files, chosen, complete_through, limits)
    with _scratch(settings.home) as scratch, _connect(settings, scratch) as con:
        staged = _stage([Path(path) for path in files], chosen, settings, limits, show_values, con, scratch, progress)
        if chosen.dataset == "customers":
            return _commit_customers(con, staged, settings, clock, progress)
        return _commit_orders(con, staged, settings, replace, complete_through, show_values, clock, progress)


def current_orders(settings: Settings) -> OrdersVersion | None:
    """The orders version in force, None before the first ingest."""
    return _orders_store(settings).current()


def orders_versions(settings: Settings) -> list[OrdersVersion]:
    """Every orders version, oldest first; the parquet file of old ones may be gone."""
    return _orders_store(settings).versions()


def current_customers(settings: Settings) -> CustomersVersion | None:
    """The customers version in force, None when none were ingested."""
    return _customers_store(settings).current()


# --- staging: files to one table of checked rows --------------------------------------------------------------------


@dataclass
class _Staged:
    """Table `staged` holds one row per order (or customer) of the input: the catalog's columns, source and record."""

    preset: Preset
    files: list[InputFile]
    sources: list[Source]
    excluded: dict[str, int]

    @property
    def records(self) -> int:
        return sum(source.records for source in self.sources)

    def found_in(self) -> list[dict[str, Any]]:
        return [{"name": file.name, "sha256": file.sha256, "records": file.records} for file in self.files]


def _check_call(files: Sequence[Path], preset: Preset, complete_through: date | None, limits: Bounds) -> None:
    if not files:
        raise UsageError("no file given; name at least one to ingest")
    if complete_through is None:
        return
    if preset.dataset == "customers":
        raise UsageError("--complete-through is about orders; preset customers has no such date")
    if complete_through > limits.latest:
        raise UsageError(f"--complete-through {complete_through} is in the future; orders of that day cannot all be in")


def _stage(
    files: list[Path], preset: Preset, settings: Settings, limits: Bounds, show_values: bool, con: duckdb.DuckDBPyConnection,
    scratch: Path, progress: Progress,
) -> _Staged:
    """Read and check everything and create table `staged`. Raises InputRefused with all that is wrong."""
    opened = open_files(files, preset, con, scratch, progress)
    sources = [source for file in opened for source in file.sources]
    findings = Findings()
    for number, source in enumerate(sources):
        load(con, source, preset, limits, f"typed_{number}")
        progress(f"checking {source.records:,} records of {source.label}")
        check(con, source, preset, limits, f"typed_{number}", findings, show_values)
    for file in opened:
        file.check_unchanged()
    findings.raise_if_any(CORRECT)
    _refuse_no_records(sources)
    staged = _Staged(preset, opened, sources, {})
    _gather_lines(con, staged)
    if preset.dataset == "customers":
        _stage_customers(con, staged, findings, show_values)
    else:
        progress(f"grouping {staged.records:,} records into orders")
        _stage_orders(con, staged, settings, limits, findings, show_values)
    return staged


def _refuse_no_records(sources: list[Source]) -> None:
    for source in sources:
        if not source.records:
            raise InputRefused(f"{source.label} has a header but no records; nothing was written.\nExport it again.")


def _gather_lines(con: duckdb.DuckDBPyConnection, staged: _Staged) -> None:
    """Table `lines`: the records of all sources with their reason for exclusion, counted into staged.excluded."""
    names = ", ".join(entry.name for entry in staged.preset.fields)
    whens = " ".join(f"WHEN {rule.when} THEN {number}" for number, rule in enumerate(staged.preset.exclusions))
    excluded = f"CASE {whens} END" if whens else "NULL"
    parts = [
        f"SELECT {number} AS source, rowid + 1 AS record, {names}, CAST({excluded} AS UTINYINT) AS exclusion FROM typed_{number}"
        for number in range(len(staged.sources))
    ]
    con.execute(f"CREATE TABLE lines AS {' UNION ALL '.join(parts)}")
    for number in range(len(staged.sources)):
        con.execute(f"DROP TABLE typed_{number}")
    counts = dict(con.execute("SELECT exclusion, count(*) FROM lines WHERE exclusion IS NOT NULL GROUP BY 1").fetchall())
    for number, rule in enumerate(staged.preset.exclusions):
        _count_excluded(staged, rule.reason, counts.get(number, 0))


def _count_excluded(staged: _Staged, reason: str, records: int) -> None:
    if records:
        staged.excluded[reason] = staged.excluded.get(reason, 0) + records


def _stage_orders(
    con: duckdb.DuckDBPyConnection, staged: _Staged, settings: Settings, limits: Bounds, findings: Findings, show_values: bool
) -> None:
    """Table `staged`: an order per key of the first source that has it, order_cents 0 where it is worth nothing."""
    preset = staged.preset
    _find_key_faults(con, staged, findings, show_values)
    _value_orders(con, preset, preset.currency or settings.currency, limits)
    header = preset.field(preset.amount_field).header
    rule = f"makes an order above max_order_amount ({limits.max_amount_setting:,})"
    _find(con, staged, findings, f"SELECT source, record, order_id FROM parts WHERE order_cents > {limits.max_amount * 100}",
          header, rule, False)
    _drop_repeats(con, staged, ("customer_id", "order_date", "order_cents", "currency"), "order_id", findings, show_values)
    findings.raise_if_any(CORRECT)
    _refuse_currencies(con, "SELECT currency, count(*) FROM staged GROUP BY 1 ORDER BY 2 DESC")
    worth_nothing = con.execute("SELECT coalesce(sum(records), 0) FROM staged WHERE order_cents = 0").fetchone()[0]
    repeated = staged.excluded.pop(preset.repeated, 0)
    _count_excluded(staged, preset.zero, worth_nothing)
    _count_excluded(staged, preset.repeated, repeated)


def _value_orders(con: duckdb.DuckDBPyConnection, preset: Preset, fallback: str, limits: Bounds) -> None:
    """Table `parts`: an order per source and key, with its value rounded once, half up, to cents."""
    has_currency = any(entry.name == "currency" for entry in preset.fields)
    currency = f"coalesce(currency, {literal(fallback)})" if has_currency else literal(fallback)
    # least() keeps the sum inside DECIMAL(38, 12) whatever the file holds; an order that needs it is refused afterwards
    value = f"least({preset.amount}, {limits.max_amount + 1})"
    if preset.several_records:
        columns = (
            "arg_min(customer_id, record)", "min(order_date)", f"sum({value})", f"min({currency})", "min(record)", "count(*)"
        )
    else:
        # grouping unique keys anyway takes twice as long
        columns = ("customer_id", "order_date", value, currency, "record", "1")
    customer, day, total, code, record, records = columns
    con.execute(
        f"""CREATE TABLE parts AS
        SELECT source, {preset.key} AS order_id, {customer} AS customer_id, {day} AS order_date,
               CAST(round({total}, 2) * 100 AS BIGINT) AS order_cents, {code} AS currency,
               {record} AS record, {records} AS records
        FROM lines WHERE exclusion IS NULL {'GROUP BY ALL' if preset.several_records else ''}"""
    )


def _find_key_faults(con: duckdb.DuckDBPyConnection, staged: _Staged, findings: Findings, show_values: bool) -> None:
    """A key given twice in one file, or, where a key may have several records, one key with several customers."""
    preset = staged.preset
    header = preset.field(preset.key_field).header
    if preset.several_records:
        sql = f"""SELECT source, min(record), key FROM (
            SELECT source, record, {preset.key} AS key, customer_id,
                   first_value(customer_id) OVER (PARTITION BY source, {preset.key} ORDER BY record) AS first_customer
            FROM lines SEMI JOIN (SELECT source, {preset.key} AS mixed FROM lines WHERE exclusion IS NULL
                                  GROUP BY ALL HAVING min(customer_id) <> max(customer_id)) m
                 ON m.source = lines.source AND m.mixed = {preset.key}
            WHERE exclusion IS NULL) WHERE customer_id <> first_customer GROUP BY source, key"""
        _find(con, staged, findings, sql, header, "belongs to two customers", show_values)
    else:
        sql = f"""SELECT source, record, key FROM (
            SELECT source, record, {preset.key} AS key,
                   row_number() OVER (PARTITION BY source, {preset.key} ORDER BY record) AS nth
            FROM lines SEMI JOIN (SELECT source, {preset.key} AS twice FROM lines GROUP BY ALL HAVING count(*) > 1) t
                 ON t.source = lines.source AND t.twice = {preset.key}) WHERE nth > 1"""
        _find(con, staged, findings, sql, header, "is given twice in the same file", show_values)
    findings.raise_if_any(CORRECT)


def _drop_repeats(
    con: duckdb.DuckDBPyConnection, staged: _Staged, content: Sequence[str], key: str, findings: Findings, show_values: bool
) -> None:
    """Table `staged` from `parts`: repeats of a key in later sources are counted when equal and faults when not."""
    con.execute("DROP TABLE lines")
    if len(staged.sources) == 1:
        con.execute("ALTER TABLE parts RENAME TO staged")
        return
    first = f"(SELECT {key}, arg_min(struct_pack({', '.join(f'{c} := {c}' for c in content)}), source) AS content, " \
            f"min(source) AS source FROM parts GROUP BY {key} HAVING count(*) > 1)"
    con.execute(
        f"""CREATE TABLE repeats AS SELECT p.source, p.record, p.records, p.{key},
        {' AND '.join(f'p.{c} IS NOT DISTINCT FROM f.content.{c}' for c in content)} AS same
        FROM parts p JOIN {first} f ON p.{key} = f.{key} AND p.source > f.source"""
    )
    header = staged.preset.field(staged.preset.key_field).header
    _find(con, staged, findings, f"SELECT source, record, {key} FROM repeats WHERE NOT same", header,
          "differs from the one with the same id in an earlier file", show_values)
    _count_excluded(staged, staged.preset.repeated, con.execute("SELECT coalesce(sum(records), 0) FROM repeats").fetchone()[0])
    con.execute(f"CREATE TABLE staged AS SELECT * FROM parts ANTI JOIN repeats USING (source, {key})")
    con.execute("DROP TABLE parts")


def _stage_customers(con: duckdb.DuckDBPyConnection, staged: _Staged, findings: Findings, show_values: bool) -> None:
    """Table `staged`: a customer per id."""
    _find_key_faults(con, staged, findings, show_values)
    columns = TABLES["customers"].column_names
    con.execute(f"CREATE TABLE parts AS SELECT source, record, 1 AS records, {', '.join(columns)} FROM lines")
    _drop_repeats(con, staged, columns[1:], "customer_id", findings, show_values)
    findings.raise_if_any(CORRECT)


def _find(
    con: duckdb.DuckDBPyConnection, staged: _Staged, findings: Findings, sql: str, column: str, rule: str, show_values: bool
) -> None:
    """Add the rows of `sql` (source, record, value) to the findings."""
    count = con.execute(f"SELECT count(*) FROM ({sql})").fetchone()[0]
    if count:
        rows = con.execute(f"SELECT * FROM ({sql}) ORDER BY 1, 2 LIMIT 100").fetchall()
        problems = [Problem(staged.sources[row[0]], row[1], column, rule, row[2] if show_values else None) for row in rows]
        findings.add(problems, column, rule, count)


def _refuse_currencies(con: duckdb.DuckDBPyConnection, sql: str) -> None:
    found = con.execute(sql).fetchall()
    if len(found) > 1:
        counted = ", ".join(f"{count:,} in {currency}" for currency, count in found)
        raise InputRefused(
            f"the orders are in several currencies ({counted}); nothing was written.\n"
            "A shop has one currency: ingest one of them, or convert the amounts first."
        )


# --- committing -----------------------------------------------------------------------------------------------------


def _commit_orders(
    con: duckdb.DuckDBPyConnection, staged: _Staged, settings: Settings, replace: bool, complete_through: date | None,
    show_values: bool, clock: Clock, progress: Progress,
) -> IngestReport:
    """Combine `staged` with the current version under the lock and publish the result if anything changed."""
    store = _orders_store(settings)
    if store.current() is None:
        _refuse_no_orders(con, staged)
    with store.locked(progress):
        parent = store.current()
        if parent is None:
            _refuse_no_orders(con, staged)
        _know(con, store, parent)
        if parent is not None:
            progress(f"comparing with version {parent.version} ({parent.orders:,} orders)")
            _refuse_currencies(con, f"SELECT * FROM (SELECT {literal(parent.currency)} AS currency, {parent.orders} AS orders "
                                    "UNION ALL SELECT currency, count(*) FROM staged GROUP BY 1) "
                                    "QUALIFY count(DISTINCT currency) OVER () > 1")
        counts = _compare_orders(con, staged, replace, show_values)
        complete = _complete_through(con, parent, complete_through, counts)
        if parent is not None and complete == parent.complete_through and not _changes(counts):
            return _orders_report(staged, parent, False, counts)
        rows = (
            "SELECT order_id, customer_id, order_date, order_cents, currency FROM known ANTI JOIN "
            "(SELECT order_id FROM delta WHERE change IN ('replaced', 'removed')) USING (order_id) UNION ALL "
            "SELECT order_id, customer_id, order_date, order_cents, currency FROM delta WHERE change IN ('added', 'replaced')"
        )
        with store.writing(con, rows, "customer_id, order_date, order_id", progress) as draft:
            facts = con.execute(
                f"SELECT min(order_date), max(order_date), count(DISTINCT customer_id), min(currency), min(order_cents) > 0 "
                f"FROM {draft.scan}"
            ).fetchone()
            if not facts[4]:
                raise RetentionOpsError("the new orders version holds an order worth nothing; nothing was published")
            version = store.publish(
                draft, parent, orders=draft.rows, customers=facts[2], first_date=facts[0], last_date=facts[1], currency=facts[3],
                complete_through=complete, stale_from=_stale_from(con, parent, complete),
                **_provenance(staged, clock, counts),
            )
        store.prune(settings.orders_keep_versions)
    progress(f"version {version.version} is in force: {version.orders:,} orders of {version.customers:,} customers")
    return _orders_report(staged, version, True, counts)


def _refuse_no_orders(con: duckdb.DuckDBPyConnection, staged: _Staged) -> None:
    if not con.execute("SELECT count(*) FROM staged WHERE order_cents > 0").fetchone()[0]:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in staged.excluded.items())
        raise InputRefused(f"none of the {staged.records:,} records is an order ({reasons}); nothing was written.\n"
                           "Check that these are the right files and the right preset.")


def _know(con: duckdb.DuckDBPyConnection, store: _Store, parent: Version | None) -> None:
    """View `known`: the rows of the parent version."""
    columns = ", ".join(f"CAST(NULL AS {DUCKDB_TYPES[column.type]}) AS {column.name}" for column in store.table.columns)
    con.execute(f"CREATE VIEW known AS SELECT * FROM {store.scan(parent.path)}" if parent
                else f"CREATE VIEW known AS SELECT {columns} WHERE false")


def _compare_orders(con: duckdb.DuckDBPyConnection, staged: _Staged, replace: bool, show_values: bool) -> dict[str, int]:
    """Table `delta`: staged orders with `change` added, replaced, removed, unchanged or none; returns how many of each.

    Raises InputRefused when known orders would change and `replace` is false.
    """
    con.execute(
        """CREATE TABLE delta AS SELECT s.*, k.order_date AS known_date,
        CASE WHEN k.order_id IS NULL THEN if(s.order_cents > 0, 'added', 'none')
             WHEN s.order_cents = 0 THEN 'removed'
             WHEN s.customer_id = k.customer_id AND s.order_date = k.order_date AND s.order_cents = k.order_cents
                  AND s.currency = k.currency THEN 'unchanged'
             ELSE 'replaced' END AS change
        FROM staged s LEFT JOIN known k ON s.order_id = k.order_id"""
    )
    if not replace:
        findings = Findings()
        header = staged.preset.field(staged.preset.key_field).header
        sql = "SELECT source, record, order_id FROM delta WHERE change IN ('replaced', 'removed')"
        _find(con, staged, findings, sql, header, "is already known with different content", show_values)
        findings.raise_if_any("If these are corrections, ingest the file again with --replace; --show-values shows the ids.")
    return dict(con.execute("SELECT change, count(*) FROM delta GROUP BY 1").fetchall())


def _changes(counts: dict[str, int]) -> int:
    return sum(counts.get(change, 0) for change in ("added", "replaced", "removed"))


def _complete_through(
    con: duckdb.DuckDBPyConnection, parent: OrdersVersion | None, override: date | None, counts: dict[str, int]
) -> date:
    """The last date whose orders are all in: the override, else the newest order seen; never moved by known content."""
    if override is not None:
        return override
    if parent is not None and not _changes(counts):
        return parent.complete_through
    newest = con.execute("SELECT max(order_date) FROM staged WHERE order_cents > 0").fetchone()[0]
    return max(day for day in (newest, parent and parent.complete_through) if day is not None)


def _stale_from(con: duckdb.DuckDBPyConnection, parent: OrdersVersion | None, complete: date) -> date | None:
    """The earliest date whose results differ from the parent's."""
    if parent is None:
        return None
    first = con.execute(
        "SELECT min(if(change = 'removed', known_date, least(order_date, known_date))) FROM delta "
        "WHERE change IN ('added', 'replaced', 'removed')"
    ).fetchone()[0]
    dates = [first] if first else []
    if complete != parent.complete_through:
        dates.append(min(complete, parent.complete_through) + timedelta(days=1))
    return min(dates)


def _provenance(staged: _Staged, clock: Clock, counts: dict[str, int]) -> dict[str, Any]:
    """What every version records about where it came from."""
    return {
        "created_at": clock(), "preset": staged.preset.name, "files": staged.found_in(), "records_read": staged.records,
        "excluded": staged.excluded, **{change: counts.get(change, 0) for change in CHANGES},
    }


def _report_common(staged: _Staged, version: Version, changed: bool, counts: dict[str, int]) -> dict[str, Any]:
    return {
        "dataset": staged.preset.dataset, "version": version.version, "changed": changed, "files": staged.found_in(),
        "records_read": staged.records, "excluded": staged.excluded, "customers": version.customers,
        "content_sha256": version.content_sha256,
        **{change: counts.get(change, 0) for change in CHANGES},
        "ignored_columns": list(dict.fromkeys(name for file in staged.files for name in file.ignored_columns)),
        "skipped_sheets": [f"{file.name}: {sheet}" for file in staged.files for sheet in file.skipped_sheets],
    }


def _orders_report(staged: _Staged, version: OrdersVersion, changed: bool, counts: dict[str, int]) -> IngestReport:
    return IngestReport(
        rows=version.orders, first_date=version.first_date, last_date=version.last_date, currency=version.currency,
        complete_through=version.complete_through, stale_from=version.stale_from if changed else None,
        **_report_common(staged, version, changed, counts),
    )


def _commit_customers(
    con: duckdb.DuckDBPyConnection, staged: _Staged, settings: Settings, clock: Clock, progress: Progress
) -> IngestReport:
    """Replace known customers by id and add the others, under the lock."""
    store = _customers_store(settings)
    with store.locked(progress):
        parent = store.current()
        _know(con, store, parent)
        counts = _compare_customers(con, staged)
        changed = parent is None or bool(_changes(counts))
        if changed:
            columns = ", ".join(store.table.column_names)
            rows = (f"SELECT {columns} FROM known ANTI JOIN delta USING (customer_id) UNION ALL SELECT {columns} FROM delta")
            with store.writing(con, rows, "customer_id", progress) as draft:
                version = store.publish(draft, parent, customers=draft.rows, **_provenance(staged, clock, counts))
            store.prune(settings.orders_keep_versions)
        else:
            version = parent
    return IngestReport(rows=version.customers, first_date=None, last_date=None, complete_through=None, currency=None,
                        stale_from=None, **_report_common(staged, version, changed, counts))


def _compare_customers(con: duckdb.DuckDBPyConnection, staged: _Staged) -> dict[str, int]:
    """Table `delta`: staged customers, known values where their file lacks the column; returns how many of each change."""
    names = TABLES["customers"].column_names[1:]
    merged = []
    for name in names:
        having = [str(number) for number, source in enumerate(staged.sources) if name in source.headers]
        merged.append(f"if(s.source IN ({', '.join(having)}), s.{name}, k.{name}) AS {name}" if having else f"k.{name} AS {name}")
    same = " AND ".join(f"m.{name} IS NOT DISTINCT FROM k.{name}" for name in names)
    con.execute(
        f"""CREATE TABLE delta AS
        WITH merged AS (SELECT s.customer_id, {', '.join(merged)}
                        FROM staged s LEFT JOIN known k ON s.customer_id = k.customer_id)
        SELECT m.*, CASE WHEN k.customer_id IS NULL THEN 'added' WHEN {same} THEN 'unchanged' ELSE 'replaced' END AS change
        FROM merged m LEFT JOIN known k ON m.customer_id = k.customer_id"""
    )
    return dict(con.execute("SELECT change, count(*) FROM delta GROUP BY 1").fetchall())


# --- versions on disk -----------------------------------------------------------------------------------------------

V = TypeVar("V", bound=Version)


@cache
def _adapter(kind: type) -> TypeAdapter:
    """Turns a dataclass into plain JSON values and back."""
    return TypeAdapter(kind)


@dataclass(frozen=True)
class _Draft:
    """A version that is written but not in force."""

    folder: Path
    scan: str
    rows: int
    content_sha256: str


@dataclass(frozen=True)
class _Store(Generic[V]):
    """The versions of one table under one folder of the lake."""

    folder: Path
    kind: type[V]
    name: str

    @property
    def table(self) -> Table:
        return TABLES[self.name]

    def scan(self, path: Path) -> str:
        # 'version=' in the path would otherwise become a column
        return f"read_parquet({literal(no_glob(path))}, hive_partitioning = false)"

    def current(self) -> V | None:
        """The version CURRENT names. Raises RetentionOpsError when it cannot be read."""
        try:
            name = json.loads((self.folder / "CURRENT").read_text())["version"]
            return self._read(self.folder / f"version={name}")
        except FileNotFoundError as error:
            if (self.folder / "CURRENT").exists():
                raise RetentionOpsError(f"{self.folder}/CURRENT names a version that is not there; restore it") from error
            return None
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
    def locked(self, progress: Progress) -> Iterator[None]:
        """Hold the table's lock, waiting for another ingest if need be, and clear what a killed one left."""
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            _sync_folder(self.folder.parent)
        with (self.folder / ".lock").open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("waiting for another ingest to finish")
                fcntl.flock(handle, fcntl.LOCK_EX)
            self._clear_leftovers()
            yield

    def _clear_leftovers(self) -> None:
        """Remove what a killed ingest left: drafts, and a version that was complete but never in force."""
        current = self.current()
        if current is None and len(list(self.folder.glob("version=*"))) > 1:
            # only a first version can be complete without a CURRENT; anything else is somebody's history
            raise RetentionOpsError(f"{self.folder} holds versions but CURRENT is missing; restore it before ingesting")
        for path in self.folder.iterdir():
            unfinished = path.name.startswith((".incoming-", ".CURRENT-"))
            never_in_force = path.name.startswith("version=") and (current is None or path.name > f"version={current.version}")
            if unfinished or never_in_force:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextmanager
    def writing(self, con: duckdb.DuckDBPyConnection, rows: str, order: str, progress: Progress) -> Iterator[_Draft]:
        """Write rows to a folder no reader looks at, prove the file is what the catalog says, and clean up on failure."""
        folder = self.folder / f".incoming-{os.getpid()}"
        folder.mkdir()
        try:
            path = folder / "part-0.parquet"
            progress(f"writing {self.name}")
            con.execute(
                f"COPY (SELECT * FROM ({rows}) ORDER BY {order}) TO {literal(path.absolute())} (FORMAT parquet, COMPRESSION zstd)"
            )
            count = self._prove(con, path)
            progress(f"hashing {count:,} {self.name}")
            yield _Draft(folder, self.scan(path), count, self._hash(con, path, order))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _prove(self, con: duckdb.DuckDBPyConnection, path: Path) -> int:
        """Rows of the written file. Raises if its columns differ from the catalog's, a key repeats or a value is missing."""
        found = [(row[0], row[1]) for row in con.execute(f"DESCRIBE SELECT * FROM {self.scan(path)}").fetchall()]
        expected = [(column.name, DUCKDB_TYPES[column.type]) for column in self.table.columns]
        key = self.table.key[0]
        filled = " AND ".join(f"{column.name} IS NOT NULL" for column in self.table.columns if not column.nullable)
        count, distinct, complete = con.execute(
            f"SELECT count(*), count(DISTINCT {key}), coalesce(bool_and({filled}), true) FROM {self.scan(path)}"
        ).fetchone()
        if found != expected or count != distinct or not complete:
            raise RetentionOpsError(f"the new {self.name} version breaks the catalog (columns, unique {key}); not published")
        if not count:
            raise InputRefused(f"this would leave no {self.name} at all; nothing was written.\nCheck the file.")
        return count

    def _hash(self, con: duckdb.DuckDBPyConnection, path: Path, order: str) -> str:
        """sha256 over the rows in stored order, fetched piece by piece so that memory does not grow with the table."""
        # values hold no control characters, so two different rows never give the same text
        text = " || chr(31) || ".join(f"coalesce(CAST({name} AS VARCHAR), '')" for name in self.table.column_names)
        digest = hashlib.sha256()
        con.execute(f"SELECT {text} || chr(10) FROM {self.scan(path)}")
        while rows := con.fetchmany(HASH_ROWS):
            digest.update("".join(row[0] for row in rows).encode())
        return digest.hexdigest()

    def publish(self, draft: _Draft, parent: Version | None, **facts: Any) -> V:
        """Give the draft its final name, then point CURRENT at it; each step is on disk before the next."""
        numbers = [int(path.name[8:14]) for path in self.folder.glob("version=*")]
        name = f"{max(numbers, default=0) + 1:06d}-{draft.content_sha256[:12]}"
        target = self.folder / f"version={name}"
        version = self.kind(
            version=name, path=target / "part-0.parquet", content_sha256=draft.content_sha256,
            parent=parent.version if parent else None, **facts,
        )
        values = _adapter(self.kind).dump_python(version, mode="json", exclude={"path"})
        _sync_file(draft.folder / "part-0.parquet")
        _write_synced(draft.folder / "version.json", json.dumps(values, indent=2) + "\n")
        _sync_folder(draft.folder)
        os.rename(draft.folder, target)
        _sync_folder(self.folder)
        pointer = self.folder / f".CURRENT-{os.getpid()}"
        _write_synced(pointer, json.dumps({"version": name}) + "\n")
        os.replace(pointer, self.folder / "CURRENT")
        _sync_folder(self.folder)
        return version

    def prune(self, keep: int) -> None:
        """Delete the parquet file of all but the newest `keep` versions."""
        for version in self.versions()[:-keep]:
            version.path.unlink(missing_ok=True)


def _orders_store(settings: Settings) -> _Store[OrdersVersion]:
    return _Store(settings.home / "lake" / "orders", OrdersVersion, "orders")


def _customers_store(settings: Settings) -> _Store[CustomersVersion]:
    return _Store(settings.home / "lake" / "customers", CustomersVersion, "customers")


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _sync_file(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- DuckDB and its scratch space -----------------------------------------------------------------------------------


@contextmanager
def _scratch(home: Path) -> Iterator[Path]:
    """A folder under home/tmp for spilled and converted data. Folders of killed ingests are removed on the way."""
    parent = home / "tmp"
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob("ingest-*"):
        with _held(leftover) as free:
            if free:
                shutil.rmtree(leftover, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix="ingest-", dir=parent))
        with _held(folder) as held:
            # another ingest may have taken it for a leftover between the two calls
            if held and folder.is_dir():
                try:
                    yield folder
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                return


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder's own lock, which a kill releases; false when another process holds it or it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held = False
    else:
        held = True
    try:
        yield held
    finally:
        os.close(descriptor)


@contextmanager
def _connect(settings: Settings, scratch: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    config: dict[str, Any] = {"temp_directory": str(scratch.absolute() / "spill")}
    if settings.duckdb_memory_limit:
        config["memory_limit"] = settings.duckdb_memory_limit
    if settings.duckdb_threads:
        config["threads"] = settings.duckdb_threads
    con = duckdb.connect(":memory:", config=config)
    try:
        yield con
    finally:
        con.close()
