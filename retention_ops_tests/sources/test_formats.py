"""The same records in whatever wrapping: csv dialects, workbooks, parquet; recognised by content, not by name."""

from __future__ import annotations

from datetime import date, datetime

import duckdb
import pytest
import xlsxwriter

from retention_ops.errors import InputRefused
from retention_ops_tests.sources import ORDERS_HEADER as H
from retention_ops_tests.sources import Shop, shared

ROWS = [("O1", "A", date(2024, 5, 2), 1050, "EUR"), ("O2", "17850", date(2024, 5, 3), 200, "EUR")]


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path)


def workbook(path, **sheets):
    """Write sheets of rows; datetimes become real date cells."""
    with xlsxwriter.Workbook(str(path), {"default_date_format": "yyyy-mm-dd hh:mm:ss"}) as book:
        for name, rows in sheets.items():
            sheet = book.add_worksheet(name)
            for number, row in enumerate(rows):
                for column, value in enumerate(row):
                    if value is not None:
                        (sheet.write_string if isinstance(value, str) else sheet.write)(number, column, value)
    return path


ORDER_ROWS = [
    H.split(","), ["O1", "A", datetime(2024, 5, 2, 23, 59, 59, 999_000), 10.5], [], ["O2", 17850, "2024-05-03", "2"],
]


@pytest.mark.parametrize("text", [
    f"{H}\nO1,A,2024-05-02,10.50\nO2,17850,2024-05-03,2\n",
    f"{H}\r\nO1,A,2024-05-02,10.50\r\nO2,17850,2024-05-03,2",
    f"{H}\rO1,A,2024-05-02,10.50\rO2,17850,2024-05-03,2\r",
    f"\ufeff{H}\nO1,A,2024-05-02,10.50\n\n O2 , 17850 ,2024-05-03 , 2\n\n",
    ' Order_ID ,CUSTOMER_ID,order_date,"order_amount"\n"O1","A","2024-05-02","10.50"\n'
    "O2,17850,2024-05-03T00:00:00.000000001,+2.\n",
    'note,order_amount,order_date,customer_id,order_id,\n"a ""b"", c\nd\r\ne",10.5,2024-05-02,A,O1,\n'
    "x,2.00,2024-05-03 9:05,17850,O2,\n",
])
def test_csv_in_any_legal_dress(shop, text):
    shop.ingest(shop.write("o.csv", text))
    assert shop.orders() == [ROWS[1], ROWS[0]]


@pytest.mark.parametrize(
    "name", ["it's.csv", "a*b?.csv", "q[1].csv", "{x}.csv", "no_suffix", "year=2024.csv", "o.xlsx", "o.parquet", "ö .csv"]
)
def test_the_name_of_a_file_means_nothing(shop, name):
    shop.write("q1.csv", "decoy")
    report = shop.ingest(shop.write(name, f"{H}\nO1,A,2024-05-02,10.50\n"))
    assert report.rows == 1 and report.files[0]["name"] == name


def test_files_of_the_same_name_are_told_apart(shop):
    (shop.folder / "a").mkdir()
    one = shop.orders_csv(("O1", "A", "2024-05-02", 1), name="a/o.csv")
    two = shop.orders_csv(("O2", "A", "2024-05-02", 1), name="o.csv")
    assert [file["name"] for file in shop.ingest(one, two).files] == [str(one), str(two)]


def test_a_workbook_is_read_with_its_dates_and_numbers(shop):
    report = shop.ingest(workbook(shop.folder / "o.csv", Orders=ORDER_ROWS))  # the wrong suffix is no hindrance
    assert shop.orders() == [ROWS[1], ("O1", "A", date(2024, 5, 3), 1050, "EUR")]  # a millisecond short of midnight is rounding
    assert report.records_read == 2 and report.skipped_sheets == []


def test_every_fitting_sheet_counts_and_the_others_are_named(shop):
    more = [[], [None, *H.split(",")], [None, "O1", "A", datetime(2024, 5, 3), 10.5], [None, "O3", "B", datetime(2024, 5, 4), 1]]
    path = workbook(shop.folder / "o.xlsx", First=ORDER_ROWS, Notes=[["hello"]], Second=more, Empty=[])
    report = shop.ingest(path)
    assert report.rows == 3 and report.files[0]["records"] == 4
    assert report.skipped_sheets == ["o.xlsx: Notes", "o.xlsx: Empty"]
    assert report.excluded == {"order already in an earlier file": 1}


def test_a_bad_cell_is_named_by_sheet_and_row(shop):
    path = workbook(shop.folder / "o.xlsx", Notes=[["x"]], Orders=[*ORDER_ROWS, [], ["O3", "A", 45000, True]])
    with pytest.raises(InputRefused) as caught:
        shop.ingest(path)
    assert "o.xlsx, sheet 'Orders' row 6: order_date is not a date" in str(caught.value)
    assert "o.xlsx, sheet 'Orders' row 6: order_amount is not a finite number" in str(caught.value)


