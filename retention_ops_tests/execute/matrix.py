"""The fault matrix: cases generated from what the destinations declare and do, played against real clients, and judged.

A case is one action of one destination, one database and one or more faults. Its faults strike while a real `Responder` delivers;
then time passes, workers come back with nothing but the database, and `judge` compares the far side, the ledger, the events and
ops_runs_log. Requests are not listed here: they are counted in a run without faults.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import smtplib
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from retention_ops.execute import ledger
from retention_ops.execute.gate import Decision
from retention_ops.execute.ledger import Intent, Row
from retention_ops.execute.respond import Responder
from retention_ops.log import runs
from retention_ops.log.database import lock_responses, ops_database, ops_events
from retention_ops.settings import Secrets, Settings
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.execute.far import CONNECT, LABELS, PATIENT, QUICK, Far, LocalFar, Time, fars

START = datetime(2026, 7, 1, 10, 0, tzinfo=UTC)
DAY = date(2026, 6, 30)
PROCESSES = 3
"""real processes killed per action, drawn by the seed from all the places where they can be"""
ROUNDS = 40
"""workers that come back, at most; more means that a case never ends"""
RESUMED = Decision("resume", "the run was started again")

KILLS = ("killed after claim", "killed before send", "killed after send", "killed after record")
FULL = ("ledger full at claim", "ledger full at record", "ledger full at release")
WIRE = {
    "reply lost": "lost_after", "request lost": "lost_before", "429": "429", "500, not done": "500_before", "500, done": "500_after",
    "503": "503", "timeout, done": "slow_after", "timeout, not done": "slow_before",
}
SEVERAL, PROCESS = "several at once", "killed by SIGKILL"
COLUMNS = (*KILLS, *WIRE, *FULL, SEVERAL, PROCESS)
CHECKPOINTS = {"killed after claim": "claimed", "killed before send": "before_send", "killed after send": "after_send",
               "killed after record": "recorded"}
DATABASES = ("sqlite", "postgres")


class Killed(BaseException):
    """The worker dies here: nothing after it runs, and what it knew is gone."""


class Wrong(AssertionError):
    """A case ended otherwise than the project promises."""


@dataclass(frozen=True)
class Strike:
    """Where a fault hits: at a request's number (counted over the whole case), or at a checkpoint of the door (`request` None)."""

    fault: str
    request: int | None = None

    def __str__(self) -> str:
        return self.fault if self.request is None else f"{self.fault} at request {self.request}"


@dataclass(frozen=True)
class Case:
    far: str
    kind: str
    database: str
    strikes: tuple[Strike, ...]
    column: str
    in_process: bool = True

    def __str__(self) -> str:
        return f"{self.far}.{self.kind} on {self.database}: {', then '.join(map(str, self.strikes))} [{self.column}]"


@dataclass(frozen=True)
class Outcome:
    """`once` or `held`, and the errors that were told on the way."""

    result: str
    errors: tuple[str, ...] = ()


# -- generating --------------------------------------------------------------------------------------------------------


def single_faults(far: Far, kind: str, database: str, steps: Sequence[str]) -> Iterator[Case]:
    """Every fault at every place where it can strike this action."""
    for fault in KILLS:
        yield Case(far.label, kind, database, (Strike(fault),), fault)
    for number in range(len(steps) if far.wire_faults else 0):
        for fault in KILLS[1:3]:
            yield Case(far.label, kind, database, (Strike(fault, number),), fault)
        for fault, name in WIRE.items():
            if name in far.wire_faults:
                yield Case(far.label, kind, database, (Strike(fault, number),), fault)
        # a claim is only given back when something went wrong on the wire first
        for fault in ("reply lost", "429"):
            yield Case(far.label, kind, database, (Strike(fault, number), Strike(FULL[2])), FULL[2])
    for fault in FULL[:2]:
        yield Case(far.label, kind, database, (Strike(fault),), fault)


