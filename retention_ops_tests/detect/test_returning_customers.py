"""Returning customers against their rhythm: the SQL says what the naive oracle says, and a range what each of its days says."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import pandas as pd
import pytest

from retention_ops.detect.compute import DUE_DAYS, Workspace, workspace
from retention_ops.detect.missing import NAMED, who_is_missing
from retention_ops.settings import Settings
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.render import fast_query, query
from retention_ops_tests import oracle
from retention_ops_tests.detect.test_against_oracle import REAL_DATA, every_date
from retention_ops_tests.oracle_returning import GAPS, RECENCIES, Chances, Returning
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


START, DAILY = date(2024, 1, 1), 1000000


def on_every_line(start: date = START) -> pd.DataFrame:
    """A usual gap of exactly 10, 20, 35, 60 and 100 days, a day less and a day more, as one gap and as the mean of two; long silences."""
    visits: list[tuple[str, date, int]] = []
    for line in GAPS:
        for gap in (line - 1, line, line + 1):
            visits += [(f"one{gap}", start, 100), (f"one{gap}", start + timedelta(gap), 100)]
            visits += [(f"two{gap}", start + timedelta(step), 100) for step in (0, 3, 2 * gap)]
    for silence in RECENCIES:
        visits += [(f"back{silence + more}", start + timedelta(days), 100) for more in (-1, 0, 1) for days in (0, silence + more)]
    return orders_frame(visits)


def some_attributes(orders: pd.DataFrame) -> pd.DataFrame:
    """Attributes of two customers in three, some without a value; and of one who never ordered."""
    names = [*sorted(set(orders["customer_id"])), "nobody"]
    rows = [(name, ["FR", "DE", ""][place // 3 % 3], ["new", "", "old", "old"][place % 4], ["gold", ""][place % 2],
             ["ads", "mail", "", "shop", "ads"][place % 5]) for place, name in enumerate(names) if place % 3 or name == "nobody"]
    return pd.DataFrame(rows, columns=["customer_id", "country", "segment", "loyalty_tier", "acquisition_channel"])


@pytest.fixture(scope="module")
def orders() -> pd.DataFrame:
    return small_shop()


@pytest.mark.parametrize("closed", [pytest.param((), marks=pytest.mark.slow), CLOSED], ids=["always open", "closed days"])
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


@pytest.mark.parametrize("make", [pytest.param(query, marks=pytest.mark.slow), fast_query], ids=["readable", "fast"])
def test_who_is_due_on_every_date_of_a_small_shop(tmp_path: Path, orders: pd.DataFrame, make):
    days = every_date(orders)
    naive = Returning(orders, Settings(_env_file=None), None)
    with workspace(lake_with(orders, tmp_path)) as space:
        for first, last in ((days[0], days[-1]), (date(2024, 2, 10), date(2024, 3, 1))):
            space.run(make("due_daily"), from_date=first, to_date=last)
            assert oracle.differences("due_daily", naive.due_daily(oracle.dates(first, last)), space.rows("due_daily")) == []


@pytest.mark.parametrize("make", [query, fast_query], ids=["readable", "fast"])
def test_usual_gaps_and_silences_on_every_line(tmp_path: Path, make):
    start, orders = date(2024, 1, 1), on_every_line()
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


def test_two_thirds_of_a_threshold_are_enough_on_eight_days_running(tmp_path: Path, orders: pd.DataFrame):
    """Exactly two thirds of it, and a hair less; on the first such day and those after it; WARNING and CRITICAL."""
    d, days = date(2024, 4, 17), oracle.dates(date(2024, 4, 1), date(2024, 5, 1))
    with workspace(lake_with(orders, tmp_path / "any", min_due=8)) as space:
        found = rows(space, days[0], days[-1]).set_index("alert_date").loc[pd.Timestamp(d)]
    line = round(1.5 * found["lasting_score"], 9)
    assert found["score"] < line
    for place, (warning, critical, severity) in enumerate((
        (line, line + 1, "WARNING"), (line + 1e-9, line + 1, "INFO"), (line / 2, line, "CRITICAL"), (line / 2, line + 1e-9, "WARNING"),
    )):
        lake = lake_with(orders, tmp_path / str(place), min_due=8, shortfall_warning=warning, shortfall_critical=critical)
        with workspace(lake) as space:
            found = rows(space, days[0], days[-1])
            alone = rows(space, d, d)
        naive = Returning(orders, lake.settings, max(orders["order_date"])).frame(days)
        assert oracle.differences("returning_customers", naive, found) == []
        assert oracle.differences("returning_customers", found[found["alert_date"] == pd.Timestamp(d)].astype(object), alone) == []
        assert alone["severity"][0] == severity
        assert ("short for 8 days running" in alone["sentence"][0]) == (severity == "WARNING" and warning == line)


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


WINDOWS = [(date(2024, 4, 3), 3), (date(2024, 4, 3), 14), (date(2024, 5, 1), 7), (date(2024, 5, 28), 5), (date(2024, 1, 2), 4)]


@pytest.mark.parametrize("shut", [pytest.param((), marks=pytest.mark.slow), CLOSED], ids=["always open", "closed days"])
@pytest.mark.parametrize("known", [pytest.param(False, marks=pytest.mark.slow), True], ids=["no attributes", "attributes"])
def test_who_was_due_and_which_part_of_them_is_missing(tmp_path: Path, orders: pd.DataFrame, shut: tuple[date, ...], known: bool):
    given = some_attributes(orders) if known else None
    lake = lake_with(orders, tmp_path, customers=given, min_due=8)
    naive = Returning(orders, lake.settings, max(orders["order_date"]), shut)
    with workspace(lake) as space:
        if shut:
            close(space, shut)
        rows(space, WINDOWS[-1][0], max(d for d, _ in WINDOWS))
        for d, days in WINDOWS:
            space.build_missing(d, days)
            due = naive.due_customers(d - timedelta(days - 1), d)
            assert oracle.differences("due_customers", due, space.rows("due_customers")) == []
            slices = naive.shortfall_slices(due, d, given)
            assert oracle.differences("shortfall_slices", slices, space.rows("shortfall_slices")) == []
            assert set(due["was_new"]) == set(due["is_overdue"]) == {False, True}
    assert len(slices) == (2 + 3 + 3 + 2 + 4 if known else 2 + 4)


def test_chances_add_up_to_what_the_alert_expects(tmp_path: Path, orders: pd.DataFrame):
    """To the last digit, on every date on which anybody is expected, with closed days among them."""
    with workspace(lake_with(orders, tmp_path, min_due=8)) as space:
        close(space, CLOSED)
        alerts = rows(space, date(2024, 1, 2), date(2024, 5, 28))
        expecting = [row for row in alerts.to_dict("records") if row["expected"] == row["expected"]]
        assert len(expecting) > 100
        for row in expecting:
            space.build_missing(row["alert_date"].date(), int(row["window_days"]))
            chance, returned = space.connection.execute("SELECT SUM(chance), SUM(returned) FROM due_customers").fetchall()[0]
            assert (chance, returned) == (round(row["expected"] * 1000000000), row["observed"]), row["alert_date"]


def fabricated() -> Chances:
    """Another chance in every cell and on every weekday; but for one cell, that nobody knows of."""
    return {(rhythm, recency): {day: 1000000 * (1 + rhythm) + 10000 * (1 + place) + 7 * day + 1 for day in range(7)}
            for rhythm in range(7) for place, recency in enumerate(RECENCIES) if (rhythm, recency) != (2, 8)}


def expect(space: Workspace, chances: Chances) -> None:
    """Makes `chances` readable as what is known on every day; on each they differ, by a million a day."""
    # 1970-01-01, the weekday 0 of the rules, was a Thursday
    found = ", ".join(f"({rhythm}, {recency}, {(day - 3) % 7}, {chance})"
                      for (rhythm, recency), by_day in chances.items() for day, chance in by_day.items())
    space.connection.execute(
        "CREATE OR REPLACE TEMP TABLE return_expectations AS "
        f"SELECT CAST(day AS DATE) AS known_day, rhythm, recency, weekday, chance + {DAILY} * (CAST(day AS DATE) - DATE '{START}') "
        "AS chance, CAST(1 AS DOUBLE) AS level "
        f"FROM (VALUES {found}) AS given(rhythm, recency, weekday, chance), range(DATE '{START}', DATE '{START}' + 700, INTERVAL 1 DAY) "
        "AS days(day)")


def known_on(day: date, chances: Chances) -> Chances:
    """`chances` as `expect` makes them readable of a day."""
    return {cell: {weekday: chance + DAILY * (day - START).days for weekday, chance in by_day.items()} for cell, by_day in chances.items()}


def windows_on_lines(orders: pd.DataFrame) -> list[tuple[date, date]]:
    """Eight days and eight days over all dates, so that every silence passes its lines; and days alone on which somebody comes."""
    visits, last = sorted(set(orders["order_date"])), max(orders["order_date"]) + timedelta(RECENCIES[-1] + 2)
    return [*((first, first + timedelta(7)) for first in oracle.dates(START, last)[1::8]), *((day, day) for day in visits[1::4])]


def test_every_line_of_rhythm_and_silence_has_its_own_chance(tmp_path: Path):
    orders, chances = on_every_line(), fabricated()
    naive = Returning(orders, Settings(_env_file=None), None)
    with workspace(lake_with(orders, tmp_path)) as space:
        expect(space, chances)
        for first, d in windows_on_lines(orders):
            space.run(query("due_customers"), from_date=first, to_date=d)
            expected = naive.due_customers(first, d, known_on(first - timedelta(1), chances))
            assert oracle.differences("due_customers", expected, space.rows("due_customers")) == [], d


def staying_away(home: Path, who: Callable[[int], bool]) -> Lake:
    """600 customers of three segments who come every sixth day; those of whom `who` is true stay away in the last week."""
    start, d = date(2023, 10, 1), date(2024, 5, 10)
    visits = [(f"c{number}", day, 100) for day in oracle.dates(start, d) for number in range((day - start).days % 6, 600, 6)
              if day <= d - timedelta(7) or not who(number)]
    given = pd.DataFrame({"customer_id": [f"c{number}" for number in range(600)],
                          "segment": [["new", "old", "vip"][number // 6 % 3] for number in range(600)],
                          "country": [["FR", "DE"][number // 18 % 2] for number in range(600)]})
    return lake_with(orders_frame(visits), home, complete_through=d, customers=given)


@pytest.mark.parametrize(("who", "carried_by"), [
    (lambda number: number // 6 % 3 == 2, ("segment", "vip")),
    (lambda number: number // 18 % 2 == 0 and number % 4 > 0, ("country", "FR")),
    (lambda number: number % 10 > 0, None),
], ids=["a lost segment", "most of a country", "an outage of everybody"])
def test_what_carries_a_shortfall(tmp_path: Path, who: Callable[[int], bool], carried_by: tuple[str, str] | None):
    lake, d = staying_away(tmp_path, who), date(2024, 5, 10)
    with workspace(lake) as space:
        row = oracle.of_rule(oracle.SECOND_RULE, alerts_of(space, d)).astype(object).to_dict("records")[0]
        missing = who_is_missing(space, d, row)
    assert row["severity"] == "CRITICAL"
    found = missing.carried_by()
    assert (found and (found["attribute"], found["value"])) == carried_by
    away = [f"c{number}" for number in range(600) if who(number)]
    assert missing.overdue == len(away) and {customer["customer_id"] for customer in missing.top} <= set(away)
    assert len(missing.top) == min(NAMED, len(away))


def alerts_of(space: Workspace, d: date) -> pd.DataFrame:
    space.build_range("alert_logic", d, d)
    return space.rows("alert_logic")


def test_nobody_is_missing_where_nobody_is_expected(tmp_path: Path, orders: pd.DataFrame):
    d = orders["order_date"].min()
    with workspace(lake_with(orders, tmp_path)) as space:
        assert who_is_missing(space, d, {"expected": None, "window_days": None}) is None


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
