"""A shop that lives day by day in its own database, and an installation that looks at it each morning as the daemon does.

The shop also keeps its rows in memory: what our orders must be is read from there, by the words of the contract. The installation
is driven at its plain functions with a clock that only moves when told to: `owed` decides as the schedule does, the three sensors are
asked themselves, and what they ask for is done at once.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

import dagster as dg
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from retention_ops.backup import back_up, restore
from retention_ops.definitions import build_loop
from retention_ops.detect.alerts import alerts_by_day, answered_rules
from retention_ops.detect.compute import priority_order, workspace
from retention_ops.errors import SourceError
from retention_ops.execute import health, hold, incidents, quiet
from retention_ops.execute.asked import RESPONSE_JOB
from retention_ops.execute.job import FOLLOW_UP_JOB
from retention_ops.execute.reconcile import Findings, reconcile
from retention_ops.execute.respond import Responder
from retention_ops.execute.sensors import alert_sensor, follow_up_sensor, quiet_sensor
from retention_ops.launch import instance, run_dates
from retention_ops.log import runs
from retention_ops.log.database import answers, ops_database
from retention_ops.orchestration import dates_to_repeat, open_responder
from retention_ops.package.pack import records
from retention_ops.settings import Settings
from retention_ops.sources.check import check_once, check_source, record_check
from retention_ops.sources.morning import ASKED_AGAIN, ASKED_LATE, owed
from retention_ops.sources.pull import last_pull, pull
from retention_ops.status import status
from retention_ops.warehouse.catalog import TABLES
from retention_ops_tests.execute.servers.loopback import LoopbackServer, Reply, Request
from retention_ops_tests.execute.servers.slack import SlackServer, channel
from retention_ops_tests.execute.stage import FakeClock
from retention_ops_tests.sources import read
from retention_ops_tests.sources.shop_database import Order, corrections

HEALTH_CHANNEL = "C0HEALTH1"
SELECT = ("SELECT id AS order_id, customer AS customer_id, placed AS ordered_at, total AS order_amount, currency, status, is_test, "
          "updated AS updated_at, refunded AS refund_amount\nFROM {table};\n")
COLUMNS = ("id", "customer", "placed", "total", "currency", "status", "is_test", "updated", "refunded")
BEAT = "/a-secret-address"
ROWS = ("base_customers", "retention_snapshot", "churn_detection", "retention_daily", "alert_logic", "customer_priority")
"""tables with rows of a date, in the order in which they are made"""
SNAPSHOTS = ROWS[:3]


# -- the shop ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One order as the shop's own database has it."""

    customer: str
    placed: datetime
    cents: int
    status: str = "paid"
    updated: datetime | None = None
    refunded: int = 0
    """cents; `updated` is then when, because nothing befalls a refunded order any more: a source that is read but once knows no other
    date of a refund than that of its order's last change"""

    @property
    def may_change(self) -> bool:
        return self.status == "paid" and not self.refunded


Kind = Literal["placed", "amount", "customer", "cancelled", "gone", "refund"]
CORRECTIONS: tuple[Kind, ...] = ("amount", "customer", "cancelled", "gone", "refund")


@dataclass(frozen=True)
class Event:
    """Something that happens in the shop: an order comes, or a known one changes (`row` None: it is gone)."""

    at: datetime
    kind: Kind
    id: str
    row: Row | None


def life(orders: Iterable[tuple[str, str, datetime, int]], zone: ZoneInfo, first: date, last: date, seed: int, *,
         late_pct: int = 25, corrected_pct: int = 25) -> list[Event]:
    """The shop's events in their order. From `first` on, a share of the days have an order that comes 1 to 3 days late, and a share
    have one or two corrections, mostly of the days before, some of orders up to sixty days old."""
    chance = random.Random(seed)
    by_day: dict[date, list[tuple[str, str, datetime, int]]] = {}
    for order in orders:
        by_day.setdefault(order[2].astimezone(zone).date(), []).append(order)
    events, known = [], {}
    arrivals: dict[date, list[Event]] = {}
    for day, found in by_day.items():
        late = chance.choice(found)[0] if first <= day <= last - timedelta(3) and chance.randrange(100) < late_pct else None
        for id_, customer, placed, cents in found:
            at = moment(day + timedelta(chance.randint(1, 3)), zone, 20) if id_ == late else placed
            arrivals.setdefault(at.astimezone(zone).date(), []).append(Event(at, "placed", id_, Row(customer, placed, cents, updated=at)))
    for day in days(min(by_day), last):
        for event in sorted(arrivals.get(day, ()), key=lambda event: (event.at, event.id)):
            known[event.id] = event.row
            events.append(event)
        if day >= first and chance.randrange(100) < corrected_pct:
            for hour in range(21, 21 + chance.randint(1, 2)):
                events += _corrected(chance, known, day, moment(day, zone, hour), zone)
    return sorted(events, key=lambda event: event.at)


