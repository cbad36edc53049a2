"""Who else watches the same shop: an EWMA and a CUSUM of its daily orders, and an ideal observer whom nobody can beat.

All work on a Series, one number for each day, and know which days are open. Sources: Roberts 1959 (EWMA), Page 1954 (CUSUM); the
ideal observer is Page's test with the true likelihood ratio (Lorden 1971, Moustakides 1986).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Series = np.ndarray
"""float64, one number for each day"""
Flags = np.ndarray
"""bool, one for each day"""

EWMA_WEIGHT, CUSUM_SLACK = 0.3, 0.5
FEWEST_ORDERS = 5
"""usual orders of a day below which a day says nothing"""
CALM_DAYS = 7
"""so many days without an alarm end an episode"""


def surprises(orders: Series, is_open: Flags) -> Series:
    """Daily orders below the mean of the same weekday's last 4 open days, in units of their noise; nan where that is not known.

    Noise: squared differences of days a week apart over their sums, over the year up to 14 days before, times 1.25 because the mean
    of 4 days is uncertain too.
    """
    days = len(orders)
    usual_sum, usual_days = np.zeros(days), np.zeros(days)
    for weeks in range(1, 9):
        usable = _before(is_open, 7 * weeks, False) & (usual_days < 4)
        usual_sum += np.where(usable, _before(orders, 7 * weeks, 0.0), 0)
        usual_days += usable
    usual = usual_sum / np.maximum(usual_days, 1)
    week_before = _before(orders, 7, 0.0)
    both_open = is_open & _before(is_open, 7, False)
    squares = _year_sum(np.where(both_open, (orders - week_before) ** 2, 0))
    sums = _year_sum(np.where(both_open, orders + week_before, 0))
    noise = np.maximum(1.0, squares / np.maximum(sums, 1))
    known = is_open & (usual_days > 0) & (usual >= FEWEST_ORDERS) & (np.arange(days) >= 60)
    return np.where(known, (usual - orders) / np.sqrt(1.25 * noise * np.maximum(usual, FEWEST_ORDERS)), np.nan)


def _before(values: np.ndarray, days: int, missing: float | bool) -> np.ndarray:
    """The values so many days earlier."""
    return np.concatenate([np.full(min(days, len(values)), missing, dtype=values.dtype), values[:-days]])


def _year_sum(values: Series) -> Series:
    """For each day the sum from 377 to 14 days before it."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    return total[np.maximum(place - 13, 0)] - total[np.maximum(place - 377, 0)]


def ewma(values: Series, state: float = 0.0, weight: float = EWMA_WEIGHT) -> Series:
    """The exponentially weighted mean up to each day, from `state` on the eve; a day that is nan changes nothing."""
    found = np.empty(len(values))
    for place, value in enumerate(values):
        state = state if np.isnan(value) else (1 - weight) * state + weight * value
        found[place] = state
    return found


def cusum(values: Series, state: float = 0.0, slack: float = CUSUM_SLACK) -> Series:
    """The cumulated surprise above `slack` a day up to each day, never below 0, from `state` on the eve."""
    found = np.empty(len(values))
    for place, value in enumerate(values):
        state = state if np.isnan(value) else max(0.0, state + value - slack)
        found[place] = state
    return found


def episode_starts(rings: np.ndarray) -> np.ndarray:
    """Where an alarm rings after at least CALM_DAYS + 1 days without one, along the last axis; bool of the same shape."""
    latest = np.zeros(rings.shape, dtype=bool)
    for days in range(1, CALM_DAYS + 1):
        latest[..., days:] |= rings[..., :-days]
    return rings & ~latest


# -- the ideal observer ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ideal:
    """What the ideal observer reaches for each threshold: false episodes a year, and the days until he hears (1-based, 0: not heard)."""

    thresholds: np.ndarray
    episodes_a_year: np.ndarray
    delays: list[np.ndarray]


def ideal_observer(
    counts: Series, is_open: Flags, first: int, last: int, share: int, *, followed: int, rounds: int = 1500, seed: int = 6,
) -> Ideal | None:
    """An observer who knows the true mean of every day, and how large an outage (`share` % below 100) to listen for.

    `counts` are one number a day; false alarms and outages fall between the places `first` and `last`. The mean is taken from the
    data, both sides of the day: weekday x the mean of the 5 weeks around it. The noise is what is left of that, as a gamma-Poisson
    count, independent between days. The test is the CUSUM of the likelihood ratio. None where too little is counted to know a mean.
    """
    rng = np.random.default_rng(seed)
    mean, noise = _true_means(counts, is_open, first)
    if noise is None or last - first < followed + 1 or not 0 < share < 100:
        return None
    years = _likelihood(rng, np.tile(mean[first:last + 1], (200, 1)), 1.0, share, noise)
    starts = rng.choice([place for place in range(first + 1, last - followed + 2) if is_open[place]], rounds)
    warm = min(28, first)
    windows = np.array([mean[start - warm:start + followed] for start in starts])
    state = _likelihood(rng, windows, np.where(np.arange(warm + followed) < warm, 1.0, 1 - share / 100), share, noise)
    thresholds = np.geomspace(0.5, 25, 60)
    false, delays = [], []
    for threshold in thresholds:
        false.append(episode_starts(years >= threshold).sum(axis=1).mean() * 365 / years.shape[1])
        heard = state[state[:, warm - 1] < threshold, warm:] >= threshold
        delays.append(np.where(heard.any(axis=1), heard.argmax(axis=1) + 1, 0))
    return Ideal(thresholds, np.array(false), delays)


def _true_means(counts: Series, is_open: Flags, first: int) -> tuple[Series, float | None]:
    """(the mean of every day, 0 where it is closed; variance over mean of what is left)."""
    days = len(counts)
    weekday = np.arange(days) % 7
    kept = np.where(is_open, counts, 0)
    total, opened = (np.concatenate([[0.0], np.cumsum(values)]) for values in (kept, is_open.astype(float)))
    low, high = np.maximum(np.arange(days) - 17, 0), np.minimum(np.arange(days) + 18, days)
    level = (total[high] - total[low]) / np.maximum(opened[high] - opened[low], 1)
    mean = np.zeros(days)
    for day in range(7):
        alike = (weekday == day) & is_open
        mean[alike] = level[alike] * counts[alike].sum() / max(level[alike].sum(), 1e-9)
    told = (mean > 1) & (np.arange(days) >= first)
    if not told.any():
        return mean, None
    return mean, max(1.01, float(((counts - mean)[told] ** 2 / mean[told]).mean()))


def _likelihood(rng: np.random.Generator, means: np.ndarray, left: float | np.ndarray, share: int, noise: float) -> np.ndarray:
    """Page's statistic on counts drawn from `left` x `means` (rows are runs of days); the counts' variance is `noise` x their mean."""
    rate = np.maximum(left * means, 1e-9)
    counts = rng.poisson(rng.gamma(rate / (noise - 1), noise - 1))
    gain = (share / 100 * means + counts * np.log(1 - share / 100)) / noise
    state = np.zeros(gain.shape)
    now = np.zeros(gain.shape[0])
    for day in range(gain.shape[1]):
        now = np.maximum(0, now + gain[:, day])
        state[:, day] = now
    return state
