"""Refunds: taken in from files and by pulls, checked against their orders, and part of the orders' version."""

from __future__ import annotations

import json
from datetime import date, timedelta

import pytest
from typer.testing import CliRunner

from retention_ops.backup import back_up, restore
from retention_ops.cli import app
from retention_ops.detect.compute import table_for, workspace
from retention_ops.detect.explain import explain_customer
from retention_ops.errors import InputRefused, RetentionOpsError
from retention_ops.person import as_markdown, export
from retention_ops.sources.check import check_source
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.freshness import Changes
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.schema import lake_schema
from retention_ops.warehouse.versions import current_orders, orders_store
from retention_ops_tests.conftest import settings_for
from retention_ops_tests.sources import NOW, Shop, read
from retention_ops_tests.sources.shop_database import Shop as Source
from retention_ops_tests.sources.shop_database import open_shop

ORDERS = [("O1", "A", "2024-05-02", "100.00"), ("O2", "A", "2024-05-09", "20.00"), ("O3", "A", "2024-05-09", "30.00"),
          ("O4", "B", "2024-05-05", "5.00")]


@pytest.fixture
def shop(tmp_path):
    shop = Shop(tmp_path)
    shop.add(*ORDERS)
    return shop


def take(shop: Shop, *rows: str, header: str = "order_id,refund_date,refund_amount", name: str = "refunds.csv", **options):
    return shop.ingest(shop.write(name, "\n".join([header, *rows]) + "\n"), preset="refunds", **options)


def refunds(shop) -> list[tuple]:
    version = current_orders(shop.settings)
    return read(version.refunds_path) if version.refunds else []


def brief(shop) -> list[tuple]:
    """(order, day, cents)"""
    return sorted((row[1], row[3].isoformat(), row[4]) for row in refunds(shop))


# --- files ----------------------------------------------------------------------------------------------------------


def test_refunds_are_kept_beside_the_orders_as_another_version_of_them(shop):
    before = shop.current
    report = take(shop, "O1,2024-05-20,40.00", "O2,2024-05-09,20", "O3,2024-05-10 09:00:00,0.5", "O3,2024-05-10,0.255")
    version = shop.current
    assert (report.dataset, report.changed, report.added, report.refunds, report.stale_from) == (
        "refunds", True, 3, 3, date(2024, 5, 9))
    assert refunds(shop) == [
        ("A", "O1", date(2024, 5, 2), date(2024, 5, 20), 4000, True), ("A", "O2", date(2024, 5, 9), date(2024, 5, 9), 2000, False),
        ("A", "O3", date(2024, 5, 9), date(2024, 5, 10), 76, True)]  # 0.755 is rounded once
    assert (version.parent, version.orders, version.refunds, version.complete_through) == (
        before.version, 4, 3, before.complete_through)
    assert read(version.path) == read(before.path) and version.content_sha256 != before.content_sha256
    changed = Changes(Lake(shop.settings))
    assert [changed.since(before.version, date(2024, 5, day)) for day in (8, 9, 20)] == [False, True, True]


def test_the_first_refund_tells_older_releases_to_stay_away(shop):
    lake = shop.settings.home / "lake"
    (lake / "SCHEMA").write_text('{"schema": 2}')
    take(shop, "O1,2024-05-20,0")
    assert lake_schema(lake) == 2, "nothing was refunded"
    take(shop, "O1,2024-05-20,40.00")
    assert lake_schema(lake) == 3


def test_the_same_refunds_again_change_nothing(shop):
    take(shop, "O1,2024-05-20,40.00", "O4,2024-05-06,1.00")
    before = shop.lake()
    report = take(shop, "O1,2024-05-20,40", name="again.csv")
    assert (report.changed, report.added, report.unchanged, report.refunds, report.stale_from) == (False, 0, 1, 2, None)
    assert shop.lake() == before


