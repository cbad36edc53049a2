"""Properties of parsing, against plain Python as the oracle: no value is misread, none is lost, nothing crashes."""

from __future__ import annotations

import csv
import io
import unicodedata
from datetime import date, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retention_ops.errors import InputRefused
from retention_ops_tests.sources import ORDERS_HEADER, Shop

few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rules")


def fresh(folder) -> Shop:
    """A shop in a folder of its own, because hypothesis runs many examples in one test."""
    path = folder / str(len(list(folder.iterdir())))
    path.mkdir()
    return Shop(path)


def csv_text(rows, terminator="\n"):
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator=terminator)
    writer.writerow(ORDERS_HEADER.split(","))
    writer.writerows(rows)
    return buffer.getvalue()


amounts = st.decimals(min_value="0.005", max_value=10_000_000, places=4, allow_nan=False) | st.sampled_from(
    [Decimal("0.005"), Decimal("1.005"), Decimal("2.675"), Decimal("10000000")]
)


@few
@given(values=st.lists(amounts, min_size=1, max_size=30))
def test_amounts_are_exact_and_rounded_half_up(folder, values):
    shop = fresh(folder)
    shop.add(*((f"O{i}", "A", "2024-05-02", value) for i, value in enumerate(values)))
    expected = {f"O{i}": int(value.quantize(Decimal("0.01"), ROUND_HALF_UP) * 100) for i, value in enumerate(values)}
    assert {row[0]: row[3] for row in shop.orders()} == {key: cents for key, cents in expected.items() if cents}


invoice_lines = st.tuples(st.integers(1, 5), st.integers(1, 999), st.decimals("0.001", 999, places=3))


@few
@given(lines=st.lists(invoice_lines, min_size=1, max_size=40))
def test_an_invoice_is_worth_the_exact_sum_of_its_lines(folder, lines):
    shop = fresh(folder)
    text = "Invoice,Quantity,InvoiceDate,Price,Customer ID\n" + "".join(f"{i},{q},2010-12-01,{p},7\n" for i, q, p in lines)
    expected: dict[str, Decimal] = {}
    for invoice, quantity, price in lines:
        expected[str(invoice)] = expected.get(str(invoice), Decimal(0)) + quantity * price
    cents = {key: int(value.quantize(Decimal("0.01"), ROUND_HALF_UP) * 100) for key, value in expected.items()}
    if not any(cents.values()):
        return
    shop.ingest(shop.write("r.csv", text), preset="uci-online-retail")
    assert {row[0]: row[3] for row in shop.orders()} == {key: value for key, value in cents.items() if value}


# blanks around a value, of any width, are no part of it
BLANKS = "".join(chr(code) for code in range(0x3001) if unicodedata.category(chr(code)) == "Zs")
ids = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029"), min_size=1, max_size=128).map(
    lambda text: text.strip(BLANKS)
).filter(bool)


@few
@given(customers=st.lists(ids, min_size=1, max_size=20), terminator=st.sampled_from(["\n", "\r\n"]))
def test_any_id_of_printable_text_survives_the_csv(folder, customers, terminator):
    shop = fresh(folder)
    rows = [(f"O{i}", customer, "2024-05-02", 1) for i, customer in enumerate(customers)]
    shop.ingest(shop.write("o.csv", csv_text(rows, terminator)))
    assert {row[0]: row[1] for row in shop.orders()} == {row[0]: row[1] for row in rows}


@few
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60), min_size=1, max_size=4))
def test_whatever_a_field_holds_it_is_taken_or_refused_and_never_a_crash(folder, values):
    shop = fresh(folder)
    row = ["O1", "A", "2024-05-02", "1", *values][len(values):]
    try:
        shop.ingest(shop.write("o.csv", csv_text([row, ["O9", "B", "2024-05-03", 1]])))
    except InputRefused as refused:
        assert not any(unicodedata.category(character) == "Cc" for character in str(refused).replace("\n", ""))
        assert shop.lake() == {}
    else:
        assert shop.current.orders >= 1


@few
@given(st.binary(max_size=200), st.booleans())
def test_whatever_bytes_a_file_holds_it_is_taken_or_refused_and_never_a_crash(folder, content, with_header):
    shop = fresh(folder)
    try:
        shop.ingest(shop.write("o.csv", (ORDERS_HEADER.encode() + b"\n" if with_header else b"") + content))
    except InputRefused:
        assert shop.lake() == {}


