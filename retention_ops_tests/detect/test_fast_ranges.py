"""The fast form of a range says, row for row, what the readable rules say one date at a time: every column, to the last bit.

The readable side is one query per date, put together from sql/*.sql alone; created_at is the only column not compared.
What the rules themselves should say is the matter of test_against_oracle.py.
"""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_ops.detect import compute
from retention_ops.detect.compute import BASELINE_DAYS, RETURN_DAYS, Workspace, workspace
from retention_ops.settings import Settings
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.render import Query, fast_query, query, stacked
from retention_ops_tests.detect.test_against_oracle import AS_OF, CUSTOMER, PATIENT, REAL_DATA, RULES, Visits, every_date, shop_of
from retention_ops_tests.oracle import columns_of, dates
from retention_ops_tests.shops import lake_with, refunded_shop, small_shop, write_big_shop

READABLE_QUEUE = stacked(*(query(table) for table in ("base_customers", "retention_snapshot", "churn_detection", "customer_priority")))
RANGES = ("retention_daily", "alert_logic", "customer_priority")
SAME = {"base_customers": 0, **dict.fromkeys(RANGES, 0)}
NO_MEDIAN = [{name: value for name, value in rules.items() if name != "p1_min_revenue"} for rules in RULES]


def keep(space: Workspace, table: str, side: str) -> None:
    """Adds the rows of a temp table to those of one side of the comparison."""
    rows = f"SELECT {', '.join(columns_of(table))} FROM {table}"
    if space.connection.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = ?", [side]).fetchall():
        space.connection.execute(f"INSERT INTO {side} {rows}")
    else:
        space.connection.execute(f"CREATE TEMP TABLE {side} AS {rows}")


def differing_rows(space: Workspace, days: list[date]) -> tuple[dict[str, int], pd.DataFrame]:
    """({table: rows on one side only, of base_customers days that differ}, the alert rows) over all `days`."""
    first, last = days[0], days[-1]
    space.build_range("alert_logic", first, last)
    space.build_range("customer_priority", first, last)
    alerts = space.rows("alert_logic")
    for table in RANGES:
        keep(space, table, f"fast_{table}")
    space.run(query("retention_daily"), from_date=first - timedelta(BASELINE_DAYS), to_date=last)
    space.run(query("alert_logic"), from_date=first, to_date=last)
    keep(space, "retention_daily", "readable_retention_daily")
    keep(space, "alert_logic", "readable_alert_logic")
    readable_rates(space, first, last)
    other_facts = 0
    for day in days:
        space.run(READABLE_QUEUE, reference_date=day, from_date=day, to_date=day)
        keep(space, "customer_priority", "readable_customer_priority")
        other_facts += _fingerprint(space, fast_query("base_customers"), day) != _fingerprint(space, query("base_customers"), day)
    found = {table: _one_sided(space, f"fast_{table}", f"readable_{table}") for table in RANGES}
    return {"base_customers": other_facts, **found}, alerts


def readable_rates(space: Workspace, first: date, last: date) -> None:
    """return_rates by the readable rules alone."""
    space.run(query("return_days"), from_date=first, to_date=last)
    space.run(query("return_windows"), from_date=first - timedelta(RETURN_DAYS[0]), to_date=last - timedelta(RETURN_DAYS[1]))
    space.run(query("return_rates"), from_date=first, to_date=last)


def _fingerprint(space: Workspace, rule: Query, day: date) -> tuple:
    """Rows and sum of their 64-bit hashes: a year of 65,000 customers a day is too much to keep twice."""
    space.run(rule, reference_date=day)
    columns = ", ".join(columns_of(rule.table))
    return space.connection.execute(f"SELECT COUNT(*), SUM(CAST(hash({columns}) AS HUGEINT)) FROM {rule.table}").fetchall()[0]


def _one_sided(space: Workspace, one: str, other: str) -> int:
    return space.connection.execute(f"""
        SELECT COUNT(*) FROM (
          (FROM {one} EXCEPT ALL FROM {other}) UNION ALL (FROM {other} EXCEPT ALL FROM {one}))""").fetchall()[0][0]



# ------------------------------------------------------------------------------------------------------- every date

@pytest.mark.parametrize("rules", [{}, *(pytest.param(NO_MEDIAN[place], marks=pytest.mark.slow) for place in (0, 4))], ids=str)
def test_every_date_of_a_small_shop(tmp_path: Path, rules: dict):
    orders = small_shop()
    with workspace(lake_with(orders, tmp_path, min_sample=40, **rules)) as space:
        found, alerts = differing_rows(space, every_date(orders))
        assert found == SAME
        assert {"WARNING", "CRITICAL"} <= set(alerts["severity"]) or rules


