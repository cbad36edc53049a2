"""Whole responses for the fault matrix: gate, plan, deliver and record on a small shop, one real destination, the rest local."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from retention_ops.clock import Clock
from retention_ops.definitions import build_loop
from retention_ops.detect.compute import alert_history
from retention_ops.execute import ledger
from retention_ops.execute.destinations.local import Local
from retention_ops.execute.respond import Responder
from retention_ops.launch import run_dates
from retention_ops.log import runs
from retention_ops.log.database import exposures, ops_database
from retention_ops.settings import Secrets, Settings
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.conftest import LAST_DAY
from retention_ops_tests.execute.far import CONNECT, PATIENT, QUICK, Far, LocalFar, Time
from retention_ops_tests.execute.matrix import (
    FULL,
    KILLS,
    ROUNDS,
    WIRE,
    Killed,
    Saboteur,
    Store,
    Strike,
    Wrong,
    _events,
    judge_action,
    judge_log,
    wiretapped,
)
from retention_ops_tests.shops import lake_with, small_shop

AT_PLAN, AT_LOG = "ledger full at plan", "ledger full at log"


@dataclass(frozen=True)
class Shop:
    """A home with a lake, a flagged date and its pack; copied for each case."""

    home: Path
    day: date

    @property
    def next_morning(self) -> datetime:
        return datetime.combine(self.day + timedelta(days=1), datetime.min.time(), UTC) + timedelta(hours=10)

    def copied(self, home: Path) -> Path:
        shutil.copytree(self.home, home, symlinks=True, ignore=shutil.ignore_patterns("ops.sqlite*"))
        return home


def prepared_shop(home: Path, **settings: Any) -> Shop:
    """The small shop up to the newest date on which its alert fires."""
    lake = lake_with(small_shop(), home, min_sample=10, shop_name="Small shop", **settings)
    return computed(lake)


def computed(lake: Lake) -> Shop:
    """Runs the loop for the newest flagged date of a lake."""
    history = alert_history(lake, LAST_DAY - timedelta(100), LAST_DAY)
    day = history.loc[history["alert_flag"], "alert_date"].dt.date.max()
    with dg.DagsterInstance.ephemeral() as stored:
        outcome = run_dates(build_loop(lake.settings), day, day, stored)
    assert outcome.success, outcome.errors
    return Shop(lake.settings.home, day)


@dataclass
class Response:
    """One installation that answers the flagged date, with workers that come and go."""

    shop: Shop
    far: Far
    store: Store
    folder: Path
    clock: Time = field(default_factory=lambda: Time(datetime(2026, 7, 1, tzinfo=UTC)))
    number: int = 0

    def begin(self) -> None:
        """A fresh copy of the shop, a fresh database, an empty far side."""
        shutil.rmtree(self.folder / f"whole-{self.number}", ignore_errors=True)
        self.number += 1
        home = self.folder / f"whole-{self.number}"
        self.shop.copied(home)
        self.url = self.store.fresh(home)
        more = dict(self.far.settings)
        self.settings = Settings(
            _env_file=None, home=home, mode="live", min_sample=10, shop_name="Small shop", ops_database_url=self.url, **more)
        self.secrets = Secrets(**self.far.secrets)
        self.clock.now = self.shop.next_morning
        self.far.reset()
        self.far.aim({})
        if isinstance(self.far, LocalFar):
            self.far.home, self.far.day = home, self.shop.day

    @contextmanager
    def worker(
        self, run_id: str, saboteur: Saboteur | None = None, patience: float = PATIENT, clock: Clock | None = None,
        checkpoint: Callable[[str, ledger.Row], None] | None = None, sleep: Callable[[float], None] | None = None,
    ) -> Iterator[Responder]:
        """A responder with an engine of its own; unless `sleep` is given, waiting moves the clock."""
        clock = clock or self.clock
        far = CONNECT[self.far.destination](self.settings, self.secrets, clock, patience)
        with ops_database(self.settings) as engine:
            self.store.watch(engine)
            yield Responder(
                Lake(self.settings), engine, self.settings, run_id, clock=clock, secrets=self.secrets, patience=5,
                sleep=sleep or self._pass,
                destinations=lambda name, mode: Local(self.settings, mode) if name == "local" else far,
                checkpoint=checkpoint or (saboteur.checkpoint if saboteur else lambda step, row: None),
            )

    def _pass(self, seconds: float) -> None:
        self.clock.now += timedelta(seconds=seconds)

    def steps(self) -> int:
        """How many requests a whole answer makes without faults; proves that it ends well."""
        self.begin()
        self.far.journal()
        with self.worker("journal") as responder:
            row = responder.answer(self.shop.day)
            assert row["status"] == "success", row["error_message"]
            self.judge(responder.engine)
        return len(self.far.journal()) if self.far.wire_faults else 0

    def play(self, strikes: Sequence[Strike]) -> str:
        """Strikes during the answer, then lets workers come back until nothing is due. Raises Wrong."""
        try:
            self.begin()
            return self._play(strikes)
        except Exception as error:
            told = ", then ".join(map(str, strikes))
            raise Wrong(f"whole response with {self.far.label} on {self.store.name}: {told}: {type(error).__name__}: {error}") from error
        finally:
            self.far.aim({})
            self.store.make_room()

    def _play(self, strikes: Sequence[Strike]) -> str:
        faults = {strike.fault for strike in strikes}
        saboteur = Saboteur(self.far, strikes, fill=self.store.fill)
        patience = QUICK if any("timeout" in fault for fault in faults) else PATIENT
        if AT_PLAN in faults:
            self.store.fill()
        fallen = self._round("run-0", saboteur, patience, again=True, fill_at_log=AT_LOG in faults)
        self.store.make_room()
        for number in range(1, ROUNDS):
            if not fallen and not self._open():
                break
            due = [moment for row in self._open() for moment in (row["not_before"], row["lease_until"]) if moment]
            self.clock.now = max([self.clock.now, *due]) + timedelta(seconds=1)
            saboteur.dead = False
            fallen = self._round(f"run-{number}", saboteur, PATIENT, again=fallen)
            self.store.make_room()
        self.far.aim({})
        with ops_database(self.settings) as engine:
            return self.judge(engine)

    def _round(self, run_id: str, saboteur: Saboteur, patience: float, *, again: bool, fill_at_log: bool = False) -> bool:
        """True where the worker did not live to its end, or could not write its log row."""
        try:
            with wiretapped(saboteur), self.worker(run_id, saboteur, patience) as responder:
                if fill_at_log:
                    responder.link = lambda day: self.store.fill()
                if again:
                    responder.answer(self.shop.day)
                else:
                    responder.work()
        except Killed:
            return True
        except Exception as error:
            assert self.store.is_full(str(error)), error
            return True
        return False

    def _open(self) -> list[ledger.Row]:
        with ops_database(self.settings) as engine:
            return ledger.find(engine, state=ledger.OPEN_STATES)

    def judge(self, engine: Engine) -> str:
        """Every action of the answer once or held, hand-overs recorded with their customers, the log true and whole."""
        rows = ledger.find(engine)
        assert rows, "nothing was planned"
        ids = {row["key"]: row["external_id"] for row in rows}
        for row in rows:
            blocked = row["state"] == ledger.PLANNED and self._state(rows, row["parent_key"]) in ledger.HELD_STATES
            if row["destination"] == self.far.destination and not blocked:
                judge_action(row, self.far.ids({**row, "parent_id": ids.get(row["parent_key"])}), _events(engine, row["key"]))
            else:
                assert blocked or row["state"] in (ledger.SENT, ledger.CANCELLED), f"{row['slot']} {row['kind']} is {row['state']}"
        self._judge_exposures(engine, rows)
        judge_log(runs.rows(engine, first=self.shop.day, last=self.shop.day), rows)
        assert runs.first_broken_row(engine) is None, "the log's chain is broken"
        return "held" if any(row["state"] not in (ledger.SENT, ledger.CANCELLED) for row in rows) else "once"

    def _state(self, rows: Sequence[ledger.Row], key: str | None) -> str | None:
        return next((row["state"] for row in rows if row["key"] == key), None)

    def _judge_exposures(self, engine: Engine, rows: Sequence[ledger.Row]) -> None:
        handed = [row for row in rows if row["slot"] == "sheets" and row["state"] == ledger.SENT]
        assert len(handed) <= 1, "the lists were handed over twice"
        with engine.connect() as connection:
            treated = connection.execute(
                sa.select(sa.func.count()).select_from(exposures).where(exposures.c.arm == "treated")).scalar_one()
        wanted = sum(sheet["rows"] for row in handed for sheet in row["payload"]["worksheets"])
        assert treated == wanted, f"{treated} customers recorded as handed over, {wanted} are on the lists"


def whole_cases(steps: int, wire: Sequence[str], times: int, seed: str) -> list[tuple[Strike, ...]]:
    """`times` draws over everything that can strike a whole answer."""
    chance = random.Random(seed)
    draws: list[tuple[Strike, ...]] = [(Strike(AT_PLAN),), (Strike(AT_LOG),)]
    known = [fault for fault, name in WIRE.items() if name in wire]
    while len(draws) < times:
        if steps and chance.random() < 0.7:
            number = chance.randrange(steps)
            draws.append((Strike(chance.choice([*known, *KILLS[1:3]]), number),))
        else:
            draws.append((Strike(chance.choice([*KILLS, *FULL[1:2]])),))
    chance.shuffle(draws)
    return draws


def race(responses: Sequence[Callable[[], None]]) -> None:
    """Runs all at once in threads and raises what any of them raised."""
    gate, errors = threading.Barrier(len(responses)), []

    def run(response: Callable[[], None]) -> None:
        try:
            gate.wait(60)
            response()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(response,)) for response in responses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
