"""Orders as immutable versions: what a second ingest adds, corrects or leaves alone, and what survives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import pytest

import retention_ops
from retention_ops.errors import InputRefused, RetentionOpsError, UsageError
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.versions import current_customers, current_orders, orders_versions
from retention_ops_tests.sources import NOW, ORDERS_HEADER, Shop

A1 = ("O1", "A", "2024-05-02", "10.00")
A2 = ("O2", "A", "2024-05-09", "20.00")
B1 = ("O3", "B", "2024-05-05", "5.00")


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path)


def test_before_the_first_ingest_there_is_nothing(shop):
    assert current_orders(shop.settings) is None
    assert current_customers(shop.settings) is None
    assert orders_versions(shop.settings) == []


def test_a_version_records_what_it_is_and_where_it_came_from(shop):
    report = shop.add(A1, A2)
    version = shop.current
    assert version.version == report.version == f"000001-{report.content_sha256[:12]}"
    assert version.path == shop.settings.home / "lake" / "orders" / f"version={version.version}" / "part-0.parquet"
    assert (version.orders, version.customers, version.currency, version.preset) == (2, 1, "EUR", "orders")
    assert (version.first_date, version.last_date) == (date(2024, 5, 2), date(2024, 5, 9))
    assert (version.parent, version.stale_from, version.created_at) == (None, None, NOW)
    assert version.files == report.files == [{"name": "orders.csv", "sha256": report.files[0]["sha256"], "records": 2}]
    assert len(report.files[0]["sha256"]) == 64
    stored = duckdb.execute("SELECT * FROM read_parquet(?, hive_partitioning = false)", [str(version.path)])
    assert [column[0] for column in stored.description] == TABLES["orders"].column_names
    assert json.loads(json.dumps(report.to_json()))["last_date"] == "2024-05-09"


def test_progress_says_what_is_being_done_with_how_many_records(shop):
    shop.add(A1, A2)
    assert shop.progress[:3] == ["reading orders.csv", "checking 2 records of orders.csv", "grouping 2 records into orders"]
    assert "2 orders of 1 customers" in shop.progress[-1]


@pytest.mark.parametrize("name", ["it's", "a*[1]?", "day=2024-05-02"])
def test_the_name_of_the_home_folder_means_nothing(tmp_path, name):
    (tmp_path / name).mkdir()
    shop = Shop(tmp_path / name)
    shop.add(A1)
    assert shop.add(A2).rows == 2


# --- the same again, more, corrections ---


def test_the_same_content_again_changes_nothing(shop):
    shop.add(A1, A2)
    before = shop.lake()
    report = shop.add(A2, ("O1", "A", "2024-05-02T13:00:00", "10"))
    assert (report.changed, report.unchanged, report.added, report.stale_from) == (False, 2, 0, None)
    assert report.version == shop.current.version and report.rows == 2
    assert shop.lake() == before


def test_new_orders_are_added_to_the_known_ones(shop):
    shop.add(A1, A2)
    report = shop.add(B1, A1)
    assert (report.added, report.unchanged, report.rows, report.customers) == (1, 1, 3, 2)
    assert report.stale_from == date(2024, 5, 5)
    assert [row[0] for row in shop.orders()] == ["O1", "O2", "O3"]
    assert shop.current.parent == orders_versions(shop.settings)[0].version


def test_the_hash_of_the_content_knows_no_order_of_files_or_ingests(tmp_path):
    hashes = set()
    for number, batches in enumerate(([(A1, A2, B1)], [(B1,), (A2, A1)], [(A2,), (A1,), (B1,)])):
        (tmp_path / str(number)).mkdir()
        shop = Shop(tmp_path / str(number))
        for batch in batches:
            shop.add(*batch)
        hashes.add(shop.current.content_sha256)
    assert len(hashes) == 1


@pytest.mark.parametrize("change", [
    ("O2", "B", "2024-05-09", "20.00"), ("O2", "A", "2024-05-08", "20.00"), ("O2", "A", "2024-05-09", "20.01"),
    ("O2", "A", "2024-05-09", "0"),
])
def test_a_known_order_with_other_content_is_an_error_without_replace(shop, change):
    shop.add(A1, A2)
    before = shop.lake()
    with pytest.raises(InputRefused) as caught:
        shop.add(B1, change)
    assert "orders.csv line 3: order_id is already known with different content" in str(caught.value)
    assert "--replace" in str(caught.value) and "O2" not in str(caught.value)
    assert shop.lake() == before
    with pytest.raises(InputRefused, match="order_id 'O2' is already known"):
        shop.add(B1, change, show_values=True)


def test_replace_corrects_a_known_order_and_tells_from_when_on_results_are_stale(shop):
    shop.add(A1, A2)
    report = shop.add(("O2", "A", "2024-05-04", "25.00"), A1, replace=True)
    assert (report.replaced, report.unchanged, report.added, report.removed) == (1, 1, 0, 0)
    assert report.stale_from == shop.current.stale_from == date(2024, 5, 4)  # the new date, which is before the old one
    assert shop.orders()[1] == ("O2", "A", date(2024, 5, 4), 2500, "EUR")
    assert shop.add(("O2", "A", "2024-05-30", "25.00"), replace=True).stale_from == date(2024, 5, 4)  # now the old one


def test_replace_with_a_worthless_order_removes_it(shop):
    shop.add(A1, A2)
    report = shop.add(("O1", "A", "2024-05-20", "0"), replace=True)
    assert (report.removed, report.rows, report.excluded) == (1, 1, {"zero amount": 1})
    assert report.stale_from == date(2024, 5, 2)
    with pytest.raises(InputRefused, match="would leave no orders at all"):
        shop.add(("O2", "A", "2024-05-20", "0"), replace=True)
    assert shop.current.orders == 1


def test_a_worthless_order_that_nobody_knows_changes_nothing(shop):
    shop.add(A1)
    assert shop.add(("O9", "A", "2024-05-20", "0")).changed is False


# --- complete_through ---


def test_complete_through_is_the_newest_order_unless_said_otherwise(shop):
    assert shop.add(A1).complete_through == date(2024, 5, 2)
    assert shop.add(A2).complete_through == date(2024, 5, 9)
    assert shop.add(B1).complete_through == date(2024, 5, 9)
    assert shop.add(("O4", "A", "2024-05-10", 1), complete_through=date(2024, 5, 12)).complete_through == date(2024, 5, 12)
    assert shop.add(("O5", "A", "2024-05-11", 1)).complete_through == date(2024, 5, 12)


@pytest.mark.parametrize(("day", "stale_from"), [(date(2024, 5, 12), date(2024, 5, 10)), (date(2024, 5, 4), date(2024, 5, 5))])
def test_complete_through_alone_makes_a_version_with_the_same_orders(shop, day, stale_from):
    first = shop.add(A1, A2)
    report = shop.add(A1, complete_through=day)
    assert (report.changed, report.complete_through, report.stale_from) == (True, day, stale_from)
    assert report.content_sha256 == first.content_sha256 and report.version != first.version
    assert shop.add(A1, complete_through=day).changed is False


def test_known_content_does_not_undo_an_override(shop):
    shop.add(A1, A2, complete_through=date(2024, 5, 4))
    assert shop.add(A1, A2).complete_through == date(2024, 5, 4)
    assert shop.add(A1, A2).changed is False


def test_stale_from_is_the_earlier_of_new_orders_and_moved_completeness(shop):
    shop.add(A1, A2)
    assert shop.add(B1, complete_through=date(2024, 5, 20)).stale_from == date(2024, 5, 5)
    assert shop.add(("O9", "B", "2024-05-30", 1)).stale_from == date(2024, 5, 21)


TODAY = NOW.date()
YESTERDAY = TODAY - timedelta(days=1)
TOMORROW = TODAY + timedelta(days=1)


def test_a_day_that_is_not_over_is_not_complete(shop):
    report = shop.add(A1, ("O2", "A", TODAY, 1))
    assert (report.complete_through, report.last_date) == (YESTERDAY, TODAY)
    assert report.complete_through_note == "the newest orders are from today, 2026-01-15, which is not over yet"
    again = shop.add(A1, ("O2", "A", TODAY, 1))
    assert (again.changed, again.complete_through, again.complete_through_note) == (False, YESTERDAY, report.complete_through_note)
    ahead = shop.add(("O3", "A", TOMORROW, 1))
    assert ahead.complete_through == YESTERDAY
    assert ahead.complete_through_note == "the newest orders are from tomorrow, 2026-01-16, and today, 2026-01-15, is not over yet"


@pytest.mark.parametrize("day", [date(2024, 5, 2), YESTERDAY])
def test_a_day_that_is_over_needs_no_note(shop, day):
    report = shop.add(("O1", "A", day, 1))
    assert (report.complete_through, report.complete_through_note) == (day, "")


def test_the_next_days_orders_complete_a_day_and_the_same_file_does_not(shop):
    """A noon export stays a noon export however late it is ingested again."""
    noon = shop.orders_csv(A1, ("O2", "A", TODAY, 1))
    shop.ingest(noon)

    def next_day(file):
        return ingest([file], "orders", shop.settings, clock=lambda: NOW + timedelta(days=1))

    again = next_day(noon)
    assert (again.changed, again.complete_through) == (False, YESTERDAY)
    assert again.complete_through_note.endswith("if it is, say --complete-through 2026-01-15")
    more = next_day(shop.orders_csv(("O3", "A", TOMORROW, 1)))
    assert (more.complete_through, more.stale_from) == (TODAY, TODAY)


def test_orders_of_today_alone_complete_nothing(shop):
    report = shop.add(("O1", "A", TODAY, 1))
    assert (report.first_date, report.complete_through) == (TODAY, YESTERDAY)


@pytest.mark.parametrize(("zone", "hour", "complete"), [
    ("UTC", 12, YESTERDAY), ("Pacific/Kiritimati", 9, YESTERDAY), ("Pacific/Kiritimati", 10, TODAY),
    ("America/New_York", 4, YESTERDAY - timedelta(days=1)), ("America/New_York", 5, YESTERDAY),
])
def test_the_day_ends_in_the_time_zone_of_the_shop(tmp_path, zone, hour, complete):
    shop = Shop(tmp_path, shop_timezone=zone)
    path = shop.orders_csv(A1, ("O2", "A", TODAY, 1))

    def take_in(**options):
        return ingest([path], "orders", shop.settings, clock=lambda: datetime(2026, 1, 15, hour, tzinfo=UTC), **options)

    with pytest.raises(UsageError, match="not over yet"):
        take_in(complete_through=complete + timedelta(days=1))
    assert shop.lake() == {}
    assert take_in(complete_through=complete).complete_through == complete
    (tmp_path / "other").mkdir()
    shop = Shop(tmp_path / "other", shop_timezone=zone)
    assert take_in().complete_through == complete


def test_a_day_that_is_not_over_cannot_be_called_complete(shop):
    with pytest.raises(UsageError, match=r"2026-01-15 is today in shop_timezone UTC.*not over yet.*2026-01-14"):
        shop.add(A1, complete_through=TODAY)
    with pytest.raises(UsageError, match="2026-01-16 is in the future"):
        shop.add(A1, complete_through=TOMORROW)
    assert shop.lake() == {}


def test_complete_through_before_the_first_order_is_refused(shop):
    with pytest.raises(UsageError, match="2024-05-01 is before the first order, of 2024-05-02"):
        shop.add(A1, A2, complete_through=date(2024, 5, 1))
    assert shop.lake() == {}
    shop.add(A1, A2, complete_through=date(2024, 5, 2))
    before = shop.lake()
    for row, day in ((A1, date(2024, 5, 1)), (("O0", "A", "2024-04-30", 1), date(2024, 4, 29))):
        with pytest.raises(UsageError, match="before the first order"):
            shop.add(row, complete_through=day)
    with pytest.raises(UsageError, match="before the first order, of 2024-05-09"):
        shop.add(("O1", "A", "2024-05-02", 0), replace=True, complete_through=date(2024, 5, 3))
    assert shop.lake() == before
    assert shop.add(("O0", "A", "2024-04-30", 1), complete_through=date(2024, 5, 1)).complete_through == date(2024, 5, 1)


# --- history ---


def test_old_files_go_but_their_story_stays(tmp_path):
    shop = Shop(tmp_path, orders_keep_versions=2)
    for day in range(1, 5):
        shop.add((f"O{day}", "A", f"2024-05-0{day}", 1))
    versions = orders_versions(shop.settings)
    assert [version.orders for version in versions] == [1, 2, 3, 4]
    assert [version.path.exists() for version in versions] == [False, False, True, True]
    assert [version.parent for version in versions] == [None, *(version.version for version in versions[:-1])]
    assert [version.version[:6] for version in versions] == ["000001", "000002", "000003", "000004"]


def test_a_lost_or_broken_pointer_is_told_and_never_guessed(shop):
    shop.add(A1)
    shop.add(A2)
    pointer = shop.settings.home / "lake" / "orders" / "CURRENT"
    content = pointer.read_bytes()
    for broken in (b"", b"{", b"[]", b'{"version": "000009-000000000000"}'):
        pointer.write_bytes(broken)
        with pytest.raises(RetentionOpsError, match="CURRENT"):
            current_orders(shop.settings)
    pointer.unlink()
    with pytest.raises(RetentionOpsError, match="CURRENT is missing"):
        shop.add(B1)
    pointer.write_bytes(content)
    assert shop.current.orders == 2


# --- kills and crowds ---

INGEST = """
import os, sys, time
from pathlib import Path
from retention_ops.settings import Settings
from retention_ops.sources import ingest as module

