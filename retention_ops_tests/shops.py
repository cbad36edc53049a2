"""Tiny shops for tests: order frames small enough to reason about, and a way to load one into a lake of its own.

An order frame has order_id, customer_id, order_date (date), order_cents, currency and, from `with_refunds`, refunds. The demo's
big synthetic shop is another thing and lives in retention_ops/sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import pandas as pd

from retention_ops.settings import Settings
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.dialect import literal
from retention_ops.warehouse.lake import Lake

COLUMNS = ["order_id", "customer_id", "order_date", "order_cents", "currency"]
FIRST_DAY = date(2023, 10, 21)  # 220 days from here reach over a leap day
DAYS = 220


def orders_frame(rows: Iterable[Sequence[Any]], currency: str = "EUR") -> pd.DataFrame:
    """Orders from rows of (customer_id, order_date, cents) or (customer_id, order_date, cents, order_id)."""
    full = [(*row, f"o{number:05d}") if len(row) == 3 else tuple(row) for number, row in enumerate(rows)]
    return pd.DataFrame([(order, customer, day, cents, currency) for customer, day, cents, order in full],
                        columns=COLUMNS, dtype=object)


def with_refunds(orders: pd.DataFrame, refunds: Mapping[str, Sequence[tuple[date, int]]]) -> pd.DataFrame:
    """The orders with column `refunds`: (refund_date, cents) by order_id."""
    return orders.assign(refunds=[list(refunds.get(order, ())) for order in orders["order_id"]])


def refunded_shop(orders: pd.DataFrame, d: date, seed: int) -> pd.DataFrame:
    """The orders with refunds on most of them, as of D worth what they were without.

    A refund by D is of what was added to its order, so whoever stood on a line on D still does. Others come after D: some the day
    after, some of all that is left.
    """
    random = Random(seed)
    cents, refunds = [], {}
    for order, day, amount in zip(orders["order_id"], orders["order_date"], orders["order_cents"], strict=True):
        found = {}
        if day <= d and random.random() < 0.6:
            for _ in range(random.choice([1, 1, 2])):
                back = min(d, day + timedelta(random.choice([0, 0, 1, 5, 40, 200])))
                found[back] = found.get(back, 0) + random.choice([1, amount, 3 * amount, random.randint(1, 9000)])
        cents.append(amount + sum(found.values()))
        if random.random() < 0.3:
            back = max(day, d) + timedelta(random.choice([1, 1, 2, 9, 30]))
            found[back] = random.choice([amount, max(1, amount // 2), 1])
        refunds[order] = sorted(found.items())
    return with_refunds(orders.assign(order_cents=pd.Series(cents, dtype=object)), refunds)


def lake_with(orders: pd.DataFrame, home: Path, complete_through: date | None = None, *,
              customers: pd.DataFrame | None = None, **settings_overrides: Any) -> Lake:
    """A lake in `home` that holds `orders`, loaded through the front door; its settings are `lake.settings`."""
    settings = Settings(_env_file=None, home=home, **settings_overrides)
    home.mkdir(parents=True, exist_ok=True)
    ingest([_orders_csv(orders, home / "orders.csv")], "orders", settings, complete_through=complete_through)
    if "refunds" in orders and any(orders["refunds"]):
        ingest([_refunds_csv(orders, home / "refunds.csv")], "refunds", settings)
    if customers is not None:
        path = home / "customers.csv"
        customers.to_csv(path, index=False)
        ingest([path], "customers", settings)
    return Lake(settings)


def _orders_csv(orders: pd.DataFrame, path: Path) -> Path:
    """Writes `orders` as a shop would export them: amounts in currency units with two places."""
    amounts = [f"{cents // 100}.{cents % 100:02d}" for cents in orders["order_cents"]]
    orders[["order_id", "customer_id", "order_date"]].assign(order_amount=amounts).to_csv(path, index=False)
    return path


def _refunds_csv(orders: pd.DataFrame, path: Path) -> Path:
    lines = [f"{order},{day},{cents // 100}.{cents % 100:02d}" for order, refunds in zip(orders["order_id"], orders["refunds"], strict=True)
             for day, cents in refunds]
    path.write_text("\n".join(["order_id,refund_date,refund_amount", *lines]) + "\n")
    return path


def small_shop(seed: int = 7) -> pd.DataFrame:
    """About 60 customers over 220 days; a cohort won around day 130 never returns, so AT_RISK % climbs from day 161.

    Order ids are in no order of time and not padded, so only their order as strings decides the latest of two on one day.
    """
    random = Random(seed)
    visits = [visit for number in range(52) for visit in _loyal(f"c{number}", random)]
    visits += [(f"promo{number}", FIRST_DAY + timedelta(129 + number % 4), 900 + 50 * number) for number in range(9)]
    ids = random.sample(range(10_000), len(visits))
    return orders_frame((*visit, f"o{number}") for visit, number in zip(visits, ids, strict=True))


def _loyal(customer: str, random: Random) -> list[tuple[str, date, int]]:
    """One customer's visits: an own cadence, sometimes a pause for ever, sometimes two invoices on a day."""
    cadence = random.choice([4, 7, 12, 20, 30, 45, 70])
    day, until = random.randrange(60), random.choice([60, 100, DAYS, DAYS, DAYS])
    usual = random.choice([1500, 4000, 9000, 40000])
    visits = []
    while day < until:
        for _ in range(random.choice([1, 1, 1, 1, 2])):
            visits.append((customer, FIRST_DAY + timedelta(day), max(1, int(usual * random.choice([0.4, 0.6, 1, 1, 1.3])))))
        day += max(1, round(random.gauss(cadence, cadence / 4)))
    return visits


