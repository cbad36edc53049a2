"""A backtest's losses are what they say, the rules answer as they would in production, and what is counted is counted right."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from random import Random
from types import SimpleNamespace

import duckdb
import numpy as np
import pandas as pd
import pytest

from retention_ops.cli import main
from retention_ops.detect import backtest as measuring
from retention_ops.detect.backtest import Period, Plan, RealDays
from retention_ops.detect.compute import Workspace, workspace
from retention_ops.detect.injections import (
    DECLINE,
    KINDS,
    LATE,
    PARTIAL,
    SEGMENT,
    InjectedOrders,
    Loss,
    injected_orders,
    outage,
    rings_from,
)
from retention_ops.detect.observers import cusum, episode_starts, ewma, ideal_observer, surprises
from retention_ops.errors import NoOrders, UsageError
from retention_ops.package.backtest_chart import delay_chart, trade_off_chart
from retention_ops.package.backtest_report import env_lines, markdown, verdict
from retention_ops.settings import Settings
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.detect.test_against_oracle import REAL_DATA
from retention_ops_tests.oracle import dates
from retention_ops_tests.shops import lake_with, write_big_shop

START = date(2025, 3, 3)
LAST = date(2025, 12, 31)
CLOSURES = Path(__file__).resolve().parents[2] / "docs" / "online_retail_closures.csv"
"""when the shop of the real orders was closed, as docs/alert_quality.md tells the command"""


def close(space: Workspace, days: list[date]) -> None:
    rows = ", ".join(f"(DATE '{day}', 'holiday')" for day in days)
    space.replace("VIEW", "closed_days", f"SELECT * FROM (VALUES {rows}) AS t(closed_date, reason)")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Some 9,000 orders of three years, customers with a country and a segment."""
    folder = tmp_path_factory.mktemp("shop")
    write_big_shop(folder / "orders.parquet", 450)
    settings = Settings(_env_file=None, home=folder / "home", duckdb_threads=1)
    ingest([folder / "orders.parquet"], "orders", settings)
    return Lake(settings)


@contextmanager
def injecting(lake: Lake, first: date = START, last: date = LAST) -> Iterator[InjectedOrders]:
    with injected_orders(lake) as space:
        space.measured(lake.orders().first_date, last)
        space.prepare(first, last)
        yield space


def every_row(space: Workspace, table: str, first: date, last: date) -> pd.DataFrame:
    """All columns of a rule's rows, built anew."""
    space._built.clear()
    space.build_range(table, first, last)
    return space.connection.sql(f"FROM {table} ORDER BY ALL").df()


# -- a loss is what it would be had the orders never come in -----------------------------------------------------------


@pytest.mark.parametrize("kind", [
    *(pytest.param(kind, id=kind.name) for kind in (outage(50), SEGMENT, PARTIAL)),
    *(pytest.param(kind, id=kind.name, marks=pytest.mark.slow) for kind in (outage(10), outage(100), DECLINE, LATE)),
])
@pytest.mark.parametrize("start", [START, pytest.param(date(2025, 11, 20), marks=pytest.mark.slow)])
def test_an_injected_loss_is_what_the_rules_say_of_orders_without_the_lost_ones(shop, tmp_path, kind, start):
    loss = Loss(kind, start, seed=5)
    with injecting(shop) as space:
        lost = space.lost_orders(loss, space.segments())
        gone = {order for (order,) in space.connection.execute(
            f"SELECT order_id FROM later_orders WHERE order_date BETWEEN ? AND ? AND {lost}", [loss.start, loss.last]).fetchall()}
        left = space.inject(loss, lost)
        injected = {table: every_row(space, table, loss.start, loss.last) for table in ("alert_logic", "returning_customers")}
        everything = space.connection.sql("SELECT order_id, customer_id, order_date, order_cents, currency FROM orders").df()
    assert gone, "a loss that loses nothing proves nothing"
    everything["order_date"] = [moment.date() for moment in everything["order_date"]]
    kept = everything[~everything["order_id"].isin(gone)]
    through = LAST if kind.loaded else loss.start - timedelta(1)
    if not kind.loaded:  # what is not in is not in
        kept = kept[kept["order_date"] <= through]
    for day, count in zip(dates(loss.start, loss.last), left, strict=True):
        assert count == (kept["order_date"] == day).sum()
    plain = lake_with(kept.astype(object), tmp_path / "home", through)
    with workspace(plain) as space:
        for table, rows in injected.items():
            pd.testing.assert_frame_equal(rows, every_row(space, table, loss.start, loss.last), check_exact=True)


