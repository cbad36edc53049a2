"""The naive oracle: every table as of D, recomputed from raw orders the slow and obvious way.

It is written from the contract, one customer at a time, in integers, Fractions and Decimals. It shares nothing with
sql/ or the fast paths but the catalog's column names, so that an error has to be made twice to stay hidden. Orders are a
DataFrame of order_id, customer_id, order_date (date), order_cents, currency and, where money was paid back, `refunds`: of each
order a list of (refund_date, cents). Every frame returned has dtype object: dates are date, money is exact cents / 100, null is None.

`differences` compares such a frame with what the SQL side returned, column by column and bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import ROUND_HALF_UP, Decimal, localcontext
from fractions import Fraction
from itertools import groupby
from math import floor
from statistics import median
from typing import Any

import pandas as pd

from retention_ops.settings import Settings
from retention_ops.warehouse.catalog import RELATIONS

STATUSES = ("ACTIVE", "AT_RISK", "INACTIVE")
ATTRIBUTES = ("country", "segment", "loyalty_tier", "acquisition_channel", "signup_date")
TIER_BASE = {"P1": 70, "P2": 50, "P3": 30}
BASELINE_DAYS = 7
FIRST_RULE, SECOND_RULE = "retention_status_degradation", "returning_customers_shortfall"
DETAILS = 11
"""last columns of an alert, of which only the second rule has values"""


# ---------------------------------------------------------------------------------------------------------------- facts

@dataclass(frozen=True)
class Facts:
    """What is known of one customer as of D; money in cents, less what was refunded by then."""

    customer_id: str
    first: date
    last: date
    orders: int
    order_days: int
    revenue: int
    last_order: int

    @property
    def average(self) -> Fraction:
        """Average order value, cents."""
        return Fraction(self.revenue, self.orders)

    @property
    def usual_gap(self) -> Fraction | None:
        """Days between shopping days; None with one shopping day."""
        return Fraction((self.last - self.first).days, self.order_days - 1) if self.order_days > 1 else None


def half_up(value: Fraction) -> int:
    """The nearest integer, a half going up."""
    return floor(value + Fraction(1, 2))


def facts_as_of(orders: pd.DataFrame, d: date) -> list[Facts]:
    """Facts of every customer with an order by D, by customer_id."""
    worth = [int(cents) - sum(back for day, back in refunds if day <= d)
             for cents, refunds in zip(orders["order_cents"], refunds_of(orders), strict=True)]
    raw = zip(orders["customer_id"], orders["order_date"], orders["order_id"], worth, strict=True)
    known = sorted(row for row in raw if row[1] <= d)
    return [_facts(customer, list(rows)) for customer, rows in groupby(known, key=lambda row: row[0])]


def refunds_of(orders: pd.DataFrame) -> Sequence[Sequence[tuple[date, int]]]:
    """(refund_date, cents) of each order."""
    return list(orders["refunds"]) if "refunds" in orders else [()] * len(orders)


def _facts(customer_id: str, rows: Sequence[tuple[str, date, str, int]]) -> Facts:
    """`rows` is sorted by order_date, then order_id: the last one is the latest order."""
    days = [day for _, day, _, _ in rows]
    cents = [amount for _, _, _, amount in rows]
    return Facts(customer_id, days[0], days[-1], len(rows), len(set(days)), sum(cents), cents[-1])


# ----------------------------------------------------------------------------------------------------- rules of a customer

def days_since(facts: Facts, d: date) -> int:
    return (d - facts.last).days


def status_after(days: int, settings: Settings) -> str:
    """ACTIVE, AT_RISK or INACTIVE, `days` after the last order."""
    if days <= settings.active_limit:
        return "ACTIVE"
    return "AT_RISK" if days <= settings.at_risk_limit else "INACTIVE"


@dataclass(frozen=True)
class Risk:
    """The three signals and what follows from them."""

    late: bool
    spends_less: bool
    inconsistent: bool
    score: int
    level: str


def risk_of(facts: Facts, d: date, settings: Settings) -> Risk:
    days = days_since(facts, d)
    gap = facts.usual_gap
    late = gap is not None and days > Fraction(settings.frequency_drop_pct, 100) * gap
    spends_less = facts.last_order < Fraction(settings.value_drop_pct, 100) * facts.average
    past_gap = gap is not None and days > Fraction(settings.inconsistent_gap_pct, 100) * gap
    few = facts.orders <= settings.few_orders
    inconsistent = status_after(days, settings) == "ACTIVE" and (few or past_gap)
    score = (late * settings.frequency_drop_score + spends_less * settings.value_drop_score
             + inconsistent * settings.inconsistent_score)
    return Risk(late, spends_less, inconsistent, score, risk_level(score, settings))


def risk_level(score: int, settings: Settings) -> str:
    if score >= settings.high_risk_score:
        return "HIGH"
    return "MEDIUM" if score >= settings.medium_risk_score else "LOW"


def tier_of(status: str, level: str, days: int, settings: Settings, *, rich_enough: bool = True) -> str | None:
    """P1 prevention, P2 intervention, P3 win-back or None."""
    if status == "ACTIVE" and level == "HIGH" and rich_enough:
        return "P1"
    if status == "AT_RISK" and level in ("HIGH", "MEDIUM"):
        return "P2"
    if status == "INACTIVE" and level == "HIGH" and days <= 2 * settings.at_risk_limit:
        return "P3"
    return None


def priority_score(tier: str, revenue_cents: int, days: int, settings: Settings) -> float:
    """Tier base + value + urgency, at most 100, 4 decimals half up; computed with 50 digits."""
    active, at_risk = settings.active_limit, settings.at_risk_limit
    gone, window = {"P1": (days, active), "P2": (days - active, at_risk - active), "P3": (days - at_risk, at_risk)}[tier]
    with localcontext() as context:
        context.prec = 50
        value = min(Decimal(20), 2 * (1 + Decimal(revenue_cents) / 100).ln())
        score = min(Decimal(100), TIER_BASE[tier] + value + Decimal(10 * gone) / Decimal(window))
        return float(score.quantize(Decimal("0.0001"), ROUND_HALF_UP))


def action_for(tier: str, revenue_cents: int, settings: Settings) -> str:
    if tier == "P2":
        return settings.action_p2
    if tier == "P3":
        return settings.action_p3
    if revenue_cents > settings.vip_revenue * 100:
        return settings.action_p1_vip
    return settings.action_p1_personal if revenue_cents >= settings.personal_revenue * 100 else settings.action_p1_reminder


def reason_for(facts: Facts, days: int, risk: Risk, settings: Settings) -> str:
    """Why, in the customer's own numbers; no final full stop."""
    parts = []
    if risk.late:
        gap = half_up(facts.usual_gap)
        parts.append(f"no order for {_counted(days, 'day')}, usually every {'day' if gap <= 1 else gap}")
    if risk.spends_less:
        parts.append(f"last order {half_up(100 - 100 * facts.last_order / facts.average)} % below average")
    if risk.inconsistent and facts.orders <= settings.few_orders:
        parts.append(f"only {_counted(facts.orders, 'order')} so far")
    elif risk.inconsistent and not risk.late:
        parts.append(f"{_counted(days, 'day')} since the last order, "
                     f"past {settings.inconsistent_gap_pct} % of the usual {half_up(facts.usual_gap)}")
    reason = "; ".join(parts)
    return reason[:1].upper() + reason[1:]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# ------------------------------------------------------------------------------------------------------ customer tables