def _corrected(chance: random.Random, known: dict[str, Row], day: date, at: datetime, zone: ZoneInfo) -> Iterator[Event]:
    kind = chance.choice(CORRECTIONS)
    oldest = day - timedelta(chance.choice((3, 3, 3, 30, 60)) if kind != "gone" else 20)  # gone orders are looked for in 45 days only
    there = [id_ for id_, row in known.items() if row.may_change and row.placed >= moment(oldest, zone, 0)]
    if not there:
        return
    id_ = chance.choice(there)
    row = known[id_]
    match kind:
        case "amount":
            row = replace(row, cents=max(1, row.cents * chance.randint(50, 120) // 100 - 1), updated=at)
        case "customer":
            row = replace(row, customer=known[chance.choice(there)].customer, updated=at)
        case "cancelled":
            row = replace(row, status="cancelled", updated=at)
        case "refund":
            row = replace(row, refunded=max(1, row.cents * chance.choice((10, 50, 100)) // 100), updated=at)
        case "gone":
            del known[id_]
            yield Event(at, kind, id_, None)
            return
    known[id_] = row
    yield Event(at, kind, id_, row)


def moment(day: date, zone: ZoneInfo, hour: int, minute: int = 0) -> datetime:
    return datetime.combine(day, time_of_day(hour, minute), zone).astimezone(UTC)


def days(first: date, last: date) -> Iterator[date]:
    return (first + timedelta(step) for step in range((last - first).days + 1))


class Shop:
    """The shop's database as files; a subclass keeps it in Postgres."""

    source: Mapping[str, str]

    def __init__(self, events: list[Event], folder: Path, zone: ZoneInfo, currency: str):
        self.events, self.folder, self.zone, self.currency = events, folder, zone, currency
        self.rows: dict[str, Row] = {}
        self.troubles: list[tuple[datetime, Callable[[], None]]] = []
        """what befalls it besides: outages and their ends"""
        self.happened: Counter[str] = Counter()
        self.touched: dict[str, Order | None] = {}
        """what an order meant at the newest pull, of those that changed since"""
        self.since_backup: dict[str, Order | None] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.sql = folder / "orders.sql"
        self.sql.write_text(SELECT.format(table="source_files"))
        self.source = {"source": "files", "source_path": str(folder / "exports")}
        (folder / "exports").mkdir()

    def live_until(self, now: datetime) -> None:
        """Whatever happens until then, happens."""
        due = 0
        while due < len(self.events) and self.events[due].at <= now:
            due += 1
        happening, self.events = self.events[:due], self.events[due:]
        for event in happening:
            before = self.meaning_of(event.id)
            self.touched.setdefault(event.id, before)
            self.since_backup.setdefault(event.id, before)
            if event.row is None:
                del self.rows[event.id]
            else:
                self.rows[event.id] = event.row
            self.happened[event.kind] += 1
        if happening:
            self.store({event.id for event in happening})
        for trouble in [trouble for trouble in self.troubles if trouble[0] <= now]:
            self.troubles.remove(trouble)
            trouble[1]()

    def outage(self, first: datetime, last: datetime, how: str) -> None:
        self.troubles += [(first, lambda: self.out(how)), (last, self.back)]

    def correct_now(self, now: datetime) -> None:
        """Somebody changes what the newest order of the days before today cost."""
        today = moment(now.astimezone(self.zone).date(), self.zone, 0)
        known = ((row.placed, id_) for id_, row in self.rows.items() if row.may_change and row.placed < today)
        id_ = max(known)[1]
        row = self.rows[id_]
        self.events.insert(0, Event(now, "amount", id_, replace(row, cents=row.cents + 1, updated=now)))
        self.live_until(now)

    def meaning_of(self, id_: str) -> Order | None:
        row = self.rows.get(id_)
        return (row.customer, row.placed.astimezone(self.zone).date(), row.cents) if row and row.status == "paid" else None

    def meaning(self) -> dict[str, Order]:
        """What our orders must be, order by order."""
        return {id_: meant for id_ in self.rows if (meant := self.meaning_of(id_))}

    def refunds(self) -> dict[tuple[str, date], int]:
        """What our refunds must be: cents by order and date."""
        return {(id_, row.updated.astimezone(self.zone).date()): row.refunded for id_, row in self.rows.items() if row.refunded}

    def _stored(self, id_: str) -> dict[str, Any]:
        row = self.rows[id_]
        return dict(zip(COLUMNS, (
            id_, row.customer, row.placed, f"{row.cents / 100:.2f}", self.currency, row.status, False, row.updated,
            f"{row.refunded / 100:.2f}"), strict=True))

    def store(self, ids: set[str]) -> None:
        """Brings the database to what the rows say."""
        rows = [self._stored(id_) for id_ in self.rows]
        types = {"placed": pa.timestamp("us", tz="UTC"), "updated": pa.timestamp("us", tz="UTC"), "is_test": pa.bool_()}
        pq.write_table(pa.table({name: pa.array([row[name] for row in rows], types.get(name, pa.string())) for name in COLUMNS}),
                       self._there() / "orders.parquet")

    def _there(self) -> Path:
        folder = self.folder / "exports"
        return folder if folder.exists() else self.folder / "away"

    def out(self, how: str) -> None:
        """An outage: nobody can read."""
        (self.folder / "exports").rename(self.folder / "away")

    def back(self) -> None:
        (self.folder / "away").rename(self.folder / "exports")


class PostgresShop(Shop):
    """The same in a schema of a real Postgres, which a subscriber reads by RETENTION_OPS_SOURCE_URL."""

    def __init__(self, *args: Any, url: str, environment: Any):
        super().__init__(*args)
        self.sql.write_text(SELECT.format(table="shop.orders"))
        self.source = {"source": "postgres"}
        self.table = "shop.orders"
        self._environment, self._address = environment, url.replace("postgresql+psycopg://", "postgresql://", 1)
        self._engine = sa.create_engine(url)
        with self._engine.begin() as connection:
            for statement in (
                "DROP SCHEMA IF EXISTS shop CASCADE", "CREATE SCHEMA shop",
                "CREATE TABLE shop.orders (id TEXT PRIMARY KEY, customer TEXT, placed TIMESTAMPTZ, total NUMERIC(12, 2), currency TEXT, "
                "status TEXT, is_test BOOLEAN, updated TIMESTAMPTZ, refunded NUMERIC(12, 2))",
                "CREATE INDEX ON shop.orders (placed)", "CREATE INDEX ON shop.orders (updated)",
            ):
                connection.execute(sa.text(statement))
        self.back()

    def store(self, ids: set[str]) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.text(f"DELETE FROM {self.table} WHERE id = ANY(:ids)"), {"ids": sorted(ids)})
            rows = [self._stored(id_) for id_ in sorted(ids) if id_ in self.rows]
            if rows:
                connection.execute(sa.text(f"INSERT INTO {self.table} VALUES ({', '.join(':' + name for name in COLUMNS)})"), rows)

    def out(self, how: str) -> None:
        if how == "refused":
            self._environment.setenv("RETENTION_OPS_SOURCE_URL", "postgresql://reader@127.0.0.1:1/shop")
            return
        with self._engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE shop.orders RENAME TO orders_in_the_making"))
        self.table = "shop.orders_in_the_making"

    def back(self) -> None:
        self._environment.setenv("RETENTION_OPS_SOURCE_URL", self._address)
        if self.table != "shop.orders":
            with self._engine.begin() as connection:
                connection.execute(sa.text("ALTER TABLE shop.orders_in_the_making RENAME TO orders"))
            self.table = "shop.orders"

    def close(self) -> None:
        self._engine.dispose()


# -- the world ---------------------------------------------------------------------------------------------------------


class Monitor(LoopbackServer):
    """What waits for a heartbeat: `beats` are the moments of its calls."""

    def __init__(self, clock: FakeClock):
        super().__init__()
        self.clock = clock
        self.beats: list[datetime] = []

    def handle(self, request: Request) -> Reply:
        if request.path != BEAT:
            return Reply(404)
        self.beats.append(self.clock())
        return Reply(200, b"OK")


@contextmanager
def world(clock: FakeClock, environment: Any) -> Iterator[tuple[SlackServer, Monitor]]:
    """Slack and a monitor, and their secrets where an installation has them."""
    from retention_ops_tests.execute.servers import slack

    with ExitStack() as stack:
        messages = stack.enter_context(SlackServer(clock=lambda: clock().timestamp()))
        messages.channels[HEALTH_CHANNEL] = channel("data-owner")
        monitor = stack.enter_context(Monitor(clock))
        environment.setenv("RETENTION_OPS_SLACK_TOKEN", slack.TOKEN)
        environment.setenv("RETENTION_OPS_HEARTBEAT_URL", f"{monitor.url}{BEAT}")
        yield messages, monitor


def outside(messages: SlackServer) -> dict[str, Any]:
    """Settings of an installation that is live in that world."""
    from retention_ops_tests.execute.servers import slack

    return {"mode": "live", "messages_to": "slack", "slack_channel": slack.CHANNEL, "slack_api_url": messages.api_url,
            "health_channel": HEALTH_CHANNEL, "owner": "Ada", "backup_owner": "Grace"}


# -- the installation --------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What was counted on the way."""

    mornings: int = 0
    looks: int = 0
    pulls: int = 0
    failed_pulls: int = 0
    corrections: Counter[str] = field(default_factory=Counter)
    plain_runs: int = 0
    dagster_runs: int = 0
    failed_runs: int = 0
    dates_computed: int = 0
    restarts: int = 0
    late_mornings: list[date] = field(default_factory=list)
    """mornings on which yesterday's orders were not all in when the deadline had passed"""
    good_days: list[date] = field(default_factory=list)
    """dates that were computed from complete orders while they were yesterday"""


class Installation:
    """One home and the daemon on it. `look` is what the daemon does within a minute or two."""

    def __init__(self, home: Path, shop: Shop, clock: FakeClock, **settings: Any):
        self.home, self.shop, self.clock = home, shop, clock
        self.changes = {"source_sql": shop.sql, **shop.source, **settings}
        self.told = Told()
        self.asked: set[str] = set()
        """run keys, by which Dagster starts nothing twice"""
        self.start()

    def start(self) -> None:
        """A new process: nothing is kept but what is on disk and in databases."""
        self.settings = Settings(_env_file=None, home=self.home, **self.changes)
        self.loop = build_loop(self.settings, self.clock)

    def stop(self) -> None:
        """The process ends."""

    def restart(self) -> None:
        self.stop()
        self.start()
        self.told.restarts += 1

    @property
    def lake(self) -> Any:
        return self.loop.lake

    @property
    def today(self) -> date:
        return self.clock().astimezone(self.zone).date()

    @property
    def complete(self) -> date:
        orders = self.lake.orders()
        return orders.complete_through if orders else date(1970, 1, 1)

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.settings.shop_timezone)

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        with ops_database(self.settings) as engine:
            yield engine

    # -- a day

    def at(self, day: date, hour: int, minute: int = 0) -> None:
        """The clock moves on, and the shop with it."""
        self.clock.now = max(self.clock.now, moment(day, self.zone, hour, minute))
        self.shop.live_until(self.clock())

    def sleep_until(self, day: date, hour: int, minute: int = 0) -> None:
        """The machine is off: the clock and the shop go on, and nobody looks."""
        self.stop()
        self.at(day, hour, minute)
        self.start()

    def morning(self, day: date) -> None:
        """From schedule_time on, until nothing is owed or the evening has come: each quarter of an hour until the deadline, then hourly."""
        self.at(day, 6)
        evening, yesterday = moment(day, self.zone, 21), day - timedelta(1)
        deadline = moment(day, self.zone, *map(int, self.settings.data_deadline.split(":")))
        while True:
            self.look()
            found = owed(self.lake, self.clock)
            if found.late and day not in self.told.late_mornings:
                self.told.late_mornings.append(day)
            pause = ASKED_AGAIN if self.clock() < deadline else ASKED_LATE
            if not (found.waits or found.due or self.failed()) or self.clock() + pause >= evening:
                break
            self.clock.now += pause
            self.shop.live_until(self.clock())
        self.told.mornings += 1
        if not (found.waits or found.due or self.failed()):
            self.told.good_days.append(yesterday)

    def look(self) -> None:
        self.told.looks += 1
        self.schedule()
        self.sensors()

    def schedule(self) -> None:
        """As the schedule does every five minutes: what can be computed, else the source once more; each asked for once."""
        for _ in range(3):
            found = owed(self.lake, self.clock)
            if found.due:
                first, last = found.due[0], found.due[-1]
                version = self.lake.orders().version
                if self._asked_before(f"loop:{first}:{last}:{version}:{found.slot}"):
                    return
                self.compute(first, last)
            elif found.waits:
                if self._asked_before(f"pull:{found.slot}"):
                    return
                self.take_in()
            elif failed := self.failed():
                if self._asked_before(f"again:{failed}:{found.slot}"):
                    return
                self.compute(*failed)
            else:
                return

    def _asked_before(self, key: str) -> bool:
        known = key in self.asked
        self.asked.add(key)
        return known

    def take_in(self) -> None:
        """As the job pull_orders does. Whatever a pull says of the changes must be what happened in the shop."""
        before, complete = last_pull(self.settings), self.complete
        try:
            self._pull()
        except SourceError:
            self.told.failed_pulls += 1
            return
        self.hear(before, complete)

    def _pull(self) -> None:
        pull(self.lake, clock=self.clock)
        with self.engine() as engine:
            runs.record_ingestions(engine, "orders", self.lake.orders_versions())
            check_once(self.lake, engine, self.clock)

    def hear(self, before: Any, complete: date) -> None:
        """Compares the newest pull's report with the shop's own story, where there was one."""
        after = last_pull(self.settings)
        if after is None or (before and after["pulled_at"] == before["pulled_at"]):
            return
        then = {id_: meant for id_, meant in self.shop.touched.items() if meant}
        now = {id_: meant for id_ in self.shop.touched if (meant := self.shop.meaning_of(id_))}
        expected = corrections(then, now, set(self.shop.rows), complete)
        expected["refunded_late"] = sum(day <= complete for id_, day in self.shop.refunds() if id_ in self.shop.touched)
        assert after["corrections"] | {"new": after["new"]} == {kind: n for kind, n in expected.items() if n or kind == "new"}
        self.shop.touched = {}
        self.told.pulls += 1
        self.told.corrections.update(after["corrections"])

    # -- what differs between the whole daemon and the quick one

    def failed(self) -> tuple[date, date] | None:
        """The dates of a run that failed half-way and is tried again."""
        return None

    def compute(self, first: date, last: date) -> None:
        raise NotImplementedError

    def sensors(self) -> None:
        raise NotImplementedError

    # -- people

    def acknowledge(self) -> None:
        """Somebody reads the alarm."""
        with self.engine() as engine:
            for incident in incidents.find(engine, state="open"):
                if not incident["acked_at"]:
                    incidents.acknowledge(engine, incident["id"], "Ada", self.clock())

    # -- disaster

    def check(self) -> bool:
        """As `retention-ops source check` does; whether the orders agree with their source."""
        with self.engine() as engine:
            report = check_source(self.lake, clock=self.clock)
            record_check(engine, report, self.clock)
        return not report.off

    def back_up(self, file: Path) -> Path:
        self.shop.since_backup = {}
        return back_up(self.settings, file, clock=self.clock).file

    def lose_and_restore(self, file: Path) -> None:
        """The machine is gone, with its home, its ops database and Dagster's; a new one gets the backup."""
        self.stop()
        shutil.rmtree(self.settings.home)
        self.lose_databases()
        restore(file, self.settings, clock=self.clock)
        self.asked = set()
        self.shop.touched = self.shop.since_backup
        self.start()

    def lose_databases(self) -> None:
        """Whatever lies outside the home."""

    def reconcile(self) -> Findings:
        with self.engine() as engine:
            return reconcile(Responder(self.lake, engine, self.settings, "a-person", clock=self.clock, reconciling=True))

    def held(self) -> str:
        with self.engine() as engine:
            return hold.why_held(engine)


class Quick(Installation):
    """The same decisions without Dagster: for a dozen mornings in seconds."""

    def compute(self, first: date, last: date) -> None:
        started = self.clock()
        if last > self.complete:  # as the asset of the orders does
            self.take_in()
        self._store(first, last)
        with open_responder(self.loop, f"run-{self.told.plain_runs}") as responder:
            for day in sorted(days(first, last), reverse=True):
                responder.on(day).answer(day)
            health.record_runs(responder.engine, [{
                "run_id": f"run-{self.told.plain_runs}-{started:%m%d%H%M}", "first_date": first, "last_date": last, "status": "success",
                "started_at": started, "ended_at": self.clock()}], self.clock)
        self.told.plain_runs += 1
        self.told.dates_computed += (last - first).days + 1

    def _store(self, first: date, last: date) -> None:
        """Every table of these dates, by the same rules, without the checks and the metadata."""
        with workspace(self.lake) as space:
            for day in days(first, last):
                for table in ROWS:
                    space.build(table, day)
                    order = priority_order(self.settings) if table == "customer_priority" else None
                    where = f"{TABLES[table].date_column} = DATE '{day}'"
                    self.lake.write(space.connection, table, day, space.provenance, order_by=order, where=where)
            space.build_cohorts()
            self.lake.write(space.connection, "cohort_retention_evolution", None, space.provenance)
        for table in SNAPSHOTS:
            if self.lake.days(table)[-1] == last:
                self.lake.prune_snapshots(table, last)
        self.lake.refresh_views()

    def advised(self) -> list[str]:
        """Only what is stale: without Dagster `status` misses its events of every date."""
        stale = status(self.settings, self.clock)["stale_dates"]
        if stale:
            self.compute(stale[0], stale[-1])
        return [f"backfill --from {stale[0]} --to {stale[-1]}"] if stale else []

    def sensors(self) -> None:
        with open_responder(self.loop, f"look-{self.told.looks}") as responder:
            responder.work()
            quiet.tell(responder)


class Daemon(Quick):
    """With Dagster: on the mornings for which `through_dagster` is true, the dates are computed by runs on the home's own instance and
    the three sensors themselves are asked; on the others by the same plain functions, four times as fast."""

    def __init__(self, *args: Any, through_dagster: Callable[[date], bool], lose: Callable[[], None], **settings: Any):
        self._through_dagster, self._lose = through_dagster, lose
        self._cursor = ""
        super().__init__(*args, **settings)

    def start(self) -> None:
        super().start()
        self._open = ExitStack()
        self.stored = self._open.enter_context(instance(self.settings))

    def stop(self) -> None:
        self._open.close()

    def lose_databases(self) -> None:
        self._cursor = ""
        self._lose()

    def failed(self) -> tuple[date, date] | None:
        if not self._through_dagster(self.today):
            return None
        return dates_to_repeat(self.stored, self.settings, self.today - timedelta(1))

    def compute(self, first: date, last: date) -> None:
        if not self._through_dagster(self.today):
            super().compute(first, last)
            return
        before, complete = last_pull(self.settings), self.complete
        outcome = run_dates(self.loop, first, last, self.stored)
        self.told.dagster_runs += 1
        self.told.failed_runs += not outcome.success
        self.told.dates_computed += (last - first).days + 1
        self.hear(before, complete)

    def sensors(self) -> None:
        if not self._through_dagster(self.today):
            super().sensors()
            return
        for sensor in (alert_sensor, follow_up_sensor, quiet_sensor):
            cursor = self._cursor if sensor is alert_sensor else None
            result = sensor(dg.build_sensor_context(instance=self.stored, cursor=cursor, resources={"loop": self.loop}))
            if sensor is alert_sensor:
                self._cursor = result.cursor
            for request in result.run_requests:
                if not self._asked_before(request.run_key):
                    self._do(request)

    def _do(self, request: dg.RunRequest) -> None:
        """The work of the run that a sensor asks for."""
        with open_responder(self.loop, request.run_key) as responder:
            if request.job_name == RESPONSE_JOB:
                for day in map(date.fromisoformat, request.run_config["ops"]["gate"]["config"]["alert_dates"]):
                    responder.on(day).answer(day)
            elif request.job_name == FOLLOW_UP_JOB:
                responder.work()
            else:
                quiet.tell(responder)

    def advised(self) -> list[str]:
        """Does what `status` names as next, until it names nothing that changes anything; returns the commands."""
        done: list[str] = []
        while len(done) < 5:
            wanted = ("backfill", "run ", "source pull", "actions reconcile")
            command = next((text for text in status(self.settings, self.clock)["next"] if text.startswith(wanted)), None)
            if command is None:
                return done
            done.append(command)
            match command.split():
                case ["backfill", _, first, _, last]:
                    outcome = run_dates(self.loop, date.fromisoformat(first), date.fromisoformat(last), self.stored)
                    assert outcome.success, outcome.errors
                case ["actions", "reconcile"]:
                    assert self.reconcile().lifted
                case _:
                    raise AssertionError(f"nothing else should be wanted: {command}")
        raise AssertionError(f"status goes on naming {done[-1]}")


# -- what must be true in the end --------------------------------------------------------------------------------------

def rebuilt(installation: Installation, home: Path, first: date, last: date) -> Installation:
    """An empty home that pulls the source as it stands, once, and computes all dates in one run; it answers nothing."""
    fresh = Quick(home, installation.shop, installation.clock, **{
        **installation.changes, "mode": "off", "ops_database_url": "", "pack_keep_days": 1})
    pull(fresh.lake, clock=fresh.clock)
    with dg.DagsterInstance.ephemeral() as stored:
        outcome = run_dates(fresh.loop, first, last, stored)
    assert outcome.success, outcome.errors
    return fresh


def differences(one: Installation, other: Installation) -> list[str]:
    """Where two homes do not say the same: dates of a table, or rows of a date, created_at apart; every value exactly."""
    found = []
    for table in ROWS:
        if one.lake.days(table) != other.lake.days(table):
            odd = sorted({*one.lake.days(table)} ^ {*other.lake.days(table)})
            found.append(f"{table}: {len(odd)} dates are in one of them only, the first {odd[0]}")
            continue
        found += [f"{table}: {day} differs" for day in _differing(*(side.lake.root / table for side in (one, other)), table)]
    found += [f"cohorts: {month}" for month in _differing(
        *(side.lake.path("cohort_retention_evolution") for side in (one, other)), "cohort_retention_evolution")]
    return found


def _differing(one: Path, other: Path, table: str) -> list[Any]:
    """Dates (cohorts: months) with a row that only one of them has."""
    created = " EXCLUDE (created_at)" if table == "customer_priority" else ""
    day = TABLES[table].date_column or "cohort_month"
    sides = [f"SELECT *{created} FROM read_parquet('{path if path.is_file() else path / '*' / '*.parquet'}', hive_partitioning = false)"
             for path in (one, other)]
    return [row[0] for row in duckdb.execute(f"""
        SELECT DISTINCT {day} FROM (({sides[0]} EXCEPT ALL {sides[1]}) UNION ALL ({sides[1]} EXCEPT ALL {sides[0]})) ORDER BY 1
    """).fetchall()]


def our_orders(installation: Installation) -> dict[str, Order]:
    return {row[0]: (row[1], row[2], row[3]) for row in read(installation.lake.orders().path)}


def our_refunds(installation: Installation) -> dict[tuple[str, date], int]:
    """Cents by order and date."""
    orders = installation.lake.orders()
    return {(row[1], row[3]): row[4] for row in read(orders.refunds_path)} if orders.refunds else {}


def flagged(installation: Installation) -> list[date]:
    """Dates with an alert that is answered, as they stand."""
    rows = records(installation.lake.read_range("alert_logic", date(2000, 1, 1), date(2100, 1, 1)))
    return [day for day, alert in alerts_by_day(rows, answered_rules(installation.settings)).items() if alert["alert_flag"]]


def keys_at_slack(messages: SlackServer) -> Counter[str]:
    """Idempotency keys of the messages (not charts) that people can see."""
    return Counter(message["metadata"]["event_payload"]["key"] for message in messages.messages if message["metadata"])


def answered(engine: Engine) -> dict[date, list[dict[str, Any]]]:
    """Every answer in live, by date, oldest first."""
    with engine.connect() as connection:
        rows = connection.execute(sa.select(answers).filter_by(mode="live").order_by(answers.c.id)).mappings().all()
    found: dict[date, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["alert_date"], []).append(dict(row))
    return found
