"""Shops on the lines of the second rule and of what is at stake, for the mutations: each file is run alone, on inputs that are right.

What the naive oracle expects is computed once; a mutant then costs a few queries of DuckDB.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pandas as pd

from retention_ops.detect.closures import CalendarDay
from retention_ops.detect.compute import DUE_DAYS, Workspace, priority_order, workspace
from retention_ops.settings import Settings
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.render import Query, fast_query, query
from retention_ops_tests import oracle
from retention_ops_tests.detect import test_closures
from retention_ops_tests.detect.test_against_oracle import every_date
from retention_ops_tests.detect.test_returning_customers import (
    CLOSED,
    START,
    close,
    expect,
    fabricated,
    known_on,
    on_every_line,
    some_attributes,
    windows_on_lines,
)
from retention_ops_tests.oracle_returning import RECENCIES, Chances, Returning
from retention_ops_tests.oracle_returns import CELLS, LATENESSES, VISITS, Returns
from retention_ops_tests.oracle_returns import RECENCIES as RETURN_RECENCIES
from retention_ops_tests.shops import lake_with, orders_frame, refunded_shop, seasonal_shop, small_shop
from retention_ops_tests.warehouse import edges

FILES = frozenset({
    "05_due_daily.sql", "fast/due_daily.sql", "05_return_expectations.sql", "05_returning_customers.sql", "05_closed_days.sql",
    "07_due_customers.sql", "08_shortfall_slices.sql",
    "06_return_days.sql", "06_return_windows.sql", "fast/return_windows.sql", "06_return_rates.sql",
})


@dataclass(frozen=True)
class Check:
    """One statement from `first` to `last` over the inputs in `space`, and the oracle's rows."""

    name: str
    table: str
    space: Workspace
    first: date
    last: date
    expected: pd.DataFrame

    def differences(self, rule: Query) -> list[str]:
        self.space.run(rule, from_date=self.first, to_date=self.last)
        order = priority_order(self.space.settings) if self.table == "customer_priority" else None
        found = oracle.differences(self.table, self.expected, self.space.rows(self.table, order))
        return [f"{self.name}, {self.first} to {self.last}: {line}" for line in found]


class Assuming(Returning):
    """One of whose customers everybody comes back on any day with the same chance."""

    def __init__(self, share: int, *shop: Any):
        self.share = share
        super().__init__(*shop)

    def chances(self, known: date) -> tuple[Chances, float] | None:
        return dict.fromkeys(ALL_CELLS, dict.fromkeys(range(7), self.share)), 1.0


ALL_CELLS = [(rhythm, recency) for rhythm in range(7) for recency in RECENCIES]


def half_loaded_shop(*half_loaded: date, every: int = 6, poor: Sequence[date] = ()) -> pd.DataFrame:
    """Customers who come every so many days, 40 a day; of a day that is not whole every tenth of them is there, of a poor one 3 in 4."""
    rows = [(f"c{number}", day, 100) for day in oracle.dates(date(2023, 12, 1), date(2024, 5, 20))
            for number in range((day - date(2023, 12, 1)).days % every, 40 * every, every)
            if (day not in half_loaded or number % (10 * every) < every) and (day not in poor or number % (4 * every) >= every)]
    return orders_frame(rows)


