"""What the stages' assets.py share: partitions, the loop over days, checks and metadata. No business rule lives here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import dagster as dg

from retention_ops.clock import Clock, system_clock
from retention_ops.detect import quality
from retention_ops.detect.compute import PRIORITY_ORDER, Workspace, workspace
from retention_ops.execute.destinations.seam import Destination
from retention_ops.execute.respond import Responder
from retention_ops.log.database import ops_database
from retention_ops.settings import Settings
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.seam import Warehouse

OWNERS = ["team:retention"]
JOB = "daily_loop"
RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"
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

    @property
    def settings(self) -> Settings:
        return self.lake.settings


@contextmanager
def open_responder(loop: Loop, run_id: str) -> Iterator[Responder]:
    """What answers alerts in this run, on an open ops database."""
    with ops_database(loop.settings) as engine:
        yield Responder(
            loop.lake, engine, loop.settings, run_id, clock=loop.clock, mode=loop.mode, destinations=loop.destinations,
        )


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

    def passes(self, space: Workspace, part: str, where: str = "true") -> bool:
        """Runs the checks on the rows just computed; remembers what broke."""
        results = quality.check(space.connection, self.table, space.settings, where)
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


def counts_table(space: Workspace, table: str, columns: Sequence[str], where: str = "true") -> str:
    """A small Markdown table: rows per value of `columns`."""
    names = ", ".join(columns)
    rows = space.connection.execute(
        f"SELECT {names}, COUNT(*) FROM {table} WHERE {where} GROUP BY {names} ORDER BY {names}"
    ).fetchall()
    lines = [f"| {' | '.join(columns)} | customers |", "|" + "---|" * (len(columns) + 1)]
    return "\n".join(lines + ["| " + " | ".join(str(value) for value in row) + " |" for row in rows])


def store_days(
    context: dg.AssetExecutionContext, loop: Loop, table: str, compute: Callable[[Workspace, list[date]], Iterator[tuple[date, str]]],
    describe: Callable[[Workspace, str], Mapping[str, Any]],
) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult]:
    """Computes, checks and replaces `table` for each day of the run, with that day's own metadata.

    `compute` yields (day, where): at that moment the workspace's temp table holds the day's rows under that condition.
    Snapshot tables of a range are stored for its newest snapshot_keep_days only; older days are computed and described.
    """
    days = days_of(context)
    tally = CheckTally(table)
    keep_from = days[-1] - timedelta(days=loop.settings.snapshot_keep_days - 1) if TABLES[table].snapshot else days[0]
    order = PRIORITY_ORDER if table == "customer_priority" else None
    with workspace(loop.lake) as space:
        for done, (day, where) in enumerate(compute(space, days), start=1):
            if tally.passes(space, day.isoformat(), where):
                kept = day >= keep_from
                if kept:
                    loop.lake.write(space.connection, table, day, space.provenance, order_by=order, where=where)
                rows = space.connection.execute(f"SELECT COUNT(*) FROM {table} WHERE {where}").fetchall()[0][0]
                context.add_asset_metadata(
                    {
                        "dagster/row_count": rows,
                        **describe(space, where),
                        "path": dg.MetadataValue.path(str(loop.lake.path(table, day))) if kept else "computed, not stored: "
                        f"older than the newest {loop.settings.snapshot_keep_days} days of the range",
                        **space.provenance,
                        **space.cost(),
                    },
                    asset_key=table, partition_key=day.isoformat(),
                )
            loop.progress(table, done, len(days))
    stored = loop.lake.days(table)
    if stored and stored[-1] == days[-1]:
        loop.lake.prune_snapshots(table, days[-1])
    loop.lake.refresh_views()
    yield from tally.finish()


def one_by_one(table: str) -> Callable[[Workspace, list[date]], Iterator[tuple[date, str]]]:
    """Computes a table day by day."""

    def compute(space: Workspace, days: list[date]) -> Iterator[tuple[date, str]]:
        for day in days:
            space.build(table, day)
            yield day, "true"

    return compute


def in_one_pass(table: str) -> Callable[[Workspace, list[date]], Iterator[tuple[date, str]]]:
    """Computes a table for the whole range in one query."""

    def compute(space: Workspace, days: list[date]) -> Iterator[tuple[date, str]]:
        space.build_range(table, days[0], days[-1])
        for day in days:
            yield day, f"{TABLES[table].date_column} = DATE '{day.isoformat()}'"

    return compute
