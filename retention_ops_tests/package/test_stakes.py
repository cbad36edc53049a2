"""Spend at stake of a list: by hand for the smallest lists, and against a simulation of what lists really lose."""

from __future__ import annotations

import math
from datetime import date, timedelta

import numpy as np
import pytest

from retention_ops.package.stakes import RATE_ERROR, SEASON_DAYS, UNKNOWN_SEASON_ERROR, Stake, knows_season, stake_of


def test_without_a_year_that_tells_the_season_the_range_is_wider():
    first = date(2024, 1, 1)
    assert [knows_season(first, first + timedelta(SEASON_DAYS + more)) for more in (-1, 0)] == [False, True]
    assert not knows_season(None, first)
    wide = stake_of([400.0], [1.0], [400.0], season_known=False)
    assert wide == Stake(400.0, round(400 - 1.645 * UNKNOWN_SEASON_ERROR * 400, 2), 400.0)


def test_nobody_has_nothing_at_stake():
    assert stake_of([], [], []) == Stake(0.0, 0.0, 0.0)


def test_one_customer_may_lose_all_or_nothing():
    """400 usually, 7 of 10 stay away: 280, and a coin that lands on 0 or 400 keeps no narrower interval."""
    assert stake_of([400.0], [0.7], [280.0]) == Stake(280.0, 0.0, 400.0)


def test_who_is_sure_to_stay_away_leaves_the_error_of_the_rates():
    assert stake_of([400.0], [1.0], [400.0]) == Stake(400.0, round(400 - 1.645 * 0.05 * 400, 2), 400.0)


def test_two_customers_by_hand():
    # variance 100^2 * 0.9 * 0.1 + 300^2 * 0.99 * 0.01 = 1791, and (0.05 * 400)^2 = 400
    reach = 1.645 * math.sqrt(1791 + 400)
    assert stake_of([100.0, 300.0], [0.9, 0.99], [90.0, 297.0]) == Stake(387.0, round(387 - reach, 2), 400.0)
    # variance 100^2 / 4 + 300^2 / 4 = 25,000, and 400
    reach = 1.645 * math.sqrt(25_400)
    assert stake_of([100.0, 300.0], [0.5, 0.5], [50.0, 150.0]) == Stake(200.0, 0.0, 400.0) and reach > 200


def test_cents_are_added_exactly_in_any_order():
    draw = np.random.default_rng(5)
    usual = draw.integers(1, 10**7, 2_000) / 100
    chance = draw.uniform(0, 1, 2_000).round(6)
    spend = (usual * chance).round(2)
    mixed = draw.permutation(2_000)
    assert stake_of(usual, chance, spend) == stake_of(usual[mixed], chance[mixed], spend[mixed])
    assert stake_of(usual, chance, spend).spend == sum(round(100 * value) for value in spend) / 100


@pytest.mark.parametrize("customers", [40, 400, 4_000])
@pytest.mark.parametrize("error", [0.0, RATE_ERROR])
def test_what_lists_lose_lies_in_the_interval_in_nine_of_ten_cases(customers, error):
    """Spends are as unequal as real ones. Where the rates of a date are right, the interval is on the safe side."""
    draw = np.random.default_rng(20260630)
    inside, rounds = 0, 4_000
    usual = np.exp(draw.normal(5, 1, customers)).round(2)
    chance = draw.uniform(0.25, 0.75, customers).round(6)  # away from 0 and 1, where an error of the rates could not be added
    told = stake_of(usual, chance, (usual * chance).round(2))
    for _ in range(rounds):
        gone = draw.random(customers) < chance + draw.normal(0, error)
        inside += told.low <= usual[gone].sum() <= told.high
    assert (inside / rounds >= 0.89) if not error else abs(inside / rounds - 0.90) <= 0.02