class EachCellItsOwn(Returns):
    """Of a shop in which the customers of each cell stay away in their own share, from nobody to everybody."""

    def stay_away(self, d: date) -> dict[tuple[int, int, int], int]:
        own = {cell: place * 1_000_000 // (len(CELLS) - 1) for place, cell in enumerate(CELLS)}
        return {**own, (1, 22, -1): 50_000, (1, 46, -1): 950_000}  # on the lines of the sentence


def cells_on_lines() -> pd.DataFrame:
    """Customers who stand on START on, just below and just above each line of visits, recency and lateness; some come back."""
    rows: list[tuple] = []

    def customer(name: str, visits: int, gap: int, silence: int, back: int | None = None) -> None:
        first = START - timedelta(silence + gap * (visits - 1))
        rows.extend((name, first + timedelta(gap * visit), 1000 + 7 * len(rows)) for visit in range(visits))
        if back:
            rows.append((name, START + timedelta(back), 500))

    for line in VISITS:
        for visits in {line, line + 1}:
            customer(f"visits{visits}", visits, 11, 5)
    for line in (*RETURN_RECENCIES, 181):
        for silence in {max(0, line - 1), line, line + 1}:
            for visits in (1, 3):
                customer(f"recency{visits}x{silence}", visits, 37, silence)
    for line in LATENESSES[1:]:
        for silence in (2 * line // 5 - 1, 2 * line // 5, 2 * line // 5 + 1):  # the usual gap is 40 days
            if silence <= 181:
                customer(f"late{silence}", 4, 40, silence)
        for silence in (line // 25 - 1, line // 25, line // 25 + 1):  # 4 days
            customer(f"later{silence}", 4, 4, silence)
    for back in (1, 29, 30, 31, 89, 90, 91, 92, 99):
        for silence in (0, 3, 60, 90, 91, 179, 180):
            customer(f"back{back}after{silence}", 3, 25, silence, back)
    return orders_frame(rows)


class Checks:
    """All of them; the workspaces stay open until `close`."""

    def __init__(self, folder: Path):
        self._folder, self._open, self.checks = folder, ExitStack(), []
        small = small_shop()
        self._who_is_due(small)
        self._expectations(small)
        self._alerts(small)
        self._customers(small)
        self._closed()
        self._returns()

    def close(self) -> None:
        self._open.close()

    def of(self, table: str) -> list[Check]:
        return [check for check in self.checks if check.table == table]

    def _space(self, name: str, orders: pd.DataFrame, shut: Sequence[date] = (), **given: Any) -> Workspace:
        space = self._open.enter_context(workspace(lake_with(orders, self._folder / name, **given)))
        if shut:
            close(space, tuple(shut))
        return space

    def _with(self, space: Workspace, shut: Sequence[date] = (), **rules: Any) -> Workspace:
        """The same orders under other settings."""
        other = self._open.enter_context(workspace(Lake(Settings(_env_file=None, home=space.settings.home, **rules))))
        if shut:
            close(other, tuple(shut))
        return other

    def _add(self, name: str, table: str, space: Workspace, first: date, last: date, expected: pd.DataFrame) -> None:
        self.checks.append(Check(name, table, space, first, last, expected))

    def _who_is_due(self, small: pd.DataFrame) -> None:
        lines = on_every_line()
        for name, orders, ranges in (
            ("usual gaps and silences on every line", lines, [(START, max(lines["order_date"]) + timedelta(RECENCIES[-1] + 2))]),
            ("a small shop", small, [(date(2024, 2, 10), date(2024, 3, 1)), (date(2024, 4, 1), date(2024, 4, 1))]),
        ):
            naive, space = Returning(orders, Settings(_env_file=None), None), self._space(f"due {name}", orders)
            for first, last in ranges:
                self._add(name, "due_daily", space, first, last, naive.due_daily(oracle.dates(first, last)))

    def _expectations(self, small: pd.DataFrame) -> None:
        stop = date(2024, 2, 20)
        for name, orders, shut, first, last in (
            ("closed days", small, CLOSED, date(2024, 3, 28), date(2024, 4, 20)),
            ("the first days", small, (), date(2023, 10, 20), date(2023, 11, 20)),
            ("a shop that stopped", small[[day < stop for day in small["order_date"]]], (), date(2024, 3, 10), date(2024, 4, 12)),
        ):
            space = self._space(f"expectations {name}", orders, shut)
            space.run(fast_query("due_daily"), from_date=first - timedelta(DUE_DAYS), to_date=last)
            naive = Returning(orders, space.settings, None, shut)
            self._add(name, "return_expectations", space, first, last, naive.return_expectations(first, last))

    def _alert(self, name: str, space: Workspace, naive: Returning, first: date, last: date, share: int | None = None) -> None:
        """`share`: expectations that are this in every cell."""
        space.run(fast_query("due_daily"), from_date=first - timedelta(DUE_DAYS), to_date=last)
        if share is None:
            space.run(query("return_expectations"), from_date=first, to_date=last)
        else:
            values = ", ".join(f"({rhythm}, {recency})" for rhythm, recency in ALL_CELLS)
            space.connection.execute(
                "CREATE TEMP TABLE return_expectations AS SELECT CAST(day AS DATE) AS known_day, rhythm, recency, weekday, "
                f"CAST({share} AS BIGINT) AS chance, CAST(1 AS DOUBLE) AS level FROM (VALUES {values}) AS cells(rhythm, recency), "
                f"range(7) AS weekdays(weekday), range(DATE '{first}' - 22, DATE '{last}', INTERVAL 1 DAY) AS days(day)")
        self._add(name, "returning_customers", space, first, last, naive.frame(oracle.dates(first, last)))

    def _alerts(self, small: pd.DataFrame) -> None:
        days, complete = every_date(small), date(2024, 5, 20)
        space = self._space("alerts", small, CLOSED, complete_through=complete, min_due=8, shortfall_warning=1.0, shortfall_critical=1.5)
        naive = Returning(small, space.settings, complete, CLOSED)
        self._alert("a small shop", space, naive, days[0], days[-1])
        ungated = [row for row in naive.frame(days).to_dict("records") if row["gate"] is None]
        exact = sorted({round(row["score"], 9) for row in ungated if row["score"] > 0})
        for place, (warning, critical) in enumerate(((exact[len(exact) // 2], exact[-2]), (exact[-5], exact[-1]), (exact[3], exact[-3]))):
            rules = {"min_due": 8, "shortfall_warning": warning, "shortfall_critical": critical}
            other = self._with(space, CLOSED, **rules)
            self._alert(f"a score of exactly a threshold, {place}", other, Returning(small, other.settings, complete, CLOSED),
                        date(2024, 1, 20), complete)
        least = map(naive.lasting, oracle.dates(date(2024, 2, 14), date(2024, 4, 20)))
        lasting = {round(1.5 * each, 9) for each in least if each is not None and each > 0}
        for place, (warning, critical) in enumerate(zip(sorted(lasting)[::4], sorted(lasting)[2::4], strict=False)):
            other = self._with(space, CLOSED, min_due=8, shortfall_warning=warning, shortfall_critical=critical)
            self._alert(f"two thirds of exactly a threshold on eight days, {place}", other,
                        Returning(small, other.settings, complete, CLOSED), date(2024, 1, 20), complete)
        # expectations that are whole numbers fall on min_due, on what was observed and on four times of it
        for share, min_due, warning in ((125_000_000, 15, 1.0), (125_000_000, 40, 0.4), (62_500_000, 8, 0.5), (250_000_000, 30, 2.5)):
            other = self._with(space, min_due=min_due, shortfall_warning=warning, shortfall_critical=warning + 1)
            assumed = Assuming(share, small, other.settings, complete)
            self._alert(f"a chance of {share}, min_due {min_due}", other, assumed, date(2024, 1, 20), complete, share)
        alone = date(2024, 5, 3)
        partial = half_loaded_shop(alone, alone + timedelta(8), alone + timedelta(9))
        last = alone + timedelta(12)
        for place, more in enumerate(({}, {"min_due": 100}, {"min_due": 121})):
            other = self._space(f"partial {place}", partial, complete_through=last, **more)
            known = Returning(partial, other.settings, last)
            self._alert(f"days that are not whole, {place}", other, known, alone - timedelta(2), last)
            if not place:  # and the day before one exactly on the line
                before = [round(known.worst(alone + timedelta(step))[4], 9) for step in (-1, 8, 9, 10)]
                for warning in sorted({score for score in before if score > 0}):
                    line = self._with(other, shortfall_warning=warning, shortfall_critical=warning + 5)
                    self._alert(f"a day before of exactly {warning}", line, Returning(partial, line.settings, last),
                                alone - timedelta(2), last)
        second = alone + timedelta(9)  # its range knows what the day before it said
        again = self._with(other, shortfall_warning=1.0)
        assert Returning(partial, again.settings, last).falls_short(second - timedelta(1), 1.0)
        self._alert("the second day that is not whole", again, Returning(partial, again.settings, last), second, second)
        # the eve was short by its eight days alone, so that a day that falls out after it is no surprise
        lasted = half_loaded_shop(alone, poor=oracle.dates(alone - timedelta(12), alone - timedelta(1)))
        poor = self._space("lasted", lasted, complete_through=last)
        eve = Returning(lasted, poor.settings, last)
        warning = round(1.5 * eve.lasting(alone - timedelta(1)), 9)
        assert eve.worst(alone - timedelta(1))[4] < warning and eve.alone(alone)
        for place, threshold in enumerate((warning, warning + 1e-9)):
            line = self._with(poor, shortfall_warning=threshold, shortfall_critical=threshold + 9)
            self._alert(f"a day alone after twelve poor ones, {place}", line, Returning(lasted, line.settings, last), alone, alone)
        # 240 are due every day: 30 expected; three days expect exactly min_due, and the day before fell short by exactly these
        exactly = self._with(other, min_due=90, shortfall_warning=0.05, shortfall_critical=1)
        self._alert("min_due in the shortest window", exactly, Assuming(125_000_000, partial, exactly.settings, last),
                    alone - timedelta(2), last, 125_000_000)
        longest = self._with(other, min_due=840, shortfall_warning=0.05, shortfall_critical=1)
        self._alert("min_due in the longest window", longest, Assuming(250_000_000, partial, longest.settings, last),
                    alone - timedelta(2), last, 250_000_000)
        even = half_loaded_shop(every=4)
        space = self._space("even", even, complete_through=last)
        self._alert("exactly as many come as are expected", space, Assuming(250_000_000, even, space.settings, last),
                    alone, last, 250_000_000)

    def _customers(self, small: pd.DataFrame) -> None:
        lines, chances = on_every_line(), fabricated()
        space, naive = self._space("customers on lines", lines), Returning(lines, Settings(_env_file=None), None)
        expect(space, chances)
        for first, last in windows_on_lines(lines)[:80:2]:
            expected = naive.due_customers(first, last, known_on(first - timedelta(1), chances))
            self._add("usual gaps and silences on every line", "due_customers", space, first, last, expected)
        given = some_attributes(small)
        space = self._space("customers", small, CLOSED, customers=given, min_due=8)
        naive = Returning(small, space.settings, max(small["order_date"]), CLOSED)
        d, days = date(2024, 4, 3), 7
        space.build_range("returning_customers", d - timedelta(3), d)
        first = d - timedelta(days - 1)
        due = naive.due_customers(first, d)
        space.run(query("due_customers"), from_date=first, to_date=d)
        self._add("a small shop", "shortfall_slices", space, first, d, naive.shortfall_slices(due, d, given))
        # refunds of the last day and of the day after it among them
        refunded = refunded_shop(small, d, 5)
        back = self._space("refunded customers", refunded, CLOSED, min_due=8)
        back.build_range("returning_customers", d, d)
        naive_of_refunds = Returning(refunded, back.settings, max(small["order_date"]), CLOSED)
        self._add("a small shop with refunds", "due_customers", back, first, d, naive_of_refunds.due_customers(first, d))
        other = self._with(space, CLOSED)
        other.build_range("returning_customers", d, d)
        self._add("a small shop", "due_customers", other, first, d, due)

    def reference(self, rule: Query) -> list[str]:
        """A few customers by GoogleSQL's reference implementation: it does not divide by 0. Only due_customers is asked of it."""
        if rule.table != "due_customers":
            return []
        lines = on_every_line()
        few = lines[[customer in ("one9", "back4") for customer in lines["customer_id"]]].reset_index(drop=True)
        few = pd.concat([few, orders_frame([("single", START, 100, "s1")])], ignore_index=True)
        first, last = START + timedelta(3), START + timedelta(10)
        google = edges.Reference(edges.Case("a few", few, lake_with(few, self._folder / "few"), (first, last)))
        google.run(query("customer_days"))
        google.assume("return_expectations", [])
        expected = Returning(few, Settings(_env_file=None), None).due_customers(first, last, {})
        try:
            return oracle.differences("due_customers", expected, google.run(rule, from_date=first, to_date=last))
        except Exception as error:
            return [str(error)]

    def _returns(self) -> None:
        """On every line of a cell, and of what is looked at; `rates` of a shop that knows a season and of one that does not yet."""
        lines = cells_on_lines()
        space, naive = self._space("cells", lines), Returns(lines, Settings(_env_file=None))
        days = oracle.dates(START, START + timedelta(100))
        space.connection.execute(
            "CREATE TEMP TABLE return_days AS SELECT DATE '2000-01-01' AS as_of_date, 'learn' AS purpose, CAST(day AS DATE) AS window_date "
            f"FROM range(DATE '{days[0]}' - 5, DATE '{days[-1]}' + 5, INTERVAL 1 DAY) AS days(day)")
        for first, last in ((days[0], days[-1]), (days[40], days[40])):
            self._add("cells on every line", "return_windows", space, first, last, naive.return_windows(oracle.dates(first, last)))
        space.run(query("base_customers"), reference_date=days[0])
        space.run(query("retention_snapshot"), reference_date=days[0])
        rates = EachCellItsOwn(lines, space.settings)
        # a learned model, where there is one, tells of one customer on that day and of another one on the day before
        told, later = sorted(set(lines["customer_id"]))[:2]
        model = f"(DATE '{days[0]}', '{told}', 0.123456), (DATE '{days[0]}' - 1, '{later}', 0.654321)"
        for rules, learned in (({}, {}), ({"membership": "at_stake", "at_stake_size": 10_000}, {}),
                               ({"membership": "at_stake", "at_stake_size": 50}, {}), ({"membership": "at_stake"}, {}),
                               ({"membership": "at_stake", "at_stake_size": 10_000}, {told: 123456})):
            other = self._with(space, **rules)
            values = ", ".join(f"(DATE '{days[0]}', {', '.join(map(str, cell))}, {of_million} / 1000000)"
                               for cell, of_million in rates.stay_away(days[0]).items())
            other.connection.execute(
                "CREATE TEMP TABLE return_rates AS SELECT as_of_date, visits, recency, lateness, CAST(p AS DOUBLE) AS p_no_return_90d "
                f"FROM (VALUES {values}) AS cells(as_of_date, visits, recency, lateness, p)")
            if learned:
                other.replace("TABLE", "learned_chances", "SELECT CAST(as_of_date AS DATE) AS as_of_date, customer_id, "
                              f"CAST(p AS DOUBLE) AS p_no_return_90d FROM (VALUES {model}) AS known(as_of_date, customer_id, p)")
            other.use("churn_detection", days[0])
            expected = oracle.customer_priority(lines, days[0], other.settings, rates, learned)
            self._add(f"cells on every line, {rules}, learned {learned}", "customer_priority", other, days[0], days[0], expected)
        seasons = seasonal_shop()
        space, naive = self._space("seasons", seasons), Returns(seasons, Settings(_env_file=None))
        assert naive.first is not None
        for back in (409 + 30, 409 + 29, 90 + 30, 90 + 29, 500):
            d = naive.first + timedelta(back)
            other = self._with(space)
            other.build("return_rates", d)
            self._add(f"{back} days after the first order", "return_days", other, d, d, naive.return_days(d, d))
            self._add(f"{back} days after the first order", "return_rates", other, d, d, naive.return_rates(d, d))

    def _closed(self) -> None:
        opened = date(2024, 1, 8)
        orders = orders_frame([*(("a", opened, 100) for _ in range(10)), ("a", opened + timedelta(9), 100)])
        entries = [CalendarDay(opened + timedelta(7), "a week after the first order", "public holiday")]
        space = self._space("closed after a week", orders, holiday_country="GB")
        space._show_calendar(entries)
        first, last = opened, opened + timedelta(9)
        known = test_closures.naive(orders, entries, first, last)
        assert known
        self._add("compared with the first day alone", "closed_days", space, first, last,
                  pd.DataFrame([*known.items()], columns=["closed_date", "reason"], dtype=object))
        for seed in range(12):
            orders, entries = test_closures.random_shop(seed)
            space = self._space(f"closed {seed}", orders, holiday_country="GB")
            space._show_calendar(entries)
            start, end = orders["order_date"].min(), orders["order_date"].max()
            for first, last in ((start + timedelta(20), end + timedelta(5)), *((entry.day, entry.day) for entry in entries[:3])):
                known = test_closures.naive(orders, entries, first, last)
                self._add(f"shop {seed}", "closed_days", space, first, last,
                          pd.DataFrame([*known.items()], columns=["closed_date", "reason"], dtype=object))
