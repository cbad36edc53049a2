"""Orders that are in somebody's BigQuery tables, with Google's own client against the loopback server."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from google.cloud import bigquery

from retention_ops.errors import InputRefused, SourceError, WarehouseError
from retention_ops.sources.check import check_source
from retention_ops.sources.pull import pull
from retention_ops.warehouse.dialect import parquet_scan
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.conftest import settings_for
from retention_ops_tests.warehouse.bigquery_server import BigQueryServer
from retention_ops_tests.warehouse.engines import addressed, client_of, on_bigquery

SOURCE_COLUMNS = {
    "id": "INT64", "customer": "STRING", "placed": "TIMESTAMP", "total": "FLOAT64", "status": "STRING", "updated": "TIMESTAMP",
}
SOURCE_SELECT = ("SELECT id AS order_id, customer AS customer_id, placed AS ordered_at, total AS order_amount, 'EUR' AS currency, status, "
                 "FALSE AS is_test, updated AS updated_at\nFROM `shop-project.sales.orders`;")
MORNING = datetime(2026, 3, 2, 6, 0, tzinfo=UTC)


@pytest.fixture
def server():
    with BigQueryServer() as running:
        yield running


def source_rows() -> list[tuple]:
    """600 orders, one every 3 hours until this morning; each seventh was cancelled."""
    moments = [MORNING - timedelta(hours=3 * number) for number in range(600)]
    return [(number, f"c{number % 50}", at, 10 + number / 100, "cancelled" if number % 7 == 0 else "paid", at)
            for number, at in enumerate(moments)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["bigquery", "lake"])
def test_orders_are_pulled_from_somebody_elses_table_which_is_never_written(server, tmp_path, monkeypatch, engine):
    client = client_of(server)
    monkeypatch.setattr(bigquery, "Client", lambda **where: client)
    server.add_table("sales", "orders", SOURCE_COLUMNS, source_rows())
    (tmp_path / "orders.sql").write_text(SOURCE_SELECT)
    settings = settings_for(tmp_path / "home", **addressed(server) | {"warehouse": engine}, source="bigquery",
                            source_sql=tmp_path / "orders.sql", lookback_days=10)
    warehouse = on_bigquery(server, settings) if engine == "bigquery" else Lake(settings)
    first = pull(warehouse, clock=lambda: MORNING)
    assert (first.full, first.rows_read, first.excluded, first.orders) == (True, 600, {"status cancelled": 86}, 514)
    assert first.complete_because == "life"
    # read back with amounts exact, dates as the shop has them
    paid = {str(number): (customer, at.date(), round(total * 100)) for number, customer, at, total, status, _ in source_rows()
            if status == "paid"}
    assert {row[0]: row[1:4] for row in _orders_of(warehouse)} == paid
    with server.lock:
        server._duck.execute("UPDATE sales.orders SET status = 'cancelled', updated = ? WHERE id = 598", [MORNING])
        server._duck.execute("DELETE FROM sales.orders WHERE id = 9")
        server._duck.execute("UPDATE sales.orders SET placed = ? WHERE id = 8", [MORNING - timedelta(days=60)])
    second = pull(warehouse, clock=lambda: MORNING)
    assert second.corrections == {"date_changed": 1, "withdrawn": 1, "vanished": 1} and second.rows_read < 120
    assert check_source(warehouse, clock=lambda: MORNING, everything=True).off == []
    written = [request for request in server.requests if request.method != "GET" and "/sales/" in request.path]
    assert written == []


def _orders_of(warehouse) -> list[tuple]:
    with warehouse.connection() as connection:
        return connection.execute(f"SELECT * FROM {parquet_scan(warehouse.orders().path)}").fetchall()


@pytest.mark.parametrize(("find", "put", "error", "says"), [
    ("id AS order_id", "id AS oder_id", InputRefused, "order_id is missing .nearest present: 'oder_id'"),
    ("FROM", "FRM", WarehouseError, "Syntax error"),
    ("sales.orders", "sales.nothing", WarehouseError, "Not found"),
    ("total AS", "CAST(customer AS FLOAT64) AS", SourceError, "(?s)job retention_ops-read-source-.* failed on a row's value"),
    ("'EUR'", "'euros'", InputRefused, "orders.sql record 1: currency is not a currency code"),
])
def test_a_select_that_bigquery_or_the_rules_refuse_writes_nothing(server, tmp_path, find, put, error, says):
    server.add_table("sales", "orders", SOURCE_COLUMNS, source_rows()[:20])
    (tmp_path / "orders.sql").write_text(SOURCE_SELECT.replace(find, put, 1))
    settings = settings_for(tmp_path / "home", **addressed(server), source="bigquery", source_sql=tmp_path / "orders.sql")
    warehouse = on_bigquery(server, settings)
    with pytest.raises(error, match=says) as refused:
        pull(warehouse, clock=lambda: MORNING)
    assert not re.search(r"\bc1\b", str(refused.value)), "as a word: a job id may hold its letters"
    assert warehouse.orders() is None


def test_a_lost_page_of_the_source_is_asked_for_again(server, tmp_path):
    server.add_table("sales", "orders", SOURCE_COLUMNS, source_rows())
    (tmp_path / "orders.sql").write_text(SOURCE_SELECT)
    warehouse = on_bigquery(server, settings_for(tmp_path / "home", **addressed(server), source="bigquery",
                                                 source_sql=tmp_path / "orders.sql"))
    server.lost_every(3, "GET .*/queries/")
    assert pull(warehouse, clock=lambda: MORNING).orders == 514 and warehouse.pauses
