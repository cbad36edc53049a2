"""The business rules, one behaviour at a time, on the SQL itself; every expected value was worked out by hand.

Customers do not influence each other, so the cases about one customer share a shop: each case is a customer named after it.
Visits are written as (days before D, cents).
"""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import pandas as pd
import pytest

from retention_ops.detect.compute import alert_history, table_for
from retention_ops.settings import Settings
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.oracle import FIRST_RULE, of_rule, plain, plain_rows
from retention_ops_tests.shops import lake_with, orders_frame, shop_with_at_risk_counts

D = date(2024, 6, 30)
ACTIONS = Settings(_env_file=None)


def ago(days: int) -> date:
    return D - timedelta(days)


def steady(last: int, gap: int, visits: int, cents: int = 10_000, last_cents: int | None = None) -> list[tuple[int, int]]:
    """`visits` visits `gap` days apart, the last one `last` days ago."""
    return [(last, cents if last_cents is None else last_cents), *((last + gap * back, cents) for back in range(1, visits))]


def shop(cases: dict[str, list[tuple[int, int]]]) -> pd.DataFrame:
    return orders_frame((customer, ago(days), cents) for customer, visits in cases.items() for days, cents in visits)


def by_customer(frame: pd.DataFrame) -> dict[str, dict]:
    """customer_id -> row, as plain values."""
    return {row["customer_id"]: {name: plain(value) for name, value in row.items()} for row in frame.to_dict("records")}


def only(frame: pd.DataFrame) -> dict:
    """The one row of a day's table; of alert_logic that of the first rule."""
    frame = of_rule(FIRST_RULE, frame) if "alert_type" in frame else frame
    assert len(frame) == 1
    return {name: plain(value) for name, value in frame.iloc[0].to_dict().items()}


# ------------------------------------------------------------------------------------------------------------- customers

CHURN = {  # customer: (visits, expected columns of churn_detection)
    "one order today": ([(0, 500)], dict(
        days_since_last_order=0, retention_status="ACTIVE", usual_gap_days=None, is_frequency_drop=False, is_value_drop=False,
        is_status_inconsistent=True, churn_risk_score=20, churn_risk_level="LOW", order_days=1, total_revenue=5.0)),
    "one order long ago is never late": ([(400, 500)], dict(
        retention_status="INACTIVE", is_frequency_drop=False, is_status_inconsistent=False, churn_risk_score=0)),
    "active on day 30": ([(30, 500)], dict(retention_status="ACTIVE")),
    "at risk on day 31": ([(31, 500)], dict(retention_status="AT_RISK", is_status_inconsistent=False)),
    "at risk on day 90": ([(90, 500)], dict(retention_status="AT_RISK")),
    "inactive on day 91": ([(91, 500)], dict(retention_status="INACTIVE")),
    "exactly 1.5 gaps is on time": (steady(15, 10, 5), dict(
        usual_gap_days=10.0, is_frequency_drop=False, is_status_inconsistent=True, churn_risk_score=20, churn_risk_level="LOW")),
    "a day past 1.5 gaps is late": (steady(16, 10, 5), dict(
        is_frequency_drop=True, churn_risk_score=70, churn_risk_level="HIGH")),
    "exactly 0.7 gaps is settled": (steady(7, 10, 4), dict(
        is_status_inconsistent=False, churn_risk_score=0, churn_risk_level="LOW")),
    "a day past 0.7 gaps is not": (steady(8, 10, 4), dict(is_status_inconsistent=True, churn_risk_score=20)),
    "three orders are few": (steady(1, 10, 3), dict(is_status_inconsistent=True)),
    "four orders are not": (steady(1, 10, 4), dict(is_status_inconsistent=False)),
    "few orders matter to the active only": (steady(40, 35, 3), dict(is_status_inconsistent=False, churn_risk_score=0)),
    "two invoices on a day are one visit": ([(32, 500), (32, 500), (12, 500), (12, 500)], dict(
        total_orders=4, order_days=2, usual_gap_days=20.0, is_frequency_drop=False)),
    "an uneven rhythm has a mean gap": ([(4, 500), (5, 500), (7, 500), (18, 500)], dict(usual_gap_days=14 / 3)),
    "exactly 60 % of the average": ([(9, 700), (2, 300)], dict(is_value_drop=False, avg_order_value=5.0)),
    "a cent below 60 %": ([(9, 700), (2, 299)], dict(is_value_drop=True, last_order_value=2.99, avg_order_value=5.0)),
    "the average counts orders, not days": ([(9, 700), (9, 700), (2, 350)], dict(is_value_drop=False, avg_order_value=5.83)),
    "average of half a cent": ([(9, 1), (2, 2)], dict(avg_order_value=0.02, total_revenue_cents=3)),
    "large amounts keep their cents": ([(9, 999_999_999), (2, 1_000_000_000)], dict(
        avg_order_value=10_000_000.0, total_revenue=19_999_999.99)),
    "value drop alone is medium": ([*steady(5, 10, 4, 1000, 300)], dict(churn_risk_score=30, churn_risk_level="MEDIUM")),
    "value drop and few orders are medium": ([(12, 900), (2, 100)], dict(churn_risk_score=50, churn_risk_level="MEDIUM")),
    "late alone is medium": (steady(35, 10, 4), dict(churn_risk_score=50, churn_risk_level="MEDIUM")),
    "late and spending less is high": (steady(35, 10, 4, 1000, 100), dict(churn_risk_score=80, churn_risk_level="HIGH")),
    "all three signals": (steady(30, 10, 4, 1000, 100), dict(churn_risk_score=100, churn_risk_level="HIGH")),
}


