"""What the SQL computes, compared with the naive oracle: every column of every table, floats to the last bit.

Three kinds of shop: a small one on every date, the real retail orders on a spread of dates, and shops that hypothesis
builds out of customers who stand exactly on a rule's line.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from retention_ops.detect.compute import PRIORITY_ORDER, alert_history, table_for, workspace
from retention_ops.settings import Settings
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.lake import Lake
from retention_ops_tests import oracle
from retention_ops_tests.shops import (
    lake_with,
    orders_frame,
    refunded_shop,
    shop_with_at_risk_counts,
    small_shop,
    uci_orders,
    with_refunds,
)

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PER_DAY = {
    "base_customers": oracle.base_customers,
    "retention_snapshot": oracle.retention_snapshot,
    "churn_detection": oracle.churn_detection,
    "retention_daily": oracle.retention_daily,
    "customer_priority": oracle.customer_priority,
}


def differences_on(lake: Lake, orders: pd.DataFrame, d: date, tables: Sequence[str] = tuple(PER_DAY)) -> list[str]:
    """All differences as of D, each table computed on its own."""
    return [line for table in tables
            for line in oracle.differences(table, PER_DAY[table](orders, d, lake.settings), table_for(lake, table, d))]


def alert_differences(lake: Lake, orders: pd.DataFrame, from_day: date, to_day: date, complete_through: date) -> list[str]:
    expected = oracle.alert_history(orders, from_day, to_day, complete_through, lake.settings)
    return oracle.differences("alert_logic", expected, oracle.of_rule(oracle.FIRST_RULE, alert_history(lake, from_day, to_day)))


def cohort_differences(lake: Lake, orders: pd.DataFrame) -> list[str]:
    expected = oracle.cohort_retention_evolution(orders, lake.settings)
    return oracle.differences("cohort_retention_evolution", expected, table_for(lake, "cohort_retention_evolution", None))


# ------------------------------------------------------------------------------------------- a small shop, every date

@pytest.fixture(scope="module")
def orders() -> pd.DataFrame:
    return small_shop()


@pytest.fixture(scope="module")
def lake(orders: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return lake_with(orders, tmp_path_factory.mktemp("small"), min_sample=40)


def every_date(orders: pd.DataFrame) -> list[date]:
    """From the day before the first order to three days after the newest."""
    return oracle.dates(min(orders["order_date"]) - timedelta(1), max(orders["order_date"]) + timedelta(3))


@pytest.fixture(scope="module")
def computed(lake: Lake, orders: pd.DataFrame) -> dict[tuple[str, date], pd.DataFrame]:
    """(table, date) -> rows, computed as a range run does: one workspace, each table building on the one before."""
    frames = {}
    with workspace(lake) as space:
        for day in every_date(orders):
            for table in PER_DAY:
                space.build(table, day)
                frames[table, day] = space.rows(table, PRIORITY_ORDER if table == "customer_priority" else None)
    return frames


@pytest.mark.parametrize("table", PER_DAY)
def test_every_date_of_a_small_shop(table: str, computed: dict, lake: Lake, orders: pd.DataFrame):
    assert [line for day in every_date(orders)
            for line in oracle.differences(table, PER_DAY[table](orders, day, lake.settings), computed[table, day])] == []


def test_some_dates_of_a_small_shop_each_table_on_its_own(lake: Lake, orders: pd.DataFrame):
    assert [line for day in every_date(orders)[::20] for line in differences_on(lake, orders, day)] == []


def test_every_alert_of_a_small_shop_in_one_pass(lake: Lake, orders: pd.DataFrame):
    days = every_date(orders)
    assert alert_differences(lake, orders, days[0], days[-1], max(orders["order_date"])) == []


@pytest.mark.parametrize("count", [30, pytest.param(80, marks=pytest.mark.slow)])
def test_every_alert_of_a_small_shop_day_by_day(lake: Lake, orders: pd.DataFrame, count: int):
    days = every_date(orders)[-count:]
    one_by_one = pd.concat([table_for(lake, "alert_logic", day) for day in days], ignore_index=True)
    expected = oracle.alert_history(orders, days[0], days[-1], max(orders["order_date"]), lake.settings)
    assert oracle.differences("alert_logic", expected, oracle.of_rule(oracle.FIRST_RULE, one_by_one)) == []


def test_the_second_rules_alerts_are_its_rows(lake: Lake, orders: pd.DataFrame):
    """A row of each rule for every date; those of the second are returning_customers, column by column."""
    days = every_date(orders)
    with workspace(lake) as space:
        space.build_range("alert_logic", days[0], days[-1])
        alerts, rows = space.rows("alert_logic"), space.rows("returning_customers")
    assert list(alerts.columns) == list(rows.columns)
    second = oracle.of_rule(oracle.SECOND_RULE, alerts)
    assert oracle.plain_rows(second) == oracle.plain_rows(rows) and len(rows) == len(days)
    first = oracle.of_rule(oracle.FIRST_RULE, alerts)
    assert len(first) == len(days) == len(alerts) / 2
    assert {row[-oracle.DETAILS:] for row in oracle.plain_rows(first)} == {(None,) * oracle.DETAILS}
    assert all(set(second[name]) - {None} for name in second.columns[-oracle.DETAILS:])


def test_cohorts_of_a_small_shop(lake: Lake, orders: pd.DataFrame):
    assert cohort_differences(lake, orders) == []


def test_the_small_shop_is_worth_comparing(lake: Lake, orders: pd.DataFrame):
    """It has alerts of both severities, every gate a growing shop can meet, every tier and every kind of reason."""
    days = every_date(orders)
    alerts = oracle.alert_history(orders, days[0], days[-1], max(orders["order_date"]), lake.settings)
    assert set(alerts["severity"]) == {"INFO", "WARNING", "CRITICAL"}
    assert {"data_incomplete", "history_warmup", None} <= set(alerts["gate"])
    queue = pd.concat([oracle.customer_priority(orders, day, lake.settings) for day in days])
    assert set(queue["priority_tier"]) == {"P1", "P2", "P3"}
    reasons = "\n".join(queue["priority_reason"])
    assert all(words in reasons for words in ("No order for", "last order", "Last order", "only 2 orders so far"))


# ---------------------------------------------------------------------------------------------------- the real orders

@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Lake]:
    """Online Retail 2010-2011: the naive reading and the lake that `ingest` made of the same file."""
    path = REAL_DATA / "uci_online_retail.parquet"
    if not path.is_file():
        pytest.skip("the real orders are not here: put uci_online_retail.parquet into ../shared/data beside the repository")
    chosen = Settings(_env_file=None, home=tmp_path_factory.mktemp("real"))
    ingest([path], "uci-online-retail", chosen)
    return uci_orders(path), Lake(chosen)


REAL_DATES = [date(2010, 12, 1), date(2010, 12, 31), date(2011, 1, 31), date(2011, 2, 28), date(2011, 3, 8), date(2011, 4, 23),
              date(2011, 5, 31), date(2011, 7, 1), date(2011, 8, 15), date(2011, 9, 30), date(2011, 11, 11), date(2011, 12, 9)]


def test_real_invoices_become_the_same_orders(real: tuple[pd.DataFrame, Lake]):
    orders, lake = real
    ingested = lake.read("orders", lake.orders().version)[oracle.columns_of("orders")]
    assert oracle.differences("orders", orders, ingested) == []


@pytest.mark.parametrize("d", REAL_DATES, ids=str)
def test_real_orders(real: tuple[pd.DataFrame, Lake], d: date):
    orders, lake = real
    assert differences_on(lake, orders, d) == []


def test_real_alerts_on_every_date(real: tuple[pd.DataFrame, Lake]):
    orders, lake = real
    first, last = min(orders["order_date"]), max(orders["order_date"])
    assert alert_differences(lake, orders, first - timedelta(10), last + timedelta(10), last) == []


def test_real_cohorts(real: tuple[pd.DataFrame, Lake]):
    orders, lake = real
    assert cohort_differences(lake, orders) == []


# --------------------------------------------------------------------------- hypothesis: customers on the rules' lines

# An example costs an ingest and a few queries, so there are few, each with many customers. They are not shrunk: that took
# a minute, and a difference already names the customer, the column and both values.
PATIENT = {"deadline": None, "derandomize": True, "phases": [Phase.explicit, Phase.generate],
           "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
LEAP_DAY = date(2024, 2, 29)
AS_OF = st.one_of(st.sampled_from([LEAP_DAY, date(2024, 3, 1), date(2023, 12, 31), date(2024, 1, 31), date(2023, 2, 28)]),
                  st.dates(date(2022, 1, 1), date(2024, 6, 30)))
CENTS = st.one_of(st.integers(1, 300), st.sampled_from([99_999, 100_000, 100_001, 200_000, 200_001]), st.integers(1, 5_000_000))
Visits = list[tuple[int, int]]  # (days before D, cents); negative days lie after D


def visits_with_gap(days: int, gaps: Sequence[int], cents: int) -> Visits:
    """Shopping days `gaps` apart, the last one `days` before D."""
    visits = [(days, cents)]
    for gap in gaps:
        visits.append((visits[-1][0] + gap, cents))
    return visits


@st.composite
def on_a_gap_line(draw: st.DrawFn) -> Visits:
    """Days since the last order are exactly 1.5 or 0.7 of the usual gap, or one day to either side."""
    numerator, denominator = draw(st.sampled_from([(3, 2), (7, 10)]))
    shopping_gaps = draw(st.integers(1, 4))
    unit = draw(st.integers(1, 9))
    span = denominator * shopping_gaps * unit
    cuts = sorted(draw(st.lists(st.integers(1, span - 1), min_size=shopping_gaps - 1, max_size=shopping_gaps - 1, unique=True)))
    gaps = [after - before for before, after in zip([0, *cuts], [*cuts, span], strict=True)]
    days = numerator * unit + draw(st.sampled_from([0, 0, 1, -1]))
    return visits_with_gap(days, gaps, draw(CENTS))


@st.composite
def on_the_value_line(draw: st.DrawFn) -> Visits:
    """The last order is exactly 0.6 of the average, or a cent to either side: 5 * last * n = 3 * sum."""
    n, unit = draw(st.integers(2, 6)), draw(st.integers(1, 900))
    last = 3 * unit * (n - 1) + draw(st.sampled_from([0, 0, 1, -1]))
    others = unit * (5 * n - 3)  # each of the n - 1 earlier orders
    days, gap = draw(st.integers(0, 185)), draw(st.integers(1, 40))
    return [(days, max(1, last)), *visits_with_gap(days + gap, [gap] * (n - 2), others)]


@st.composite
def on_a_status_line(draw: st.DrawFn) -> Visits:
    """The last order is as old as a status or tier limit of some profile, or a day more; frequent and then silent."""
    limit = draw(st.sampled_from([15, 30, 45, 60, 90, 180, 360]))
    days = limit + draw(st.integers(0, 1))
    return visits_with_gap(days, draw(st.lists(st.integers(1, 25), max_size=4)), draw(CENTS))


@st.composite
def on_a_rounding_line(draw: st.DrawFn) -> Visits:
    """AT_RISK with numbers that end in a half: the usual gap, the % below average, or the average order in cents."""
    days, gap = draw(st.integers(31, 90)), draw(st.integers(1, 20))
    half_percent, unit = 2 * draw(st.integers(0, 58)) + 1, draw(st.integers(1, 50))
    last = half_percent * unit
    return draw(st.sampled_from([
        visits_with_gap(days, [gap, gap + 1], unit),
        [(days, last), (days + gap, 400 * unit - last)],
        [(days, unit), (days + gap, unit + 1)],
    ]))


ANY_VISITS = st.lists(st.tuples(st.integers(-40, 400), CENTS), min_size=1, max_size=7)
SAME_DAYS = st.lists(st.tuples(st.sampled_from([0, 1, 31, 32, 33]), CENTS), min_size=2, max_size=7)
ONE_ORDER = st.lists(st.tuples(st.integers(0, 200), CENTS), min_size=1, max_size=1)
CUSTOMER = st.one_of(on_a_gap_line(), on_the_value_line(), on_a_status_line(), on_a_rounding_line(),
                     ANY_VISITS, SAME_DAYS, ONE_ORDER)
RULES = [
    {"profile": "fast_fashion", "p1_min_revenue": "median"},
    {"profile": "luxury", "few_orders": 5, "value_proxy_pct": 33},
    {"inconsistent_score": 60, "p1_min_revenue": "median"},  # few orders, or past 0.7 of the gap, are enough for P1
    {"inconsistent_score": 60, "few_orders": 1},
    {"inconsistent_score": 60, "few_orders": 0, "inconsistent_gap_pct": 40},
    {"medium_risk_score": 30, "high_risk_score": 50, "value_proxy_pct": 0},  # levels that a score can hit exactly
    {"medium_risk_score": 20, "high_risk_score": 30, "value_drop_pct": 90, "value_proxy_pct": 15},
    {"frequency_drop_pct": 100, "few_orders": 1, "high_risk_score": 50, "vip_revenue": 100, "personal_revenue": 3},
    {"active_days": 64, "at_risk_days": 96},  # urgency in 64ths: halves at the fourth decimal
]


def shop_of(people: Sequence[Visits], d: date, seed: int) -> pd.DataFrame:
    """Customers c0, c1, ... with the given visits; order ids are scattered so that their order is not the dates'."""
    rows = [(f"c{number}", d - timedelta(days), cents) for number, visits in enumerate(people) for days, cents in visits]
    return orders_frame((*row, f"{(place * 7919 + seed) % 100_003}") for place, row in enumerate(rows))


