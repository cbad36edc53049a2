"""Runs the rules of sql/ as of a date. Every table is a function of the orders, the settings and D alone.

Stored partitions are read as input only where they were made from the same orders version and the same rules;
otherwise the input is computed again, so no result ever depends on what happens to be materialized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date, timedelta
from functools import cache
from typing import Any, Literal, TypeVar

import duckdb
import pandas as pd

from retention_ops.detect.closures import CalendarDay, calendar, planned_closures
from retention_ops.detect.verdict import verdict_in_use
from retention_ops.errors import NoOrders, UsageError
from retention_ops.settings import Settings
from retention_ops.warehouse.catalog import CALENDAR_DAYS, CLOSED_DAYS, LEARNED_CHANCES, RELATIONS, TABLES
from retention_ops.warehouse.dialect import literal, no_rows, parquet_scan
from retention_ops.warehouse.lake import Lake, read_provenance
from retention_ops.warehouse.render import Query, fast_query, query, sql_sha256, stacked
from retention_ops.warehouse.seam import Warehouse
from retention_ops.warehouse.versions import OrdersVersion

INPUT = {
    "retention_snapshot": "base_customers",
    "churn_detection": "retention_snapshot",
    "customer_priority": "churn_detection",
}
"""table -> the per-day table it reads; base_customers, retention_daily and cohorts read customer_days"""

BASELINE_DAYS = 7
DUE_DAYS = 393
"""days before a range that returning_customers reads: 52 weeks of noise, a week to compare them with, the longest window
of 14, and the 8 days in which a shortfall can have lasted on the eve"""
RETURN_DAYS = 426, 30
"""days before D of the oldest and of the newest day that return_rates looks at"""
COMPARED_DAYS = 56
"""days before a holiday with which closed_days compares it"""
BATCH_ROWS, BATCH_DAYS = 500_000, 31
"""most customer_priority rows (some 250 bytes each, on average) and days of a range held at once; each day's file scans them all"""