def test_one_loss_leaves_nothing_behind_for_the_next(shop):
    first, second = Loss(outage(70), date(2025, 6, 2), 1), Loss(LATE, date(2025, 4, 1), 2)
    with injecting(shop) as space:
        alone = space.inject(second, space.lost_orders(second, [])), *space.measured(second.start, second.last)
    with injecting(shop) as space:
        space.inject(first, space.lost_orders(first, []))
        space.measured(first.start, first.last)
        after = space.inject(second, space.lost_orders(second, [])), *space.measured(second.start, second.last)
    for one, other in zip(alone, after, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("kind", "share"), [(outage(10), 10), (outage(50), 50), (SEGMENT, 33), (DECLINE, 26)],
                         ids=lambda value: getattr(value, "name", str(value)))
def test_about_so_many_orders_are_lost(shop, kind, share):
    lost = total = 0
    with injecting(shop) as space:
        for seed in range(8):
            loss = Loss(kind, START + timedelta(20 * seed), seed)
            whole = space.connection.execute(
                "SELECT COUNT(*) FROM later_orders WHERE order_date BETWEEN ? AND ?", [loss.start, loss.last]).fetchone()[0]
            lost, total = lost + whole - space.inject(loss, space.lost_orders(loss, [])).sum(), total + whole
    assert abs(100 * lost / total - share) < 5


def test_a_load_that_is_late_is_held_back(shop):
    loss = Loss(LATE, START, 1)
    with injecting(shop) as space:
        space.inject(loss, space.lost_orders(loss, []))
        rows = every_row(space, "returning_customers", loss.start, loss.last)
        assert set(rows["gate"]) == {"data_incomplete"}
        assert all(np.isnan(values).all() for values in space.measured(loss.start, loss.last))


def test_a_segment_is_a_value_of_an_attribute_that_makes_a_fair_share(shop, tmp_path):
    random = Random(1)
    with workspace(shop) as space:
        orders = space.connection.sql("SELECT order_id, customer_id, order_date, order_cents, currency FROM orders").df().astype(object)
    orders["order_date"] = [moment.date() for moment in orders["order_date"]]
    people = sorted(set(orders["customer_id"]))
    customers = pd.DataFrame({"customer_id": people, "country": [random.choice(["UK", "UK", "D'E", "FR"]) for _ in people],
                              "segment": ["all"] * len(people)})
    lake = lake_with(orders, tmp_path / "home", customers=customers)
    with injecting(lake) as space:
        segments = space.segments()
        assert len(segments) == 3, "all orders in one segment are no segment"
        loss = Loss(SEGMENT, START, seed=next(place for place, text in enumerate(segments) if "D''E" in text))
        left = space.inject(loss, space.lost_orders(loss, segments))
        whole = orders[(orders["order_date"] >= loss.start) & (orders["order_date"] <= loss.last)]
        gone = whole["customer_id"].isin(set(customers[customers["country"] == "D'E"]["customer_id"]))
        assert 0 < left.sum() == (~gone).sum()


# -- counting ----------------------------------------------------------------------------------------------------------


def test_an_episode_begins_after_more_than_seven_calm_days():
    random = np.random.default_rng(4)
    for chance in (0.02, 0.1, 0.5, 0.9):
        rings = random.random(400) < chance
        latest, naive = None, []
        for day, ring in enumerate(rings):
            naive.append(bool(ring and (latest is None or day - latest > 7)))
            latest = day if ring else latest
        assert episode_starts(rings).tolist() == naive
    assert episode_starts(np.zeros(3, dtype=bool)).tolist() == [False] * 3


def test_intervals_are_the_published_ones():
    assert measuring.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert measuring.wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert measuring.wilson(0, 0) == (0, 1)
    for count, low, high in ((0, 0, 2.9957), (1, 0.0513, 4.7439), (2, 0.3554, 6.2958), (10, 5.4254, 16.9622)):
        assert measuring.poisson_interval(count) == pytest.approx((low, high), abs=1e-3)