@pytest.mark.slow
@pytest.mark.parametrize("examples", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_ranges_around_customers_on_every_line(tmp_path_factory: pytest.TempPathFactory, examples: int):
    arbitrary = given(people=st.lists(CUSTOMER, min_size=20, max_size=30), d=AS_OF, seed=st.integers(0, 10_000), turn=st.integers(0, 8),
                      behind=st.integers(0, 30), length=st.integers(1, 12))
    settings(max_examples=examples, **PATIENT)(arbitrary(_ranges_around_lines))(tmp_path_factory=tmp_path_factory)


def _ranges_around_lines(tmp_path_factory: pytest.TempPathFactory, people: list[Visits], d: date, seed: int, turn: int, behind: int,
                         length: int):
    orders = shop_of(people, d, seed)
    if turn % 2:
        orders = refunded_shop(orders, d, seed)
    home = lake_with(orders, tmp_path_factory.mktemp("lines")).settings.home
    start = d - timedelta(behind)
    for rules in ({}, NO_MEDIAN[turn], NO_MEDIAN[turn - 4]):
        with workspace(Lake(Settings(_env_file=None, home=home, min_sample=0, **rules))) as space:
            # up to the day of the lines, and over it
            for days in (dates(start - timedelta(length), start), dates(d - timedelta(1), d + timedelta(length))):
                assert differing_rows(space, days)[0] == SAME, rules
                for table in RANGES:
                    space.connection.execute(f"DROP TABLE fast_{table}; DROP TABLE readable_{table}")


@pytest.mark.slow
@pytest.mark.parametrize("rules", [{}, {"membership": "at_stake"}, NO_MEDIAN[0], NO_MEDIAN[4]], ids=str)
def test_every_date_of_a_shop_with_refunds(tmp_path: Path, rules: dict):
    """In the middle of a silence, on the day of an order, before it, of the latest order and of others, in full and in parts."""
    orders = refunded_shop(small_shop(), date(2024, 3, 1), 1)
    assert sum(map(len, orders["refunds"])) > 300
    with workspace(lake_with(orders, tmp_path, min_sample=40, **rules)) as space:
        assert differing_rows(space, every_date(orders))[0] == SAME


@pytest.mark.parametrize("table", RANGES)
def test_a_range_does_not_depend_on_where_it_begins_and_ends(tmp_path: Path, table: str):
    """What one day says is the same in a year as alone: the look-back before the range is long enough."""
    days = dates(date(2024, 1, 10), date(2024, 5, 20))
    with workspace(lake_with(small_shop(), tmp_path, min_sample=40)) as space:
        space.build_range(table, days[0], days[-1])
        keep(space, table, "whole")
        for start in range(0, len(days), 17):
            part = days[start:start + 17]
            with workspace(space.lake) as alone:
                alone.build_range(table, part[0], part[-1])
                rows = alone.connection.sql(f"SELECT {', '.join(columns_of(table))} FROM {table}").to_arrow_table()
            space.connection.register("rows_alone", rows)
            column = "run_date" if table == "customer_priority" else "alert_date" if table == "alert_logic" else "as_of_date"
            space.connection.execute(f"CREATE OR REPLACE TEMP VIEW part AS FROM whole WHERE {column} >= DATE '{part[0]}' "
                                     f"AND {column} <= DATE '{part[-1]}'")
            space.connection.execute(f"CREATE OR REPLACE TEMP VIEW alone AS FROM rows_alone WHERE {column} >= DATE '{part[0]}'")
            assert _one_sided(space, "part", "alone") == 0


def test_batches_cover_every_day_once_and_hold_the_rows_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    days = dates(date(2024, 1, 10), date(2024, 5, 20))
    monkeypatch.setattr(compute, "BATCH_ROWS", 60)
    with workspace(lake_with(small_shop(), tmp_path)) as space:
        space.build_range("customer_priority", days[0], days[-1])
        keep(space, "customer_priority", "whole")
        batches = []
        for batch in space.queue_batches(days):
            batches.append(batch)
            space.build_range("customer_priority", batch[0], batch[-1])
            keep(space, "customer_priority", "in_batches")
        assert len(batches) > 10 and [day for batch in batches for day in batch] == days
        assert _one_sided(space, "whole", "in_batches") == 0


def test_a_day_after_a_range_and_a_range_after_a_day(tmp_path: Path):
    """One workspace goes from the one-day plan to intervals and back."""
    day = date(2024, 4, 20)
    with workspace(lake_with(small_shop(), tmp_path)) as space:
        for side in ("first", "second"):
            space.build("customer_priority", day)
            keep(space, "customer_priority", f"{side}_alone")
            space.build_range("customer_priority", day - timedelta(3), day)
            space.connection.execute(f"DELETE FROM customer_priority WHERE run_date < DATE '{day}'")
            keep(space, "customer_priority", f"{side}_in_range")
        assert _one_sided(space, "first_alone", "first_in_range") == _one_sided(space, "second_alone", "second_in_range") == 0


def test_intervals_refuse_the_median_rule(tmp_path: Path):
    with workspace(lake_with(small_shop(), tmp_path, p1_min_revenue="median")) as space, pytest.raises(ValueError, match="median"):
        space.build_range("customer_priority", date(2024, 1, 1), date(2024, 1, 2))


@pytest.mark.slow
def test_every_date_of_a_year_of_a_million_orders(tmp_path: Path):
    write_big_shop(tmp_path / "orders.parquet", customers=49_000)
    chosen = Settings(_env_file=None, home=tmp_path / "home")
    assert ingest([tmp_path / "orders.parquet"], "orders", chosen).rows > 1_000_000
    with workspace(Lake(chosen)) as space:
        found, alerts = differing_rows(space, dates(date(2024, 12, 31), date(2025, 12, 31)))
        tiers = space.connection.execute("SELECT priority_tier, COUNT(*) FROM fast_customer_priority GROUP BY ALL").fetchall()
    assert found == SAME
    assert {"WARNING", "CRITICAL"} <= set(alerts["severity"])
    assert len(tiers) == 3 and sum(rows for _, rows in tiers) > 500_000


@pytest.mark.slow
def test_every_date_of_two_real_years(tmp_path: Path):
    files = [REAL_DATA / "uci_online_retail_II_2009-2010.parquet", REAL_DATA / "uci_online_retail.parquet"]
    if not all(file.is_file() for file in files):
        pytest.skip("the real orders are not here: put them into ../shared/data beside the repository")
    chosen = Settings(_env_file=None, home=tmp_path)
    ingest(files, "uci-online-retail", chosen)
    with workspace(Lake(chosen)) as space:
        assert differing_rows(space, dates(date(2009, 11, 25), date(2011, 12, 12)))[0] == SAME