def several_faults(far: Far, kind: str, database: str, steps: Sequence[str], times: int, seed: int) -> Iterator[Case]:
    """Two to four faults in one case, drawn by a seed; they also strike look-ups and second attempts."""
    chance = random.Random(f"{seed} {far.label} {kind} {database}")
    wire = [fault for fault, name in WIRE.items() if name in far.wire_faults]
    for _ in range(times):
        numbers = sorted(chance.sample(range(2 * len(steps) + 4), chance.randint(2, 4))) if wire else []
        strikes = [Strike(chance.choice([*wire, *KILLS[1:3]]), number) for number in numbers]
        strikes += [Strike(fault) for fault in chance.sample(KILLS, chance.randint(0 if wire else 2, 2))]
        yield Case(far.label, kind, database, tuple(strikes), SEVERAL)


def killed_processes(far: Far, kind: str, database: str, steps: Sequence[str]) -> Iterator[Case]:
    """Kills of a process of its own: at each checkpoint and around each request."""
    for fault in KILLS:
        yield Case(far.label, kind, database, (Strike(fault),), PROCESS, in_process=False)
    for number in range(len(steps) if far.wire_faults else 0):
        for fault in KILLS[1:3]:
            yield Case(far.label, kind, database, (Strike(fault, number),), PROCESS, in_process=False)


def seeded_subset(cases: Iterable[Case], count: int, seed: int) -> list[Case]:
    """`count` cases drawn by a seed, among them every destination and every fault."""
    cases = list(cases)
    random.Random(seed).shuffle(cases)
    chosen: list[Case] = []
    for value in (lambda case: case.far, lambda case: case.column, lambda case: (case.far, case.kind)):
        for case in cases:
            if value(case) not in {value(known) for known in chosen}:
                chosen.append(case)
    rest = [case for case in cases if case not in chosen]
    return (chosen + rest)[: max(count, len(chosen))]


# -- striking ----------------------------------------------------------------------------------------------------------


class Saboteur:
    """Holds a case's strikes and lets each happen once. `die` is how a worker ends: an exception, or a signal to the process."""

    def __init__(self, far: Far, strikes: Sequence[Strike], die: Callable[[], None] | None = None, fill: Callable[[], None] | None = None):
        self.at_checkpoint = Counter(CHECKPOINTS[strike.fault] for strike in strikes if strike.fault in KILLS and strike.request is None)
        self.before = {strike.request for strike in strikes if strike.fault == KILLS[1]} - {None}
        self.after = {strike.request for strike in strikes if strike.fault == KILLS[2]} - {None}
        self.full = {strike.fault for strike in strikes if strike.fault in FULL}
        self.die = die or _die
        self.fill = fill or (lambda: None)
        self.dead = False
        self.asked = self.answered = 0
        self.thread = threading.get_ident()
        self.aim = far.aim({strike.request: WIRE[strike.fault] for strike in strikes if strike.fault in WIRE})

    def checkpoint(self, step: str, row: Row) -> None:
        if step == "before_send" and self.full & {FULL[1], FULL[2]}:
            self.full.clear()
            self.fill()
        if self.at_checkpoint[step] > 0:
            self.at_checkpoint[step] -= 1
            self._kill()

    def asking(self) -> None:
        """Just before a request leaves."""
        if threading.get_ident() == self.thread:
            if self.dead or self.asked in self.before:
                self.before.discard(self.asked)
                self._kill()
            self.asked, self.answered = self.asked + 1, self.asked + 1

    def answer_came(self) -> None:
        """Just after a request was answered."""
        if threading.get_ident() == self.thread and (self.dead or self.asked - 1 in self.after):
            self.after.discard(self.asked - 1)
            self._kill()

    def missed(self) -> list[str]:
        """Strikes that never came to pass: the case proves nothing."""
        kills = [f"a kill around request {number}" for number in (*self.before, *self.after)]
        return kills + [f"a kill at {step}" for step, left in self.at_checkpoint.items() if left > 0] + self.aim.missed()

    def _kill(self) -> None:
        self.dead = True
        self.die()


def _die() -> None:
    raise Killed


