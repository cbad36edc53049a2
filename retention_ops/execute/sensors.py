"""What starts the incident response by itself: one sensor reads every alert, another finishes what was left open, a third looks
whether the installation itself is well.

All only ask for runs. What is sent is decided by the ledger, so a tick, a run or a daemon may die and come again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from datetime import date, datetime, timedelta

import dagster as dg
import sqlalchemy as sa

from retention_ops.execute import incidents, ledger, quiet
from retention_ops.execute.gate import Decision
from retention_ops.execute.job import FOLLOW_UP_JOB, RESPONSE_JOB, follow_up_job, incident_response_job, quiet_morning_job
from retention_ops.execute.respond import Responder
from retention_ops.log import runs
from retention_ops.log.database import answers, ops_runs_log
from retention_ops.metrics import write_metrics
from retention_ops.orchestration import Loop, open_responder, record_ended_runs
from retention_ops.settings import REAL_MODES, TRIAL

BATCH = 100
MAX_DATES = 400
"""dates decided in one tick; the next tick goes on where this one stopped"""
TICK_SECONDS = 30.0
"""a tick may take 60 s before Dagster gives it up"""
GRACE_SECONDS = 60
"""a running response is left alone that long before another run steps in"""
MAX_TRIES = 6
FIRST_ANSWER = timedelta(minutes=10)
"""how long after it was computed a date may be without any answer"""
UNLOGGED = timedelta(minutes=5)
"""how long an answer may be without a row in the log"""
HISTORY = "retention_ops/history"


def identity(decision: Decision, day: date, mode: str) -> str:
    """Names one answer for Dagster's run keys: the alert, the mode, the result and how often it changed."""
    return f"alert:global:{day}:{mode}:{decision.version[:16]}:{decision.seq + 1}"


def requests_for(responder: Responder, days: set[date], storage_id: int) -> Iterator[dg.RunRequest]:
    """One run for each date to act on, oldest first, and one digest run for everything that is history."""
    passed_over: dict[date, Decision] = {}
    for day in sorted(days):
        try:
            answering = responder.on(day)
            decision = answering.gate(day)
        except Exception:  # unreadable, or the event says it was computed, the row is gone: a run that says so, visibly
            yield _request([day], f"missing:{day}:{storage_id}")
            continue
        if decision.verdict in ("history", "covered"):
            passed_over[day] = decision
        elif decision.acts or decision.verdict == "snoozed":
            yield _request([day], identity(decision, day, answering.settings.mode))
    if passed_over:
        mode = responder.settings.mode
        key = ledger.digest([identity(decision, day, mode) for day, decision in passed_over.items()])
        yield _request(list(passed_over), f"history:{key[:32]}", history=True)


def _request(days: list[date], key: str, history: bool = False) -> dg.RunRequest:
    config = dg.RunConfig({"gate": {"config": {"alert_dates": [day.isoformat() for day in days]}}})
    tags = {"dagster/priority": "-1" if history else "10", HISTORY: str(history).lower()}
    return dg.RunRequest(run_key=key, run_config=config, tags=tags, job_name=RESPONSE_JOB)


@dg.sensor(
    job=incident_response_job, minimum_interval_seconds=15, default_status=dg.DefaultSensorStatus.RUNNING,
    description="Reads every alert_logic materialization in the order it was stored and answers flagged dates.",
)
def alert_sensor(context: dg.SensorEvaluationContext, loop: dg.ResourceParam[Loop]) -> dg.SensorResult:
    cursor, end, days = int(context.cursor or 0), time.monotonic() + TICK_SECONDS, set()
    while time.monotonic() < end and len(days) < MAX_DATES:
        found = context.instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=dg.AssetKey("alert_logic"), after_storage_id=cursor), limit=BATCH, ascending=True,
        ).records
        days |= {date.fromisoformat(record.partition_key) for record in found if record.partition_key}
        cursor = found[-1].storage_id if found else cursor
        if len(found) < BATCH:
            break
    with open_responder(loop, "alert_sensor") as responder:
        return dg.SensorResult(run_requests=list(requests_for(responder, days, cursor)), cursor=str(cursor))


@dg.sensor(
    jobs=[follow_up_job, incident_response_job], minimum_interval_seconds=30, default_status=dg.DefaultSensorStatus.RUNNING,
    description="Unknown and waiting actions, missed acknowledgements, and flagged dates whose answer failed or never came.",
)
def follow_up_sensor(context: dg.SensorEvaluationContext, loop: dg.ResourceParam[Loop]) -> dg.SensorResult:
    with open_responder(loop, "follow_up_sensor") as responder:
        return dg.SensorResult(run_requests=[*_due(responder), *_unanswered(responder), *_unlogged(responder)])


