"""Sources that are files: what a folder, a pattern or a bucket gives, and what is refused; and the Shopify example on its export."""

from __future__ import annotations

import csv
import re
import threading
from datetime import UTC, date, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import duckdb
import pytest

from retention_ops.errors import InputRefused, SourceError
from retention_ops.sources.check import check_source
from retention_ops.sources.examples import write_example
from retention_ops.sources.pull import pull
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.conftest import settings_for
from retention_ops_tests.sources import read

NOW = datetime(2026, 3, 2, 11, 0, tzinfo=UTC)
HEADER = "order_id,customer_id,ordered_at,order_amount,currency,status,is_test"
SELECT = "SELECT order_id, customer_id, ordered_at, order_amount, currency, status, is_test FROM source_files"
# the columns of Shopify's order export, as its help and importers of it name them
SHOPIFY = next(csv.reader([
    "Name,Email,Financial Status,Paid at,Fulfillment Status,Fulfilled at,Accepts Marketing,Currency,Subtotal,Shipping,Taxes,Total,"
    "Discount Code,Discount Amount,Shipping Method,Created at,Lineitem quantity,Lineitem name,Lineitem price,Lineitem sku,Billing Name,"
    "Notes,Note Attributes,Cancelled at,Payment Method,Payment Reference,Refunded Amount,Id,Tags,Risk Level,Source"
]))


def order(number: int, day: str = "2026-02-20", status: str = "paid", amount: str = "10.00") -> str:
    return f"0{number},c{number},{day} 10:00:00,{amount},EUR,{status},false"


def shop(folder: Path, path: str, select: str = SELECT) -> Lake:
    (folder / "orders.sql").write_text(select)
    return Lake(settings_for(folder / "home", source="files", source_path=path, source_sql=folder / "orders.sql"))


def ids(lake: Lake) -> list[str]:
    return sorted(row[0] for row in read(lake.orders().path))


def taken(lake: Lake) -> list[str]:
    pull(lake, clock=lambda: NOW)
    return ids(lake)


def put(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    return path


def test_a_folder_a_pattern_or_one_file(tmp_path):
    put(tmp_path / "in" / "2025" / "a.csv", order(1))
    put(tmp_path / "in" / "2026" / "b.csv", order(2))
    put(tmp_path / "in" / ".hidden" / "c.csv", order(3))
    (tmp_path / "in" / "readme.txt").write_text("not orders")
    for path, expected in (("in", ["01", "02"]), ("in/2026", ["02"]), ("in/*/b*.csv", ["02"]), ("in/2025/a.csv", ["01"])):
        folder = tmp_path / f"shop of {expected}"
        folder.mkdir(exist_ok=True)
        assert taken(shop(folder, str(tmp_path / path))) == expected, "and ids keep their zeros"


def test_columns_may_differ_between_files_and_each_row_knows_its_file(tmp_path):
    put(tmp_path / "in" / "a.csv", order(1), order(2))
    (tmp_path / "in" / "b.csv").write_text(f"note,{HEADER}\n" + f'"two\nlines",{order(2, amount="99.00")}\n')
    newest = f"{SELECT} QUALIFY source_file = max(source_file) OVER (PARTITION BY order_id)"
    lake = shop(tmp_path, str(tmp_path / "in"), newest)
    assert taken(lake) == ["01", "02"]
    assert {row[0]: row[3] for row in read(lake.orders().path)} == {"01": 1000, "02": 9900}


def test_parquet_keeps_its_types(tmp_path):
    (tmp_path / "in").mkdir()
    duckdb.execute(f"COPY (SELECT 7 AS order_id, 'c' AS customer_id, TIMESTAMPTZ '2026-02-20 23:30:00-05' AS ordered_at, "
                   f"1.005::DECIMAL(9,3) AS order_amount, 'EUR' AS currency, 'paid' AS status, false AS is_test) TO "
                   f"'{tmp_path}/in/a.parquet'")
    lake = shop(tmp_path, str(tmp_path / "in"))
    pull(lake, clock=lambda: NOW)
    assert read(lake.orders().path) == [("7", "c", date(2026, 2, 21), 101, "EUR")]


@pytest.mark.parametrize(("content", "says"), [
    (f"{HEADER}\n{order(1)}\n\"{order(2)}\n{order(3)}\n", "quote that is not closed"),
    (f"{HEADER}\n{order(1)}\n{order(2)},more\n", "near line 3"),
    (f"{HEADER}\n{order(1)}\n".encode() + b"\xe9\n", "is not UTF-8"),
    (f"\n{HEADER}\n{order(1)}\n", "starts with a blank line"),
])
def test_a_csv_that_cannot_be_read_to_its_end_is_refused(tmp_path, content, says):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises((InputRefused, SourceError), match=says) as refused:
        pull(shop(tmp_path, str(tmp_path / "in")), clock=lambda: NOW)
    assert "c2" not in str(refused.value)


def test_no_file_or_files_of_both_kinds_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    lake = shop(tmp_path, str(tmp_path / "in"))
    with pytest.raises(SourceError, match="has no csv or parquet file"):
        pull(lake, clock=lambda: NOW)
    put(tmp_path / "in" / "a.csv", order(1))
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError, match="both csv and parquet"):
        pull(lake, clock=lambda: NOW)


