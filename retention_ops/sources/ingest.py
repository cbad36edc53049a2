"""Takes order files in: reads, checks and combines them, and has the result kept as an immutable version.

Nothing is written before everything was read and found right. How a version is kept is in versions.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from pydantic import TypeAdapter

from retention_ops.clock import Clock, system_clock
from retention_ops.errors import InputRefused, RetentionOpsError, UsageError
from retention_ops.settings import Settings
from retention_ops.sources import refunds
from retention_ops.sources.identity import LOOKS_LIKE_ADDRESS, MAKE_A_KEY, Identity, as_kept, identity_of, refuse_change
from retention_ops.sources.presets import Exclusion, Preset, get_preset
from retention_ops.sources.reading import InputFile, Progress, Source, open_files
from retention_ops.sources.validation import Bounds, Findings, Problem, bounds, check, load
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.connection import connect_in_memory
from retention_ops.warehouse.dialect import literal, no_rows, parquet_scan
from retention_ops.warehouse.files import scratch_folder
from retention_ops.warehouse.versions import (
    OrdersVersion,
    Store,
    Version,
    customers_store,
    orders_store,
    suppressions_store,
)

CORRECT = "Correct the file and ingest it again; --show-values shows the values at fault."
CORRECT_SOURCE = "Correct the rows or the SELECT, and pull again; --show-values shows the values at fault."
ERASED = "erased on request"
"""why a forgotten customer's records are left out"""
CHANGES = ("added", "replaced", "removed", "unchanged")
LISTED_VALUES = 20
"""of an exclusion that is counted by value: so many values by name, the others together"""
FEW = 10
"""so many orders may vanish from a source whatever their share: a small shop deletes a few"""