@contextmanager
def wiretapped(saboteur: Saboteur) -> Iterator[None]:
    """Lets the saboteur see every HTTP request and every SMTP command of this process."""
    taps = [
        (http.client.HTTPConnection, "putrequest", saboteur.asking, None),
        (http.client.HTTPConnection, "getresponse", None, saboteur.answer_came),
        (smtplib.SMTP, "_get_socket", saboteur.asking, None),
        (smtplib.SMTP, "send", saboteur.asking, None),
        (smtplib.SMTP, "getreply", None, saboteur.answer_came),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _, _ in taps]
    for (owner, name, original), (_, _, before, after) in zip(originals, taps, strict=True):
        setattr(owner, name, _tapped(original, before, after))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _tapped(original: Callable[..., Any], before: Callable[[], None] | None, after: Callable[[], None] | None) -> Callable[..., Any]:
    def tapped(*args: Any, **options: Any) -> Any:
        if before:
            before()
        answer = original(*args, **options)
        if after:
            after()
        return answer

    return tapped


# -- databases ---------------------------------------------------------------------------------------------------------


class SqliteStore:
    """A file per case, copied from a migrated one. Full means a limit on pages, so the error is SQLite's own."""

    name = "sqlite"

    def __init__(self, folder: Path):
        self.template = folder / "template"
        with ops_database(_settings(self.template, "")):
            pass

    def fresh(self, home: Path) -> str:
        home.mkdir(parents=True, exist_ok=True)
        self.file = home / "ops.sqlite"
        shutil.copy(self.template / "ops.sqlite", self.file)
        self.pages = 0
        with self._open() as connection:
            connection.execute("CREATE TABLE ballast (bytes BLOB)")
        return ""

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.file, timeout=30)
        with connection:
            yield connection
        connection.close()

    def fill(self) -> None:
        """Every line of the story, and of the log, needs new pages from now on, and there are none."""
        with self._open() as connection:
            for table in ("ops_events", "ops_runs_log"):
                connection.execute(f"CREATE TRIGGER ballast_{table} AFTER INSERT ON {table} "
                                   "BEGIN INSERT INTO ballast VALUES (zeroblob(65536)); END")
            self.pages = connection.execute("PRAGMA page_count").fetchone()[0]

    def make_room(self) -> None:
        self.pages = 0
        with self._open() as connection:
            for table in ("ops_events", "ops_runs_log"):
                connection.execute(f"DROP TRIGGER IF EXISTS ballast_{table}")

    def watch(self, engine: Engine) -> None:
        """The limit is a property of a connection: it is set anew whenever one begins a transaction."""
        sa.event.listen(engine, "begin", lambda c: c.exec_driver_sql(f"PRAGMA max_page_count = {self.pages or 2**32 - 2}"), insert=True)

    def is_full(self, error: str) -> bool:
        return "database or disk is full" in error


class PostgresStore:
    """A database per case, from a migrated template. Full means a trigger that raises SQLSTATE 53100, as Postgres itself would."""

    name = "postgres"

    def __init__(self, url: str):
        self.admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        self.number = 0
        self.database = ""
        self._run("DROP DATABASE IF EXISTS matrix_template WITH (FORCE)", "CREATE DATABASE matrix_template")
        with ops_database(_settings(Path("."), self._url("matrix_template"))):
            pass

    def _url(self, database: str) -> str:
        return self.admin.url.set(database=database).render_as_string(hide_password=False)

    def _run(self, *statements: str) -> None:
        with self.admin.connect() as connection:
            for statement in statements:
                connection.execute(sa.text(statement))

    def fresh(self, home: Path) -> str:
        home.mkdir(parents=True, exist_ok=True)
        if self.database:
            self._run(f"DROP DATABASE {self.database} WITH (FORCE)")
        self.number += 1
        self.database = f"matrix_{self.number}"
        self._run(f"CREATE DATABASE {self.database} TEMPLATE matrix_template")
        return self._url(self.database)

    def _in_case(self, *statements: str) -> None:
        engine = sa.create_engine(self._url(self.database), poolclass=sa.NullPool)
        with engine.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def fill(self) -> None:
        self._in_case(
            "CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$",
            *(f"CREATE TRIGGER no_room BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION no_room()"
              for table in ("ops_events", "ops_runs_log")),
        )

    def make_room(self) -> None:
        self._in_case("DROP FUNCTION IF EXISTS no_room() CASCADE")

    def watch(self, engine: Engine) -> None:
        pass

    def is_full(self, error: str) -> bool:
        return "No space left on device" in error


