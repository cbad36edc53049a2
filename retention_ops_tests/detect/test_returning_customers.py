"""Returning customers against their rhythm: the SQL says what the naive oracle says, and a range what each of its days says."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import pandas as pd
import pytest

from retention_ops.detect.compute import DUE_DAYS, Workspace, workspace
from retention_ops.settings import Settings
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.render import fast_query, query
from retention_ops_tests import oracle
from retention_ops_tests.detect.test_against_oracle import REAL_DATA, every_date
from retention_ops_tests.oracle_returning import GAPS, RECENCIES, Returning
from retention_ops_tests.shops import lake_with, orders_frame, small_shop, uci_orders

CLOSED = (date(2024, 1, 1), date(2024, 3, 31))


def close(space: Workspace, days: tuple[date, ...]) -> None:
    """Closes the shop on `days`."""
    rows = ", ".join(f"(DATE '{day}', 'holiday')" for day in days)
    space.connection.execute("DROP VIEW closed_days")
    space.connection.execute(f"CREATE TEMP TABLE closed_days AS SELECT * FROM (VALUES {rows}) AS t(closed_date, reason)")


def rows(space: Workspace, first: date, last: date) -> pd.DataFrame:
    space.build_range("returning_customers", first, last)
    return space.rows("returning_customers")


@pytest.fixture(scope="module")
def orders() -> pd.DataFrame:
    return small_shop()


@pytest.mark.parametrize("closed", [(), CLOSED], ids=["always open", "closed days"])
@pytest.mark.parametrize("complete", [None, date(2024, 5, 20)], ids=["complete", "held back"])
def test_every_date_of_a_small_shop(tmp_path: Path, orders: pd.DataFrame, closed: tuple[date, ...], complete: date | None):
    lake = lake_with(orders, tmp_path, complete_through=complete, min_due=8, shortfall_warning=1.0, shortfall_critical=1.5)
    days = every_date(orders)
    naive = Returning(orders, lake.settings, complete or max(orders["order_date"]), closed)
    with workspace(lake) as space:
        if closed:
            close(space, closed)
        found = rows(space, days[0], days[-1])
    assert oracle.differences("returning_customers", naive.frame(days), found) == []
    assert {"INFO", "WARNING", "CRITICAL"} == set(found["severity"])
    assert {None, "history_warmup", "data_incomplete"} <= {oracle.plain(gate) for gate in found["gate"]}


@pytest.mark.parametrize("make", [query, fast_query], ids=["readable", "fast"])
def test_who_is_due_on_every_date_of_a_small_shop(tmp_path: Path, orders: pd.DataFrame, make):
    days = every_date(orders)
    naive = Returning(orders, Settings(_env_file=None), None)
    with workspace(lake_with(orders, tmp_path)) as space:
        for first, last in ((days[0], days[-1]), (date(2024, 2, 10), date(2024, 3, 1))):
            space.run(make("due_daily"), from_date=first, to_date=last)
            assert oracle.differences("due_daily", naive.due_daily(oracle.dates(first, last)), space.rows("due_daily")) == []


@pytest.mark.parametrize("make", [query, fast_query], ids=["readable", "fast"])
def test_usual_gaps_and_silences_on_every_line(tmp_path: Path, make):
    """A usual gap of exactly 10, 20, 35, 60 and 100 days, a day less and a day more, as one gap and as the mean of two; long silences."""
    start, visits = date(2024, 1, 1), []
    for line in GAPS:
        for gap in (line - 1, line, line + 1):
            visits += [(f"one{gap}", start, 100), (f"one{gap}", start + timedelta(gap), 100)]
            visits += [(f"two{gap}", start + timedelta(step), 100) for step in (0, 3, 2 * gap)]
    for silence in RECENCIES:
        visits += [(f"back{silence + more}", start + timedelta(days), 100) for more in (-1, 0, 1) for days in (0, silence + more)]
    orders = orders_frame(visits)
    last = max(orders["order_date"]) + timedelta(RECENCIES[-1] + 2)
    naive = Returning(orders, Settings(_env_file=None), None)
    with workspace(lake_with(orders, tmp_path)) as space:
        space.run(make("due_daily"), from_date=start, to_date=last)
        found = space.rows("due_daily")
    assert oracle.differences("due_daily", naive.due_daily(oracle.dates(start, last)), found) == []
    assert set(found["rhythm"]) == set(range(7)) and set(found["recency"]) == set(RECENCIES)


def test_a_score_of_exactly_the_threshold_alerts(tmp_path: Path, orders: pd.DataFrame):
    days = oracle.dates(date(2024, 2, 1), date(2024, 5, 1))
    with workspace(lake_with(orders, tmp_path / "any", min_due=8)) as space:
        found = rows(space, days[0], days[-1])
    exact = sorted({round(score, 9) for score in found["score"] if score > 0})
    warning, critical = exact[len(exact) // 2], exact[-2]
    lake = lake_with(orders, tmp_path / "exact", min_due=8, shortfall_warning=warning, shortfall_critical=critical)
    with workspace(lake) as space:
        found = rows(space, days[0], days[-1])
    on_line = {round(score, 9): severity for score, severity in zip(found["score"], found["severity"], strict=True)}
    assert (on_line[warning], on_line[critical]) == ("WARNING", "CRITICAL")
    assert oracle.differences("returning_customers", Returning(orders, lake.settings, max(orders["order_date"])).frame(days), found) == []


def test_a_shop_that_stops_is_heard_and_then_has_no_level(tmp_path: Path, orders: pd.DataFrame):
    """Every order is missing from a day on: CRITICAL within days; after four weeks nothing is expected any more, and the gate says so."""
    stop = date(2024, 4, 1)
    left = orders[[day < stop for day in orders["order_date"]]]
    days = oracle.dates(stop, stop + timedelta(45))
    lake = lake_with(left, tmp_path, complete_through=days[-1], min_due=8)
    with workspace(lake) as space:
        found = rows(space, days[0], days[-1])
    assert oracle.differences("returning_customers", Returning(left, lake.settings, days[-1]).frame(days), found) == []
    assert "CRITICAL" in set(found["severity"][:10])
    gates = [oracle.plain(gate) for gate in found["gate"]]
    assert gates[-1] == "baseline_warmup" and {None, "min_sample", "baseline_warmup", "partial_day"} == set(gates)


def test_a_day_that_falls_out_alone_waits_for_the_next(tmp_path: Path):
    """600 customers come every sixth day, 100 a day; the last day's load holds 20 of them, or two days do."""
    start, d = date(2023, 10, 1), date(2024, 5, 10)
    visits = [(f"c{number}", day, 100) for day in oracle.dates(start, d) for number in range((day - start).days % 6, 600, 6)]

    def shop(name: str, *half_loaded: date) -> list[tuple[str | None, str]]:
        kept = [visit for visit in visits if visit[1] not in half_loaded or int(visit[0][1:]) < 120]
        with workspace(lake_with(orders_frame(kept), tmp_path / name, complete_through=d)) as space:
            found = rows(space, d - timedelta(1), d)
        return [(oracle.plain(gate), severity) for gate, severity in zip(found["gate"], found["severity"], strict=True)]

    assert shop("whole") == [(None, "INFO"), (None, "INFO")]
    assert shop("half", d) == [(None, "INFO"), ("partial_day", "INFO")]
    assert shop("silent", d - timedelta(1), d) == [("partial_day", "INFO"), (None, "CRITICAL")]


