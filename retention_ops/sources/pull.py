"""One pull: the source's orders as they are now, checked and kept as a version like those of a file, and what became of known ones.

The first pull takes everything. A later one takes the orders of the last `lookback_days` and, where the SELECT has updated_at,
whatever changed since the last pull; it looks for the known orders of these days that did not come, by their ids, before it
calls them vanished. Where the SELECT has refund_amount, what was refunded of an order so far, an increase becomes a refund of the
day it is first seen (refunds.py says which). Everything it asks is asked inside one reader; nothing is kept before everything was
read and found right, so a kill at any moment leaves the orders as they were, and the next pull does the same again.

    lake/.source.json    what the last pull took and how far it saw; without it the next pull takes everything
    lake/.source.lock    held by a pull; others wait for it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from retention_ops.clock import Clock, system_clock
from retention_ops.settings import Settings
from retention_ops.sources.ingest import Scope, Staged, Terms, commit_orders, spoken_from, stage
from retention_ops.sources.presets import source_preset
from retention_ops.sources.reader import Reader, dialect_of, open_reader
from retention_ops.sources.reading import Progress
from retention_ops.sources.refunds import Cumulative
from retention_ops.sources.select import Select, check_columns, newer_than, read_select, statement, with_ids
from retention_ops.sources.validation import Bounds, bounds
from retention_ops.warehouse.connection import connect_in_memory
from retention_ops.warehouse.dialect import parquet_scan
from retention_ops.warehouse.files import locked, scratch_folder, write_atomic
from retention_ops.warehouse.seam import Warehouse
from retention_ops.warehouse.versions import OrdersVersion, current_orders

OVERLAP = timedelta(days=2)
"""how far before the newest updated_at seen a pull begins: transactions commit late, and a time without a zone is up to 26 hours off"""
ZONE_MARGIN = timedelta(days=1)
"""a day of the shop may begin that much before the same day in the source's own time"""
LOOKED_UP = 5_000
"""so many orders that did not come are asked for by id; more of them are a table half loaded, whatever the answer"""
REST_WEEKS = 4
"""so many times in a row without an order make a weekday the shop's day of rest"""

Because = Literal["life", "closed", "last_seen", "known"]
"""why complete_through is what it is: rows of a later date; days without trade before today; the last date seen; nothing new"""