Store = SqliteStore | PostgresStore


# -- playing -----------------------------------------------------------------------------------------------------------


def _settings(home: Path, url: str, **more: Any) -> Settings:
    return _same_settings(home, url, tuple(sorted(more.items())))


@lru_cache(maxsize=32)
def _same_settings(home: Path, url: str, more: tuple[tuple[str, Any], ...]) -> Settings:
    """Settings never change, and reading them takes longer than most of a case's steps."""
    return Settings(_env_file=None, home=home, ops_database_url=url, mode="live", **dict(more))


@dataclass(frozen=True)
class Installation:
    """Everything a worker is started with; plain values, so that a process of its own can be started from them."""

    far: str
    home: Path
    url: str
    settings: Mapping[str, Any]
    secrets: Mapping[str, str]
    patience: float

    @contextmanager
    def worker(
        self, clock: Time, run_id: str, saboteur: Saboteur | None = None, watch: Callable[[Engine], None] | None = None,
    ) -> Iterator[Responder]:
        """A responder with an engine and clients of its own, as a new process has them."""
        settings, secrets = _settings(self.home, self.url, **self.settings), Secrets(**self.secrets)
        far = next(far for far in fars() if far.label == self.far)
        open_destination = CONNECT[far.destination](settings, secrets, clock, self.patience)
        with ops_database(settings) as engine:
            if watch:
                watch(engine)
            responder = Responder(
                Lake(settings), engine, settings, run_id, clock=clock, secrets=secrets, destinations=lambda name, mode: open_destination,
                patience=0 if self.patience == QUICK else 5, sleep=lambda seconds: _pass(clock, seconds),
                checkpoint=saboteur.checkpoint if saboteur else _nothing,
            )
            responder.door.load = far.load
            responder._refreshed = lambda row: row  # these lists come from `far`, not from a lake that could change
            yield responder


def _pass(clock: Time, seconds: float) -> None:
    clock.now += timedelta(seconds=seconds)


def _nothing(step: str, row: Row) -> None:
    pass