def test_another_amount_takes_replace_and_nothing_takes_the_refund_back(shop):
    take(shop, "O1,2024-05-20,40.00", "O1,2024-05-22,1.00")
    with pytest.raises(InputRefused, match=r"line 2: refund_amount is not the amount that is already known.*\n.*--replace"):
        take(shop, "O1,2024-05-20,41.00")
    with pytest.raises(InputRefused, match="already known"):
        take(shop, "O1,2024-05-20,0")
    report = take(shop, "O1,2024-05-20,0", "O1,2024-05-22,2.00", replace=True)
    assert (report.replaced, report.removed, report.stale_from, report.excluded) == (1, 1, date(2024, 5, 20), {"zero amount": 1})
    assert brief(shop) == [("O1", "2024-05-22", 200)]
    plain = current_orders(shop.settings)
    take(shop, "O1,2024-05-22,0", replace=True)
    assert current_orders(shop.settings).refunds == 0 and not current_orders(shop.settings).refunds_path.exists()
    assert current_orders(shop.settings).content_sha256 != plain.content_sha256


def test_without_refunds_the_content_is_named_as_ever(shop):
    before = shop.current.content_sha256
    take(shop, "O1,2024-05-22,2.00")
    take(shop, "O1,2024-05-22,0", replace=True)
    assert shop.current.content_sha256 == before


@pytest.mark.parametrize(("row", "says"), [
    ("O9,2024-05-20,1.00", "order_id is of no order that is known here"),
    ("O1,2024-05-01,1.00", "refund_date is before the date of its order"),
    ("O1,2024-05-20,100.01", "refund_amount makes the refunds of its order exceed the order"),
    ("O1,2024-05-20,-1.00", "refund_amount is negative"),
    ("O1,2026-01-17,1.00", "refund_date is later than 2026-01-16, in the future"),
    ("O1,,1.00", "refund_date is missing"),
    ("O1,2024-05-20,1,50", "fields"),
])
def test_a_refund_that_does_not_fit_is_refused_with_record_and_rule(shop, row, says):
    before = shop.lake()
    with pytest.raises(InputRefused) as refused:
        take(shop, "O4,2024-05-20,1.00", row)
    assert "refunds.csv line 3: " in str(refused.value) and says in str(refused.value) and "O9" not in str(refused.value)
    assert shop.lake() == before


def test_refunds_of_an_order_are_summed_over_days_and_files(shop):
    take(shop, "O1,2024-05-20,60.00")
    with pytest.raises(InputRefused, match="exceed the order"):
        take(shop, "O1,2024-05-21,40.01")
    first, second = shop.write("a.csv", "order_id,refund_date,refund_amount\nO1,2024-05-21,40\n"), shop.write(
        "b.csv", "order_id,refund_date,refund_amount\nO1,2024-05-21,40.00\nO4,2024-05-21,5\n")
    assert shop.ingest(first, second, preset="refunds").excluded == {"refund already in an earlier file": 1}
    assert sum(cents for _, _, cents in brief(shop)) == 10_500
    third = shop.write("c.csv", "order_id,refund_date,refund_amount\nO1,2024-05-21,39.00\n")
    with pytest.raises(InputRefused, match="differs from the one with the same id in an earlier file"):
        shop.ingest(first, third, preset="refunds")


def test_refunds_have_the_shops_currency(shop):
    header = "order_id,refund_date,refund_amount,currency"
    with pytest.raises(InputRefused, match=r"several currencies \(.*USD"):
        take(shop, "O1,2024-05-20,1.00,USD", header=header)
    assert take(shop, "O1,2024-05-20,1.00,eur", header=header).refunds == 1


def test_refunds_before_any_order_are_refused(tmp_path):
    with pytest.raises(InputRefused, match="Ingest the orders first"):
        take(Shop(tmp_path), "O1,2024-05-20,1.00")