def _due(responder: Responder) -> Iterator[dg.RunRequest]:
    """A follow-up run where something is due; asked for again every five minutes while it stays so."""
    now, modes = responder.clock(), _modes(responder)
    waiting = [
        [row["key"], row["attempts"], row["looked_up"]] for row in ledger.due(responder.engine, now, GRACE_SECONDS) if row["mode"] in modes
    ]
    late = [incident["id"] for mode in modes if mode in REAL_MODES for incident in incidents.overdue(responder.engine, mode, now)]
    if waiting or late:
        key = f"{ledger.digest([waiting, late])[:32]}:{int(now.timestamp() // 300)}"
        yield dg.RunRequest(run_key=f"due:{key}", job_name=FOLLOW_UP_JOB, tags={"dagster/priority": "10"})


def _unanswered(responder: Responder) -> Iterator[dg.RunRequest]:
    """Dates that should have an answer by now: a response that failed or died is tried again, later each time, at most six times."""
    if responder.settings.mode not in REAL_MODES:
        return
    for day in responder.gatekeeper.days_in_reach():
        try:
            answering = responder.on(day)
            decision = answering.gate(day)
        except Exception:
            continue  # the alert sensor asked for a run that says so
        if not decision.acts:
            continue
        log = [row for row in runs.rows(responder.engine, first=day, last=day) if row["mode"] == answering.settings.mode]
        tries = sum(row["status"] == "failed" for row in log)
        pause = timedelta(minutes=2**tries) if log else FIRST_ANSWER
        waited = responder.clock() - (log[-1]["run_timestamp"] if log else _computed_at(responder, day))
        if tries >= MAX_TRIES or waited < pause:
            continue
        # a run that died wrote no row: it is asked for again when the pause has doubled, under a key of its own
        again = min(int(math.log2(waited / pause)), MAX_TRIES - 1 - tries)
        yield _request([day], f"{identity(decision, day, answering.settings.mode)}:again:{tries}.{again}")


def _unlogged(responder: Responder) -> Iterator[dg.RunRequest]:
    """One run for all dates whose answer stands, but every run that could have logged it was killed."""
    now, modes = responder.clock(), _modes(responder)
    answered = (
        sa.select(answers.c.alert_date, answers.c.mode, sa.func.max(answers.c.answered_at).label("at")).where(answers.c.mode.in_(modes))
        .group_by(answers.c.alert_date, answers.c.mode).subquery()
    )
    logged = (
        sa.select(ops_runs_log.c.alert_date, ops_runs_log.c.mode, sa.func.max(ops_runs_log.c.run_timestamp).label("at"))
        .where(ops_runs_log.c.mode.in_(modes)).group_by(ops_runs_log.c.alert_date, ops_runs_log.c.mode).subquery()
    )
    query = (
        sa.select(answered.c.alert_date)
        .outerjoin(logged, sa.and_(logged.c.alert_date == answered.c.alert_date, logged.c.mode == answered.c.mode))
        .where(answered.c.at <= now - UNLOGGED, sa.or_(logged.c.at.is_(None), logged.c.at < answered.c.at))
        .order_by(answered.c.alert_date)
    )
    with responder.engine.connect() as connection:
        days = sorted(set(connection.execute(query).scalars()))
    if days:
        key = ledger.digest([responder.settings.mode, *map(str, days)])[:32]
        yield _request(days, f"unlogged:{key}:{int(now.timestamp() // UNLOGGED.total_seconds())}")


def _modes(responder: Responder) -> list[str]:
    """The modes whose answers are looked after: live looks after a rule in its pilot period as well."""
    return ["live", TRIAL] if responder.settings.mode == "live" else [responder.settings.mode]


def _computed_at(responder: Responder, day: date) -> datetime:
    return responder.lake.computed_at("alert_logic", day)


@dg.sensor(
    job=quiet_morning_job, minimum_interval_seconds=60, default_status=dg.DefaultSensorStatus.RUNNING,
    description="Whether the installation is well, and whether a digest or a heartbeat is due; renews the metrics file.",
)
def quiet_sensor(context: dg.SensorEvaluationContext, loop: dg.ResourceParam[Loop]) -> dg.SensorResult:
    with open_responder(loop, "quiet_sensor") as responder:
        record_ended_runs(responder.engine, context.instance, responder.clock)
        todo = quiet.pending(responder)
        try:
            write_metrics(responder.engine, responder.lake, responder.settings, responder.clock)
        except OSError as error:  # a full disk must not keep the data owner from hearing of it
            context.log.warning(f"the metrics file was not renewed: {error}")
        if not todo:
            return dg.SensorResult(run_requests=[])
        # asked for again every five minutes while it stays so: a run that died wrote nothing
        key = f"quiet:{ledger.digest(todo)[:32]}:{int(responder.clock().timestamp() // 300)}"
        return dg.SensorResult(run_requests=[dg.RunRequest(run_key=key, tags={"dagster/priority": "5"})])