@settings(max_examples=10, **PATIENT)
@given(people=st.lists(CUSTOMER, min_size=25, max_size=40), d=AS_OF, seed=st.integers(0, 10_000), turn=st.integers(0, 8))
def test_customers_on_every_line(tmp_path_factory: pytest.TempPathFactory, people: list[Visits], d: date, seed: int, turn: int):
    orders = shop_of(people, d, seed)
    lake = lake_with(orders, tmp_path_factory.mktemp("lines"))
    assert differences_on(lake, orders, d) == []
    assert cohort_differences(lake, orders) == []
    for rules in (RULES[turn], RULES[turn - 3], RULES[turn - 6]):
        other = Lake(Settings(_env_file=None, home=lake.settings.home, **rules))
        assert differences_on(other, orders, d, ["churn_detection", "retention_daily", "customer_priority"]) == [], rules


@settings(max_examples=3, **PATIENT)
@given(people=st.lists(CUSTOMER, min_size=25, max_size=40), d=AS_OF, seed=st.integers(0, 10_000), turn=st.integers(0, 8))
def test_customers_whom_refunds_put_on_every_line(tmp_path_factory: pytest.TempPathFactory, people: list[Visits], d: date, seed: int,
                                                  turn: int):
    """On D each is worth what the shop without refunds has; the day after, and the day before, refunds move them."""
    orders = refunded_shop(shop_of(people, d, seed), d, seed)
    lake = lake_with(orders, tmp_path_factory.mktemp("refunds"), **RULES[turn])
    for day in (d, d + timedelta(1), d - timedelta(1)):
        assert differences_on(lake, orders, day, ["base_customers", "churn_detection", "customer_priority"]) == []