def naive_surprise(orders: np.ndarray, is_open: np.ndarray, place: int) -> float:
    before = [past for past in range(place - 7, max(-1, place - 57), -7) if is_open[past]][:4]
    if not is_open[place] or place < 60 or not before or orders[before].mean() < 5:
        return math.nan
    usual = orders[before].mean()
    year = [past for past in range(max(7, place - 377), place - 13) if is_open[past] and is_open[past - 7]]
    squares = sum((orders[past] - orders[past - 7]) ** 2 for past in year)
    noise = max(1.0, squares / max(sum(orders[past] + orders[past - 7] for past in year), 1))
    return (usual - orders[place]) / math.sqrt(1.25 * noise * usual)


def test_surprises_of_daily_orders_are_what_they_say():
    random = np.random.default_rng(3)
    orders = random.poisson(30 + 25 * np.sin(np.arange(500) / 60)).astype(float)
    is_open = random.random(500) > 0.1
    found = surprises(orders, is_open)
    np.testing.assert_allclose(found, [naive_surprise(orders, is_open, place) for place in range(500)])
    # a day's surprise knows nothing of the days after it, so that a loss does not change what was before
    np.testing.assert_array_equal(found[:300], surprises(orders[:300], is_open[:300]))
    for rule in (ewma, cusum):
        np.testing.assert_allclose(rule(found)[300:], rule(found[300:], rule(found)[299]))


def test_a_day_that_waits_rings_up_to_the_number_of_the_day_before():
    first = date(2025, 1, 1)
    rows = [(first, 1.0, None, False), (first + timedelta(1), 5.0, "partial_day", True), (first + timedelta(2), 6.0, None, False),
            (first + timedelta(3), 7.0, "data_incomplete", True), (first + timedelta(5), None, None, False)]
    found = rings_from(rows, first, first + timedelta(6))
    np.testing.assert_array_equal(found, [1.0, 1.0, 6.0, math.nan, math.nan, math.nan, math.nan])


def test_a_start_at_which_the_rule_rang_already_is_left_out():
    heard = measuring.Heard(outage(50), [START] * 4, {"returning": np.array([3.0, 2.9, math.nan, 0.0])},
                            {"returning": np.array([[9, 9], [0, 3.0], [math.nan, 4.0], [1.0, 2.0]])})
    assert measuring.delays(heard, "returning", 3.0).tolist() == [2, 2, 0]
    assert measuring.pages(heard, "returning", 3.0, 1)["pages"] == 0
    told = measuring.detection(measuring.delays(heard, "returning", 3.0), 1)
    assert told["median_delay"] == 2 and told["within_6"]["share"] == pytest.approx(2 / 3) and told["left_out"] == 1
    assert measuring.detection(np.array([0, 0, 4]), 0)["median_delay"] is None
    assert measuring.detection(np.array([], dtype=int), 5)["within_6"]["share"] is None


def noisy_days(seed: int, days: int = 700) -> RealDays:
    random = np.random.default_rng(seed)
    values = random.normal(0, 1.6, days)
    values[random.random(days) < 0.1] = math.nan
    near = random.random(days) < 0.1
    return RealDays(date(2020, 1, 1), np.full(days, 50.0), np.ones(days, dtype=bool), near,
                    {rule.name: values for rule in measuring.RULES}, np.full(days, 30.0))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budget", [0, 1, 2, 6])
def test_the_recommended_threshold_keeps_to_the_budget_and_so_does_every_higher_one(seed, budget):
    real = noisy_days(seed)
    plan = Plan(Period(date(2020, 1, 8), date(2020, 12, 31)), Period(date(2021, 1, 1), date(2021, 11, 30)), budget, 5, 1)
    advice = measuring.recommend(real, plan, 3.0, 4.5)
    rule = next(rule for rule in measuring.RULES if rule.name == "returning")
    allowed = round(budget * plan.tune.days / 365)
    told = {each: measuring.alarms(real, "returning", each, plan.tune) for each in rule.thresholds}
    within = {each: row.episodes <= allowed and row.days_rung <= plan.tune.days / 4 for each, row in told.items()}
    if advice["warning"] is None:
        assert not within[max(rule.thresholds)]
        return
    assert all(within[each] for each in rule.thresholds if each >= advice["warning"])
    below = [each for each in rule.thresholds if each < advice["warning"]]
    assert not below or not within[max(below)]
    assert advice["critical"] >= 1.2 * advice["warning"] - 1e-9
    # the period reported on decides nothing
    other = replace(plan, report=Period(date(2021, 3, 1), date(2021, 6, 30)))
    assert [measuring.recommend(real, other, 3.0, 4.5)[name] for name in ("warning", "critical")] == [advice["warning"], advice["critical"]]


