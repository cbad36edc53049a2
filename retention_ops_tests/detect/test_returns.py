"""return_rates and what is at stake: against the naive oracle, the fast form against the readable, a range against its days."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import pandas as pd
import pytest

from retention_ops.detect.compute import RETURN_DAYS, Workspace, priority_order, workspace
from retention_ops.settings import Settings
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.render import fast_query, query
from retention_ops_tests import oracle
from retention_ops_tests.detect.test_against_oracle import REAL_DATA
from retention_ops_tests.oracle_returns import Returns
from retention_ops_tests.shops import lake_with, seasonal_shop, uci_orders

LAST = date(2025, 7, 20)
DAYS = [LAST - timedelta(ago) for ago in (0, 1, 30, 61, 92, 123, 165, 198, 199, 200, 330, 480, 520, 521, 522, 640)]
ALL = {"membership": "at_stake", "at_stake_size": 1000}
CHOICES = ({}, {"rank_by": "spend_at_stake"}, {"membership": "at_stake"}, {**ALL, "rank_by": "spend_at_stake"},
           {"membership": "at_stake", "at_stake_size": 7, "profile": "fast_fashion"})


@pytest.fixture(scope="module")
def orders() -> pd.DataFrame:
    return seasonal_shop()


@pytest.fixture(scope="module")
def home(orders: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lake_with(orders, tmp_path_factory.mktemp("seasonal")).settings.home


def under(home: Path, **rules) -> Lake:
    """The same orders under other settings."""
    return Lake(Settings(_env_file=None, home=home, **rules))


def queue_of(space: Workspace, order: str = "") -> pd.DataFrame:
    return space.rows("customer_priority", order + priority_order(space.settings)).drop(columns="created_at")


@pytest.mark.parametrize("rules", [{}, {"profile": "fast_fashion"}], ids=str)
def test_rates_of_many_dates(home: Path, orders: pd.DataFrame, rules: dict):
    lake = under(home, **rules)
    naive = Returns(orders, lake.settings)
    with workspace(lake) as space:
        for d in DAYS:
            space.build("return_rates", d)
            assert oracle.differences("return_days", naive.return_days(d, d), space.rows("return_days")) == []
            looked = sorted({day for _, day in naive.days(d)})
            assert oracle.differences("return_windows", naive.return_windows(looked), space.rows("return_windows")) == []
            assert oracle.differences("return_rates", naive.return_rates(d, d), space.rows("return_rates")) == []


@pytest.mark.parametrize("rules", [*CHOICES, {"membership": "at_stake", "p1_min_revenue": "median"}], ids=str)
def test_queues_of_many_dates(home: Path, orders: pd.DataFrame, rules: dict):
    lake = under(home, **rules)
    naive = Returns(orders, lake.settings)
    with workspace(lake) as space:
        for d in DAYS:
            space.build("customer_priority", d)
            assert oracle.differences("customer_priority", oracle.customer_priority(orders, d, lake.settings, naive), queue_of(space)) == []


def test_the_dates_are_worth_comparing(orders: pd.DataFrame):
    """Some without history, some without a season, some with one that is bounded; people without a signal on a list."""
    naive = Returns(orders, Settings(_env_file=None))
    assert {naive.rates(d) is None for d in DAYS} == {True, False}
    seasons = [naive.season(d) for d in DAYS if naive.rates(d)]
    assert (None, None) in seasons and any(None not in season for season in seasons)
    queue = pd.concat([oracle.customer_priority(orders, d, Settings(_env_file=None, **ALL), naive) for d in DAYS])
    assert (queue["priority_reason"] == queue["at_stake_reason"]).any() and set(queue["priority_tier"]) == {"P1", "P2", "P3"}
    assert len({reason.split(" customers")[0] for reason in queue["at_stake_reason"] if reason}) > 5


def test_the_fast_windows_are_the_readable_ones(home: Path):
    """Every day there is, and the few that one date looks at."""
    first, last = date(2024, 10, 1), date(2025, 8, 1)
    oldest, newest = first - timedelta(RETURN_DAYS[0]), last - timedelta(RETURN_DAYS[1])
    for rules in ({}, {"profile": "fast_fashion"}):
        with workspace(under(home, **rules)) as space:
            for start in (first, last):
                space.run(query("return_days"), from_date=start, to_date=last)
                looked = {day for (day,) in space.connection.execute("SELECT DISTINCT window_date FROM return_days").fetchall()}
                assert oldest <= min(looked) and max(looked) == newest
                space.run(query("return_windows"), from_date=min(looked), to_date=newest)
                readable = space.rows("return_windows")
                space.run(fast_query("return_windows"), from_date=min(looked), to_date=newest)
                fast = space.rows("return_windows")
                pd.testing.assert_frame_equal(readable, fast)
                assert {day.date() for day in fast["as_of_date"]} == looked


@pytest.mark.parametrize(
    "rules", [CHOICES[3], *(pytest.param(each, marks=pytest.mark.slow) for each in (*CHOICES[:3], CHOICES[4]))], ids=str)
def test_a_range_is_its_single_days(home: Path, rules: dict):
    days = oracle.dates(date(2025, 1, 20), date(2025, 2, 20))  # a season is known from the first days of the year on
    with workspace(under(home, **rules)) as space:
        space.build_range("customer_priority", days[0], days[-1])
        queues, rates = queue_of(space, "run_date, "), space.rows("return_rates")
    alone = []
    for day in days:
        with workspace(under(home, **rules)) as space:
            space.build("customer_priority", day)
            alone.append((queue_of(space), space.rows("return_rates")))
    pd.testing.assert_frame_equal(queues, pd.concat([queue for queue, _ in alone], ignore_index=True))
    pd.testing.assert_frame_equal(rates, pd.concat([rates for _, rates in alone], ignore_index=True))


@pytest.mark.parametrize("rules", [{}, ALL], ids=["rules", "at_stake"])
def test_what_comes_after_a_date_changes_nothing(home: Path, orders: pd.DataFrame, tmp_path: Path, rules: dict):
    for d in (LAST - timedelta(100), LAST - timedelta(210), LAST - timedelta(400)):
        known = orders[[day <= d for day in orders["order_date"]]].reset_index(drop=True)
        found = []
        for lake in (under(home, **rules), lake_with(known, tmp_path / str(d), **rules)):
            with workspace(lake) as space:
                space.build("customer_priority", d)
                found.append((queue_of(space), space.rows("return_rates")))
        for now, then in zip(*found, strict=True):
            pd.testing.assert_frame_equal(now, then)


def test_what_the_rules_said_before_they_still_say(home: Path):
    """Nobody's older columns depend on what is at stake, however the queue is ordered."""
    older = oracle.columns_of("customer_priority")[:14]
    found = []
    for rules in ({}, {"rank_by": "spend_at_stake"}):
        with workspace(under(home, **rules)) as space:
            space.build("customer_priority", LAST)
            found.append(queue_of(space).sort_values("customer_id", ignore_index=True))
    pd.testing.assert_frame_equal(found[0][older], found[1][older])
    assert older[-1] == "value_proxy"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Returns, Path]:
    """Two years of Online Retail: the naive reading and the home that `ingest` made of the same files."""
    files = [REAL_DATA / "uci_online_retail_II_2009-2010.parquet", REAL_DATA / "uci_online_retail.parquet"]
    if not all(file.is_file() for file in files):
        pytest.skip("the real orders are not here: put them into ../shared/data beside the repository")
    chosen = Settings(_env_file=None, home=tmp_path_factory.mktemp("real"))
    ingest(files, "uci-online-retail", chosen)
    orders = pd.concat([uci_orders(file) for file in files]).drop_duplicates("order_id", ignore_index=True)
    return orders, Returns(orders, chosen), chosen.home


MORE_DATES = (date(2010, 12, 24), date(2011, 2, 12), date(2011, 2, 13), date(2011, 12, 9))


@pytest.mark.parametrize("d", [date(2010, 4, 20), date(2011, 9, 10), *(pytest.param(each, marks=pytest.mark.slow) for each in MORE_DATES)],
                         ids=str)
def test_real_orders(real: tuple[pd.DataFrame, Returns, Path], d: date):
    orders, naive, home = real
    for rules in ({}, {"membership": "at_stake", "rank_by": "spend_at_stake"}):
        lake = under(home, **rules)
        with workspace(lake) as space:
            space.build("customer_priority", d)
            expected = oracle.customer_priority(orders, d, lake.settings, naive)
            assert oracle.differences("customer_priority", expected, queue_of(space)) == []
            assert oracle.differences("return_rates", naive.return_rates(d, d), space.rows("return_rates")) == []
