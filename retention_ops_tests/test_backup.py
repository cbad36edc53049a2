"""A backup is a picture of one moment, whole or absent; a restore puts it in place whole or not at all, and holds the ledger."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tarfile
import threading
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from retention_ops.backup import back_up, opened, restore
from retention_ops.detect.verdict import FILE as VERDICT
from retention_ops.errors import NewerSchema, RetentionOpsError
from retention_ops.execute import health, hold, ledger
from retention_ops.log import forgotten, runs, settings_history
from retention_ops.log.database import metadata, ops_database
from retention_ops.settings import Settings
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.execute.stage import DAY, Stage, intent, postgres_url, staged, template  # noqa: F401

NOW = datetime(2024, 2, 20, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=5)


def later():
    return LATER


def rows_of(engine) -> dict[str, list]:
    with engine.connect() as connection:
        return {table.name: sorted(map(repr, connection.execute(sa.select(table)).all())) for table in metadata.sorted_tables
                if table.name not in ("response_state", "ops_events")}


@pytest.fixture(scope="module")
def saved(template, tmp_path_factory):  # noqa: F811
    """A stage that answered its day, and its backup; both are only read."""
    folder = tmp_path_factory.mktemp("saved")
    with staged(template, folder) as made:
        made.answer(DAY)
        yield made, back_up(made.settings, folder / "backups", clock=lambda: NOW)


def copied(old: Stage, tmp_path) -> Settings:
    """The same home once more, to be replaced."""
    shutil.copytree(old.home, tmp_path / "home", symlinks=True)
    return old.settings.model_copy(update={"home": tmp_path / "home"})


def new_home(tmp_path, old: Stage, name: str = "new") -> Settings:
    return old.settings.model_copy(update={"home": tmp_path / name})


def test_a_backup_is_one_private_file_whose_files_are_as_its_manifest_says(saved):
    _, made = saved
    assert made.file.name == "retention-ops-backup-20240220T120000Z.tar"
    assert stat.S_IMODE(made.file.stat().st_mode) == 0o600
    with opened(made.file) as (tar, manifest):
        names = [entry.name for entry in tar.getmembers()]
    assert sorted(names) == sorted(["manifest.json", *manifest["files"]])
    assert {"ops/actions.jsonl", "ops/ops_runs_log.jsonl", "lake/orders/CURRENT", f"lake/alert_logic/day={DAY}/part-0.parquet",
            "settings.json"} <= set(names)
    assert [path for path in made.file.parent.iterdir() if path != made.file] == []


def test_a_restored_home_has_every_row_and_the_same_orders_and_is_held(saved, tmp_path):
    old, made = saved
    settings = new_home(tmp_path, old)
    done = restore(made.file, settings, clock=later)
    assert done.moved is None and done.differs == {}
    with ops_database(settings) as engine:
        assert rows_of(engine) == rows_of(old.engine)
        assert runs.first_broken_row(engine) is None
        assert "held at shadow" in hold.why_held(engine)
        with engine.connect() as connection:
            found = hold.restored(connection)
    assert (found.backup_at, found.restored_at, found.reconciled_at) == (NOW, LATER, None)
    lake = Lake(settings)
    assert lake.orders() == old.lake.orders().__class__(**{**vars(old.lake.orders()), "path": lake.orders().path})
    assert lake.orders().path.read_bytes() == old.lake.orders().path.read_bytes()
    assert lake.read("alert_logic", DAY).equals(old.lake.read("alert_logic", DAY))


def test_every_table_of_the_ops_database_and_the_verdict_of_a_model_are_in_it(tmp_path):
    settings = Settings(_env_file=None, home=tmp_path / "home")
    row = {"run_id": "r1", "first_date": DAY, "last_date": DAY, "status": "success", "started_at": None, "ended_at": NOW}
    with ops_database(settings) as engine:
        health.record_runs(engine, [row], later)
        health.record_source_check(engine, DAY, False, [{"date": str(DAY), "orders_here": 1, "orders_there": 2}], later)
        settings_history.record(engine, settings, NOW)
        forgotten.begin(engine, ["a" * 64], "f" * 64, NOW, ["a mail somebody kept"])
        before = rows_of(engine)
    (settings.home / VERDICT).write_text('{"model": 1, "beats_table": true}')
    made = back_up(settings, tmp_path / "b.tar", clock=lambda: NOW)
    assert set(made.manifest["rows"]) == {table.name for table in metadata.sorted_tables}
    again = settings.model_copy(update={"home": tmp_path / "again"})
    restore(made.file, again, clock=later)
    with ops_database(again) as engine:
        assert rows_of(engine) == before and all(before[name] for name in ("loop_runs", "source_checks", "settings_history", "erasures"))
    assert (again.home / VERDICT).read_bytes() == (settings.home / VERDICT).read_bytes(), "rebuilt dates decide as they did"


def test_no_secret_is_in_a_backup(saved, tmp_path):
    settings = saved[0].settings.model_copy(update={"dashboard_url": "https://ada:canary-one@dashboard.invalid/"})
    made = back_up(settings, tmp_path / "b.tar", clock=lambda: NOW)
    assert b"canary-one" not in made.file.read_bytes()
    with_password = settings.model_copy(update={"ops_database_url": "postgresql+psycopg://u:canary-two@nowhere.invalid/x"})
    assert "canary-two" not in json.dumps(with_password.recorded())
    bucket = settings.model_copy(update={"source_path": "s3://AKIA:canary/three@shop/exports?secret_key=canary-four"})
    assert bucket.recorded()["source_path"] == "s3://***@shop/exports"


def test_a_damaged_backup_changes_nothing(saved, tmp_path):
    old, made = saved
    content = bytearray(made.file.read_bytes())
    content[len(content) // 2] ^= 1
    broken = tmp_path / "broken.tar"
    for damaged in (bytes(content), bytes(content[: len(content) // 2]), b"", b"nothing of the kind" * 1000):
        broken.write_bytes(damaged)
        with pytest.raises(RetentionOpsError, match="no backup of retention-ops"):
            restore(broken, new_home(tmp_path, old))
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("step", ["_new_home", "_into_database", "_fsync_all", "_swap"])
def test_what_goes_wrong_after_a_backup_was_proven_is_not_said_of_the_backup(saved, tmp_path, monkeypatch, step):
    from retention_ops import backup

    old, made = saved
    settings, real = copied(old, tmp_path), getattr(backup, step)

    def fail(*args):
        real(*args)
        raise KeyError("a fault of this program")

    monkeypatch.setattr(backup, step, fail)
    with pytest.raises(KeyError, match="a fault of this program"):
        restore(made.file, settings, force=True, clock=later)
    assert bool(list(tmp_path.glob("home.before-restore-*"))) == (step == "_swap")


def test_a_manifest_that_lacks_what_a_restore_needs_is_no_backup(saved, tmp_path):
    old, made = saved
    with opened(made.file) as (_, manifest):
        files = {name: entry for name, entry in manifest["files"].items() if name != "settings.json"}
    _rewritten(made.file, tmp_path / "cut.tar", {"files": files})
    with pytest.raises(RetentionOpsError, match=r"lacks settings\.json.*nothing was changed"):
        restore(tmp_path / "cut.tar", new_home(tmp_path, old))
    assert not (tmp_path / "new").exists()


def test_a_home_that_holds_something_is_moved_aside_only_by_force(saved, tmp_path):
    old, made = saved
    settings, before = copied(old, tmp_path), old.lake.orders()
    with pytest.raises(RetentionOpsError, match="is not empty"):
        restore(made.file, settings)
    done = restore(made.file, settings, force=True, clock=later)
    assert done.moved.name == "home.before-restore-20240220T170000" and (done.moved / "ops.sqlite").is_file()
    assert Lake(settings).orders().version == before.version


def test_a_backup_of_a_newer_release_is_refused(saved, tmp_path):
    old, made = saved
    for change in ({"ops_schema": "9999"}, {"lake_schema": 99}, {"format": 99}):
        newer = tmp_path / "newer.tar"
        _rewritten(made.file, newer, change)
        with pytest.raises(NewerSchema):
            restore(newer, new_home(tmp_path, old))
        assert not (tmp_path / "new").exists()


def _rewritten(file, to, change) -> None:
    """The backup with another manifest."""
    import io

    with tarfile.open(file) as source, tarfile.open(to, "w") as target:
        for entry in source.getmembers():
            content = source.extractfile(entry).read()
            if entry.name == "manifest.json":
                content = json.dumps({**json.loads(content), **change}).encode()
                entry.size = len(content)
            target.addfile(entry, io.BytesIO(content))


def test_a_backup_names_files_inside_the_home_only(saved, tmp_path):
    old, made = saved
    with opened(made.file) as (_, manifest):
        files = {**manifest["files"], "../outside": {"sha256": "0", "bytes": 0}}
    _rewritten(made.file, tmp_path / "evil.tar", {"files": files})
    with pytest.raises(RetentionOpsError, match="outside"):
        restore(tmp_path / "evil.tar", new_home(tmp_path, old))


def test_an_older_ops_database_is_restored_and_brought_up_to_date(tmp_path):
    """What the release before wrote: the schema of then, without the newest columns."""
    from retention_ops.log.database import HEAD, migrate, open_engine, revision

    old = Settings(_env_file=None, home=tmp_path / "old")
    engine = open_engine(old)
    with engine.begin() as connection:
        migrate(connection, "0003")
        connection.execute(sa.text("INSERT INTO response_state (name, value, \"by\", why, at) VALUES "
                                   "('armed', '2024-02-01', 'x', 'y', '2024-02-01 00:00:00.000000')"))
    engine.dispose()
    made = back_up(old, tmp_path / "old.tar", clock=lambda: NOW)
    assert made.manifest["ops_schema"] == "0003"
    settings = Settings(_env_file=None, home=tmp_path / "new")
    restore(made.file, settings, clock=later)
    with ops_database(settings) as engine:
        assert revision(engine) == HEAD and ledger.read_state(engine, "armed")["value"] == "2024-02-01"


def test_a_backup_taken_while_others_write_is_one_moment(tmp_path):
    """Each transaction writes an action with its reservation and its event: a torn picture would have one without the others."""
    settings = Settings(_env_file=None, home=tmp_path / "home")
    stop, errors = threading.Event(), []
    with ops_database(settings) as engine:

        def write(number: int) -> None:
            try:
                count = 0
                while not stop.is_set():
                    with engine.begin() as connection:
                        ledger.plan(connection, [intent(identity=f"{number}-{count}")], NOW, "test", {})
                    count += 1
            except Exception as error:
                errors.append(error)

        writers = [threading.Thread(target=write, args=(number,)) for number in range(2)]
        for writer in writers:
            writer.start()
        try:
            for attempt in range(5):
                made = back_up(settings, tmp_path / f"{attempt}.tar", clock=lambda: NOW)
                counts = made.manifest["rows"]
                assert counts["actions"] == counts["reservations"] == counts["ops_events"]
        finally:
            stop.set()
            for writer in writers:
                writer.join()
    assert errors == [] and counts["actions"] > 0


KILLED = """
import os, signal, sys
from pathlib import Path
import retention_ops.backup as backup
from retention_ops.settings import Settings
where, file, home = sys.argv[1:]
def die(*_a, **_k): os.kill(os.getpid(), signal.SIGKILL)
if where == "after rename":
    backup.Lake = die