@pytest.mark.parametrize("ago", [0, 40])
def test_a_refunded_order_stays_a_visit_of_its_day(tmp_path: Path, ago: int):
    """168,472 ordered and 3 left of it: not the shop's fourth customer any more, but one who came."""
    d = date(2024, 6, 30)
    plain = orders_frame([("rich", d - timedelta(60), 16_846_900, "r1"), ("rich", d - timedelta(40), 300, "r2"), ("other", d, 5_000, "o1")])
    refunded = with_refunds(plain, {"r1": [(d - timedelta(ago), 16_846_900)]})
    lake = lake_with(refunded, tmp_path / "refunded")
    without = lake_with(plain, tmp_path / "plain")
    assert differences_on(lake, refunded, d) == []
    facts, before = (table_for(home, "base_customers", d).set_index("customer_id").loc["rich"] for home in (lake, without))
    assert (facts["total_revenue"], before["total_revenue"]) == (3.0, 168_472.0)
    same = ["first_order_date", "last_order_date", "total_orders", "order_days"]
    assert facts[same].tolist() == before[same].tolist()
    for table in ("retention_daily", "cohort_retention_evolution"):
        pd.testing.assert_frame_equal(table_for(lake, table, d), table_for(without, table, d))
    pd.testing.assert_frame_equal(alert_history(lake, d, d), alert_history(without, d, d))


