"""A learned p_no_return_90d: gradient boosting in place of the cells of return_rates, for `backtest targeting --model`, and for the queue
where that found it better (detect/verdict.py).

Walk-forward: for a date D it learns only from days L with L + 90 <= D, of each from the orders up to L, and from what was known by D of
the 90 days after. What it tells is calibrated in two steps. The slope (Platt 1999) is fitted on the newest learning days by a model that
has not seen them; then the level is moved so that the mean is the one the table tells of the same candidates, for the table knows season
and level (06_return_rates.sql) and two winters cannot teach them to trees. So the model says who, the table says how many.

The only module that imports scikit-learn, and only where a model is asked for: the extra `models`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date, timedelta
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from retention_ops.detect.compute import Workspace
from retention_ops.detect.targeting import CUSTOMER_PARTS, FOLLOWED, Array, Candidates
from retention_ops.errors import UsageError
from retention_ops.warehouse.catalog import LEARNED_CHANCES
from retention_ops.warehouse.dialect import no_rows
from retention_ops.warehouse.render import fast_query

LEARNING_DAYS, APART = 13, 28
"""days L learned from, and days between two of them: D-90 and back for most of a year"""
NEW_SHOP = 30
"""first days of a shop that are not learned from: as return_days"""
HELD_OUT = 4
"""a learning day in so many, the newest ones, the slope is fitted on"""
MAX_ROWS = 200_000
"""customers of all learning days at most; of larger shops a part of the customers, drawn by a hash of their id"""
HASHES = 1_000_000
BOOSTING = {
    "learning_rate": 0.05, "max_iter": 100, "max_leaf_nodes": 8, "min_samples_leaf": 100, "l2_regularization": 1.0,
    "early_stopping": False, "random_state": 0,
}
"""small trees: on the 10ths of months of Online Retail 31 leaves and more iterations told less"""
FEATURES = {
    "silence": "day - order_date",
    "visits": "visits",
    "usual_gap": "(order_date - first_order_date) / nullif(visits - 1, 0)",
    "lateness": "(day - order_date) * (visits - 1) / nullif(order_date - first_order_date, 0)",
    "tenure": "day - first_order_date",
    "orders": "orders_so_far",
    "revenue": "revenue_cents_so_far",
    "order_value": "revenue_cents_so_far / orders_so_far",
    "last_order": "last_order_cents * orders_so_far / revenue_cents_so_far",
    "spending": "revenue_cents_so_far / greatest(30, day - first_order_date)",
    "visit_rate": "visits / greatest(30, day - first_order_date)",
    "last_gap": "last_gap",
    "gap_before": "gap_before",
    "three_gaps": "three_gaps",
    "longest_gap": "longest_gap",
    "late_for_longest": "(day - order_date) / longest_gap",
    "late_for_three": "(day - order_date) / three_gaps",
}
"""feature -> SQL of a customer's last shopping day up to `day`; days, cents and ratios, null where a customer has too few visits.

