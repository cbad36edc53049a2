"""Holidays and closures: what is read, which days count as closed, and that a day without orders is never explained away by itself."""

from __future__ import annotations

import json
import os
from collections import Counter
from datetime import date, timedelta
from pathlib import Path
from random import Random
from statistics import median

import pandas as pd
import pytest
from typer.testing import CliRunner

from retention_ops.cli import app
from retention_ops.detect.closures import CalendarDay, Closure, calendar, planned_closures, public_holidays
from retention_ops.detect.compute import DUE_DAYS, Workspace, closures_between, workspace
from retention_ops.errors import InputRefused, SettingsError
from retention_ops.settings import Settings, load_settings
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.freshness import freshness
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.conftest import settings_for
from retention_ops_tests.detect.test_against_oracle import REAL_DATA
from retention_ops_tests.oracle import dates
from retention_ops_tests.shops import lake_with, orders_frame, small_shop

START = date(2024, 1, 1)
"""a Monday"""


def closures_csv(folder: Path, *lines: str, header: str = "from,to,reason") -> Path:
    path = folder / "closures.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def naive(orders: pd.DataFrame, days: list[CalendarDay], first: date, last: date) -> dict[date, str]:
    """The closed days from `first` to `last` by the rule's sentences, day by day; only orders up to each day are looked at."""
    found, listed = {}, {entry.day for entry in days}
    for entry in days:
        if not first <= entry.day <= last:
            continue
        counts = Counter(day for day in orders["order_date"] if day <= entry.day)
        weekdays = [entry.day - timedelta(7 * back) for back in range(1, 9)]
        usual = [counts[day] for day in weekdays if day not in listed and counts and day >= min(counts)]
        if entry.kind == "planned closure" or (usual and 2 * counts[entry.day] < median(usual)):
            found[entry.day] = entry.reason
    return found


def closed(space: Workspace, first: date, last: date) -> dict[date, str]:
    space.build_closed_days(first, last)
    rows = space.rows("closed_days")
    assert rows["closed_date"].is_unique
    return {day.date(): reason for day, reason in zip(rows["closed_date"], rows["reason"], strict=True)}


def given(monkeypatch, days: list[CalendarDay]) -> None:
    """Has this calendar in force instead of a country's."""
    monkeypatch.setattr("retention_ops.detect.compute.calendar",
                        lambda settings, closures, first, last: [entry for entry in days if first <= entry.day <= last])


def shop_of(counts: dict[date, int]) -> pd.DataFrame:
    """So many orders a day, each of another customer."""
    return orders_frame((f"c{number}", day, 1000) for day, count in counts.items() for number in range(count))


def holiday(day: date) -> CalendarDay:
    return CalendarDay(day, f"holiday of {day}", "public holiday")


def random_shop(seed: int) -> tuple[pd.DataFrame, list[CalendarDay]]:
    """Orders of 40 or 120 days with weekday factors, weekdays without trade and gaps, and 25 days of a calendar."""
    random = Random(seed)
    factor = [random.choice([0, 1, 1, 2]) for _ in range(7)]
    span = dates(START, START + timedelta(random.choice([40, 120])))
    counts = {day: random.choice([0, 1, 2, 2, 3, 4]) * factor[day.weekday()] for day in span} | {span[random.randrange(10)]: 1}
    listed = sorted(random.sample(dates(span[10], span[-1] + timedelta(20)), 25))
    kinds = ["public holiday"] * 3 + ["planned closure"]
    return shop_of(counts), [CalendarDay(day, f"reason {day}", random.choice(kinds)) for day in listed]


# -- what is read ------------------------------------------------------------------------------------------------------


def test_closures_are_read_with_both_dates_included(tmp_path):
    path = closures_csv(tmp_path, '2026-08-03,2026-08-05,"moving, at last"', "2026-01-02,,stocktaking", "2026-08-06,2026-08-06,more")
    found = planned_closures(settings_for(tmp_path, closures_file=path))
    assert found == (
        Closure(date(2026, 1, 2), date(2026, 1, 2), "stocktaking"), Closure(date(2026, 8, 3), date(2026, 8, 5), "moving, at last"),
        Closure(date(2026, 8, 6), date(2026, 8, 6), "more"),
    )
    assert found[1].days == dates(date(2026, 8, 3), date(2026, 8, 5))
    assert planned_closures(settings_for(tmp_path)) == ()
    assert planned_closures(settings_for(tmp_path, closures_file=closures_csv(tmp_path))) == ()
    assert not (tmp_path / "home").exists(), "to read a calendar leaves nothing behind"


