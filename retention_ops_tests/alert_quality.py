"""What the alarms are worth on two real years: outages are injected, and every rule is asked when it hears them.

    python -m retention_ops_tests.alert_quality --data ../shared/data > table.md

Thresholds of the comparison rules are the lowest that give at most two episodes outside known holidays in the year tuned on (2010);
ours are the settings. Both years are reported, each with dates and seeds that no choice was made on.
The beginning of `retention-ops backtest`; the holidays are listed here until a calendar knows them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np

from retention_ops.detect.compute import Workspace, workspace
from retention_ops.settings import Settings
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.render import query
from retention_ops_tests.oracle import dates

FIRST, LAST = date(2009, 12, 1), date(2011, 12, 9)
YEARS = {"2010": (date(2010, 3, 10), date(2010, 12, 31)), "2011": (date(2011, 1, 1), LAST)}
STARTS = {"2010": (date(2010, 3, 10), date(2010, 12, 1)), "2011": (date(2011, 1, 14), date(2011, 11, 24))}
BANK_HOLIDAYS = ((2010, 5, 3), (2010, 5, 31), (2010, 8, 30), (2011, 4, 29), (2011, 5, 2), (2011, 5, 30), (2011, 8, 29))
CLOSED = sorted({
    *(date(*day) for day in BANK_HOLIDAYS),
    *dates(date(2009, 12, 24), date(2010, 1, 3)), *dates(date(2010, 12, 24), date(2011, 1, 3)),
    *dates(date(2010, 4, 2), date(2010, 4, 5)), *dates(date(2011, 4, 22), date(2011, 4, 25)),
})
FOLLOWED = 22
BUDGET = 2
SHARES = (30, 50, 70, 100)
DAYS = dates(FIRST, LAST)
INDEX = {day: place for place, day in enumerate(DAYS)}
Series = np.ndarray
"""a number for each of DAYS"""


@dataclass(frozen=True)
class Rule:
    """A rule as a statistic per day; it rings from `threshold` on."""

    name: str
    threshold: float
    clean: Series


def near_holiday(day: date, window: int = 14) -> bool:
    """A holiday, or the two days around one, lies in the window that ends on `day`."""
    return any(day - timedelta(back) in CLOSED for back in range(-2, window + 2))


def episodes(rings: Series, year: str) -> tuple[int, int, int]:
    """(episodes outside known holidays, episodes near one, days rung); silences of up to 7 days do not end an episode."""
    first, last = YEARS[year]
    found, latest, rung = [0, 0], None, 0
    for day in dates(first, last):
        if rings[INDEX[day]]:
            rung += 1
            if latest is None or (day - latest).days > 7:
                found[near_holiday(day)] += 1
            latest = day
    return found[0], found[1], rung


def lowest_threshold(clean: Series) -> float:
    """The lowest that keeps to the budget in the year tuned on, in steps of 0.05."""
    return next(step / 20 for step in range(1, 1000) if episodes(clean >= step / 20, "2010")[0] <= BUDGET)


# ---------------------------------------------------------------------------------------------- rules on daily orders

def surprises(orders: Series) -> Series:
    """Daily orders below the mean of the same weekday's last 4 open days, in units of their noise; nan on closed days."""
    shut = [day in CLOSED for day in DAYS]
    found = np.full(len(DAYS), np.nan)
    for place in range(60, len(DAYS)):
        before = [past for past in range(place - 7, max(-1, place - 57), -7) if not shut[past]][:4]
        usual = orders[before].mean()
        if not shut[place] and usual >= 5:
            year = np.array([past for past in range(max(7, place - 377), place - 13) if not shut[past] and not shut[past - 7]])
            noise = max(1.0, ((orders[year] - orders[year - 7]) ** 2).sum() / max((orders[year] + orders[year - 7]).sum(), 1))
            found[place] = (usual - orders[place]) / np.sqrt(1.25 * noise * usual)
    return found


def ewma(values: Series, weight: float = 0.3) -> Series:
    found, state = np.zeros(len(values)), 0.0
    for place, value in enumerate(values):
        state = state if np.isnan(value) else (1 - weight) * state + weight * value
        found[place] = state
    return found


def cusum(values: Series, slack: float = 0.5) -> Series:
    found, state = np.zeros(len(values)), 0.0
    for place, value in enumerate(values):
        state = state if np.isnan(value) else max(0.0, state + value - slack)
        found[place] = state
    return found


# --------------------------------------------------------------------------------------------------------- the SQL rules

def close(space: Workspace) -> None:
    rows = ", ".join(f"(DATE '{day}', 'holiday')" for day in CLOSED)
    space.connection.execute("DROP VIEW closed_days")
    space.connection.execute(f"CREATE TEMP TABLE closed_days AS SELECT * FROM (VALUES {rows}) AS t(closed_date, reason)")