@pytest.fixture(scope="module")
def churn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    lake = lake_with(shop({name: visits for name, (visits, _) in CHURN.items()}), tmp_path_factory.mktemp("churn"))
    return by_customer(table_for(lake, "churn_detection", D))


@pytest.mark.parametrize("case", CHURN)
def test_signals(case: str, churn: dict[str, dict]):
    expected = CHURN[case][1]
    assert {name: churn[case][name] for name in expected} == expected


QUEUE = {  # customer: (visits, expected columns of customer_priority; None: not in the queue)
    "the contract's check": (steady(24, 11, 4, 101_800, 79_300), dict(  # 3,847.00; 24 of usually 11 days
        priority_tier="P1", priority_score=94.5106, priority_reason="No order for 24 days, usually every 11",
        recommended_action=ACTIONS.action_p1_vip, total_revenue=3847.0, total_orders=4, avg_order_value=961.75,
        value_proxy=1154.1, days_since_last_order=24, churn_risk_score=70)),
    "active and medium is not urgent": (steady(5, 10, 4, 1000, 300), None),
    "at risk, medium": (steady(60, 30, 4, 25_000), dict(
        priority_tier="P2", priority_score=68.8175, recommended_action=ACTIONS.action_p2,
        priority_reason="No order for 60 days, usually every 30")),
    "at risk, low": (steady(60, 40, 4), None),
    "at risk, spending less": ([(60, 1000), (60, 200)], dict(
        priority_tier="P2", churn_risk_level="MEDIUM", priority_reason="Last order 67 % below average")),
    "a percentage that ends in a half": ([(60, 1605), (60, 395)], dict(priority_reason="Last order 61 % below average")),  # 60.5
    "first day at risk": (steady(31, 5, 4, 1_000_000), dict(priority_tier="P2", priority_score=70.1667)),
    "inactive, medium": (steady(100, 10, 4), None),
    "first day inactive": (steady(91, 10, 4, 1_000_000, 100_000), dict(
        priority_tier="P3", priority_score=50.1111, recommended_action=ACTIONS.action_p3,
        priority_reason="No order for 91 days, usually every 10; last order 87 % below average")),  # 1,000 of 7,750
    "last day to win back": (steady(180, 10, 4, 1_000_000, 100_000), dict(priority_tier="P3", priority_score=60.0)),
    "a day too late to win back": (steady(181, 10, 4, 1_000_000, 100_000), None),
    "last day of prevention": (steady(30, 10, 4, 1_000_000), dict(priority_tier="P1", priority_score=100.0)),
    "every day, once": ([(3, 100), (2, 100)], dict(  # 70 + 2 ln 3 + 20/30
        priority_score=72.8639, total_orders=2, priority_reason="No order for 2 days, usually every day; only 2 orders so far")),
    "a gap of two and a half days": ([(84, 1000), (82, 1000), (79, 1000)], dict(
        priority_reason="No order for 79 days, usually every 3")),
    "vip above 2000": (steady(16, 10, 2, 100_000, 100_001), dict(recommended_action=ACTIONS.action_p1_vip)),
    "personal at 2000": (steady(16, 10, 2, 100_000), dict(recommended_action=ACTIONS.action_p1_personal, total_revenue=2000.0)),
    "personal at 1000": (steady(16, 10, 2, 50_000), dict(recommended_action=ACTIONS.action_p1_personal)),
    "reminder below 1000": (steady(16, 10, 2, 50_000, 49_999), dict(
        recommended_action=ACTIONS.action_p1_reminder, total_revenue=999.99, value_proxy=300.0)),
    "proxy of half a cent": (steady(16, 10, 2, 2, 3), dict(value_proxy=0.02)),  # 30 % of 0.05 is 0.015
}