def seasonal_shop(seed: int = 3, days: int = 640, customers: int = 40) -> pd.DataFrame:
    """Customers over more than a year whose gaps are longer in winter: long enough to know last year's season."""
    random = Random(seed)
    rows = []
    for number in range(customers):
        cadence, usual = random.choice([3, 8, 15, 25, 40, 70]), random.choice([1500, 4000, 9000, 40000])
        day, until = random.randrange(200), random.choice([250, days, days, days])
        while day < until:
            rows.append((f"s{number}", FIRST_DAY + timedelta(day), max(1, int(usual * random.choice([0.4, 0.6, 1, 1, 1.3])))))
            winter = (FIRST_DAY + timedelta(day)).month in (12, 1, 2)
            day += max(1, round(random.gauss(cadence * (2 if winter else 1), cadence / 4)))
    return orders_frame(rows)


def shop_with_at_risk_counts(counts: Sequence[int], customers: int, d: date, active_days: int = 30,
                             history: int = 200) -> pd.DataFrame:
    """`customers` customers of whom counts[i] are AT_RISK on the i-th of len(counts) days ending at D, nobody INACTIVE.

    All ordered `history` days before D, so each day's sample is `customers`. Where a count rises, customers go quiet;
    where it falls, quiet ones order again.
    """
    start = d - timedelta(len(counts) - 1)
    quiet = [f"k{number}" for number in range(counts[0])]
    awake = [f"k{number}" for number in range(counts[0], customers)]
    rows = [(customer, d - timedelta(history), 1000) for customer in quiet + awake]
    rows += [(customer, start - timedelta(active_days + 5), 1000) for customer in quiet]
    for step in range(1, len(counts)):
        day, change = start + timedelta(step), counts[step] - counts[step - 1]
        quieter, back = [awake.pop() for _ in range(change)], [quiet.pop(0) for _ in range(-change)]
        rows += [(customer, day - timedelta(active_days + 1), 1000) for customer in quieter]
        rows += [(customer, day, 1000) for customer in back]
        quiet += quieter
    rows += [(customer, start - timedelta(active_days - len(counts)), 1000) for customer in awake]
    return orders_frame(rows)