def test_an_order_cannot_be_replaced_below_its_refunds_and_takes_them_with_it(shop):
    take(shop, "O1,2024-05-20,60.00", "O3,2024-05-09,1.00")
    with pytest.raises(InputRefused, match="line 2: order_amount is below what was refunded of the order"):
        shop.add(("O1", "A", "2024-05-02", "59.99"), replace=True)
    with pytest.raises(InputRefused, match="line 2: order_date is after a refund of the order"):
        shop.add(("O1", "A", "2024-05-21", "100"), replace=True)
    shop.add(("O1", "C", "2024-05-20", "60.00"), replace=True)  # another customer's, and all of it refunded on its day
    assert [row for row in refunds(shop) if row[1] == "O1"] == [("C", "O1", date(2024, 5, 20), date(2024, 5, 20), 6000, True)]
    assert [row[-1] for row in refunds(shop) if row[1] == "O3"] == [True]
    shop.add(("O5", "A", "2024-05-09", "1.00"))  # now O3 is not the last of its day any more
    assert [row[-1] for row in refunds(shop) if row[1] == "O3"] == [False]
    report = shop.add(("O1", "C", "2024-05-20", "0"), replace=True)
    assert report.warnings == ["1 refund went with its order"] and [row[1] for row in refunds(shop)] == ["O3"]


def test_new_orders_keep_the_refunds_and_old_versions_go_with_theirs(shop):
    shop.settings = shop.settings.model_copy(update={"orders_keep_versions": 2})
    take(shop, "O1,2024-05-20,60.00")
    old = shop.current
    for number in range(shop.settings.orders_keep_versions):
        assert shop.add((f"N{number}", "N", "2024-06-01", "1.00")).refunds == 1
    assert shop.current.refunds_path.is_file() and not old.refunds_path.exists() and not old.path.exists()


def test_a_past_date_is_rebuilt_as_known_by_order_time_whatever_came_later(shop):
    take(shop, "O3,2024-05-10,12.00", "O3,2024-05-12,18.00")
    lake = Lake(shop.settings)
    found = {day: table_for(lake, "base_customers", date(2024, 5, day)).set_index("customer_id").loc["A"] for day in (9, 10, 11, 12)}
    assert [(row["total_revenue"], row["last_order_value"], row["total_orders"]) for row in found.values()] == [
        (150.0, 30.0, 3), (138.0, 18.0, 3), (138.0, 18.0, 3), (120.0, 0.0, 3)]


def test_everything_refunded_is_explained_without_dividing_by_nothing(shop):
    take(shop, *(f"{row[0]},2024-05-20,{row[3]}" for row in ORDERS))
    day = date(2024, 6, 20)
    row, sentences = explain_customer(Lake(shop.settings), "A", day)
    assert (row["total_revenue"], row["avg_order_value"], row["is_value_drop"], row["refunded_cents"]) == (0.0, 0.0, False, 15_000)
    assert "0.00 EUR in all, 0.00 on average. That is 150.00 ordered, 150.00 of it refunded by 2024-06-20." in sentences[0]
    _, earlier = explain_customer(Lake(shop.settings), "A", date(2024, 5, 19))
    assert "refunded" not in earlier[0]


def test_the_command_says_what_it_took_and_which_dates_are_stale(shop, monkeypatch):
    monkeypatch.setenv("RETENTION_OPS_HOME", str(shop.settings.home))
    file = shop.write("refunds.csv", "order_id,refund_date,refund_amount\nO1,2024-05-20,60.00\n")
    shown = CliRunner().invoke(app, ["ingest", str(file), "--preset", "refunds"])
    assert shown.exit_code == 0 and "refunds known" in shown.output and "added / changed / taken back / known" in shown.output
    again = CliRunner().invoke(app, ["ingest", str(file), "--preset", "refunds", "--json"])
    assert json.loads(again.output)["changed"] is False and json.loads(again.output)["refunds"] == 1


# --- a person, a backup -------------------------------------------------------------------------------------------------


def test_a_forgotten_customers_refunds_are_erased_from_every_version(shop):
    take(shop, "O1,2024-05-20,60.00", "O4,2024-05-20,1.00")
    shop.add(("N1", "N", "2024-06-01", "1.00"))
    lake, older = Lake(shop.settings), shop.current
    with lake.connection() as con:
        orders_store(shop.settings).erase(con, ["A"], "customer_id, order_date, order_id", NOW, lambda text: None)
    assert [row[:2] for row in refunds(shop)] == [("B", "O4")] and shop.current.refunds == 1 and shop.current.stale_from is None
    assert not older.refunds_path.exists()
    with workspace(lake):
        pass
    with pytest.raises(InputRefused, match=r"(?s)no order that is known here.*erased on request"):
        take(shop, "O1,2024-05-20,60.00")