@dataclass(frozen=True, kw_only=True)
class PullReport:
    """What one pull did. `orders`, `customers` and the dates describe the orders in force afterwards; the counts are orders.

    `full`: everything was read; else the orders from `since` on and what changed since `changed_since` (None: not known there).
    `new` orders are later than what was complete before, `late` ones are not. `amount_changed`, `date_changed` and `re_owned` may
    be the same orders. `withdrawn` ones are still in the source but count no more (status, test flag, amount); `vanished` ones are
    gone. `excluded` are rows read that are no orders, by reason. `kept_before` are known orders from before the first date the
    source speaks for (ingest.spoken_from). Of `refunded` orders more was paid back than was known, on dates later than what was
    complete before, of `refunded_late` ones not later, and of `refund_lowered` ones less than was known. Every stored partition from
    `stale_from` on says what is no longer so.
    """

    kind: str
    full: bool
    since: date | None
    changed_since: date | None
    pulled_at: datetime
    version: str
    changed: bool
    rows_read: int
    excluded: dict[str, int]
    orders: int
    customers: int
    first_date: date
    last_date: date
    currency: str
    new: int
    late: int
    amount_changed: int
    date_changed: int
    re_owned: int
    withdrawn: int
    vanished: int
    refunded: int
    refunded_late: int
    refund_lowered: int
    unchanged: int
    kept_before: int
    stale_from: date | None
    complete_through: date
    expected_through: date
    """yesterday in shop_timezone: what complete_through can be at most"""
    complete_because: Because
    complete_note: str
    unused_columns: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Yesterday is all in."""
        return self.complete_through >= self.expected_through

    @property
    def corrections(self) -> dict[str, int]:
        """Known orders that changed, and orders and refunds that came after their date was complete; what is 0 is left out."""
        kinds = ("late", "amount_changed", "date_changed", "re_owned", "withdrawn", "vanished", "refunded_late", "refund_lowered")
        return {kind: getattr(self, kind) for kind in kinds if getattr(self, kind)}


def pull(
    lake: Warehouse, *, full: bool = False, accept_vanished: bool = False, show_values: bool = False, clock: Clock = system_clock,
    progress: Progress = lambda text: None,
) -> PullReport:
    """Bring our orders to what the source has. Repeating it changes nothing; two at a time queue.

    Raises SourceError where the source cannot be read, InputRefused where what it gives breaks a rule or where too much of it is
    gone (`accept_vanished` takes that), UsageError where no source is set. Nothing is written then.
    """
    settings = lake.settings
    select = read_select(settings.source_sql, dialect_of(settings.source))
    with (
        locked(lake.root / ".source.lock", before_waiting=lambda: progress("waiting for another pull to finish")),
        desk(settings, show_values, clock, progress) as at,
    ):
        parent = current_orders(settings)
        last = _last(settings, select, parent)
        with open_reader(lake, show_values) as reader:  # closed before anything is written: a transaction must not stay open so long
            plan = at.plan(reader, select, None if full else last, parent)
            file = at.fetch(reader, plan, parent)
        staged = at.staged(file)
        complete, because, note = _complete_through(at, parent)
        limit = None if accept_vanished else settings.source_max_vanished_pct
        terms = Terms(replace=True, complete_through=complete, scope=Scope(since=plan.since, max_vanished_pct=limit),
                      refunds=_refunds_of(at, plan, parent))
        taken = commit_orders(at.con, staged, settings, terms, at.limits.today, show_values, clock, progress)
        report = PullReport(
            kind=settings.source, full=plan.since is None, since=plan.since, changed_since=plan.changed, pulled_at=clock(),
            version=taken.version, changed=taken.changed, rows_read=taken.records_read, excluded=taken.excluded, orders=taken.rows,
            customers=taken.customers, first_date=taken.first_date, last_date=taken.last_date, currency=taken.currency,
            unchanged=taken.unchanged, **_corrections(at.con, parent), **_refunded(at.con, parent),
            kept_before=_kept_before(at.con, plan, parent),
            stale_from=taken.stale_from, complete_through=taken.complete_through,
            expected_through=at.limits.today - timedelta(days=1), complete_because=because, complete_note=note,
            unused_columns=plan.unused, warnings=taken.warnings,
        )
        _remember(settings, select, report, at.limits.today, _watermark(at, plan, last), refunds="refund_amount" in plan.columns)
    return report


# --- what is read ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What to ask the source for; `since` None: everything."""

    select: Select
    columns: Mapping[str, str]
    since: date | None
    changed: date | None
    unused: list[str]

    @property
    def where(self) -> str:
        if self.since is None:
            return ""
        return newer_than(self.select, self.columns, self.since - ZONE_MARGIN, self.changed)