moments = st.datetimes(datetime(1970, 1, 2), datetime(2025, 12, 31))


@few
@given(st.lists(moments, min_size=1, max_size=15), st.integers(-14 * 60, 14 * 60), st.sampled_from("T "))
def test_moments_become_the_date_in_the_shop(folder, moments, minutes, separator):
    shop = fresh(folder)  # UTC
    sign, (hours, rest) = "-" if minutes < 0 else "+", divmod(abs(minutes), 60)
    offset = f"{sign}{hours:02}:{rest:02}"
    shop.add(*((f"O{i:02}", "A", f"{moment.isoformat(separator)}{offset}", 1) for i, moment in enumerate(moments)))
    expected = {f"O{i:02}": (moment - timedelta(minutes=minutes)).date() for i, moment in enumerate(moments)}
    assert {row[0]: row[2] for row in shop.orders()} == expected


@few
@given(st.lists(moments, min_size=1, max_size=15))
def test_american_dates_are_month_first(folder, moments):
    shop = fresh(folder)
    lines = [f"{i},1,{moment:%m/%d/%Y %H:%M},1,7\n".replace("/0", "/") for i, moment in enumerate(moments)]
    path = shop.write("r.csv", "Invoice,Quantity,InvoiceDate,Price,Customer ID\n" + "".join(lines))
    shop.ingest(path, preset="uci-online-retail")
    assert {row[0]: row[2] for row in shop.orders()} == {str(i): moment.date() for i, moment in enumerate(moments)}


@few
@given(st.text("0123456789-/:. TZ+", min_size=1, max_size=30))
def test_a_date_is_one_that_python_knows_too_or_refused(folder, text):
    shop = fresh(folder)
    try:
        shop.add(("O1", "A", text, 1))
    except InputRefused:
        return
    assert shop.orders()[0][2] - date.fromisoformat(text.strip()[:10]) <= timedelta(days=1)


records = st.tuples(st.sampled_from(["good", "bad date", "ragged"]), st.text('ab ",\n', max_size=12), st.integers(0, 2))


@few
@given(rows=st.lists(records, min_size=1, max_size=40), terminator=st.sampled_from(["\n", "\r\n"]), quoting=st.sampled_from([0, 1]))
def test_every_bad_record_is_found_in_its_line_whatever_is_around_it(folder, rows, terminator, quoting):
    shop = fresh(folder)
    text = f"{ORDERS_HEADER},note{terminator}"
    expected = []
    for number, (kind, note, blank_lines) in enumerate(rows):
        text += terminator * blank_lines
        if kind != "good":
            expected.append((text.count("\n") + 1, kind))
        buffer = io.StringIO()
        row = [f"O{number}", "A", "never" if kind == "bad date" else "2024-05-02", "1", note.replace("\n", terminator)]
        csv.writer(buffer, lineterminator=terminator, quoting=quoting).writerow(row + ["x"] * (kind == "ragged"))
        text += buffer.getvalue()
    path = shop.write("o.csv", text)
    if not expected:
        shop.ingest(path)
        return
    with pytest.raises(InputRefused) as refused:
        shop.ingest(path)
    said = {"bad date": "order_date is not a date (expected YYYY-MM-DD)", "ragged": "has 6 fields, the header has 5"}
    assert str(refused.value).splitlines()[1:-1] == [f"  o.csv line {line}: {said[kind]}" for line, kind in expected]


@few
@given(notes=st.lists(st.text('ab",\n\r', max_size=12), min_size=1, max_size=30), terminator=st.sampled_from(["\n", "\r\n"]))
def test_every_record_of_a_csv_is_counted_whatever_its_quotes_and_newlines(folder, notes, terminator):
    shop = fresh(folder)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator=terminator, quoting=csv.QUOTE_ALL)
    writer.writerow([*ORDERS_HEADER.split(","), "note"])
    writer.writerows([f"O{i}", "A", "2024-05-02", "1", note] for i, note in enumerate(notes))
    report = shop.ingest(shop.write("o.csv", buffer.getvalue()))
    assert report.records_read == report.rows == len(notes)
