"""Who would have been contacted, and what was lost: the queue against other orders of the same customers, on the shop's own past.

Walk-forward: at each of many dates D the rules of sql/ are asked as production asks them, with the orders up to D alone; what happened
in the next 90 days is looked up afterwards. Candidates are the customers silent for at most 2 x at_risk_days, and

    lost spend = usual_spend_90d of the candidates without an order in the 90 days after D.

What a list covers is the part of it that belongs to customers on the list. That is no lift: whether contact helps only a holdout tells.
"""

from __future__ import annotations

import calendar
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import Any

import duckdb
import numpy as np

from retention_ops.detect.compute import PRIORITY_ORDER, RETURN_DAYS, Workspace, local_workspace
from retention_ops.errors import UsageError
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.render import fast_query, query
from retention_ops.warehouse.versions import OrdersVersion

FOLLOWED = 90
"""days after D in which an order means that a customer came back: those of p_no_return_90d"""
LEARNS_AFTER = 120
"""days after the first order from which return_rates has a window to learn from: 30 of a new shop, 90 of its label"""
EVERY = 14
"""days between two dates where nothing else is asked"""
EVERYBODY = 2**53
"""an at_stake_size that leaves nobody out"""
BINS = 10
RESAMPLES = 10_000
SURE = 0.975
"""share of the resamples in which a setting must be ahead to be advised: its 95 % interval then lies above no difference"""
ENOUGH_DAYS = 365
"""days of labels that a recommendation needs: less than a year has not seen every season"""
CUSTOMER_PARTS = 50
"""parts of the customers, drawn by a hash of their id, each left out once to see how much depends on who they are"""
STABILITY_DATES = 12
"""dates near which the lists of a day are compared with those of the day and of the week before"""
STATUSES = ("ACTIVE", "AT_RISK", "INACTIVE")
GROUPS = {"ACTIVE": (0,), "AT_RISK": (1,), "INACTIVE": (2,), "lapsed": (1, 2)}
"""statuses of each group of candidates reported by itself"""
POLICIES = {
    "random": "random", "rule": "rules' list", "revenue": "total revenue", "rate": "usual spend", "at_stake": "spend at stake",
    "hindsight": "hindsight",
}
"""orders of the candidates that are compared; random is the expectation over all orders"""
QUEUES = (("rules", "score"), ("rules", "spend_at_stake"), ("at_stake", "score"), ("at_stake", "spend_at_stake"))
"""(membership, rank_by): the four queues that the settings can ask for"""
PARTS = {"whole": 1, "half": 2, "quarter": 4}
"""parts of a queue, from its top, by what its length is divided by"""
LISTS = ("at_stake", "score"), ("model", "score")
"""queues whose whole lists are compared: those with most at stake by the table, and by a model"""

Progress = Callable[[str, int, int], None]
Array = np.ndarray