def test_an_alarm_that_never_stops_is_one_episode_and_no_setting():
    real = noisy_days(1)
    real.values["returning"][:] = 2.5
    rule = next(rule for rule in measuring.RULES if rule.name == "returning")
    period = Period(date(2020, 2, 1), date(2021, 1, 31))
    assert measuring.alarms(real, "returning", 2.0, period).episodes <= 1
    assert measuring.lowest_within(real, rule, 2, period) == 2.6


def test_alarms_count_episodes_at_holidays_apart():
    real = noisy_days(1)
    period = Period(date(2020, 2, 1), date(2021, 1, 31))
    told = measuring.alarms(real, "returning", 2.0, period)
    free = holiday = rung = 0
    latest = None
    for day in dates(period.first, period.last):
        place = real.place(day)
        if real.values["returning"][place] >= 2.0:
            rung += 1
            if latest is None or (day - latest).days > 7:
                free, holiday = free + (not real.near_holiday[place]), holiday + bool(real.near_holiday[place])
            latest = day
    assert (told.episodes, told.at_holidays, told.days_rung) == (free, holiday, rung)
    assert [each["at_holidays"] for each in measuring.episodes_of(real, "returning", 2.0, period)].count(True) == holiday
    assert all(real.values["returning"][real.place(each["from"])] >= 2 for each in measuring.episodes_of(real, "returning", 2.0, period))
    assert told.a_year == pytest.approx(free * 365 / period.days) and told.a_year_low <= told.a_year <= told.a_year_high


def test_no_loss_begins_at_a_closed_day_or_ends_after_the_period():
    real = noisy_days(2)
    closed = date(2021, 3, 10)
    real.is_open[real.place(closed)] = False
    period = Period(date(2021, 3, 1), date(2021, 5, 1))
    starts = measuring.possible_starts(real, period)
    assert {closed, closed - timedelta(1), closed - timedelta(2)} & set(starts) == set()
    assert starts[0] == date(2021, 3, 2) and starts[-1] + timedelta(27) == period.last
    plan = Plan(period, period, 2, 20, 3)
    drawn = [[loss for loss in measuring.losses(kind, real, plan)] for kind in KINDS]
    assert all(len(each) == 20 and {loss.start for loss in each} <= set(starts) for each in drawn)
    assert len({tuple(loss.start for loss in each) for each in drawn}) == len(KINDS), "other dates for each kind"
    assert drawn[0] == list(measuring.losses(KINDS[0], real, plan)) != list(measuring.losses(KINDS[0], real, replace(plan, seed=4)))


def test_the_ideal_observer_hears_more_of_a_larger_loss_and_rings_less_at_a_higher_threshold():
    counts = np.random.default_rng(1).poisson(40, 600).astype(float)
    is_open = np.ones(600, dtype=bool)
    small, large = (ideal_observer(counts, is_open, 100, 590, share, followed=28, rounds=300) for share in (20, 50))
    for ideal in (small, large):
        assert np.all(np.diff(ideal.episodes_a_year) <= 0.35) and ideal.episodes_a_year[0] > ideal.episodes_a_year[-1]
    at = [measuring._ideal(ideal, 2)["at_budget"]["within_6"]["share"] for ideal in (small, large)]
    assert at[0] < at[1] > 0.99
    assert ideal_observer(np.zeros(600), is_open, 100, 590, 30, followed=28) is None


# -- the whole ---------------------------------------------------------------------------------------------------------


def plan_for(space: InjectedOrders, **chosen: object) -> Plan:
    given = {**dict.fromkeys(("tune_from", "tune_to", "first", "last")), "budget": 2, "outages": 5, "seed": 1, **chosen}
    return measuring.planned(space, **given)


