"""Do our orders still say what the source says? Day by day, after the same rules as a pull.

No order is written. That they differ is a matter for the data owner: what was found is recorded where health looks, as counts and sums.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import duckdb
from sqlalchemy.engine import Engine

from retention_ops.clock import Clock, system_clock
from retention_ops.errors import InputRefused, RetentionOpsError
from retention_ops.execute import health
from retention_ops.log import runs
from retention_ops.log.database import ops_database
from retention_ops.sources.ingest import spoken_from
from retention_ops.sources.pull import Desk, PullReport, desk, pull
from retention_ops.sources.reader import dialect_of, open_reader
from retention_ops.sources.reading import Progress
from retention_ops.sources.refunds import IN_CENTS
from retention_ops.sources.select import read_select
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.dialect import no_rows, parquet_scan
from retention_ops.warehouse.seam import Warehouse
from retention_ops.warehouse.versions import OrdersVersion, current_orders

WEEK = timedelta(days=6)


@dataclass(frozen=True)
class Day:
    """One date: orders and their value in cents, in the source and with us; `differing` orders are not the same in both."""

    day: date
    source_orders: int
    source_cents: int
    our_orders: int
    our_cents: int
    differing: int


@dataclass(frozen=True)
class CheckReport:
    """Dates from `since` to `through`, of which the source speaks, were compared; `off` are those that differ, `week` seven to look at.

    `version` is None before the first pull: then nothing is compared and `off` is empty.
    """

    kind: str
    version: str | None
    since: date
    through: date
    orders_compared: int
    off: list[Day]
    week: list[Day]
    rows_read: int
    excluded: dict[str, int]


def pull_and_check(
    lake: Warehouse, *, check: bool = True, clock: Clock = system_clock, progress: Progress = lambda text: None, **how: bool,
) -> PullReport:
    """A pull (`how`: its options) as everybody does it: recorded, and followed by the check nobody asks for. Raises as `pull` does."""
    report = pull(lake, clock=clock, progress=progress, **how)
    with ops_database(lake.settings) as engine:
        runs.record_ingestions(engine, "orders", lake.orders_versions())
        if check:
            check_once(lake, engine, clock, progress)
    return report


def check_source(
    lake: Warehouse, *, week_of: date | None = None, everything: bool = False, show_values: bool = False, clock: Clock = system_clock,
    progress: Progress = lambda text: None,
) -> CheckReport:
    """Compare the source with the orders in force, over the last `lookback_days` that are complete, or over `everything`.

    `week_of` shows the Monday-to-Sunday week of that date, else the last seven days. Raises as `pull` does.
    """
    settings = lake.settings
    select = read_select(settings.source_sql, dialect_of(settings.source))
    version = current_orders(settings)
    week = week_of - timedelta(days=week_of.weekday()) if week_of else None
    with desk(settings, show_values, clock, progress) as at:
        through = version.complete_through if version else at.limits.today - timedelta(days=1)
        since = through - timedelta(days=settings.lookback_days - 1)
        with open_reader(lake, show_values) as reader:
            plan = at.plan_since(reader, select, None if everything else min(filter(None, [since, week])), None)
            file = at.fetch(reader, plan, None)
        staged = at.staged(file)
        if not staged.records and version is None:
            raise InputRefused(f"{select.path} gives no row since {since}; is it the right database, and the right table?")
        week = week or min(through, at.life() or through) - WEEK
        if plan.since is None and staged.records:  # what it no longer reaches, a pull keeps
            spoken = spoken_from(at.con, version)
            since = spoken if everything else max(since, spoken)
        days = _compared(at, version, min(since, week), refunds="refund_amount" in plan.columns)
        known = {item.day: item for item in days}
        compared = [item for item in days if since <= item.day <= through] if version else []
        return CheckReport(
            settings.source, version.version if version else None, since, through, sum(item.source_orders for item in compared),
            [item for item in compared if item.differing],
            [known.get(day, Day(day, 0, 0, 0, 0, 0)) for day in (week + timedelta(days=step) for step in range(7))],
            staged.records, staged.excluded,
        )


def record_check(engine: Engine, report: CheckReport, clock: Clock = system_clock) -> None:
    """Tells health what a check found; nothing where nothing was pulled yet, so nothing was compared."""
    if report.version is not None:
        health.record_source_check(engine, report.through, not report.off, [_difference(item) for item in report.off], clock)


def _difference(item: Day) -> dict[str, Any]:
    return {
        "date": item.day.isoformat(), "orders_here": item.our_orders, "orders_there": item.source_orders, "cents_here": item.our_cents,
        "cents_there": item.source_cents, "differing": item.differing,
    }


def check_once(lake: Warehouse, engine: Engine, clock: Clock = system_clock, progress: Progress = lambda text: None) -> CheckReport | None:
    """The check that nobody has to ask for, after a pull: once for each newest complete date, and again while the last one was off.

    The source goes on between a pull and its check: where they differ, it is pulled and compared once more, and only that counts.
    Returns None where it was not due, or where the source went away since the pull: then the next pull is followed by it.
    """
    orders, newest = lake.orders(), health.newest_source_check(engine)
    if orders is None or (newest and newest["ok"] and newest["day"] >= orders.complete_through):
        return None
    try:
        report = check_source(lake, clock=clock, progress=progress)
    except (RetentionOpsError, duckdb.Error) as error:  # no reason to fail a morning whose pull succeeded
        progress(f"the orders could not be compared with their source: {error}")
        return None
    if report.off:
        with suppress(RetentionOpsError, duckdb.Error):  # a source that cannot be pulled is off as it was found
            pull(lake, clock=clock, progress=progress)
            runs.record_ingestions(engine, "orders", lake.orders_versions())
            report = check_source(lake, clock=clock, progress=progress)
    record_check(engine, report, clock)
    return report


def _compared(at: Desk, version: OrdersVersion | None, first: date, *, refunds: bool) -> list[Day]:
    """Every date on either side from `first` on; an order with other `refunds` than the source says differs, its value is as ordered.

    An order whose date moved over `first` differs all the same: it stands on one side only.
    """
    ours = f"SELECT * FROM {parquet_scan(version.path)}" if version else no_rows(TABLES["orders"])
    refunded = parquet_scan(version.refunds_path) if refunds and version and version.refunds else f"({no_rows(TABLES['refunds'])})"
    rows = at.con.execute(f"""
        WITH theirs AS (SELECT order_id, customer_id, order_date, order_cents, {IN_CENTS if refunds else 0} AS refunded
                        FROM staged WHERE order_cents > 0 AND order_date >= DATE '{first}'),
             ours AS (SELECT order_id, o.customer_id, o.order_date, order_cents, coalesce(refunded, 0) AS refunded FROM ({ours}) o
                      LEFT JOIN (SELECT order_id, CAST(sum(refund_cents) AS BIGINT) AS refunded FROM {refunded} GROUP BY 1)
                           USING (order_id) WHERE o.order_date >= DATE '{first}'),
             either AS ((FROM theirs EXCEPT FROM ours) UNION ALL (FROM ours EXCEPT FROM theirs)),
             differing AS (SELECT order_date, count(DISTINCT order_id) AS orders FROM either GROUP BY 1),
             sums AS (SELECT order_date, count(*) FILTER (side = 's') AS s, coalesce(sum(order_cents) FILTER (side = 's'), 0) AS sc,
                             count(*) FILTER (side = 'o') AS o, coalesce(sum(order_cents) FILTER (side = 'o'), 0) AS oc
                      FROM (SELECT *, 's' AS side FROM theirs UNION ALL SELECT *, 'o' AS side FROM ours) GROUP BY 1)
        SELECT order_date, s, sc, o, oc, coalesce(d.orders, 0) FROM sums LEFT JOIN differing d USING (order_date) ORDER BY 1
    """).fetchall()
    return [Day(day, s, int(sc), o, int(oc), differing) for day, s, sc, o, oc, differing in rows]