@pytest.fixture(scope="module")
def queue_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return lake_with(shop({name: visits for name, (visits, _) in QUEUE.items()}), tmp_path_factory.mktemp("queue"))


@pytest.fixture(scope="module")
def queue(queue_lake: Lake) -> dict[str, dict]:
    return by_customer(table_for(queue_lake, "customer_priority", D))


@pytest.mark.parametrize("case", QUEUE)
def test_queue(case: str, queue: dict[str, dict]):
    expected = QUEUE[case][1]
    if expected is None:
        assert case not in queue
    else:
        assert {name: queue[case][name] for name in expected} == expected


def test_the_queue_is_ordered_by_score(queue_lake: Lake):
    scores = table_for(queue_lake, "customer_priority", D)["priority_score"].tolist()
    assert scores == sorted(scores, reverse=True)


def test_equal_scores_are_ordered_by_revenue_then_customer(tmp_path: Path):
    cents = {"c": 3_000_000, "b": 3_000_000, "a": 3_000_000, "z": 3_000_001}  # value is capped, so all scores are equal
    orders = orders_frame((customer, ago(days), amount) for customer, amount in cents.items() for days in (84, 82))
    queue = table_for(lake_with(orders, tmp_path), "customer_priority", D)
    assert queue["customer_id"].tolist() == ["z", "a", "b", "c"]
    assert queue["priority_score"].nunique() == 1


@pytest.mark.parametrize(("revenues", "in_queue"), [([1900, 2100], True), ([1900, 2001], True), ([2001, 2002], False),
                                                    ([1900, 2001, 2002], False), ([1900, 1950, 2001], True)])
def test_p1_may_be_kept_for_the_better_half(revenues: list[int], in_queue: bool, tmp_path: Path):
    """`late` has 2000 cents; the median is over all customers, the middle two averaged exactly, and includes the median."""
    others = [(f"c{number}", ago(1), cents) for number, cents in enumerate(revenues)]
    orders = orders_frame([("late", ago(26), 1000), ("late", ago(25), 1000), *others])
    queue = table_for(lake_with(orders, tmp_path, p1_min_revenue="median"), "customer_priority", D)
    assert ("late" in queue["customer_id"].tolist()) is in_queue


def test_the_median_matters_to_p1_only(tmp_path: Path):
    orders = shop({"late": steady(40, 5, 4, 100), "rich": [(1, 900_000)]})
    queue = table_for(lake_with(orders, tmp_path, p1_min_revenue="median"), "customer_priority", D)
    assert queue[["customer_id", "priority_tier"]].values.tolist() == [["late", "P2"]]


@pytest.mark.parametrize(("profile", "active", "at_risk"), [("fast_fashion", 15, 45), ("luxury", 60, 180)])
def test_a_profile_moves_status_and_win_back_and_urgency(profile: str, active: int, at_risk: int, tmp_path: Path):
    visits = {str(days): steady(days, 5, 4, 1_000_000, 100_000)
              for days in (active, active + 1, at_risk, at_risk + 1, 2 * at_risk, 2 * at_risk + 1)}
    lake = lake_with(shop(visits), tmp_path, profile=profile)
    queue = by_customer(table_for(lake, "customer_priority", D))
    assert {days: (row["retention_status"], row["priority_tier"]) for days, row in queue.items()} == {
        str(active): ("ACTIVE", "P1"), str(active + 1): ("AT_RISK", "P2"), str(at_risk): ("AT_RISK", "P2"),
        str(at_risk + 1): ("INACTIVE", "P3"), str(2 * at_risk): ("INACTIVE", "P3")}
    assert [queue[str(days)]["priority_score"] for days in (active, at_risk, 2 * at_risk)] == [100.0, 80.0, 60.0]