@pytest.mark.parametrize(("lines", "said"), [
    (["2026-01-10,2026-01-02,x"], "closures.csv line 2: to '2026-01-02' is before from (2026-01-10)"),
    (["2026-01-02,,ok", "2026-02-30,,x"], "closures.csv line 3: from '2026-02-30' is not a date (expected YYYY-MM-DD)"),
    (["02.01.2026,,x"], "line 2: from '02.01.2026' is not a date"),
    ([",2026-01-01,x"], "line 2: from is missing"),
    (["2026-01-01,soon,x"], "line 2: to 'soon' is not a date"),
    (["2026-01-01,,"], "line 2: reason is missing"),
    (["2026-01-01,2026-01-05,x", "2026-01-05,,y"], "line 3: from '2026-01-05' overlaps another closure, that of line 2"),
    (["2026-01-05,,y", "2026-01-01,2026-01-31,x"], "line 2: from '2026-01-05' overlaps another closure, that of line 3"),
    (["2026-01-01,2026-03-04,x"], "line 2: to '2026-03-04' makes a closure of more than 62 days"),
    (["2026-01-01,x"], "line 2: has 2 fields, the header has 3"),
    (['2026-01-01,,"x'], "line 2: has a quote that is not closed"),
])
def test_what_is_wrong_is_named_with_line_column_and_rule(tmp_path, lines, said):
    with pytest.raises(InputRefused) as refused:
        planned_closures(settings_for(tmp_path, closures_file=closures_csv(tmp_path, *lines)))
    assert said in str(refused.value) and "RETENTION_OPS_CLOSURES_FILE" in str(refused.value)


def test_a_closure_of_62_days_is_one(tmp_path):
    [found] = planned_closures(settings_for(tmp_path, closures_file=closures_csv(tmp_path, "2026-01-01,2026-03-03,x")))
    assert len(found.days) == 62


def test_at_most_a_hundred_problems_are_listed_and_all_are_counted(tmp_path):
    path = closures_csv(tmp_path, *["never,,x"] * 140)
    with pytest.raises(InputRefused) as refused:
        planned_closures(settings_for(tmp_path, closures_file=path))
    text = str(refused.value)
    assert text.count("is not a date") == 101 and "140 problems" in text and "... and 40 more" in text


@pytest.mark.parametrize(("header", "said"), [
    ("from,to,reasn", "reason is missing (nearest present: 'reasn')"), ("from;to;reason", "is separated by semicolons"),
])
def test_a_wrong_header_is_named(tmp_path, header, said):
    with pytest.raises(InputRefused, match="nothing was written") as refused:
        planned_closures(settings_for(tmp_path, closures_file=closures_csv(tmp_path, "2026-01-01,,x", header=header)))
    assert said in str(refused.value)


def test_a_missing_file_is_named_with_its_setting(tmp_path):
    with pytest.raises(SettingsError, match=r"RETENTION_OPS_CLOSURES_FILE: .*none\.csv cannot be read"):
        planned_closures(settings_for(tmp_path, closures_file=tmp_path / "none.csv"))


@pytest.mark.parametrize(("country", "said"), [
    ("UK", "the nearest one is GB"), ("gb", "the nearest one is GB"), ("Germany", "the nearest one is DE"),
    ("DEU", "the nearest one is DE"), ("XX", "'XX' is not a country code"),
    ("GB-England", "the nearest one is GB-ENG (there are ENG, NIR, SCT, WLS)"),
    ("GB-", "is not a part of GB"), ("AF-KAB", "write AF instead of 'AF-KAB'"),
])
def test_an_unknown_country_or_part_names_the_nearest(country, said):
    with pytest.raises(SettingsError) as refused:
        load_settings(_env_file=None, holiday_country=country)
    assert "RETENTION_OPS_HOLIDAY_COUNTRY" in str(refused.value) and said in str(refused.value)


def test_parts_of_a_country_have_holidays_of_their_own():
    boxing, andrew = date(2025, 12, 26), date(2026, 11, 30)
    assert boxing in public_holidays("GB-ENG") and andrew in public_holidays("GB-SCT") and andrew not in public_holidays("GB-ENG")
    assert public_holidays("") == {}


