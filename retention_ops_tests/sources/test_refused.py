"""Bad files: refused whole, with a message that says where and what, and not a byte of the lake touched."""

from __future__ import annotations

import gzip
import io
import zipfile
from datetime import date
from pathlib import Path

import duckdb
import pytest

from retention_ops.errors import InputRefused
from retention_ops.sources.presets import PRESETS
from retention_ops_tests.sources import ORDERS_HEADER as H
from retention_ops_tests.sources import Shop

GOOD = f"{H}\nO1,A,2024-05-02,10\n"


@pytest.fixture
def shop(tmp_path):
    """A shop that already has one order."""
    shop = Shop(tmp_path)
    shop.add(("K1", "A", "2024-05-01", "10.00"))
    return shop


def refused(shop: Shop, *files, **options) -> str:
    """The message of the refusal, after proving that the lake is byte for byte what it was."""
    before = shop.lake()
    with pytest.raises(InputRefused) as caught:
        shop.ingest(*files, **options)
    assert shop.lake() == before
    assert not list((shop.settings.home / "tmp").iterdir())
    return str(caught.value)


def zipped(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return buffer.getvalue()


# --- files as a whole ---

WHOLE_FILES = {
    "empty": (b"", "is empty"),
    "nothing but a header": (H.encode(), "no records"),
    "blank first line": (b"\n" + GOOD.encode(), "starts with a blank line"),
    "a NUL in it": (GOOD.encode() + b"O2,\0,2024-05-02,10\n", "is binary"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is binary"),
    "Latin-1": (GOOD.encode() + "O2,Jürgen,2024-05-02,10\n".encode("latin-1"), "line 3 .*\n.*Latin-1.*iconv -f WINDOWS-1252"),
    "UTF-8 cut off": (GOOD.encode() + "O2,é".encode()[:-1], "ends inside a character in line 3"),
    "UTF-16": (GOOD.encode("utf-16"), "is UTF-16 text"),
    "gzip": (gzip.compress(GOOD.encode()), "gzip.*\n.*gunzip"),
    "an old workbook": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old .xls"),
    "a zip archive": (zipped(orders=GOOD), "is a zip archive, not a workbook"),
    "a cut-off workbook": (b"PK\x03\x04 and no more", "damaged workbook"),
    "a workbook of rubbish": (zipped(**{"xl/workbook.xml": "<rubbish"}), "damaged workbook"),
    "a cut-off parquet file": (b"PAR1 and no more", "damaged parquet"),
    "semicolons": (GOOD.replace(",", ";").encode(), "separated by semicolons"),
    "tabs": (GOOD.replace(",", "\t").encode(), "separated by tabs"),
    "semicolons after a BOM": (b"\xef\xbb\xbf" + GOOD.replace(",", ";").encode(), "separated by semicolons"),
    "a column missing": (GOOD.replace("order_date", "orderdate").encode(), "order_date is missing .nearest present: 'orderdate'"),
    "another header": (b"a,b,c,d\n1,2,3,4\n", "order_id is missing\n.*\n.*\n.*\n.*is the first line the header"),
    "a column twice": (f"{H},Order_ID\n1,A,2024-05-02,1,1\n".encode(), "names a column twice: Order_ID"),
    "a broken header": (b'order_id,"customer_id\nx', "lacks needed|header that is not valid csv"),
    "mixed line ends": (f"{H}\nO1,A,2024-05-02,1\r\nO2,A,2024-05-02,1\n".encode(), "mixes Windows and Unix line ends"),
}


@pytest.mark.parametrize("case", WHOLE_FILES)
def test_unreadable_files_say_why(shop, case):
    content, message = WHOLE_FILES[case]
    text = refused(shop, shop.write("bad.csv", content))
    assert text.startswith("bad.csv") and "nothing was written" in text
    with pytest.raises(InputRefused, match=message):
        raise InputRefused(text)


def test_two_columns_for_one_field_are_ambiguous(shop):
    path = shop.write("r.csv", "Invoice,InvoiceNo,Quantity,InvoiceDate,Price,Customer ID\n1,1,1,2010-12-01,1,7\n")
    assert "two columns for the same thing: Invoice and InvoiceNo" in refused(shop, path, preset="uci-online-retail")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_directory_or_a_missing_file_is_refused_by_every_preset(shop, preset):
    (shop.folder / "folder.csv").mkdir()
    assert "is a directory" in refused(shop, shop.folder / "folder.csv", preset=preset)
    assert "does not exist" in refused(shop, shop.folder / "nowhere.csv", preset=preset)


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_directory_without_a_name_is_named_too(shop, name):
    assert refused(shop, Path(name)).startswith(f"{name} is a directory, not a file")


@pytest.mark.parametrize("content", [b"\x01\x00\x02", b"\xfe\x01\x80", b"abc\xc3"])
@pytest.mark.parametrize(("name", "what"), [("x.parquet", "parquet file"), ("x.XLSX", "workbook")])
def test_rubbish_is_refused_as_what_its_name_promises(shop, content, name, what):
    text = refused(shop, shop.write(name, content))
    assert text.startswith(f"{name} is not a readable {what}") and "text" not in text


def test_a_good_file_does_not_save_a_bad_one(shop):
    assert "bad.csv is empty" in refused(shop, shop.write("good.csv", GOOD), shop.write("bad.csv", ""))


def test_a_file_that_changes_while_it_is_read_is_refused(shop):
    path = shop.write("growing.csv", GOOD)

    def still_exporting(text):
        if text.startswith("checking"):
            path.write_text(GOOD + "O2,A,2024-05-03,1\n")

    shop.progress = type("Sink", (), {"append": staticmethod(still_exporting)})
    assert "changed while it was being read" in refused(shop, path)


def test_a_parquet_column_of_lists_is_refused(shop):
    path = shop.folder / "o.parquet"
    row = "['O1'] AS order_id, 'A' AS customer_id, DATE '2024-05-02' AS order_date, 1.5 AS order_amount"
    duckdb.execute(f"COPY (SELECT {row}) TO '{path}'")
    assert "holds VARCHAR[] in column order_id" in refused(shop, path)


def test_a_parquet_file_with_a_damaged_middle_is_refused(shop):
    path = shop.folder / "o.parquet"
    row = "'O' || i AS order_id, 'A' || hash(i) AS customer_id, DATE '2024-05-02' AS order_date, 1.5 AS order_amount"
    duckdb.execute(f"COPY (SELECT {row} FROM range(20000) r(i)) TO '{path}' (COMPRESSION zstd)")
    content = bytearray(path.read_bytes())
    content[1000:9000] = b"\xff" * 8000
    path.write_bytes(content)
    assert "damaged parquet" in refused(shop, path)


# --- single records ---

RECORDS = {
    "no such day": ("O1,A,2024-02-30,10", "order_date is not a date (expected YYYY-MM-DD)"),
    "a day first": ("O1,A,31/12/2024,10", "order_date is not a date"),
    "a number for a date": ("O1,A,45000,10", "order_date is not a date"),
    "words for a date": ("O1,A,epoch,10", "order_date is not a date"),
    "an hour that is none": ("O1,A,2024-02-03 25:00,10", "order_date is not a date"),
    "long ago": ("O1,A,1969-12-31,10", "order_date is before 1970-01-01"),
    "days ahead": (
        "O1,A,2026-01-17,10", "order_date is later than 2026-01-16, in the future (tomorrow is allowed because of time zones)"
    ),
    "no date": ("O1,A,,10", "order_date is missing"),
    "no order id": (" ,A,2024-05-02,10", "order_id is missing"),
    "no customer": ('O1,"",2024-05-02,10', "customer_id is missing"),
    "no amount": ("O1,A,2024-05-02,", "order_amount is missing"),
    "a negative amount": ("O1,A,2024-05-02,-0.01", "order_amount is negative"),
    "a huge negative amount": ("O1,A,2024-05-02,-1e300", "order_amount is negative"),
    "an absurd amount": ("O1,A,2024-05-02,10000000.01", "order_amount is above max_order_amount (10,000,000)"),
    "a huge integer": ("O1,A,2024-05-02," + "9" * 400, "order_amount is above max_order_amount"),
    "1e300": ("O1,A,2024-05-02,1e300", "order_amount is above max_order_amount"),
    "NaN": ("O1,A,2024-05-02,NaN", "order_amount is not a finite number"),
    "infinity": ("O1,A,2024-05-02,inf", "order_amount is not a finite number"),
    "a thousands separator": ('O1,A,2024-05-02,"1,000.00"', "order_amount is not a finite number: write 1234.50, not 1,234.50"),
    "thousands of thousands": ('O1,A,2024-05-02,"-1,000,000"', "order_amount is not a finite number: write 1234.50, not 1,234.50"),
    "a decimal comma": ('O1,A,2024-05-02,"1000,00"', "order_amount is not a finite number: write 1234.50, not 1234,50"),
    "a German number": ('O1,A,2024-05-02,"1.000,00"', "order_amount is not a finite number: write 1234.50, not 1234,50"),
    "an underscore": ("O1,A,2024-05-02,1_000", "order_amount is not a finite number"),
    "hexadecimal": ("O1,A,2024-05-02,0x10", "order_amount is not a finite number"),
    "a currency sign": ("O1,A,2024-05-02,€5", "order_amount is not a finite number"),
    "an endless id": (f"{'x' * 129},A,2024-05-02,1", "order_id is longer than 128 characters"),
    "a control character": ("O1,A\x1b[2J,2024-05-02,1", "customer_id has control characters"),
    "a tab": ("O1,A\t,2024-05-02,1", "customer_id has control characters"),
    "a field too few": ("O1,A,2024-05-02", "has 3 fields, the header has 4"),
    "a field too many": ("O1,A,2024-05-02,1,000", "has 5 fields, the header has 4"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_bad_record_is_named_by_line_column_and_rule(shop, case):
    record, message = RECORDS[case]
    path = shop.write("bad.csv", f"{H}\nO8,A,2024-05-02,10\n{record}\nO9,A,2024-05-02,10\n")
    text = refused(shop, path)
    assert f"bad.csv line 3: {message}" in text


@pytest.mark.parametrize(("line", "message"), [
    ("1,x,2010-12-01,1,7", "Quantity is not a whole number"),
    ("1,1.5,2010-12-01,1,7", "Quantity is not a whole number"),
    ("1,99999999999999999999,2010-12-01,1,7", "Quantity is beyond 1,000,000,000"),
    ("1,9223372036854775807,2010-12-01,1,7", "Quantity is beyond 1,000,000,000"),
    ("1,1,2010-12-01,1e300,7", "Price is above max_order_amount"),
    ("1,1,2010-12-01,nan,7", "Price is not a finite number"),
    ("1,1,13/1/2010 8:26,1,7", "InvoiceDate is not a date"),
    (",1,2010-12-01,1,7", "Invoice is missing"),
    ("nan,1,2010-12-01,1,7", "Invoice is missing"),
])
def test_bad_invoice_lines_are_named_by_the_header_of_their_file(shop, line, message):
    path = shop.write("bad.csv", f"Invoice,Quantity,InvoiceDate,Price,Customer ID\n{line}\n")
    assert f"bad.csv line 2: {message}" in refused(shop, path, preset="uci-online-retail")


def test_a_repeated_order_id_is_refused_whether_or_not_the_rest_is_equal(shop):
    day = "2024-05-02"
    text = refused(shop, shop.orders_csv(("O1", "A", day, 1), ("O1", "A", day, 1), ("O2", "A", day, 1), ("O1", "B", day, 0)))
    assert "orders.csv: 2 problems" in text
    assert "line 3: order_id is given twice" in text and "line 5: order_id is given twice" in text


def test_values_are_shown_only_on_request_and_cannot_garble_the_terminal(shop):
    value = "secret\x1b[2J" + "y" * 60
    path = shop.orders_csv(("O1", value, "2024-05-02", 1))
    assert "secret" not in refused(shop, path)
    text = refused(shop, path, show_values=True)
    assert f"line 2: customer_id {value[:40]!r}... has control characters" in text
    assert "\x1b" not in text


def test_a_record_is_found_behind_quoted_newlines(shop):
    path = shop.write("bad.csv", f'{H},note\nO1,A,2024-05-02,1,"two\nlines, ""both"" quoted"\nO2,A,never,1,5" wide\nO3,A,never,1,x\n')
    text = refused(shop, path)
    assert "bad.csv line 4: order_date" in text and "bad.csv line 5: order_date" in text


def test_blank_lines_do_not_mislead_about_the_place(shop):
    assert "bad.csv line 4: order_date" in refused(shop, shop.write("bad.csv", f"{H}\nO1,A,2024-05-02,1\n\nO2,A,never,1\n"))
    crlf = f"{H}\n\nO1,A,2024-05-02,1\n\n\nO2,A\n".replace("\n", "\r\n")
    assert "bad.csv line 6: has 2 fields" in refused(shop, shop.write("bad.csv", crlf))
    assert "bad.csv line 4: has 2 fields" in refused(shop, shop.write("bad.csv", f"{H}\nO1,A,2024-05-02,1\n\nO2,A\n"))
    assert "bad.csv line 2: order_date" in refused(shop, shop.write("bad.csv", f"{H}\nO2,A,never,1\n\n\n"))


def test_an_unclosed_quote_is_told_alone_because_it_may_be_the_reason_for_everything_else(shop):
    text = refused(shop, shop.write("bad.csv", f'{H}\n\nO1,A,never,1\nO2,"A,2024-05-02,1\nO3,A,2024-05-02,1\n'))
    assert text.splitlines()[:2] == [
        "bad.csv: 1 problem; nothing was written.", "  bad.csv line 4: has a quote that is not closed or not doubled",
    ]


@pytest.mark.parametrize("before", ["", "\n", 'O7,A,2024-05-02,1,"two\nlines"\n'])
@pytest.mark.parametrize("last", ['O2,"A,2024-05-02,1,', 'O2,A,2024-05-02,1,"note', 'O2,A,2024-05-02,1,"x",\n\nO3,A,2024-05-02,1,"y'])
def test_a_quote_that_stays_open_to_the_end_never_loses_a_record(shop, before, last):
    """DuckDB's single reader leaves such a record out without a word."""
    text = refused(shop, shop.write("bad.csv", f"{H},note\nO1,A,2024-05-02,1,\n{before}{last}\n"))
    assert "has a quote that is not closed" in text or "fields, the header has" in text


MESSY = f"""{H},note
O1,A,2024-05-02,1,
O2,A,2024-05-02

O3,A,never,1,"on
two lines"
O4,A,2024-05-02,1,x,y
O1,B,2024-05-02,-1,
O5,A,2024-05-02,x,
"""


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("before", ["", "\ufeff"])
def test_all_that_is_wrong_with_a_file_is_told_at_once_with_its_lines(shop, line_end, before):
    text = refused(shop, shop.write("bad.csv", (before + MESSY).replace("\n", line_end)))
    assert text.splitlines()[:-1] == [
        "bad.csv: 6 problems; nothing was written.",
        "  bad.csv line 3: has 3 fields, the header has 5",
        "  bad.csv line 5: order_date is not a date (expected YYYY-MM-DD)",
        "  bad.csv line 7: has 6 fields, the header has 5",
        "  bad.csv line 8: order_amount is negative",
        "  bad.csv line 8: order_id is given twice in the same file",
        "  bad.csv line 9: order_amount is not a finite number",
    ]


def test_values_are_shown_of_the_right_records_among_ragged_ones(shop):
    text = refused(shop, shop.write("bad.csv", MESSY), show_values=True)
    assert "line 5: order_date 'never'" in text and "line 8: order_amount '-1'" in text and "line 9: order_amount 'x'" in text
    assert "line 8: order_id 'O1' is given twice" in text


def test_every_rule_is_counted_among_many_ragged_records(shop):
    rows = [("O1", "A") if i % 3 == 0 else (f"O{i // 2}", "A", "never" if i % 5 == 0 else "2024-05-02", 1) for i in range(3000)]
    text = refused(shop, shop.orders_csv(*rows))
    good = [(i, row) for i, row in enumerate(rows) if len(row) == 4]
    never = sum(row[2] == "never" for _, row in good)
    twice = len(good) - len({row[0] for _, row in good})
    assert "  1,000 x has a wrong number of fields\n" in text
    assert f"  {never} x order_date is not a date" in text and f"  {twice} x order_id is given twice in the same file" in text
    assert [int(line.split()[2].rstrip(":")) for line in text.splitlines() if "is given twice" in line and "line" in line][:2] == [7, 13]


@pytest.mark.parametrize("behind", [-1, 0, 1, 2])
def test_a_ragged_record_where_the_readers_pieces_meet_hides_nothing_behind_it(shop, behind):
    """DuckDB's parallel reader ended there without a word, and the rest of the file was lost."""
    good, padding = "O1,A,2024-01-01,1," + "x" * 981 + "\n", f"{H},note\n"
    before = (16_000_000 - len(padding)) // len(good) + behind
    path = shop.write("big.csv", padding + good * before + "O2,A,2024-01-01\n" + good * 300 + "O3,A,never,1,\n")
    text = refused(shop, path)
    assert f"  {before + 300 - 1:,} x order_id is given twice" in text
    assert "  1 x has a wrong number of fields" in text and "  1 x order_date is not a date" in text


def test_an_invoice_is_not_accused_because_of_a_line_that_is_wrong_itself(shop):
    """A line whose quantity cannot be read might be one that is left out, so its customer proves nothing."""
    header = "Invoice,Quantity,InvoiceDate,Price,Customer ID\n"
    path = shop.write("bad.csv", header + "1,1,2010-12-01,1,7\n1,x,2010-12-01,1,8\n2,1,2010-12-01,1,7\n2,1,2010-12-01,1,8\n")
    text = refused(shop, path, preset="uci-online-retail")
    assert "2 problems" in text
    assert "line 3: Quantity is not a whole number" in text and "line 5: InvoiceNo belongs to two customers" in text


def test_ragged_text_does_not_hide_other_faults(shop):
    path = shop.write("bad.txt", "1 19970101 1 1.00\n1 19970101 1\n\n1 19979999 1 1.00\n")
    text = refused(shop, path, preset="cdnow")
    assert "bad.txt line 2: has 3 fields, expected 4" in text and "bad.txt line 4: date is not a date" in text


def test_faults_of_one_file_do_not_hide_those_of_another(shop):
    ragged = shop.write("ragged.csv", f"{H}\nO1,A\n")
    broken = shop.write("broken.csv", f'{H}\nO1,"A,2024-05-02,1\n')
    twice = shop.orders_csv(("O1", "A", "2024-05-02", 1), ("O1", "A", "2024-05-02", 1), name="twice.csv")
    text = refused(shop, ragged, broken, twice)
    assert "ragged.csv line 2: has 2 fields" in text and "broken.csv line 2: has a quote" in text
    assert "twice.csv line 3: order_id is given twice" in text


def test_a_record_beyond_what_is_read_is_never_lost_in_a_text_file(shop):
    path = shop.write("long.txt", f"1 19970101 1 1.00\n{'9' * 2_100_000} 19970102 1 1.00\n")
    assert "longer than 2 MB" in refused(shop, path, preset="cdnow")


def test_the_first_hundred_problems_come_in_order_and_then_the_counts(shop):
    rows = [(f"O{i}", "A", "2024-05-02" if i % 2 else "never", -1 if i % 3 == 0 else 1) for i in range(300)]
    text = refused(shop, shop.orders_csv(*rows))
    lines = text.splitlines()
    listed = [int(line.split()[2].rstrip(":")) for line in lines if line.startswith("  orders.csv")]
    assert lines[0].startswith("orders.csv: 250 problems")
    assert len(listed) == 100 and listed == sorted(listed) and listed[0] == 2
    assert "  ... and 150 more" in lines
    assert lines[-3:-1] == ["  150 x order_date is not a date (expected YYYY-MM-DD)", "  100 x order_amount is negative"]
    assert lines[-1].startswith("Correct the file")


def test_problems_of_several_files_are_told_together(shop):
    one = shop.orders_csv(("O1", "A", "never", 1), name="1.csv")
    two = shop.orders_csv(("O2", "A", "2024-05-02", -1), name="2.csv")
    text = refused(shop, two, one)
    assert text.startswith("2.csv, 1.csv: 2 problems")


def test_a_date_may_be_tomorrow_because_the_shop_may_be_ahead_of_the_clock(tmp_path):
    shop = Shop(tmp_path, shop_timezone="Pacific/Kiritimati")  # 14 hours ahead: there it is already the 16th
    shop.add(("O1", "A", "2026-01-17", 1))
    assert shop.current.last_date == date(2026, 1, 17)


def test_max_order_amount_is_the_settings(tmp_path):
    shop = Shop(tmp_path, max_order_amount=10**18)
    shop.add(("O1", "A", "2024-05-02", 10**12))
    assert shop.orders()[0][3] == 10**14
    assert "above max_order_amount" in refused(shop, shop.orders_csv(("O2", "A", "2024-05-02", 10**13)))