home, file, stop = sys.argv[1:]

def wait(*arguments, **options):
    print("here", flush=True)
    time.sleep(60)

def progress(text):
    if stop and text.startswith(stop):
        wait()

if stop in ("rename", "replace"):
    setattr(os, stop, wait)
module.ingest([Path(file)], "orders", Settings(_env_file=None, home=Path(home)), progress=progress)
"""


def start(shop: Shop, file: Path, stop: str = "") -> subprocess.Popen:
    """An ingest in a process of its own, which stops and says 'here' at a progress text or at a call of os."""
    root = Path(retention_ops.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", INGEST, str(shop.settings.home), str(file), stop]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)


@pytest.mark.parametrize("moment", ["checking", "writing", "hashing", "rename", "replace"])
def test_a_kill_leaves_the_old_version_and_the_next_ingest_cleans_up(shop, moment):
    shop.add(A1)
    before, stored = shop.current, shop.lake()
    process = start(shop, shop.orders_csv(A2, name="more.csv"), moment)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert shop.current == before and orders_versions(shop.settings) == [before]
    assert {name: digest for name, digest in shop.lake().items() if name in stored} == stored
    shop.add(B1)
    assert [row[0] for row in shop.orders()] == ["O1", "O3"]
    assert sorted(path.name for path in (shop.settings.home / "lake" / "orders").iterdir()) == sorted(
        [".lock", "CURRENT", *(f"version={version.version}" for version in orders_versions(shop.settings))]
    )
    assert list((shop.settings.home / "tmp").iterdir()) == []


def test_a_kill_just_before_the_very_first_pointer_leaves_an_empty_shop(shop):
    process = start(shop, shop.orders_csv(A1), "replace")
    assert process.stdout.readline() == "here\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert current_orders(shop.settings) is None
    shop.add(A2)
    assert [row[0] for row in shop.orders()] == ["O2"] and len(orders_versions(shop.settings)) == 1


def test_ingests_at_the_same_time_queue_and_lose_nothing(shop):
    files = [shop.orders_csv(*((f"O{n}-{i}", "A", "2024-05-02", 1) for i in range(200)), name=f"{n}.csv") for n in range(4)]
    processes = [start(shop, file) for file in files]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    for process in processes:
        process.stdout.close()
    assert shop.current.orders == 800
    assert [version.orders for version in orders_versions(shop.settings)] == [200, 400, 600, 800]


def test_an_ingest_waits_for_the_one_that_holds_the_lock(shop):
    shop.add(A1)
    holder = start(shop, shop.orders_csv(A2, name="a.csv"), "writing")
    assert holder.stdout.readline() == "here\n"
    waiting = start(shop, shop.orders_csv(B1, name="b.csv"), "waiting")
    assert waiting.stdout.readline() == "here\n"
    for process in (holder, waiting):
        process.kill()
        process.wait()
        process.stdout.close()
    assert shop.current.orders == 1


def test_a_failure_while_writing_leaves_no_trace(shop, monkeypatch):
    shop.add(A1)
    before = shop.lake()

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full_disk)
    with pytest.raises(OSError, match="No space"):
        shop.add(A2)
    assert shop.lake() == before


# --- size ---


def test_a_big_file_keeps_its_record_numbers_and_needs_little_memory(tmp_path):
    shop = Shop(tmp_path, duckdb_memory_limit="400MB", duckdb_threads=2)
    path = tmp_path / "big.csv"
    rows = """SELECT 'O' || i AS order_id, 'C' || i % 9973 AS customer_id, DATE '2024-01-01' + CAST(i % 700 AS INT) AS order_date,
              if(i = 250000, 'x', '1.50') AS order_amount FROM range(300000) r(i)"""
    duckdb.execute(f"COPY ({rows}) TO '{path}' (HEADER)")
    with pytest.raises(InputRefused, match=r"big\.csv line 250002: order_amount is not a finite number"):
        shop.ingest(path)
    path.write_text(path.read_text().replace(",x\n", ",2.25\n"))
    assert shop.ingest(path).rows == 300_000
    assert ("O250000", "C675", date(2024, 4, 10), 225, "EUR") in shop.orders()
    assert ORDERS_HEADER in path.read_text()[:60]