def test_a_person_is_told_of_refunds(shop):
    take(shop, "O1,2024-05-20,60.00", "O4,2024-05-20,1.00")
    found = export(Lake(shop.settings), None, "A", NOW)
    assert [(row["order_id"], row["refund_cents"]) for row in found["refunds"]] == [("O1", 6000)]
    assert "- 2024-05-20: 60.00 EUR (of order O1)" in as_markdown(found, "EUR")


def test_a_backup_carries_refunds(shop, tmp_path):
    take(shop, "O1,2024-05-20,60.00")
    made = back_up(shop.settings, tmp_path / "b.tar", clock=lambda: NOW)
    there = settings_for(tmp_path / "there")
    restore(made.file, there, clock=lambda: NOW)
    assert read(current_orders(there).refunds_path) == refunds(shop)


def test_a_user_reads_them_in_the_views(shop):
    import duckdb

    lake = Lake(shop.settings)
    for rows in ([], [("O1", date(2024, 5, 20), 6000)]):
        if rows:
            take(shop, "O1,2024-05-20,60.00")
        lake.refresh_views()
        with duckdb.connect(str(lake.views_path), read_only=True) as con:
            assert con.execute("SELECT order_id, refund_date, refund_cents FROM refunds").fetchall() == rows
            assert con.table("refunds").columns == TABLES["refunds"].column_names


# --- pulls --------------------------------------------------------------------------------------------------------------


class Refunding(Source):
    """A source whose SELECT says what was refunded of each order so far."""

    refunded: dict[str, str]

    def __init__(self, *given, **more):
        self.refunded = {}
        super().__init__(*given, **more)

    def save(self) -> None:
        cases = " ".join(f"WHEN '{order}' THEN {amount}" for order, amount in self.refunded.items())
        table = "shop_orders" if self.kind == "postgres" else "source_files"
        when = f"CASE id {cases} END" if cases else "NULL"
        updated = ", updated AS updated_at" if self.with_updated else ""
        self.write_select("SELECT id AS order_id, customer AS customer_id, placed AS ordered_at, total AS order_amount, currency, status, "
                          f"is_test, {when} AS refund_amount{updated} FROM {table}")
        super().save()

    with_updated = False


@pytest.fixture(params=[pytest.param(False, marks=pytest.mark.slow, id="without updated_at"), pytest.param(True, id="with updated_at")])
def source(request, tmp_path):
    shop = Refunding("parquet", tmp_path / "shop", updated_at=request.param)
    shop.with_updated = request.param
    for number in range(8):
        shop.put(f"o{number}", f"c{number % 3}", ago=number + 1, updated=shop.now - timedelta(days=1, hours=2))
    return shop


def pulled(shop: Source) -> list[tuple]:
    """(order, days before today, cents)"""
    version = shop.lake.orders()
    return sorted((row[1], (shop.today - row[3]).days, row[4]) for row in read(version.refunds_path)) if version.refunds else []


def test_the_first_pull_dates_refunds_by_the_last_change_or_by_the_order(source):
    source.refunded = {"o3": "4.00", "o5": "10.00"}
    report = source.pull()
    assert pulled(source) == ([("o3", 1, 400), ("o5", 1, 1000)] if source.with_updated else [("o3", 4, 400), ("o5", 6, 1000)])
    assert (report.refunded, report.corrections) == (2, {})


