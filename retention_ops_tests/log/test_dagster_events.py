"""Events stored together are the events Dagster's own class stores one by one, for every reader."""

import sqlite3
from datetime import date, timedelta
from pathlib import Path

import dagster as dg
import pytest

from retention_ops.log.dagster_events import BATCH_VARIABLE, BatchedSqliteEventLogStorage
from retention_ops.orchestration import RANGE_END, RANGE_START

DAYS = [date(2024, 1, 1) + timedelta(number) for number in range(12)]
PARTITIONS = dg.DailyPartitionsDefinition(DAYS[0].isoformat())
OURS = "event_log_storage:\n  module: retention_ops.log.dagster_events\n  class: BatchedSqliteEventLogStorage\n"


WHOLE = dg.AssetCheckSpec("whole", asset="facts")


@dg.asset(partitions_def=PARTITIONS, backfill_policy=dg.BackfillPolicy.single_run(), check_specs=[WHOLE])
def facts(context: dg.AssetExecutionContext):
    for number, day in enumerate(context.partition_keys):
        context.add_asset_metadata({"rows": number}, partition_key=day)
    yield dg.MaterializeResult(check_results=[dg.AssetCheckResult(passed=True, check_name="whole")])


@dg.asset(partitions_def=PARTITIONS, backfill_policy=dg.BackfillPolicy.single_run(), deps=[facts])
def status(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    if context.run.tags.get("break"):
        raise dg.Failure("planned, never made")
    return dg.MaterializeResult(metadata={"rows": 1}, tags={"make": "a"})


def run(instance: dg.DagsterInstance, **tags: str) -> str:
    ranged = {RANGE_START: DAYS[0].isoformat(), RANGE_END: DAYS[-1].isoformat(), **tags}
    return dg.materialize([facts, status], instance=instance, tags=ranged, raise_on_error=False).run_id


def open_instance(home: Path, batches: bool, monkeypatch: pytest.MonkeyPatch) -> dg.DagsterInstance:
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    (monkeypatch.setenv(BATCH_VARIABLE, "5") if batches else monkeypatch.delenv(BATCH_VARIABLE, raising=False))
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n" + (OURS if batches else ""))
    return dg.DagsterInstance.from_config(str(home))


def told(instance: dg.DagsterInstance, runs: list[str]) -> dict:
    """Everything a reader asks an event log for, without what differs from run to run."""
    answers = {}
    for key in ("facts", "status"):
        asset = dg.AssetKey(key)
        made = instance.fetch_materializations(dg.AssetRecordsFilter(asset_key=asset), limit=500, ascending=True).records
        planned = instance.fetch_planned_materializations(asset, limit=500, ascending=True).records
        ids = [record.storage_id for record in made]
        record = instance.get_asset_records([asset])[0].asset_entry
        answers[key] = {
            "made": [(runs.index(r.run_id), r.partition_key, r.asset_materialization.metadata["rows"].value) for r in made],
            "in order": ids == sorted(set(ids)),
            "planned": [(runs.index(r.run_id), r.partition_key) for r in planned],
            "partitions": sorted(instance.get_materialized_partitions(asset)),
            "latest": (record.last_materialization.dagster_event.partition, runs.index(record.last_run_id)),
            "tags": instance.get_event_tags_for_asset(asset, filter_tags={"make": "a"}) != [],
        }
    answers["events of the runs"] = [
        [(entry.dagster_event_type, entry.dagster_event.partition) for entry in instance.all_logs(run) if entry.is_dagster_event]
        for run in runs
    ]
    return answers


@pytest.mark.slow
def test_every_reader_is_told_the_same(tmp_path, monkeypatch):
    heard = []
    for batches in (False, True):
        with open_instance(tmp_path / str(batches), batches, monkeypatch) as instance:
            assert isinstance(instance.event_log_storage, BatchedSqliteEventLogStorage) is batches
            runs = [run(instance), run(instance, **{"break": "yes"}), run(instance)]
            heard.append(told(instance, runs))
    assert heard[0] == heard[1]
    assert len(heard[1]["status"]["made"]) == 2 * len(DAYS) and heard[1]["status"]["in order"]


def test_the_batches_really_are_single_statements(tmp_path, monkeypatch):
    """Otherwise the class above could be skipped without anybody noticing: Dagster falls back to one by one in silence."""
    statements = []
    with open_instance(tmp_path, True, monkeypatch) as instance:
        storage = instance.event_log_storage
        prepare = storage.prepare_insert_event_batch
        monkeypatch.setattr(storage, "prepare_insert_event_batch", lambda events: statements.append(len(events)) or prepare(events))
        run(instance)
    # 12 days in batches of 5 at most, for the plan of both assets together and for each asset's own events
    assert sum(statements) >= 2 * len(DAYS) and max(statements) == 5


def test_what_the_library_wrote_is_read_and_what_is_written_here_the_library_reads(tmp_path, monkeypatch):
    with open_instance(tmp_path, False, monkeypatch) as instance:
        first = run(instance)
    with open_instance(tmp_path, True, monkeypatch) as instance:
        runs = [first, run(instance)]
        mixed = told(instance, runs)
    with open_instance(tmp_path, False, monkeypatch) as instance:
        assert told(instance, runs) == mixed
    assert len(mixed["facts"]["made"]) == 2 * len(DAYS)


def test_a_batch_that_fails_is_stored_one_by_one(tmp_path, monkeypatch, capsys):
    def locked(events):
        raise sqlite3.OperationalError("database is locked")

    with open_instance(tmp_path, True, monkeypatch) as instance:
        monkeypatch.setattr(instance.event_log_storage, "prepare_insert_event_batch", locked)
        answers = told(instance, [run(instance)])
    assert len(answers["facts"]["made"]) == len(DAYS) and "Falling back" in capsys.readouterr().err
