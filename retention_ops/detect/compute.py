"""Runs the rules of sql/ as of a date. Every table is a function of the orders, the settings and D alone.

Stored partitions are read as input only where they were made from the same orders version and the same rules;
otherwise the input is computed again, so no result ever depends on what happens to be materialized.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from typing import Any, Literal

import duckdb
import pandas as pd

from retention_ops.errors import NoOrders
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.dialect import no_rows, parquet_scan
from retention_ops.warehouse.lake import Lake, read_provenance
from retention_ops.warehouse.render import query
from retention_ops.warehouse.seam import Warehouse
from retention_ops.warehouse.versions import OrdersVersion

INPUT = {
    "retention_snapshot": "base_customers",
    "churn_detection": "retention_snapshot",
    "customer_priority": "churn_detection",
}
"""table -> the per-day table it reads; base_customers, retention_daily and cohorts read customer_days"""

BASELINE_DAYS = 7


class Workspace:
    """One connection with the CURRENT orders in it; `build` leaves a temp table named after the rule's table."""

    def __init__(self, lake: Lake, connection: duckdb.DuckDBPyConnection, orders: OrdersVersion):
        self.lake = lake
        self.connection = connection
        self.orders = orders
        self.settings = lake.settings
        self.customers = lake.customers()
        self._built: dict[str, tuple] = {}

    @property
    def provenance(self) -> dict[str, str]:
        """What a file computed here is made from."""
        return {
            "orders_version": self.orders.version,
            "customers_version": self.customers.version if self.customers else "",
            "rules_sha256": self.settings.rules_sha256(),
        }

    def cost(self) -> dict[str, Any]:
        """What the engine charged since this was asked last, for the metadata; DuckDB charges nothing."""
        return {}

    def attach(self) -> None:
        """Makes orders, customer_days and customers readable; derives customer_days once per orders version."""
        self._show("orders", self.orders.version)
        try:
            self._show("customer_days", self.orders.version)
        except duckdb.Error:  # not derived yet, or damaged
            self._run("customer_days", {})
            self.lake.write(self.connection, "customer_days", self.orders.version, {"orders_version": self.orders.version})
            self._show("customer_days", self.orders.version)
        if self.customers:
            self._show("customers", self.customers.version)
        else:
            self._replace("VIEW", "customers", no_rows(TABLES["customers"]))

    def _show(self, table: str, part: date | str) -> None:
        """Makes one file of the lake readable under its table's name."""
        self._replace("VIEW", table, f"SELECT * FROM {parquet_scan(self.lake.path(table, part))}")

    def _run(self, table: str, dates: dict[str, date]) -> None:
        """Computes a rule into a temp table of its name."""
        rule = query(table)
        known = {**self.settings.rule_parameters(), "complete_through": self.orders.complete_through, **dates}
        self._replace("TABLE", table, rule.duckdb_sql, {name: known[name] for name in rule.parameters})

    def _replace(self, kind: Literal["TABLE", "VIEW"], name: str, select: str, values: dict[str, object] | None = None) -> None:
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
        """Computes `table` as of `day` into a temp table of that name (and its inputs where they are not at hand)."""
        if self._built.get(table) == (day,):
            return
        if table in ("retention_daily", "alert_logic"):
            self.build_range(table, day, day)
            return
        if table in INPUT:
            self.use(INPUT[table], day)
        self._run(table, {"reference_date": day})
        self._built[table] = (day,)

    def build_range(self, table: str, first: date, last: date) -> None:
        """Computes retention_daily or alert_logic for every day of a range in one query."""
        if self._built.get(table) == (first, last):
            return
        if table == "alert_logic":
            self.build_range("retention_daily", first - timedelta(days=BASELINE_DAYS), last)
        self._run(table, {"from_date": first, "to_date": last})
        self._built[table] = (first, last)

    def use(self, table: str, day: date) -> None:
        """Makes `table` as of `day` readable: from its stored partition where that is of the same make."""
        if self._built.get(table) == (day,):
            return
        path = self.lake.path(table, day)
        try:
            usable = path.is_file() and read_provenance(self.connection, path) == self.provenance
        except duckdb.Error:  # damaged: as good as another make
            usable = False
        if usable:
            self._show(table, day)
            self._built[table] = (day,)
        else:
            self.build(table, day)

    def build_cohorts(self) -> None:
        """Computes cohort_retention_evolution over all orders."""
        self._run("cohort_retention_evolution", {})

    def rows(self, table: str, order_by: str | None = None) -> pd.DataFrame:
        """The rows built last, in the table's declared columns and order."""
        declared = TABLES[table]
        columns = ", ".join(declared.column_names)
        return self.connection.sql(f"SELECT {columns} FROM {table} ORDER BY {order_by or ', '.join(declared.key)}").df()


PRIORITY_ORDER = "priority_score DESC, total_revenue DESC, customer_id"


@contextmanager
def workspace(lake: Warehouse) -> Iterator[Workspace]:
    """A Workspace on the CURRENT orders, in the engine they are computed by. Raises NoOrders where nothing was ingested."""
    orders = lake.orders()
    if orders is None:
        raise NoOrders("no orders yet: run `retention-ops ingest FILE --preset orders`, or `retention-ops demo` to look around")
    if lake.engine == "bigquery":
        from retention_ops.detect.in_bigquery import BigQueryWorkspace  # its client is imported only where it is used

        with BigQueryWorkspace.opened(lake, orders) as space:
            yield space
        return
    with lake.connection() as connection:
        space = Workspace(lake, connection, orders)
        space.attach()
        yield space


def table_for(lake: Warehouse, name: str, day: date | None) -> pd.DataFrame:
    """Computes one table as of `day` without storing it (`day` is None for cohort_retention_evolution)."""
    with workspace(lake) as space:
        if name == "cohort_retention_evolution":
            space.build_cohorts()
        else:
            space.build(name, day)
        return space.rows(name, PRIORITY_ORDER if name == "customer_priority" else None)


def alert_history(lake: Warehouse, first: date, last: date) -> pd.DataFrame:
    """alert_logic for every day from `first` to `last`, computed in one pass, oldest first."""
    with workspace(lake) as space:
        space.build_range("alert_logic", first, last)
        return space.rows("alert_logic")