def scores(space: Workspace, first: date, last: date) -> dict[str, dict[date, float]]:
    """{rule: {day: statistic}}: the score of a shortfall, 1 or 0 of the AT_RISK rule; gated days are 0."""
    space._built.clear()
    space.build_range("returning_customers", first, last)
    ours = space.connection.execute("SELECT alert_date, CASE WHEN gate IS NULL THEN score ELSE 0 END FROM returning_customers").fetchall()
    space.build_range("alert_logic", first, last)
    first_rule = space.connection.execute("SELECT alert_date, CAST(alert_flag AS DOUBLE) FROM alert_logic").fetchall()
    return {"shortfall": dict(ours), "at_risk": dict(first_rule)}


def daily_orders(space: Workspace) -> Series:
    found = np.zeros(len(DAYS))
    for day, count in space.connection.execute("SELECT order_date, COUNT(*) FROM orders GROUP BY 1").fetchall():
        found[INDEX[day]] = count
    return found


def drop_orders(space: Workspace, start: date, share: int, seed: int) -> None:
    """Drops `share` % of the orders from `start` on, each on its own; leaves out what comes after the days followed."""
    space.connection.execute(f"""
        CREATE OR REPLACE TEMP VIEW orders AS FROM all_orders
        WHERE order_date < DATE '{start}' OR order_date < DATE '{start + timedelta(FOLLOWED)}'
          AND hash(order_id || '{seed}') % 100 >= {share}""")
    space.run(query("customer_days"))


# --------------------------------------------------------------------------------------------------------- ideal observer

def ideal(orders: Series, year: str, share: int, rounds: int = 2000, seed: int = 6) -> np.ndarray:
    """Delays of an observer who knows the true mean of every day, and how large an outage to listen for.

    The mean is taken from the data, both sides of the day: weekday x the mean of the 5 weeks around it; the noise is what is left, as
    a gamma-Poisson count of that overdispersion, independent between days; the test is the CUSUM of the likelihood ratio.
    """
    rng = np.random.default_rng(seed)
    shut = np.array([day in CLOSED for day in DAYS])
    weekday = np.array([day.weekday() for day in DAYS])
    level = np.array([orders[max(0, p - 17):p + 18][~shut[max(0, p - 17):p + 18]].mean() for p in range(len(DAYS))])
    mean = np.zeros(len(DAYS))
    for day in range(7):
        alike = (weekday == day) & ~shut
        mean[alike] = level[alike] * (orders[alike].sum() / level[alike].sum())
    told = (mean > 1) & (np.arange(len(DAYS)) > 98)
    noise = max(1.01, ((orders - mean)[told] ** 2 / mean[told]).mean())

    def run(means: np.ndarray, left: float | np.ndarray) -> np.ndarray:
        rate = left * means
        counts = rng.poisson(rng.gamma(np.maximum(rate, 1e-9) / (noise - 1), noise - 1))
        gain = (share / 100 * means + counts * np.log(1 - share / 100)) / noise
        state = np.zeros(gain.shape)
        for day in range(gain.shape[-1]):
            state[..., day] = np.maximum(0, (state[..., day - 1] if day else 0) + gain[..., day])
        return state

    first, last = (INDEX[day] for day in YEARS[year])
    years = run(np.tile(mean[first:last + 1], (200, 1)), 1.0)

    def episodes_a_year(threshold: float) -> float:
        rings = years >= threshold
        return sum((np.diff(np.flatnonzero(row)) > 7).sum() + row.any() for row in rings) / len(rings) * 365 / rings.shape[1]

    threshold = next(step / 10 for step in range(5, 300) if episodes_a_year(step / 10) <= BUDGET)
    starts = rng.choice([p for p in range(*(INDEX[day] for day in STARTS[year])) if not shut[p]], rounds)
    warm = 28
    starts = np.minimum(starts, len(mean) - FOLLOWED)
    windows = np.array([mean[start - warm:start + FOLLOWED] for start in starts])
    left = np.where(np.arange(warm + FOLLOWED) < warm, 1.0, 1 - share / 100)
    state = run(windows, left)
    heard = state[:, warm:] >= threshold
    fresh = state[:, warm - 1] < threshold
    return np.where(heard.any(axis=1), heard.argmax(axis=1) + 1, 99)[fresh]


# ------------------------------------------------------------------------------------------------------------- the table

def starts_of(year: str, count: int, seed: int) -> list[date]:
    """Days on which outages begin: never a closed day nor the two before one."""
    possible = [day for day in dates(*STARTS[year]) if not any(day + timedelta(step) in CLOSED for step in range(3))]
    return [possible[place] for place in np.random.default_rng(seed).choice(len(possible), count, replace=False)]


