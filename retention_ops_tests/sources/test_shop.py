"""The synthetic shop: the same bytes everywhere, two years of plausible orders, and the story the demo tells.

The expectations are computed here from the CSV files by naive pandas, after section 3 of the contract.
"""

from __future__ import annotations

import hashlib
import re
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from retention_ops.errors import UsageError
from retention_ops.sources.shop import DEFAULT_END, MAX_CUSTOMERS, Shop, write_shop

WARM_UP = 97


@pytest.fixture(scope="module")
def default_shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return write_shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def orders(default_shop: Shop) -> pd.DataFrame:
    return read_orders(default_shop)


@pytest.fixture(scope="module")
def customers(default_shop: Shop) -> pd.DataFrame:
    return pd.read_csv(default_shop.customers, parse_dates=["signup_date"]).set_index("customer_id")


def read_orders(shop: Shop) -> pd.DataFrame:
    """orders.csv with `day` (0 on the shop's first day) and `cents`."""
    orders = pd.read_csv(shop.orders, parse_dates=["order_date"])
    orders["day"] = (orders["order_date"] - pd.Timestamp(shop.first_date)).dt.days
    orders["cents"] = (orders["order_amount"] * 100).round().astype(int)
    return orders


def alert_history(shop: Shop) -> pd.DataFrame:
    """A row per day: AT_RISK %, its change against the mean of the 7 previous days in %, severity after the gates."""
    orders = read_orders(shop)
    days = (shop.last_date - shop.first_date).days + 1
    buyers = orders["customer_id"].astype("category").cat.codes.to_numpy()
    last_order = np.full((buyers.max() + 1, days), -1)
    last_order[buyers, orders["day"]] = orders["day"]
    last_order = np.maximum.accumulate(last_order, axis=1)
    since = np.arange(days) - last_order
    known = last_order >= 0
    history = pd.DataFrame({"customers": known.sum(axis=0)})
    history["at_risk_pct"] = 100 * (known & (since > 30) & (since <= 90)).sum(axis=0) / history["customers"]
    baseline = history["at_risk_pct"].shift(1).rolling(7).mean()
    history["change_pct"] = (100 * (history["at_risk_pct"] / baseline - 1)).round(9)
    severity = np.select([history["change_pct"] >= 25, history["change_pct"] >= 15], ["CRITICAL", "WARNING"], "INFO")
    gated = (history.index < WARM_UP) | (history["customers"] < 100)
    history["severity"] = np.where(gated, "INFO", severity)
    return history


def queue_on_last_day(orders: pd.DataFrame, last_day: int) -> pd.Series:
    """Priority tier per customer, '' for those who are in none."""
    by_customer = orders.sort_values(["day", "order_id"]).groupby("customer_id")
    facts = by_customer.agg(first=("day", "min"), last=("day", "max"), total=("day", "size"), shopping_days=("day", "nunique"),
                            cents=("cents", "sum"), last_cents=("cents", "last"))
    since, span, gaps = last_day - facts["last"], facts["last"] - facts["first"], facts["shopping_days"] - 1
    active, at_risk = since <= 30, (since > 30) & (since <= 90)
    late = (gaps > 0) & (2 * since * gaps > 3 * span)
    spends_less = 5 * facts["last_cents"] * facts["total"] < 3 * facts["cents"]
    inconsistent = active & ((facts["total"] <= 3) | ((gaps > 0) & (10 * since * gaps > 7 * span)))
    score = 50 * late + 30 * spends_less + 20 * inconsistent
    tiers = np.select([active & (score >= 51), at_risk & (score >= 21), (since > 90) & (since <= 180) & (score >= 51)],
                      ["P1", "P2", "P3"], "")
    return pd.Series(tiers, index=facts.index)


def contents(shop: Shop) -> tuple[bytes, bytes]:
    return shop.orders.read_bytes(), shop.customers.read_bytes()


# --- bytes


def test_bytes_are_the_same_on_every_machine(tmp_path: Path) -> None:
    """A change here changes everybody's demo and example pack: pin it again only on purpose."""
    shop = write_shop(tmp_path, customers=60)
    assert [hashlib.sha256(content).hexdigest() for content in contents(shop)] == [
        "273abfcd84c8f92eee5e2dd3e0ffc96510e48d4225afb5bd0f9aef19257ee3bd",
        "91482c8370eac31e9db3f2b2211f2564779186ad7b32340095e2f212f0215199",
    ]