elif where == "between the renames":
    real = os.rename
    def rename(a, b):
        real(a, b) if str(b) != home else die()  # a move of a folder within the scratch is a rename too
    backup.os.rename = rename
else:
    setattr(backup, where, die)
backup.restore(Path(file), Settings(_env_file=None, home=Path(home)), force=True)
"""


@pytest.mark.parametrize("where", [
    *(pytest.param(step, marks=pytest.mark.slow) for step in ("_new_home", "_fsync_all", "_swap", "after rename")),
    "_into_database", "between the renames",
])
def test_a_restore_killed_at_any_step_leaves_the_old_home_or_the_new_one_and_goes_on(saved, tmp_path, where):
    old, made = saved
    settings = copied(old, tmp_path)
    home = settings.home
    code = subprocess.run([sys.executable, "-c", KILLED, where, str(made.file), str(home)]).returncode
    assert code == -signal.SIGKILL
    assert home.exists() == (where != "between the renames")
    if home.exists():
        with sqlite3.connect(home / "ops.sqlite") as connection:
            held = connection.execute("SELECT count(*) FROM response_state WHERE name = 'restored'").fetchone()[0]
        assert held == (where == "after rename")
        assert (home / "lake" / "orders" / "CURRENT").is_file()
    restore(made.file, settings, force=True, clock=later)
    assert Lake(settings).orders() is not None
    with ops_database(settings) as engine:
        assert len(ledger.find(engine)) > 0 and hold.why_held(engine)
    assert [name for name in os.listdir(home.parent) if "restoring" in name] == []


def test_from_sqlite_into_postgres_and_back(saved, tmp_path, postgres_url):  # noqa: F811
    """Whichever database: the rows are the same, new ones get new numbers, and what was there is moved aside."""
    old, made = saved
    admin = sa.create_engine(postgres_url)
    with admin.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    settings = new_home(tmp_path, old, "pg").model_copy(update={"ops_database_url": postgres_url})
    with ops_database(settings) as engine:
        ledger.set_state(engine, "armed", "2000-01-01", "x", "a database in use", NOW)
    with pytest.raises(RetentionOpsError, match="is not empty"):
        restore(made.file, settings, clock=later)
    restore(made.file, settings, force=True, clock=later)
    with ops_database(settings) as engine:
        assert rows_of(engine) == rows_of(old.engine)
        assert ledger.read_state(engine, "armed")["value"] != "2000-01-01"
        ledger.set_state(engine, "halted", "no", "x", "a new event gets a new number", NOW)
    with admin.connect() as connection:
        moved = connection.execute(sa.text("SELECT value FROM before_restore_20240220t170000.response_state")).scalars().all()
    assert moved == ["2000-01-01"]
    again = back_up(settings, tmp_path / "again.tar", clock=lambda: NOW)
    sqlite = new_home(tmp_path, old, "back")
    restore(again.file, sqlite, clock=later)
    with ops_database(sqlite) as engine:
        assert rows_of(engine) == rows_of(old.engine)
    admin.dispose()


def test_a_postgres_restore_killed_between_database_and_home_goes_on(saved, tmp_path, postgres_url, monkeypatch):  # noqa: F811
    old, made = saved
    admin = sa.create_engine(postgres_url)
    with admin.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    admin.dispose()
    settings = new_home(tmp_path, old, "pg").model_copy(update={"ops_database_url": postgres_url})

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr("retention_ops.backup._swap", die)
    with pytest.raises(Killed):
        restore(made.file, settings, clock=later)
    assert not settings.home.exists()
    monkeypatch.undo()
    restore(made.file, settings, clock=later)
    with ops_database(settings) as engine:
        assert rows_of(engine) == rows_of(old.engine)
    assert Lake(settings).orders() is not None
