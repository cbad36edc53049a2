"""The naive oracle of return_rates and of what is at stake: customer by customer and day by day, from the rule's sentences.

Rates are rounded where the rule rounds them, so that the rows compare to the last bit.
"""

from __future__ import annotations

from datetime import date, timedelta
from fractions import Fraction
from functools import cache

import pandas as pd

from retention_ops.settings import Settings
from retention_ops_tests.oracle import Facts, _frame, dates, half_up

VISITS = (1, 2, 3, 4, 6, 8, 11, 16, 26)
RECENCIES = (0, 8, 15, 22, 31, 46, 61, 76, 91, 121, 151)
LATENESSES = (0, 50, 75, 100, 150, 200, 300, 500)
BILLION, MILLION = 10**9, 10**6
ADDED = 30
"""customers of the parent that a cell gets"""
Cell = tuple[int, int, int]
"""(visits, recency, lateness)"""
Counts = tuple[int, int, int]
"""(customers, returned within 30 days, within 90)"""
CELLS = [(visits, recency, lateness) for visits in VISITS for recency in RECENCIES for lateness in ((-1,) if visits == 1 else LATENESSES)]


class Returns:
    """One shop's orders; `rates` is what return_rates says of a date."""

    def __init__(self, orders: pd.DataFrame, settings: Settings):
        self.settings = settings
        self.visits: dict[str, list[date]] = {}
        for customer, day in sorted(set(zip(orders["customer_id"], orders["order_date"], strict=True))):
            self.visits.setdefault(customer, []).append(day)
        self.first = min(orders["order_date"], default=None)
        self.window = cache(self.window)
        self.rates = cache(self.rates)

    # -- what is looked at ------------------------------------------------------------------------------------------

    def days(self, d: date) -> list[tuple[str, date]]:
        """(purpose, day) of every day that D looks at."""
        if self.first is None:
            return []
        settled = self.first + timedelta(30)
        learn = [d - timedelta(90 + 28 * step) for step in range(13)]
        around = {
            "season": [d - timedelta(365 + ago) for ago in (-14, -7, 0, 7, 14)],
            "level": [d - timedelta(ago) for ago in (30, 37, 44)],
            "level_year": [d - timedelta(365 + ago) for ago in (30, 37, 44)],
        }
        found = [("learn", day) for day in learn if day >= settled]
        if all(day >= settled for days in around.values() for day in days):
            found += [(purpose, day) for purpose, days in around.items() for day in days]
        return found

    def window(self, day: date) -> dict[Cell, Counts]:
        """Customers of each cell at the end of a day, and how many came back."""
        found: dict[Cell, Counts] = {}
        for visits in self.visits.values():
            before = [visit for visit in visits if visit <= day]
            if before and (day - before[-1]).days <= 2 * self.settings.at_risk_limit:
                after = [(visit - day).days for visit in visits if visit > day]
                cell = cell_of(before, day)
                customers, in_30, in_90 = found.get(cell, (0, 0, 0))
                back = min(after, default=1000)
                found[cell] = customers + 1, in_30 + (back <= 30), in_90 + (back <= 90)
        return found

    # -- what is learned --------------------------------------------------------------------------------------------

    def rates(self, d: date) -> dict[Cell, dict[str, int]] | None:
        """What is learned of each cell, with the number of customers it was learned from; None without anybody to learn from."""
        learned = dict.fromkeys(CELLS, (0, 0, 0))
        for purpose, day in self.days(d):
            if purpose == "learn":
                for cell, counts in self.window(day).items():
                    learned[cell] = _plus(learned[cell], counts)
        everybody = _total(learned.values())
        if not everybody[0]:
            return None
        everyone = [half_up(Fraction(BILLION * everybody[place], everybody[0])) for place in (1, 2)]
        found = {}
        for visits in VISITS:
            same_visits = _shrunk(_total(counts for cell, counts in learned.items() if cell[0] == visits), everyone)
            for recency in RECENCIES:
                alike = [cell for cell in CELLS if cell[:2] == (visits, recency)]
                parent = _shrunk(_total(learned[cell] for cell in alike), same_visits)
                for cell in alike:
                    rate_30, rate_90 = _shrunk(learned[cell], parent)
                    found[cell] = dict(zip(("customers", "returned_30", "returned_90"), learned[cell], strict=True),
                                       parent_rate_90=parent[1], rate_30=rate_30, rate_90=rate_90)
        return found

    def odds(self, d: date, purpose: str) -> float | None:
        """Odds of the customers who came back after the days of a purpose, against the odds by the rates; None of none and of all."""
        place, rate = (2, "rate_90") if purpose == "season" else (1, "rate_30")
        customers, returned, expected = 0, 0, 0
        for kind, day in self.days(d):
            if kind == purpose:
                for cell, counts in self.window(day).items():
                    customers += counts[0]
                    returned += counts[place]
                    expected += counts[0] * self.rates(d)[cell][rate]
        if returned in (0, customers) or expected in (0, BILLION * customers):
            return None
        return (returned / (customers - returned)) / (expected / (BILLION * customers - expected))

    def season(self, d: date) -> tuple[float | None, float | None]:
        """(season_odds, level_odds)"""
        now, year_ago = self.odds(d, "level"), self.odds(d, "level_year")
        return self.odds(d, "season"), None if now is None or year_ago is None else now / year_ago

    def stay_away(self, d: date) -> dict[Cell, int] | None:
        """Of a million customers of each cell, how many stay away for 90 days; None without anybody to learn from."""
        rates = self.rates(d)
        if rates is None:
            return None
        season, level = self.season(d)
        factor = min(4.0, max(0.25, (1.0 if season is None else season) * (1.0 if level is None else level)))
        return {cell: half_up(Fraction(MILLION * ((BILLION - known["rate_90"]) / (BILLION - known["rate_90"] + known["rate_90"] * factor))))
                for cell, known in rates.items()}

    # -- as tables --------------------------------------------------------------------------------------------------

    def return_days(self, first: date, last: date) -> pd.DataFrame:
        return _frame("return_days", [(d, *row) for d in dates(first, last) for row in self.days(d)])

    def return_windows(self, days: list[date]) -> pd.DataFrame:
        return _frame("return_windows", [(day, *cell, *counts) for day in days for cell, counts in sorted(self.window(day).items())])

    def return_rates(self, first: date, last: date) -> pd.DataFrame:
        rows = []
        for d in dates(first, last):
            if rates := self.rates(d):
                season, stay_away = self.season(d), self.stay_away(d)
                rows += [(d, *cell, *known.values(), *season, stay_away[cell] / MILLION) for cell, known in rates.items()]
        return _frame("return_rates", rows)