def base_customers(orders: pd.DataFrame, d: date, settings: Settings, customers: pd.DataFrame | None = None) -> pd.DataFrame:
    """SQL1: facts per customer as of D, with attributes where `customers` has them."""
    attributes = _attributes(customers)
    nothing = (None,) * len(ATTRIBUTES)
    rows = [(*_fact_values(facts, d), *attributes.get(facts.customer_id, nothing)) for facts in facts_as_of(orders, d)]
    return _frame("base_customers", rows)


def _attributes(customers: pd.DataFrame | None) -> dict[str, tuple]:
    """customer_id -> attributes; empty without customers."""
    if customers is None:
        return {}
    known = customers.reindex(columns=["customer_id", *ATTRIBUTES]).itertuples(index=False)
    return {row[0]: tuple(plain(value) for value in row[1:]) for row in known}


def retention_snapshot(orders: pd.DataFrame, d: date, settings: Settings) -> pd.DataFrame:
    """SQL2: retention status per customer as of D."""
    rows = [(*_fact_values(facts, d), *_status_values(facts, d, settings)) for facts in facts_as_of(orders, d)]
    return _frame("retention_snapshot", rows)


def churn_detection(orders: pd.DataFrame, d: date, settings: Settings) -> pd.DataFrame:
    """SQL3: explainable churn risk per customer as of D."""
    rows = [(*_fact_values(facts, d), *_status_values(facts, d, settings), *_churn_values(facts, d, settings))
            for facts in facts_as_of(orders, d)]
    return _frame("churn_detection", rows)