def test_a_planned_closure_on_a_holiday_is_planned(tmp_path):
    settings = settings_for(tmp_path, holiday_country="DE", closures_file=closures_csv(tmp_path, "2025-12-24,2025-12-25,winter break"))
    found = calendar(settings, planned_closures(settings), date(2025, 12, 24), date(2025, 12, 26))
    assert [(entry.day.day, entry.kind) for entry in found] == [
        (24, "planned closure"), (25, "planned closure"), (26, "public holiday")]


# -- which days count as closed ----------------------------------------------------------------------------------------


def test_a_holiday_is_closed_below_half_of_what_is_usual_and_open_from_half_on(tmp_path, monkeypatch):
    """Mondays of 10, holidays of 0, 4, 5 and 10; a weekday that never trades; an outage on a Tuesday."""
    days = [date(2024, 3, 4) + timedelta(7 * week) for week in range(4)]
    counts = {START + timedelta(step): 10 for step in range(91) if (START + timedelta(step)).weekday() not in (5, 6)}
    counts |= dict(zip(days, (0, 4, 5, 10), strict=True)) | {date(2024, 3, 5): 0}
    given(monkeypatch, [*map(holiday, days), holiday(date(2024, 3, 30)),
                        CalendarDay(date(2024, 3, 20), "stocktaking", "planned closure")])
    lake = lake_with(shop_of(counts), tmp_path, holiday_country="GB")
    with workspace(lake) as space:
        found = closed(space, START, date(2024, 3, 31))
    assert found == {days[0]: f"holiday of {days[0]}", days[1]: f"holiday of {days[1]}", date(2024, 3, 20): "stocktaking"}
    assert date(2024, 3, 5) not in found, "an outage is an outage"


def test_holidays_and_days_before_the_first_order_teach_nothing_of_what_is_usual(tmp_path, monkeypatch):
    """Two Mondays of 9 before a Monday of 4: the holidays between them and the weeks before the shop would make 4 look normal."""
    day = date(2024, 3, 4)
    quiet = [day - timedelta(7 * week) for week in (1, 2, 3, 4)]
    counts = {day: 4, day - timedelta(35): 9, day - timedelta(42): 9} | dict.fromkeys(quiet, 1)
    lake = lake_with(shop_of(counts), tmp_path, holiday_country="GB")
    given(monkeypatch, [holiday(day), *map(holiday, quiet)])
    with workspace(lake) as space:
        assert day in closed(space, day, day)
        given(monkeypatch, [holiday(day)])
        assert closed(space, day, day) == {}
    first = min(counts)
    given(monkeypatch, [holiday(first)])
    with workspace(lake) as space:
        assert closed(space, first, first) == {}, "with nothing to compare a day is ordinary"


def test_half_of_a_median_between_two_counts(tmp_path, monkeypatch):
    """Mondays of 3 and 8: the median is 5.5, so 2 is below half of it and 3 is not."""
    third, fourth = START + timedelta(14), START + timedelta(21)
    lake = lake_with(shop_of({START: 3, START + timedelta(7): 8, third: 2, fourth: 3}), tmp_path, holiday_country="GB")
    given(monkeypatch, [holiday(third), holiday(fourth)])
    with workspace(lake) as space:
        assert list(closed(space, START, fourth)) == [third]


@pytest.mark.parametrize("seed", range(12))
def test_small_random_shops_say_what_the_naive_rule_says(tmp_path, monkeypatch, seed):
    """Asked for the whole and for ranges inside."""
    orders, entries = random_shop(seed)
    first, last = orders["order_date"].min(), orders["order_date"].max()
    given(monkeypatch, entries)
    with workspace(lake_with(orders, tmp_path, holiday_country="GB")) as space:
        for asked in ((first, last + timedelta(10)), (first + timedelta(15), first + timedelta(33)), (first + timedelta(30),) * 2):
            assert closed(space, *asked) == naive(orders, entries, *asked)


def test_the_random_shops_are_worth_comparing():
    """Closures, holidays that count and holidays that do not are all among them."""
    counted = Counter()
    for seed in range(12):
        orders, entries = random_shop(seed)
        found = naive(orders, entries, date.min, orders["order_date"].max())
        counted.update((entry.kind, entry.day in found) for entry in entries if entry.day <= orders["order_date"].max())
    assert all(counted[case] > 10 for case in (("planned closure", True), ("public holiday", True), ("public holiday", False)))