def test_a_day_alone_says_what_it_says_in_a_range(tmp_path: Path, orders: pd.DataFrame):
    days = every_date(orders)
    with workspace(lake_with(orders, tmp_path, min_due=8)) as space:
        whole = rows(space, days[0], days[-1])
        alone = pd.concat([rows(space, day, day) for day in days[::7]], ignore_index=True)
    assert oracle.differences("returning_customers", whole.iloc[::7].reset_index(drop=True).astype(object), alone) == []


def test_what_comes_later_changes_nothing(tmp_path: Path, orders: pd.DataFrame):
    """A past date says the same before and after the later orders are in."""
    d = date(2024, 4, 10)
    with workspace(lake_with(orders, tmp_path / "all")) as space:
        later = rows(space, d - timedelta(20), d)
    known = orders[[day <= d for day in orders["order_date"]]]
    with workspace(lake_with(known, tmp_path / "known", complete_through=d)) as space:
        then = rows(space, d - timedelta(20), d)
    assert oracle.differences("returning_customers", later.astype(object), then) == []


@pytest.mark.slow
def test_sampled_dates_of_two_real_years(tmp_path: Path):
    files = [REAL_DATA / "uci_online_retail_II_2009-2010.parquet", REAL_DATA / "uci_online_retail.parquet"]
    if not all(file.is_file() for file in files):
        pytest.skip("the real orders are not here: put them into ../shared/data beside the repository")
    chosen = Settings(_env_file=None, home=tmp_path)
    ingest(files, "uci-online-retail", chosen)
    days = [date(2010, 3, 10), date(2010, 6, 25), date(2011, 1, 10), date(2011, 7, 4), date(2011, 12, 9)]
    orders = pd.concat([uci_orders(file) for file in files]).drop_duplicates("order_id")
    naive = Returning(orders, chosen, days[-1])
    with workspace(Lake(chosen)) as space:
        whole = rows(space, date(2009, 11, 25), days[-1])
        whole = whole[[oracle.plain(day) in days for day in whole["alert_date"]]].reset_index(drop=True)
        space.run(query("due_daily"), from_date=days[1] - timedelta(DUE_DAYS), to_date=days[1])
        space.run(query("returning_customers"), from_date=days[1], to_date=days[1])
        readable = space.rows("returning_customers")
    assert oracle.differences("returning_customers", naive.frame(days), whole) == []
    assert oracle.differences("returning_customers", naive.frame(days[1:2]), readable) == []
