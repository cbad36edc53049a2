"""Pulls: our orders are what the source says, every change is named, and whatever is wrong is refused whole."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
import traceback
from datetime import timedelta

import pytest
import sqlalchemy as sa

from retention_ops.errors import InputRefused, RetentionOpsError, SettingsError, SourceError, UsageError
from retention_ops.sources.check import check_source
from retention_ops.sources.pull import last_pull, pull
from retention_ops.warehouse.files import locked
from retention_ops.warehouse.freshness import Changes
from retention_ops_tests.conftest import settings_for
from retention_ops_tests.sources.shop_database import (
    NOW,
    Shop,
    corrections,
    first_changed,
    live_a_day,
    moment,
    open_shop,
)


@pytest.fixture(params=["postgres", "csv"])
def shop(request, tmp_path):
    shop = open_shop(request.param, tmp_path / "shop", request)
    yield shop
    shop.close()


@pytest.fixture
def on_postgres(request, tmp_path):
    shop = open_shop("postgres", tmp_path / "shop", request)
    yield shop
    shop.close()


def stocked(shop: Shop) -> Shop:
    """Forty orders of the last twenty days, taken in."""
    for number in range(40):
        shop.put(f"o{number}", f"c{number % 7}", ago=number // 2, hour=2)
    shop.pull()
    return shop


# --- what comes in ---------------------------------------------------------------------------------------------------


def test_the_first_pull_takes_everything_and_says_what_it_left_out(shop):
    shop.put("o1", ago=400)
    shop.put("o2", ago=1, hour=23, total="0.10")  # next day in UTC, this day in the shop
    shop.put("x1", status="Cancelled")
    shop.put("x2", status="pending")
    shop.put("x3", status="pending")
    shop.put("x4", is_test=True, status="pending", currency="EUR", total="-5.00")  # what does not count may be in any currency
    shop.put("x5", total="0.00")
    shop.put("x6", total="-1.00")
    report = shop.pull()
    assert shop.ours() == shop.meaning() == {"o1": ("c1", shop.day(400), 1000), "o2": ("c1", shop.day(1), 10)}
    assert report.excluded == {"test order": 1, "status pending": 2, "status cancelled": 1, "amount not positive": 2}
    assert (report.full, report.rows_read, report.new, report.corrections) == (True, 8, 2, {})


def test_the_same_again_changes_nothing(shop):
    stocked(shop)
    before = shop.lake.orders()
    report = shop.pull()
    assert (report.changed, report.version, report.stale_from, report.corrections) == (False, before.version, None, {})
    assert shop.lake.orders() == before


@pytest.mark.parametrize(("kind", "act", "stale_ago"), [
    ("amount_changed", lambda shop: shop.change("o9", total="99.99"), 4),
    ("date_changed", lambda shop: shop.change("o9", at=moment(shop.day(7))), 7),
    ("date_changed", lambda shop: shop.change("o9", at=moment(shop.day(200))), 200),  # out of the days that are read again
    ("re_owned", lambda shop: shop.change("o9", customer="c99"), 4),
    ("vanished", lambda shop: shop.rows.pop("o9"), 4),
    ("withdrawn", lambda shop: shop.change("o9", status="refunded"), 4),
    ("withdrawn", lambda shop: shop.change("o9", is_test=True), 4),
    ("late", lambda shop: shop.put("o99", ago=6), 6),
])
def test_a_correction_is_counted_by_kind_and_marks_every_date_from_it_as_stale(on_postgres, kind, act, stale_ago):
    shop = stocked(on_postgres)
    built_from = shop.lake.orders().version
    act(shop)
    report = shop.pull()
    assert report.corrections == {kind: 1}
    assert report.stale_from == shop.day(stale_ago)
    assert shop.ours() == shop.meaning()
    changed = Changes(shop.lake)
    assert [changed.since(built_from, shop.day(ago)) for ago in (stale_ago + 1, stale_ago)] == [False, True]


def test_a_cancelled_order_that_is_paid_again_comes_back(shop):
    stocked(shop)
    shop.change("o9", status="cancelled")
    shop.pull()
    shop.change("o9", status="paid")
    assert shop.pull().corrections == {"late": 1}
    assert shop.ours() == shop.meaning()


@pytest.mark.parametrize(("kind", "updated_at", "sees_old"), [
    ("postgres", True, True), ("csv", False, True),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("postgres", False, False), ("parquet", True, True))),
])
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_whatever_happens_our_orders_are_the_sources_and_every_change_is_reported(request, tmp_path, kind, updated_at, sees_old, seed):
    shop = open_shop(kind, tmp_path / "shop", request, updated_at=updated_at, source_max_vanished_pct=100)
    chance = random.Random(seed)
    for number in range(20):
        shop.put(f"a{number}", f"c{number % 9}", ago=chance.randrange(1, 40))
    known, complete = {}, None
    for _ in range(6 if seed == 1 else 40):
        live_a_day(shop, chance, sees_old)
        if chance.random() < 0.2:
            live_a_day(shop, chance, sees_old)  # a morning without a pull
        report, meant = shop.pull(), shop.meaning()
        assert shop.ours() == meant
        if complete:
            told = {name: getattr(report, name) for name in corrections({}, {}, set(), complete)}
            assert told == corrections(known, meant, set(shop.rows), complete)
            moved = [complete + timedelta(days=1)] if report.complete_through != complete else []
            assert report.stale_from == min([*filter(None, [first_changed(known, meant)]), *moved], default=None)
        known, complete = meant, report.complete_through
    assert check_source(shop.lake, clock=lambda: shop.now).off == []
    shop.close()


def test_a_pull_after_a_month_of_downtime_reads_all_that_it_missed(on_postgres):
    shop = stocked(on_postgres)
    shop.now += timedelta(days=31)
    shop.put("after", ago=25)
    shop.change("o9", total="1.00")  # changed before the window of today began
    assert shop.pull().corrections == {"amount_changed": 1} and shop.ours() == shop.meaning()


def test_updated_at_shows_changes_to_orders_older_than_the_days_read_again(request, tmp_path):
    for updated_at, seen in ((True, 100), (False, 1000)):
        shop = open_shop("postgres", tmp_path / str(updated_at), request, updated_at=updated_at)
        shop.put("old", ago=100)
        shop.put("new", ago=0, hour=3)
        shop.pull()
        shop.now += timedelta(hours=1)
        shop.change("old", total="1.00")
        report = shop.pull()
        assert not report.full and shop.ours()["old"][2] == seen
        assert [day.day for day in check_source(shop.lake, everything=True, clock=lambda shop=shop: shop.now).off] == (
            [] if updated_at else [shop.day(100)]), "what a pull cannot see, the check of everything does"
        assert shop.pull(full=True).changed is not updated_at and shop.ours() == shop.meaning()
        shop.close()


def test_an_updated_at_from_a_wrong_clock_does_not_blind_later_pulls(request, tmp_path):
    shop = open_shop("postgres", tmp_path / "shop", request, updated_at=True)
    shop.put("old", ago=100, updated=None)
    shop.put("odd", ago=3, updated=NOW + timedelta(days=4000))
    assert shop.pull().complete_because == "last_seen", "nor is it a sign of life"
    shop.now += timedelta(days=1)
    shop.change("old", total="1.00")
    assert shop.pull().corrections == {"amount_changed": 1}
    shop.close()


@pytest.mark.parametrize("what", ["select", "statuses", "zone"])
def test_another_meaning_of_the_orders_reads_everything_again(on_postgres, what):
    shop = stocked(on_postgres)
    shop.put("x", status="collected", ago=15)
    shop.pull()
    if what == "select":
        shop.write_select(shop.sql.read_text() + "-- another text\n")
    else:
        change = {"completed_statuses": "paid, Collected"} if what == "statuses" else {"shop_timezone": "Asia/Tokyo"}
        shop.settings = shop.lake.settings = shop.settings.model_copy(update=change)
    report = shop.pull()
    assert report.full and ("x" in shop.ours()) == (what == "statuses")
    assert not shop.pull().full


def test_orders_from_before_the_sources_first_date_stay(shop, tmp_path):
    from retention_ops.sources.ingest import ingest

    history = tmp_path / "history.csv"
    history.write_text(f"order_id,customer_id,order_date,order_amount,currency\nh1,c1,{shop.day(500)},5.00,USD\nh2,c1,{shop.day(3)},5.00,USD\n")
    ingest([history], "orders", shop.settings, clock=lambda: NOW)
    shop.put("o1", ago=5)
    report = shop.pull()
    assert (report.kept_before, report.vanished) == (1, 1)
    assert set(shop.ours()) == {"h1", "o1"}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_check_reads_our_orders_of_its_days_and_sees_those_that_moved_over_their_edge(tmp_path, request, kind, monkeypatch):
    from retention_ops.sources import check

    shop = open_shop(kind, tmp_path / "shop", request)
    for ago in (0, 1, 2, 5, 9, 30, 40, 60):
        shop.put(f"o{ago}", ago=ago, hour=2)
    shop.pull()
    shop.change("o5", at=moment(shop.day(50)))  # out of the days that are compared
    shop.change("o30", at=moment(shop.day(7)))  # into them
    shop.change("o40", total="1.00")  # not of them
    shop.save()
    seen, compared = [], check._compared
    monkeypatch.setattr(check, "_compared", lambda *args, **more: seen.append(compared(*args, **more)) or seen[-1])

    def off(**how) -> dict[int, tuple[int, int, int]]:
        found = check_source(shop.lake, clock=lambda: shop.now, **how)
        return {(shop.today - day.day).days: (day.source_orders, day.our_orders, day.differing) for day in found.off}

    assert off() == {5: (0, 1, 1), 7: (1, 0, 1)}
    assert min(day.day for day in seen[0]) == shop.day(9), "what is older is not even read"
    assert off(everything=True) == {5: (0, 1, 1), 7: (1, 0, 1), 30: (0, 1, 1), 40: (1, 1, 1), 50: (1, 0, 1)}
    week = check_source(shop.lake, week_of=shop.day(60), clock=lambda: shop.now).week
    assert [(day.source_orders, day.our_orders) for day in week if day.day == shop.day(60)] == [(1, 1)]


# --- how far it is complete ------------------------------------------------------------------------------------------


def trade(shop: Shop, *, until: int, rest: int = 6, weeks: int = 8) -> Shop:
    """An order a day, none on weekday `rest` (Sunday), the newest `until` days ago."""
    for ago in range(until, weeks * 7):
        if shop.day(ago).weekday() != rest:
            shop.put(f"d{ago}", ago=ago, hour=3, updated=None)
    return shop


@pytest.mark.parametrize(("until", "clock", "expected", "because"), [
    (0, 0, 1, "life"),           # Monday morning, an order since midnight
    (1, 0, 1, "closed"),         # Monday morning, none yet: Saturday's were the last, on Sundays there never are any
    (3, 0, 3, "last_seen"),      # Friday's were the last, but there are orders on Saturdays
    (4, 0, 4, "last_seen"),      # the load stopped on Thursday: neither Friday nor what follows is taken for complete
    (1, 1, 2, "closed"),         # Tuesday morning and nothing since Saturday: Sunday is over, Monday is not in
])
def test_complete_through_follows_the_last_sign_of_life(tmp_path, request, until, clock, expected, because):
    shop = trade(open_shop("parquet", tmp_path / "shop", request, updated_at=True), until=until)
    shop.now += timedelta(days=clock)
    report = shop.pull()
    assert (report.complete_through, report.complete_because) == (shop.day(expected), because)
    assert report.complete == (expected == 1)


def test_a_change_to_an_old_order_is_a_sign_of_life(tmp_path, request):
    shop = trade(open_shop("parquet", tmp_path / "shop", request, updated_at=True), until=3)
    shop.change("d9", status="paid")
    assert shop.pull().complete_through == shop.day(1)


def test_planned_closures_do_not_wait_for_orders(tmp_path, request):
    closures = tmp_path / "closures.csv"
    shop = trade(open_shop("parquet", tmp_path / "shop", request, closures_file=closures), until=4)
    closures.write_text(f"from,to,reason\n{shop.day(3)},{shop.day(2)},stocktaking\n")
    report = shop.pull()  # closed on Friday and Saturday, and Sunday is Sunday
    assert (report.complete_through, report.complete_because) == (shop.day(1), "closed")


def test_complete_through_never_moves_back(tmp_path, request):
    shop = trade(open_shop("parquet", tmp_path / "shop", request), until=0, rest=9)
    assert shop.pull().complete_through == shop.day(1)
    del shop.rows["d0"], shop.rows["d1"], shop.rows["d2"]
    report = shop.pull()
    assert (report.complete_through, report.complete_because, report.vanished) == (shop.day(1), "known", 3)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("act", "says"), [
    (lambda shop: shop.put("o50", currency="EUR"), r"several currencies \(\d+ in USD, 1 in EUR\)"),
    (lambda shop: shop.put("o50", currency="dollars"), r"orders\.sql record \d+: currency is not a currency code"),
    (lambda shop: shop.put("o50", customer=None), r"orders\.sql record \d+: customer_id is missing"),
    (lambda shop: shop.put("", ago=1), r"orders\.sql record \d+: order_id is missing"),
    (lambda shop: shop.put("o50", ago=-2), r"ordered_at is later than .* in the future"),
    (lambda shop: shop.put("o50", total=None), "order_amount is missing"),
    (lambda shop: shop.put("o50", status=None), "status is missing"),
    (lambda shop: shop.put("o50", is_test=None), "is_test is missing"),
    (lambda shop: shop.put(" o1", ago=1), "order_id is given twice by the SELECT"),
])
def test_a_wrong_row_refuses_the_whole_pull_and_names_record_column_and_rule(on_postgres, act, says):
    shop = stocked(on_postgres)
    before = shop.lake.orders()
    act(shop)
    with pytest.raises(InputRefused, match=says) as refused:
        shop.pull()
    assert "o50" not in str(refused.value)
    assert shop.lake.orders() == before


def test_the_value_is_shown_only_on_demand(shop):
    shop.put("o1", currency="wrong money")
    with pytest.raises(InputRefused) as silent:
        shop.pull()
    with pytest.raises(InputRefused, match="'wrong money'"):
        shop.pull(show_values=True)
    assert "wrong money" not in str(silent.value)


@pytest.mark.parametrize(("select", "says"), [
    ("SELECT id AS oder_id, customer AS customer_id, placed AS ordered_at, total AS order_amount, currency, status, is_test FROM {table}",
     r"order_id is missing \(nearest present: 'oder_id'\)"),
    ("SELECT 1 AS a, 2 AS a", "a"),
    ("SELECT id\nFRM {table}", "line 2"),
    ("SELECT 1; DROP TABLE {table}", "several statements"),
    ("DELETE FROM {table}", "begins with 'DELETE'"),
    ("-- nothing\n", "is empty"),
])
def test_a_select_that_cannot_give_orders_is_refused_with_its_place(shop, select, says):
    shop.put("o1")
    shop.write_select(select.format(table="shop_orders" if shop.kind == "postgres" else "source_files"))
    with pytest.raises((InputRefused, SourceError), match=says):
        shop.pull()


def test_a_closing_semicolon_and_comments_are_no_statement(shop):
    shop.put("o1")
    shop.write_select(shop.sql.read_text().rstrip() + "\n; -- done;\n")
    assert shop.pull().orders == 1


def test_country_and_brand_may_be_there(shop):
    shop.put("o1")
    shop.write_select(shop.sql.read_text().replace("is_test", "is_test, 'DE' AS country, 'x' AS brand", 1))
    assert shop.pull().unused_columns == ["country", "brand"]


def test_a_table_that_was_emptied_or_half_loaded_does_not_erase_our_orders(shop):
    stocked(shop)
    before, rows = shop.lake.orders(), dict(shop.rows)
    for left in ({}, dict(list(rows.items())[25:])):
        shop.rows = left
        with pytest.raises(InputRefused, match=r"no longer in the source.*\n.*--accept-vanished"):
            shop.pull()
        assert shop.lake.orders() == before
    assert shop.pull(accept_vanished=True).vanished > 10 and shop.ours().keys() >= set(shop.rows)


def test_without_a_source_or_its_select_the_next_step_is_named(tmp_path, request):
    from retention_ops.warehouse.lake import Lake

    with pytest.raises(UsageError, match="RETENTION_OPS_SOURCE"):
        pull(Lake(settings_for(tmp_path / "home")))
    with pytest.raises(SourceError, match="retention-ops init"):
        pull(Lake(settings_for(tmp_path / "home", source="postgres")))
    with pytest.raises(ValueError, match="RETENTION_OPS_SOURCE_PATH"):
        settings_for(tmp_path / "home", source="files")
    assert not (tmp_path / "home").exists()


# --- Postgres --------------------------------------------------------------------------------------------------------


def test_no_error_shows_a_credential_or_a_value(on_postgres, monkeypatch):
    shop = stocked(on_postgres)
    good = shop.sql.read_text()
    shop.write_select(good.replace("total AS", "customer::int AS"))
    told = _told(shop)
    assert "22P02" in told and "c0" not in told and "c1" not in told
    with pytest.raises(SourceError, match='"c'):
        shop.pull(show_values=True)
    shop.write_select(good)
    secret = "pässwort%2Fx"
    for address in ("postgresql://ada:{}@127.0.0.1:1/shop", "mysql://ada:{}@127.0.0.1/shop", "postgresql//ada:{}@h:x/shop"):
        url = address.format(secret)
        monkeypatch.setenv("RETENTION_OPS_SOURCE_URL", url)
        told = _told(shop)
        assert secret not in told and "pässwort" not in told and url not in told
    monkeypatch.delenv("RETENTION_OPS_SOURCE_URL")
    with pytest.raises(SettingsError, match="RETENTION_OPS_SOURCE_URL is not set"):
        pull(shop.lake)


def _told(shop: Shop) -> str:
    """Everything that a log would keep of a pull that fails."""
    with pytest.raises(RetentionOpsError) as failed:
        pull(shop.lake, clock=lambda: shop.now)
    return "".join(traceback.format_exception(failed.value, chain=True)).partition("The above exception")[0]


def test_the_source_cannot_be_written_to_even_by_a_select(on_postgres):
    shop = stocked(on_postgres)
    with shop._engine.begin() as connection:
        connection.execute(sa.text("CREATE OR REPLACE FUNCTION spoil() RETURNS int LANGUAGE sql AS 'DELETE FROM shop_orders RETURNING 1'"))
    shop.write_select(shop.sql.read_text().replace("is_test", "spoil() = 1 AS is_test", 1))
    with pytest.raises(SourceError, match=r"25006.*read-only transaction"):
        pull(shop.lake, clock=lambda: shop.now)


def test_a_statement_that_takes_too_long_is_cancelled(on_postgres):
    shop = on_postgres
    shop.settings = shop.lake.settings = shop.settings.model_copy(update={"source_timeout_seconds": 1})
    shop.put("o1")
    shop.write_select(shop.sql.read_text().replace("is_test", "pg_sleep(30) IS NULL AS is_test", 1))
    with pytest.raises(SourceError, match=r"57014.*\n.*RETENTION_OPS_SOURCE_TIMEOUT_SECONDS"):
        shop.pull()


# --- at any moment ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_whole_orders_and_the_next_pull_ends_right(on_postgres, monkeypatch):
    shop = stocked(on_postgres)
    chance, killed = random.Random(5), 0
    for name in ("home", "shop_timezone", "lookback_days", "source", "source_sql", "source_max_vanished_pct"):
        monkeypatch.setenv(f"RETENTION_OPS_{name.upper()}", str(getattr(shop.settings, name)))
    code = (f"import datetime as dt\nfrom retention_ops.settings import load_settings\nfrom retention_ops.warehouse.lake import Lake\n"
            f"from retention_ops.sources.pull import pull\nprint('ready', flush=True)\n"
            f"pull(Lake(load_settings()), clock=lambda: dt.datetime.fromisoformat('{NOW.isoformat()}'))")
    for number in range(12):
        before = shop.ours()
        shop.put(f"k{number}", ago=1 + number % 9)
        shop.rows.pop(f"o{number}")
        shop.save()
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()  # imports are over
        time.sleep(chance.uniform(0, 0.25))
        process.kill()
        killed += process.wait() != 0
        assert shop.ours() in (before, shop.meaning())
        if number % 3 == 2:
            shop.pull()
            assert shop.ours() == shop.meaning()
    assert killed > 3
    shop.pull()
    assert shop.ours() == shop.meaning() and not list((shop.settings.home / "tmp").glob("pull-*")), "what kills left is cleared"


def test_a_pull_waits_for_another_one(shop):
    shop.put("o50")
    done = []
    with locked(shop.lake.root / ".source.lock"):
        other = threading.Thread(target=lambda: done.append(shop.pull()))
        other.start()
        while "waiting for another pull to finish" not in shop.progress:
            assert other.is_alive()
        assert not done
    other.join(60)
    assert done[0].new == 1


@pytest.mark.parametrize("lost", ["note", "version"])
def test_what_is_remembered_may_be_lost_or_older_orders_restored(on_postgres, lost):
    """A kill between the version and the note, or a restored backup: the next pull reads everything and ends right."""
    shop = stocked(on_postgres)
    first = (shop.lake.root / "orders" / "CURRENT").read_text()
    shop.put("old", ago=100)
    shop.pull(full=True)
    if lost == "note":
        (shop.lake.root / ".source.json").unlink()
    else:
        (shop.lake.root / "orders" / "CURRENT").write_text(first)
    assert shop.pull().full and shop.ours() == shop.meaning()


def test_the_last_pull_is_remembered_for_those_who_ask(shop):
    assert last_pull(shop.settings) is None
    stocked(shop)
    shop.put("o50", ago=6)
    report = shop.pull()
    kept = last_pull(shop.settings)
    assert kept["corrections"] == {"late": 1} and kept["version"] == report.version and kept["kind"] == shop.settings.source
    assert json.loads((shop.lake.root / ".source.json").read_text()) == kept
