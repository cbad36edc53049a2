"""What each preset makes of a file: which records become orders, and why the others do not."""

from __future__ import annotations

from datetime import date

import pytest

from retention_ops.errors import InputRefused, UsageError
from retention_ops.sources.presets import PRESETS, describe, get_preset
from retention_ops.warehouse.versions import current_customers
from retention_ops_tests.sources import Shop, read, shared

UCI = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
UCI_II = "Invoice,StockCode,Description,Quantity,InvoiceDate,Price,Customer ID,Country\n"


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path)


# --- the declaration ---


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_describes_its_columns(name):
    text = describe(name)
    assert all(field.header in text for field in get_preset(name).fields)
    assert f"--preset {name}" in text


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(UsageError, match="uci-online-retail, cdnow, orders, refunds, customers"):
        get_preset("shopify")


def test_calls_that_make_no_sense_are_usage_errors(shop):
    customers = shop.write("c.csv", "customer_id\nC1\n")
    with pytest.raises(UsageError, match="no file"):
        shop.ingest()
    with pytest.raises(UsageError, match="complete-through"):
        shop.ingest(customers, preset="customers", complete_through=date(2024, 1, 1))
    with pytest.raises(UsageError, match="2026-02-01 is in the future in shop_timezone UTC"):
        shop.add(("O1", "C1", "2024-01-01", 1), complete_through=date(2026, 2, 1))


# --- uci-online-retail ---


def test_uci_lines_are_summed_per_invoice_and_dated_by_the_earliest_line(shop):
    path = shop.write("r.csv", UCI + "536365,A,x,6,2010-12-01 08:26:00,2.55,17850,UK\n"
                                     "536365,B,y,2,2010-12-01 08:25:00,0.005,17850,UK\n")
    shop.ingest(path, preset="uci-online-retail")
    assert shop.orders() == [("536365", "17850", date(2010, 12, 1), 1531, "GBP")]


def test_uci_value_is_rounded_once_and_half_up(shop):
    lines = "".join(f"1,A,x,1,2010-12-01 08:26:00,{price},7,UK\n" for price in ("0.004", "0.004", "0.007"))
    shop.ingest(shop.write("r.csv", UCI + lines + "2,A,x,3,2010-12-01 08:26:00,0.115,7,UK\n"), preset="uci-online-retail")
    assert [row[3] for row in shop.orders()] == [2, 35]  # 0.015 -> 0.02, 0.345 -> 0.35


def test_uci_exclusions_are_counted_under_the_first_reason_that_holds(shop):
    path = shop.write(
        "r.csv", UCI + "C1,A,x,-1,2010-12-01,0,,UK\nc2,A,x,1,2010-12-01,1,7,UK\n3,A,x,-1,2010-12-01,0,,UK\n"
                       "4,A,x,0,2010-12-01,0,7,UK\n5,A,x,1,2010-12-01,-2,7,UK\n6,A,x,1,2010-12-01,2,7,UK\n6,A,x,1,2010-12-01,0,7,UK\n"
                       "8,A,x,1,2010-12-01,0.004,7,UK\n",
    )
    report = shop.ingest(path, preset="uci-online-retail")
    assert report.excluded == {
        "cancellation": 2, "no customer": 1, "quantity not positive": 1, "price not positive": 2,
        "invoice worth less than half a cent": 1,
    }
    assert report.records_read == 8 and report.rows == 1
    assert report.ignored_columns == ["StockCode", "Description", "Country"]


def test_uci_reads_the_names_of_both_editions_whatever_their_case(shop):
    one = shop.write("1.csv", UCI + "1,A,x,1,2010-12-01,2,7,UK\n")
    two = shop.write("2.csv", UCI_II.upper().replace("PRICE", " price ") + "2,A,x,1,2010-12-02,2,8,UK\n")
    assert shop.ingest(one, two, preset="uci-online-retail").rows == 2