@dataclass
class Desk:
    """Where rows of a source are typed and checked before anything is written: table `staged` on `con`, as with files."""

    settings: Settings
    con: duckdb.DuckDBPyConnection
    scratch: Path
    limits: Bounds
    show_values: bool
    progress: Progress

    def plan(self, reader: Reader, select: Select, last: Mapping[str, Any] | None, parent: OrdersVersion | None) -> Plan:
        """Everything where nothing is known of an earlier pull, or where the source cannot compare dates; else what may have changed."""
        if last is None or parent is None:
            return self.plan_since(reader, select, None, None)
        # after a pause the window begins where the last pull had begun to be sure
        newest = min(self.limits.today, parent.complete_through, date.fromisoformat(last["pulled_on"]))
        watermark = date.fromisoformat(last["watermark"]) if last["watermark"] else None
        return self.plan_since(reader, select, newest - timedelta(days=self.settings.lookback_days), watermark)

    def plan_since(self, reader: Reader, select: Select, since: date | None, watermark: date | None) -> Plan:
        """The orders from `since` on and those changed since about `watermark`, as far as the source can tell."""
        is_text = reader.columns(select)
        columns = check_columns(select, list(is_text))
        unused = [name for name in is_text if name not in columns.values()]
        if since is None or is_text[columns["ordered_at"]]:
            return Plan(select, columns, None, None, unused)
        comparable = "updated_at" in columns and not is_text[columns["updated_at"]]
        return Plan(select, columns, since, watermark - OVERLAP if watermark and comparable else None, unused)

    def fetch(self, reader: Reader, plan: Plan, parent: OrdersVersion | None) -> Path:
        """The rows of the plan as one file; with `parent`, also its orders that moved out of the plan's days."""
        file = self.scratch / plan.select.path.name  # by this name errors call it
        self.progress(f"reading {self.settings.source}")
        self._write(reader, plan, plan.where, file)
        if parent is not None and plan.since is not None:
            self._look_up(reader, plan, parent, file)
        return file

    def staged(self, file: Path) -> Staged:
        """Table `staged`: the rows of the file, typed. Raises InputRefused with all that is wrong with them."""
        preset = source_preset(self.settings.counted_statuses)
        return stage([file], preset, self.settings, self.limits, self.show_values, self.con, self.scratch, self.progress)

    def life(self) -> date | None:
        """The newest date in shop_timezone on which anything happened in the source, among the rows of `staged`."""
        # an updated_at of next year is a wrong clock and shows nothing
        return self.con.execute(
            f"SELECT greatest(max(order_date), max(updated_on) FILTER (updated_on <= DATE '{self.limits.latest}')) FROM staged"
        ).fetchone()[0]

    def _write(self, reader: Reader, plan: Plan, where: str, file: Path) -> None:
        names = list(plan.columns)
        schema = pa.schema([(name, pa.string()) for name in names])
        count = 0
        with pq.ParquetWriter(file, schema) as writer:  # piece by piece: memory does not grow with what is read
            for rows in reader.rows(statement(plan.select, plan.columns, where)):
                writer.write_table(pa.table(dict(zip(names, zip(*rows, strict=True), strict=True)), schema=schema))
                count += len(rows)
                self.progress(f"reading {self.settings.source}: {count:,} rows so far")

    def _look_up(self, reader: Reader, plan: Plan, parent: OrdersVersion, file: Path) -> None:
        """Add to `file` the known orders of these days that did not come but are still there, dated otherwise."""
        missing = [row[0] for row in self.con.execute(
            f"SELECT order_id FROM {parquet_scan(parent.path)} WHERE order_date >= ? AND order_id NOT IN "
            f"(SELECT trim(order_id) FROM {parquet_scan(file)} WHERE order_id IS NOT NULL) ORDER BY 1 LIMIT {LOOKED_UP + 1}", [plan.since],
        ).fetchall()]
        if not missing or len(missing) > LOOKED_UP:
            return
        self.progress(f"asking for {len(missing):,} orders that did not come")
        moved = self.scratch / "moved.parquet"
        self._write(reader, plan, with_ids(plan.select, plan.columns, missing), moved)
        both = self.scratch / "both.parquet"
        with pq.ParquetFile(file) as first, pq.ParquetFile(moved) as second, pq.ParquetWriter(both, first.schema_arrow) as writer:
            for batch in chain(first.iter_batches(), second.iter_batches()):
                writer.write_batch(batch)
        both.replace(file)


@contextmanager
def desk(settings: Settings, show_values: bool, clock: Clock, progress: Progress) -> Iterator[Desk]:
    """A Desk in a scratch folder of its own, cleared in the end."""
    with (
        scratch_folder(settings.home / "tmp", "pull-") as scratch,
        connect_in_memory(settings, spill_to=scratch / "spill") as con,
    ):
        yield Desk(settings, con, scratch, bounds(settings, clock), show_values, progress)


# --- what became of it ----------------------------------------------------------------------------------------------