@dataclass
class Stage:
    """One far side, one database server, and the cases played on them one after another."""

    far: Far
    store: Store
    folder: Path
    pack_home: Path | None = None
    """a home with a pack, for the outbox"""
    pack_day: date | None = None
    clock: Time = field(default_factory=lambda: Time(START))
    number: int = 0

    @property
    def day(self) -> date:
        return self.pack_day if isinstance(self.far, LocalFar) else DAY

    def steps(self, kind: str) -> list[str]:
        """The requests of one fault-free call of this kind."""
        installation, key = self._prepare(kind, PATIENT)
        self.far.journal()
        with installation.worker(self.clock, "journal") as responder:
            row = responder.door.deliver(key)
        assert row["state"] == ledger.SENT, row["last_error"]
        return self.far.journal()

    def kinds(self) -> list[str]:
        return self.far.kinds(_settings(self.folder, "", **self.far.settings), self.clock)

    def play(self, case: Case) -> Outcome:
        """Strikes, lets time pass, brings workers back until nothing is due, and judges. Raises Wrong."""
        hurried = any("timeout" in strike.fault for strike in case.strikes)
        installation, key = self._prepare(case.kind, QUICK if hurried else PATIENT)
        try:
            errors = self._play(case, installation, key)
            self.far.aim({})
            return Outcome(self._judge(installation, key, errors), tuple(errors))
        except Exception as error:
            raise Wrong(f"{case}: {type(error).__name__}: {error}") from error
        finally:
            self.far.aim({})

    def _play(self, case: Case, installation: Installation, key: str) -> list[str]:
        errors: list[str] = []
        saboteur = Saboteur(self.far, case.strikes if case.in_process else (), fill=self.store.fill)
        if FULL[0] in saboteur.full:
            self.store.fill()
        fallen = not case.in_process and self._kill_process(case, installation, key)
        for number in range(ROUNDS):
            saboteur.dead = False
            again = number == 0 or fallen
            if number == 1:  # only the first worker is in a hurry: on a busy machine the others would time out for no fault's sake
                installation = replace(installation, patience=PATIENT)
            fallen = self._round(installation, f"run-{number}", saboteur, key, again, errors, resumed=number > 0)
            self.store.make_room()
            row = self._row(installation, key)
            if not fallen and row["state"] not in ledger.OPEN_STATES:
                break
            due = max(filter(None, (row["not_before"], row["lease_until"], self.clock.now)))
            self.clock.now = due + timedelta(seconds=1)
        if case.column != SEVERAL:
            assert not saboteur.missed(), f"never struck: {saboteur.missed()}"
        if any(strike.fault in FULL for strike in case.strikes):
            assert any(self.store.is_full(error) for error in errors), f"the ledger was never full: {errors}"
        return errors

    def _round(
        self, installation: Installation, run_id: str, saboteur: Saboteur, key: str, again: bool, errors: list[str], *, resumed: bool,
    ) -> bool:
        """One worker's life: the (repeated) run itself, or the follow-up of what is due. True where it did not live to its end."""
        try:
            with wiretapped(saboteur), installation.worker(self.clock, run_id, saboteur, self.store.watch) as responder:
                if again:
                    responder._deliver(ledger.find(responder.engine, key=key)[0])
                    responder.record(self.day, RESUMED if resumed else None)
                else:
                    responder.work()
        except Killed:
            return True
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            return True
        return False

    def _kill_process(self, case: Case, installation: Installation, key: str) -> bool:
        process = forkserver().Process(target=_doomed, args=(installation, key, case.strikes, self.clock.now))
        process.start()
        process.join(60)
        died = process.exitcode == -signal.SIGKILL
        if process.exitcode is None:
            process.kill()
        assert died, f"the worker ended with {process.exitcode} instead of SIGKILL"
        return True

    def _row(self, installation: Installation, key: str) -> Row:
        with ops_database(_settings(installation.home, installation.url)) as engine:
            return self._with_parent(engine, ledger.find(engine, key=key)[0])

    def _with_parent(self, engine: Engine, row: Row) -> Row:
        parent = ledger.find(engine, key=row["parent_key"])[0]["external_id"] if row["parent_key"] else None
        return {**row, "parent_id": parent}

    def _prepare(self, kind: str, patience: float) -> tuple[Installation, str]:
        """A fresh home, database and far side with the action planned and what it builds on sent."""
        self.number += 1
        home = self.folder / f"{self.store.name}-{self.far.label.replace(' ', '-')}-{self.number}"
        if isinstance(self.far, LocalFar):
            shutil.copytree(self.pack_home / "action_packs", home / "action_packs", symlinks=True)
            self.far.home, self.far.day = home, self.day
        shutil.rmtree(self.folder / f"{self.store.name}-{self.far.label.replace(' ', '-')}-{self.number - 1}", ignore_errors=True)
        installation = Installation(
            self.far.label, home, self.store.fresh(home), dict(self.far.settings), dict(self.far.secrets), patience)
        self.clock.now = START + timedelta(days=self.number % 50)
        self.far.reset()
        self.far.aim({})
        with replace(installation, patience=PATIENT).worker(self.clock, "plan") as responder:
            parent = self.far.parents.get(kind)
            parent_key = self._plan(responder, parent, None) if parent else None
            if parent_key:
                assert responder.door.deliver(parent_key)["state"] == ledger.SENT
            return installation, self._plan(responder, kind, parent_key)

    def _plan(self, responder: Responder, kind: str, parent_key: str | None) -> str:
        case = f"{self.store.name} {self.far.label} {self.number}"
        intent = Intent(
            identity=f"matrix:{case}", slot=self.far.slot, destination=self.far.destination, kind=kind,
            target=self.far.target(kind, responder.settings), payload=self.far.payload(kind, case), alert_date=self.day, mode="live",
            parent_key=parent_key,
        )
        with responder.engine.begin() as connection:
            lock_responses(connection)
            return ledger.plan(connection, [intent], self.clock(), "plan", {})[0]

    # -- judging -------------------------------------------------------------------------------------------------------

    def _judge(self, installation: Installation, key: str, errors: Sequence[str]) -> str:
        with ops_database(_settings(installation.home, installation.url, **self.far.settings)) as engine:
            row = self._with_parent(engine, ledger.find(engine, key=key)[0])
            there = self.far.ids(row)
            events = _events(engine, key)
            judge_action(row, there, events)
            judge_log(runs.rows(engine, first=self.day, last=self.day), ledger.find(engine, alert_date=self.day))
            assert runs.first_broken_row(engine) is None, "the log's chain is broken"
        return "once" if row["state"] == ledger.SENT else "held"