def test_orders_after_a_day_change_nothing(tmp_path, monkeypatch):
    orders = small_shop()
    entries = [holiday(date(2024, 1, 1) + timedelta(6 * step)) for step in range(20)]
    given(monkeypatch, entries)
    with workspace(lake_with(orders, tmp_path / "all", holiday_country="GB")) as space:
        whole = closed(space, date(2023, 10, 21), date(2024, 5, 27))
    assert 2 < len(whole) < 18
    for day in (entry.day for entry in entries):
        before = orders[orders["order_date"] <= day].reset_index(drop=True)
        with workspace(lake_with(before, tmp_path / str(day), holiday_country="GB")) as space:
            assert (day in closed(space, date(2023, 10, 21), day)) == (day in whole)


def test_returning_customers_read_the_closed_days_of_their_look_back(tmp_path, monkeypatch):
    """Computed with the rule and not before; a shop without a calendar pays for nothing and has none."""
    day, stocktaking = date(2024, 4, 10), date(2024, 3, 20)
    path = closures_csv(tmp_path, f"{stocktaking},,stocktaking")
    lake = lake_with(small_shop(), tmp_path / "home", closures_file=path)
    asked = []
    run = Workspace.run
    monkeypatch.setattr(Workspace, "run", lambda space, rule, **given: (asked.append((rule.table, given)), run(space, rule, **given)))
    with workspace(lake) as space:
        space.build("retention_daily", day)
        assert "closed_days" not in dict(asked)
        space.build("returning_customers", day)
        assert dict(asked)["closed_days"] == {"from_date": day - timedelta(DUE_DAYS), "to_date": day}
        assert space.connection.execute("SELECT * FROM closed_days").fetchall() == [(stocktaking, "stocktaking")]
    asked.clear()
    with workspace(Lake(settings_for(tmp_path / "home"))) as space:
        space.build("returning_customers", day)
        assert "closed_days" not in dict(asked)
        assert space.connection.execute("SELECT * FROM closed_days").fetchall() == []


# -- what results are made from ----------------------------------------------------------------------------------------


def test_the_rules_in_force_are_others_with_another_calendar(tmp_path):
    """The parsed closures count, not the path or how the file is written; no calendar is the rules as they always were."""
    plain = settings_for(tmp_path).rules_sha256()
    one = closures_csv(tmp_path, "2026-01-02,,stocktaking", "2026-08-03,2026-08-05,moving")
    (tmp_path / "other").mkdir()
    same = closures_csv(tmp_path / "other", '"2026-08-03",2026-08-05, moving ', "2026-01-02,2026-01-02,stocktaking")
    found = settings_for(tmp_path, closures_file=one).rules_sha256()
    assert found == settings_for(tmp_path, closures_file=same).rules_sha256()
    countries = {settings_for(tmp_path, holiday_country=country).rules_sha256() for country in ("GB", "GB-ENG", "GB-SCT", "DE")}
    assert len({plain, found, *countries}) == 6
    closures_csv(tmp_path, "2026-01-02,,stocktaking")
    os.utime(one, ns=(1, 1))
    assert settings_for(tmp_path, closures_file=one).rules_sha256() not in (plain, found), "the same path, read again"
    closures_csv(tmp_path)
    assert settings_for(tmp_path, closures_file=one).rules_sha256() == plain


def test_stored_dates_are_stale_after_a_change_of_the_calendar(tmp_path):
    path, day = closures_csv(tmp_path, "2024-03-20,,stocktaking"), date(2024, 4, 10)
    lake = lake_with(small_shop(), tmp_path / "home", closures_file=path)
    with workspace(lake) as space:
        space.build("retention_daily", day)
        lake.write(space.connection, "retention_daily", day, space.provenance)
        assert freshness(lake).other_rules == []
        closures_csv(tmp_path, "2024-03-20,2024-03-22,stocktaking")
        assert freshness(lake).other_rules == [day]
        assert space.provenance == lake.provenance("retention_daily", day), "what this workspace computes is by what it has read"


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_lists_the_calendar_and_what_counts_as_closed(tmp_path, monkeypatch):
    path = closures_csv(tmp_path, "2024-03-20,2024-03-21,stocktaking", "2024-08-05,,later")
    lake = lake_with(small_shop(), tmp_path / "home")
    monkeypatch.setenv("RETENTION_OPS_CLOSURES_FILE", str(path))
    monkeypatch.setenv("RETENTION_OPS_HOLIDAY_COUNTRY", "GB-ENG")
    words = ["--home", str(lake.settings.home), "closures", "--from", "2024-01-01", "--to", "2024-08-31"]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert {row["date"]: (row["kind"], row["closed"]) for row in found if row["kind"] == "planned closure"} == {
        "2024-03-20": ("planned closure", True), "2024-03-21": ("planned closure", True), "2024-08-05": ("planned closure", True)}
    by_date = {row["date"]: row for row in found}
    assert by_date["2024-08-26"]["closed"] is None and by_date["2024-08-26"]["orders"] is None
    assert by_date["2024-04-01"]["closed"] in (True, False) and by_date["2024-04-01"]["orders"] >= 0
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "stocktaking" in shown.stdout and "not known yet" in shown.stdout and "Next:" in shown.stdout
    assert CliRunner().invoke(app, [*words[:4], "2024-09-01", *words[5:]]).exit_code != 0