def test_uci_ids_lose_the_tail_of_a_detour_through_floating_point(shop):
    path = shop.write("r.csv", UCI + "536365.0,A,x,1.0,2010-12-01,2,17850.0,UK\n2,A,x,1,2010-12-01,2,nan,UK\n")
    report = shop.ingest(path, preset="uci-online-retail")
    assert shop.orders()[0][:2] == ("536365", "17850")
    assert report.excluded == {"no customer": 1}


def test_uci_takes_the_american_dates_of_the_kaggle_edition(shop):
    shop.ingest(shop.write("r.csv", UCI + "1,A,x,1,12/1/2010 8:26,2,7,UK\n"), preset="uci-online-retail")
    assert shop.orders()[0][2] == date(2010, 12, 1)


def test_uci_an_invoice_in_two_files_counts_once(shop):
    one = shop.write("1.csv", UCI + "1,A,x,1,2010-12-01,2,7,UK\n1,B,x,1,2010-12-01,3,7,UK\n")
    two = shop.write("2.csv", UCI + "1,B,x,1,2010-12-01,3,7,UK\n1,A,x,1,2010-12-01,2,7,UK\n2,A,x,1,2010-12-02,2,7,UK\n")
    report = shop.ingest(one, two, preset="uci-online-retail")
    assert report.rows == 2 and report.excluded == {"invoice already in an earlier file": 2}
    assert [file["records"] for file in report.files] == [2, 3]


def test_uci_an_invoice_that_differs_between_files_is_refused(shop):
    one = shop.write("1.csv", UCI + "1,A,x,1,2010-12-01,2,7,UK\n")
    two = shop.write("2.csv", UCI + "9,A,x,1,2010-12-01,2,7,UK\n1,A,x,1,2010-12-01,2.5,7,UK\n")
    with pytest.raises(InputRefused, match=r"2.csv line 3: InvoiceNo differs from the one with the same id in an earlier file"):
        shop.ingest(one, two, preset="uci-online-retail")
    assert shop.lake() == {}


def test_uci_an_invoice_of_two_customers_is_refused(shop):
    path = shop.write("r.csv", UCI + "1,A,x,1,2010-12-01,2,7,UK\n1,A,x,1,2010-12-01,2,,UK\n1,A,x,1,2010-12-01,2,8,UK\n")
    with pytest.raises(InputRefused, match=r"r\.csv line 4: InvoiceNo belongs to two customers"):
        shop.ingest(path, preset="uci-online-retail")


def test_uci_an_order_whose_lines_add_up_to_an_absurd_amount_is_refused(shop):
    path = shop.write("r.csv", UCI + "1,A,x,900000000,2010-12-01,9999999,7,UK\n")
    with pytest.raises(InputRefused, match="line 2: UnitPrice makes an order above max_order_amount"):
        shop.ingest(path, preset="uci-online-retail")


def test_uci_the_published_files_give_the_published_totals(shop):
    first, second = shared("uci_online_retail.parquet"), shared("uci_online_retail_II_2009-2010.parquet")
    alone = shop.ingest(first, preset="uci-online-retail")
    assert (alone.rows, alone.customers, alone.currency) == (18_532, 4_338, "GBP")
    both = shop.ingest(second, preset="uci-online-retail")
    assert (both.rows, both.customers, both.added, both.unchanged) == (36_969, 5_878, 18_437, 776)
    assert sum(row[3] for row in shop.orders()) == 1_743_153_316
    assert both.stale_from == date(2009, 12, 1)


def test_uci_both_files_at_once_give_the_same_version_as_one_after_the_other(tmp_path):
    first, second = shared("uci_online_retail.parquet"), shared("uci_online_retail_II_2009-2010.parquet")
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    together, one_by_one = Shop(tmp_path / "a"), Shop(tmp_path / "b")
    report = together.ingest(second, first, preset="uci-online-retail")
    one_by_one.ingest(first, preset="uci-online-retail")
    assert one_by_one.ingest(second, preset="uci-online-retail").content_sha256 == report.content_sha256
    assert report.excluded["invoice already in an earlier file"] == 14_504