def _events(engine: Engine, key: str) -> list[Mapping[str, Any]]:
    with engine.connect() as connection:
        query = sa.select(ops_events).where(ops_events.c.action_key == key).order_by(ops_events.c.id)
        return [dict(event) for event in connection.execute(query).mappings()]


def judge_action(row: Row, there: Sequence[str], events: Sequence[Mapping[str, Any]]) -> None:
    """The promise: exactly once, or held for a person with a reason; and the ledger says what is really there."""
    state, reason = row["state"], row["last_error"]
    assert len(there) <= 1, f"exists {len(there)} times: {there}"
    assert state in (ledger.SENT, *ledger.HELD_STATES), f"still {state} after all this time ({reason})"
    if state == ledger.SENT:
        assert there == [row["external_id"]], f"sent as {row['external_id']}, but there is {there}"
    else:
        assert reason, f"{state} without a reason"
    if state == ledger.FAILED:
        assert not there, f"failed ({reason}), but there is {there}"
    told = [event["detail"] for event in events if event["event"] == ledger.SENDING]
    # our own Dagster is asked what it serves before it is asked to do anything; where it does not say, that was no attempt
    attempts = len(set(told) if row["destination"] == "dagster" else told)
    assert attempts == row["attempts"], f"{row['attempts']} attempts, but the story tells {attempts}"
    assert events[-1]["event"] == state, f"{state}, but the story ends with {events[-1]['event']}"
    assert not any(event["event"] == "duplicate" for event in events), "the story tells of a duplicate"


def judge_log(log: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> None:
    """The newest row of ops_runs_log agrees with the ledger; an earlier one may have been written while things were open."""
    assert log, "ops_runs_log has no row"
    last, held = log[-1], [row for row in rows if row["state"] not in (ledger.SENT, ledger.CANCELLED)]
    assert (last["status"] == "failed") == bool(held), f"the log says {last['status']}, held are {[row['slot'] for row in held]}"
    for row in held:
        assert (row["last_error"] or "")[:200] in last["error_message"], f"the log does not say why: {last['error_message']}"
    for row in rows:
        sent = row["state"] == ledger.SENT and row["destination"] != "local"
        if (row["slot"], row["kind"]) == ("slack", "post"):
            assert last["slack_message_ts"] == (row["external_id"] if sent else None)
        if (row["slot"], row["kind"]) == ("ticket", "create"):
            assert last["ticket_id"] == (row["external_id"] if sent else None)


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Where workers are forked from: a process that has everything imported and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "retention_ops.definitions"])
    before = os.environ.get("PYTHONPATH")
    # Python 3.11 does not hand its own path on to the fork server, which then imports nothing, without a word
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _doomed(installation: Installation, key: str, strikes: Sequence[Strike], now: datetime) -> None:
    """A worker in a process of its own, which ends by SIGKILL."""
    far = LocalFar(label="", slot="", destination="")  # what it aims at is of no interest: only kills strike here
    saboteur = Saboteur(far, strikes, die=lambda: os.kill(os.getpid(), signal.SIGKILL))
    with wiretapped(saboteur), installation.worker(Time(now), "run-doomed", saboteur) as responder:
        responder._deliver(ledger.find(responder.engine, key=key)[0])
        responder.record(DAY, None)