@dataclass(frozen=True)
class Plan:
    """What is measured: D of each date, oldest first; list sizes, or None for those that fit the shop."""

    dates: tuple[date, ...]
    every: str
    sizes: tuple[int, ...] | None
    seed: int

    @property
    def block(self) -> int:
        """Dates in a block of the bootstrap: as many as it takes until the 90 days of two dates share no day."""
        if len(self.dates) < 2:
            return 1
        apart = np.diff([day.toordinal() for day in self.dates]).min()
        return int(-(-FOLLOWED // apart))


# -- what is asked -----------------------------------------------------------------------------------------------------


def planned(
    orders: OrdersVersion, *, first: date | None = None, last: date | None = None, every: str = str(EVERY),
    sizes: Sequence[int] | None = None, seed: int = 0,
) -> Plan:
    """The plan with dates filled in: all of the history that can be measured, counted from `first`, else back from `last`.

    `every` is a number of days, or "month" for the same day of each month. Raises UsageError where dates do not fit the history.
    """
    usable = orders.first_date + timedelta(LEARNS_AFTER), orders.complete_through - timedelta(FOLLOWED)
    if usable[0] > usable[1]:
        raise UsageError(
            f"too little history: return_rates has something to learn from {LEARNS_AFTER} days after the first order, {usable[0]}, and the "
            f"{FOLLOWED} days after a date must be in, so the last one is {usable[1]}; it takes {LEARNS_AFTER + FOLLOWED} days of orders, "
            "and about two years to be of use"
        )
    asked = first or usable[0], last or usable[1]
    if asked[0] < usable[0] or asked[1] > usable[1]:
        raise UsageError(f"--from and --to give {asked[0]} to {asked[1]}; {usable[0]} to {usable[1]} can be measured here (return_rates "
                         f"learns from {LEARNS_AFTER} days after the first order on, and the {FOLLOWED} days after a date must be in)")
    if asked[0] > asked[1]:
        raise UsageError(f"--from {asked[0]} is after --to {asked[1]}")
    if sizes is not None and (not sizes or min(sizes) < 1):
        raise UsageError("--sizes are numbers of customers from 1 on, like 50,100,200")
    found = []
    for step in range((asked[1] - asked[0]).days + 1):
        day = _step(asked[0], every, step) if first else _step(asked[1], every, -step)
        if not asked[0] <= day <= asked[1]:
            break
        found.append(day)
    return Plan(tuple(sorted(found)), every, tuple(sorted(set(sizes))) if sizes else None, seed)


def _step(start: date, every: str, steps: int) -> date:
    """The date so many steps after `start`."""
    if every == "month":
        years, month = divmod(start.year * 12 + start.month - 1 + steps, 12)
        return date(years, month + 1, min(start.day, calendar.monthrange(years, month + 1)[1]))
    if not every.isdecimal() or int(every) < 1:
        raise UsageError(f"--every {every!r} is neither a number of days nor `month`")
    return start + timedelta(steps * int(every))


@dataclass(frozen=True)
class Candidates:
    """The candidates of D, arrays of one length in order of customer_id; money in cents."""

    day: date
    usual: Array
    revenue: Array
    stake: Array
    p: Array
    """p_no_return_90d, 0 to 1"""
    risk: Array
    """churn_risk_score, points"""
    status: Array
    """place in STATUSES"""
    score: Array
    """priority_score of the tier that follows the status, as membership at_stake has it"""
    rule_tier: Array
    """1, 2, 3 of P1, P2, P3; 0: the rules do not list the customer"""
    rule_place: Array
    """place in the rules' queue by score, from 0; meaningless where rule_tier is 0"""
    back_in: Array
    """days from D to the next order; a large number where none is known"""
    part: Array
    """one of CUSTOMER_PARTS, the same on every date"""
    season_odds: float | None
    level_odds: float | None
    customer_id: Array | None = None

    @property
    def stayed_away(self) -> Array:
        return self.back_in > FOLLOWED

    @property
    def lost(self) -> Array:
        """Lost spend in cents."""
        return np.where(self.stayed_away, self.usual, 0)

    @property
    def rule_size(self) -> int:
        return int((self.rule_tier > 0).sum())


Model = Callable[[Candidates], Candidates]
"""gives the candidates of a date with p and stake of its own, learned from what was known on that date"""


class TargetingOrders(Workspace):
    """A workspace that can be asked for the candidates of a date, whatever the settings say of membership."""

    def __init__(self, lake: Lake, connection: duckdb.DuckDBPyConnection, orders: OrdersVersion):
        super().__init__(lake, connection, orders)
        self._chosen: dict[str, Any] = {}

    def parameters(self, rule: Any, dates: dict[str, date]) -> dict[str, Any]:
        known = super().parameters(rule, dates)
        return {**known, **{name: value for name, value in self._chosen.items() if name in known}}

    def build_chances(self, first: date, last: date) -> None:
        """Nothing: what is measured beside a model is the table, whichever is in use."""

    def learn(self, days: Sequence[date]) -> None:
        """Learns return_rates of these days in one pass; until the next call only they may be asked for.

        As build_range("return_rates") does of all days from the first to the last: days nobody asks for look at as many windows again.
        """
        first, last = min(days), max(days)
        dates = {"from_date": first, "to_date": last}
        self.run(query("return_days"), **dates)
        self.connection.execute("DELETE FROM return_days WHERE NOT list_contains(?, as_of_date)", [sorted(set(days))])
        oldest, newest = first - timedelta(days=RETURN_DAYS[0]), last - timedelta(days=RETURN_DAYS[1])
        self.run(fast_query("return_windows"), from_date=oldest, to_date=newest)
        self.run(query("return_rates"), **dates)
        self._built["return_rates"] = (first, last)

    def candidates(self, day: date, *, ids: bool = False) -> Candidates | None:
        """Everybody who could be on a list of `day`; None where return_rates has nothing to learn from."""
        self.use("churn_detection", day)
        self.build_rates(day, day)
        ask = self.connection.execute
        seasons = ask("SELECT DISTINCT season_odds, level_odds FROM return_rates WHERE as_of_date = ?", [day]).fetchall()
        if not seasons:
            return None
        self._queue("rules_queue", day, "customer_id, priority_tier, priority_score, total_revenue", membership="rules")
        # of a query's columns that are not asked for DuckDB computes nothing: the reasons of everybody would be most of the work
        self._queue("everybody", day, "customer_id, retention_status, churn_risk_score, priority_score, total_revenue, usual_spend_90d, "
                                      "p_no_return_90d, spend_at_stake", membership="at_stake", at_stake_size=EVERYBODY)
        found = ask(f"""
            WITH placed AS (
              SELECT customer_id, CAST(substr(priority_tier, 2) AS INTEGER) AS tier, row_number() OVER (ORDER BY {PRIORITY_ORDER}) AS place
              FROM rules_queue
            ),
            later AS (
              SELECT customer_id, next_order_date - DATE '{day}' AS back_in FROM customer_days
              WHERE order_date <= DATE '{day}' AND next_order_date > DATE '{day}'
            )
            SELECT
              {"customer_id," if ids else ""}
              CAST(ROUND(100 * usual_spend_90d) AS BIGINT) AS usual, CAST(ROUND(100 * total_revenue) AS BIGINT) AS revenue,
              CAST(ROUND(100 * spend_at_stake) AS BIGINT) AS stake, p_no_return_90d AS p, CAST(churn_risk_score AS INTEGER) AS risk,
              CAST(list_position({list(STATUSES)}, retention_status) - 1 AS INTEGER) AS status, priority_score AS score,
              COALESCE(tier, 0) AS rule_tier, COALESCE(place, 0) - 1 AS rule_place,
              CAST(COALESCE(back_in, 1000000) AS INTEGER) AS back_in,
              CAST(md5_number_lower(customer_id) % {CUSTOMER_PARTS} AS INTEGER) AS part
            FROM everybody LEFT JOIN placed USING (customer_id) LEFT JOIN later USING (customer_id)
            ORDER BY customer_id""").fetchnumpy()
        columns = {name: np.asarray(values) for name, values in found.items()}
        return Candidates(day=day, **columns, season_odds=seasons[0][0], level_odds=seasons[0][1])

    def _queue(self, table: str, day: date, columns: str, **chosen: Any) -> None:
        """Some columns of customer_priority of `day`, under other settings of membership."""
        self._chosen = chosen
        rule = query("customer_priority")
        dates = {"reference_date": day, "from_date": day, "to_date": day}
        self.replace("TABLE", table, f"SELECT {columns} FROM ({rule.unordered_sql})", self.parameters(rule, dates))
        self._chosen = {}


def targeting_orders(lake: Lake) -> AbstractContextManager[TargetingOrders]:
    """A TargetingOrders on the CURRENT orders. Raises what local_workspace raises."""
    return local_workspace(lake, TargetingOrders)


# -- orders of the candidates --------------------------------------------------------------------------------------------


def order_by(found: Candidates, policy: str) -> Array:
    """Places of the candidates in the order of a policy, first to contact first; ties by revenue, then customer_id."""
    match policy:
        case "rule":
            return queue_of(found, "rules", "score", found.rule_size)
        case "revenue":
            return _by(-found.revenue)
        case "rate":
            return _by(-found.usual, -found.revenue)
        case "at_stake":
            return _by(-found.stake, -found.revenue)
        case "hindsight":
            return _by(-found.lost, -found.revenue)
    raise KeyError(policy)


def queue_of(found: Candidates, membership: str, rank_by: str, size: int) -> Array:
    """Places of the candidates who are in the queue under these settings, in the order in which it is handed out."""
    if membership == "rules":
        on, tier = np.flatnonzero(found.rule_tier), found.rule_tier
        ranks = (found.rule_place[on],)
    else:
        on, tier = order_by(found, "at_stake")[:size], found.status
        on = np.sort(on)
        ranks = (-found.score[on], -found.revenue[on])
    if rank_by == "spend_at_stake":
        ranks = (tier[on], -found.stake[on], *ranks)
    return on[_by(*ranks)]


def _by(*keys: Array) -> Array:
    """The order by the first key, then the next, then the place; smallest first."""
    return np.lexsort((np.arange(len(keys[0])), *reversed(keys)))


def covered(lost: Array, order: Array, sizes: Sequence[int]) -> Array:
    """Share of `lost` within the first so many of `order`, for each size; a list that is shorter covers what all of it covers."""
    so_far = np.concatenate([[0], np.cumsum(lost[order])])
    return so_far[np.minimum(sizes, len(order))] / lost.sum()


# -- calibration and ranks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """Customers told the same chance: `p`, how many they were, how many of them stayed away. Sorted by p, each p once."""

    p: Array
    customers: Array
    stayed: Array


def told(p: Array, stayed: Array) -> Told:
    values, place = np.unique(p, return_inverse=True)
    return Told(values, np.bincount(place, minlength=len(values)), np.bincount(place, stayed, len(values)))


def together(parts: Sequence[Told]) -> Told:
    values, place = np.unique(np.concatenate([part.p for part in parts]), return_inverse=True)
    return Told(values, *(np.bincount(place, np.concatenate([getattr(part, name) for part in parts]), len(values))
                          for name in ("customers", "stayed")))


def bins_of(known: Told) -> Array:
    """The bin of each p, 0 to 9: bins of about as many customers each; customers told the same are never in two.

    A p is in the bin of its middle rank, (customers told less + half of those told the same) of all, in tenths.
    """
    upto = np.cumsum(known.customers)
    return np.minimum(BINS - 1, (BINS * (2 * upto - known.customers) / (2 * upto[-1])).astype(int))


def calibration_error(known: Told) -> float:
    """ECE, 0 to 1: over the bins, the mean of |share that stayed away - mean p|, each by its customers."""
    place = bins_of(known)
    gaps = np.bincount(place, known.stayed, BINS) - np.bincount(place, known.p * known.customers, BINS)
    return float(np.abs(gaps).sum() / known.customers.sum())


def auc(values: Array, stayed: Array) -> float | None:
    """Chance that of one who stayed away and one who did not the former has the higher value, ties half; None without both."""
    known = told(values, stayed)
    others = known.customers - known.stayed
    if not known.stayed.sum() or not others.sum():
        return None
    below = np.cumsum(others) - others
    return float((known.stayed * (below + others / 2)).sum() / (known.stayed.sum() * others.sum()))


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What is kept of a date: its numbers for the report, the told chances, and what lists of each size cover."""

    row: dict[str, Any]
    told: Told
    covered: dict[str, Array]
    """policy -> share of lost spend covered by a list as long as the rules', and by one of each size; random: the expectation"""
    queues: dict[tuple[str, str], tuple[float, ...]]
    """(membership, rank_by) -> share of lost spend covered by the PARTS of the queue"""
    cut: tuple[float, ...]
    """share covered by membership at_stake with an at_stake_size of those PARTS of the rules' list"""
    groups: dict[str, dict[str, float | None]]
    by_part: dict[tuple[str, str, str] | None, Array]
    """(membership, rank_by, part of the queue) -> lost spend in cents covered by it, of each part of the customers; None -> all of it"""


def can_be_measured(found: Candidates | None) -> bool:
    """False where the rules list nobody or nothing was lost: there is nothing to compare."""
    return found is not None and found.rule_size > 0 and found.lost.sum() > 0


def measure(found: Candidates, sizes: Sequence[int]) -> Measured:
    """Everything of one date that can be measured."""
    lost, size = found.lost, found.rule_size
    lengths = [size, *sizes]
    shares = {policy: covered(lost, order_by(found, policy), lengths) for policy in POLICIES if policy != "random"}
    shares["random"] = np.minimum(lengths, len(lost)) / len(lost)
    parts = [-(-size // divided) for divided in PARTS.values()]
    handed_out = {each: queue_of(found, *each, size) for each in QUEUES}
    queues = {each: tuple(covered(lost, order, parts)) for each, order in handed_out.items()}
    by_part: dict[tuple[str, str, str] | None, Array] = {None: np.bincount(found.part, lost, CUSTOMER_PARTS)}
    for each, order in handed_out.items():
        for name, length in zip(PARTS, parts, strict=True):
            by_part[*each, name] = np.bincount(found.part[order[:length]], lost[order[:length]], CUSTOMER_PARTS)
    cut = tuple(covered(lost, order_by(found, "at_stake"), parts))
    known = told(found.p, found.stayed_away)
    row = {
        "date": found.day, "candidates": len(lost), "rule_size": size, "lost_spend": int(lost.sum()) / 100,
        "spend_at_stake": int(found.stake.sum()) / 100, "mean_p": float(found.p.mean()), "stayed_away": float(found.stayed_away.mean()),
        "ece": calibration_error(known), "auc_p": auc(found.p, found.stayed_away), "auc_score": auc(found.risk, found.stayed_away),
        "season_odds": found.season_odds, "level_odds": found.level_odds,
        **{f"covered_{policy}": float(shares[policy][0]) for policy in POLICIES},
    }
    return Measured(row, known, shares, queues, cut, {name: _group(found, statuses) for name, statuses in GROUPS.items()},
                    by_part)


def _group(found: Candidates, statuses: tuple[int, ...]) -> dict[str, float | None]:
    """The same among the candidates of some statuses: what lists as long as the rules' list of them cover of their lost spend."""
    among = np.isin(found.status, statuses)
    lost, size = found.lost[among], int((found.rule_tier[among] > 0).sum())
    stayed, p = found.stayed_away[among], found.p[among]
    row: dict[str, float | None] = {"candidates": len(lost), "rule_size": size, "lost_spend": int(lost.sum()) / 100}
    if len(lost):
        row |= {"mean_p": float(p.mean()), "stayed_away": float(stayed.mean()), "auc_p": auc(p, stayed),
                "auc_score": auc(found.risk[among], stayed)}
    if size and lost.sum():
        by_stake = _by(-found.stake[among], -found.revenue[among])
        row |= {"random": size / len(lost), "rule": float(lost[found.rule_tier[among] > 0].sum() / lost.sum()),
                "at_stake": float(covered(lost, by_stake, [size])[0]), "hindsight": float(covered(lost, _by(-lost), [size])[0])}
    return row


def stays(before: Candidates, now: Candidates) -> dict[str, dict[str, float | None]]:
    """Share of an earlier list that is on the list of `now`, for both kinds of list: of all, and of those who ordered nothing since."""
    gap, shares = (now.day - before.day).days, {}
    for policy in ("rule", "at_stake"):
        first, second = (each.customer_id[order_by(each, policy)[:each.rule_size]] for each in (before, now))
        silent = before.back_in[order_by(before, policy)[:before.rule_size]] > gap
        later = set(second)  # np.isin compares every pair of strings
        still = np.fromiter((customer in later for customer in first), dtype=bool, count=len(first))
        shares[policy] = {"all": _mean(still), "silent": _mean(still[silent])}
    return shares


def _mean(values: Array) -> float | None:
    return float(values.mean()) if len(values) else None


# -- how sure ----------------------------------------------------------------------------------------------------------


def resampled(dates: int, block: int, seed: int, samples: int = RESAMPLES) -> Array | None:
    """Weights of the dates in each resample (samples x dates, rows sum to 1), or None where the dates hold less than two blocks.

    Circular blocks (Politis and Romano 1992): `block` neighbouring dates are drawn together, because what became of the customers of one
    date is mostly what became of those of the next.
    """
    if dates < 2 * block:
        return None
    rng = np.random.default_rng(seed)
    starts = rng.integers(dates, size=(samples, -(-dates // block)))
    drawn = ((starts[:, :, None] + np.arange(block)) % dates).reshape(samples, -1)[:, :dates]
    weights = np.zeros((samples, dates))
    np.add.at(weights, (np.arange(samples)[:, None], drawn), 1 / dates)
    return weights


def interval(weights: Array | None, values: Array) -> dict[str, float | None]:
    """Mean over the dates (nan: a date without the value) and its 95 % percentile interval; None where there are too few dates."""
    known = np.isfinite(values)
    if not known.any():
        return {"mean": None, "low": None, "high": None}
    low = high = None
    if weights is not None:
        low, high = _percentiles(_means(weights, values))
    return {"mean": float(values[known].mean()), "low": low, "high": high}


def _means(weights: Array, values: Array) -> Array:
    """The mean of each resample; nan where it has no date with the value."""
    known = np.isfinite(values)
    of = weights @ known
    return np.divide(weights @ np.where(known, values, 0), of, out=np.full(len(of), np.nan), where=of > 0)


def _percentiles(means: Array) -> tuple[float, float]:
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return float(low), float(high)


def ahead(weights: Array | None, values: Array, others: Array) -> dict[str, float | None]:
    """By how much `values` are ahead of `others` on the same dates, and in which share of the resamples they are (ties half)."""
    gap = values - others
    better = None
    if weights is not None:
        means = np.round(_means(weights, gap), 12)  # of two lists that are the same none is ahead by a rounding error
        better = float((means > 0).mean() + (means == 0).mean() / 2)
    return {**interval(weights, gap), "better": better}


def other_customers(measured: Sequence[Measured], one: tuple[str, str], other: tuple[str, str], part: str) -> dict[str, float | None]:
    """The 95 % interval of how much more queue `one` covers than `other`, had the customers been others: the same kind, drawn anew.

    A jackknife that leaves out one of CUSTOMER_PARTS at a time. A few customers make much of the spend, and they are the same ones on
    every date, so resampling dates says nothing of it. None where the customers are too few to leave any out.
    """
    lost, gap = (np.array([get(each.by_part) for each in measured], dtype=float) for get in (
        lambda sums: sums[None], lambda sums: sums[*one, part] - sums[*other, part]))
    left = lost.sum(axis=1, keepdims=True) - lost
    if not (left > 0).all():
        return {"customers_low": None, "customers_high": None}
    without = ((gap.sum(axis=1, keepdims=True) - gap) / left).mean(axis=0)
    error = np.sqrt((CUSTOMER_PARTS - 1) / CUSTOMER_PARTS * ((without - without.mean()) ** 2).sum())
    middle = (gap.sum(axis=1) / lost.sum(axis=1)).mean()
    return {"customers_low": float(middle - 1.96 * error), "customers_high": float(middle + 1.96 * error)}


# -- the result --------------------------------------------------------------------------------------------------------


def targeting(
    space: TargetingOrders, plan: Plan, progress: Progress = lambda name, done, total: None, model: Model | None = None,
) -> dict[str, Any]:
    """Measures everything; returns plain values: dicts, lists, numbers and dates, as report.json has them.

    Shares are 0 to 1, money in currency units. With a model, `model` of the result says what lists by its chances cover beside those by
    the table's, on the same dates. Raises UsageError where no date can be measured.
    """
    measured, modelled, left_out, sizes = [], [], [], plan.sizes
    compared = compared_days(plan)
    done, total = 0, len(plan.dates) + 3 * len(compared)

    def ask(day: date, ids: bool = False) -> Candidates | None:
        nonlocal done
        progress("dates", done, total)
        done += 1
        return space.candidates(day, ids=ids)

    progress("how customers came back", 0, 1)
    space.learn([*plan.dates, *(day - timedelta(days) for day in compared for days in (0, 1, 7))])
    progress("how customers came back", 1, 1)
    for day in reversed(plan.dates):  # the newest first: its list says which sizes fit the shop as it is now
        now = ask(day)
        if not can_be_measured(now):
            left_out.append(day)
            continue
        sizes = sizes or fitting_sizes(now.rule_size, space.settings.at_stake_size)
        measured.append(measure(now, sizes))
        if model:
            modelled.append(measure(model(now), sizes))
    moved = {"day": [], "week": []}
    for day in compared:
        week_ago, eve, now = (ask(day - timedelta(days), ids=True) for days in (7, 1, 0))
        for name, before in (("day", eve), ("week", week_ago)):
            if before and now and before.rule_size:
                moved[name].append(stays(before, now))
    progress("dates", total, total)
    if not measured:
        raise UsageError(f"nothing to compare on any of {len(plan.dates)} dates from {plan.dates[0]} to {plan.dates[-1]}: the rules list "
                         "nobody, or nobody's spend was lost")
    result = _result(space, plan, measured[::-1], sizes, moved, left_out[::-1])
    if model:
        result["model"] = against_table(plan, measured[::-1], modelled[::-1], sizes)
    return result


def compared_days(plan: Plan) -> list[date]:
    """Days whose lists are compared with earlier ones: near some of the dates, of every weekday, for a shop has its own quiet ones."""
    places = np.linspace(0, len(plan.dates) - 1, min(STABILITY_DATES, len(plan.dates)))
    return sorted({plan.dates[round(place)] - timedelta(number % 7) for number, place in enumerate(places)})


def _result(
    space: TargetingOrders, plan: Plan, measured: list[Measured], sizes: Sequence[int], moved: dict[str, list], left_out: list[date],
) -> dict[str, Any]:
    weights = resampled(len(measured), plan.block, plan.seed)
    rows, settings, orders = [each.row for each in measured], space.settings, space.orders
    queues = {each: [np.array([one.queues[each][place] for one in measured]) for place in range(len(PARTS))] for each in QUEUES}
    return {
        "orders": {"version": orders.version, "orders": orders.orders, "customers": orders.customers, "first_date": orders.first_date,
                   "complete_through": orders.complete_through, "currency": orders.currency},
        "dates": {"from": rows[0]["date"], "to": rows[-1]["date"], "count": len(rows), "every": plan.every, "left_out": left_out,
                  "with_season": sum(_corrected(row) for row in rows), "block": plan.block},
        "seed": plan.seed, "resamples": RESAMPLES if weights is not None else 0, "followed_days": FOLLOWED,
        "settings": {name: getattr(settings, name) for name in ("rank_by", "membership", "at_stake_size", "return_model", "profile")},
        "candidate_days": 2 * settings.at_risk_limit,
        "candidates": float(np.mean([row["candidates"] for row in rows])),
        "rule_size": float(np.mean([row["rule_size"] for row in rows])),
        "lost_spend": float(np.mean([row["lost_spend"] for row in rows])),
        "policies": POLICIES,
        "sizes": [
            {"size": size, "customers": float(size or np.mean([row["rule_size"] for row in rows])),
             "covered": {policy: interval(weights, np.array([each.covered[policy][place] for each in measured])) for policy in POLICIES}}
            for place, size in enumerate((None, *sizes))
        ],
        "against_rule": ahead(weights, _column(rows, "covered_at_stake"), _column(rows, "covered_rule")),
        "queues": [
            {"membership": each[0], "rank_by": each[1],
             **{part: interval(weights, queues[each][place]) for place, part in enumerate(PARTS)}} for each in QUEUES
        ],
        "cut": {part: interval(weights, np.array([each.cut[place] for each in measured])) for place, part in enumerate(PARTS)},
        "calibration": _calibration(weights, measured),
        "auc": {name: interval(weights, _column(rows, column)) for name, column in
                (("p_no_return_90d", "auc_p"), ("churn_risk_score", "auc_score"))},
        "by_date": rows,
        "by_status": {name: _over_dates([each.groups[name] for each in measured]) for name in GROUPS},
        "stability": {name: {policy: {of: _mean(np.array([one[policy][of] for one in found if one[policy][of] is not None]))
                                      for of in ("all", "silent")} for policy in ("rule", "at_stake")}
                      for name, found in moved.items() if found},
        "recommendation": recommend(
            weights, plan, rows, queues, lambda *compared: other_customers(measured, *compared), settings.membership, settings.rank_by),
    }


def against_table(plan: Plan, table: Sequence[Measured], model: Sequence[Measured], sizes: Sequence[int]) -> dict[str, Any]:
    """What a model's chances are worth beside the table's on the same dates: lists of each size, AUC and ECE, each with the difference.

    `beats_table` is True only where a list as long as the rules' covers more, by more than both 95 % intervals, over other dates and over
    other customers, on dates that span a year with their labels: what every other advice asks for. `worse` is the same the other way.
    """
    weights = resampled(len(table), plan.block, plan.seed)
    rows, others = [each.row for each in table], [each.row for each in model]
    both = [replace(one, by_part={**one.by_part, (*LISTS[1], "whole"): other.by_part[*LISTS[0], "whole"]})
            for one, other in zip(table, model, strict=True)]

    def compared(values: Array, of_model: Array) -> dict[str, Any]:
        return {"table": interval(weights, values), "model": interval(weights, of_model), "ahead": ahead(weights, of_model, values)}

    lists = [
        {"size": size, "customers": float(size or np.mean([row["rule_size"] for row in rows])),
         **compared(*(np.array([each.covered["at_stake"][place] for each in measured]) for measured in (table, model)))}
        for place, size in enumerate((None, *sizes))
    ]
    gap = {**lists[0]["ahead"], **other_customers(both, LISTS[1], LISTS[0], "whole")}
    span = (rows[-1]["date"] - rows[0]["date"]).days + FOLLOWED
    enough = weights is not None and span >= ENOUGH_DAYS
    sure = enough and _is_sure(gap)
    return {
        "sizes": lists, "against_table": gap, "enough_history": enough,
        "beats_table": sure and gap["better"] >= SURE, "worse": sure and gap["better"] < SURE,
        "auc": compared(_column(rows, "auc_p"), _column(others, "auc_p")),
        "ece_per_date": compared(_column(rows, "ece"), _column(others, "ece")),
        "calibration": {"table": _calibration(weights, list(table)), "model": _calibration(weights, list(model))},
        "by_date": [
            {"date": row["date"], **{f"{name}_{of}": each[column] for name, column in (
                ("covered", "covered_at_stake"), ("auc", "auc_p"), ("ece", "ece"), ("mean_p", "mean_p"))
                for of, each in (("table", row), ("model", other))}}
            for row, other in zip(rows, others, strict=True)
        ],
    }


def _corrected(row: dict[str, Any]) -> bool:
    """Whether the season of the date was known."""
    return row["season_odds"] is not None and row["level_odds"] is not None


def fitting_sizes(rule_size: int, asked: int = 0) -> tuple[int, ...]:
    """Round list sizes (1, 2, 5, 10, 20, ...) around the rules' size: the nearest, three below it, one above; with the size set, if any."""
    ladder = [digit * 10**power for power in range(12) for digit in (1, 2, 5)]
    near = min(range(len(ladder) - 1), key=lambda place: abs(np.log(ladder[place] / rule_size)))
    return tuple(sorted({*ladder[max(0, near - 3):near + 2], *([asked] if asked else [])}))


def _column(rows: list[dict[str, Any]], name: str) -> Array:
    return np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=float)


def _over_dates(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The mean of each number over the dates that have it."""
    names = {name: None for row in rows for name in row}
    return {name: _mean(np.array([row[name] for row in rows if row.get(name) is not None])) for name in names}


def _calibration(weights: Array | None, measured: list[Measured]) -> dict[str, Any]:
    """What was told against what happened: of all dates together, and of those whose season was known, or not, by themselves."""
    of_all = np.arange(len(measured))
    with_season = np.array([_corrected(each.row) for each in measured])
    return {
        "all": _reliability(weights, measured, of_all),
        "with_season": _reliability(weights, measured, of_all[with_season]),
        "without_season": _reliability(weights, measured, of_all[~with_season]),
        "ece_per_date": float(np.mean([each.row["ece"] for each in measured])),
    }


def _reliability(weights: Array | None, measured: list[Measured], dates: Array) -> dict[str, Any] | None:
    """ECE and the reliability plot's points of some dates, each point with the interval of its share; None of no date."""
    if not len(dates):
        return None
    everybody = together([measured[number].told for number in dates])
    place = bins_of(everybody)
    customers, stayed = np.zeros((len(measured), BINS)), np.zeros((len(measured), BINS))
    for number in dates:
        each = measured[number].told
        own = place[np.searchsorted(everybody.p, each.p)]
        customers[number], stayed[number] = np.bincount(own, each.customers, BINS), np.bincount(own, each.stayed, BINS)
    summed = np.bincount(place, everybody.p * everybody.customers, BINS)
    bins = []
    for number in np.flatnonzero(customers.sum(axis=0)):
        low = high = None
        if weights is not None:
            of = weights @ customers[:, number]
            low, high = _percentiles(np.divide(weights @ stayed[:, number], of, out=np.full(len(of), np.nan), where=of > 0))
        total = customers[:, number].sum()
        bins.append({"customers": int(total), "mean_p": float(summed[number] / total),
                     "stayed_away": float(stayed[:, number].sum() / total), "low": low, "high": high})
    return {"dates": len(dates), "customers": int(everybody.customers.sum()), "ece": calibration_error(everybody), "bins": bins}


def recommend(
    weights: Array | None, plan: Plan, rows: list[dict[str, Any]], queues: dict[tuple[str, str], list[Array]],
    others: Callable[[tuple[str, str], tuple[str, str], str], dict[str, float | None]], membership_now: str, rank_now: str,
) -> dict[str, Any]:
    """The settings to choose, and how sure they are.

    `membership` is chosen by what the whole list covers, `rank_by` by what its first half covers, for lists of the same length; each only
    where its 95 % intervals against the other, over other dates and over other customers, lie on one side of zero; else the one in force
    stays. `enough_history` is False where the
    labels span less than a year or there are too few dates for an interval: then the settings in force stay.
    """
    span = (rows[-1]["date"] - rows[0]["date"]).days + FOLLOWED
    enough = weights is not None and span >= ENOUGH_DAYS
    whole, half = list(PARTS).index("whole"), list(PARTS).index("half")
    lists = ("at_stake", "score"), ("rules", "score")
    by_stake = {**ahead(weights, *(queues[each][whole] for each in lists)), **others(*lists, "whole")}
    membership = _chosen(by_stake, "at_stake", "rules", membership_now) if enough else membership_now
    lists = (membership, "spend_at_stake"), (membership, "score")
    ranked = {**ahead(weights, *(queues[each][half] for each in lists)), **others(*lists, "half")}
    rank_by = _chosen(ranked, "spend_at_stake", "score", rank_now) if enough else rank_now
    return {
        "membership": membership, "rank_by": rank_by, "membership_at_stake": by_stake, "rank_by_spend_at_stake": ranked,
        "membership_is_sure": enough and _is_sure(by_stake), "rank_by_is_sure": enough and _is_sure(ranked),
        "enough_history": enough, "days": span, "blocks": len(rows) / plan.block,
        "changes": (membership, rank_by) != (membership_now, rank_now),
    }


def _is_sure(told: dict[str, float | None]) -> bool:
    if told["better"] is None or told["customers_low"] is None:
        return False
    return not 1 - SURE < told["better"] < SURE and not told["customers_low"] <= 0 <= told["customers_high"]


def _chosen(told: dict[str, float | None], one: str, other: str, now: str) -> str:
    return (one if told["better"] >= SURE else other) if _is_sure(told) else now
