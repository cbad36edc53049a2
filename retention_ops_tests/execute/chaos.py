"""A whole installation under test: a shop, `retention-ops ui` in processes of its own, alerts that keep arriving, and a killer.

Processes are found by RETENTION_OPS_HOME in their environment, so a killer never sees any that do not belong to its test.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import dagster as dg

from retention_ops.definitions import build_defs, build_loop
from retention_ops.detect.compute import workspace
from retention_ops.execute import ledger
from retention_ops.execute.gate import ARMED
from retention_ops.launch import dagster_home
from retention_ops.log.database import ops_database
from retention_ops.orchestration import JOB, RANGE_END, RANGE_START
from retention_ops.settings import Settings
from retention_ops.sources.ingest import ingest
from retention_ops.sources.shop import write_shop
from retention_ops.warehouse.lake import Lake

BEFORE_THE_ALERT = ("customer_days", "base_customers", "retention_snapshot", "churn_detection", "retention_daily", "customer_priority")
UNFINISHED = ("QUEUED", "NOT_STARTED", "STARTING", "STARTED", "CANCELING")
SAID_BY = {
    "daemon": ("dagster._daemon run",), "code server": ("dagster api grpc", "dagster code-server start"),
    "run worker": ("multiprocessing.spawn", "multiprocessing.forkserver"), "main": ("dagster dev",),
}
"""kind of process -> what its command line holds"""


def prepared_home(home: Path, customers: int = 1500, **settings: object) -> tuple[Settings, list[date]]:
    """A shop taken in and the response armed before its dates; returns the settings and the dates that will be flagged, oldest first."""
    given = Settings(_env_file=None, home=home, **settings)
    shop = write_shop(home / "shop", customers=customers)
    for preset, file in (("orders", shop.orders), ("customers", shop.customers)):
        ingest([file], preset, given)
    with ops_database(given) as engine:
        ledger.set_state(engine, ARMED, "2000-01-01", "test", "the shop's dates are in the past", datetime.now(UTC))
    with workspace(Lake(given)) as space:
        for table in ("retention_daily", "alert_logic"):
            space.build_range(table, shop.last_date - timedelta(120), shop.last_date)
        flagged = space.connection.execute("SELECT DISTINCT alert_date FROM alert_logic WHERE alert_flag ORDER BY 1").fetchall()
    return given, [day for day, in flagged]


def materialize(settings: Settings, assets: tuple[str, ...], first: date, last: date) -> None:
    """Materializes assets of a date or range in this process on the home's own Dagster instance, as the UI would in a run."""
    dates = {"partition_key": str(first)} if first == last else {"tags": {RANGE_START: str(first), RANGE_END: str(last)}}
    dagster_home(settings)
    with dg.DagsterInstance.get() as instance:
        job = build_defs(settings, build_loop(settings)).resolve_job_def(JOB)
        job.execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey(name) for name in assets], **dates,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )


@dataclass
class Installation:
    """`retention-ops ui` as a service manager runs it: a command that is started again whenever it ends."""

    home: Path
    port: int
    environment: dict[str, str]
    starts: int = 0
    process: subprocess.Popen | None = None
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Installation:
        self._start()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._keeper.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        for kind in (*SAID_BY, "webserver"):
            for process in self.processes(kind):
                kill(process)

    def _start(self) -> None:
        self.starts += 1
        with open(self.home / "ui.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "retention_ops.cli", "--home", str(self.home), "ui", "--port", str(self.port)],
                stdout=log, stderr=log, start_new_session=True, env=self.all_environment(), cwd=self.home,
            )

    def all_environment(self) -> dict[str, str]:
        return {**os.environ, "RETENTION_OPS_HOME": str(self.home), "NO_COLOR": "1", **self.environment}

    def _keep(self) -> None:
        while not self._stop.wait(0.5):
            if self.process.poll() is not None:
                self._start()

    def processes(self, kind: str) -> list[int]:
        """Ids of this home's processes of one kind, oldest first."""
        words = SAID_BY.get(kind, ("dagster_webserver",))
        return [number for number, line in self._commands() if any(word in line for word in words)]

    def _commands(self) -> Iterator[tuple[int, str]]:
        mine = f"RETENTION_OPS_HOME={self.home}".encode()
        for folder in sorted((entry for entry in os.listdir("/proc") if entry.isdigit()), key=int):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{folder}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if "python" in line and mine in Path(f"/proc/{folder}/environ").read_bytes().split(b"\0"):
                    yield int(folder), line

    def ask(self, query: str, **variables: object) -> dict:
        """The UI's own GraphQL."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/graphql", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            result = json.load(answer)
        assert "errors" not in result, result
        return result["data"]

    def switch_off_schedules(self) -> None:
        """As the UI's switches do: dates come when a test lets them come."""
        nodes = self.ask("{ repositoriesOrError { ... on RepositoryConnection { nodes { schedules { name scheduleState { id } } } } } }")
        for schedule in nodes["repositoriesOrError"]["nodes"][0]["schedules"]:
            stopped = self.ask("mutation($id: String!) { stopRunningSchedule(id: $id) { ... on ScheduleStateResult { scheduleState { "
                               "status } } } }", id=schedule["scheduleState"]["id"])
            assert stopped["stopRunningSchedule"] == {"scheduleState": {"status": "STOPPED"}}, (schedule["name"], stopped)


def kill(process: int) -> bool:
    """Whether it was still there to be killed."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@dataclass
class Killer:
    """Kills `times` processes of an installation at random moments.

    Mostly run workers, as that is where sends happen; sometimes everything at once, as a power cut does, each process counted.
    Every other time it waits for `progress` to grow first: a system that never gets anything done has nothing to do twice.
    """

    installation: Installation
    times: int
    seed: int
    progress: Callable[[], int]
    killed: Counter = field(default_factory=Counter)
    power_cuts: int = 0

    @property
    def done(self) -> int:
        return self.killed.total()

    def run(self, seconds: float) -> None:
        """Until so many are killed, or `seconds` are over."""
        dice, end = random.Random(self.seed), time.monotonic() + seconds
        while self.done < self.times and time.monotonic() < end:
            event = dice.choices(("run worker", "power cut", "daemon", "code server"), (60, 15, 10, 15))[0]
            if dice.random() < 0.5:
                before = self.progress()
                self._until(40, lambda before=before: self.progress() > before)
            if not self._until(20, lambda kind="run worker" if event == "power cut" else event: self.installation.processes(kind)):
                event = dice.choice(("daemon", "code server"))  # all is answered; the next alert waits for the next kill
            # a worker needs 3 s to import its code and some ten to answer
            time.sleep(dice.uniform(0, 12) if event in ("run worker", "power cut") else dice.uniform(1, 9))
            if event == "power cut":
                kinds = ("daemon", "code server", "run worker")
                victims = [(kind, process) for kind in kinds for process in self.installation.processes(kind)]
                self.power_cuts += 1
            else:
                found = self.installation.processes(event)
                victims = [(event, dice.choice(found))] if found else []
            for kind, process in victims[: self.times - self.done]:
                self.killed[kind] += kill(process)

    def _until(self, seconds: float, condition: Callable[[], object]) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.3)
        return False


class Arrivals:
    """A process of its own that materializes alert_logic of one date after another, whatever else is dead."""

    def __init__(self, installation: Installation):
        environment = {**installation.all_environment(), "PYTHONPATH": str(Path(__file__).parents[2])}
        with open(installation.home / "arrivals.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "retention_ops_tests.execute.chaos"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, env=environment, cwd=installation.home,
            )

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def arrive(self, day: date) -> None:
        """Returns once the alert is stored."""
        self._process.stdin.write(f"{day}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline().strip() == str(day), "the alert could not be materialized; see arrivals.log"


if __name__ == "__main__":
    from retention_ops.settings import load_settings

    settings = load_settings()
    for line in sys.stdin:
        day = date.fromisoformat(line.strip())
        materialize(settings, ("alert_logic",), day, day)
        print(day, flush=True)
