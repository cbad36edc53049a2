"""Somebody else's shop, for tests of pulls: rows that a test changes as it likes, kept in Postgres or in files, and what they mean.

`meaning` is the naive oracle: it knows nothing of how a pull works.
"""

from __future__ import annotations

import csv
import random
from dataclasses import astuple, dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from retention_ops.settings import Settings
from retention_ops.sources.pull import PullReport, pull
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.sources import read

NOW = datetime(2026, 3, 2, 11, 0, tzinfo=UTC)  # a Monday, 06:00 in New York
ZONE = ZoneInfo("America/New_York")
COLUMNS = ("id", "customer", "placed", "total", "currency", "status", "is_test", "updated")
SELECT = ("SELECT id AS order_id, customer AS customer_id, placed AS ordered_at, total AS order_amount, currency, status, is_test{more}\n"
          "FROM {table} -- 100 % of them;\n")

Order = tuple[str, date, int]
"""customer, date, cents"""


@dataclass(frozen=True)
class Row:
    """One order as the shop's own database has it."""

    customer: str | None
    at: datetime | None
    total: str | None = "10.00"
    currency: str | None = "USD"
    status: str | None = "paid"
    is_test: bool | None = False
    updated: datetime | None = None


def moment(day: date, hour: int = 12) -> datetime:
    """That hour of the day in the shop."""
    return datetime.combine(day, time(hour), ZONE).astimezone(UTC)


class Shop:
    """Rows by id, an installation that pulls them, and a clock. `kind`: postgres, csv or parquet."""

    def __init__(self, kind: str, folder: Path, url: str = "", updated_at: bool = False, **settings: Any):
        self.kind, self.folder, self.now = kind, folder, NOW
        self.rows: dict[str, Row] = {}
        self.sql = folder / "orders.sql"
        folder.mkdir(parents=True, exist_ok=True)
        self.write_select(SELECT.format(
            table="shop_orders" if kind == "postgres" else "source_files", more=", updated AS updated_at" if updated_at else ""))
        where = {"source": "postgres"} if kind == "postgres" else {"source": "files", "source_path": str(folder / "exports")}
        self.settings = Settings(
            _env_file=None, home=folder / "home", source_sql=self.sql,
            **{"shop_timezone": "America/New_York", "lookback_days": 10, **where, **settings})
        self.lake = Lake(self.settings)
        self._engine = sa.create_engine(url) if kind == "postgres" else None
        self.progress: list[str] = []
        self.known: set[str] = set()
        """ids of our orders at the last pull"""

    def write_select(self, text: str) -> None:
        self.sql.write_text(text)

    @property
    def today(self) -> date:
        return self.now.astimezone(ZONE).date()

    def day(self, ago: int) -> date:
        return self.today - timedelta(days=ago)

    def put(self, id_: str, customer: str | None = "c1", ago: int = 1, hour: int = 12, **more: Any) -> None:
        """An order of `ago` days before today."""
        self.rows[id_] = Row(customer, moment(self.day(ago), hour), **{"updated": self.now, **more})

    def change(self, id_: str, **what: Any) -> None:
        self.rows[id_] = replace(self.rows[id_], updated=self.now, **what)

    def pull(self, **options: Any) -> PullReport:
        self.save()
        report = pull(self.lake, clock=lambda: self.now, progress=self.progress.append, **options)
        self.known = set(self.ours())
        return report

    def ours(self) -> dict[str, Order]:
        version = self.lake.orders()
        return {row[0]: (row[1], row[2], row[3]) for row in read(version.path)} if version else {}

    def meaning(self) -> dict[str, Order]:
        """What our orders must be: by the words of the contract, order by order."""
        return {
            id_: (row.customer, row.at.astimezone(ZONE).date(), int(Decimal(row.total) * 100)) for id_, row in self.rows.items()
            if row.status.lower() in self.settings.counted_statuses and not row.is_test and Decimal(row.total) > 0
        }

    # -- where the rows are ----------------------------------------------------------------------------------------

    def save(self) -> None:
        """The rows as they are now, where the source is read."""
        rows = [(id_, *astuple(row)) for id_, row in self.rows.items()]
        if self.kind == "postgres":
            with self._engine.begin() as connection:
                connection.execute(sa.text("DROP TABLE IF EXISTS shop_orders"))
                connection.execute(sa.text("CREATE TABLE shop_orders (id TEXT, customer TEXT, placed TIMESTAMPTZ, total NUMERIC(12, 2), "
                                           "currency TEXT, status TEXT, is_test BOOLEAN, updated TIMESTAMPTZ)"))
                if rows:
                    connection.execute(sa.text(f"INSERT INTO shop_orders VALUES ({', '.join(':' + name for name in COLUMNS)})"),
                                       [dict(zip(COLUMNS, row, strict=True)) for row in rows])
            return
        exports = self.folder / "exports"
        exports.mkdir(exist_ok=True)
        half = len(rows) // 2
        for name, part in (("a", rows[:half]), ("b", rows[half:])):
            if self.kind == "csv":
                with (exports / f"{name}.csv").open("w", newline="") as handle:
                    csv.writer(handle).writerows([COLUMNS, *(["" if value is None else value for value in row] for row in part)])
            else:
                types = {"placed": pa.timestamp("us", tz="UTC"), "updated": pa.timestamp("us", tz="UTC"), "is_test": pa.bool_()}
                pq.write_table(pa.table({
                    name: pa.array([row[place] for row in part], types.get(name, pa.string())) for place, name in enumerate(COLUMNS)
                }), exports / f"{name}.parquet")

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()