@pytest.mark.parametrize("chunk", [1, 7, 149, 150])
def test_chunk_size_never_changes_the_result(tmp_path: Path, chunk: int) -> None:
    whole = write_shop(tmp_path / "whole", customers=150, chunk=1000)
    pieces = write_shop(tmp_path / "pieces", customers=150, chunk=chunk)
    assert contents(pieces) == contents(whole)


def test_another_seed_is_another_shop(tmp_path: Path) -> None:
    shops = [write_shop(tmp_path / str(seed), customers=150, seed=seed) for seed in (7, 8, -1, 2**70)]
    assert len({contents(shop) for shop in shops}) == 4


# --- the story


@pytest.mark.parametrize(("size", "seed"), [(2000, 2), (2000, 6), (2000, 10), (6000, 1), (6000, 7), (20_000, 3)])
def test_at_risk_climbs_through_warning_to_critical_in_the_last_week_only(tmp_path: Path, size: int, seed: int) -> None:
    severity = alert_history(write_shop(tmp_path, customers=size, seed=seed))["severity"]
    assert severity.iloc[-1] == "CRITICAL"
    assert "WARNING" in severity.iloc[-7:-1].tolist()
    assert severity.iloc[:-7].eq("INFO").all()


@pytest.mark.parametrize("end", [date(2024, 2, 29), date(2025, 12, 31), date(2026, 9, 30)])
def test_the_story_does_not_depend_on_the_season(tmp_path: Path, end: date) -> None:
    severity = alert_history(write_shop(tmp_path, end=end))["severity"]
    assert severity.iloc[-1] == "CRITICAL"
    assert severity.iloc[:-7].eq("INFO").all()


def test_history_stays_well_below_the_warning(default_shop: Shop) -> None:
    assert alert_history(default_shop)["change_pct"].iloc[WARM_UP:-7].max() < 10


def test_the_sale_wins_a_large_cohort_of_one_order_customers(
    default_shop: Shop, orders: pd.DataFrame, customers: pd.DataFrame
) -> None:
    cohort = customers.index[customers["acquisition_channel"] == "promotion"]
    assert len(cohort) == default_shop.cohort_size
    assert 0.08 <= len(cohort) / default_shop.customer_count <= 0.10
    bought = orders[orders["customer_id"].isin(cohort)]
    assert bought["customer_id"].is_unique and len(bought) == len(cohort)
    assert default_shop.promotion_from == DEFAULT_END - timedelta(days=35)
    assert default_shop.promotion_to == DEFAULT_END - timedelta(days=31)
    sale_days = {stamp.date() for stamp in bought["order_date"]}
    assert sale_days == {default_shop.promotion_from + timedelta(days=offset) for offset in range(5)}


def test_every_tier_of_the_queue_has_customers_on_the_last_day(orders: pd.DataFrame) -> None:
    sizes = queue_on_last_day(orders, int(orders["day"].max())).value_counts()
    assert 30 <= sizes["P1"] <= 200
    assert 150 <= sizes["P2"] <= 600
    assert 20 <= sizes["P3"] <= 200


# --- plausible customers


def test_customers_have_their_own_rhythm(orders: pd.DataFrame) -> None:
    days = orders.drop_duplicates(["customer_id", "day"]).groupby("customer_id")["day"].agg(["min", "max", "size"])
    settled = days[days["size"] >= 5]
    gap = (settled["max"] - settled["min"]) / (settled["size"] - 1)
    assert gap.quantile(0.05) < 12 and 25 < gap.median() < 60 and gap.quantile(0.95) > 85


def test_revenue_spreads_from_small_change_to_vips(orders: pd.DataFrame) -> None:
    revenue = orders.groupby("customer_id")["cents"].sum() / 100
    assert 0.05 < (revenue > 2000).mean() < 0.20
    assert revenue.quantile(0.9) > 20 * revenue.quantile(0.1)