# --- cdnow ---


def test_cdnow_an_order_is_a_customers_day(shop):
    path = shop.write("c.txt", " customer_id  date number_of_cds  dollar_value\r\n 00001 19970101  1   11.77\r\n"
                               " 00001 19970101  2   1.00\r\n 00002 19970112  1    0.00\r\n\r\n")
    report = shop.ingest(path, preset="cdnow")
    assert shop.orders() == [("00001-1997-01-01", "00001", date(1997, 1, 1), 1277, "USD")]
    assert report.excluded == {"day worth nothing": 1}


def test_cdnow_drops_the_first_of_five_fields_and_takes_commas(shop):
    shop.ingest(shop.write("s.txt", "00004,0001,19970101,2,29.33\n00004, 0001, 19970118, 2, 29.73\n"), preset="cdnow")
    assert [row[1] for row in shop.orders()] == ["0001", "0001"]


@pytest.mark.parametrize(("text", "message"), [
    ("1 19970101 1 2.0\n2 19970101 1\n", "line 2: has 3 fields, expected 4"),
    ("\n1 19970101 1 2.0\n\n2 1997-01-01 1 2.0\n", r"line 4: date is not a date \(expected YYYYMMDD\)"),
    ("1 19970101 1 -2.0\n", "line 1: dollar_value is negative"),
    ("1;19970101;1;2.0\n", "separated by semicolons"),
    ("just words\n", "has 2 fields in line 1, not 4 or 5"),
    ("customer date number value\n", "no records"),
    ("\n \n", "blank"),
])
def test_cdnow_says_what_is_wrong_and_where(shop, text, message):
    with pytest.raises(InputRefused, match=message):
        shop.ingest(shop.write("c.txt", text), preset="cdnow")
    assert shop.lake() == {}


def test_cdnow_the_published_file_gives_the_published_totals(shop):
    report = shop.ingest(shared("CDNOW_master.txt"), preset="cdnow")
    assert (report.rows, report.customers, report.records_read) == (67_511, 23_502, 69_659)
    assert report.excluded == {"day worth nothing": 80}


def test_cdnow_the_sample_file_is_read_too(tmp_path):
    report = Shop(tmp_path).ingest(shared("CDNOW_sample.txt"), preset="cdnow")
    assert (report.records_read, report.excluded) == (6_919, {"day worth nothing": 8})


# --- orders ---


def test_orders_are_stored_sorted_with_the_catalogs_columns(shop):
    report = shop.add(("O2", "B", "2024-05-02", "10.5"), ("O1", "B", "2024-05-02", "3"), ("O3", "A", "2024-05-09", "1e2"))
    assert shop.orders() == [
        ("O3", "A", date(2024, 5, 9), 10_000, "EUR"), ("O1", "B", date(2024, 5, 2), 300, "EUR"),
        ("O2", "B", date(2024, 5, 2), 1050, "EUR"),
    ]
    assert (report.first_date, report.last_date) == (date(2024, 5, 2), date(2024, 5, 9))


def test_orders_worth_nothing_are_counted_not_kept(shop):
    report = shop.add(("O1", "A", "2024-05-02", 0), ("O2", "A", "2024-05-02", "0.004"), ("O3", "A", "2024-05-02", "0.005"))
    assert report.rows == 1 and report.excluded == {"zero amount": 2}


def test_a_file_of_nothing_but_worthless_orders_is_refused(shop):
    with pytest.raises(InputRefused, match="none of the 1 records is an order"):
        shop.add(("O1", "A", "2024-05-02", 0))
    assert shop.lake() == {}


def test_orders_may_name_their_currency_but_only_one(shop):
    header = "order_id,customer_id,order_date,order_amount,Currency\n"
    mixed = shop.write("m.csv", header + "1,A,2024-01-01,5,usd\n2,A,2024-01-01,5,\n")
    with pytest.raises(InputRefused, match="several currencies"):
        shop.ingest(mixed)
    assert shop.ingest(shop.write("u.csv", header + "1,A,2024-01-01,5,usd\n")).currency == "USD"
    with pytest.raises(InputRefused, match="several currencies"):
        shop.add(("O9", "A", "2024-01-01", 5))