def _fact_values(facts: Facts, d: date) -> tuple:
    return (d, facts.customer_id, facts.first, facts.last, facts.orders, facts.order_days, facts.revenue, facts.last_order,
            facts.revenue / 100, half_up(facts.average) / 100, facts.last_order / 100)


def _status_values(facts: Facts, d: date, settings: Settings) -> tuple[int, str]:
    days = days_since(facts, d)
    return days, status_after(days, settings)


def _churn_values(facts: Facts, d: date, settings: Settings) -> tuple:
    risk = risk_of(facts, d, settings)
    gap = None if facts.usual_gap is None else float(facts.usual_gap)
    return gap, risk.late, risk.spends_less, risk.inconsistent, risk.score, risk.level


def customer_priority(
    orders: pd.DataFrame, d: date, settings: Settings, returns: Any = None, learned: dict[str, int] | None = None,
) -> pd.DataFrame:
    """Who to contact first on D, in the order of `rank_by`. No created_at. `returns`: an oracle_returns.Returns of these orders.
    `learned`: customer_id -> chance of a million to stay away, of those a learned model told of."""
    from retention_ops_tests.oracle_returns import at_stake, returns_of

    everyone = facts_as_of(orders, d)
    middle = Fraction(median(facts.revenue for facts in everyone)) if everyone else Fraction(0)
    least = middle if settings.p1_min_revenue == "median" else Fraction(0)
    stay_away = (returns or returns_of(orders, settings)).stay_away(d)
    found = []
    for facts in everyone:
        if days_since(facts, d) <= 2 * settings.at_risk_limit:
            tier = _rule_tier(facts, d, settings, least)
            found.append((facts, tier, at_stake(facts, d, stay_away, (learned or {}).get(facts.customer_id))))
    by_rules = [each for each in found if each[1] is not None]
    if settings.membership == "at_stake" and stay_away is not None:
        found.sort(key=lambda each: (-each[2][2], -each[0].revenue, each[0].customer_id))
        chosen = found[: settings.at_stake_size or len(by_rules)]
        tiers = dict(zip(STATUSES, TIER_BASE, strict=True))
        by_rules = [(facts, tiers[_status_values(facts, d, settings)[1]], stake) for facts, _, stake in chosen]
    rows = [_priority_row(facts, tier, stake, d, settings) for facts, tier, stake in by_rules]
    rows.sort(key=lambda row: (-row[6], -row[9], row[1]))
    if settings.rank_by == "spend_at_stake":
        rows.sort(key=lambda row: (row[5], 0 if row[16] is None else -row[16]))
    return _frame("customer_priority", rows)


def _rule_tier(facts: Facts, d: date, settings: Settings, p1_least_cents: Fraction) -> str | None:
    days, status = _status_values(facts, d, settings)
    return tier_of(status, risk_of(facts, d, settings).level, days, settings, rich_enough=facts.revenue >= p1_least_cents)


def _priority_row(facts: Facts, tier: str, stake: tuple, d: date, settings: Settings) -> tuple:
    days, status = _status_values(facts, d, settings)
    risk = risk_of(facts, d, settings)
    proxy = half_up(Fraction(settings.value_proxy_pct * facts.revenue, 100)) / 100
    usual, stay_away, at_stake, why = stake
    return (d, facts.customer_id, status, risk.level, risk.score, tier, priority_score(tier, facts.revenue, days, settings),
            reason_for(facts, days, risk, settings) or why, days, facts.revenue / 100, facts.orders, half_up(facts.average) / 100,
            action_for(tier, facts.revenue, settings), proxy,
            usual / 100, None if stay_away is None else stay_away / 10**6, None if at_stake is None else at_stake / 100, why)