def uci_orders(path: Path) -> pd.DataFrame:
    """The orders of one Online Retail file, read naively: an invoice is an order, dated by its earliest line.

    Kept are lines with a customer, an invoice not starting with C, and a positive quantity and price; the value is the sum
    of quantity x price rounded once, half up, to cents.
    """
    lines = pd.read_parquet(path).rename(columns={"Invoice": "InvoiceNo", "Price": "UnitPrice", "Customer ID": "CustomerID"})
    kept = lines[lines["CustomerID"].notna() & ~lines["InvoiceNo"].str.startswith("C")
                 & (lines["Quantity"] > 0) & (lines["UnitPrice"] > 0)]
    worth: dict[str, Decimal] = {}
    for invoice, quantity, price in zip(kept["InvoiceNo"], kept["Quantity"], kept["UnitPrice"], strict=True):
        worth[invoice] = worth.get(invoice, Decimal(0)) + quantity * Decimal(str(price))
    heads = kept.sort_values("InvoiceDate", kind="stable").drop_duplicates("InvoiceNo")
    rows = zip(heads["CustomerID"], heads["InvoiceDate"], heads["InvoiceNo"], strict=True)
    return orders_frame(((customer, moment.date(), _cents(worth[invoice]), invoice) for customer, moment, invoice in rows),
                        currency="GBP")


def _cents(amount: Decimal) -> int:
    return int((amount * 100).quantize(Decimal(1), ROUND_HALF_UP))


def write_big_shop(path: Path, customers: int) -> None:
    """Three years to 2025-12-31, some 15 orders a customer, as parquet: made inside DuckDB, the same every time.

    Amounts are round parts of a customer's usual basket and rhythms are whole days, so many customers stand exactly on a
    line; two orders on a day are common. Six cohorts that never return let AT_RISK % jump: days of WARNING and of CRITICAL.
    """
    with duckdb.connect() as connection:
        connection.execute("CREATE MACRO chance(x) AS CAST(hash(x) >> 8 AS BIGINT)")
        connection.execute(f"""
            COPY (
              WITH people AS (
                SELECT i, chance(7 * i + 1) % 1096 AS start,
                  [3, 5, 7, 10, 14, 21, 30, 30, 45, 60, 75, 90][1 + chance(7 * i + 2) % 12] AS cadence,
                  [20, 60, 120, 240, 400, 700, 1096, 1096, 1096][1 + chance(7 * i + 3) % 9] AS life,
                  [1500, 3000, 5000, 9000, 25000][1 + chance(7 * i + 4) % 5] AS usual
                FROM range({customers}) AS numbers(i)
              ),
              visits AS (
                SELECT people.*, k, start + k * cadence + chance(1000 * i + k) % greatest(1, cadence // 3) AS day
                FROM people, unnest(range(0, least(60, 1 + life // cadence))) AS steps(k)
              ),
              invoices AS (
                SELECT visits.*, n
                FROM visits, unnest(range(0, CASE WHEN chance(1000 * i + k + 5) % 12 = 0 THEN 2 ELSE 1 END)) AS copies(n)
                WHERE day <= least(1095, start + life)
              ),
              cohorts(number, day, share) AS (
                VALUES (1, 500, 0.05), (2, 620, 0.09), (3, 700, 0.06), (4, 830, 0.10), (5, 1000, 0.07), (6, 1040, 0.11)
              )
              SELECT 'o' || chance(100000 * i + 10 * k + n) || '-' || i AS order_id, 'c' || i AS customer_id,
                DATE '2023-01-01' + CAST(day AS INT) AS order_date,
                round(usual * [0.3, 0.6, 0.6, 0.8, 1, 1, 1, 1.2, 1.5, 2][1 + chance(1000 * i + 2 * k + n + 9) % 10]) / 100 AS order_amount
              FROM invoices
              UNION ALL
              SELECT 'p' || number || '-' || j, 'p' || number || '-' || j, DATE '2023-01-01' + CAST(day AS INT), 40.0
              FROM cohorts, unnest(range(0, CAST({customers} * share * 0.7 AS BIGINT))) AS members(j)
            ) TO {literal(path)} (FORMAT parquet)""")
