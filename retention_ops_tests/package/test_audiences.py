"""Who is on a list and who is not: holdout, cooldown, the order of the reasons, and what a destination may be told."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from datetime import date, timedelta

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from retention_ops.errors import PackError
from retention_ops.package.audiences import (
    ALLOWED_COLUMNS,
    COLUMNS,
    TIERS,
    LeftOut,
    allowed_table,
    arm,
    audience_sha256,
    build_audience,
    build_audiences,
    cooldown_reason,
    holdout_pct,
    in_holdout,
)
from retention_ops.settings import Settings
from retention_ops.warehouse.catalog import TABLES

D = date(2026, 6, 30)
MANY = [f"C-{number}" for number in range(20_000)]
ids = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
salts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)


def queue(*customers: str, tier: str = "P1") -> pd.DataFrame:
    """Rows of customer_priority for these customers, in this order."""
    return pd.DataFrame({
        "run_date": pd.Timestamp(D), "customer_id": list(customers), "retention_status": "ACTIVE", "churn_risk_level": "HIGH",
        "churn_risk_score": 70, "priority_tier": tier, "priority_score": 94.5106, "priority_reason": "No order for 24 days",
        "days_since_last_order": 24, "total_revenue": 3847.0, "total_orders": 32, "avg_order_value": 120.22,
        "recommended_action": "Personal email + reminder", "value_proxy": 1154.1, "created_at": pd.Timestamp("2026-07-01T04:00:00Z"),
        "usual_spend_90d": 412.3, "p_no_return_90d": 0.701234, "spend_at_stake": 289.12, "at_stake_reason": "7 of 10 customers this late",
    }, columns=TABLES["customer_priority"].column_names)


def rows_of(audience) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(audience.csv, newline="")))


# --- holdout ---


@given(ids, st.integers(0, 50), salts)
def test_the_same_customer_is_always_in_the_same_arm(customer, pct, salt):
    settings = Settings(_env_file=None, mode="live", holdout_pct=pct, holdout_salt=salt)
    assert arm(customer, settings) == arm(customer, settings.model_copy()) == ("holdout" if in_holdout(customer, pct, salt) else "treated")


@given(ids, st.integers(0, 100), st.integers(0, 100), salts)
def test_a_larger_holdout_keeps_everybody_who_was_in_it(customer, one, other, salt):
    low, high = sorted((one, other))
    assert in_holdout(customer, high, salt) or not in_holdout(customer, low, salt)
    assert not in_holdout(customer, 0, salt) and in_holdout(customer, 100, salt)


@hypothesis_settings(max_examples=15, deadline=None)
@given(st.integers(1, 50), salts)
def test_the_share_held_out_is_the_share_asked_for(pct, salt):
    share = pct / 100
    held_out = sum(in_holdout(customer, pct, salt) for customer in MANY)
    assert abs(held_out - share * len(MANY)) < 6 * math.sqrt(len(MANY) * share * (1 - share))


def test_another_salt_draws_another_holdout():
    one, other = ({customer for customer in MANY if in_holdout(customer, 10, salt)} for salt in ("holdout-1", "holdout-2"))
    assert 0.005 < len(one & other) / len(MANY) < 0.015, "independent draws share 1 % of the customers"


def test_the_draw_is_written_down():
    """HMAC-SHA256 under the salt, first 8 bytes as a share of 2**64: changing this would move customers between the arms."""
    assert [customer for customer in MANY[:30] if in_holdout(customer, 10, "holdout-1")] == ["C-1", "C-21"]


@pytest.mark.parametrize(("mode", "pct"), [("off", 0), ("shadow", 0), ("pilot", 0), ("live", 10)])
def test_only_live_holds_anybody_out(mode, pct):
    settings = Settings(_env_file=None, mode=mode)
    assert holdout_pct(settings) == pct
    assert ("holdout" in {arm(customer, settings) for customer in MANY}) == bool(pct)


# --- reasons ---


def naive(day, customers, refused, suppressed, held_out, handed_over, cooldown):
    """The same, as one would say it: each reason takes its customers from those who are left."""
    left, counts = list(customers), {}
    earlier = {customer: last for customer, last in handed_over.items() if last < day}
    cooling = {customer for customer, last in earlier.items() if (day - last).days <= cooldown}
    for reason, who in (("no consent", refused), ("suppressed", suppressed), ("holdout", held_out),
                        (cooldown_reason(cooldown), cooling)):
        taken = [customer for customer in left if customer in who]
        left = [customer for customer in left if customer not in who]
        if taken:
            counts[reason] = len(taken)
    return left, counts, [customer not in earlier for customer in left], [str(earlier.get(customer, "")) for customer in left]


some = st.sets(st.integers(0, 19).map(lambda number: f"c{number}"))


@hypothesis_settings(max_examples=200, deadline=None)
@given(some, some, some, st.dictionaries(st.integers(0, 19).map(lambda number: f"c{number}"), st.integers(-5, 40)),
       st.integers(0, 30), st.integers(0, 50))
def test_each_customer_is_left_out_once_for_the_first_reason(listed, refused, suppressed, ago, cooldown, pct):
    customers = sorted(listed)
    handed_over = {customer: D - timedelta(days=days) for customer, days in ago.items()}
    left_out = LeftOut(refused=refused, suppressed=suppressed, holdout_pct=pct, holdout_salt="s", handed_over=handed_over,
                       cooldown_days=cooldown)
    audience = build_audience("P1", D, queue(*customers), left_out)
    held_out = {customer for customer in customers if in_holdout(customer, pct, "s")}
    expected, counts, new, last = naive(D, customers, refused, suppressed, held_out, handed_over, cooldown)
    rows = rows_of(audience)
    assert list(audience.treated_ids) == expected == [row["customer_id"] for row in rows]
    assert list(audience.excluded.items()) == list(counts.items())
    assert [row["new_since_handover"] == "true" for row in rows] == new and audience.new == sum(new)
    assert [row["last_handed_over"] for row in rows] == last
    assert audience.rows + sum(audience.excluded.values()) == audience.listed == len(customers)
    assert set(audience.holdout_ids) == held_out - refused - suppressed


@pytest.mark.parametrize(("days_before", "cools"), [(1, True), (14, True), (15, False), (0, False), (-3, False)])
def test_the_cooldown_counts_earlier_dates_and_never_the_date_itself(days_before, cools):
    last = D - timedelta(days=days_before)
    audience = build_audience("P1", D, queue("c1", "c2"), LeftOut(handed_over={"c1": last}, cooldown_days=14))
    assert audience.excluded == ({"handed over in the last 14 days": 1} if cools else {})
    assert ("c1" in audience.treated_ids) is not cools


def test_no_cooldown_lists_everybody_and_says_who_is_not_new():
    audience = build_audience("P1", D, queue("c1", "c2"), LeftOut(handed_over={"c1": D - timedelta(1)}))
    assert [(row["new_since_handover"], row["last_handed_over"]) for row in rows_of(audience)] == [("false", "2026-06-29"), ("true", "")]
    assert audience.new == 1


@pytest.mark.parametrize("change", [
    {"refused": {"c1"}}, {"suppressed": {"c1"}}, {"holdout_pct": 100, "holdout_salt": "s"},
    {"handed_over": {"c1": D - timedelta(1)}, "cooldown_days": 3}, {"handed_over": {"c1": D - timedelta(40)}, "cooldown_days": 3},
])
def test_whatever_changes_a_list_changes_its_hash(change):
    frame = queue("c1", "c2")
    assert audience_sha256(build_audiences(D, frame, LeftOut(**change))) != audience_sha256(build_audiences(D, frame, LeftOut()))


@pytest.mark.parametrize("left_out", [LeftOut(), LeftOut(handed_over={"c1": D, "c2": D + timedelta(3)}, cooldown_days=14)])
def test_handing_over_the_date_itself_or_a_later_one_leaves_its_lists_as_they_were(left_out):
    frame = queue("c1", "c2")
    assert audience_sha256(build_audiences(D, frame, left_out)) == audience_sha256(build_audiences(D, frame, LeftOut()))


def test_an_empty_list_still_has_its_header():
    audience = build_audience("P2", D, queue("c1"), LeftOut())
    assert audience.csv.count("\r\n") == 1 and audience.rows == audience.listed == 0 and audience.treated_ids == ()
    assert allowed_table(audience, "sheets") == (COLUMNS, [])


# --- what leaves ---


def test_a_list_has_every_column_of_the_queue_and_new_ones_come_last():
    assert COLUMNS[:17] == [
        "run_date", "customer_id", "retention_status", "churn_risk_level", "churn_risk_score", "priority_tier", "priority_score",
        "priority_reason", "days_since_last_order", "total_revenue", "total_orders", "avg_order_value", "recommended_action",
        "value_proxy", "created_at", "new_since_handover", "last_handed_over"], "whoever reads by position goes on as before"
    assert COLUMNS[17:] == ["usual_spend_90d", "p_no_return_90d", "spend_at_stake", "at_stake_reason"]
    assert {*TABLES["customer_priority"].column_names, "new_since_handover", "last_handed_over"} == set(COLUMNS)


def test_what_is_at_stake_goes_to_the_sheet_and_the_file_and_nowhere_else():
    assert {name for name, columns in ALLOWED_COLUMNS.items() if set(columns) & set(COLUMNS[17:])} == {"sheets", "local"}
    frame = queue("c1", "c2").assign(spend_at_stake=[289.1249, None], at_stake_reason=["=7 of 10", None])
    audience = build_audience("P1", D, frame, LeftOut())
    first, second = rows_of(audience)
    assert [first[name] for name in COLUMNS[17:]] == ["412.30", "0.7012", "289.12", "'=7 of 10"]
    assert (second["spend_at_stake"], second["at_stake_reason"]) == ("", "")
    _, rows = allowed_table(audience, "sheets")
    assert [row[-4:] for row in rows] == [[412.3, 0.7012, 289.12, "'=7 of 10"], [412.3, 0.7012, "", ""]]


@pytest.mark.parametrize("column", COLUMNS[17:])
def test_what_is_at_stake_is_part_of_the_lists_hash(column):
    frame = queue("c1", "c2")
    other = frame.assign(**{column: ["another", None] if column == "at_stake_reason" else [0.25, None]})
    assert audience_sha256(build_audiences(D, frame, LeftOut())) != audience_sha256(build_audiences(D, other, LeftOut()))


@pytest.mark.parametrize("destination", ALLOWED_COLUMNS)
def test_a_column_nobody_allowed_reaches_no_destination(destination):
    frame = queue("c1", "c2").assign(email="canary@example.com", country="Canaryland")
    audiences = build_audiences(D, frame, LeftOut(handed_over={"c1": D - timedelta(40)}))
    for tier in TIERS:
        columns, rows = allowed_table(audiences[tier], destination)
        assert columns == list(ALLOWED_COLUMNS[destination]) and len(rows) == (audiences[tier].rows if columns else 0)
        assert "canary" not in repr((columns, rows)).lower() and "canary" not in audiences[tier].csv.lower()


def test_slack_tickets_and_webhook_are_told_about_no_single_customer():
    audience = build_audience("P1", D, queue("c1"), LeftOut())
    assert all(allowed_table(audience, name) == ([], []) for name in ("slack", "ticket", "webhook", "mail"))


def test_a_destination_nobody_listed_gets_nothing():
    with pytest.raises(PackError, match="'fax' has no list of allowed columns"):
        allowed_table(build_audience("P1", D, queue("c1"), LeftOut()), "fax")


def test_numbers_stay_numbers_and_texts_are_as_in_the_file():
    frame = queue("=cmd()", "c2").assign(total_revenue=[3847.004, float("nan")])
    audience = build_audience("P1", D, frame, LeftOut(handed_over={"c2": date(2026, 5, 1)}))
    columns, rows = allowed_table(audience, "sheets")
    first, second = (dict(zip(columns, row, strict=True)) for row in rows)
    assert first["customer_id"] == "'=cmd()" and first["run_date"] == "2026-06-30"
    assert (first["total_revenue"], first["total_orders"], first["priority_score"]) == (3847.0, 32, 94.5106)
    assert (second["total_revenue"], second["last_handed_over"], second["new_since_handover"]) == ("", "2026-05-01", "false")
    assert {type(cell) for row in rows for cell in row} == {str, int, float}
    in_file = rows_of(audience)
    assert all(float(in_file[0][name]) == first[name] for name, cell in first.items() if not isinstance(cell, str))
    assert Counter(in_file[1].values())[""] == 1, "only the missing value is empty"