def open_shop(kind: str, folder: Path, request: pytest.FixtureRequest, **options: Any) -> Shop:
    """A shop of that kind; for Postgres the environment gets the source's address."""
    if kind != "postgres":
        return Shop(kind, folder, **options)
    url = request.getfixturevalue("postgres_url")
    request.getfixturevalue("monkeypatch").setenv("RETENTION_OPS_SOURCE_URL", url.replace("postgresql+psycopg://", "postgresql://", 1))
    return Shop(kind, folder, url, **options)


# --- a shop that lives ----------------------------------------------------------------------------------------------


def live_a_day(shop: Shop, chance: random.Random, sees_old: bool) -> None:
    """A night passes: orders come, some late, and known ones change in every way; with `sees_old` also old ones."""
    shop.now += timedelta(days=1)
    number = len(shop.rows)
    for place in range(chance.randint(1, 4)):
        shop.put(f"o{number + place:04d}-{chance.randrange(1000)}", f"c{chance.randrange(9)}", 1, chance.choice([0, 9, 23]),
                 total=f"{chance.randrange(1, 9999) / 100:.2f}")
    if chance.random() < 0.8:  # early this morning
        shop.put(f"e{number:04d}", f"c{chance.randrange(9)}", 0, 1)
    if chance.random() < 0.4:
        shop.put(f"l{number:04d}", f"c{chance.randrange(9)}", chance.randint(2, 9))
    oldest = moment(shop.day(shop.settings.lookback_days - 1), 0)
    recent = [id_ for id_, row in shop.rows.items() if row.at >= oldest]
    for id_ in chance.sample(recent, min(len(recent), chance.randrange(4))):
        # an order that is first heard of with a date long ago is seen by its updated_at only
        _befall(shop, chance, id_, "gone", *["long ago"] * (sees_old or id_ in shop.known))
    if sees_old and chance.random() < 0.5:
        _befall(shop, chance, chance.choice(list(shop.rows)), "long ago")


def _befall(shop: Shop, chance: random.Random, id_: str, *more: str) -> None:
    kind = chance.choice(["amount", "customer", "cancelled", "paid", "test", "nothing", "date", *more])
    match kind:
        case "amount":
            shop.change(id_, total=f"{chance.choice([0, 0.01, 12.5, -3]):.2f}")
        case "customer":
            shop.change(id_, customer=f"c{chance.randrange(9)}")
        case "cancelled" | "paid":
            shop.change(id_, status=kind)
        case "test":
            shop.change(id_, is_test=not shop.rows[id_].is_test)
        case "date":
            shop.change(id_, at=moment(shop.day(chance.randrange(1, 9)), 15))
        case "long ago":
            shop.change(id_, at=moment(shop.day(chance.randrange(20, 60))))
        case "gone":
            del shop.rows[id_]


def corrections(before: dict[str, Order], after: dict[str, Order], there: set[str], complete: date) -> dict[str, int]:
    """What a pull must report, by comparing the two states order by order; `there` are the ids in the source."""
    counts = dict.fromkeys(("new", "late", "amount_changed", "date_changed", "re_owned", "withdrawn", "vanished"), 0)
    for id_ in before.keys() | after.keys():
        match before.get(id_), after.get(id_):
            case None, (_, day, _):
                counts["new" if day > complete else "late"] += 1
            case _, None:
                counts["withdrawn" if id_ in there else "vanished"] += 1
            case (customer, day, cents), (new_customer, new_day, new_cents):
                counts["re_owned"] += customer != new_customer
                counts["date_changed"] += day != new_day
                counts["amount_changed"] += cents != new_cents
    return counts


def first_changed(before: dict[str, Order], after: dict[str, Order]) -> date | None:
    """The earliest date whose orders are not the same in both."""
    dates = [item[1] for id_ in before.keys() | after.keys() if before.get(id_) != after.get(id_)
             for item in (before.get(id_), after.get(id_)) if item]
    return min(dates, default=None)