def test_equal_orders_in_two_files_count_once(shop):
    one = shop.orders_csv(("O1", "A", "2024-05-02", "10"), name="1.csv")
    two = shop.orders_csv(("O1", "A", "2024-05-02T08:00:00", "10.00"), ("O2", "A", "2024-05-03", 1), name="2.csv")
    report = shop.ingest(one, two)
    assert report.rows == 2 and report.excluded == {"order already in an earlier file": 1}


def test_unequal_orders_in_two_files_are_refused(shop):
    one = shop.orders_csv(("O1", "A", "2024-05-02", "10"), name="1.csv")
    two = shop.orders_csv(("O1", "B", "2024-05-02", "10"), name="2.csv")
    with pytest.raises(InputRefused, match=r"2\.csv line 2: order_id differs"):
        shop.ingest(one, two)


@pytest.mark.parametrize(("zone", "moment", "expected"), [
    ("Europe/London", "2024-06-30T23:30:00Z", date(2024, 7, 1)),
    ("Europe/London", "2024-12-31T23:30:00Z", date(2024, 12, 31)),
    ("America/New_York", "2024-07-01T03:59:59.999+00:00", date(2024, 6, 30)),
    ("America/New_York", "2024-07-01 02:00:00 +0200", date(2024, 6, 30)),
    ("Asia/Tokyo", "2024-06-30 15:00+00", date(2024, 7, 1)),
    ("Asia/Tokyo", "2024-06-30 15:00", date(2024, 6, 30)),
    ("Pacific/Kiritimati", "2024-02-28T10:00:00Z", date(2024, 2, 29)),
])
def test_moments_with_an_offset_become_dates_of_the_shop(tmp_path, zone, moment, expected):
    shop = Shop(tmp_path, shop_timezone=zone)
    shop.add(("O1", "A", moment, 1))
    assert shop.orders()[0][2] == expected


def test_a_formula_is_a_legal_customer_id(shop):
    shop.add(("O1", "=cmd()", "2024-05-02", 1), ("O2", "@SUM(A1)", "2024-05-02", 1), ("O3", "ÅÄÖ 客", "2024-05-02", 1))
    assert [row[1] for row in shop.orders()] == ["=cmd()", "@SUM(A1)", "ÅÄÖ 客"]


# --- customers ---


def test_customers_are_replaced_by_id_and_others_kept(shop):
    first = shop.write("c.csv", "customer_id,country,consent,signup_date,extra\nA,DE,yes,2020-02-29,1\nB,FR,0,,2\n")
    shop.ingest(first, preset="customers")
    report = shop.ingest(shop.write("d.csv", "customer_id,country,consent\nB,GB,TRUE\nC,,\nA,DE,1\n"), preset="customers")
    version = current_customers(shop.settings)
    assert read(version.path) == [
        ("A", "DE", None, None, None, date(2020, 2, 29), True), ("B", "GB", None, None, None, None, True),
        ("C", None, None, None, None, None, None),
    ]
    assert (report.added, report.replaced, report.unchanged, report.rows, report.changed) == (1, 1, 1, 3, True)
    assert report.dataset == "customers" and report.currency is None and version.parent.startswith("000001-")


def consents(shop, text: str) -> tuple[int, int]:
    """Ingest these customers; how many consents were withdrawn and granted."""
    report = shop.ingest(shop.write("consents.csv", text), preset="customers")
    return report.consent_withdrawn, report.consent_granted


@pytest.mark.parametrize("later", [
    "customer_id,consent\nanna,\n", 'customer_id,consent\nanna,"  "\n', "customer_id,country\nanna,DE\n",
    "customer_id,country,consent\nben,DE,yes\nanna,DE,\n",
])
def test_nothing_but_a_yes_undoes_a_refusal(shop, later):
    assert consents(shop, "customer_id,consent\nanna,no\n") == (1, 0)
    assert consents(shop, later)[0] == 0
    assert read(current_customers(shop.settings).path)[0][-1] is False
    assert consents(shop, "customer_id,consent\nanna,yes\n") == (0, 1)
    assert read(current_customers(shop.settings).path)[0][-1] is True