# ---------------------------------------------------------------------------------------------------------- shop tables

def cohort_retention_evolution(orders: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """SQL4: the full triangle, from every cohort's month to the month of the newest order; uses all orders."""
    months: dict[str, set[int]] = {}
    for customer, day in zip(orders["customer_id"], orders["order_date"], strict=True):
        months.setdefault(customer, set()).add(day.year * 12 + day.month - 1)
    newest = max((max(active) for active in months.values()), default=0)
    rows = []
    for cohort in sorted({min(active) for active in months.values()}):
        members = [active for active in months.values() if min(active) == cohort]
        for month in range(cohort, newest + 1):
            back = sum(month in active for active in members)
            rows.append((date(cohort // 12, cohort % 12 + 1, 1), month - cohort, len(members), back, 100 * back / len(members)))
    return _frame("cohort_retention_evolution", rows)


def retention_daily(orders: pd.DataFrame, d: date, settings: Settings) -> pd.DataFrame:
    """Customers by status as of D; one row for every D, also without customers."""
    counts = status_counts(orders, d, settings)
    total = sum(counts)
    shares = [share(count, total) for count in counts]
    return _frame("retention_daily", [(d, total, *counts, *shares)])


def share(count: int, total: int) -> float | None:
    """100 * count / total, %; None of nothing."""
    return 100 * count / total if total else None


def status_counts(orders: pd.DataFrame, d: date, settings: Settings) -> tuple[int, int, int]:
    """Customers ACTIVE, AT_RISK and INACTIVE as of D."""
    latest: dict[str, date] = {}
    for customer, day in zip(orders["customer_id"], orders["order_date"], strict=True):
        if day <= d:
            latest[customer] = max(day, latest.get(customer, day))
    statuses = [status_after((d - day).days, settings) for day in latest.values()]
    return tuple(statuses.count(status) for status in STATUSES)


def alert_logic(orders: pd.DataFrame, d: date, complete_through: date | None, settings: Settings) -> pd.DataFrame:
    """SQL5: the macro alert as of D. `complete_through` None: nothing is known to be complete."""
    return alert_history(orders, d, d, complete_through, settings)


def alert_history(orders: pd.DataFrame, from_day: date, to_day: date, complete_through: date | None,
                  settings: Settings) -> pd.DataFrame:
    """alert_logic of every date from `from_day` to `to_day`: the rows of its first rule; those of the second: oracle_returning.py."""
    counts = {day: status_counts(orders, day, settings) for day in dates(from_day - timedelta(BASELINE_DAYS), to_day)}
    first = min(orders["order_date"], default=None)
    rows = [_alert_row(day, counts, first, complete_through, settings) for day in dates(from_day, to_day)]
    return _frame("alert_logic", rows)


def _alert_row(d: date, counts: dict[date, tuple[int, int, int]], first: date | None, complete_through: date | None,
               settings: Settings) -> tuple:
    current, *lags = (share(counts[d - timedelta(lag)][1], sum(counts[d - timedelta(lag)])) for lag in range(BASELINE_DAYS + 1))
    sample = sum(counts[d])
    baseline = baseline_of(lags)
    change = None if baseline is None else current - baseline
    relative = relative_change(current, baseline)
    gate = gate_of(d, first, complete_through, baseline, sample, settings)
    severity = severity_of(relative, settings) if gate is None else "INFO"
    return (d, FIRST_RULE, "global", "at_risk_pct", current, baseline, change, relative,
            float(settings.warning_pct), float(settings.critical_pct), severity, severity != "INFO", sample, gate,
            *[None] * DETAILS)


def baseline_of(lags: Sequence[float | None]) -> float | None:
    """Mean of the 7 previous days, lag 1 first; None unless all seven have customers."""
    if None in lags:
        return None
    total = lags[0]
    for lag in lags[1:]:
        total += lag
    return total / BASELINE_DAYS


def relative_change(current: float | None, baseline: float | None) -> float | None:
    """100 * (current - baseline) / baseline, %; None where the baseline is missing or 0."""
    return 100 * (current - baseline) / baseline if baseline else None


def gate_of(d: date, first: date | None, complete_through: date | None, baseline: float | None, sample: int,
            settings: Settings) -> str | None:
    """The first safeguard that holds the alert back."""
    if complete_through is None or d > complete_through:
        return "data_incomplete"
    if first is None or (d - first).days < settings.at_risk_limit + BASELINE_DAYS:
        return "history_warmup"
    if not baseline:
        return "baseline_warmup"
    return "min_sample" if sample < settings.min_sample else None


def severity_of(relative: float, settings: Settings) -> str:
    """INFO, WARNING or CRITICAL of an ungated row; only increases alert."""
    rounded = round(relative, 9)
    if rounded >= settings.critical_pct:
        return "CRITICAL"
    return "WARNING" if rounded >= settings.warning_pct else "INFO"


# ------------------------------------------------------------------------------------------------------------ comparing

def dates(from_day: date, to_day: date) -> list[date]:
    """Every date from `from_day` to `to_day`, both included."""
    return [from_day + timedelta(step) for step in range((to_day - from_day).days + 1)]


def of_rule(rule: str, alerts: pd.DataFrame) -> pd.DataFrame:
    """The rows of one of the two rules of alert_logic."""
    return alerts[[kind == rule for kind in alerts["alert_type"]]].reset_index(drop=True)


def columns_of(table: str) -> list[str]:
    """The catalog's columns that a comparison covers."""
    return [name for name in RELATIONS[table].column_names if name != "created_at"]


def _frame(table: str, rows: Sequence[Sequence[Any]]) -> pd.DataFrame:
    return pd.DataFrame([[*row] for row in rows], columns=columns_of(table), dtype=object)


def plain(value: Any) -> Any:
    """A cell as a plain Python value: numpy unwrapped, NaN, NaT and NA as None, a midnight timestamp as its date."""
    if value is None or value is pd.NA or value is pd.NaT or value != value:
        return None
    if isinstance(value, pd.Timestamp):
        return value.date() if value == value.normalize() else value
    return value.item() if hasattr(value, "item") else value


def plain_rows(frame: pd.DataFrame) -> list[tuple]:
    """The rows as tuples of plain values."""
    return list(zip(*([plain(value) for value in frame[name]] for name in frame.columns), strict=True))


def differences(table: str, expected: pd.DataFrame, actual: pd.DataFrame) -> list[str]:
    """What sets `actual` apart from the oracle's `expected`, in sentences; [] when they are the same rows.

    Columns and their order count, floats to the last bit (priority_score to 4 decimals), types too (True is not 1, 1 is not 1.0).
    Rows are matched by the table's key; the order of customer_priority and of the cohorts counts as well.
    """
    wanted = columns_of(table)
    got = [name for name in actual.columns if name != "created_at"]
    if got != wanted:
        return [f"{table}: columns {got} instead of {wanted}"]
    theirs, ours = _by_key(table, plain_rows(actual[wanted])), _by_key(table, plain_rows(expected))
    if len(theirs) != len(actual):
        return [f"{table}: the key {RELATIONS[table].key} repeats"]
    found = [f"{table} {key}: {'missing' if key in ours else 'not expected'}" for key in sorted(ours.keys() ^ theirs.keys())]
    found += [f"{table} {key}: {name} is {them!r}, not {us!r}" for key in sorted(ours.keys() & theirs.keys(), key=str)
              for name, us, them in zip(wanted, ours[key], theirs[key], strict=True) if not _same(name, us, them)]
    if not found and table in ("customer_priority", "cohort_retention_evolution") and list(ours) != list(theirs):
        return [f"{table}: the rows are in another order"]
    return found


def _by_key(table: str, rows: Iterable[tuple]) -> dict[tuple, tuple]:
    places = [columns_of(table).index(name) for name in RELATIONS[table].key]
    return {tuple(row[place] for place in places): row for row in rows}


def _same(name: str, ours: Any, theirs: Any) -> bool:
    if name == "priority_score" and type(theirs) is float:
        return round(theirs, 4) == round(ours, 4)
    return type(ours) is type(theirs) and ours == theirs