Status and the three signals of churn_detection are steps of silence, lateness and last_order. No date: a season seen once is no season.
Money is as ordered, refunds not taken off: revenue is above 0 then, and what was ordered is known on the day itself.
"""
RISING, FALLING = ("silence", "lateness"), ("visits", "visit_rate")
"""features with which p may only rise, and only fall"""


def require() -> None:
    """Raises UsageError where scikit-learn is not installed."""
    try:
        import sklearn.ensemble  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "the learned model needs scikit-learn, which the plain install leaves out: pip install 'retention-ops[models]'") from error


def learning_days(first_order: date, day: date) -> list[date]:
    """The days that can be learned from on `day`, newest first: the 90 days after each are over."""
    found = [day - timedelta(FOLLOWED + APART * step) for step in range(LEARNING_DAYS)]
    return [each for each in found if (each - first_order).days >= NEW_SHOP]


class ReturnModel:
    """Told the candidates of a date, gives them with p and stake of a model learned for that date; everything else stays.

    The same orders give the same p to the last of 6 decimals, whatever the number of threads. Raises UsageError without scikit-learn.
    """

    def __init__(self, space: Workspace):
        self._space = space
        self._first = space.orders.first_date
        self._silent_for = 2 * space.settings.at_risk_limit
        # every shopping day with the gaps before it: once, since each day from it to the next one reads the same row
        space.connection.execute(f"""
            CREATE OR REPLACE TEMP TABLE model_visits AS
            WITH gaps AS (
              SELECT
                customer_id, order_date, next_order_date, first_order_date, order_days_so_far AS visits, orders_so_far,
                revenue_cents_so_far, last_order_cents, order_date - LAG(order_date) OVER visits_in_order AS last_gap,
                (order_date - LAG(order_date, 3) OVER visits_in_order) / 3 AS three_gaps,
                md5_number_lower(customer_id) // {CUSTOMER_PARTS} % {HASHES} AS hash
              FROM customer_days
              WINDOW visits_in_order AS (PARTITION BY customer_id ORDER BY order_date)
            )
            SELECT *, LAG(last_gap) OVER so_far AS gap_before, MAX(last_gap) OVER so_far AS longest_gap
            FROM gaps
            WINDOW so_far AS (PARTITION BY customer_id ORDER BY order_date ROWS UNBOUNDED PRECEDING)""")

    def __call__(self, found: Candidates) -> Candidates:
        """`found` itself where the days before it teach nothing: all stayed away, or all came back, or there are too few."""
        p = self.chances(found.day)
        if p is None:
            return found
        return replace(found, p=p, stake=(found.usual * np.round(1e6 * p).astype(np.int64) + 500_000) // 1_000_000)

    def chances(self, day: date) -> Array | None:
        """p_no_return_90d, 6 decimals, of everybody silent for not too long on `day`, in order of customer_id; None as above."""
        told = self._told_by_table(day)
        rows, stayed, of_day = self.learned_from(learning_days(self._first, day))
        boosted = _boosted(rows, stayed)
        if boosted is None or told is None:
            return None
        return np.round(at_level(slope_of(rows, stayed, of_day) * boosted.ranks(self.features([day])[0]), told), 6)

    def fill_chances(self, first: date, last: date) -> None:
        """Makes `learned_chances` of each day from `first` to `last` readable; no rows of a day without a model."""
        found = []
        for day in (first + timedelta(step) for step in range((last - first).days + 1)):
            p = self.chances(day)
            if p is not None:
                ids = [who for (who,) in self._asked([day], "customer_id", "TRUE ORDER BY customer_id").fetchall()]
                found.append(pa.table({"as_of_date": pa.array([day] * len(ids), pa.date32()), "customer_id": ids, "p_no_return_90d": p}))
        if found:
            self._space.connection.register("learned_rows", pa.concat_tables(found))
            self._space.replace("TABLE", "learned_chances", "SELECT * FROM learned_rows")
            self._space.connection.unregister("learned_rows")
        else:
            self._space.replace("VIEW", "learned_chances", no_rows(LEARNED_CHANCES))

    def _told_by_table(self, day: date) -> float | None:
        """The mean that return_rates tells of these customers; they are counted into its cells as those of any other day are."""
        space = self._space
        space.replace("TABLE", "return_days", f"SELECT DATE '{day}' AS as_of_date, 'learn' AS purpose, DATE '{day}' AS window_date")
        space.run(fast_query("return_windows"), from_date=day, to_date=day)
        millionths, customers = space.connection.execute(f"""
            SELECT SUM(return_windows.customers * CAST(ROUND(1000000 * p_no_return_90d) AS BIGINT)), SUM(return_windows.customers)
            FROM return_windows JOIN return_rates USING (visits, recency, lateness)
            WHERE return_rates.as_of_date = DATE '{day}'""").fetchall()[0]
        return millionths / customers / 1_000_000 if customers else None

    def learned_from(self, days: Sequence[date]) -> tuple[Array, Array, Array]:
        """Features, whether they stayed away for 90 days, and place in `days`, of the customers silent for not too long on each."""
        share = HASHES
        if customers := self._count(days):
            share = min(HASHES, HASHES * MAX_ROWS // customers)
        return self.features(days, share)

    def features(self, days: Sequence[date], share: int = HASHES) -> tuple[Array, Array, Array]:
        """Likewise of those whose hash is below `share`; in order of the days given and customer_id, as candidates are."""
        found = self._asked(days, ", ".join([*(f"CAST({sql} AS DOUBLE) AS {name}" for name, sql in FEATURES.items()),
                                             f"coalesce(next_order_date - day > {FOLLOWED}, TRUE) AS stayed", "number"]),
                            f"hash < {share} ORDER BY number, customer_id").fetchnumpy()
        columns = [np.ma.filled(np.ma.asarray(found[name], dtype=float), np.nan) for name in FEATURES]
        return np.column_stack(columns), np.asarray(found["stayed"], dtype=bool), np.asarray(found["number"], dtype=int)

    def _count(self, days: Sequence[date]) -> int:
        return self._asked(days, "COUNT(*)", "TRUE").fetchall()[0][0]

    def _asked(self, days: Sequence[date], columns: str, where: str) -> Any:
        """Of each day the last shopping day up to it of every customer not silent for too long."""
        listed = ", ".join(f"({number}, DATE '{day}')" for number, day in enumerate(days)) or "(0, NULL)"
        return self._space.connection.execute(f"""
            SELECT {columns}
            FROM (VALUES {listed}) AS days(number, day)
            JOIN model_visits
              ON order_date BETWEEN day - {self._silent_for} AND day AND (next_order_date IS NULL OR next_order_date > day)
            WHERE {where}""")


class _Boosted:
    """Trees fitted to who stayed away; on one thread, as others wait for each other in a loop and on a busy machine take minutes."""

    def __init__(self, rows: Array, stayed: Array):
        require()
        from sklearn.ensemble import HistGradientBoostingClassifier
        from threadpoolctl import threadpool_limits

        self._one_thread = partial(threadpool_limits, 1)
        directions = [(name in RISING) - (name in FALLING) for name in FEATURES]
        with self._one_thread():
            self._trees = HistGradientBoostingClassifier(**BOOSTING, monotonic_cst=directions).fit(rows, stayed)

    def ranks(self, rows: Array) -> Array:
        """Log odds to stay away, not yet calibrated."""
        with self._one_thread():
            return self._trees.decision_function(rows)


def _boosted(rows: Array, stayed: Array) -> _Boosted | None:
    """None where all did the same."""
    return _Boosted(rows, stayed) if 0 < stayed.sum() < len(stayed) else None


def slope_of(rows: Array, stayed: Array, of_day: Array) -> float:
    """By what the log odds of a model are to be multiplied to be true: told of the newest days by one that learned from the older ones.

    At least 0; 1 where there are no older days.
    """
    newest = of_day < -(-(of_day.max(initial=0) + 1) // HELD_OUT)
    older = _boosted(rows[~newest], stayed[~newest])
    if older is None or not 0 < stayed[newest].sum() < newest.sum():
        return 1.0
    return max(0.0, platt(older.ranks(rows[newest]), stayed[newest])[0])


def platt(ranks: Array, stayed: Array, steps: int = 50) -> tuple[float, float]:
    """(slope, level) of the logistic regression of `stayed` on `ranks`, by Newton's method.

    Sums are numpy's own: those of a linear algebra library differ in the last digits with the number of threads. A customer of each kind
    at the mean rank is added, so that ranks that part the two without error have a slope too.
    """
    x = np.concatenate([ranks, [ranks.mean()] * 2])
    y = np.concatenate([stayed, [0, 1]]).astype(float)
    slope, level = 0.0, 0.0
    for _ in range(steps):
        told = _chance(slope * x + level)
        spread, off = told * (1 - told) + 1e-12, y - told
        curve, cross, flat = (spread * x * x).sum() + 1e-6, (spread * x).sum(), spread.sum() + 1e-6
        by_slope, by_level = (off * x).sum(), off.sum()
        of = curve * flat - cross * cross
        step = (flat * by_slope - cross * by_level) / of, (curve * by_level - cross * by_slope) / of
        slope, level = slope + step[0], level + step[1]
        if max(map(abs, step)) < 1e-10:
            break
    return float(slope), float(level)


def at_level(ranks: Array, mean: float) -> Array:
    """Chances with these log odds, all moved alike so that their mean is `mean` (0 to 1)."""
    low, high = -50.0 - ranks.max(initial=0), 50.0 - ranks.min(initial=0)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _chance(ranks + middle).mean() < mean else (low, middle)
    return _chance(ranks + (low + high) / 2)


def _chance(odds: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(odds, -500, 500)))