def test_periods_share_no_day_and_fit_the_history(shop):
    with injected_orders(shop) as space:
        plan = plan_for(space)
        assert plan.tune.last < plan.report.first and plan.report.last == LAST
        assert plan.tune.first == space.orders.first_date + timedelta(97)
        assert abs(plan.tune.days - plan.report.days) <= 1
        assert plan_for(space, tune_to=date(2024, 12, 31)).report.first == date(2025, 1, 1)
        for wrong, says in (
            ({"last": date(2026, 1, 1)}, "the rules judge"), ({"tune_from": date(2023, 1, 1)}, "the rules judge"),
            ({"first": date(2025, 12, 1)}, "are needed"), ({"first": date(2025, 1, 1), "last": date(2024, 1, 1)}, "are needed"),
            ({"first": date(2025, 1, 1), "tune_to": date(2025, 2, 1)}, "overlap"),
        ):
            with pytest.raises(UsageError, match=says):
                plan_for(space, **wrong)


def test_too_little_history_is_said(tmp_path):
    write_big_shop(tmp_path / "orders.parquet", 60)
    with duckdb.connect() as connection:
        connection.execute(f"COPY (FROM '{tmp_path}/orders.parquet' WHERE order_date < DATE '2023-05-01') TO '{tmp_path}/few.parquet'")
    settings = Settings(_env_file=None, home=tmp_path / "home")
    with pytest.raises(NoOrders), injected_orders(Lake(settings)):
        pass
    ingest([tmp_path / "few.parquet"], "orders", settings)
    with injected_orders(Lake(settings)) as space, pytest.raises(UsageError, match="too little history"):
        plan_for(space)


def test_orders_that_are_in_bigquery_are_refused_before_anything_is_billed():
    with pytest.raises(UsageError, match="local files only"), injected_orders(SimpleNamespace(engine="bigquery")):
        pass


@pytest.fixture(scope="module")
def result(shop) -> dict:
    with injected_orders(shop) as space:
        close(space, [date(2024, 12, 25), date(2025, 12, 25)])
        return measuring.backtest(space, plan_for(space, outages=3))


@pytest.mark.slow
def test_a_backtest_is_whole_and_the_same_again(shop, result):
    with injected_orders(shop) as space:
        close(space, [date(2024, 12, 25), date(2025, 12, 25)])
        assert measuring.backtest(space, plan_for(space, outages=3)) == result
    returning = next(each for each in result["rules"] if each["rule"] == "returning")
    assert {3.0, 4.5} <= {row["threshold"] for row in returning["thresholds"]}
    assert result["closed_days"] == 2 and result["report"]["days_at_holidays"] > 0
    for rule in result["rules"]:
        for row in rule["thresholds"]:
            assert all(told["losses"] + told["left_out"] == 3 for kind, told in row["kinds"].items() if kind != "nothing")
            assert row["loading"]["late_load"]["pages"] == 0, "a load that is late must not look like churn"
            told = [row["loading"][f"missing_{days}"]["pages"] for days in (1, 2, 3)]
            assert told == sorted(told)
    by_chance = returning["thresholds"][0]["kinds"]["nothing"]
    assert by_chance["losses"] + by_chance["left_out"] == result["report"]["days"] - 28 - 3, "every start but those at the holiday"
    shares = [[row["kinds"][name]["within_6"]["share"] for row in returning["thresholds"]] for name in ("outage_10", "outage_100")]
    assert sum(shares[0]) < sum(shares[1])


def test_the_rules_on_real_days_are_those_of_production(shop):
    with injected_orders(shop) as space, workspace(shop) as plain:
        real = measuring.real_days(space)
        plain.build_range("returning_customers", START, LAST)
        rows = plain.connection.sql("SELECT day_alone, score, lasting_score, gate FROM returning_customers ORDER BY alert_date").fetchall()
    # what lasts for eight days counts half as much again
    judged = [math.nan if gate not in (None, "partial_day") or score is None else max(score, score if lasting is None else 1.5 * lasting)
              for _, score, lasting, gate in rows]
    # a day that falls out alone waits for the one before it
    judged = [min(score, before) if alone else score for (alone, *_), score, before in zip(rows, judged, [math.nan, *judged], strict=False)]
    np.testing.assert_allclose(real.part("returning", Period(START, LAST)), judged, atol=1e-9)


