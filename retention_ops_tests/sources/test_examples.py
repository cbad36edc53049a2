"""The examples of sql/sources, as they are and with their hints, where they are meant to run; and the README's way to the first brief."""

from __future__ import annotations

import re
import shlex
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from retention_ops.package.pack import find_pack
from retention_ops.settings import load_settings
from retention_ops.sources.examples import write_example
from retention_ops.sources.identity import Identity
from retention_ops.sources.pull import pull
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.sources import read
from retention_ops_tests.test_cli import cli
from retention_ops_tests.warehouse.bigquery_server import BigQueryServer
from retention_ops_tests.warehouse.engines import on_bigquery

README = Path(__file__).resolve().parents[2] / "README.md"
KEY = "0123456789abcdef" * 4
LAST = date(2026, 7, 1)
NOW = datetime(2026, 7, 2, 6, 0, tzinfo=UTC)
COLUMNS = {  # of the orders that the examples read: BigQuery's type (the loopback server knows no NUMERIC) and Postgres's
    "id": ("STRING", "text"), "customer_id": ("INT64", "bigint"), "email": ("STRING", "text"), "created_at": ("TIMESTAMP", "timestamptz"),
    "total": ("FLOAT64", "numeric(12, 2)"), "currency": ("STRING", "text"), "status": ("STRING", "text"), "is_test": ("BOOL", "boolean"),
    "updated_at": ("TIMESTAMP", "timestamptz"), "channel": ("STRING", "text"),
}
ACCOUNTS = {1: None, 2: 1}
"""customers, and whom they were merged into"""


def an_order(id_: str, customer: int | None, day: date, **more: Any) -> dict[str, Any]:
    at = datetime(day.year, day.month, day.day, 12, tzinfo=UTC)
    return {"id": id_, "customer_id": customer, "email": None, "created_at": at, "total": 20.5, "currency": "EUR", "status": "paid",
            "is_test": False, "updated_at": at, "channel": None, **more}


def shop_orders(last: date) -> list[dict[str, Any]]:
    """Half a year of forty regulars, and one of each kind that somebody has to decide about."""
    day = last - timedelta(11)
    return [
        *(an_order(f"r{who}-{back}", 100 + who, last - timedelta(back)) for who in range(40) for back in range(who % 7, 180, 7 + who)),
        an_order("merged", 2, day), an_order("wholesale", 1, day, channel="wholesale"),
        an_order("guest", None, day, email=" Ann@Example.com "), an_order("guest again", None, day, email="ann@example.com"),
        an_order("nobody", None, day), an_order("no address", None, day, email=" "),
        an_order("test", 1, day, is_test=True), an_order("cancelled", 1, day, status="cancelled"),
    ]


def with_hints(select: str) -> str:
    """The example as somebody leaves it who uncommented every hint but the one of refunds."""
    guest = re.search(r"-- guests, in place of the next line: (.+)\n.+\n", select)
    select = select.replace(guest[0], guest[1].replace("o.customer_id", "COALESCE(c.merged_into, o.customer_id)") + "\n")
    where = re.search(r"WHERE .+\n-- guests, in place of the line before: (.+)\n", select)
    select = select.replace(where[0], where[1] + "\n")
    for hint in ("-- merged accounts: LEFT JOIN", "-- B2B: AND"):
        assert hint in select
        select = select.replace(hint, hint.partition(": ")[2])
    return select


def decided(warehouse: Any) -> dict[str, str]:
    """Whose the orders are that are no regular's."""
    return {row[0]: row[1] for row in read(warehouse.orders().path) if not row[0].startswith("r")}


def check_both_ways(warehouse: Any, select: Path) -> None:
    report = pull(warehouse, clock=lambda: NOW)
    assert report.excluded == {"test order": 1, "status cancelled": 1}
    assert decided(warehouse) == {"merged": "2", "wholesale": "1"}
    select.write_text(with_hints(select.read_text()))
    report = pull(warehouse, clock=lambda: NOW)
    ann = Identity("emails", KEY.encode()).kept("ann@example.com")
    assert ann.startswith("h_") and decided(warehouse) == {"merged": "1", "guest": ann, "guest again": ann}
    assert report.corrections == {"late": 2, "re_owned": 1, "vanished": 1}, "a changed SELECT is read from the beginning"