@pytest.mark.slow
@settings(max_examples=12, **PATIENT)
@given(visits=CUSTOMER, d=AS_OF, ahead=st.sampled_from([0, 1, 500]))
@example(visits=[(0, 1)], d=LEAP_DAY, ahead=0)
@example(visits=[(0, 1)], d=LEAP_DAY, ahead=1)
def test_a_shop_of_one_customer_also_before_the_first_order(tmp_path_factory: pytest.TempPathFactory, visits: Visits, d: date,
                                                            ahead: int):
    orders = shop_of([visits], d, 0)
    lake = lake_with(orders, tmp_path_factory.mktemp("one"), min_sample=0)
    as_of = d - timedelta(ahead)
    assert differences_on(lake, orders, as_of) == []
    assert alert_differences(lake, orders, as_of, as_of, max(orders["order_date"])) == []


@st.composite
def at_risk_counts(draw: st.DrawFn) -> tuple[list[int], int]:
    """AT_RISK counts of 12 days, the 8th standing exactly 15 or 25 % above the mean of the first seven (or one beside)."""
    usual, swings = draw(st.sampled_from([20, 40, 60])), draw(st.lists(st.integers(0, 6), min_size=3, max_size=3))
    around = draw(st.permutations([0, *swings, *(-swing for swing in swings)]))
    counts = [usual + swing for swing in around]
    counts.append(usual * draw(st.sampled_from([115, 125])) // 100 + draw(st.sampled_from([0, 0, 1, -1])))
    for step in draw(st.lists(st.integers(-3, 12), min_size=4, max_size=4)):
        counts.append(max(1, counts[-1] + step))
    return counts, draw(st.integers(sum(counts), sum(counts) + 700))


@settings(max_examples=20, **PATIENT)
@given(shop=at_risk_counts(), end=AS_OF, held_back=st.integers(0, 5), min_sample=st.sampled_from([0, 100, 500]))
def test_increases_of_exactly_15_and_25_percent(tmp_path_factory: pytest.TempPathFactory, shop: tuple[list[int], int], end: date,
                                                held_back: int, min_sample: int):
    counts, customers = shop
    orders = shop_with_at_risk_counts(counts, customers, end)
    complete = end - timedelta(held_back)
    lake = lake_with(orders, tmp_path_factory.mktemp("alert"), complete_through=complete, min_sample=min_sample)
    assert alert_differences(lake, orders, end - timedelta(len(counts) - 1), end, complete) == []


@pytest.mark.parametrize(("current", "severity"), [(23, "WARNING"), (25, "CRITICAL"), (22, "INFO"), (24, "WARNING")])
def test_a_percentage_on_the_line_counts_whatever_the_sample(tmp_path: Path, current: int, severity: str):
    """Samples at which the float of an exact +15 % (23 over 20) or +25 % (25 over 20) lands just below the line."""
    end = date(2024, 6, 30)
    below = [n for n in range(100, 300) if is_below(current, n)][:3] or [137]
    for n in below:
        orders = shop_with_at_risk_counts([20] * 7 + [current], n, end)
        lake = lake_with(orders, tmp_path / str(n), complete_through=end)
        alerts = oracle.of_rule(oracle.FIRST_RULE, table_for(lake, "alert_logic", end))
        assert alerts["severity"].tolist() == [severity]
        assert alert_differences(lake, orders, end, end, end) == []


def is_below(current: int, customers: int) -> bool:
    """The float of the relative increase over a steady 20 is below the exact value."""
    baseline = oracle.baseline_of([oracle.share(20, customers)] * 7)
    return oracle.relative_change(oracle.share(current, customers), baseline) < 5 * current - 100


def test_customer_attributes_come_along(tmp_path: Path):
    people = pd.DataFrame({"customer_id": ["a", "nobody"], "country": ["FR", "DE"], "segment": ["new", "old"],
                           "loyalty_tier": ["gold", ""], "acquisition_channel": ["ads", "mail"],
                           "signup_date": [date(2024, 2, 29), date(2024, 1, 1)], "consent": ["true", "false"]})
    orders = orders_frame([("a", date(2024, 3, 1), 100), ("b", date(2024, 3, 2), 100)])
    lake = lake_with(orders, tmp_path, customers=people)
    d = date(2024, 3, 2)
    expected = oracle.base_customers(orders, d, lake.settings, people)
    assert oracle.differences("base_customers", expected, table_for(lake, "base_customers", d)) == []


@pytest.mark.parametrize("held_back", [-5, 0, 1, 3])
def test_complete_through_decides_the_first_gate(tmp_path: Path, held_back: int):
    orders = shop_with_at_risk_counts([20] * 7 + [40] * 3, 150, date(2024, 6, 30))
    complete = date(2024, 6, 30) - timedelta(held_back)
    lake = lake_with(orders, tmp_path, complete_through=complete)
    assert alert_differences(lake, orders, date(2024, 6, 20), date(2024, 7, 10), complete) == []