def same_make(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two partitions' provenance says that their rows are the same: other settings than the rules' change none."""
    return all(one.get(name) == other.get(name) for name in ("orders_version", "customers_version", "rules_sha256", "sql_sha256"))


class Workspace:
    """One connection with one version of the orders in it; after `build` a rule's table means the rows just computed.

    This is DuckDB's; what BigQuery does otherwise is overridden in detect/in_bigquery.py.
    """

    def __init__(self, lake: Lake, connection: duckdb.DuckDBPyConnection, orders: OrdersVersion):
        self.lake = lake
        self.connection = connection
        self.orders = orders
        self.settings = lake.settings
        self.customers = lake.customers()
        # read once: the rows and what they are said to be made from must agree
        self.closures = planned_closures(self.settings)
        self.learned = verdict_in_use(self.settings)
        self._rules_sha256 = self.settings.rules_sha256(self.closures)
        self._settings_sha256 = self.settings.settings_sha256()
        self._built: dict[str, tuple] = {}

    @property
    def provenance(self) -> dict[str, str]:
        """What a partition computed here is made from."""
        return {
            "orders_version": self.orders.version,
            "customers_version": self.customers.version if self.customers else "",
            "rules_sha256": self._rules_sha256,
            "sql_sha256": sql_sha256(),
            "settings_sha256": self._settings_sha256,
        }

    def cost(self) -> dict[str, Any]:
        """What the engine charged since this was asked last, for the metadata; DuckDB charges nothing."""
        return {}

    def attach(self) -> None:
        """Makes orders, refunds, customer_days and customers readable; derives customer_days once per orders version."""
        self._show("orders", self.orders.version)
        if self.orders.refunds:
            self._show("refunds", self.orders.version)
        else:
            self.replace("VIEW", "refunds", no_rows(TABLES["refunds"]))
        if not self._has_customer_days():
            self.run(query("customer_days"))
            self.lake.write(self.connection, "customer_days", self.orders.version, {"orders_version": self.orders.version})
            self._show("customer_days", self.orders.version)
        if self.customers:
            self._show("customers", self.customers.version)
        else:
            self.replace("VIEW", "customers", no_rows(TABLES["customers"]))
        self.replace("VIEW", "closed_days", no_rows(CLOSED_DAYS))
        self.replace("VIEW", "learned_chances", no_rows(LEARNED_CHANCES))

    def _has_customer_days(self) -> bool:
        """Shows them; False where they are not derived yet, damaged, or have the columns of an older version of this code."""
        try:
            self._show("customer_days", self.orders.version)
        except duckdb.Error:
            return False
        return self.connection.table("customer_days").columns == TABLES["customer_days"].column_names

    def _show(self, table: str, part: date | str) -> None:
        """Makes one file of the lake readable under its table's name."""
        self.replace("VIEW", table, f"SELECT * FROM {parquet_scan(self.lake.path(table, part))}")

    def run(self, rule: Query, **dates: date) -> None:
        """Computes a rule into a temp table of its table's name; `dates` are its parameters that no setting gives."""
        self.replace("TABLE", rule.table, rule.unordered_sql, self.parameters(rule, dates))

    def parameters(self, rule: Query, dates: dict[str, date]) -> dict[str, Any]:
        """The values of a rule's named parameters."""
        known = {**self.settings.rule_parameters(), "complete_through": self.orders.complete_through, **dates}
        return {name: known[name] for name in sorted(rule.parameters)}

    def replace(self, kind: Literal["TABLE", "VIEW"], name: str, select: str, values: dict[str, object] | None = None) -> None:
        """Creates a temp table or view in place of whichever of the two had that name."""
        # CREATE OR REPLACE replaces its own kind only, and DROP ... IF EXISTS fails where the name is of the other kind
        other = "VIEW" if kind == "TABLE" else "TABLE"
        if self._exists(other, name):
            self.connection.execute(f"DROP {other} {name}")
        self.connection.execute(f"CREATE OR REPLACE TEMP {kind} {name} AS {select}", values)

    def _exists(self, kind: Literal["TABLE", "VIEW"], name: str) -> bool:
        noun = kind.lower()
        return bool(self.connection.execute(f"SELECT 1 FROM duckdb_{noun}s() WHERE {noun}_name = ? AND temporary", [name]).fetchall())

    def build(self, table: str, day: date) -> None:
        """Computes `table` as of `day` (and its inputs where they are not at hand)."""
        if self._built.get(table) == (day,):
            return
        if table in ("retention_daily", "alert_logic", "returning_customers", "return_rates"):
            self.build_range(table, day, day)
            return
        if table in INPUT:
            self.use(INPUT[table], day)
        if table == "customer_priority":
            self.build_rates(day, day)
        rule = fast_query(table) if table == "base_customers" else query(table)
        self.run(rule, reference_date=day, from_date=day, to_date=day)
        self._built[table] = (day,)

    def build_range(self, table: str, first: date, last: date) -> None:
        """Computes a table of every day of a range in one pass over the orders."""
        if self._built.get(table) == (first, last):
            return
        match table:
            case "retention_daily":
                self.run(fast_query(table), from_date=first, to_date=last)
            case "alert_logic":
                self.build_range("retention_daily", first - timedelta(days=BASELINE_DAYS), last)
                self.build_range("returning_customers", first, last)
                self.run(query(table), from_date=first, to_date=last)
            case "returning_customers":
                self.build_closed_days(first - timedelta(days=DUE_DAYS), last)
                self.run(fast_query("due_daily"), from_date=first - timedelta(days=DUE_DAYS), to_date=last)
                self.run(query("return_expectations"), from_date=first, to_date=last)
                self.run(query(table), from_date=first, to_date=last)
            case "return_rates":
                oldest, newest = first - timedelta(days=RETURN_DAYS[0]), last - timedelta(days=RETURN_DAYS[1])
                self.run(query("return_days"), from_date=first, to_date=last)
                self.run(fast_query("return_windows"), from_date=oldest, to_date=newest)
                self.run(query(table), from_date=first, to_date=last)
            case "customer_priority":
                self.build_intervals(first, last)
                self.build_rates(first, last)
                self.run(queue_of_range(), from_date=first, to_date=last)
        self._built[table] = (first, last)

    def build_closed_days(self, first: date, last: date) -> None:
        """Finds the days without trade between two dates; a shop without a calendar has none, as `attach` left it."""
        if self.settings.holiday_country or self.closures:
            self._show_calendar(calendar(self.settings, self.closures, first - timedelta(days=COMPARED_DAYS), last))
            self.run(query("closed_days"), from_date=first, to_date=last)

    def _show_calendar(self, days: list[CalendarDay]) -> None:
        """Makes `calendar_days` readable."""
        rows = ", ".join(f"(DATE '{day.day}', {literal(day.reason)}, {day.kind == 'planned closure'})" for day in days)
        columns = ", ".join(CALENDAR_DAYS.column_names)
        self.replace("VIEW", "calendar_days", f"SELECT * FROM (VALUES {rows}) AS given({columns})" if days else no_rows(CALENDAR_DAYS))

    def build_intervals(self, first: date, last: date) -> None:
        """Finds when each customer is in a tier between two dates, unless a range that covers them is at hand."""
        if self.settings.p1_min_revenue == "median":
            raise ValueError("P1 depends on the day's median revenue; intervals cannot say who is in it: build day by day")
        if (known := self._built.get("priority_intervals")) and known[0] <= first and last <= known[-1]:
            return
        self.run(fast_query("priority_intervals"), from_date=first, to_date=last)
        self._built["priority_intervals"] = (first, last)

    def build_rates(self, first: date, last: date) -> None:
        """Learns return_rates of each day between two dates, unless those of a range that covers them are at hand."""
        known = self._built.get("return_rates")
        if not (known and known[0] <= first and last <= known[-1]):
            self.build_range("return_rates", first, last)
            self.build_chances(first, last)

    def build_chances(self, first: date, last: date) -> None:
        """Asks the learned model about each day, where it is in use. Raises UsageError where scikit-learn is missing then."""
        if self.learned:
            from retention_ops.detect.learned import ReturnModel  # scikit-learn, for those who chose it

            ReturnModel(self).fill_chances(first, last)

    def queue_batches(self, days: list[date]) -> Iterator[list[date]]:
        """Cuts consecutive `days` so that build_range("customer_priority") of a batch has at most some BATCH_ROWS rows."""
        self.build_intervals(days[0], days[-1])
        self.build_rates(days[0], days[-1])
        rows = self.connection.execute("SELECT SUM(to_day - from_day + 1) FROM priority_intervals").fetchall()[0][0] or 1
        size = max(1, min(BATCH_DAYS, int(BATCH_ROWS * len(days) / rows)))
        for start in range(0, len(days), size):
            yield days[start:start + size]

    def build_missing(self, day: date, window_days: int) -> None:
        """Computes due_customers and shortfall_slices of the `window_days` up to D; a range of alert_logic with D in it is at hand."""
        self.run(query("due_customers"), from_date=day - timedelta(days=window_days - 1), to_date=day)
        self.run(query("shortfall_slices"), to_date=day)

    def use(self, table: str, day: date) -> None:
        """Makes `table` as of `day` readable: from its stored partition where that is of the same make."""
        if self._built.get(table) == (day,):
            return
        if self._is_stored(table, day):
            self._show(table, day)
            self._built[table] = (day,)
        else:
            self.build(table, day)

    def _is_stored(self, table: str, day: date) -> bool:
        """Whether the stored partition is of the same make."""
        path = self.lake.path(table, day)
        try:
            return path.is_file() and same_make(read_provenance(self.connection, path), self.provenance)
        except duckdb.Error:  # damaged: as good as another make
            return False

    def build_cohorts(self) -> None:
        """Computes cohort_retention_evolution over all orders."""
        self.run(query("cohort_retention_evolution"))

    def rows(self, table: str, order_by: str | None = None) -> pd.DataFrame:
        """The rows built last, in the table's declared columns and order."""
        declared = RELATIONS[table]
        columns = ", ".join(declared.column_names)
        return self.connection.sql(f"SELECT {columns} FROM {table} ORDER BY {order_by or ', '.join(declared.key)}").df()


@cache
def queue_of_range() -> Query:
    """customer_priority out of priority_intervals: who is asked is fast, what is said of them are the readable rules."""
    return stacked(fast_query("retention_snapshot"), query("churn_detection"), query("customer_priority"))


PRIORITY_ORDER = "priority_score DESC, total_revenue DESC, customer_id"
"""the queue by score"""


def priority_order(settings: Settings) -> str:
    """The order in which rows of customer_priority are stored and handed out."""
    by_stake = "priority_tier, spend_at_stake DESC NULLS LAST, " if settings.rank_by == "spend_at_stake" else ""
    return by_stake + PRIORITY_ORDER


Space = TypeVar("Space", bound=Workspace)


@contextmanager
def local_workspace(lake: Lake, kind: type[Space]) -> Iterator[Space]:
    """A `kind` of Workspace on the CURRENT orders, for who asks the rules of many dates. Raises NoOrders where there are none,
    UsageError where they are not in the lake.
    """
    if lake.engine != "lake":
        raise UsageError("backtest asks the rules many times and runs on local files only; ingest the orders into a home "
                         "with RETENTION_OPS_WAREHOUSE=lake (the rules are the same)")
    with workspace(lake, kind=kind) as space:
        yield space


@contextmanager
def workspace(lake: Warehouse, orders: OrdersVersion | None = None, *, kind: type[Workspace] = Workspace) -> Iterator[Workspace]:
    """A Workspace on `orders`, by default the CURRENT ones, in the engine they are computed by. Raises NoOrders where there are none.

    `kind` is DuckDB's; a warehouse in BigQuery has its own.
    """
    orders = orders or lake.orders()
    if orders is None:
        raise NoOrders("no orders yet: run `retention-ops ingest FILE --preset orders`, or `retention-ops demo` to look around")
    if lake.engine == "bigquery":
        from retention_ops.detect.in_bigquery import BigQueryWorkspace  # its client is imported only where it is used

        with BigQueryWorkspace.opened(lake, orders) as space:
            yield space
        return
    with lake.connection() as connection:
        space = kind(lake, connection, orders)
        space.attach()
        yield space


def table_for(lake: Warehouse, name: str, day: date | None) -> pd.DataFrame:
    """Computes one table as of `day` without storing it (`day` is None for cohort_retention_evolution)."""
    with workspace(lake) as space:
        if name == "cohort_retention_evolution":
            space.build_cohorts()
        else:
            space.build(name, day)
        return space.rows(name, priority_order(lake.settings) if name == "customer_priority" else None)


def alert_history(lake: Warehouse, first: date, last: date) -> pd.DataFrame:
    """alert_logic for every day from `first` to `last`, computed in one pass, oldest first."""
    with workspace(lake) as space:
        space.build_range("alert_logic", first, last)
        return space.rows("alert_logic")


def closures_between(lake: Warehouse, first: date, last: date) -> list[dict[str, Any]]:
    """The calendar from `first` to `last`, oldest first: date, kind, reason, `orders` on it, and whether it counts as `closed`.

    A public holiday is decided by its orders: `closed` is None where they are not all in yet, or there were none so early.
    """
    found = calendar(lake.settings, planned_closures(lake.settings), first, last)
    known, counts, closed = lake.orders(), {}, set()
    asked = [day.day for day in found if known and known.first_date <= day.day <= known.complete_through]
    if asked:
        with workspace(lake) as space:
            space.build_closed_days(asked[0], asked[-1])
            closed = set(space.rows("closed_days")["closed_date"].dt.date)
            counts = {day: int(orders) for day, orders in space.connection.execute(
                f"SELECT order_date, SUM(orders) AS orders FROM customer_days WHERE order_date BETWEEN DATE '{asked[0]}' AND "
                f"DATE '{asked[-1]}' GROUP BY order_date").fetchall()}
    return [{
        "date": day.day, "kind": day.kind, "reason": day.reason, "orders": counts.get(day.day, 0) if day.day in asked else None,
        "closed": True if day.kind == "planned closure" else day.day in closed if day.day in asked else None,
    } for day in found]
