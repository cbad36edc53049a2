"""The naive oracle of returning customers: customer by customer and day by day, from the rule's sentences, not from its SQL.

Shares, factors and expectations are rounded where the rule rounds them, so that the rows compare to the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import date, timedelta
from fractions import Fraction
from functools import cache
from math import sqrt

import pandas as pd

from retention_ops.settings import Settings
from retention_ops_tests.oracle import _frame, columns_of, dates, half_up, refunds_of

GAPS = (10, 20, 35, 60, 100)
RECENCIES = (1, 4, 8, 15, 22, 31, 46, 61, 91, 121, 181, 271)
Cell = tuple[int, int]
"""(rhythm, recency)"""
Chances = dict[Cell, dict[int, int]]
"""cell -> {weekday, Monday 0: returns of a thousand million customers}"""


class Returning:
    """One shop's orders; `row` is what returning_customers says of a date."""

    def __init__(self, orders: pd.DataFrame, settings: Settings, complete_through: date | None, closed: Iterable[date] = ()):
        self.settings, self.complete_through, self.closed = settings, complete_through, frozenset(closed)
        self.visits: dict[str, list[date]] = {}
        for customer, day in sorted(set(zip(orders["customer_id"], orders["order_date"], strict=True))):
            self.visits.setdefault(customer, []).append(day)
        self.amounts: dict[str, list[tuple[date, int]]] = {}
        self.refunds: dict[str, list[tuple[date, int]]] = {}
        for customer, day, cents, refunds in zip(
                orders["customer_id"], orders["order_date"], orders["order_cents"], refunds_of(orders), strict=True):
            self.amounts.setdefault(customer, []).append((day, int(cents)))
            self.refunds.setdefault(customer, []).extend(refunds)
        self.first = min(orders["order_date"], default=None)
        self.counts = cache(self.counts)
        self.came = cache(self.came)
        self.overdispersion = cache(self.overdispersion)
        self.chances = cache(self.chances)
        self.expectations = cache(self.expectations)
        self.worst = cache(self.worst)

    def counts(self, day: date) -> tuple[Counter, Counter]:
        """(due, returned) by cell on a day."""
        due, returned = Counter(), Counter()
        for visits in self.visits.values():
            before = [visit for visit in visits if visit < day]
            if before:
                cell = cell_of(before, day)
                due[cell] += 1
                returned[cell] += day in visits
        return due, +returned

    def open_counts(self, day: date) -> tuple[Counter, Counter]:
        """The same; nobody on a closed day."""
        return (Counter(), Counter()) if day in self.closed else self.counts(day)

    def came(self, day: date) -> int:
        return sum(self.open_counts(day)[1].values())

    def chances(self, known: date) -> tuple[Chances, float] | None:
        """({cell: {weekday: returns of a thousand million customers on such a day}}, level) at the end of `known`; None without a level."""
        days = [known - timedelta(back) for back in range(182)]
        due, returned = Counter(), Counter()
        for day in days:
            due.update(self.open_counts(day)[0])
            returned.update(self.open_counts(day)[1])
        shares = {cell: nearest(1000000000 * (returned[cell] / due[cell])) for cell in due}

        def by_share(some: Iterable[date]) -> float:
            return sum(shares.get(cell, 0) * count for day in some for cell, count in self.open_counts(day)[0].items()) / 1000000000

        factors, usual, recent = {}, 0, 0
        for weekday in range(7):
            alike = [day for day in days if day.weekday() == weekday]
            expected = by_share(alike)
            factors[weekday] = sum(map(self.came, alike)) / expected if expected else 0.0
            usual += nearest(1000 * (by_share(alike[:4]) * factors[weekday]))
            recent += sum(map(self.came, alike[:4]))
        if not usual:
            return None
        level = 1000 * recent / usual
        return {cell: {day: nearest(shares[cell] * (factors[day] * level)) for day in range(7)} for cell in shares}, level

    def expectations(self, known: date) -> tuple[list[int], float] | None:
        """(thousand-millionths of customers expected on each of the 14 days after `known`, level); None without a level."""
        found = self.chances(known)
        if found is None:
            return None
        chances, level = found
        ahead = [known + timedelta(step) for step in range(1, 15)]
        return [sum(chances[cell][day.weekday()] * count for cell, count in self.open_counts(day)[0].items() if cell in chances)
                for day in ahead], level

    def overdispersion(self, d: date) -> float:
        """Squared differences of days a week apart over their sums, 52 weeks up to 14 days before D; at least 1."""
        squares = sums = 0
        for back in range(14, 378):
            day, before = d - timedelta(back), d - timedelta(back + 7)
            if not {day, before} & self.closed:
                squares += (self.came(day) - self.came(before)) ** 2
                sums += self.came(day) + self.came(before)
        return max(1.0, squares / sums) if sums else 1.0

    def worst(self, d: date) -> tuple | None:
        """(days, observed, expected, spread, score, level) of the window that falls short most."""
        windows = []
        for days in range(3, 15):
            known = self.expectations(d - timedelta(days))
            if known is not None:
                expected = sum(known[0][:days]) / 1000000000
                observed = sum(self.came(d - timedelta(back)) for back in range(days))
                spread = sqrt(self.overdispersion(d) * expected)
                windows.append((days, observed, expected, spread, (expected - observed) / spread if spread else None, known[1]))
        telling = [window for window in windows if window[2] >= self.settings.min_due]
        longest = windows[-1] if windows else None
        return max(telling, key=lambda window: (round(window[4], 9), -window[0]), default=longest)

    def lasting(self, d: date) -> float | None:
        """The least score of the eight days up to D; None where too few were due on one of them."""
        eight = [self.worst(d - timedelta(back)) for back in range(8)]
        return min(each[4] for each in eight) if all(each and each[2] >= self.settings.min_due for each in eight) else None

    def lasts(self, d: date, threshold: float) -> bool:
        """On eight days running two thirds of a threshold were reached."""
        least = self.lasting(d)
        return least is not None and round(1.5 * least, 9) >= threshold

    def falls_short(self, d: date, threshold: float) -> bool:
        worst = self.worst(d)
        return bool(worst) and worst[2] >= self.settings.min_due and (round(worst[4], 9) >= threshold or self.lasts(d, threshold))

    def alone(self, d: date) -> bool:
        """Less than a quarter of what was expected of D the evening before."""
        known = self.expectations(d - timedelta(1))
        return known is not None and 4 * self.came(d) < known[0][0] / 1000000000

    def row(self, d: date) -> tuple:
        worst, overdispersion = self.worst(d), self.overdispersion(d)
        gate = self._gate(d, worst[2] if worst else None)
        start = (d, "returning_customers_shortfall", "global", "returning_customers")
        if worst is None:
            return (*start, *[None] * 6, "INFO", False, 0, gate, *[None] * 9, self.alone(d), None)
        days, observed, expected, spread, score, level = worst
        warning, critical = self.settings.shortfall_warning, self.settings.shortfall_critical
        severity = "INFO"
        if gate is None and self.falls_short(d, warning):
            severity = "CRITICAL" if self.falls_short(d, critical) else "WARNING"
        change = 100 * (observed - expected) / expected if expected else None
        sentence = None if change is None else (
            f"{nearest(expected)} customers were due back in {days} days, {observed} came: "
            f"{'+' if observed >= expected else ''}{away_from_zero(change)} %")
        if self.falls_short(d, warning) and round(score, 9) < warning:
            sentence += ", and short for 8 days running"
        warning, critical = (line / 1.5 if self.lasts(d, line) else line for line in (warning, critical))
        return (*start, float(observed), expected, observed - expected, change,
                -100 * warning * spread / expected if expected else None, -100 * critical * spread / expected if expected else None,
                severity, severity != "INFO", nearest(expected), gate, days, observed, expected,
                max(0.0, expected - warning * spread), expected + warning * spread, overdispersion, score, self.lasting(d), level,
                self.alone(d), sentence)

    def _gate(self, d: date, expected: float | None) -> str | None:
        if self.complete_through is None or d > self.complete_through:
            return "data_incomplete"
        if self.first is None or (d - self.first).days < self.settings.at_risk_limit + 7:
            return "history_warmup"
        if not expected:
            return "baseline_warmup"
        if expected < self.settings.min_due:
            return "min_sample"
        warning = self.settings.shortfall_warning
        return "partial_day" if self.falls_short(d, warning) and self.alone(d) and not self.falls_short(d - timedelta(1), warning) else None

    def frame(self, days: Iterable[date]) -> pd.DataFrame:
        return _frame("returning_customers", [self.row(day) for day in days])

    def due_daily(self, days: Iterable[date]) -> pd.DataFrame:
        return _frame("due_daily", [(day, *cell, count, self.counts(day)[1][cell]) for day in days
                                    for cell, count in sorted(self.counts(day)[0].items())])


    def return_expectations(self, first: date, last: date) -> pd.DataFrame:
        """What is known on each date from 22 days before `first` to the day before `last`, of every cell there is."""
        cells = sorted({cell for day in dates(first - timedelta(393), last) for cell in self.counts(day)[0]})
        rows = []
        for known in dates(first - timedelta(22), last - timedelta(1)):
            found, level = self.chances(known) or (None, None)
            # 1970-01-01, the weekday 0 of the rules, was a Thursday
            rows += [(known, *cell, (weekday - 3) % 7, None if found is None else found.get(cell, {}).get(weekday, 0), level)
                     for cell in cells for weekday in range(7)]
        return _frame("return_expectations", rows)

    def due_customers(self, first: date, last: date, chances: Chances | None = None) -> pd.DataFrame:
        """Customer by customer over the days of a window; `chances` in place of those known the evening before it."""
        if chances is None:
            found = self.chances(first - timedelta(1))
            chances = found[0] if found else {}
        rows = [row for customer, visits in self.visits.items()
                if (row := self._due_customer(customer, visits, dates(first, last), chances)) is not None]
        return _frame("due_customers", rows)

    def _due_customer(self, customer: str, visits: list[date], window: list[date], chances: Chances) -> tuple | None:
        """None of one who is due on no open day of the window."""
        chance, returned, rhythms, last = 0, 0, set(), window[-1]
        for day in window:
            before = [visit for visit in visits if visit < day]
            if before and day not in self.closed:
                cell = cell_of(before, day)
                rhythms.add(cell[0])
                chance += chances.get(cell, {}).get(day.weekday(), 0)
                returned += day in visits
        if not rhythms:
            return None
        known = [visit for visit in visits if visit <= last]
        silence, usual = (last - known[-1]).days, None
        if len(known) > 1:
            usual = Fraction((known[-1] - known[0]).days, len(known) - 1)
        cents = [amount for day, amount in self.amounts[customer] if day <= last]
        net = sum(cents) - sum(back for day, back in self.refunds[customer] if day <= last)
        average = net / len(cents)
        return (customer, chance, returned, 0 in rhythms, known[-1], silence, None if usual is None else float(usual), len(cents),
                half_up(Fraction(net, len(cents))) / 100, not returned and usual is not None and silence > usual,
                nearest(chance / 1000000000 * average) / 100)

    def shortfall_slices(self, due: pd.DataFrame, d: date, customers: pd.DataFrame | None = None) -> pd.DataFrame:
        """The rows of `due_customers`, attribute by attribute; `customers` has None where an attribute is not known."""
        noise = self.row(d)[columns_of("returning_customers").index("overdispersion")]
        known = {} if customers is None else {row["customer_id"]: row for row in customers.to_dict("records")}
        slices: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for row in due.to_dict("records"):
            values = {"history": "one shopping day" if row["was_new"] else "several shopping days"}
            for attribute in ("country", "segment", "loyalty_tier", "acquisition_channel"):
                values[attribute] = known.get(row["customer_id"], {}).get(attribute) or "(unknown)"
            for attribute, value in values.items():
                slices.setdefault((attribute, value), []).append((row["chance"], row["returned"]))
        rows = []
        for (attribute, value), members in slices.items():
            expected, observed = sum(chance for chance, _ in members) / 1000000000, sum(returned for _, returned in members)
            score = None if noise is None or not expected else (expected - observed) / sqrt(noise * expected)
            rows.append((attribute, value, len(members), expected, observed, expected - observed, score))
        return _frame("shortfall_slices", rows)


def cell_of(before: list[date], day: date) -> Cell:
    """The cell on `day` of a customer with these visits before it."""
    return rhythm_of(before), max(start for start in RECENCIES if start <= (day - before[-1]).days)


def rhythm_of(visits: list[date]) -> int:
    """0 with one shopping day, else 1 + the number of GAPS that the usual gap reaches."""
    if len(visits) == 1:
        return 0
    usual = Fraction((visits[-1] - visits[0]).days, len(visits) - 1)
    return 1 + sum(usual >= gap for gap in GAPS)


def nearest(value: float) -> int:
    return half_up(Fraction(value))


def away_from_zero(value: float) -> int:
    return nearest(value) if value >= 0 else -nearest(-value)