def _corrections(con: duckdb.DuckDBPyConnection, parent: OrdersVersion | None) -> dict[str, int]:
    """Orders of each kind of change, out of table `delta`."""
    complete = f"DATE '{parent.complete_through}'" if parent else "DATE '1970-01-01'"
    kinds = {
        "new": f"change = 'added' AND order_date > {complete}",
        "late": f"change = 'added' AND order_date <= {complete}",
        "amount_changed": "change = 'replaced' AND order_cents <> known_cents",
        "date_changed": "change = 'replaced' AND order_date <> known_date",
        "re_owned": "change = 'replaced' AND customer_id <> known_customer",
        "withdrawn": "change = 'removed' AND source IS NOT NULL",
        "vanished": "change = 'removed' AND source IS NULL",
    }
    counts = con.execute(f"SELECT {', '.join(f'count(*) FILTER ({when})' for when in kinds.values())} FROM delta").fetchone()
    return dict(zip(kinds, counts, strict=True))


def _refunds_of(at: Desk, plan: Plan, parent: OrdersVersion | None) -> Cumulative | None:
    """How refund_amount is to be read; None where the SELECT does not have it."""
    if "refund_amount" not in plan.columns:
        return None
    told = last_pull(at.settings) or {}
    return Cumulative(at.limits.today, first=not (told.get("refunds") or (parent and parent.refunds)))


def _refunded(con: duckdb.DuckDBPyConnection, parent: OrdersVersion | None) -> dict[str, int]:
    """Orders of each kind of change of their refunds, out of table `refund_delta`; those that are gone took theirs with them."""
    complete = f"DATE '{parent.complete_through}'" if parent else "DATE '1970-01-01'"
    found = con.execute(f"""
        SELECT count(*) FILTER (more > 0 AND first > {complete}), count(*) FILTER (more > 0 AND first <= {complete}),
               count(*) FILTER (more < 0)
        FROM (SELECT sum(refund_cents - known_cents) AS more, min(refund_date) FILTER (refund_cents > known_cents) AS first
              FROM refund_delta WHERE order_id NOT IN (SELECT order_id FROM delta WHERE change = 'removed') GROUP BY order_id)
    """).fetchone()
    return dict(zip(("refunded", "refunded_late", "refund_lowered"), found, strict=True))


def _kept_before(con: duckdb.DuckDBPyConnection, plan: Plan, parent: OrdersVersion | None) -> int:
    if parent is None or plan.since is not None:
        return 0
    return con.execute(
        f"SELECT count(*) FROM known ANTI JOIN staged USING (order_id) WHERE order_date < DATE '{spoken_from(con, parent)}'"
    ).fetchone()[0]


def _complete_through(at: Desk, parent: OrdersVersion | None) -> tuple[date, Because, str]:
    """The last date whose orders are all in, how that is known, and the same as a sentence. It never moves back.

    A row of today shows that yesterday is over in the source too. Without one, yesterday may be a load that stopped: then
    only the dates up to the last sign of life count, and the days without trade that follow it, on which nothing was to come.
    """
    life, yesterday = at.life(), at.limits.today - timedelta(days=1)
    if life is not None and life > yesterday:
        found, because = yesterday, "life"
        note = f"the source has rows of {life}, so {yesterday} is over there"
    elif life is not None:
        found, closed = _over_closed_days(at, parent, life, yesterday)
        because = "closed" if closed else "last_seen"
        note = f"nothing in the source is newer than {life}"
        note += f", and the shop does not trade on {_named(closed)}" if closed else ""
        note += f": the orders of {found + timedelta(days=1)} are not in, if there were any" if found < yesterday else ""
    else:
        found, because, note = date.min, "known", "the source has no rows of these days"
    if parent is not None and parent.complete_through >= found:
        if parent.complete_through > found:
            because, note = "known", f"{note}; {parent.complete_through} was complete before"
        return parent.complete_through, because, note
    return found, because, note