def test_a_level_starts_at_its_score(tmp_path: Path):
    lake = lake_with(shop({"few": [(0, 100)], "late": steady(35, 10, 4)}), tmp_path, medium_risk_score=20, high_risk_score=50)
    rows = by_customer(table_for(lake, "churn_detection", D))
    assert {who: (row["churn_risk_score"], row["churn_risk_level"]) for who, row in rows.items()} == {
        "few": (20, "MEDIUM"), "late": (50, "HIGH")}


def test_a_reason_for_someone_past_the_gap_but_not_late(tmp_path: Path):
    """Only where inconsistency alone may make someone HIGH."""
    lake = lake_with(shop({"a": steady(8, 10, 4)}), tmp_path, inconsistent_score=60)
    row = only(table_for(lake, "customer_priority", D))
    assert (row["priority_tier"], row["churn_risk_score"]) == ("P1", 60)
    assert row["priority_reason"] == "8 days since the last order, past 70 % of the usual 10"


def test_a_single_day_and_a_single_order_are_singular(tmp_path: Path):
    lake = lake_with(shop({"a": [(1, 500)], "b": steady(1, 1, 4)}), tmp_path, inconsistent_score=60)
    reasons = {who: row["priority_reason"] for who, row in by_customer(table_for(lake, "customer_priority", D)).items()}
    assert reasons == {"a": "Only 1 order so far", "b": "1 day since the last order, past 70 % of the usual 1"}


# ------------------------------------------------------------------------------------------------------------------ time

def test_orders_after_d_do_not_exist(tmp_path: Path):
    orders = orders_frame([("a", ago(5), 100), ("a", ago(-1), 900), ("b", ago(-1), 900)])
    row = only(table_for(lake_with(orders, tmp_path), "base_customers", D))
    assert (row["customer_id"], row["total_orders"], row["total_revenue"], row["last_order_date"]) == ("a", 1, 1.0, ago(5))


def test_a_past_date_is_rebuilt_the_same_after_newer_orders(tmp_path: Path):
    past = shop({name: visits for name, (visits, _) in QUEUE.items()})
    newer = pd.concat([past, orders_frame((customer, ago(-3), 5_000, f"n{customer}") for customer in QUEUE)])
    before, after = lake_with(past, tmp_path / "before"), lake_with(newer, tmp_path / "after")
    for table in ("base_customers", "retention_snapshot", "churn_detection", "customer_priority", "retention_daily"):
        frames = [table_for(lake, table, D).drop(columns="created_at", errors="ignore") for lake in (before, after)]
        assert plain_rows(frames[0]) == plain_rows(frames[1]), table


def test_the_latest_of_two_orders_on_a_day_is_by_order_id_as_text(tmp_path: Path):
    orders = orders_frame([("a", ago(5), 100, "o10"), ("a", ago(5), 200, "o9"), ("a", ago(9), 300, "z")])
    row = only(table_for(lake_with(orders, tmp_path), "base_customers", D))
    assert (row["last_order_cents"], row["total_orders"], row["order_days"]) == (200, 3, 2)


def test_a_leap_day_counts_as_a_day(tmp_path: Path):
    lake = lake_with(orders_frame([("a", date(2024, 1, 31), 100)]), tmp_path)
    rows = [only(table_for(lake, "retention_snapshot", date(2024, 3, day))) for day in (1, 2)]
    assert [(row["days_since_last_order"], row["retention_status"]) for row in rows] == [(30, "ACTIVE"), (31, "AT_RISK")]


# ------------------------------------------------------------------------------------------------------------------ shop

def test_daily_counts_and_shares(tmp_path: Path):
    lake = lake_with(shop({str(days): [(days, 1)] for days in (0, 30, 31, 90, 91, 200)}), tmp_path)
    assert plain_rows(table_for(lake, "retention_daily", D)) == [(D, 6, 2, 2, 2, 100 / 3, 100 / 3, 100 / 3)]
    assert plain_rows(table_for(lake, "retention_daily", ago(201))) == [(ago(201), 0, 0, 0, 0, None, None, None)]


def test_cohorts_are_a_full_triangle_up_to_the_newest_order(tmp_path: Path):
    orders = orders_frame([("a", date(2023, 11, 30), 1), ("a", date(2024, 2, 29), 1), ("b", date(2023, 11, 1), 1),
                           ("c", date(2024, 1, 31), 1)])
    rows = plain_rows(table_for(lake_with(orders, tmp_path), "cohort_retention_evolution", None))
    november, january = date(2023, 11, 1), date(2024, 1, 1)
    assert rows == [(november, 0, 2, 2, 100.0), (november, 1, 2, 0, 0.0), (november, 2, 2, 0, 0.0), (november, 3, 2, 1, 50.0),
                    (january, 0, 1, 1, 100.0), (january, 1, 1, 0, 0.0)]


