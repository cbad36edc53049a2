"""What the stages' assets.py share: partitions, the loop over days, checks and metadata. No business rule lives here."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import dagster as dg
from sqlalchemy.engine import Engine

from retention_ops.clock import Clock, system_clock
from retention_ops.detect import quality
from retention_ops.detect.compute import Workspace, priority_order, workspace
from retention_ops.execute import health
from retention_ops.execute.destinations.seam import Destination
from retention_ops.execute.respond import Responder
from retention_ops.log import runs, settings_history
from retention_ops.log.database import ops_database
from retention_ops.settings import Settings
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.seam import Warehouse
from retention_ops.warehouse.versions import OrdersVersion

OWNERS = ["team:retention"]
JOB = "daily_loop"
RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"
PROCESS_TAG = "retention_ops/process"
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
FIRST_PARTITION_WITHOUT_ORDERS = date(2020, 1, 1)


@dataclass
class Loop:
    """What every asset needs; a plain object, so a test passes another lake, clock or progress."""

    lake: Warehouse
    clock: Clock = system_clock
    progress: Callable[[str, int, int], None] = field(default=lambda step, done, total: None)
    mode: Callable[[], str] | None = None
    """the mode as it is now, read before each send; None: as the settings have it"""
    destinations: Callable[[str, str], Destination] | None = None
    """(name, mode) -> destination; None: as the settings name them"""

    _orders_of_run: tuple[str, OrdersVersion | None] = ("", None)

    @property
    def settings(self) -> Settings:
        return self.lake.settings

    @contextmanager
    def workspace(self, run_id: str) -> Iterator[Workspace]:
        """A Workspace on the orders the run's first asset found: orders that come in meanwhile wait for the next run."""
        if self._orders_of_run[0] != run_id:
            self._orders_of_run = (run_id, self.lake.orders())
        with workspace(self.lake, self._orders_of_run[1]) as space:
            yield space


@contextmanager
def open_responder(loop: Loop, run_id: str) -> Iterator[Responder]:
    """What answers alerts in this run, on an open ops database."""
    with ops_database(loop.settings) as engine:
        yield Responder(
            loop.lake, engine, loop.settings, run_id, clock=loop.clock, mode=loop.mode, destinations=loop.destinations,
        )


def record_ended_runs(engine: Engine, stored: dg.DagsterInstance, clock: Clock) -> int:
    """Writes down the runs of the daily loop that ended since the newest one known, for those who may not ask Dagster."""
    newest = health.newest_run(engine)
    # a day more than needed: runs are stored by their ends, which other processes write when they get to it
    since = newest["ended_at"] - timedelta(days=1) if newest else clock() - timedelta(days=health.FAILED_RUN_DAYS)
    statuses = {dg.DagsterRunStatus.SUCCESS: "success", dg.DagsterRunStatus.FAILURE: "failure", dg.DagsterRunStatus.CANCELED: "canceled"}
    records = [
        record for record in stored.get_run_records(dg.RunsFilter(statuses=list(statuses), updated_after=since.astimezone(UTC)))
        if _is_whole(record.dagster_run)
    ]
    return health.record_runs(engine, [
        {
            "run_id": record.dagster_run.run_id, "status": statuses[record.dagster_run.status], **dates_of(record.dagster_run.tags),
            "started_at": _moment(record.start_time), "ended_at": _moment(record.end_time) or record.update_timestamp,
        }
        for record in records
    ], clock)


def _is_whole(run: dg.DagsterRun) -> bool:
    """Whether a run does the work of a date: the daily loop, or as much of it as somebody asks for on the page of the assets."""
    return run.job_name == JOB or {dg.AssetKey(name) for name in ("alert_logic", "action_pack", "ops_runs_log")} <= (
        run.asset_selection or set())


def dates_of(tags: Mapping[str, str]) -> dict[str, date | None]:
    """The first and the last date of a run, by its tags."""
    first = tags.get(RANGE_START) or tags.get("dagster/partition")
    last = tags.get(RANGE_END, first)
    return {"first_date": date.fromisoformat(first) if first else None, "last_date": date.fromisoformat(last) if last else None}


def dates_to_repeat(stored: dg.DagsterInstance, settings: Settings, newest: date) -> tuple[date, date] | None:
    """The dates of the newest run of the daily loop where it failed and `newest` is one of them: its alert may be stored, its pack and
    its answer are not. A failure about older dates alone is somebody's own run, and waits for them; where the answer was written and
    failed outside, the sensors go on with it and nothing has to be computed again."""
    ended = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]
    for record in stored.get_run_records(dg.RunsFilter(job_name=JOB, statuses=ended), limit=1):
        dates = dates_of(record.dagster_run.tags)
        first, last = dates["first_date"], dates["last_date"]
        if record.dagster_run.status == dg.DagsterRunStatus.FAILURE and first and first <= newest <= last:
            with ops_database(settings) as engine:
                return None if runs.response_failed(engine, record.dagster_run.run_id) else (first, last)
    return None