def test_season_and_weekday_show(orders: pd.DataFrame) -> None:
    year = orders[orders["order_date"].dt.year == 2025]
    by_month = year.groupby(year["order_date"].dt.month).size()
    assert by_month.nlargest(2).index.tolist() == [12, 11]
    assert orders["order_date"].dt.day_name().value_counts().idxmin() == "Saturday"


def test_attributes_agree_with_behaviour(orders: pd.DataFrame, customers: pd.DataFrame) -> None:
    revenue = orders.groupby("customer_id")["cents"].sum()
    assert customers.index.is_unique and set(customers.index) == set(revenue.index)
    tier_revenue = revenue.groupby(customers["loyalty_tier"]).agg(["min", "max"])
    order = ["bronze", "silver", "gold", "platinum"]
    assert tier_revenue.index.isin(order).all()
    assert (tier_revenue.loc[order, "max"].shift(1).iloc[1:] < tier_revenue.loc[order, "min"].iloc[1:]).all()
    count = orders.groupby("customer_id").size().groupby(customers["segment"]).median()
    assert count["frequent"] > count["regular"] > count["occasional"] > count["deal_seeker"] == 1
    assert (customers["signup_date"] <= orders.groupby("customer_id")["order_date"].min()).all()
    assert customers["country"].nunique() == 9
    assert 0.90 < customers["consent"].mean() < 0.94


# --- files


def test_orders_are_numbered_in_order_of_time(default_shop: Shop, orders: pd.DataFrame) -> None:
    assert orders["order_id"].is_unique and orders["order_id"].is_monotonic_increasing
    assert orders["order_date"].is_monotonic_increasing
    assert len(orders) == default_shop.order_count
    assert orders["customer_id"].nunique() == default_shop.customer_count


def test_every_line_is_well_formed(default_shop: Shop) -> None:
    order = re.compile(r"O\d{9},C\d{6},\d{4}-\d\d-\d\d,\d+\.\d\d,EUR")
    person = re.compile(r"C\d{6},[A-Z]{2},\w+,\w+,\w+,\d{4}-\d\d-\d\d,(true|false)")
    header, *lines = default_shop.orders.read_text(encoding="ascii").splitlines()
    assert header == "order_id,customer_id,order_date,order_amount,currency"
    assert all(map(order.fullmatch, lines))
    header, *lines = default_shop.customers.read_text(encoding="ascii").splitlines()
    assert header == "customer_id,country,segment,loyalty_tier,acquisition_channel,signup_date,consent"
    assert all(map(person.fullmatch, lines))


@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_a_tiny_shop_spans_its_two_years_too(tmp_path: Path, size: int) -> None:
    shop = write_shop(tmp_path, customers=size)
    orders = read_orders(shop)
    assert orders["customer_id"].nunique() == shop.customer_count == len(pd.read_csv(shop.customers)) == size
    assert (orders["order_date"].min().date(), orders["order_date"].max().date()) == (date(2024, 7, 1), DEFAULT_END)
    assert (orders["cents"] > 0).all()


@pytest.mark.parametrize(
    ("end", "first"),
    [(date(2026, 6, 30), date(2024, 7, 1)), (date(2024, 2, 29), date(2022, 3, 1)), (date(2026, 2, 28), date(2024, 2, 29))],
)
def test_two_years_end_on_the_given_day(tmp_path: Path, end: date, first: date) -> None:
    shop = write_shop(tmp_path, customers=40, end=end)
    assert (shop.first_date, shop.last_date) == (first, end)
    assert read_orders(shop)["order_date"].agg(["min", "max"]).dt.date.tolist() == [first, end]


@pytest.mark.parametrize("size", [0, -3, MAX_CUSTOMERS + 1])
def test_an_impossible_size_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match="a synthetic shop has 1 to"):
        write_shop(tmp_path, customers=size)


def test_an_interrupted_write_leaves_the_old_files_whole(tmp_path: Path) -> None:
    before = contents(write_shop(tmp_path, customers=20))

    def interrupt(text: str) -> None:
        if "written" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shop(tmp_path, customers=30, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["customers.csv", "orders.csv"]
    assert ((tmp_path / "orders.csv").read_bytes(), (tmp_path / "customers.csv").read_bytes()) == before