def test_a_rolling_export_keeps_what_it_no_longer_reaches(tmp_path):
    put(tmp_path / "in" / "a.csv", order(1, "2025-11-01"), order(2), order(3))
    lake = shop(tmp_path, str(tmp_path / "in"))
    taken(lake)
    put(tmp_path / "in" / "a.csv", order(2), order(3), order(4, "2026-03-01"))
    assert pull(lake, clock=lambda: NOW).kept_before == 1 and ids(lake) == ["01", "02", "03", "04"]


def test_a_rolling_export_that_begins_in_the_middle_of_a_day_speaks_for_the_days_after_it(tmp_path):
    def at(hour: int, day: str = "2026-02-20") -> str:
        return f"{day[-2:]}-{hour:02d},c{hour},{day} {hour:02d}:30:00,10.00,EUR,paid,false"

    whole = [at(hour) for hour in range(24)]
    put(tmp_path / "in" / "orders.csv", at(9, "2026-02-01"), *whole, at(9, "2026-02-21"), at(10, "2026-02-21"))
    lake = shop(tmp_path, str(tmp_path / "in"))
    assert len(taken(lake)) == 27
    put(tmp_path / "in" / "orders.csv", *whole[13:], at(9, "2026-02-21"), at(1, "2026-03-02"))  # the next export, from noon on
    second = pull(lake, clock=lambda: NOW)
    assert (second.kept_before, second.vanished, second.new, second.stale_from) == (14, 1, 1, date(2026, 2, 21)), "one is gone"
    assert len(ids(lake)) == 27
    for everything in (False, True):
        checked = check_source(lake, everything=everything, clock=lambda: NOW)
        assert (checked.since, checked.off) == (date(2026, 2, 21), []), "nor does the check miss what a pull keeps"
    assert not pull(lake, full=True, clock=lambda: NOW).changed


# --- a bucket --------------------------------------------------------------------------------------------------------


