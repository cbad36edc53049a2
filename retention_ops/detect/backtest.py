"""What each rule and threshold is worth on the shop's own orders: losses are injected, and every rule is asked when it notices them.

Two periods that share no day: thresholds are chosen by their false alarms in the first, everything is reported on the second.
detect/injections.py makes the losses and asks the rules in sql/; detect/observers.py has the rules they are held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np

from retention_ops.detect.injections import FOLLOWED, KINDS, LATE, NOTHING, OUTAGES, PARTIAL, InjectedOrders, Kind, Loss, by_day
from retention_ops.detect.observers import Ideal, cusum, episode_starts, ewma, ideal_observer, surprises
from retention_ops.errors import UsageError

WITHIN = (6, 10, 14)
YEAR = 365
HOLIDAY_DAYS = 14
"""an episode is one at holidays where a closed day, or one of the two days around it, lies so many days up to its first day"""
ENOUGH_DAYS = 330
"""days a period needs to say how often a year an alarm is false; fewer are reported with a warning"""
MOST_RUNG = 0.25
"""a rule that rings on more of the days than this is no alarm, however few its episodes"""
CRITICAL_BUDGET = 0.25
"""CRITICAL may be false so many times as often as WARNING"""
CRITICAL_STEP = 1.2
"""CRITICAL is at least so many times WARNING: the day between the two is what tells a steep fall from a slow one"""
FALLBACK_STEP = 1.5
RETURNING = "returning"
Progress = Callable[[str, int, int], None]
Series = np.ndarray


@dataclass(frozen=True)
class Rule:
    """A rule as a number per day that rings from a threshold on; `thresholds` are those reported, `unit` what they count."""

    name: str
    label: str
    unit: str
    thresholds: tuple[float, ...]


def _steps(first: float, last: float, step: float) -> tuple[float, ...]:
    return tuple(round(first + step * place, 4) for place in range(round((last - first) / step) + 1))


RULES = (
    Rule("at_risk", "AT_RISK % (first rule)", "% above its 7-day mean", (1, 2, 3, 4, 5, 7, 10, 15, 20, 25)),
    Rule(RETURNING, "returning customers", "times the noise", _steps(2.0, 6.0, 0.2)),
    Rule("ewma", "EWMA of daily orders", "times the noise", _steps(0.3, 2.5, 0.05)),
    Rule("cusum", "CUSUM of daily orders", "times the noise", _steps(1.0, 14.0, 0.2)),
)


@dataclass(frozen=True)
class Period:
    """Days, both included."""

    first: date
    last: date

    @property
    def days(self) -> int:
        return (self.last - self.first).days + 1


@dataclass(frozen=True)
class Plan:
    """What a backtest measures: thresholds by `tune`, everything else on `report`; `outages` injections of each kind."""

    tune: Period
    report: Period
    budget: float
    outages: int
    seed: int


# -- what is asked -----------------------------------------------------------------------------------------------------


def planned(
    space: InjectedOrders, *, tune_from: date | None, tune_to: date | None, first: date | None, last: date | None,
    budget: float, outages: int, seed: int,
) -> Plan:
    """The plan with dates filled in: the history after the warm-up in two halves. Raises UsageError where dates do not fit it."""
    orders = space.orders
    usable = Period(orders.first_date + timedelta(space.settings.at_risk_limit + 7), orders.complete_through)
    if usable.days < 4 * FOLLOWED:
        raise UsageError(
            f"too little history: orders from {orders.first_date} to {orders.complete_through} leave {max(usable.days, 0)} days after the "
            f"warm-up of {space.settings.at_risk_limit + 7}; a backtest needs {4 * FOLLOWED}, and about two years to be of use"
        )
    middle = usable.first + timedelta(usable.days // 2)
    report_first = first or (tune_to + timedelta(1) if tune_to else middle)
    tune = Period(tune_from or usable.first, tune_to or report_first - timedelta(1))
    report = Period(report_first, last or usable.last)
    for name, period in (("--tune-from and --tune-to", tune), ("--from and --to", report)):
        if period.first < usable.first or period.last > usable.last:
            raise UsageError(f"{name} give {period.first} to {period.last}; the rules judge {usable.first} to {usable.last} here "
                             f"(orders from {orders.first_date}, {space.settings.at_risk_limit + 7} days of warm-up)")
        if period.days < 2 * FOLLOWED:
            raise UsageError(f"{name} give {period.first} to {period.last}: {max(period.days, 0)} days; {2 * FOLLOWED} are needed")
    if tune.first <= report.last and report.first <= tune.last:
        raise UsageError(f"the days tuned on ({tune.first} to {tune.last}) and those reported on ({report.first} to {report.last}) overlap")
    return Plan(tune, report, budget, outages, seed)


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealDays:
    """The rules' numbers on the orders as they are, for each day from `first` (the first order) to the last one judged; nan: not judged."""

    first: date
    orders: Series
    is_open: np.ndarray
    near_holiday: np.ndarray
    values: dict[str, Series]
    returning: Series
    """customers with an order on the day and one before it"""

    def place(self, day: date) -> int:
        return (day - self.first).days

    def part(self, name: str, period: Period) -> Series:
        return self.values[name][self.place(period.first):self.place(period.last) + 1]


