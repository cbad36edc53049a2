"""What the silence of a list may cost, and how far that may be off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date

import numpy as np
from numpy.typing import ArrayLike

RATE_ERROR, UNKNOWN_SEASON_ERROR = 0.05, 0.2
"""standard deviation of what p_no_return_90d is off by on a date, the same for all its customers, with and without a year of orders
that tells the season: about what two real years of orders showed; docs/targeting.md has the table"""
SEASON_DAYS = 439
"""days from the first order until return_rates knows a season (06_return_days.sql)"""
QUANTILE = 1.645
"""a normal variable keeps within so many standard deviations in 90 of 100 cases"""


@dataclass(frozen=True)
class Stake:
    """Spend at stake of a list in currency units, and between what the spend it will really lose lies in 90 of 100 cases."""

    spend: float
    low: float
    high: float


def knows_season(first_order_date: date | None, day: date) -> bool:
    """Whether there is a year of orders before `day` that tells its season."""
    return first_order_date is not None and (day - first_order_date).days >= SEASON_DAYS


def stake_of(usual_spend: ArrayLike, stay_away: ArrayLike, spend_at_stake: ArrayLike, season_known: bool = True) -> Stake:
    """The stake of a list from three columns of customer_priority, each with a value for each of its n customers.

    `usual_spend` (u) and `spend_at_stake` are in currency units with 2 places and are added up in cents; `stay_away` (p) is 0..1.
    What the list loses is sum(u * X), where X is 1 for who stays away for 90 days: Bernoulli with p. Its variance is
    sum(u^2 p (1 - p)), and for the error that the rates of a date have in common (error * sum(u))^2 more: RATE_ERROR, or
    UNKNOWN_SEASON_ERROR. A list loses
    neither less than nothing nor more than it usually spends.
    """
    usual, chance = _cents(usual_spend), np.asarray(stay_away, dtype=float)
    spend, most = int(_cents(spend_at_stake).sum()), int(usual.sum())
    error = RATE_ERROR if season_known else UNKNOWN_SEASON_ERROR
    # fsum: the queue's order must not change a digit
    own = math.fsum(np.square(usual.astype(float)) * chance * (1 - chance))
    reach = QUANTILE * math.sqrt(own + (error * most) ** 2)
    low, high = (round(min(max(end, 0.0), most)) for end in (spend - reach, spend + reach))
    return Stake(spend / 100, low / 100, high / 100)


def _cents(amounts: ArrayLike) -> np.ndarray:
    return np.rint(np.asarray(amounts, dtype=float) * 100).astype(np.int64)