_ASKED: dict[tuple[int, int], tuple[pd.DataFrame, Returns]] = {}


def returns_of(orders: pd.DataFrame, settings: Settings) -> Returns:
    """The oracle of these very orders: what it counted of a day is not counted again for the next date that looks at it."""
    key = id(orders), settings.at_risk_limit
    if key not in _ASKED:
        if len(_ASKED) == 16:
            del _ASKED[next(iter(_ASKED))]
        _ASKED[key] = orders, Returns(orders, settings)  # as long as the orders are held their id is theirs
    return _ASKED[key][1]


def cell_of(before: list[date], day: date) -> Cell:
    """The cell at the end of `day` of a customer with these shopping days up to it."""
    return cell_at(len(before), (before[-1] - before[0]).days, (day - before[-1]).days)


def cell_at(shopping_days: int, span: int, silence: int) -> Cell:
    """The cell of a silence after so many shopping days over a span."""
    visits = max(start for start in VISITS if start <= shopping_days)
    recency = max(start for start in RECENCIES if start <= silence)
    if shopping_days == 1:
        return visits, recency, -1
    late = 100 * silence / Fraction(span, shopping_days - 1)
    return visits, recency, max(start for start in LATENESSES if start <= late)


def _plus(one: Counts, other: Counts) -> Counts:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _total(counts) -> Counts:
    total = (0, 0, 0)
    for each in counts:
        total = _plus(total, each)
    return total


def _shrunk(counts: Counts, parent: list[int]) -> list[int]:
    """[rate within 30 days, within 90] of a thousand million, with ADDED customers of the parent."""
    return [half_up(Fraction(BILLION * counts[place + 1] + ADDED * parent[place], counts[0] + ADDED)) for place in (0, 1)]


# -- what is at stake ----------------------------------------------------------------------------------------------------

def at_stake(
    facts: Facts, d: date, stay_away: dict[Cell, int] | None, learned: int | None = None,
) -> tuple[int, int | None, int | None, str | None]:
    """(usual spend in cents, stay away of a million, spend at stake in cents, the sentence); None where nothing is known.

    `learned`: what a learned model says of this customer, of a million.
    """
    usual = half_up(Fraction(90 * facts.revenue, max(30, (d - facts.first).days)))
    if stay_away is None and learned is None:
        return usual, None, None, None
    share = learned
    if learned is None:
        share = stay_away[cell_at(facts.order_days, (facts.last - facts.first).days, (d - facts.last).days)]
    stake = half_up(Fraction(usual * share, MILLION))
    tenths = half_up(Fraction(10 * share, MILLION))
    of_ten = {0: "fewer than 1 of 10", 10: "more than 9 of 10"}.get(tenths, f"{tenths} of 10")
    alike = "one-time customers silent this long stayed away" if facts.order_days == 1 else "customers this late stayed away"
    if learned is not None:
        alike = "like this one will stay away, says the learned model"
    return usual, share, stake, (f"{of_ten} {alike}; usually spends {half_up(Fraction(usual, 100))} a quarter: "
                                 f"{half_up(Fraction(stake, 100))} at stake")