class Bucket(ThreadingHTTPServer):
    """As much of S3 as reading takes: list, head, and get with a range."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.writes = files, []
        super().__init__(("127.0.0.1", 0), _Answers)


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        name = url.path.removeprefix("/orders").removeprefix("/")
        if "list-type" in parse_qs(url.query):
            prefix = parse_qs(url.query).get("prefix", [""])[0]
            found = "".join(f"<Contents><Key>{key}</Key><Size>{len(data)}</Size></Contents>"
                            for key, data in self.server.files.items() if key.startswith(prefix))
            return self._say(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode())
        data = self.server.files.get(name)
        if data is None:
            return self._say(404, b"")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return self._say(206, data[int(wanted[1]): int(wanted[2]) + 1]) if wanted else self._say(200, data)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.server.writes.append(self.path)
        self._say(403, b"")

    do_POST = do_DELETE = do_PUT

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with Bucket({}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_bucket_is_read_and_never_written(tmp_path, bucket):
    """Against a loopback server that speaks S3, with pyarrow's own client; nothing here has met the real S3 or Google's storage."""
    for name, text in (("in/a.csv", order(1)), ("in/2026/b.csv", order(2)), ("in/2026/notes.txt", "x"), ("other/c.csv", order(3))):
        bucket.files[name] = f"{HEADER}\n{text}\n".encode()
    where = f"?endpoint_override=127.0.0.1:{bucket.server_address[1]}&scheme=http&region=eu-central-1"
    for path, expected in (("s3://orders/in", ["01", "02"]), ("s3://orders/in/*/*.csv", ["02"]), ("s3://orders/in/a.csv", ["01"])):
        folder = tmp_path / str(len(expected)) / expected[0]
        folder.mkdir(parents=True)
        assert taken(shop(folder, path + where)) == expected
        assert not list((folder / "home" / "tmp").glob("files-*")), "the copies are gone"
    assert bucket.writes == []
    with pytest.raises(SourceError) as missing:
        pull(shop(folder, "s3://orders/nothing.csv" + where), clock=lambda: NOW)
    assert "canary" not in str(missing.value)


@pytest.mark.parametrize(("login", "path", "says"), [
    ("CANARYKEY:CANARY%2FSECRET", "in", None),
    ("CANARYKEY:CANARY%2FSECRET", "nothing/", "cannot be read"),
    ("CANARYKEY:CANARY%2FSECRET", "nothing.csv", "has no csv or parquet file"),
    ("CANARYKEY:CANARY%2FSECRET", "in&CANARYQUERY=1", "cannot be read"),
    ("CANARYKEY:CANARY/SECRET", "in", "cannot be read"),
    ("CANARYKEY:CANARY?SECRET", "in", "cannot be read"),
    ("CANARYKEY:CANARY@SECRET", "in", "cannot be read"),
])
def test_a_login_in_the_buckets_address_is_shown_nowhere(tmp_path, bucket, login, path, says):
    from retention_ops.commands.doctor import _source

    bucket.files["in/a.csv"] = f"{HEADER}\n{order(1)}\n".encode()
    path, _, more = path.partition("&")
    lake = shop(tmp_path, f"s3://{login}@orders/{path}?endpoint_override=127.0.0.1:{bucket.server_address[1]}&scheme=http"
                          f"&region=eu-central-1{more and '&' + more}")
    told: list[str] = []
    if says:
        with pytest.raises(SourceError, match=says) as refused:
            pull(lake, clock=lambda: NOW, progress=told.append)
        told.append(str(refused.value))
        assert "s3://***@orders/" in told[-1]
    else:
        told.append(repr(pull(lake, clock=lambda: NOW, progress=told.append)))
    told.extend(map(repr, _source(lake.settings)))
    assert not re.search(r"CANARY(KEY|.{1,3}SECRET)|SECRET|endpoint", "\n".join(told)), told


# --- Shopify ---------------------------------------------------------------------------------------------------------


def exported(path: Path, *orders: dict[str, str]) -> None:
    """An export: the columns of an order stand in its first row only, a further item has a row with name and address."""
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, SHOPIFY, restval="")
        writer.writeheader()
        for item in orders:
            writer.writerow({"Email": "ann@example.com", "Financial Status": "paid", "Currency": "EUR", "Lineitem name": "Tea", **item})
            writer.writerow({"Name": item["Name"], "Email": item.get("Email", "ann@example.com"), "Lineitem name": "Cup, large"})


def test_the_shopify_example_reads_the_export_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("RETENTION_OPS_ID_KEY", "0123456789abcdef" * 4)
    write_example("shopify", tmp_path)
    first, second = tmp_path / "exports" / "2026-02.csv", tmp_path / "exports" / "2026-03.csv"
    exported(
        first,
        {"Name": "#1001", "Total": "25.50", "Created at": "2026-02-20 23:30:00 -0500", "Refunded Amount": "0.00",
         "Notes": 'said "yes",\ntwice'},
        {"Name": "#1002", "Total": "10.00", "Created at": "2026-02-21 10:00:00 -0500", "Email": "Ann@Example.com "},
        {"Name": "#1003", "Total": "10.00", "Created at": "2026-02-22 10:00:00 -0500", "Payment Method": "(for testing) Bogus Gateway"},
        {"Name": "#1004", "Total": "10.00", "Created at": "2026-02-23 10:00:00 -0500", "Cancelled at": "2026-02-23 12:00:00 -0500"},
        {"Name": "#1005", "Total": "10.00", "Created at": "2026-02-24 10:00:00 -0500", "Email": ""},
        {"Name": "#1007", "Total": "8.00", "Created at": "2026-02-25 10:00:00 -0500", "Financial Status": "refunded",
         "Refunded Amount": "8.00"},
        {"Name": "#1006", "Total": "10.00", "Created at": "2026-02-25 10:00:00 -0500", "Financial Status": "pending"},
    )
    exported(second, {"Name": "#1002", "Total": "12.00", "Created at": "2026-02-21 10:00:00 -0500"})  # edited since, exported again
    env = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines() if line.startswith("RETENTION"))
    settings = {name.removeprefix("RETENTION_OPS_").lower(): value for name, value in env.items()}
    lake = Lake(settings_for(tmp_path / "home", **settings | {
        "source_sql": tmp_path / "sql/sources/orders.sql", "source_path": str(tmp_path / "exports")}))
    report = pull(lake, clock=lambda: NOW)
    kept = {row[0]: row[1:4] for row in read(lake.orders().path)}
    assert {name: row[1:] for name, row in kept.items()} == {"#1001": (date(2026, 2, 21), 2550), "#1002": (date(2026, 2, 21), 1200),
                                                              "#1007": (date(2026, 2, 25), 800)}
    assert [(row[1], row[4]) for row in read(lake.orders().refunds_path)] == [("#1007", 800)]
    assert kept["#1001"][0] == kept["#1002"][0], "the same address, however it is written, is one customer"
    assert kept["#1001"][0].startswith("h_"), "kept as a keyed hash"
    assert report.excluded == {"test order": 1, "status cancelled": 1, "status pending": 1}


def test_the_shopify_examples_hint_leaves_out_every_row_of_a_b2b_order(tmp_path, monkeypatch):
    """The tags, too, stand in an order's first row only."""
    monkeypatch.setenv("RETENTION_OPS_ID_KEY", "0123456789abcdef" * 4)
    write_example("shopify", tmp_path)
    select = tmp_path / "sql/sources/orders.sql"
    exported(tmp_path / "exports" / "a.csv", *(
        {"Name": name, "Total": "25.50", "Created at": "2026-02-20 10:00:00 -0500", "Tags": tags}
        for name, tags in (("#1001", ""), ("#1002", "vip, Wholesale"), ("#1003", "vip"))))
    assert taken(shop(tmp_path, str(tmp_path / "exports"), select.read_text())) == ["#1001", "#1002", "#1003"]
    (tmp_path / "b2b").mkdir()
    hinted = select.read_text().replace("-- B2B: ", "")
    assert hinted != select.read_text()
    assert taken(shop(tmp_path / "b2b", str(tmp_path / "exports"), hinted)) == ["#1001", "#1003"]