def test_an_empty_cell_keeps_every_attribute(shop):
    header = "customer_id,country,segment,loyalty_tier,acquisition_channel,signup_date,consent\n"
    shop.ingest(shop.write("c.csv", header + "A,DE,new,gold,search,2020-02-29,yes\n"), preset="customers")
    report = shop.ingest(shop.write("d.csv", header + "A,,,,,,\n"), preset="customers")
    assert (report.changed, report.unchanged) == (False, 1)
    shop.ingest(shop.write("d.csv", header + "A,,,silver,,,\n"), preset="customers")
    assert read(current_customers(shop.settings).path) == [("A", "DE", "new", "silver", "search", date(2020, 2, 29), True)]


def test_withdrawn_and_granted_consents_are_counted_against_what_was_known(shop):
    assert consents(shop, "customer_id,consent\nA,yes\nB,yes\nC,no\nD,\nE,\n") == (1, 2)
    assert consents(shop, "customer_id,consent\nA,no\nB,yes\nC,yes\nD,no\nE,\nF,no\n") == (3, 1)
    assert consents(shop, "customer_id,consent\nA,no\nB,yes\nC,yes\nD,no\nE,\nF,no\n") == (0, 0)
    report = shop.add(("O1", "A", "2024-05-02", 1))
    assert (report.consent_withdrawn, report.consent_granted) == (0, 0)


# --- warnings ---


def test_customer_ids_that_look_like_e_mail_addresses_are_warned_about_without_showing_one(shop):
    shop.settings = shop.settings.model_copy(update={"hash_customer_ids": "off"})
    day = "2024-05-02"
    report = shop.add(("O1", "anna@example.com", day, 1), ("O2", "anna@example.com", day, 1), ("O3", "=SUM(@A1)", day, 1))
    assert report.warnings == ["1 customer id looks like an e-mail address; use opaque ids, because ids appear in briefs and lists"]
    rows = "".join(f"c{i}@shop.example.org,DE\n" for i in range(1204))
    report = shop.ingest(shop.write("c.csv", f"customer_id,country\nC1,DE\n@,DE\n{rows}"), preset="customers")
    assert report.warnings == [
        "1,204 customer ids look like e-mail addresses; use opaque ids, because ids appear in briefs and lists"
    ]
    assert shop.add(("O9", "C1", day, 1)).warnings == []


def test_customers_already_known_change_nothing(shop):
    path = shop.write("c.csv", "customer_id,country\nA,DE\n")
    shop.ingest(path, preset="customers")
    before = shop.lake()
    assert shop.ingest(path, preset="customers").changed is False
    assert shop.lake() == before


@pytest.mark.parametrize(("text", "message"), [
    ("customer_id,country\nA,DE\nA,DE\n", "line 3: customer_id is given twice"),
    ("customer_id,consent\nA,maybe\n", "line 2: consent is not true/false"),
    ("customer_id,signup_date\nA,31.12.2020\n", "line 2: signup_date is not a date"),
    ("country\nDE\n", "customer_id is missing"),
])
def test_customers_are_checked_too(shop, text, message):
    with pytest.raises(InputRefused, match=message):
        shop.ingest(shop.write("c.csv", text), preset="customers")
    assert shop.lake() == {}


def test_customers_and_orders_do_not_touch_each_other(shop):
    shop.add(("O1", "A", "2024-05-02", 1))
    before = {name: digest for name, digest in shop.lake().items() if name.startswith("orders/")}
    shop.ingest(shop.write("c.csv", "customer_id,country\nA,DE\n"), preset="customers")
    assert {name: digest for name, digest in shop.lake().items() if name.startswith("orders/")} == before