def test_words_and_pictures(result):
    for picture in (trade_off_chart(result), delay_chart(result)):
        assert picture.startswith(b"\x89PNG")
    text = markdown(result, "retention-ops backtest")
    assert all(heading in text for heading in ("## Noticed: 30 % of orders lost", "## False alarms", "## Late data", "tradeoff.png"))
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("|---"):
            assert len({row.count("|") for row in (lines[number - 1], line, lines[number + 1])}) == 1
    nothing = {**result, "recommendation": {**result["recommendation"], "warning": None, "critical": None}}
    assert "No threshold keeps" in verdict(nothing)[0] and env_lines(nothing) == []
    assert trade_off_chart(nothing) and markdown(nothing, "x")
    broken = {**result, "recommendation": {**result["recommendation"], "warning": 2.0, "holds": False, "changes": True}}
    assert any("not advised" in sentence for sentence in verdict(broken)) and env_lines(broken) == []
    short = {**result, "recommendation": {**result["recommendation"], "enough_history": False}}
    assert any("Too short to judge" in sentence for sentence in verdict(short)) and env_lines(short) == []


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["retention-ops", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out + printed.err


def test_the_command(shop, tmp_path, monkeypatch, capsys):
    home = shop.settings.home
    code, said = run(monkeypatch, capsys, "--home", home, "backtest", "--outages", 2, "--from", "2025-06-01", "--out", tmp_path / "out")
    assert code == 0 and "Next:" in said and "WARNING from" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["delays.png", "report.json", "report.md", "tradeoff.png"]
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["report"]["from"] == "2025-06-01" and told["losses_of_each_kind"] == 2
    command = (tmp_path / "out" / "report.md").read_text().split("`")[1].split()[1:]
    code, said = run(monkeypatch, capsys, "--home", home, *command, "--json")
    again = json.loads(said)
    assert code == 0 and {**again, "seconds": 0} == {**told, "seconds": 0}, "the command in the report makes the report"
    assert (home / "backtests" / "2025-06-01_2025-12-31" / "report.md").is_file()


def test_the_command_refuses_what_cannot_work(shop, tmp_path, monkeypatch, capsys):
    home = shop.settings.home
    assert run(monkeypatch, capsys, "--home", home, "backtest", "--from", "2019-01-01")[0] == 2
    assert run(monkeypatch, capsys, "--home", home, "backtest", "--outages", "0")[0] == 2
    assert run(monkeypatch, capsys, "--home", home, "backtest", "--from", "1.1.2025")[0] == 2
    code, said = run(monkeypatch, capsys, "--home", tmp_path / "none", "backtest")
    assert code == 1 and "no orders yet" in said
    code, said = run(monkeypatch, capsys, "backtest", "--help")
    assert code == 0 and "--budget" in said and "Examples" in said


@pytest.mark.slow
def test_half_of_the_orders_of_a_real_shop_are_missed_within_six_days(tmp_path):
    """On dates and orders that nothing was tuned on; docs/alert_quality.md has the whole table."""
    files = [REAL_DATA / "uci_online_retail_II_2009-2010.parquet", REAL_DATA / "uci_online_retail.parquet"]
    if not all(file.is_file() for file in files):
        pytest.skip("the real orders are not here: put them into ../shared/data beside the repository")
    settings = Settings(_env_file=None, home=tmp_path, duckdb_threads=1)
    ingest(files, "uci-online-retail", settings)
    with injected_orders(Lake(settings)) as space:
        given = pd.read_csv(CLOSURES, parse_dates=["from", "to"])
        closures = zip(given["from"], given["to"].fillna(given["from"]), strict=True)
        close(space, [day for first, last in closures for day in dates(first.date(), last.date())])
        plan = plan_for(space, tune_from=date(2010, 3, 10), tune_to=date(2010, 12, 31), first=date(2011, 1, 1), outages=30, seed=20)
        real = measuring.real_days(space)
        space.prepare(plan.report.first, plan.report.last)
        heard = measuring.listen(space, real, outage(50), plan, [], lambda: None)
        told = measuring.detection(measuring.delays(heard, "returning", settings.shortfall_warning), 0)
        assert told["within_6"]["share"] >= 0.95 and told["median_delay"] <= 3
        for period in (plan.tune, plan.report):
            assert measuring.alarms(real, "returning", settings.shortfall_warning, period).episodes <= 2