# ----------------------------------------------------------------------------------------------------------------- alert

def alert(orders: pd.DataFrame, home: Path, d: date = D, complete_through: date = D, **overrides) -> dict:
    return only(table_for(lake_with(orders, home, complete_through=complete_through, **overrides), "alert_logic", d))


@pytest.mark.parametrize(("today", "severity"), [(10, "INFO"), (22, "INFO"), (23, "WARNING"), (24, "WARNING"), (25, "CRITICAL")])
def test_only_increases_alert_from_15_and_25_percent(today: int, severity: str, tmp_path: Path):
    row = alert(shop_with_at_risk_counts([20] * 7 + [today], 107, D), tmp_path)
    assert (row["severity"], row["alert_flag"], row["gate"]) == (severity, severity != "INFO", None)
    assert row["delta_relative_pct"] == pytest.approx(5 * today - 100, abs=1e-9)
    assert row["current_value"] == 100 * today / 107


def test_thresholds_are_settings_and_are_shown(tmp_path: Path):
    row = alert(shop_with_at_risk_counts([20] * 7 + [22], 107, D), tmp_path, warning_pct=10, critical_pct=12.5)
    assert (row["severity"], row["threshold_warning"], row["threshold_critical"]) == ("WARNING", 10.0, 12.5)


def test_the_baseline_is_the_seven_days_before_and_not_today(tmp_path: Path):
    row = alert(shop_with_at_risk_counts([60, 10, 11, 12, 13, 14, 15, 16, 40], 200, D), tmp_path)
    assert row["baseline_value"] == pytest.approx(6.5)
    assert row["delta_pct"] == pytest.approx(13.5)


def test_a_row_says_what_it_is_about(tmp_path: Path):
    row = alert(shop_with_at_risk_counts([20] * 8, 100, D), tmp_path)
    assert [row[name] for name in ("alert_date", "alert_type", "scope", "metric_name", "sample_size")] == [
        D, "retention_status_degradation", "global", "at_risk_pct", 100]


RISING = [20] * 7 + [40]


@pytest.mark.parametrize(("history", "customers", "counts", "late_load", "gate"), [
    (96, 99, [0] * 8, 1, "data_incomplete"),
    (96, 99, [0] * 8, 0, "history_warmup"),
    (97, 99, [0] * 8, 0, "baseline_warmup"),
    (97, 99, RISING, 0, "min_sample"),
    (97, 100, RISING, 0, None),
    (97, 100, RISING, 1, "data_incomplete"),
    (96, 100, RISING, 0, "history_warmup"),
    (97, 100, [0] * 7 + [9], 0, "baseline_warmup"),
])
def test_the_first_gate_in_the_contracts_order_holds_the_alert_back(
        history: int, customers: int, counts: list[int], late_load: int, gate: str | None, tmp_path: Path):
    orders = shop_with_at_risk_counts(counts, customers, D, history=history)
    orders = orders[orders["order_date"] < D].reset_index(drop=True)
    row = alert(orders, tmp_path, complete_through=ago(late_load))
    flagged = gate is None
    assert (row["gate"], row["alert_flag"], row["severity"]) == (gate, flagged, "CRITICAL" if flagged else "INFO")
    assert row["current_value"] == 100 * counts[-1] / customers


def test_no_customer_on_one_of_the_seven_days_leaves_no_baseline(tmp_path: Path):
    lake = lake_with(shop({"a": [(7, 100)], "b": [(0, 100)]}), tmp_path)
    history = of_rule(FIRST_RULE, alert_history(lake, ago(8), D))
    rows = plain_rows(history[["alert_date", "baseline_value", "current_value"]])
    assert rows == [(ago(8), None, None), *((ago(day), None, 0.0) for day in range(7, 0, -1)), (D, 0.0, 0.0)]


def test_the_history_in_one_pass_is_the_days_one_by_one(tmp_path: Path):
    lake = lake_with(shop_with_at_risk_counts([20, 21, 22, 26, 24, 23, 25, 30, 33, 36], 150, D), tmp_path, complete_through=D)
    together = plain_rows(alert_history(lake, ago(12), ago(-2)))
    assert together == [row for day in range(12, -3, -1) for row in plain_rows(table_for(lake, "alert_logic", ago(day)))]