# --- which process a run lives in: Dagster itself asks only whether a run takes too long -----------------------------


def process_mark(run_id: str, process: int | None = None) -> str:
    """What PROCESS_TAG says of a run in this process: host, process, when that began, and the run, because a re-execution copies tags."""
    process = process or os.getpid()
    return f"{socket.gethostname()}:{process}:{_began(process)}:{run_id}"


def close_killed_runs(stored: dg.DagsterInstance) -> list[str]:
    """Ends runs whose process on this machine is no more; returns their ids."""
    closed = []
    for run in stored.get_runs(dg.RunsFilter(statuses=UNFINISHED)):
        host, process, began, of_run = (*run.tags.get(PROCESS_TAG, "").split(":"), "", "", "", "")[:4]
        if host != socket.gethostname() or of_run != run.run_id or _began(int(process)) == began:
            continue
        if run.status == dg.DagsterRunStatus.CANCELING:
            stored.report_run_canceled(run)
        else:
            stored.report_run_failed(run, "the process that ran it was killed; run it again")
        closed.append(run.run_id)
    return closed


def _began(process: int) -> str:
    """Tells a process from a later one of the same number; empty where there is none."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]  # since the machine's start, in ticks
    except OSError:
        return "unknown"


def _moment(seconds: float | None) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def partitions(settings: Settings, lake: Warehouse) -> dg.DailyPartitionsDefinition:
    """One partition per reference date, from `start_date` or else the first order."""
    orders = lake.orders()
    start = settings.start_date or (orders.first_date if orders else FIRST_PARTITION_WITHOUT_ORDERS)
    return dg.DailyPartitionsDefinition(start_date=start.isoformat(), timezone=settings.shop_timezone)


def column_schema(table: str) -> dg.TableSchema:
    """The declared columns as Dagster shows them."""
    return dg.TableSchema(columns=[
        dg.TableColumn(
            column.name, column.type, description=column.description,
            constraints=dg.TableColumnConstraints(nullable=column.nullable, unique=TABLES[table].key == (column.name,)),
        )
        for column in TABLES[table].columns
    ])


def described(table: str, stage: str, *kinds: str) -> dict[str, Any]:
    """The arguments every table's asset has in common."""
    return {
        "name": table,
        "description": TABLES[table].description,
        "group_name": stage,
        "kinds": set(kinds),
        "owners": OWNERS,
        "metadata": {"dagster/column_schema": column_schema(table)},
    }


def check_specs(table: str) -> list[dg.AssetCheckSpec]:
    """One blocking check for each quality rule of `table`."""
    return [
        dg.AssetCheckSpec(name, asset=table, blocking=True, description=f"{name.replace('_', ' ')}; counts rows that break it")
        for name in quality.check_names(table)
    ]


def days_of(context: dg.AssetExecutionContext) -> list[date]:
    """The run's reference dates, oldest first."""
    return sorted(date.fromisoformat(key) for key in context.partition_keys)


class CheckTally:
    """Collects violations over the days of a run: a range run reports each check once."""

    def __init__(self, table: str):
        self.table = table
        self.violations: dict[str, dict[str, int]] = {name: {} for name in quality.check_names(table)}

    def passes(self, space: Workspace, part: str) -> bool:
        """Runs the checks on all rows just computed; remembers what broke."""
        return self._add(part, quality.check(space.connection, self.table, space.settings))

    def passing(self, space: Workspace, days: Sequence[date]) -> list[date]:
        """Runs the checks on every one of `days` in one pass; returns those without a violation, remembers what broke."""
        results = quality.check_days(space.connection, self.table, space.settings)
        return [day for day in days if self._add(day.isoformat(), results.get(day, []))]

    def _add(self, part: str, results: Sequence[quality.Check]) -> bool:
        for result in results:
            if not result.passed:
                self.violations[result.name][part] = result.violations
        return all(result.passed for result in results)

    def results(self) -> list[dg.AssetCheckResult]:
        return [
            dg.AssetCheckResult(
                asset_key=self.table, check_name=name, passed=not broken,
                metadata={"violations": sum(broken.values()), **({"by_partition": broken} if broken else {})},
            )
            for name, broken in self.violations.items()
        ]

    def finish(self) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult]:
        """The asset's last words: results, or the failing checks and a failure (the old partitions stay)."""
        broken = {name: parts for name, parts in self.violations.items() if parts}
        if not broken:
            yield dg.MaterializeResult(check_results=self.results())
            return
        yield from self.results()
        raise dg.Failure(
            f"{self.table} breaks its own rules and was not replaced: "
            + "; ".join(f"{name} in {', '.join(parts)}" for name, parts in broken.items())
        )


