"""Real orders with a known loss in them: what the rules would have said if, from a day on, orders had stayed away.

The rules are asked as production asks them, by Workspace.build_range. Only what the loss cannot have changed is not computed again:
customer_days that ended before it, and the days of due_daily and retention_daily before it. That the rows are the same as those of
orders ingested without the lost ones is proved in detect/test_backtest.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import date, timedelta

import duckdb
import numpy as np

from retention_ops.detect.alerts import AT_RISK, SHORTFALL
from retention_ops.detect.compute import Workspace, local_workspace
from retention_ops.warehouse.dialect import identifier, literal
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.render import Query
from retention_ops.warehouse.versions import OrdersVersion

FOLLOWED = 28
"""days after the start of a loss in which a rule may notice it; the first day of the loss is day 1"""
DECLINE_DAYS, DECLINE_PCT = 28, 50
DELAY_DAYS = 3
PARTIAL_PCT = 50
SEGMENTS = 3
"""without customer attributes a segment is one of so many parts of the customers, drawn by a hash of their id"""
SEGMENT_COLUMNS = ("country", "segment", "acquisition_channel")
SEGMENT_SHARES = (0.10, 0.60)
"""a value of an attribute is a segment worth losing where it makes such a share of the orders"""
DAILY_INPUTS = ("due_daily", "retention_daily")
"""what the rules read of the days before; a loss leaves it as it was up to its start"""

DAY_COLUMNS = "customer_id, order_date, orders, first_order_date, next_order_date, order_days_so_far, orders_so_far"
"""columns of customer_days in a loss: what an order was worth is no matter of these rules"""

Series = np.ndarray
"""float64, one number for each day of a range"""


@dataclass(frozen=True)
class Kind:
    """A kind of loss. `lost_pct(i)` is the % of orders lost on its i-th day (from 0); `days` are the days on which rules are asked.

    `loaded` says what complete_through claims: True: the orders are in (so what is missing looks lost); False: it stands still.
    """

    name: str
    label: str
    lost_pct: Callable[[int], float]
    days: int = FOLLOWED
    of_segment: bool = False
    loaded: bool = True


def outage(share: int) -> Kind:
    return Kind(f"outage_{share}", f"{share} % of orders lost", lambda _: share)


OUTAGES = (10, 20, 30, 50, 70, 100)
DECLINE = Kind(
    "decline", f"decline by {DECLINE_PCT} % over {DECLINE_DAYS} days", lambda day: min(day + 1, DECLINE_DAYS) * DECLINE_PCT / DECLINE_DAYS,
)
SEGMENT = Kind("segment", "one segment lost", lambda _: 100, of_segment=True)
LATE = Kind("late_load", f"{DELAY_DAYS} days not loaded yet", lambda _: 100, days=DELAY_DAYS, loaded=False)
PARTIAL = Kind("partial_day", f"{PARTIAL_PCT} % of the last day missing", lambda _: PARTIAL_PCT, days=1)
NOTHING = Kind("nothing", "nothing lost: rings by chance", lambda _: 0)
KINDS = (*(outage(share) for share in OUTAGES), DECLINE, SEGMENT, LATE, PARTIAL)


@dataclass(frozen=True)
class Loss:
    """One injected loss: of that kind, from `start` on; `seed` decides which orders, or which segment, are lost."""

    kind: Kind
    start: date
    seed: int

    @property
    def last(self) -> date:
        """The last day on which rules are asked."""
        return self.start + timedelta(self.kind.days - 1)


class InjectedOrders(Workspace):
    """A workspace on the real orders that can be asked what the rules would say had some of them stayed away.

    Ask for the real days first, by `measured` over the whole period: what it derives of the days before a loss is used again.
    """

    def __init__(self, lake: Lake, connection: duckdb.DuckDBPyConnection, orders: OrdersVersion):
        super().__init__(lake, connection, orders)
        self.orders_as_they_are = orders
        self._start: date | None = None

    def measured(self, first: date, last: date) -> tuple[Series, Series]:
        """(rise of AT_RISK % over its baseline in %, threshold up to which returning customers are too few) of each day; nan: gated."""
        self._built.clear()
        eve = first - timedelta(days=1)
        self.build_range("alert_logic", eve, last)
        found = []
        # two thirds of the threshold are enough where a shortfall lasts
        for rule, number in ((AT_RISK, "delta_relative_pct"), (SHORTFALL, "greatest(score, COALESCE(1.5 * lasting_score, score))")):
            rows = self.connection.execute(
                f"SELECT alert_date, {number}, gate, COALESCE(day_alone, false) FROM alert_logic WHERE alert_type = ?", [rule]).fetchall()
            found.append(rings_from(rows, eve, last)[1:])
        return found[0], found[1]

    def run(self, rule: Query, **dates: date) -> None:
        """As a Workspace does, but the days before a loss are taken from what was computed of the real orders."""
        first = dates.get("from_date")
        if self._start is None or rule.table not in DAILY_INPUTS:
            super().run(rule, **dates)
            if rule.table in DAILY_INPUTS:
                self.connection.execute(f"CREATE OR REPLACE TEMP TABLE real_{rule.table} AS FROM {rule.table}")
            return
        super().run(rule, **{**dates, "from_date": max(first, self._start)})
        self.connection.execute(
            f"INSERT INTO {rule.table} BY NAME FROM real_{rule.table} WHERE as_of_date >= ? AND as_of_date < ?", [first, self._start],
        )

    def prepare(self, first: date, last: date) -> None:
        """Holds what losses from `first` on, followed to `last`, are made of. Call it once, before the first `inject`."""
        # in order of date: the orders of one loss are then found without reading the others
        self.connection.execute(f"""
            CREATE OR REPLACE TEMP TABLE later_orders AS
            SELECT order_id, customer_id, order_date FROM orders
            WHERE order_date BETWEEN DATE '{first}' AND DATE '{last}' ORDER BY order_date""")
        self.connection.execute(f"CREATE OR REPLACE TEMP TABLE real_days AS SELECT {DAY_COLUMNS} FROM customer_days")

    def inject(self, loss: Loss, lost: str) -> Series:
        """Makes customer_days what they would be up to the last day asked, without the orders of which the SQL condition `lost` is true.

        Returns the orders that are left of each day asked.
        """
        start, last = (f"DATE '{day}'" for day in (loss.start, loss.last))
        self._start = loss.start
        eve = loss.start - timedelta(days=1)
        self.orders = self.orders_as_they_are if loss.kind.loaded else replace(self.orders_as_they_are, complete_through=eve)
        self.connection.execute(f"""
            CREATE OR REPLACE TEMP TABLE kept_orders AS
            SELECT customer_id, order_date, COUNT(*) AS orders
            FROM later_orders WHERE order_date BETWEEN {start} AND {last} AND NOT ({lost})
            GROUP BY 1, 2""")
        # a silence that ended before the loss is as it was; one that was open then ends when the customer comes all the same
        self.connection.execute(f"""
            CREATE OR REPLACE TEMP TABLE changed_days AS
            WITH silent AS (
              SELECT customer_id, order_date, first_order_date, order_days_so_far, orders_so_far, orders
              FROM real_days WHERE order_date < {start} AND (next_order_date IS NULL OR next_order_date >= {start})
            ),
            visits AS (
              FROM silent
              UNION ALL
              SELECT kept.customer_id, kept.order_date,
                COALESCE(silent.first_order_date, MIN(kept.order_date) OVER so_far),
                COALESCE(silent.order_days_so_far, 0) + ROW_NUMBER() OVER so_far,
                COALESCE(silent.orders_so_far, 0) + SUM(kept.orders) OVER so_far,
                kept.orders
              FROM kept_orders AS kept LEFT JOIN silent USING (customer_id)
              WINDOW so_far AS (PARTITION BY kept.customer_id ORDER BY kept.order_date)
            )
            SELECT *, LEAD(order_date) OVER (PARTITION BY customer_id ORDER BY order_date) AS next_order_date FROM visits""")
        self.replace("VIEW", "customer_days", f"""
            SELECT {DAY_COLUMNS} FROM real_days WHERE next_order_date < {start}
            UNION ALL BY NAME FROM changed_days""")
        rows = self.connection.execute("SELECT order_date, SUM(orders) FROM kept_orders GROUP BY 1").fetchall()
        return by_day(rows, loss.start, loss.last, 0.0)

    # -- which orders are lost -------------------------------------------------------------------------------------------

    def lost_orders(self, loss: Loss, segments: list[str]) -> str:
        """The SQL condition that a lost order meets; each order is lost or not on its own, the same way for the same seed."""
        if loss.kind.of_segment:
            return segments[loss.seed % len(segments)] if segments else f"{_drawn('customer_id', loss.seed, SEGMENTS)} = 0"
        shares = ", ".join(str(round(100 * loss.kind.lost_pct(day))) for day in range(loss.kind.days))
        return f"{_drawn('order_id', loss.seed, 10_000)} < [{shares}][order_date - DATE '{loss.start}' + 1]"

    def segments(self) -> list[str]:
        """SQL conditions, one for each value of a customer attribute with its due share of the orders; none without attributes."""
        if not self.customers:
            return []
        found = []
        for column in SEGMENT_COLUMNS:
            for value in self._values_of(column):
                found.append(f"customer_id IN (SELECT customer_id FROM customers WHERE {identifier(column)} = {literal(value)})")
        return found

    def _values_of(self, column: str) -> list[str]:
        low, high = SEGMENT_SHARES
        rows = self.connection.execute(f"""
            SELECT {identifier(column)} AS value, COUNT(*) AS orders FROM later_orders LEFT JOIN customers USING (customer_id)
            GROUP BY 1 ORDER BY 1""").fetchall()
        total = sum(orders for _, orders in rows)
        return [value for value, orders in rows if value is not None and low * total <= orders <= high * total]


def _drawn(column: str, seed: int, sides: int) -> str:
    """SQL for a die of so many `sides`, thrown once for each value of the column and seed; md5, so that every version throws the same."""
    return f"md5_number_lower(concat({column}, ':{seed}')) % {sides}"


def rings_from(rows: list[tuple[date, float | None, str | None, bool]], first: date, last: date) -> Series:
    """The threshold up to which a rule rings on each day, from rows of (date, its number, gate, day_alone); nan where a gate holds it back.

    A day that falls out alone waits until the day before rings too: it rings up to the smaller number of the two. (As a gate,
    partial_day says so of the threshold in force.)
    """
    numbers = by_day([(day, number) for day, number, _, _ in rows], first, last, np.nan)
    before = np.concatenate([[np.nan], numbers[:-1]])
    found = numbers.copy()
    for day, _, gate, alone in rows:
        place = (day - first).days
        if gate not in (None, "partial_day"):
            found[place] = np.nan
        elif alone:
            found[place] = np.minimum(numbers[place], before[place])
    return found


def by_day(rows: list[tuple[date, float]], first: date, last: date, missing: float) -> Series:
    """Numbers of dates as a series from `first` to `last`."""
    found = np.full((last - first).days + 1, missing)
    for day, value in rows:
        found[(day - first).days] = missing if value is None else value
    return found


def injected_orders(lake: Lake) -> AbstractContextManager[InjectedOrders]:
    """An InjectedOrders on the CURRENT orders. Raises what local_workspace raises."""
    return local_workspace(lake, InjectedOrders)
