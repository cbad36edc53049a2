"""Refunds beside the orders: those that hold after an ingest or a pull, what changed, and where they do not fit their orders.

A refund is known by its order and its date; what is paid back of one order on one day is one refund. Everything here is SQL over tables
of a connection, and nothing here writes a version:

    known           the orders before                      known_refunds   order_id, refund_date, refund_cents before
    new_orders      the orders that will hold              new_refunds     the same that will hold
    staged          what came in                           refund_delta    both, with known_cents and `change`
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

import duckdb

from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.dialect import no_rows, parquet_scan
from retention_ops.warehouse.versions import OrdersVersion

NO_ORDER = "is of no order that is known here"
TOO_EARLY = "is before the date of its order"
TOO_MUCH = "makes the refunds of its order exceed the order"
IN_CENTS = "CAST(round(coalesce(refund_amount, 0), 2) * 100 AS BIGINT)"


@dataclass(frozen=True)
class Cumulative:
    """A source says of each order how much of it was refunded so far; what is more than before is a refund of the day it is first seen.

    That is the date of updated_at where the SELECT has it, else yesterday (`today` is the shop's); on the `first` pull, of which nobody
    can tell when it was, else the order's own date. Never before the order's date.
    """

    today: date
    first: bool


@dataclass(frozen=True)
class Changes:
    """What became of refunds; `left` is how many there are now, `stale_from` the earliest date of one that is not as before."""

    added: int
    replaced: int
    removed: int
    unchanged: int
    left: int
    stale_from: date | None

    @property
    def any(self) -> bool:
        return bool(self.added or self.replaced or self.removed)


def know(con: duckdb.DuckDBPyConnection, parent: OrdersVersion | None) -> None:
    """View `known_refunds`: those of the version before."""
    rows = parquet_scan(parent.refunds_path) if parent and parent.refunds else f"({no_rows(TABLES['refunds'])})"
    con.execute(f"CREATE VIEW known_refunds AS SELECT order_id, refund_date, refund_cents FROM {rows}")


def keep(con: duckdb.DuckDBPyConnection) -> None:
    """Table `new_refunds` where only orders came in: a refund goes with its order and otherwise stays."""
    con.execute("CREATE TABLE new_refunds AS SELECT * FROM known_refunds WHERE order_id NOT IN "
                "(SELECT order_id FROM delta WHERE change = 'removed')")


def follow(con: duckdb.DuckDBPyConnection, source: Cumulative) -> None:
    """Table `new_refunds` where `staged` says how much of each of its orders was refunded so far; those of other orders are kept.

    Of less than before the newest refunds are taken back first. Where an order moved past its refund, the refund moves with it.
    """
    # a wrong clock's updated_at of next year means today
    seen = f"CASE WHEN updated_on > DATE '{source.today}' THEN DATE '{source.today}' ELSE updated_on END"
    otherwise = "order_date" if source.first else f"DATE '{source.today - timedelta(days=1)}'"
    con.execute(f"""
        CREATE TABLE new_refunds AS
        WITH said AS (SELECT order_id, order_date, updated_on, {IN_CENTS} AS refunded FROM staged WHERE order_cents > 0),
             before AS (SELECT order_id, refund_date, refund_cents, coalesce(sum(refund_cents) OVER earlier, 0) AS earlier_cents
                        FROM known_refunds WINDOW earlier AS (PARTITION BY order_id ORDER BY refund_date
                                                              ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)),
             kept AS (SELECT order_id, greatest(refund_date, order_date) AS refund_date,
                             least(refund_cents, greatest(0, refunded - earlier_cents)) AS refund_cents
                      FROM before JOIN said USING (order_id)),
             more AS (SELECT order_id, greatest(order_date, coalesce({seen}, {otherwise})) AS refund_date,
                             refunded - coalesce(refunded_before, 0) AS refund_cents
                      FROM said LEFT JOIN (SELECT order_id, sum(refund_cents) AS refunded_before FROM known_refunds GROUP BY 1)
                           USING (order_id))
        SELECT order_id, refund_date, CAST(sum(refund_cents) AS BIGINT) AS refund_cents
        FROM (FROM kept UNION ALL BY NAME FROM more) WHERE refund_cents > 0 GROUP BY 1, 2
        UNION ALL
        SELECT order_id, refund_date, refund_cents FROM known_refunds WHERE order_id NOT IN (SELECT order_id FROM said)
          AND order_id NOT IN (SELECT order_id FROM delta WHERE change = 'removed')""")


def take(con: duckdb.DuckDBPyConnection) -> None:
    """Table `new_refunds` where refunds came in: what they say of an order and date holds, and nothing means none."""
    con.execute("""
        CREATE TABLE new_refunds AS
        SELECT order_id, refund_date, refund_cents FROM known_refunds ANTI JOIN staged USING (order_id, refund_date)
        UNION ALL SELECT order_id, refund_date, refund_cents FROM staged WHERE refund_cents > 0""")


def compare(con: duckdb.DuckDBPyConnection) -> Changes:
    """Table `refund_delta`: refunds before and after, each with its `change`: added, replaced, removed or unchanged."""
    con.execute("""
        CREATE TABLE refund_delta AS
        SELECT order_id, refund_date, coalesce(n.refund_cents, 0) AS refund_cents, coalesce(k.refund_cents, 0) AS known_cents,
          CASE WHEN k.refund_cents IS NULL THEN 'added' WHEN n.refund_cents IS NULL THEN 'removed'
               WHEN k.refund_cents <> n.refund_cents THEN 'replaced' ELSE 'unchanged' END AS change
        FROM new_refunds n FULL JOIN known_refunds k USING (order_id, refund_date)""")
    kinds = ("added", "replaced", "removed", "unchanged")
    counts = ", ".join(f"count(*) FILTER (change = '{kind}')" for kind in kinds)
    *found, left, first = con.execute(
        f"SELECT {counts}, count(*) FILTER (change <> 'removed'), min(refund_date) FILTER (change <> 'unchanged') FROM refund_delta"
    ).fetchone()
    return Changes(*found, left=left, stale_from=first)


def rows(orders: str) -> str:
    """SQL for table refunds as it is kept: `new_refunds` with what their orders (`orders`, SQL for a relation) say of them."""
    return f"""
        WITH refunded AS (SELECT DISTINCT customer_id FROM {orders} SEMI JOIN new_refunds USING (order_id)),
             placed AS (SELECT order_id, customer_id, order_date,
                               order_id = max(order_id) OVER (PARTITION BY customer_id, order_date) AS is_last
                        FROM {orders} SEMI JOIN refunded USING (customer_id))
        SELECT customer_id, order_id, order_date, refund_date, refund_cents, is_last FROM new_refunds JOIN placed USING (order_id)"""


# --- what does not fit ----------------------------------------------------------------------------------------------

_TOTALS = ("SELECT order_id, order_cents, order_date, total_cents, first_refund FROM (SELECT order_id, sum(refund_cents) AS total_cents, "
           "min(refund_date) AS first_refund FROM new_refunds GROUP BY 1) JOIN new_orders USING (order_id)")
Fault = tuple[str, str, str]
"""(SQL for source, record and value of each record at fault, field, rule)"""


def faults_of_refunds() -> list[Fault]:
    """Where `staged` holds refunds."""
    return [
        ("SELECT source, record, order_id FROM staged ANTI JOIN new_orders USING (order_id)", "order_id", NO_ORDER),
        ("SELECT source, record, CAST(refund_date AS VARCHAR) FROM staged JOIN new_orders USING (order_id) WHERE refund_date < order_date",
         "refund_date", TOO_EARLY),
        (f"SELECT source, record, order_id FROM staged JOIN ({_TOTALS}) USING (order_id) WHERE total_cents > order_cents",
         "refund_amount", TOO_MUCH),
    ]


def faults_of_changes() -> list[Fault]:
    """Where known refunds are already others, for who does not replace them."""
    sql = ("SELECT source, record, order_id FROM staged JOIN known_refunds k USING (order_id, refund_date) "
           "WHERE staged.refund_cents <> k.refund_cents")
    return [(sql, "refund_amount", "is not the amount that is already known of this order and date")]


def faults_of_orders(amount: str, day: str, source: Cumulative | None) -> list[Fault]:
    """Where `staged` holds orders, whose amount and date are in the fields of these names."""
    matched = f"staged JOIN ({_TOTALS}) totals USING (order_id)"
    of_source = (f"SELECT source, record, CAST(refund_amount AS VARCHAR) FROM staged WHERE order_cents > 0 AND {IN_CENTS} > order_cents")
    return [
        (of_source, "refund_amount", "is above order_amount") if source else
        (f"SELECT source, record, order_id FROM {matched} WHERE total_cents > totals.order_cents", amount,
         "is below what was refunded of the order"),
        (f"SELECT source, record, order_id FROM {matched} WHERE first_refund < totals.order_date", day, "is after a refund of the order"),
    ]