def by_day(space: Workspace, table: str, **columns: str) -> dict[date, dict[str, Any]]:
    """Aggregates of the rows just computed (name -> SQL), for each day; what is NULL is left out, a date is text."""
    day = TABLES[table].date_column
    rows = space.connection.execute(f"SELECT {day}, {', '.join(columns.values())} FROM {table} GROUP BY {day}").fetchall()
    return {
        row[0]: {name: str(value) if isinstance(value, date) else value
                 for name, value in zip(columns, row[1:], strict=True) if value is not None}
        for row in rows
    }


def counts_tables(space: Workspace, table: str, columns: Sequence[str]) -> dict[date, dg.MarkdownMetadataValue]:
    """For each day a small Markdown table: rows per value of `columns`."""
    grouped = ", ".join([TABLES[table].date_column, *columns])
    rows = space.connection.execute(f"SELECT {grouped}, COUNT(*) FROM {table} GROUP BY {grouped} ORDER BY {grouped}").fetchall()
    head = [f"| {' | '.join(columns)} | customers |", "|" + "---|" * (len(columns) + 1)]
    return {
        day: dg.MetadataValue.md("\n".join(head + ["| " + " | ".join(str(value) for value in row[1:]) + " |" for row in group]))
        for day, group in groupby(rows, key=itemgetter(0))
    }


Batches = Callable[[Workspace, list[date]], Iterator[list[date]]]
"""Computes a table for days in ascending order; yields some of them whenever the workspace's table holds just their rows."""
Describe = Callable[[Workspace], Mapping[date, Mapping[str, Any]]]
"""Metadata of each day in the workspace's table."""


def store_days(
    context: dg.AssetExecutionContext, loop: Loop, table: str, compute: Batches, describe: Describe,
) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult]:
    """Computes, checks and replaces `table` for each day of the run, with that day's own metadata.

    Snapshot tables of a range are computed and stored for its newest snapshot_keep_days only. Older days are counted: the
    alert, the queue and the packs of a range come from the orders and read no snapshot of another day.
    """
    days = days_of(context)
    tally = CheckTally(table)
    oldest_kept = days[-1] - timedelta(days=loop.settings.snapshot_keep_days - 1) if TABLES[table].snapshot else days[0]
    order = priority_order(loop.settings) if table == "customer_priority" else None
    if table == "alert_logic":  # what its rows are made with is known before there are any
        with ops_database(loop.settings) as engine:
            settings_history.record(engine, loop.settings, loop.clock())
    with loop.workspace(context.run_id) as space:
        counted = [day for day in days if day < oldest_kept]
        _describe_counted(context, space, table, counted)
        done = len(counted)
        for batch in compute(space, days[done:]):
            passing = tally.passing(space, batch)
            facts = describe(space)
            for day in passing:
                where = f"{TABLES[table].date_column} = DATE '{day}'"
                rows = loop.lake.write(space.connection, table, day, space.provenance, order_by=order, where=where)
                context.add_asset_metadata(
                    {
                        "dagster/row_count": rows, **facts.get(day, {}),
                        "path": dg.MetadataValue.path(str(loop.lake.path(table, day))), **space.provenance, **space.cost(),
                    },
                    asset_key=table, partition_key=day.isoformat(),
                )
            done += len(batch)
            loop.progress(table, done, len(days))
    stored = loop.lake.days(table)
    if stored and stored[-1] == days[-1]:
        loop.lake.prune_snapshots(table, days[-1])
    loop.lake.refresh_views()
    yield from tally.finish()


def _describe_counted(context: dg.AssetExecutionContext, space: Workspace, table: str, days: list[date]) -> None:
    """Metadata of snapshot days that a range only counts: their rows are the customers of retention_daily."""
    if not days:
        return
    space.build_range("retention_daily", days[0], days[-1])
    counts = by_day(
        space, "retention_daily", **{"dagster/row_count": "any_value(customers)"},
        active="any_value(active)", at_risk="any_value(at_risk)", inactive="any_value(inactive)",
    )
    note = f"counted, not stored: older than the newest {space.settings.snapshot_keep_days} days of the range"
    for day in days:
        context.add_asset_metadata({**counts[day], "path": note, **space.provenance}, asset_key=table, partition_key=day.isoformat())


def one_by_one(table: str) -> Batches:
    """Computes a table day by day."""

    def compute(space: Workspace, days: list[date]) -> Iterator[list[date]]:
        for day in days:
            space.build(table, day)
            yield [day]

    return compute


def in_one_pass(table: str) -> Batches:
    """Computes a table for the whole range in one query."""

    def compute(space: Workspace, days: list[date]) -> Iterator[list[date]]:
        space.build_range(table, days[0], days[-1])
        yield days

    return compute


def in_batches(space: Workspace, days: list[date]) -> Iterator[list[date]]:
    """customer_priority: one date by its plan; a range out of priority intervals, as many days at once as memory likes."""
    if len(days) == 1 or space.settings.p1_min_revenue == "median":
        yield from one_by_one("customer_priority")(space, days)
        return
    for batch in space.queue_batches(days):
        space.build_range("customer_priority", batch[0], batch[-1])
        yield batch