def test_the_command_needs_no_orders_and_says_how_to_set_a_calendar(tmp_path, monkeypatch):
    words = ["--home", str(tmp_path / "home"), "closures", "--from", "2026-12-01", "--to", "2026-12-31"]
    assert "RETENTION_OPS_HOLIDAY_COUNTRY" in CliRunner().invoke(app, words).stdout
    monkeypatch.setenv("RETENTION_OPS_HOLIDAY_COUNTRY", "DE")
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [(row["date"], row["closed"]) for row in found] == [("2026-12-25", None), ("2026-12-26", None)]


def test_doctor_says_which_calendar_is_in_force(tmp_path, monkeypatch):
    def calendar_finding() -> dict:
        result = CliRunner().invoke(app, ["--home", str(tmp_path / "home"), "doctor", "--json"])
        return next(found for found in json.loads(result.stdout)["findings"] if found["subject"] == "calendar")

    assert calendar_finding()["ok"] is None and "RETENTION_OPS_HOLIDAY_COUNTRY" in calendar_finding()["cure"]
    monkeypatch.setenv("RETENTION_OPS_HOLIDAY_COUNTRY", "GB-ENG")
    path = closures_csv(tmp_path, "2024-03-20,2024-03-21,stocktaking")
    monkeypatch.setenv("RETENTION_OPS_CLOSURES_FILE", str(path))
    said = calendar_finding()
    assert said["ok"] and "public holidays of GB-ENG" in said["sentence"] and "1 planned closure, 2 days" in said["sentence"]
    closures_csv(tmp_path, "never,,x")
    assert calendar_finding()["ok"] is False and "line 2: from 'never' is not a date" in calendar_finding()["sentence"]


# -- two real years ----------------------------------------------------------------------------------------------------

BOTH_YEARS = [REAL_DATA / "uci_online_retail_II_2009-2010.parquet", REAL_DATA / "uci_online_retail.parquet"]
BANK_HOLIDAYS = {date(*day) for day in (
    (2010, 1, 1), (2010, 4, 2), (2010, 4, 5), (2010, 5, 3), (2010, 5, 31), (2010, 8, 30), (2010, 12, 27), (2010, 12, 28),
    (2011, 1, 3), (2011, 4, 22), (2011, 4, 25), (2011, 4, 29), (2011, 5, 2), (2011, 5, 30), (2011, 8, 29))}
"""England's of 2010 and of 2011 up to the last order, as gov.uk lists them"""


@pytest.mark.skipif(not all(file.exists() for file in BOTH_YEARS), reason="real orders (../shared/data) are not here")
def test_the_bank_holidays_of_two_real_years_are_closed_and_no_day_of_trade_is(tmp_path):
    settings = Settings(_env_file=None, home=tmp_path / "home", holiday_country="GB-ENG")
    ingest(BOTH_YEARS, "uci-online-retail", settings)
    lake = Lake(settings)
    with workspace(lake) as space:
        found = set(closed(space, date(2009, 12, 1), date(2011, 12, 9)))
        trade = {day for day, in space.connection.execute("SELECT DISTINCT order_date FROM customer_days").fetchall()}
    others = {date(2009, 12, 25), date(2009, 12, 28), date(2010, 12, 26)}
    assert found == BANK_HOLIDAYS | others and not found & trade
    ordinary = [row["date"] for row in closures_between(lake, date(2009, 12, 1), date(2011, 12, 9)) if not row["closed"]]
    assert ordinary == [date(2009, 12, 26), date(2010, 12, 25), date(2011, 1, 1)], "Saturdays, on which the shop never trades"
    assert date(2010, 12, 24) not in found | trade, "no holiday, no orders: nobody said that the shop was closed"
