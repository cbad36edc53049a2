"""Partitions are whole or absent, readers are never disturbed, and the views are always there."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from datetime import date, timedelta
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from retention_ops.detect.compute import table_for, workspace
from retention_ops.errors import NoOrders
from retention_ops.warehouse.catalog import DUCKDB_TYPES, TABLES
from retention_ops.warehouse.freshness import Freshness, freshness
from retention_ops.warehouse.lake import Lake, read_provenance
from retention_ops_tests.conftest import LAST_DAY, settings_for
from retention_ops_tests.shops import lake_with, small_shop

D = LAST_DAY


def store(lake: Lake, table: str, day: date) -> None:
    with workspace(lake) as space:
        space.build(table, day)
        lake.write(space.connection, table, day, space.provenance)


def test_without_orders_every_view_exists_is_typed_and_empty(tmp_path):
    lake = Lake(settings_for(tmp_path / "home"))
    lake.refresh_views()
    with duckdb.connect(str(lake.views_path), read_only=True) as connection:
        for table in TABLES.values():
            rows = connection.execute(f"DESCRIBE {table.name}").fetchall()
            described = {name: type_ for name, type_, *_ in rows if name != "day"}
            assert described == {column.name: DUCKDB_TYPES[column.type] for column in table.columns}
            assert connection.execute(f"SELECT COUNT(*) FROM {table.name}").fetchall() == [(0,)]


def test_computing_without_orders_says_how_to_get_some(tmp_path):
    with pytest.raises(NoOrders, match="retention-ops ingest"):
        table_for(Lake(settings_for(tmp_path / "home")), "base_customers", D)


def test_a_partition_is_one_file_with_its_provenance(small_lake):
    store(small_lake, "base_customers", D)
    folder = small_lake.path("base_customers", D).parent
    assert [path.name for path in folder.iterdir()] == ["part-0.parquet"]
    with small_lake.connection() as connection:
        made_from = read_provenance(connection, folder / "part-0.parquet")
    assert made_from["orders_version"] == small_lake.orders().version
    assert made_from["rules_sha256"] == small_lake.settings.rules_sha256()


def test_some_days_provenance_and_some_columns_of_a_partition(small_lake):
    days = [LAST_DAY - timedelta(days=back) for back in (2, 1, 0)]
    for day in days:
        store(small_lake, "retention_daily", day)
    assert [day for day, _ in small_lake.provenances(["retention_daily"], days[1])] == days[1:]
    assert small_lake.provenances(["retention_daily"], days[0], days[0]) == [(days[0], small_lake.provenance("retention_daily", days[0]))]
    narrow = small_lake.read("retention_daily", days[0], columns=("customers", "as_of_date"))
    pd.testing.assert_frame_equal(narrow, small_lake.read("retention_daily", days[0])[["customers", "as_of_date"]])
    absent = small_lake.read("retention_daily", days[0] - timedelta(days=1), columns=("customers",))
    assert list(absent) == ["customers"] and absent.empty and absent.dtypes.tolist() == narrow.dtypes.tolist()[:1]


def test_the_views_show_a_partition_as_soon_as_it_is_stored(small_lake):
    small_lake.refresh_views()
    store(small_lake, "retention_daily", D)
    small_lake.refresh_views()
    with duckdb.connect(str(small_lake.views_path), read_only=True) as connection:
        assert connection.execute("SELECT as_of_date, day FROM retention_daily").fetchall() == [(D, D)]
        orders = connection.execute("SELECT COUNT(*) FROM orders").fetchall()[0][0]
    assert orders == small_lake.orders().orders


@pytest.mark.parametrize("name", ["it's \"a\" [1] * home", "day=2024-01-01", "as_of_date=7", "customer_id=7", "up/../a[1]"])
def test_the_name_of_the_home_folder_means_nothing(tmp_path, name):
    """Not to ingest, compute, write, read or the views: a wildcard in it is a letter, a 'name=value' folder no column."""
    (tmp_path / "up").mkdir()
    lake = lake_with(small_shop(), tmp_path / name, min_sample=10)
    days = [D - timedelta(1), D]
    for day in days:
        store(lake, "base_customers", day)
        store(lake, "alert_logic", day)
    for table in ("base_customers", "alert_logic"):
        columns = TABLES[table].column_names
        computed = {day: table_for(lake, table, day) for day in days}
        assert lake.days(table) == days and len(computed[D])
        assert lake.read(table, D).equals(computed[D]) and list(lake.read(table, D)) == columns
        assert lake.read(table, D - timedelta(9)).columns.tolist() == columns
        assert lake.read_range(table, *days).equals(pd.concat(computed.values(), ignore_index=True))
        assert lake.provenance(table, D)["orders_version"] == lake.orders().version
    assert freshness(lake) == Freshness([], [])
    lake.refresh_views()
    with duckdb.connect(str(lake.views_path), read_only=True) as connection:
        assert connection.execute("SELECT COUNT(*) FROM orders").fetchall() == [(lake.orders().orders,)]
        assert connection.execute("SELECT SUM(orders) FROM customer_days").fetchall() == [(lake.orders().orders,)]
        assert connection.execute("SELECT COUNT(*) FROM retention_daily").fetchall() == [(0,)]
        for table in ("base_customers", "alert_logic"):
            seen = connection.sql(f"SELECT * FROM {table} WHERE day = DATE '{D}' ORDER BY {TABLES[table].key[0]}").df()
            assert seen.drop(columns="day").equals(lake.read(table, D))
            assert connection.execute(f"SELECT DISTINCT day FROM {table} ORDER BY 1").fetchall() == [(day,) for day in days]


def test_a_file_holds_its_declared_columns_and_is_read_with_no_others(small_lake):
    assert list(small_lake.read("orders", small_lake.orders().version)) == TABLES["orders"].column_names
    store(small_lake, "base_customers", D)
    with workspace(small_lake) as space:
        space.use("base_customers", D)
        for table in ("orders", "customer_days", "base_customers"):
            assert space.connection.table(table).columns == TABLES[table].column_names


def test_a_question_about_one_day_opens_the_file_of_that_day_only(small_lake):
    for offset in range(3):
        store(small_lake, "retention_daily", D - timedelta(offset))
    small_lake.refresh_views()
    with duckdb.connect(str(small_lake.views_path), read_only=True) as connection:
        plan = connection.execute(f"EXPLAIN ANALYZE SELECT * FROM retention_daily WHERE day = DATE '{D}'").fetchall()[0][1]
    assert "Total Files Read: 1 " in plan


def test_what_was_read_from_its_file_can_be_computed_under_the_same_name(small_lake):
    """A view gives way to a table and a table to a view."""
    store(small_lake, "base_customers", D)
    with workspace(small_lake) as space:
        for day in (D, D - timedelta(1), D):
            space.use("base_customers", day)
            assert space.rows("base_customers")["as_of_date"].dt.date.unique().tolist() == [day]


def test_the_views_are_empty_again_when_the_last_partition_is_gone(small_lake):
    store(small_lake, "retention_daily", D)
    small_lake.refresh_views()
    small_lake.path("retention_daily", D).unlink()  # the folder stays
    small_lake.refresh_views()
    with duckdb.connect(str(small_lake.views_path), read_only=True) as connection:
        assert connection.execute("SELECT COUNT(*) FROM retention_daily").fetchall() == [(0,)]


def test_stored_input_of_another_make_is_computed_again(small_lake):
    """A partition from other orders or other rules must not leak into the next table."""
    store(small_lake, "base_customers", D)
    expected = table_for(small_lake, "retention_snapshot", D)
    with workspace(small_lake) as space:
        space.build("base_customers", D)
        space.connection.execute("UPDATE base_customers SET last_order_date = last_order_date - INTERVAL 400 DAY")
        small_lake.write(space.connection, "base_customers", D, {**space.provenance, "orders_version": "000000-older"})
    assert table_for(small_lake, "retention_snapshot", D).equals(expected)


def test_shopping_days_of_an_older_make_are_derived_again(small_lake):
    """They are kept as long as their orders, also when the code learns a new column."""
    expected = table_for(small_lake, "base_customers", D)
    version = small_lake.orders().version
    path = small_lake.path("customer_days", version)
    with small_lake.connection() as connection:
        connection.execute(f"CREATE TEMP TABLE old AS SELECT customer_id, order_date FROM '{path}'")
        connection.execute(f"COPY old TO '{path}' (FORMAT parquet)")
    assert table_for(small_lake, "base_customers", D).equals(expected)
    assert list(small_lake.read("customer_days", version)) == TABLES["customer_days"].column_names


def test_only_the_newest_snapshots_are_kept(small_lake):
    days = [D - timedelta(offset) for offset in (0, 89, 90, 120)]
    for day in days:
        store(small_lake, "base_customers", day)
        store(small_lake, "customer_priority", day)
    assert small_lake.prune_snapshots("base_customers", D) == [D - timedelta(120), D - timedelta(90)]
    assert small_lake.days("base_customers") == [D - timedelta(89), D]
    assert small_lake.prune_snapshots("customer_priority", D) == []


WRITER = textwrap.dedent("""
    import sys
    from datetime import date, timedelta
    from pathlib import Path
    from retention_ops.detect.compute import workspace
    from retention_ops.settings import Settings
    from retention_ops.warehouse.lake import Lake
    home, first, count, rounds = Path(sys.argv[1]), date.fromisoformat(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    lake = Lake(Settings(_env_file=None, home=home, min_sample=10))
    print("ready", flush=True)
    for turn in range(rounds):
        with workspace(lake) as space:
            for offset in range(count):
                day = first + timedelta(offset)
                for table in ("base_customers", "alert_logic", "retention_daily", "customer_priority"):
                    space.build(table, day)
                    lake.write(space.connection, table, day, {**space.provenance, "turn": str(turn)})
                lake.refresh_views()
""")


def start_writer(lake: Lake, first: date, count: int, rounds: int) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(lake.settings.home), first.isoformat(), str(count), str(rounds)],
        stdout=subprocess.PIPE, text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_two_processes_write_different_dates_while_a_third_reads(small_lake):
    """No lock error, no torn partition: every read of warehouse.duckdb sees whole partitions only."""
    expected = {day: len(table_for(small_lake, "base_customers", day)) for day in (D - timedelta(offset) for offset in range(12))}
    small_lake.refresh_views()
    writers = [start_writer(small_lake, D - timedelta(11), 6, 4), start_writer(small_lake, D - timedelta(5), 6, 4)]
    reads, seen = 0, {}
    while any(writer.poll() is None for writer in writers):
        with duckdb.connect(str(small_lake.views_path), read_only=True) as connection:
            seen = dict(connection.execute("SELECT day, COUNT(*) FROM base_customers GROUP BY day").fetchall())
            joined = connection.execute("SELECT COUNT(*) FROM alert_logic JOIN retention_daily ON as_of_date = alert_date").fetchall()
        assert all(expected[day] == rows for day, rows in seen.items())
        assert 0 <= joined[0][0] <= 2 * len(expected), "a row for each rule"
        reads += 1
    assert [writer.returncode for writer in writers] == [0, 0]
    with duckdb.connect(str(small_lake.views_path), read_only=True) as connection:
        seen = dict(connection.execute("SELECT day, COUNT(*) FROM base_customers GROUP BY day").fetchall())
    assert seen == expected
    assert reads >= 10


@pytest.mark.parametrize("delay", [0.02, *(pytest.param(delay, marks=pytest.mark.slow) for delay in (0.002, 0.01, 0.035, 0.05, 0.08))])
def test_kill_9_in_the_middle_of_a_write_leaves_the_old_partition_whole(small_lake, delay):
    tables = ("base_customers", "alert_logic", "retention_daily", "customer_priority")
    for table in tables:
        store(small_lake, table, D)
    expected = {table: small_lake.read(table, D).drop(columns="created_at", errors="ignore") for table in tables}
    writer = start_writer(small_lake, D, 1, 10_000)
    time.sleep(0.15 + delay)  # it is now writing the same partition over and over
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    for table in tables:
        assert small_lake.read(table, D).drop(columns="created_at", errors="ignore").equals(expected[table])
        visible = [path.name for path in small_lake.path(table, D).parent.glob("*.parquet")]
        assert visible == ["part-0.parquet"]
    small_lake.refresh_views()
    with duckdb.connect(str(small_lake.views_path), read_only=True) as connection:
        assert connection.execute("SELECT COUNT(*) FROM alert_logic").fetchall() == [(2,)]


def test_a_write_that_fails_leaves_no_file_behind(small_lake):
    store(small_lake, "base_customers", D)
    before = small_lake.path("base_customers", D).read_bytes()
    with workspace(small_lake) as space, pytest.raises(duckdb.Error):
        space.connection.execute("CREATE TEMP TABLE base_customers AS SELECT 1 AS nothing_fits")
        small_lake.write(space.connection, "base_customers", D, {})
    assert small_lake.path("base_customers", D).read_bytes() == before
    assert sorted(path.name for path in small_lake.path("base_customers", D).parent.iterdir()) == ["part-0.parquet"]


def test_moving_the_home_rebuilds_the_views(small_lake, tmp_path):
    store(small_lake, "retention_daily", D)
    small_lake.refresh_views()
    moved = tmp_path / "moved"
    Path(small_lake.settings.home).rename(moved)
    lake = Lake(settings_for(moved))
    lake.refresh_views()
    with duckdb.connect(str(lake.views_path), read_only=True) as connection:
        assert connection.execute("SELECT COUNT(*) FROM retention_daily").fetchall() == [(1,)]


def test_partitions_from_before_a_column_was_declared_are_read_with_nulls(tmp_path):
    """Alone and beside a new one: the declared columns, in their order and types."""
    lake = Lake(settings_for(tmp_path))
    declared, days = TABLES["alert_logic"], (date(2024, 2, 1), date(2024, 2, 2))
    values = {"STRING": "'x'", "DATE": "DATE '2024-02-01'", "INT64": "1", "FLOAT64": "1.5", "BOOL": "true"}
    for day, columns in zip(days, (declared.columns[:14], declared.columns), strict=True):
        lake.path("alert_logic", day).parent.mkdir(parents=True)
        row = ", ".join(f"CAST({values[c.type]} AS {DUCKDB_TYPES[c.type]}) AS {c.name}" for c in columns)
        duckdb.sql(f"COPY (SELECT {row}) TO '{lake.path('alert_logic', day)}' (FORMAT parquet)")
        lake.refresh_views()
        with duckdb.connect(str(lake.views_path), read_only=True) as connection:
            seen = connection.execute("SELECT day, alert_type, score, day_alone FROM alert_logic ORDER BY day").fetchall()
        assert seen == [(days[0], "x", None, None), (days[1], "x", 1.5, True)][:len(seen)] and seen[-1][0] == day
    old, mixed = lake.read("alert_logic", days[0]), lake.read_range("alert_logic", *days)
    assert list(old.columns) == list(mixed.columns) == declared.column_names
    assert old["sentence"].isna().all() and sorted(mixed["score"].isna()) == [False, True]
    assert dict(old.dtypes) == dict(mixed.dtypes)


@pytest.mark.parametrize("damaged", [D - timedelta(1), D], ids=["an older one", "the newest"])
def test_views_made_anew_leave_out_a_damaged_partition_until_it_is_stored_again(small_lake, damaged):
    days = [D - timedelta(1), D]
    for day in days:
        store(small_lake, "retention_daily", day)
    small_lake.path("retention_daily", damaged).write_bytes(b"not parquet")
    foreign = small_lake.root / "retention_daily" / "day=foo"
    foreign.mkdir()
    (foreign / "part-0.parquet").touch()
    small_lake.views_path.unlink(missing_ok=True)

    def shown() -> list:
        small_lake.refresh_views()
        with duckdb.connect(str(small_lake.views_path), read_only=True) as connection:
            return connection.execute("SELECT day FROM retention_daily ORDER BY day").fetchall()

    assert shown() == [(day,) for day in days if day != damaged]
    store(small_lake, "retention_daily", damaged)
    assert shown() == [(day,) for day in days]