def test_an_increase_is_a_refund_of_the_day_it_is_first_seen_and_a_decrease_a_correction(source):
    source.pull()
    complete = source.lake.orders().complete_through
    source.now += timedelta(days=1)
    source.put("e1", "c1", ago=0, hour=1)  # the source lives
    source.refunded = {"o3": "4.00"}
    source.change("o3")
    report = source.pull()
    seen = 0 if source.with_updated else 1
    assert pulled(source) == [("o3", seen, 400)] and report.stale_from == complete + timedelta(days=1)
    assert (report.refunded, report.corrections, report.amount_changed) == (1, {}, 0)
    assert (source.pull().changed, pulled(source)) == (False, [("o3", seen, 400)])
    source.now += timedelta(days=2)
    source.put("e2", "c1", ago=0, hour=1)
    source.refunded["o3"] = "10.00"
    source.change("o3")
    source.pull()
    assert pulled(source) == [("o3", seen, 600), ("o3", seen + 2, 400)]
    source.refunded["o3"] = "3.00"  # the newest are taken back first
    report = source.pull()
    assert pulled(source) == [("o3", seen + 2, 300)] and report.corrections == {"refund_lowered": 1}
    assert report.stale_from == source.day(seen + 2)


def test_a_refund_seen_late_reaches_back_and_is_a_correction(tmp_path):
    shop = Refunding("parquet", tmp_path / "shop", updated_at=True)
    shop.with_updated = True
    for number in range(8):
        shop.put(f"o{number}", ago=number + 1)
    shop.pull()
    shop.refunded = {"o6": "1.00"}
    shop.rows["o6"] = type(shop.rows["o6"])("c1", shop.rows["o6"].at, updated=shop.now - timedelta(days=3))
    report = shop.pull(full=True)
    assert report.corrections == {"refunded_late": 1} and report.stale_from == shop.day(3)


def test_a_cancelled_order_takes_its_refunds_with_it_and_a_moved_one_too(source):
    source.refunded = {"o3": "4.00", "o5": "10.00"}
    source.pull()
    source.change("o5", status="cancelled")
    assert source.pull().corrections == {"withdrawn": 1} and [row[0] for row in pulled(source)] == ["o3"]
    source.put("o3", "c9", ago=0, hour=1)
    source.pull()
    assert pulled(source) == [("o3", 0, 400)]


@pytest.mark.parametrize(("refund", "says"), [("10.01", "refund_amount is above order_amount"), ("-1", "refund_amount is negative")])
def test_a_refund_beyond_the_order_refuses_the_pull(source, refund, says):
    source.pull()
    before = source.lake.orders()
    source.refunded = {"o2": refund}
    source.change("o2")
    with pytest.raises(RetentionOpsError, match=says):
        source.pull()
    assert source.lake.orders() == before


def test_the_check_sees_refunds_that_differ(source):
    source.refunded = {"o3": "4.00"}
    source.pull()
    assert check_source(source.lake, clock=lambda: source.now).off == []
    source.refunded["o3"] = "5.00"
    source.save()
    assert [(item.day, item.differing) for item in check_source(source.lake, clock=lambda: source.now).off] == [(source.day(4), 1)]


def test_refunds_from_files_stay_where_the_select_has_none(tmp_path):
    shop = Source("parquet", tmp_path / "shop")
    for number in range(8):
        shop.put(f"o{number}", ago=number + 1)
    shop.pull()
    from retention_ops.sources.ingest import ingest

    file = tmp_path / "refunds.csv"
    file.write_text(f"order_id,refund_date,refund_amount\no3,{shop.day(2)},4.00\n")
    ingest([file], "refunds", shop.settings, clock=lambda: shop.now)
    assert shop.pull().changed is False and pulled(shop) == [("o3", 2, 400)]
    shop.change("o3", total="3.00")
    with pytest.raises(InputRefused, match="order_amount is below what was refunded of the order"):
        shop.pull()


@pytest.mark.slow
def test_a_pull_of_refunds_from_postgres(request, tmp_path):
    open_shop("postgres", tmp_path / "unused", request).close()
    url = request.getfixturevalue("postgres_url")
    shop = Refunding("postgres", tmp_path / "shop", url)
    for number in range(8):
        shop.put(f"o{number}", ago=number + 1)
    shop.refunded = {"o3": "4.00"}
    shop.pull()
    assert pulled(shop) == [("o3", 4, 400)]
    shop.close()