@pytest.mark.parametrize(("sheets", "message"), [
    ({"A": [["x"]], "B": [["order_id", "customer_id", "order_day"]]}, "no sheet fits(.|\n)*nearest present: 'order_day'"),
    ({"A": []}, "no sheet with any content"),
    ({"A": [H.split(",")]}, "no records"),
])
def test_a_workbook_without_orders_is_refused(shop, sheets, message):
    with pytest.raises(InputRefused, match=message):
        shop.ingest(workbook(shop.folder / "o.xlsx", **sheets))
    assert shop.lake() == {}


def test_sheets_that_merely_mention_customers_are_not_customers(shop):
    customers, chats = [["customer_id", "country"], ["A", "DE"]], [["customer_id", "text"], ["A", "x"]]
    path = workbook(shop.folder / "c.xlsx", Customers=customers, Chats=chats)
    report = shop.ingest(path, preset="customers")
    assert report.rows == 1 and report.skipped_sheets == ["c.xlsx: Chats"]
    only = workbook(shop.folder / "d.xlsx", Chats=chats)
    with pytest.raises(InputRefused, match="no sheet with customer attributes"):
        shop.ingest(only, preset="customers")


def test_both_years_of_online_retail_in_one_workbook(shop):
    columns = ["Invoice", "StockCode", "Quantity", "InvoiceDate", "Price", "Customer ID"]
    line = [536365, "A", 6, datetime(2010, 12, 1, 8, 26), 2.55, 17850]
    path = workbook(shop.folder / "r.xlsx", **{
        "Year 2009-2010": [columns, line, ["C1", "A", -1, datetime(2010, 12, 1), 1, None]],
        "Year 2010-2011": [columns, line, [536366, "A", 1, datetime(2010, 12, 2), 0.1, 17850]],
    })
    report = shop.ingest(path, preset="uci-online-retail")
    assert [row[:4] for row in shop.orders()] == [
        ("536365", "17850", date(2010, 12, 1), 1530), ("536366", "17850", date(2010, 12, 2), 10),
    ]
    assert report.excluded == {"cancellation": 1, "invoice already in an earlier file": 1}


@pytest.mark.parametrize("select", [
    "'O2' AS order_id, 17850.0::DOUBLE AS customer_id, DATE '2024-05-03' AS order_date, 2.0::FLOAT AS order_amount",
    "'O2' AS order_id, 17850 AS customer_id, TIMESTAMP '2024-05-03 10:00:00' AS order_date, 2::DECIMAL(9, 3) AS order_amount",
    "'O2'::BLOB AS order_id, '17850' AS customer_id, TIMESTAMPTZ '2024-05-03 10:00:00+05' AS order_date, '2.00' AS order_amount",
    "'O2' AS order_id, 17850::UBIGINT AS customer_id, TIMESTAMP_NS '2024-05-03 10:00:00.123456789' AS order_date, "
    "2::HUGEINT AS order_amount",
])
def test_parquet_of_any_plain_type(shop, select):
    path = shop.folder / "o"
    duckdb.execute(f"COPY (SELECT {select}) TO '{path}' (FORMAT parquet)")
    shop.ingest(path)
    assert shop.orders() == [ROWS[1]]


def test_parquet_nan_is_no_amount_and_no_customer(shop):
    path = shop.folder / "o.parquet"
    row = "'O1' AS order_id, 'nan'::DOUBLE AS customer_id, DATE '2024-05-03' AS order_date, 'nan'::DOUBLE AS order_amount"
    duckdb.execute(f"COPY (SELECT {row}) TO '{path}'")
    with pytest.raises(InputRefused) as caught:
        shop.ingest(path)
    assert "o.parquet record 1: customer_id is missing" in str(caught.value)
    assert "o.parquet record 1: order_amount is not a finite number" in str(caught.value)


def test_a_format_a_preset_does_not_read_is_refused(shop):
    path = shop.folder / "o.txt"
    duckdb.execute(f"COPY (SELECT 1 AS x) TO '{path}' (FORMAT parquet)")
    with pytest.raises(InputRefused, match="is parquet, which preset cdnow does not read"):
        shop.ingest(path, preset="cdnow")


def test_the_retail_file_as_csv_gives_the_same_version_as_parquet(tmp_path):
    source = shared("uci_online_retail.parquet")
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    csv = tmp_path / "online_retail.csv"
    duckdb.execute(f"COPY (SELECT * FROM '{source}') TO '{csv}' (HEADER)")
    from_csv = Shop(tmp_path / "a").ingest(csv, preset="uci-online-retail")
    from_parquet = Shop(tmp_path / "b").ingest(source, preset="uci-online-retail")
    assert from_csv.content_sha256 == from_parquet.content_sha256
    assert from_csv.excluded == from_parquet.excluded


def test_a_workbook_of_the_real_world_is_refused_with_the_nearest_name(shop):
    with pytest.raises(InputRefused, match=r"order_amount is missing \(nearest present: 'total_amount'\)"):
        shop.ingest(shared("AgentMAX_CX_dataset.xlsx"))
    assert shop.ingest(shared("AgentMAX_CX_dataset.xlsx"), preset="customers").rows == 1_000