@pytest.fixture
def shop_url(postgres_url) -> str:
    """The shop's own, empty database."""
    server = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sa.text("DROP DATABASE IF EXISTS example_shop WITH (FORCE)"))
        connection.execute(sa.text("CREATE DATABASE example_shop"))
    server.dispose()
    return sa.make_url(postgres_url).set(drivername="postgresql", database="example_shop").render_as_string(hide_password=False)


def fill(url: str, last: date) -> None:
    """The tables that the example names."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://", 1))
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE TABLE orders ({', '.join(f'{name} {types[1]}' for name, types in COLUMNS.items())})"))
        connection.execute(sa.text(f"INSERT INTO orders VALUES ({', '.join(':' + name for name in COLUMNS)})"), shop_orders(last))
        connection.execute(sa.text("CREATE TABLE customers (id bigint, merged_into bigint)"))
        connection.execute(sa.text("INSERT INTO customers VALUES (:id, :into)"), [{"id": id_, "into": to} for id_, to in ACCOUNTS.items()])
    engine.dispose()


def test_the_postgres_example_on_postgres(shop_url, tmp_path, monkeypatch):
    monkeypatch.setenv("RETENTION_OPS_ID_KEY", KEY)
    monkeypatch.setenv("RETENTION_OPS_SOURCE_URL", shop_url)
    fill(shop_url, LAST)
    write_example("postgres", tmp_path)
    check_both_ways(Lake(load_settings()), tmp_path / "sql/sources/orders.sql")


@pytest.mark.slow
def test_the_bigquery_example_on_bigquery(tmp_path, monkeypatch):
    monkeypatch.setenv("RETENTION_OPS_ID_KEY", KEY)
    write_example("bigquery", tmp_path)
    with BigQueryServer(project="my-project") as server:
        columns = {"order_id" if name == "id" else name: types[0] for name, types in COLUMNS.items()}
        server.add_table("sales", "orders", columns, [tuple(row.values()) for row in shop_orders(LAST)])
        server.add_table("sales", "customers", {"id": "INT64", "merged_into": "INT64"}, list(ACCOUNTS.items()))
        settings = load_settings(warehouse="bigquery", bigquery_dataset=server.dataset)
        check_both_ways(on_bigquery(server, settings), tmp_path / "sql/sources/orders.sql")


def newcomers_lines() -> list[list[str]]:
    """What the README has a newcomer type, word by word."""
    block = README.read_text().partition("from nothing to the first brief:\n\n")[2].partition("\n\n")[0]
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.mark.slow
def test_the_readme_leads_from_nothing_to_the_first_brief_in_less_than_ten_lines(shop_url, tmp_path, monkeypatch):
    """Except for its date: the check before it looks at the newest week, so the shop sells until now, and yesterday is computed."""
    lines, today = newcomers_lines(), datetime.now(UTC).date()
    fill(shop_url, today)
    assert 5 <= len(lines) < 10 and lines[-1][:3] == ["retention-ops", "run", "--date"]
    lines[-1][-1] = str(today - timedelta(1))
    for program, *words in lines:
        match program:
            case "retention-ops":
                done = cli(*words, home=Path(".retention_ops"))
                assert done.returncode == 0, (words, done.stderr, done.stdout)
            case "$EDITOR":  # the shop has the tables and the currency of the example
                assert words == ["sql/sources/orders.sql", ".env"] and (tmp_path / words[0]).is_file()
                settings = (tmp_path / words[1]).read_text()
                assert "\nRETENTION_OPS_OWNER=\n" in settings
                (tmp_path / words[1]).write_text(settings.replace("OWNER=", "OWNER=Ada"))
            case "export":
                (name, given), = (word.split("=", 1) for word in words)
                assert given.startswith("postgresql://")
                monkeypatch.setenv(name, shop_url)
            case _:
                raise AssertionError(f"no shell would know {program}")
    pack = find_pack(load_settings(), today - timedelta(1))
    assert "Your shop" in (pack.folder / "briefing.html").read_text()