# -- showing -----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Outcomes counted by action and column."""

    cells: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    steps: dict[str, list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, case: Case, result: str) -> None:
        self.cells.setdefault(f"{case.far}.{case.kind}", {}).setdefault(case.column, Counter())[result] += 1

    def total(self) -> Counter[str]:
        return sum((cell for row in self.cells.values() for cell in row.values()), Counter())

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"cells": self.cells, "steps": self.steps, "wrong": self.wrong}))

    def merge(self, path: Path) -> None:
        saved = json.loads(path.read_text())
        for row, columns in saved["cells"].items():
            for column, counts in columns.items():
                self.cells.setdefault(row, {}).setdefault(column, Counter()).update(counts)
        self.steps |= saved["steps"]
        self.wrong += saved["wrong"]

    def rows(self) -> list[str]:
        return sorted(self.cells, key=lambda name: LABELS.index(name.partition(".")[0]) if name.partition(".")[0] in LABELS else 99)

    def markdown(self) -> str:
        """The matrix: one line per action, one column per fault."""
        columns = [column for column in COLUMNS if any(column in row for row in self.cells.values())]
        lines = [f"| action | {' | '.join(columns)} | all |", "|---|" + "---|" * (len(columns) + 1)]
        for name in self.rows():
            row = self.cells[name]
            lines.append(f"| {name} | {' | '.join(_cell(row.get(column)) for column in columns)} | {_cell(sum(row.values(), Counter()))} |")
        totals = [sum((row.get(column, Counter()) for row in self.cells.values()), Counter()) for column in columns]
        lines.append(f"| **all** | {' | '.join(_cell(total) for total in totals)} | {_cell(self.total())} |")
        return "\n".join(lines)


def _cell(counts: Counter[str] | None) -> str:
    """'12 once / 3 held', or a dash where the fault cannot strike."""
    return " / ".join(f"{counts[name]} {name}" for name in ("once", "held", "WRONG") if counts[name]) if counts else "–"


def run(stage: Stage, cases: Iterable[Case], tally: Tally) -> None:
    """Plays cases and counts them; what goes wrong is collected, so that one run shows all of it."""
    for case in cases:
        try:
            tally.add(case, stage.play(case).result)
        except Wrong as wrong:
            tally.add(case, "WRONG")
            tally.wrong.append(str(wrong))


def cases_of(stage: Stage, *, several: int = 4, processes: bool = False, seed: int = 1) -> tuple[dict[str, list[str]], list[Case]]:
    """The steps of each kind, and all cases on this stage."""
    steps = {kind: stage.steps(kind) for kind in stage.kinds()}
    cases: list[Case] = []
    for kind, found in steps.items():
        cases += single_faults(stage.far, kind, stage.store.name, found)
        cases += several_faults(stage.far, kind, stage.store.name, found, several, seed)
        real = list(killed_processes(stage.far, kind, stage.store.name, found)) if processes else []
        cases += random.Random(f"{seed} {stage.far.label} {kind}").sample(real, min(PROCESSES, len(real)))
    return {f"{stage.far.label}.{kind}": found for kind, found in steps.items()}, cases


@contextmanager
def staged(far: Far, store: Store, folder: Path, pack_home: Path | None = None, pack_day: date | None = None) -> Iterator[Stage]:
    """A stage whose far side runs until the block ends."""
    with ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Stage(far, store, folder, pack_home, pack_day)
        far.start(stack, folder, stage.clock)
        yield stage