def real_days(space: InjectedOrders) -> RealDays:
    """Asks every rule for every day of the history."""
    first, last = space.orders.first_date, space.orders.complete_through
    days = (last - first).days + 1
    ask = space.connection.execute
    at_risk, shortfall = space.measured(first, last)  # first: which days count as closed is found out on the way
    closed = {day for (day,) in ask("SELECT closed_date FROM closed_days").fetchall()}
    is_open = np.array([first + timedelta(place) not in closed for place in range(days)])
    near = [any(first + timedelta(place - back) in closed for back in range(-2, HOLIDAY_DAYS + 2)) for place in range(days)]
    orders = by_day(ask("SELECT order_date, COUNT(*) FROM orders WHERE order_date <= ? GROUP BY 1", [last]).fetchall(), first, last, 0.0)
    returning = by_day(ask(
        "SELECT order_date, COUNT(*) FROM customer_days WHERE order_days_so_far > 1 AND order_date <= ? GROUP BY 1", [last],
    ).fetchall(), first, last, 0.0)
    unexpected = surprises(orders, is_open)
    values = {"at_risk": at_risk, RETURNING: shortfall, "ewma": ewma(unexpected), "cusum": cusum(unexpected)}
    return RealDays(first, orders, is_open, np.array(near), {name: np.round(each, 9) for name, each in values.items()}, returning)


@dataclass(frozen=True)
class Heard:
    """What the rules said of the losses of one kind: rows are losses, columns the days asked; nan: not judged."""

    kind: Kind
    starts: list[date]
    eves: dict[str, Series]
    values: dict[str, np.ndarray]


def possible_starts(real: RealDays, period: Period) -> list[date]:
    """Days on which a loss can begin and be followed: not a closed day nor the two before one, when the shop's mind is elsewhere."""
    found = []
    for place in range(real.place(period.first) + 1, real.place(period.last) - FOLLOWED + 2):
        if real.is_open[place:place + 3].all():
            found.append(real.first + timedelta(place))
    return found


def losses(kind: Kind, real: RealDays, plan: Plan) -> Iterator[Loss]:
    """The losses of one kind: other dates and other orders for each kind and each seed."""
    possible = possible_starts(real, plan.report)
    if not possible:
        raise UsageError(f"no open day between {plan.report.first} and {plan.report.last} on which a loss could begin")
    rng = np.random.default_rng([plan.seed, [each.name for each in KINDS].index(kind.name)])
    for place in rng.choice(len(possible), plan.outages, replace=plan.outages > len(possible)):
        yield Loss(kind, possible[place], int(rng.integers(1 << 31)))


def listen(space: InjectedOrders, real: RealDays, kind: Kind, plan: Plan, segments: list[str], tick: Callable[[], None]) -> Heard:
    """Injects the losses of one kind and asks every rule for every day of each."""
    starts, eves, values = [], [], []
    for loss in losses(kind, real, plan):
        start = real.place(loss.start)
        left = space.inject(loss, space.lost_orders(loss, segments))
        at_risk, shortfall = space.measured(loss.start, loss.last)
        orders = np.concatenate([real.orders[:start], left])
        unexpected = surprises(orders, real.is_open[:len(orders)])[start:]
        by_hand = {name: rule(unexpected, real.values[name][start - 1]) for name, rule in (("ewma", ewma), ("cusum", cusum))}
        if not kind.loaded:  # days that are not in yet are judged by nobody
            by_hand = {name: np.full(kind.days, np.nan) for name in by_hand}
        starts.append(loss.start)
        eves.append({name: each[start - 1] for name, each in real.values.items()})
        values.append({"at_risk": at_risk, RETURNING: shortfall, **by_hand})
        tick()
    return Heard(kind, starts, {rule.name: np.array([eve[rule.name] for eve in eves]) for rule in RULES},
                 {rule.name: np.round([value[rule.name] for value in values], 9) for rule in RULES})


