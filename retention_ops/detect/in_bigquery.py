"""Runs the rules of sql/ as of a date where the data is: the same questions as compute.Workspace, answered by BigQuery jobs.

A rule's text reaches BigQuery as it stands in its file; in front of it stands only what its input tables mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from typing import Any

import pandas as pd

from retention_ops.detect.closures import CalendarDay
from retention_ops.detect.compute import Workspace, same_make
from retention_ops.errors import NoOrders, UsageError
from retention_ops.warehouse.bigquery import MOST_PARTITIONS, BigQuery, Session, google_literal
from retention_ops.warehouse.catalog import RELATIONS
from retention_ops.warehouse.render import Query, query
from retention_ops.warehouse.versions import OrdersVersion


class BigQueryWorkspace(Workspace):
    """A session on one version of the orders; what is computed is staged in BigQuery."""

    def __init__(self, lake: BigQuery, connection: Session, orders: OrdersVersion):
        super().__init__(lake, connection, orders)
        self._stored: dict[str, dict[date, dict[str, str]]] = {}
        self._seen = lake.jobs.bytes_billed, lake.jobs.last_replacement

    @classmethod
    @contextmanager
    def opened(cls, lake: BigQuery, orders: OrdersVersion) -> Iterator[BigQueryWorkspace]:
        session = Session(lake)
        space = cls(lake, session, orders)
        try:
            space.attach()
            yield space
        finally:
            session.close()

    def cost(self) -> dict[str, Any]:
        """Bytes billed since this was asked last, and the job that replaced a partition, if one did.

        What a range computes at once counts for its first day, so that the days of a run add up to what it was billed.
        """
        (billed, job), jobs = self._seen, self.lake.jobs
        self._seen = jobs.bytes_billed, jobs.last_replacement
        replaced = {"bigquery_job": jobs.last_replacement} if jobs.last_replacement != job else {}
        return {"bytes_billed": jobs.bytes_billed - billed, **replaced}

    def attach(self) -> None:
        """Makes orders, refunds, customer_days and customers readable; loads and derives them once per version."""
        self.lake.make_ready()
        self.lake.take_over("orders", self.orders)
        self._show("orders", self.orders.version)
        if self.orders.refunds:
            self.lake.take_over("refunds", self.orders, self.orders.refunds_path)
            self._show("refunds", self.orders.version)
        else:
            self.connection.show_nothing("refunds")
        if not self.lake.exists("customer_days", self.orders.version):
            self.lake.derive("customer_days", self.orders.version, self.connection.statement(query("customer_days").google_sql))
        self._show("customer_days", self.orders.version)
        if self.customers:
            self.lake.take_over("customers", self.customers)
            self._show("customers", self.customers.version)
        else:
            self.connection.show_nothing("customers")
        self.connection.show_nothing("closed_days")
        self.connection.show_nothing("learned_chances")

    def _show(self, table: str, part: date | str) -> None:
        self.connection.show_part(table, part)

    def _show_calendar(self, days: list[CalendarDay]) -> None:
        rows = ", ".join(
            f"STRUCT(DATE '{day.day}' AS calendar_date, {google_literal(day.reason)} AS reason, {day.kind == 'planned closure'} AS planned)"
            for day in days)
        if days:
            self.connection.show("calendar_days", f"SELECT calendar_date, reason, planned FROM UNNEST([{rows}])")
        else:
            self.connection.show_nothing("calendar_days")

    def run(self, rule: Query, **dates: date) -> None:
        self.connection.stage(rule.table, rule.google_sql, self.parameters(rule, dates))

    def queue_batches(self, days: list[date]) -> Iterator[list[date]]:
        """All days at once, as far as one job may write them: the staged rows are partitioned, and each day reads its own."""
        self.build_rates(days[0], days[-1])
        for start in range(0, len(days), MOST_PARTITIONS):
            yield days[start:start + MOST_PARTITIONS]

    def _is_stored(self, table: str, day: date) -> bool:
        if table not in self._stored:  # asked once per step: what other runs replace meanwhile has the same make or fails this test
            self._stored[table] = dict(self.lake.provenances([table]))
        return same_make(self._stored[table].get(day, {}), self.provenance)

    def rows(self, table: str, order_by: str | None = None) -> pd.DataFrame:
        declared = RELATIONS[table]
        statement = f"SELECT {', '.join(declared.column_names)} FROM {table} ORDER BY {order_by or ', '.join(declared.key)}"
        return self.lake.frame(declared, self.connection.execute(statement).fetchall())


BETWEEN = ("due_daily", "return_expectations", "returning_customers", "return_days", "return_windows", "return_rates")
"""what alert_logic and customer_priority are computed from besides: never stored, but it scans"""
DAILY = ("base_customers", "retention_snapshot", "churn_detection", "retention_daily", "alert_logic", "customer_priority")


def estimates(lake: BigQuery, day: date) -> dict[str, int]:
    """table -> bytes its rule would scan as of `day`, by dry runs: nothing is computed, stored or billed.

    Every rule counts as computed from customer_days; a run reads the inputs that it has just stored instead, and D's own new
    rows to check and replace a partition. Raises UsageError where the orders are not in BigQuery yet.
    """
    orders = lake.orders()
    if orders is None:
        raise NoOrders("no orders yet: run `retention-ops ingest FILE --preset orders`")
    if not lake.exists("customer_days", orders.version):
        raise UsageError(f"orders version {orders.version} is not in {lake.path('customer_days')} yet, so there is nothing to measure; "
                         "`retention-ops ingest` or the first run loads it (loading is free of charge)")
    space = _Unstored(lake, _Inline(lake), orders)
    space.attach()
    for table in DAILY:
        space.build(table, day)
    space.build_cohorts()
    return space.connection.scanned


class _Unstored(BigQueryWorkspace):
    """Takes nothing for stored: to look it up would be billed."""

    def _is_stored(self, table: str, day: date) -> bool:
        return False


class _Inline(Session):
    """A session that computes nothing: a rule's table means the rule itself, and its bytes are asked for."""

    def __init__(self, warehouse: BigQuery):
        super().__init__(warehouse)
        self.scanned: dict[str, int] = {}

    def stage(self, table: str, rule: str, values: Mapping[str, Any]) -> None:
        """Asks for the bytes of a rule over its inputs, and has the table mean the rule from now on."""
        # each rule's dates are its own: as literals they do not meet those of another rule under one name
        text = self.statement(rule)
        for name, value in sorted(values.items(), reverse=True):
            text = re.sub(rf"@{name}\b", lambda _, value=value: _constant(value), text)
        self.scanned[table] = self.warehouse.jobs.estimate(text)
        self.show(table, text)


def _constant(value: Any) -> str:
    """A parameter's value as a GoogleSQL literal."""
    if isinstance(value, date):
        return f"DATE '{value}'"
    return google_literal(value) if isinstance(value, str) else str(value)