def delays(space: Workspace, rules: list[Rule], year: str, share: int, count: int, seed: int, clean_orders: Series) -> dict[str, list[int]]:
    """{rule: days until it rings}, 99 where it does not within the days followed; starts at which it rings already are left out."""
    found: dict[str, list[int]] = {rule.name: [] for rule in rules}
    for number, start in enumerate(starts_of(year, count, seed)):
        drop_orders(space, start, share, seed * 1000 + number)
        last = min(LAST, start + timedelta(FOLLOWED - 1))
        by_sql = scores(space, start, last)
        orders = np.where(np.arange(len(DAYS)) < INDEX[start], clean_orders, daily_orders(space))
        unexpected = surprises(orders)
        by_hand = {"EWMA of daily orders": ewma(unexpected), "CUSUM of daily orders": cusum(unexpected)}
        for rule in rules:
            if rule.clean[INDEX[start] - 1] >= rule.threshold:
                continue
            place = INDEX[start]
            values = (by_hand[rule.name][place:INDEX[last] + 1] if rule.name in by_hand
                      else np.array([by_sql["at_risk" if rule.name.startswith("AT_RISK") else "shortfall"][day] or 0.0
                                     for day in dates(start, last)]))
            heard = np.flatnonzero(values >= rule.threshold)
            found[rule.name].append(int(heard[0]) + 1 if len(heard) else 99)
    return found


def cells(values: np.ndarray | list[int]) -> str:
    told = np.array(values)
    middle = np.median(told)
    within: Callable[[int], str] = lambda days: f"{100 * (told <= days).mean():.0f} %"  # noqa: E731
    return f"{within(6)} | {within(10)} | {within(14)} | {'-' if middle > FOLLOWED else f'{middle:g}'} | {len(told)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two Online Retail files")
    parser.add_argument("--outages", type=int, default=60, help="outages per year and share")
    parser.add_argument("--seed", type=int, default=611)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(_env_file=None, home=Path(home), duckdb_threads=1)
        files = [chosen.data / name for name in ("uci_online_retail_II_2009-2010.parquet", "uci_online_retail.parquet")]
        ingest(files, "uci-online-retail", settings)
        with workspace(Lake(settings)) as space:
            report(space, settings, chosen.outages, chosen.seed)


def report(space: Workspace, settings: Settings, count: int, seed: int) -> None:
    close(space)
    space.connection.execute("CREATE TEMP TABLE all_orders AS FROM orders")
    clean = {name: np.array([values[day] or 0.0 for day in DAYS]) for name, values in scores(space, FIRST, LAST).items()}
    orders = daily_orders(space)
    unexpected = surprises(orders)
    by_ewma, by_cusum = ewma(unexpected), cusum(unexpected)
    rules = [
        Rule("AT_RISK % (first rule)", 1.0, clean["at_risk"]),
        Rule("returning customers, WARNING", settings.shortfall_warning, clean["shortfall"]),
        Rule("returning customers, CRITICAL", settings.shortfall_critical, clean["shortfall"]),
        Rule("EWMA of daily orders", lowest_threshold(by_ewma), by_ewma),
        Rule("CUSUM of daily orders", lowest_threshold(by_cusum), by_cusum),
    ]
    print("| rule | threshold | 2010: episodes (+ at holidays), days rung of 297 | 2011: episodes (+ at holidays), days rung of 343 |")
    print("|---|---|---|---|")
    for rule in rules:
        told = [episodes(rule.clean >= rule.threshold, year) for year in YEARS]
        print(f"| {rule.name} | {rule.threshold:g} | " + " | ".join(f"{free} (+{holiday}), {rung}" for free, holiday, rung in told) + " |")
    print("\n| year | orders dropped | rule | within 6 days | 10 days | 14 days | median | outages |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for year in YEARS:
        for share in SHARES:
            found = delays(space, rules, year, share, count, seed + share + int(year), orders)
            for name, values in found.items():
                print(f"| {year} | {share} % | {name} | {cells(values)} |")
            if share < 100:
                returned = np.array([row[1] for row in space.connection.execute(f"""
                    SELECT order_date, COUNT(CASE WHEN first_day < order_date THEN 1 END) FROM (
                      SELECT DISTINCT customer_id, order_date, MIN(order_date) OVER (PARTITION BY customer_id) AS first_day FROM all_orders)
                    RIGHT JOIN (SELECT UNNEST(generate_series(DATE '{FIRST}', DATE '{LAST}', INTERVAL 1 DAY))::DATE AS order_date)
                    USING (order_date) GROUP BY 1 ORDER BY 1""").fetchall()], dtype=float)
                print(f"| {year} | {share} % | ideal observer of returning customers | {cells(ideal(returned, year, share))} |", flush=True)


if __name__ == "__main__":
    main()