def undisturbed(real: RealDays, period: Period) -> Heard:
    """What the rules say from every possible start on when nothing is lost: what of a share noticed is chance."""
    starts = possible_starts(real, period)
    places = [real.place(start) for start in starts]
    return Heard(NOTHING, starts, {name: values[[place - 1 for place in places]] for name, values in real.values.items()},
                 {name: np.array([values[place:place + FOLLOWED] for place in places]) for name, values in real.values.items()})


def delays(heard: Heard, rule: str, threshold: float) -> np.ndarray:
    """Days until the rule rings, 0 where it does not; losses at whose start it rang already on the eve are left out."""
    fresh = ~(heard.eves[rule] >= threshold)
    rings = heard.values[rule][fresh] >= threshold
    return np.where(rings.any(axis=1), rings.argmax(axis=1) + 1, 0)


# -- counting ----------------------------------------------------------------------------------------------------------


def wilson(hits: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927); (0, 1) of nothing."""
    if of == 0:
        return 0.0, 1.0
    z = 1.959964
    share = hits / of
    middle, width = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, (middle - width) / (1 + z * z / of)), min(1.0, (middle + width) / (1 + z * z / of))


def poisson_interval(count: int) -> tuple[float, float]:
    """The exact 90 % interval of the mean of a Poisson count (Garwood 1936)."""
    def mean_at(most: int, probability: float) -> float:
        """The mean at which a count of at most `most` has that probability."""
        low, high = 0.0, count + 20 + 5 * math.sqrt(count + 1)
        for _ in range(80):
            mean = (low + high) / 2
            so_few = sum(math.exp(-mean + place * math.log(mean) - math.lgamma(place + 1)) for place in range(most + 1))
            low, high = (mean, high) if so_few > probability else (low, mean)
        return (low + high) / 2
    return (mean_at(count - 1, 0.95) if count else 0.0), mean_at(count, 0.05)


@dataclass(frozen=True)
class Alarms:
    """Alarms on orders without a loss. Episodes end after observers.CALM_DAYS calm days; `a_year` and its 90 % interval are of those
    outside holidays."""

    episodes: int
    at_holidays: int
    days_rung: int
    a_year: float
    a_year_low: float
    a_year_high: float


def alarms(real: RealDays, rule: str, threshold: float, period: Period) -> Alarms:
    rings = real.part(rule, period) >= threshold
    starts = episode_starts(rings)
    near = real.near_holiday[real.place(period.first):real.place(period.last) + 1]
    free = int((starts & ~near).sum())
    low, high = poisson_interval(free)
    a_year = YEAR / period.days
    return Alarms(free, int((starts & near).sum()), int(rings.sum()), free * a_year, low * a_year, high * a_year)


def episodes_of(real: RealDays, rule: str, threshold: float, period: Period) -> list[dict[str, Any]]:
    """The first day of each episode, and whether it is one at holidays."""
    places = np.flatnonzero(episode_starts(real.part(rule, period) >= threshold)) + real.place(period.first)
    return [{"from": real.first + timedelta(int(place)), "at_holidays": bool(real.near_holiday[place])} for place in places]


def allowed_in(budget: float, period: Period) -> int:
    """False episodes a period may have: an episode is not divided, 2 a year are 2 in 297 days, and in 343."""
    return math.floor(budget * period.days / YEAR + 0.5)


def lowest_within(real: RealDays, rule: Rule, budget: float, period: Period, least: float = 0.0) -> float | None:
    """The lowest threshold from which on every higher one keeps to `budget` false episodes a year; None where not even the highest does.

    Every higher one, and on at most MOST_RUNG of the days, because a low threshold rings for months, and months are few episodes.
    """
    found, allowed = None, allowed_in(budget, period)
    for threshold in sorted(rule.thresholds, reverse=True):
        told = alarms(real, rule.name, threshold, period)
        if threshold < least or told.episodes > allowed or told.days_rung > MOST_RUNG * period.days:
            break
        found = threshold
    return found


def detection(found: np.ndarray, left_out: int) -> dict[str, Any]:
    """Shares noticed within WITHIN days with their intervals, and the median delay (None where most are not noticed)."""
    told = np.where(found == 0, np.inf, found.astype(float))
    middle = float(np.median(told)) if len(told) else math.inf
    shares = {}
    for days in WITHIN:
        hits = int((told <= days).sum())
        low, high = wilson(hits, len(told))
        shares[f"within_{days}"] = {"share": hits / len(told) if len(told) else None, "low": low, "high": high}
    return {"losses": len(told), "left_out": left_out, **shares, "median_delay": middle if math.isfinite(middle) else None}


def pages(heard: Heard, rule: str, threshold: float, days: int) -> dict[str, Any]:
    """How many of the losses made the rule ring within so many days, where it would not have rung on the eve."""
    found = delays(heard, rule, threshold)
    hits = int(((found > 0) & (found <= days)).sum())
    low, high = wilson(hits, len(found))
    return {"losses": len(found), "pages": hits, "share": hits / len(found) if len(found) else None, "low": low, "high": high}


# -- the result --------------------------------------------------------------------------------------------------------


def backtest(space: InjectedOrders, plan: Plan, progress: Progress = lambda name, done, total: None) -> dict[str, Any]:
    """Measures everything; returns plain values: dicts, lists, numbers and dates, as report.json has them."""
    progress("the rules on the orders as they are", 0, 1)
    real = real_days(space)
    space.prepare(plan.report.first, plan.report.last)
    progress("the rules on the orders as they are", 1, 1)
    segments, done, total = space.segments(), 0, len(KINDS) * plan.outages

    def tick() -> None:
        nonlocal done
        done += 1
        progress("injected losses", done, total)

    heard = {kind.name: listen(space, real, kind, plan, segments, tick) for kind in KINDS}
    heard[NOTHING.name] = undisturbed(real, plan.report)
    recommended = recommend(real, plan, space.settings.shortfall_warning, space.settings.shortfall_critical)
    asked = {
        RETURNING: {space.settings.shortfall_warning, space.settings.shortfall_critical, recommended["warning"], recommended["critical"]},
        "at_risk": {space.settings.warning_pct, space.settings.critical_pct},
    }
    rules = []
    for rule in RULES:
        thresholds = sorted({*rule.thresholds, *(asked.get(rule.name, set()) - {None})})
        rules.append({
            "rule": rule.name, "label": rule.label, "unit": rule.unit,
            "chosen": recommended["warning"] if rule.name == RETURNING else lowest_within(real, rule, plan.budget, plan.tune),
            "thresholds": [_at(real, heard, rule.name, threshold, plan) for threshold in thresholds],
        })
    ideal = {share: ideal_observer(
        real.returning, real.is_open, real.place(plan.report.first), real.place(plan.report.last), share, followed=FOLLOWED, seed=plan.seed,
    ) for share in OUTAGES if share < 100}
    orders = space.orders_as_they_are
    return {
        "orders": {"version": orders.version, "orders": orders.orders, "customers": orders.customers,
                   "first_date": orders.first_date, "complete_through": orders.complete_through},
        "tune": _told(plan.tune, real), "report": _told(plan.report, real),
        "closed_days": int((~real.is_open).sum()), "budget": plan.budget, "losses_of_each_kind": plan.outages, "seed": plan.seed,
        "followed_days": FOLLOWED, "segment": "a value of a customer attribute" if segments else "a third of the customers, drawn by id",
        "settings": {name: getattr(space.settings, name)
                     for name in ("shortfall_warning", "shortfall_critical", "warning_pct", "critical_pct")},
        "kinds": {name: each.kind.label for name, each in heard.items()},
        "rules": rules,
        "ideal": {f"outage_{share}": _ideal(each, plan.budget) for share, each in ideal.items() if each},
        "by_day": {
            name: _by_day(each, recommended["warning"] or space.settings.shortfall_warning)
            for name, each in heard.items() if each.kind.days == FOLLOWED
        },
        "recommendation": recommended,
    }


def _told(period: Period, real: RealDays) -> dict[str, Any]:
    near = real.near_holiday[real.place(period.first):real.place(period.last) + 1]
    return {"from": period.first, "to": period.last, "days": period.days, "days_at_holidays": int(near.sum())}


def _at(real: RealDays, heard: dict[str, Heard], rule: str, threshold: float, plan: Plan) -> dict[str, Any]:
    """One threshold of a rule: its alarms in both periods, what it noticed of each kind of loss, how often loading made it page."""
    kinds = {}
    for name, each in heard.items():
        if each.kind.days == FOLLOWED:
            found = delays(each, rule, threshold)
            kinds[name] = detection(found, len(each.starts) - len(found))
    missing = heard[f"outage_{max(OUTAGES)}"]  # its first days are what a load that claims to be whole, but is not, looks like
    loading = {LATE.name: pages(heard[LATE.name], rule, threshold, LATE.days), PARTIAL.name: pages(heard[PARTIAL.name], rule, threshold, 1)}
    loading |= {f"missing_{days}": pages(missing, rule, threshold, days) for days in range(1, LATE.days + 1)}
    return {
        "threshold": threshold, "tune": asdict(alarms(real, rule, threshold, plan.tune)),
        "report": asdict(alarms(real, rule, threshold, plan.report)), "kinds": kinds, "loading": loading,
    }


def _ideal(ideal: Ideal, budget: float) -> dict[str, Any]:
    """The curve, and the threshold that keeps to the budget."""
    within = np.flatnonzero(ideal.episodes_a_year <= budget)
    curve = [{"a_year": float(a_year), **detection(found, 0)} for a_year, found in zip(ideal.episodes_a_year, ideal.delays, strict=True)]
    return {"curve": curve, "at_budget": curve[within[0]] if len(within) else None}


def _by_day(heard: Heard, threshold: float) -> list[float]:
    """Share noticed by the end of day 1, 2, ... of the loss."""
    found = delays(heard, RETURNING, threshold)
    return [float(((found > 0) & (found <= days)).mean()) if len(found) else 0.0 for days in range(1, heard.kind.days + 1)]


def recommend(real: RealDays, plan: Plan, warning_now: float, critical_now: float) -> dict[str, Any]:
    """The thresholds of the returning customers for the budget, by the period tuned on alone, and how sure they are.

    `warning` and `critical` are None where no threshold keeps to the budget. `enough_history` is False below a year after the warm-up:
    then a count of episodes says little, and the settings in force should stay. `within_budget`: so are the days reported; `holds` is False
    where they contradict the choice by more than chance: its 90 % interval lies above the budget. `episodes` are those of `warning` on
    the days reported.
    """
    rule = next(rule for rule in RULES if rule.name == RETURNING)
    warning = lowest_within(real, rule, plan.budget, plan.tune)
    critical, by_budget = None, False
    if warning:
        least = round(CRITICAL_STEP * warning, 4)
        critical = lowest_within(real, rule, CRITICAL_BUDGET * plan.budget, plan.tune, least)
        by_budget = critical is not None
        critical = critical or round(FALLBACK_STEP * warning, 4)
    both = [lowest_within(real, rule, plan.budget, period) for period in (plan.tune, plan.report)]
    told = {name: {period: asdict(alarms(real, RETURNING, threshold, getattr(plan, period))) for period in ("tune", "report")}
            for name, threshold in (("at_warning", warning), ("at_critical", critical)) if threshold}
    holds = warning is not None and told["at_warning"]["report"]["a_year_low"] <= plan.budget
    return {
        "within_budget": warning is not None and told["at_warning"]["report"]["episodes"] <= allowed_in(plan.budget, plan.report),
        "holds": holds, "episodes": episodes_of(real, RETURNING, warning, plan.report) if warning else [],
        "warning": warning, "critical": critical, "critical_by_budget": by_budget, "in_both": max(both) if None not in both else None,
        "changes": (warning, critical) != (warning_now, critical_now),
        "enough_history": plan.tune.days + plan.report.days >= YEAR, "tune_is_short": plan.tune.days < ENOUGH_DAYS, **told,
    }
