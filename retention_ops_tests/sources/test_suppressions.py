"""The list of customers who must not be contacted: what adds to it, what lifts from it, what is refused."""

from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from retention_ops.errors import InputRefused, UsageError
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.versions import current_suppressions
from retention_ops_tests.sources import NOW, Shop, read


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path)


def suppress(shop, text: str, **options):
    return shop.ingest(shop.write("do_not_contact.csv", text), preset="suppressions", **options)


def stored(shop) -> list[tuple]:
    return read(current_suppressions(shop.settings).path)


def test_ids_alone_are_suppressed_for_ever(shop):
    report = suppress(shop, "customer_id\nB\nA\n")
    assert stored(shop) == [("A", None, None), ("B", None, None)]
    assert (report.dataset, report.rows, report.added, report.removed, report.changed) == ("suppressions", 2, 2, 0, True)


def test_a_reason_and_a_last_day_in_the_future_are_kept(shop):
    suppress(shop, "customer_id,reason,until,note\nA,complaint,2031-12-31,x\nB,,,\n")
    assert stored(shop) == [("A", "complaint", date(2031, 12, 31)), ("B", None, None)]


@pytest.mark.parametrize("later", [
    "customer_id\nB\n",  # A is not in it
    "customer_id,until\nA,2026-02-01\n",  # ends earlier
    "customer_id,reason\nA,\n",  # a blank
])
def test_a_later_file_lifts_nobody(shop, later):
    suppress(shop, "customer_id,reason\nA,asked by phone\n")
    report = suppress(shop, later)
    assert ("A", "asked by phone", None) in stored(shop) and report.removed == 0


def test_the_longer_suppression_wins_and_the_report_says_so(shop):
    suppress(shop, "customer_id,until\nA,2026-06-30\nB,\nC,2026-06-30\n")
    report = suppress(shop, "customer_id,until\nA,2026-03-31\nB,2026-03-31\nC,2026-09-30\n")
    assert [row[2] for row in stored(shop)] == [date(2026, 6, 30), None, date(2026, 9, 30)]
    assert (report.replaced, report.unchanged) == (1, 2)
    assert report.warnings == [
        "2 suppressions would end earlier by these files; the longer one was kept (--replace takes the files as the whole list)"
    ]
    suppress(shop, "customer_id\nA\n")
    assert stored(shop)[0][2] is None, "no date is for ever"


def test_replace_takes_the_file_as_the_whole_list_and_counts_who_is_lifted(shop):
    suppress(shop, "customer_id,reason,until\nA,x,\nB,,\nC,,2026-06-30\n")
    report = suppress(shop, "customer_id,until\nC,2026-03-31\nD,\nA,\n", replace=True)
    assert stored(shop) == [("A", None, None), ("C", None, date(2026, 3, 31)), ("D", None, None)]
    assert (report.added, report.replaced, report.removed, report.unchanged, report.rows) == (1, 2, 1, 0, 3)
    assert report.warnings == []
    version = current_suppressions(shop.settings)
    assert version.parent.startswith("000001-") and version.removed == 1


@pytest.mark.parametrize("replace", [False, True])
def test_a_list_already_known_changes_nothing(shop, replace):
    text = "customer_id,reason,until\nA,x,2026-06-30\nB,,\n"
    suppress(shop, text)
    before = shop.lake()
    report = suppress(shop, text, replace=replace)
    assert (report.changed, report.unchanged) == (False, 2) and shop.lake() == before


@pytest.mark.parametrize(("text", "message"), [
    ("customer_id\nA\nA\n", "line 3: customer_id is given twice"),
    ("customer_id,until\nA,31.12.2030\n", "line 2: until is not a date"),
    ("customer_id,until\nA,1969-12-31\n", "line 2: until is before 1970-01-01"),
    ("customer_id,reason\n,asked\n", "line 2: customer_id is missing"),
    ("customerid,reason\nA,asked\n", "customer_id is missing .nearest present: 'customerid'"),
    ("customer_id\n", "has a header but no records"),
])
@pytest.mark.parametrize("replace", [False, True])
def test_a_faulty_list_is_refused_whole_and_the_old_one_stays(shop, text, message, replace):
    suppress(shop, "customer_id\nZ\n")
    before = shop.lake()
    with pytest.raises(InputRefused, match=message):
        suppress(shop, text, replace=replace)
    assert shop.lake() == before


def test_two_files_that_contradict_each_other_are_refused(shop):
    files = [shop.write("a.csv", "customer_id,until\nA,2026-06-30\n"), shop.write("b.csv", "customer_id,until\nA,2026-07-31\n")]
    with pytest.raises(InputRefused, match="differs from the one with the same id in an earlier file"):
        shop.ingest(*files, preset="suppressions")


def test_suppressions_have_no_complete_through(shop):
    with pytest.raises(UsageError, match="preset suppressions has no such date"):
        suppress(shop, "customer_id\nA\n", complete_through=date(2026, 1, 1))


def test_orders_and_customers_are_not_touched(shop):
    shop.add(("O1", "A", "2024-05-02", 1))
    shop.ingest(shop.write("c.csv", "customer_id,country\nA,DE\n"), preset="customers")
    before = shop.lake()
    suppress(shop, "customer_id\nA\n")
    assert {name: digest for name, digest in shop.lake().items() if not name.startswith("suppressions/")} == before


def test_the_view_shows_the_list_in_force(shop):
    lake = Lake(shop.settings)
    lake.root.mkdir(parents=True)
    lake.refresh_views()
    assert view(lake) == []
    suppress(shop, "customer_id,reason\nA,x\n")
    lake.refresh_views()
    assert view(lake) == [("A", "x", None)]


def view(lake) -> list[tuple]:
    import duckdb

    with duckdb.connect(str(lake.views_path), read_only=True) as connection:
        return connection.execute("SELECT * FROM suppressions").fetchall()


untils = st.none() | st.dates(date(2026, 1, 1), date(2026, 12, 31))
lists = st.dictionaries(st.sampled_from("ABCDE"), untils, min_size=1)


@hypothesis_settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(lists, st.booleans()), min_size=1, max_size=4))
def test_any_history_of_files_gives_what_a_dictionary_would(tmp_path_factory, history):
    shop, known = Shop(tmp_path_factory.mktemp("shop")), {}
    for rows, replace in history:
        text = "customer_id,until\n" + "".join(f"{customer},{until or ''}\n" for customer, until in rows.items())
        report = ingest([shop.write("list.csv", text)], "suppressions", shop.settings, replace=replace, clock=lambda: NOW)
        assert report.removed == (len(known.keys() - rows.keys()) if replace else 0)
        longest = {customer: None if until is None or known.get(customer, until) is None else max(until, known.get(customer, until))
                   for customer, until in rows.items()}
        known = dict(rows) if replace else {**known, **longest}
        assert {customer: until for customer, _, until in stored(shop)} == known