def _over_closed_days(at: Desk, parent: OrdersVersion | None, last: date, yesterday: date) -> tuple[date, list[date]]:
    """`last`, moved over the days without trade that follow it, and these days."""
    from retention_ops.detect.closures import calendar, planned_closures

    settings = at.settings
    planned = {item.day for item in calendar(settings, planned_closures(settings), last, yesterday)} if last < yesterday else set()
    traded = _days_with_orders(at.con, parent, last - timedelta(weeks=REST_WEEKS + 1))
    closed: list[date] = []
    day = last + timedelta(days=1)
    while day <= yesterday and (day in planned or _rests(day, traded)):
        closed.append(day)
        day += timedelta(days=1)
    return day - timedelta(days=1), closed


def _rests(day: date, traded: set[date]) -> bool:
    """The shop has no orders on this weekday, for as long as `traded` reaches; a shop younger than that has no habits."""
    before = [day - timedelta(weeks=week) for week in range(1, REST_WEEKS + 1)]
    return bool(traded) and min(traded) < before[-1] and not traded & set(before)


def _days_with_orders(con: duckdb.DuckDBPyConnection, parent: OrdersVersion | None, first: date) -> set[date]:
    known = f"UNION SELECT order_date FROM {parquet_scan(parent.path)} WHERE order_date >= DATE '{first}'" if parent else ""
    rows = con.execute(f"SELECT order_date FROM staged WHERE order_cents > 0 AND order_date >= DATE '{first}' {known}").fetchall()
    return {row[0] for row in rows}


def _named(days: Sequence[date]) -> str:
    return str(days[0]) if len(days) == 1 else f"{days[0]} to {days[-1]}"


# --- what is remembered ---------------------------------------------------------------------------------------------


def _marker(settings: Settings) -> Path:
    return settings.home / "lake" / ".source.json"


def last_pull(settings: Settings) -> dict[str, Any] | None:
    """What the last pull left: pulled_at, pulled_on, kind, version, complete_through, complete_because, complete_note, corrections
    and more, as JSON has it; None before the first one.
    """
    try:
        found = json.loads(_marker(settings).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "definition" in found else None


def _last(settings: Settings, select: Select, parent: OrdersVersion | None) -> dict[str, Any] | None:
    """The last pull, where this one may build on it: same SELECT and meaning, and its orders are still those in force."""
    last = last_pull(settings)
    if last is None or parent is None or last["definition"] != _definition(settings, select) or last["version"] != parent.version:
        return None
    return last


def _definition(settings: Settings, select: Select) -> str:
    """Names everything that decides what an order is: where it changes, every order must be read again."""
    meaning = [settings.source, settings.source_path, select.text, settings.counted_statuses, settings.shop_timezone]
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()


def _watermark(at: Desk, plan: Plan, last: Mapping[str, Any] | None) -> str | None:
    """The newest updated_at seen so far, as a date; one in the future counts as today, lest nothing is ever newer."""
    if "updated_at" not in plan.columns:
        return None
    newest = at.con.execute("SELECT max(updated_on) FROM staged").fetchone()[0]
    seen = [min(newest, at.limits.today).isoformat()] if newest else []
    if last and last["watermark"]:
        seen.append(last["watermark"])
    return max(seen, default=None)


def _remember(
    settings: Settings, select: Select, report: PullReport, today: date, watermark: str | None, *, refunds: bool
) -> None:
    """Written last: a kill before it makes the next pull read more than it must, and nothing else."""
    write_atomic(_marker(settings), json.dumps({
        "kind": report.kind, "definition": _definition(settings, select), "version": report.version, "watermark": watermark,
        "pulled_at": report.pulled_at.isoformat(), "pulled_on": today.isoformat(), "full": report.full, "rows_read": report.rows_read,
        "changed": report.changed, "complete_through": report.complete_through.isoformat(),
        "complete_because": report.complete_because, "complete_note": report.complete_note, "corrections": report.corrections,
        "new": report.new, "excluded": report.excluded, "refunds": refunds,
    }, indent=2) + "\n")
