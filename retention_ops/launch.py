"""Starts Dagster runs from a command: the instance, one run for a date or a range, and runs a kill left behind."""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import dagster as dg

from retention_ops.definitions import build_defs
from retention_ops.errors import RetentionOpsError, UsageError
from retention_ops.log.dagster_events import BATCH_SIZE, BATCH_VARIABLE
from retention_ops.orchestration import (
    JOB,
    PROCESS_TAG,
    RANGE_END,
    RANGE_START,
    Loop,
    close_killed_runs,
    partitions,
    process_mark,
)
from retention_ops.settings import Settings
from retention_ops.warehouse.files import write_atomic
from retention_ops.warehouse.freshness import KEPT_FOR_EVER
from retention_ops.warehouse.seam import Warehouse

FIRST_SHIPPED = "65ee01a21ecc681cbb1d1fad26ce975aca77b8371f5740a85da75a9e0046598c"
"""the dagster.yaml of homes from before its hash was kept beside it"""


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended; `errors` are messages fit for people, `interrupted` says that a person stopped it."""

    run_id: str
    success: bool
    errors: list[str]
    interrupted: bool = False


def dagster_home(settings: Settings) -> Path:
    """The folder Dagster keeps its own state in, with its dagster.yaml in place."""
    home = (settings.home / "dagster").absolute()
    home.mkdir(parents=True, exist_ok=True)
    _keep_current(home / "dagster.yaml")
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ.setdefault(BATCH_VARIABLE, BATCH_SIZE)
    return home


def _keep_current(target: Path) -> None:
    """Puts the shipped dagster.yaml in place, and a newer one later; a file somebody changed stays as it is."""
    shipped, stamp = (Path(__file__).parent / "dagster.yaml").read_bytes(), target.with_name(".dagster.yaml.sha256")
    if target.exists():
        ours = {stamp.read_text() if stamp.exists() else "", FIRST_SHIPPED}
        found = hashlib.sha256(target.read_bytes()).hexdigest()
        if found not in ours or found == hashlib.sha256(shipped).hexdigest():
            return
    write_atomic(target, shipped)
    write_atomic(stamp, hashlib.sha256(shipped).hexdigest())


def instance(settings: Settings) -> dg.DagsterInstance:
    """The persistent Dagster instance of this home."""
    dagster_home(settings)
    return dg.DagsterInstance.get()


def runs_under_way(stored: dg.DagsterInstance) -> list[str]:
    """Ids of runs that have begun and not ended; those whose command was killed are closed first."""
    close_killed_runs(stored)
    begun = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
    return [run.run_id for run in stored.get_runs(dg.RunsFilter(statuses=begun))]


def check_dates(settings: Settings, lake: Warehouse, first: date, last: date) -> None:
    """Raises UsageError unless every date from `first` to `last` is a partition."""
    if first > last:
        raise UsageError(f"--from {first} is after --to {last}")
    daily = partitions(settings, lake)
    keys = daily.get_first_partition_key(), daily.get_last_partition_key()
    if None in keys:
        raise UsageError(f"no day since {daily.start:%Y-%m-%d} is over yet in {settings.shop_timezone} (setting start_date)")
    start, end = (date.fromisoformat(key) for key in keys)
    if first < start:
        raise UsageError(f"{first} is before the first date {start}; orders start there (setting start_date)")
    if last > end:
        raise UsageError(f"{last} is not over yet in {settings.shop_timezone}; the newest full day is {end}")


def run_dates(loop: Loop, first: date, last: date, stored: dg.DagsterInstance | None = None) -> RunOutcome:
    """Runs the daily loop for one date, or for a range in one run, on this home's Dagster instance or on `stored`."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    check_dates(loop.settings, loop.lake, first, last)
    run_id = str(uuid.uuid4())
    tags = {PROCESS_TAG: process_mark(run_id)}
    dates: dict[str, Any] = {"partition_key": first.isoformat()}
    if last > first:
        dates = {}
        tags |= {RANGE_START: first.isoformat(), RANGE_END: last.isoformat()}
    with _opened(loop.settings, stored) as stored:
        close_killed_runs(stored)
        job = build_defs(loop.settings, loop).resolve_job_def(JOB)
        result = job.execute_in_process(
            instance=stored, raise_on_error=False, run_id=run_id, tags=tags, **dates,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
    errors = [(step, _root(error)) for step, error in _step_errors(result)]
    interrupted = any(error.cls_name in ("DagsterExecutionInterruptedError", "KeyboardInterrupt") for _, error in errors)
    return RunOutcome(result.run_id, result.success, [f"{step}: {_message(error)}" for step, error in errors], interrupted)


def _step_errors(result: dg.ExecuteInProcessResult) -> Iterator[tuple[str, Any]]:
    for event in result.all_events:
        if event.is_step_failure and event.step_failure_data.error:
            yield event.step_key, event.step_failure_data.error


def _root(error: Any) -> Any:
    """What went wrong first, under the layers Dagster puts around it."""
    while error.cause and error.cls_name not in _expected_errors():
        error = error.cause
    return error


def _message(error: Any) -> str:
    # the class name in front says nothing to a user, unless the error is one nobody expected
    known = error.cls_name == "Failure" or error.cls_name in _expected_errors()
    return error.message.strip().partition(": ")[2] if known else error.message.strip()


def _expected_errors(base: type = RetentionOpsError) -> set[str]:
    return {base.__name__} | {name for child in base.__subclasses__() for name in _expected_errors(child)}


def _opened(settings: Settings, stored: dg.DagsterInstance | None) -> AbstractContextManager[dg.DagsterInstance]:
    """The instance somebody has open already, or this home's: opening it costs more than asking it."""
    return nullcontext(stored) if stored else instance(settings)


def materialized_dates(settings: Settings, asset: str, stored: dg.DagsterInstance | None = None) -> set[date]:
    """Dates for which Dagster recorded a materialization of `asset`."""
    with _opened(settings, stored) as stored:
        return {date.fromisoformat(key) for key in stored.get_materialized_partitions(dg.AssetKey(asset))}


def last_run(settings: Settings, stored: dg.DagsterInstance | None = None) -> dict[str, Any] | None:
    """Dates, status and start (UTC) of the newest run, whoever started it; runs whose command was killed are closed first."""
    with _opened(settings, stored) as stored:
        close_killed_runs(stored)
        records = stored.get_run_records(limit=1)
    if not records:
        return None
    run = records[0].dagster_run
    first = run.tags.get(RANGE_START) or run.tags.get("dagster/partition", "")
    last = run.tags.get(RANGE_END, first)
    return {"run_id": run.run_id, "from": first, "to": last, "status": run.status.value.lower(), "started": records[0].create_timestamp}


def mismatches(settings: Settings, lake: Warehouse, stored: dg.DagsterInstance | None = None) -> list[str]:
    """Where the lake and Dagster's events disagree, in sentences; the cure for each is to run those dates again."""
    found = []
    for table in KEPT_FOR_EVER:
        events, files = materialized_dates(settings, table, stored), set(lake.days(table))
        found += [f"{table}: {_span(files - events)} stored, but Dagster recorded no event"] if files - events else []
        found += [f"{table}: {_span(events - files)} recorded, but the file is gone"] if events - files else []
    return found


def _span(days: set[date]) -> str:
    """A set of dates in a few words."""
    ordered = sorted(days)
    if len(ordered) == 1:
        return str(ordered[0])
    whole = len(ordered) == (ordered[-1] - ordered[0]) // timedelta(days=1) + 1
    return f"{len(ordered)} dates {'from' if whole else 'between'} {ordered[0]} {'to' if whole else 'and'} {ordered[-1]}"