# --- what callers see -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What one ingest did. `rows`, `customers` and the dates describe CURRENT afterwards; `excluded` counts file records.

    `removed` are known orders that a file given with --replace says are worth nothing, or suppressions that it lifts by not
    naming them. Of preset refunds the four counts of changes count refunds. `consent_withdrawn` and `consent_granted` are customers
    whose consent is now no, or yes, and was not before (a new customer's was not known).
    `ids_hashed` are the different ids of these files that are kept as keyed hashes; `refunds` those known of all orders afterwards.
    `complete_through_note` says why the newest orders' date is not taken for complete; `warnings` never hold a value.
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
    consent_withdrawn: int = 0
    consent_granted: int = 0
    ids_hashed: int = 0
    refunds: int = 0
    complete_through_note: str = ""
    warnings: list[str] = field(default_factory=list)
    ignored_columns: list[str] = field(default_factory=list)
    skipped_sheets: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values, dates as YYYY-MM-DD."""
        return TypeAdapter(IngestReport).dump_python(self, mode="json")


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
    """Add the files' orders (or refunds of known orders, or customers, or suppressions) to the current version.

    Raises InputRefused when any file breaks a rule, or brings a known order or refund with other content and `replace` is not
    given; nothing is written then. Raises UsageError when the call itself makes no sense. Content that is already there
    changes nothing. Suppressions given with `replace` are the whole list. Two ingests at the same time queue.
    """
    chosen = get_preset(preset)
    limits = bounds(settings, clock)
    _check_call(files, chosen, complete_through, limits)
    with (
        scratch_folder(settings.home / "tmp", "ingest-") as scratch,
        connect_in_memory(settings, spill_to=scratch / "spill") as con,
    ):
        staged = stage([Path(path) for path in files], chosen, settings, limits, show_values, con, scratch, progress)
        if chosen.dataset == "customers":
            return _commit_customers(con, staged, settings, clock, progress)
        if chosen.dataset == "suppressions":
            return _commit_suppressions(con, staged, settings, replace, clock, progress)
        if chosen.dataset == "refunds":
            return _commit_refunds(con, staged, settings, replace, show_values, clock, progress)
        terms = Terms(replace=replace, complete_through=complete_through)
        return commit_orders(con, staged, settings, terms, limits.today, show_values, clock, progress)


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What a source speaks for: every order it has from `since` on (None: see spoken_from); what is not there any more, vanished.

    More than `max_vanished_pct` % of the orders known there must not vanish at once; None: any number may.
    """

    since: date | None
    max_vanished_pct: int | None


@dataclass(frozen=True, kw_only=True)
class Terms:
    """On what terms new orders meet the known ones; `scope`, and `refunds` where it tells them, only for a source's own answer."""

    replace: bool = False
    complete_through: date | None = None
    scope: Scope | None = None
    refunds: refunds.Cumulative | None = None


# --- staging: files to one table of checked rows --------------------------------------------------------------------


@dataclass
class Staged:
    """Table `staged` holds one row per order (or refund, or customer) of the input: the catalog's columns, source and record."""

    preset: Preset
    files: list[InputFile]
    sources: list[Source]
    excluded: dict[str, int]
    warnings: list[str]
    identity: Identity
    hashed: int = 0
    forgotten: frozenset[str] = frozenset()

    @property
    def records(self) -> int:
        return sum(source.records for source in self.sources)

    def found_in(self) -> list[dict[str, Any]]:
        return [{"name": file.name, "sha256": file.sha256, "records": file.records} for file in self.files]

    @property
    def correct(self) -> str:
        """What to do about wrong records."""
        return CORRECT_SOURCE if self.preset.of_source else CORRECT


def _check_call(files: Sequence[Path], preset: Preset, complete_through: date | None, limits: Bounds) -> None:
    if not files:
        raise UsageError("no file given; name at least one to ingest")
    if complete_through is None:
        return
    if preset.dataset != "orders":
        raise UsageError(f"--complete-through is about orders; preset {preset.name} has no such date")
    if complete_through >= limits.today:
        when = "today" if complete_through == limits.today else "in the future"
        raise UsageError(
            f"--complete-through {complete_through} is {when} in shop_timezone {limits.zone}: that day is not over yet, so its "
            f"orders cannot all be in. The latest possible is {limits.today - timedelta(days=1)}."
        )


def stage(
    files: list[Path], preset: Preset, settings: Settings, limits: Bounds, show_values: bool, con: duckdb.DuckDBPyConnection,
    scratch: Path, progress: Progress,
) -> Staged:
    """Read and check everything and create table `staged`. Raises InputRefused with all that is wrong.

    An order's order_cents are 0 where it is worth nothing and, of a source, where it is `excluded`; see `Preset.carried` as well.
    """
    opened = open_files(files, preset, con, scratch, progress)
    sources = [source for file in opened for source in file.sources]
    findings = Findings()
    for number, source in enumerate(sources):
        load(con, source, preset, limits, f"typed_{number}")
        progress(f"checking {source.records:,} records of {source.label}")
        check(con, source, preset, limits, f"typed_{number}", findings, show_values)
    for file in opened:
        file.check_unchanged()
    if not findings.counts and not preset.of_source:
        _refuse_no_records(sources)
    staged = Staged(preset, opened, sources, {}, [], identity_of(settings))
    _gather_lines(con, staged, faulty=bool(findings.counts))
    if preset.dataset == "refunds":  # says no customer
        findings.raise_if_any(staged.correct)
        _stage_refunds(con, staged, limits, findings, show_values)
        return staged
    if not findings.counts:
        _keep_ids(con, staged, settings)
    _find_key_faults(con, staged, findings, show_values)
    findings.raise_if_any(staged.correct)
    if preset.dataset != "orders":
        _stage_customers(con, staged, findings, show_values)
    else:
        progress(f"grouping {staged.records:,} records into orders")
        _stage_orders(con, staged, settings, limits, findings, show_values)
    _warn(con, staged)
    return staged


def _refuse_no_records(sources: list[Source]) -> None:
    for source in sources:
        if not source.records:
            raise InputRefused(f"{source.label} has a header but no records; nothing was written.\nExport it again.")


def _gather_lines(con: duckdb.DuckDBPyConnection, staged: Staged, faulty: bool) -> None:
    """Table `lines`: the records of all sources with their reason for exclusion, counted into staged.excluded.

    Where there are `faulty` records, which will be refused, only those of which a fault of the key can be told for certain.
    """
    names = ", ".join(entry.name for entry in staged.preset.fields)
    whens = " ".join(f"WHEN {rule.when} THEN {number}" for number, rule in enumerate(staged.preset.exclusions))
    excluded = f"CASE {whens} END" if whens else "NULL"
    # one value decides whether a key is given twice, but all of them whether a line belongs to an order
    decisive = [entry.name for entry in staged.preset.fields if staged.preset.several_records or entry.name == staged.preset.key_field]
    sound = " AND ".join(f"issue_{name} IS NULL" for name in decisive)
    parts = [
        f"SELECT {number} AS source, rowid + 1 AS record, {names}, CAST({excluded} AS UTINYINT) AS exclusion FROM typed_{number}"
        + (f" WHERE {sound} AND {source.numbered}" if faulty else "")
        for number, source in enumerate(staged.sources)
    ]
    con.execute(f"CREATE TABLE lines AS {' UNION ALL '.join(parts)}")
    for number in range(len(staged.sources)):
        con.execute(f"DROP TABLE typed_{number}")
    counts = dict(con.execute("SELECT exclusion, count(*) FROM lines WHERE exclusion IS NOT NULL GROUP BY 1").fetchall())
    for number, rule in enumerate(staged.preset.exclusions):
        if rule.by and number in counts:
            _count_by_value(con, staged, number, rule)
        else:
            _count_excluded(staged, rule.reason, counts.get(number, 0))


def _count_by_value(con: duckdb.DuckDBPyConnection, staged: Staged, number: int, rule: Exclusion) -> None:
    found = con.execute(f"SELECT {rule.by}, count(*) FROM lines WHERE exclusion = {number} GROUP BY 1 ORDER BY 2 DESC, 1").fetchall()
    for value, count in found[:LISTED_VALUES]:
        _count_excluded(staged, f"{rule.reason} {value[:40]}", count)
    _count_excluded(staged, f"{rule.reason}: others", sum(count for _, count in found[LISTED_VALUES:]))


def _keep_ids(con: duckdb.DuckDBPyConnection, staged: Staged, settings: Settings) -> None:
    """Customer ids of `lines` as they are kept; records of forgotten customers are taken out and counted.

    Raises SettingsError where that would part a customer from what is known of them, InputRefused where a key is needed.
    """
    from retention_ops.log.forgotten import marks  # the ops database is opened only where there is one

    identity = staged.identity
    refuse_change(con, settings, identity)
    forgotten = staged.forgotten = marks(settings, identity)
    if identity.hashing == "off" and not forgotten:
        return
    wanted = "true" if forgotten or identity.hashing == "all" else LOOKS_LIKE_ADDRESS
    ids = [row[0] for row in con.execute(f"SELECT DISTINCT customer_id FROM lines WHERE customer_id IS NOT NULL AND {wanted}").fetchall()]
    if ids and not identity.key:
        one = len(ids) == 1
        looks = ("customer id looks like an e-mail address" if one else "customer ids look like e-mail addresses") \
            if identity.hashing == "emails" else f"customer id{'' if one else 's'} should be hashed"
        raise InputRefused(
            f"{len(ids):,} {looks}, and there is no key to hash ids with; nothing was written.\n{MAKE_A_KEY}\n"
            "Better still: export the shop's own customer numbers. To keep ids as they are: RETENTION_OPS_HASH_CUSTOMER_IDS=off.")
    changed, staged.hashed = as_kept(identity, ids, forgotten)
    if not changed:
        return
    given, kept, out = zip(*changed, strict=True)
    con.register("kept_ids", pa.table({"given": pa.array(given, pa.string()), "kept": pa.array(kept, pa.string()), "out": pa.array(out)}))
    erased = con.execute("SELECT count(*) FROM lines JOIN kept_ids ON given = customer_id WHERE out AND exclusion IS NULL").fetchone()[0]
    _count_excluded(staged, ERASED, erased)
    con.execute("""CREATE TABLE kept_lines AS SELECT lines.* REPLACE (coalesce(kept, customer_id) AS customer_id)
        FROM lines LEFT JOIN kept_ids ON given = customer_id WHERE out IS NOT true""")
    con.unregister("kept_ids")
    con.execute("DROP TABLE lines")
    con.execute("ALTER TABLE kept_lines RENAME TO lines")


def _refuse_forgotten_meanwhile(staged: Staged, settings: Settings) -> None:
    """Asked under the table's lock, which an erasure takes after its request stands: nobody comes back through a file read before."""
    from retention_ops.log.forgotten import marks

    if marks(settings, staged.identity) != staged.forgotten:
        raise InputRefused("a customer was forgotten while these files were read; nothing was written.\nIngest them again.")


def _count_excluded(staged: Staged, reason: str, records: int) -> None:
    if records:
        staged.excluded[reason] = staged.excluded.get(reason, 0) + records


def _stage_orders(
    con: duckdb.DuckDBPyConnection, staged: Staged, settings: Settings, limits: Bounds, findings: Findings, show_values: bool
) -> None:
    """Table `staged`: an order per key of the first source that has it, order_cents 0 where it is worth nothing."""
    preset = staged.preset
    _value_orders(con, preset, preset.currency or settings.currency, limits)
    header = preset.field(preset.amount_field).header
    rule = f"makes an order above max_order_amount ({limits.max_amount_setting:,})"
    _find(con, staged, findings, f"SELECT source, record, order_id FROM parts WHERE order_cents > {limits.max_amount * 100}",
          header, rule, False)
    _drop_repeats(con, staged, ("customer_id", "order_date", "order_cents", "currency"), "order_id", findings, show_values)
    findings.raise_if_any(staged.correct)
    _refuse_currencies(con, f"SELECT currency, count(*) FROM staged {_of_one_currency(preset)} GROUP BY 1 ORDER BY 2 DESC")
    worth_nothing = con.execute("SELECT coalesce(sum(records), 0) FROM staged WHERE order_cents = 0 AND NOT excluded").fetchone()[0]
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
    cents = f"CAST(round({total}, 2) * 100 AS BIGINT)"
    if preset.of_source:  # what is excluded stays, worth nothing: only so can a known order be taken back
        cents = f"CASE WHEN exclusion IS NULL THEN {cents} ELSE 0 END"
    excluded = "exclusion IS NOT NULL" if preset.of_source else "false"
    carried = "".join(f", {name}" for name in preset.carried)
    con.execute(
        f"""CREATE TABLE parts AS
        SELECT source, {preset.key} AS order_id, {customer} AS customer_id, {day} AS order_date,
               {cents} AS order_cents, {code} AS currency,
               {record} AS record, {records} AS records, {excluded} AS excluded{carried}
        FROM lines WHERE {'true' if preset.of_source else 'exclusion IS NULL'} {'GROUP BY ALL' if preset.several_records else ''}"""
    )


def _of_one_currency(preset: Preset) -> str:
    """SQL: the orders whose currency must be the shop's. Of a source's rows those that do not count may have any."""
    return "WHERE order_cents > 0" if preset.of_source else ""


def _find_key_faults(con: duckdb.DuckDBPyConnection, staged: Staged, findings: Findings, show_values: bool) -> None:
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
        twice = "is given twice by the SELECT" if preset.of_source else "is given twice in the same file"
        _find(con, staged, findings, sql, header, twice, show_values)


def _drop_repeats(
    con: duckdb.DuckDBPyConnection, staged: Staged, content: Sequence[str], key: str, findings: Findings, show_values: bool
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


def _stage_customers(con: duckdb.DuckDBPyConnection, staged: Staged, findings: Findings, show_values: bool) -> None:
    """Table `staged`: a customer per id."""
    columns = TABLES[staged.preset.dataset].column_names
    con.execute(f"CREATE TABLE parts AS SELECT source, record, 1 AS records, {', '.join(columns)} FROM lines")
    _drop_repeats(con, staged, columns[1:], "customer_id", findings, show_values)
    findings.raise_if_any(staged.correct)


def _stage_refunds(con: duckdb.DuckDBPyConnection, staged: Staged, limits: Bounds, findings: Findings, show_values: bool) -> None:
    """Table `staged`: a refund per order and date, refund_cents 0 where the file says that nothing was paid back.

    `currency` is null where the file has none: then it is the orders'.
    """
    _refuse_currencies(con, "SELECT currency, count(*) FROM lines WHERE currency IS NOT NULL GROUP BY 1 ORDER BY 2 DESC", "refunds")
    # least() as in _value_orders
    con.execute(f"""
        CREATE TABLE parts AS
        SELECT source, order_id || ' of ' || refund_date AS refund_id, order_id, refund_date,
               CAST(round(sum(least(refund_amount, {limits.max_amount + 1})), 2) * 100 AS BIGINT) AS refund_cents,
               max(currency) AS currency, min(record) AS record, count(*) AS records
        FROM lines GROUP BY ALL""")
    _drop_repeats(con, staged, ("refund_cents",), "refund_id", findings, show_values)
    findings.raise_if_any(staged.correct)
    _count_excluded(staged, staged.preset.zero, con.execute("SELECT coalesce(sum(records), 0) FROM staged WHERE refund_cents = 0")
                    .fetchone()[0])


def _find(
    con: duckdb.DuckDBPyConnection, staged: Staged, findings: Findings, sql: str, column: str, rule: str, show_values: bool
) -> None:
    """Add the rows of `sql` (source, record, value) to the findings."""
    count = con.execute(f"SELECT count(*) FROM ({sql})").fetchone()[0]
    if count:
        rows = con.execute(f"SELECT * FROM ({sql}) ORDER BY 1, 2 LIMIT 100").fetchall()
        problems = [
            Problem(staged.sources[number], staged.sources[number].number(row), column, rule, value if show_values else None)
            for number, row, value in rows
        ]
        findings.add(problems, column, rule, count)


def _warn(con: duckdb.DuckDBPyConnection, staged: Staged) -> None:
    """Note what is legal but unwise, counted and without a value."""
    if staged.identity.hashing != "off":
        return
    count = con.execute(f"SELECT count(DISTINCT customer_id) FROM staged WHERE {LOOKS_LIKE_ADDRESS}").fetchone()[0]
    if count:
        look = "customer ids look like e-mail addresses" if count > 1 else "customer id looks like an e-mail address"
        staged.warnings.append(f"{count:,} {look}; use opaque ids, because ids appear in briefs and lists")


def _refuse_currencies(con: duckdb.DuckDBPyConnection, sql: str, what: str = "orders") -> None:
    found = con.execute(sql).fetchall()
    if len(found) > 1:
        counted = ", ".join(f"{count:,} in {currency}" for currency, count in found)
        raise InputRefused(
            f"the {what} are in several currencies ({counted}); nothing was written.\n"
            "A shop has one currency: ingest one of them, or convert the amounts first."
        )


# --- committing -----------------------------------------------------------------------------------------------------


def commit_orders(
    con: duckdb.DuckDBPyConnection, staged: Staged, settings: Settings, terms: Terms, today: date, show_values: bool, clock: Clock,
    progress: Progress,
) -> IngestReport:
    """Combine `staged` with the current version under the lock and publish the result if anything changed.

    Leaves table `delta`, a row per order that is staged or vanished: what it is, what was known of it, and its `change`.
    """
    store = orders_store(settings)
    complete_through = terms.complete_through if terms.scope is None else None
    if store.current() is None:
        _refuse_no_orders(con, staged)
        _refuse_before(complete_through, con.execute("SELECT min(order_date) FROM staged WHERE order_cents > 0").fetchone()[0])
    with store.locked(progress):
        _refuse_forgotten_meanwhile(staged, settings)
        parent = store.current()
        if parent is None:
            _refuse_no_orders(con, staged)
        _know(con, store, parent)
        if parent is not None:
            progress(f"comparing with version {parent.version} ({parent.orders:,} orders)")
            _refuse_currencies(con, f"SELECT * FROM (SELECT {literal(parent.currency)} AS currency, {parent.orders} AS orders "
                                    f"UNION ALL SELECT currency, count(*) FROM staged {_of_one_currency(staged.preset)} GROUP BY 1) "
                                    "QUALIFY count(DISTINCT currency) OVER () > 1")
        counts = _compare_orders(con, staged, terms.replace, show_values)
        if terms.scope is not None:
            counts["removed"] = counts.get("removed", 0) + _find_vanished(con, terms.scope, parent)
        con.execute(
            "CREATE VIEW new_orders AS "
            "SELECT order_id, customer_id, order_date, order_cents, currency FROM known ANTI JOIN "
            "(SELECT order_id FROM delta WHERE change IN ('replaced', 'removed')) USING (order_id) UNION ALL "
            "SELECT order_id, customer_id, order_date, order_cents, currency FROM delta WHERE change IN ('added', 'replaced')"
        )
        refunded = _refunds_of_new_orders(con, staged, parent, terms.refunds, show_values)
        complete = _complete_through(con, parent, terms.complete_through, today, counts)
        if parent is not None and complete == parent.complete_through and not _changes(counts) and not refunded.any:
            return _orders_report(staged, parent, False, counts, _why_not_complete(parent, complete_through, today))
        with store.writing(con, "FROM new_orders", "customer_id, order_date, order_id", progress) as draft:
            facts = con.execute(
                f"SELECT min(order_date), max(order_date), count(DISTINCT customer_id), min(currency), min(order_cents) > 0 "
                f"FROM {draft.scan}"
            ).fetchone()
            if not facts[4]:
                raise RetentionOpsError("the new orders version holds an order worth nothing; nothing was published")
            _refuse_before(complete_through, facts[0])
            if refunded.left:
                draft = store.with_refunds(con, draft, refunds.rows(draft.scan))
            version = store.publish(
                draft, parent, orders=draft.rows, customers=facts[2], first_date=facts[0], last_date=facts[1], currency=facts[3],
                complete_through=complete, stale_from=_stale_from(con, parent, complete, refunded), refunds=draft.refunds,
                **_provenance(staged, parent, clock, counts),
            )
        store.prune(settings.orders_keep_versions)
    progress(f"version {version.version} is in force: {version.orders:,} orders of {version.customers:,} customers")
    return _orders_report(staged, version, True, counts, _why_not_complete(version, complete_through, today))


def _refunds_of_new_orders(
    con: duckdb.DuckDBPyConnection, staged: Staged, parent: OrdersVersion | None, source: refunds.Cumulative | None, show_values: bool
) -> refunds.Changes:
    """Tables `new_refunds` and `refund_delta` of an ingest of orders. Raises InputRefused where an order is worth less than its refunds."""
    refunds.know(con, parent)
    if source:
        refunds.follow(con, source)
    else:
        refunds.keep(con)
    named = {entry.name: entry.header for entry in staged.preset.fields}
    findings = Findings()
    for sql, name, rule in refunds.faults_of_orders(staged.preset.amount_field, "order_date", source):
        _find(con, staged, findings, sql, named.get(name, name), rule, show_values)
    findings.raise_if_any(staged.correct)
    changes = refunds.compare(con)
    if changes.removed and not source:
        one = changes.removed == 1
        staged.warnings.append(f"{changes.removed:,} refund{' went with its order' if one else 's went with their orders'}")
    return changes


def _commit_refunds(
    con: duckdb.DuckDBPyConnection, staged: Staged, settings: Settings, replace: bool, show_values: bool, clock: Clock, progress: Progress
) -> IngestReport:
    """Put refunds beside the orders in force, under their lock: another version of the same orders."""
    store = orders_store(settings)
    with store.locked(progress):
        parent = store.current()
        if parent is None:
            raise InputRefused("there are no orders yet that could be refunded; nothing was written.\nIngest the orders first.")
        _know(con, store, parent)
        con.execute("CREATE VIEW new_orders AS FROM known")
        refunds.know(con, parent)
        refunds.take(con)
        _refuse_currencies(con, f"SELECT * FROM (SELECT {literal(parent.currency)} AS currency, {parent.orders} AS orders UNION ALL "
                                "SELECT currency, count(*) FROM staged WHERE currency IS NOT NULL GROUP BY 1) "
                                "QUALIFY count(DISTINCT currency) OVER () > 1")
        findings = Findings()
        _find_refunds(con, staged, refunds.faults_of_refunds(), findings, show_values)
        findings.raise_if_any(f"{CORRECT}\nRefunds of orders that do not count (no customer, another status, erased on request) belong "
                              "out of the file.")
        if not replace:
            _find_refunds(con, staged, refunds.faults_of_changes(), findings, show_values)
            findings.raise_if_any("If these are corrections, ingest the file again with --replace; --show-values shows the ids.")
        changes = refunds.compare(con)
        # refunds that were known and did not come again are not of these files
        counts = {"added": changes.added, "replaced": changes.replaced, "removed": changes.removed,
                  "unchanged": con.execute("SELECT count(*) FROM staged SEMI JOIN (FROM refund_delta WHERE change = 'unchanged') "
                                           "USING (order_id, refund_date)").fetchone()[0]}
        version = parent
        if changes.any:
            with store.writing(con, "FROM new_orders", "customer_id, order_date, order_id", progress) as draft:
                draft = store.with_refunds(con, draft, refunds.rows(draft.scan))
                version = store.publish(
                    draft, parent, orders=draft.rows, customers=parent.customers, first_date=parent.first_date,
                    last_date=parent.last_date, currency=parent.currency, complete_through=parent.complete_through,
                    stale_from=changes.stale_from, refunds=draft.refunds,
                    **{**_provenance(staged, parent, clock, counts), "id_hashing": parent.id_hashing, "id_key": parent.id_key},
                )
            store.prune(settings.orders_keep_versions)
    progress(f"version {version.version} is in force: {version.refunds:,} refunds of its {version.orders:,} orders")
    return _orders_report(staged, version, changes.any, counts, "")


def _find_refunds(
    con: duckdb.DuckDBPyConnection, staged: Staged, faults: list[refunds.Fault], findings: Findings, show_values: bool
) -> None:
    for sql, name, rule in faults:
        _find(con, staged, findings, sql, staged.preset.field(name).header, rule, show_values)


def _refuse_no_orders(con: duckdb.DuckDBPyConnection, staged: Staged) -> None:
    if not con.execute("SELECT count(*) FROM staged WHERE order_cents > 0").fetchone()[0]:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in staged.excluded.items()) or "there are none"
        then = ("Check the SELECT, and which statuses count (RETENTION_OPS_COMPLETED_STATUSES)." if staged.preset.of_source
                else "Check that these are the right files and the right preset.")
        raise InputRefused(f"none of the {staged.records:,} records is an order ({reasons}); nothing was written.\n{then}")


def _refuse_before(complete_through: date | None, first: date) -> None:
    if complete_through is not None and complete_through < first:
        raise UsageError(
            f"--complete-through {complete_through} is before the first order, of {first}; nothing was written.\n"
            "Name the last date whose orders are all in, or leave the option out."
        )


def _know(con: duckdb.DuckDBPyConnection, store: Store, parent: Version | None) -> None:
    """View `known`: the rows of the parent version."""
    rows = f"SELECT * FROM {parquet_scan(parent.path)}" if parent else no_rows(store.table)
    con.execute(f"CREATE VIEW known AS {rows}")


def _compare_orders(con: duckdb.DuckDBPyConnection, staged: Staged, replace: bool, show_values: bool) -> dict[str, int]:
    """Table `delta`: staged orders with `change` added, replaced, removed, unchanged or none; returns how many of each.

    Raises InputRefused when known orders would change and `replace` is false.
    """
    con.execute(
        """CREATE TABLE delta AS SELECT s.*, k.order_date AS known_date, k.customer_id AS known_customer, k.order_cents AS known_cents,
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


def spoken_from(con: duckdb.DuckDBPyConnection, parent: OrdersVersion | None) -> date:
    """The first date that a source speaks for whose every row is in `staged`: its own first one.

    Where older orders are known that is an export that reaches so far back, maybe to the middle of a day: then the date after it.
    """
    first = con.execute("SELECT min(order_date) FROM staged").fetchone()[0]
    if first is None:
        return date.min
    return first + timedelta(days=1) if parent is not None and parent.first_date < first else first


def _find_vanished(con: duckdb.DuckDBPyConnection, scope: Scope, parent: OrdersVersion | None) -> int:
    """Add to `delta`, as removed, the known orders that the source no longer has where it speaks; returns how many.

    Raises InputRefused where so many are gone at once that a table emptied or half loaded is the likelier reason.
    """
    since = scope.since or spoken_from(con, parent)
    known, vanished, given = con.execute(
        "SELECT count(*), count(*) FILTER (order_id NOT IN (SELECT order_id FROM staged)), (SELECT count(*) FROM staged) "
        f"FROM known WHERE order_date >= DATE '{since}'"
    ).fetchone()
    if scope.max_vanished_pct is not None and vanished and (
        not given or (vanished > FEW and 100 * vanished > scope.max_vanished_pct * known)
    ):
        raise InputRefused(
            f"{vanished:,} of {known:,} known orders{f' since {since}' if scope.since else ''} are no longer in the source; nothing was "
            "written.\nA table that was emptied or is just being loaded looks like this: pull again when it is whole. If they are really "
            "gone: retention-ops source pull --accept-vanished")
    con.execute(
        "INSERT INTO delta BY NAME SELECT order_id, customer_id, order_date, 0 AS order_cents, currency, order_date AS known_date, "
        "customer_id AS known_customer, order_cents AS known_cents, 'removed' AS change FROM known ANTI JOIN staged USING (order_id) "
        f"WHERE order_date >= DATE '{since}'"
    )
    return vanished


def _changes(counts: dict[str, int]) -> int:
    return sum(counts.get(change, 0) for change in ("added", "replaced", "removed"))


def _complete_through(
    con: duckdb.DuckDBPyConnection, parent: OrdersVersion | None, override: date | None, today: date, counts: dict[str, int]
) -> date:
    """The last date whose orders are all in: the override, else the newest order's, but no day that is not over.

    Known content never moves it, and without an override it never moves back.
    """
    if override is not None:
        return override
    if parent is not None and not _changes(counts):
        return parent.complete_through
    newest = con.execute("SELECT max(order_date) FROM staged WHERE order_cents > 0").fetchone()[0]
    over = min(newest or date.min, today - timedelta(days=1))
    return max(over, parent.complete_through) if parent is not None else over


def _why_not_complete(version: OrdersVersion, override: date | None, today: date) -> str:
    """Why the default is before the newest order; empty where it is not, or where the day was given."""
    if override is not None or version.complete_through >= version.last_date:
        return ""
    if version.last_date == today:
        return f"the newest orders are from today, {today}, which is not over yet"
    if version.last_date > today:
        return f"the newest orders are from tomorrow, {version.last_date}, and today, {today}, is not over yet"
    return (f"the newest orders are from {version.last_date}, but these files do not show that day to be complete; "
            f"if it is, say --complete-through {version.last_date}")


def _stale_from(
    con: duckdb.DuckDBPyConnection, parent: OrdersVersion | None, complete: date, refunded: refunds.Changes
) -> date | None:
    """The earliest date whose results differ from the parent's."""
    if parent is None:
        return None
    first = con.execute(
        "SELECT min(if(change = 'removed', known_date, least(order_date, known_date))) FROM delta "
        "WHERE change IN ('added', 'replaced', 'removed')"
    ).fetchone()[0]
    dates = [day for day in (first, refunded.stale_from) if day]
    if complete != parent.complete_through:
        dates.append(min(complete, parent.complete_through) + timedelta(days=1))
    return min(dates)


def _provenance(staged: Staged, parent: Version | None, clock: Clock, counts: dict[str, int]) -> dict[str, Any]:
    """What every version records about where it came from."""
    key = staged.identity.fingerprint if staged.hashed else parent.id_key if parent else ""
    return {
        "id_hashing": staged.identity.hashing, "id_key": key,
        "created_at": clock(), "preset": staged.preset.name, "files": staged.found_in(), "records_read": staged.records,
        "excluded": staged.excluded, **{change: counts.get(change, 0) for change in CHANGES},
    }


def _report_common(staged: Staged, version: Version, changed: bool, counts: dict[str, int]) -> dict[str, Any]:
    return {
        "dataset": staged.preset.dataset, "version": version.version, "changed": changed, "files": staged.found_in(),
        "records_read": staged.records, "excluded": staged.excluded, "customers": version.customers,
        "content_sha256": version.content_sha256, "ids_hashed": staged.hashed,
        **{change: counts.get(change, 0) for change in CHANGES},
        "ignored_columns": list(dict.fromkeys(name for file in staged.files for name in file.ignored_columns)),
        "skipped_sheets": [f"{file.name}: {sheet}" for file in staged.files for sheet in file.skipped_sheets],
        "warnings": staged.warnings,
    }


def _orders_report(staged: Staged, version: OrdersVersion, changed: bool, counts: dict[str, int], note: str) -> IngestReport:
    return IngestReport(
        rows=version.orders, first_date=version.first_date, last_date=version.last_date, currency=version.currency,
        complete_through=version.complete_through, stale_from=version.stale_from if changed else None, complete_through_note=note,
        refunds=version.refunds,
        **_report_common(staged, version, changed, counts),
    )


def _commit_customers(
    con: duckdb.DuckDBPyConnection, staged: Staged, settings: Settings, clock: Clock, progress: Progress
) -> IngestReport:
    """Bring known customers up to date by id and add the others, under the lock."""
    store = customers_store(settings)
    with store.locked(progress):
        _refuse_forgotten_meanwhile(staged, settings)
        parent = store.current()
        _know(con, store, parent)
        counts = _compare_customers(con)
        withdrawn, granted = con.execute(
            "SELECT count(*) FILTER (d.consent IS false AND k.consent IS NOT false), "
            "count(*) FILTER (d.consent IS true AND k.consent IS NOT true) FROM delta d LEFT JOIN known k USING (customer_id)"
        ).fetchone()
        changed = parent is None or bool(_changes(counts))
        if changed:
            columns = ", ".join(store.table.column_names)
            rows = (f"SELECT {columns} FROM known ANTI JOIN delta USING (customer_id) UNION ALL SELECT {columns} FROM delta")
            with store.writing(con, rows, "customer_id", progress) as draft:
                version = store.publish(draft, parent, customers=draft.rows, **_provenance(staged, parent, clock, counts))
            store.prune(settings.orders_keep_versions)
        else:
            version = parent
    return IngestReport(rows=version.customers, first_date=None, last_date=None, complete_through=None, currency=None,
                        stale_from=None, consent_withdrawn=withdrawn, consent_granted=granted,
                        **_report_common(staged, version, changed, counts))


def _compare_customers(con: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Table `delta`: staged customers, known values where their file has none; returns how many of each change.

    An empty cell means "not known", like a column that is absent: it must never undo a refusal.
    """
    names = TABLES["customers"].column_names[1:]
    merged = [f"coalesce(s.{name}, k.{name}) AS {name}" for name in names]
    same = " AND ".join(f"m.{name} IS NOT DISTINCT FROM k.{name}" for name in names)
    con.execute(
        f"""CREATE TABLE delta AS
        WITH merged AS (SELECT s.customer_id, {', '.join(merged)}
                        FROM staged s LEFT JOIN known k ON s.customer_id = k.customer_id)
        SELECT m.*, CASE WHEN k.customer_id IS NULL THEN 'added' WHEN {same} THEN 'unchanged' ELSE 'replaced' END AS change
        FROM merged m LEFT JOIN known k ON m.customer_id = k.customer_id"""
    )
    return dict(con.execute("SELECT change, count(*) FROM delta GROUP BY 1").fetchall())


def _commit_suppressions(
    con: duckdb.DuckDBPyConnection, staged: Staged, settings: Settings, replace: bool, clock: Clock, progress: Progress
) -> IngestReport:
    """Add to the list, under the lock, or with `replace` put the files in its place."""
    store = suppressions_store(settings)
    with store.locked(progress):
        _refuse_forgotten_meanwhile(staged, settings)
        parent = store.current()
        _know(con, store, parent)
        counts = _compare_suppressions(con, staged, replace)
        changed = parent is None or bool(_changes(counts))
        if changed:
            columns = ", ".join(store.table.column_names)
            rows = (f"SELECT {columns} FROM known ANTI JOIN delta USING (customer_id) "
                    f"UNION ALL SELECT {columns} FROM delta WHERE change <> 'removed'")
            with store.writing(con, rows, "customer_id", progress) as draft:
                version = store.publish(draft, parent, customers=draft.rows, **_provenance(staged, parent, clock, counts))
            store.prune(settings.orders_keep_versions)
        else:
            version = parent
    return IngestReport(rows=version.customers, first_date=None, last_date=None, complete_through=None, currency=None,
                        stale_from=None, **_report_common(staged, version, changed, counts))


def _compare_suppressions(con: duckdb.DuckDBPyConnection, staged: Staged, replace: bool) -> dict[str, int]:
    """Table `delta`: staged suppressions as they will stand, and with `replace` the known ones that are lifted; returns how many
    of each change.

    Without `replace` the longer suppression wins (no date is for ever): a file that is old, short or lacks a column lifts nothing.
    """
    shorter = "k.customer_id IS NOT NULL AND s.until IS NOT NULL AND (k.until IS NULL OR s.until < k.until)"
    reason = "s.reason" if replace else "coalesce(s.reason, k.reason)"
    until = "s.until" if replace else f"CASE WHEN {shorter} THEN k.until ELSE s.until END"
    con.execute(
        f"""CREATE TABLE delta AS
        WITH merged AS (SELECT s.customer_id, {reason} AS reason, {until} AS until, coalesce({shorter}, false) AS shorter
                        FROM staged s LEFT JOIN known k ON s.customer_id = k.customer_id)
        SELECT m.*, CASE WHEN k.customer_id IS NULL THEN 'added'
                         WHEN m.until IS NOT DISTINCT FROM k.until AND m.reason IS NOT DISTINCT FROM k.reason THEN 'unchanged'
                         ELSE 'replaced' END AS change
        FROM merged m LEFT JOIN known k ON m.customer_id = k.customer_id"""
    )
    if replace:
        con.execute("INSERT INTO delta SELECT customer_id, reason, until, false, 'removed' FROM known ANTI JOIN staged USING (customer_id)")
    else:
        kept = con.execute("SELECT count(*) FROM delta WHERE shorter").fetchone()[0]
        if kept:
            staged.warnings.append(f"{kept:,} suppression{'s' if kept > 1 else ''} would end earlier by these files; the longer one was "
                                   "kept (--replace takes the files as the whole list)")
    return dict(con.execute("SELECT change, count(*) FROM delta GROUP BY 1").fetchall())
