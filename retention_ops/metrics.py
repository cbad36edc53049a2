"""The health metrics for a machine: plain numbers for `status --json`, and the same as a Prometheus text file.

Read from the ops database and the version of the orders in force only, so that they can be renewed every minute.
Format: https://prometheus.io/docs/instrumenting/exposition_formats/ (text, version 0.0.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from retention_ops.clock import Clock, shop_day
from retention_ops.execute import health, ledger
from retention_ops.execute.destinations.choice import EVERY_SLOT, HEARTBEAT_SLOT
from retention_ops.execute.door import HALTED
from retention_ops.log.database import actions, health_causes, incidents, loop_runs, ops_events, ops_runs_log
from retention_ops.settings import REAL_MODES, Settings
from retention_ops.warehouse.files import write_atomic
from retention_ops.warehouse.seam import Warehouse

PREFIX = "retention_ops_"
WATCHED_STATES = (ledger.PLANNED, ledger.SENDING, ledger.UNKNOWN, ledger.AWAITING, ledger.NEEDS_HUMAN, ledger.FAILED)
RUN_STATUSES = ("success", "failure", "canceled")
MODES = ("off", "shadow", "pilot", "live")
SEVERITIES = ("WARNING", "CRITICAL")


@dataclass(frozen=True)
class Metric:
    """One metric: `values` are (labels, value); a value that is not known is left out."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    values: tuple[tuple[Mapping[str, str], float], ...]


def metrics(engine: Engine, lake: Warehouse, settings: Settings, clock: Clock) -> list[Metric]:
    """Every metric at this moment."""
    now, orders = clock(), lake.orders()
    halted = ledger.read_state(engine, HALTED)
    with engine.connect() as connection:
        return [
            *_runs(connection),
            *_actions(connection),
            *_alerts(connection),
            *_data(settings, now, orders.complete_through if orders else None),
            *_health(connection),
            Metric("mode", "gauge", "1 for the mode in force", tuple(({"mode": mode}, settings.mode == mode) for mode in MODES)),
            _one("halted", "1 while the kill switch is pulled: nothing leaves", bool(halted and halted["value"] == "yes")),
            _one("looked_timestamp_seconds", "When these numbers were read, Unix time", now.timestamp()),
        ]


def _one(name: str, help_: str, value: float | None, kind: Literal["gauge", "counter"] = "gauge") -> Metric:
    return Metric(name, kind, help_, () if value is None else (({}, value),))


def _by(name: str, kind: Literal["gauge", "counter"], help_: str, label: str, known: Iterable[str], found: Mapping[str, float]) -> Metric:
    """One value for each name that is known, 0 where nothing was counted: a series that appears with its first failure alarms late."""
    return Metric(name, kind, help_, tuple(({label: each}, found.get(each, 0)) for each in known))


def _counts(connection: Connection, query: sa.Select) -> dict[str, int]:
    return dict(connection.execute(query).tuples().all())


def _runs(connection: Connection) -> list[Metric]:
    counts = _counts(connection, sa.select(loop_runs.c.status, sa.func.count()).group_by(loop_runs.c.status))
    last = connection.execute(sa.select(loop_runs).order_by(loop_runs.c.id.desc()).limit(1)).mappings().first()
    answer = connection.execute(
        sa.select(ops_runs_log.c.execution_time_ms).order_by(ops_runs_log.c.position.desc()).limit(1)).scalar()
    seconds = (last["ended_at"] - last["started_at"]).total_seconds() if last and last["started_at"] else None
    return [
        _by("runs_total", "counter", "Runs of the daily loop that ended, by status", "status", RUN_STATUSES, counts),
        _one("last_run_success", "1 if the run of the daily loop that ended last succeeded", last and last["status"] == "success"),
        _one("last_run_end_timestamp_seconds", "When it ended, Unix time", last and last["ended_at"].timestamp()),
        _one("last_run_duration_seconds", "How long it took", seconds),
        _one("last_response_duration_seconds", "How long the newest answer of ops_runs_log took", _thousandth(answer)),
    ]


def _thousandth(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _actions(connection: Connection) -> list[Metric]:
    """Failures are counted from the append-only story, so that a counter never goes back; states are what is now."""
    failures = _counts(connection, (
        sa.select(actions.c.slot, sa.func.count()).join(ops_events, ops_events.c.action_key == actions.c.key)
        .where(ops_events.c.event.in_((ledger.FAILED, ledger.NEEDS_HUMAN)), actions.c.mode.in_(REAL_MODES)).group_by(actions.c.slot)))
    states = _counts(connection, (
        sa.select(actions.c.state, sa.func.count()).where(actions.c.mode.in_(REAL_MODES)).group_by(actions.c.state)))
    return [
        _by("action_failures_total", "counter", "Actions of pilot and live that were refused or came to need a human, by slot "
            "(webhook and sheets are the seed's webhook and export failures)", "slot", EVERY_SLOT, failures),
        _by("actions", "gauge", "Actions of pilot and live that are not done, by state", "state", WATCHED_STATES, states),
    ]


def _alerts(connection: Connection) -> list[Metric]:
    _, flagged, starts = health.alert_starts(connection, health.MONTH_DAYS)
    open_now = _counts(connection, (
        sa.select(incidents.c.severity, sa.func.count()).where(incidents.c.state == "open", incidents.c.mode.in_(REAL_MODES))
        .group_by(incidents.c.severity)))
    return [
        _one("alerts_30_days", "Alerts that began in the newest 30 dates; consecutive flagged dates are one", len(starts)),
        _one("flagged_dates_30_days", "Flagged dates among the newest 30", len(flagged)),
        _by("open_incidents", "gauge", "Open incidents of pilot and live, by severity", "severity", SEVERITIES, open_now),
    ]


def _data(settings: Settings, now: datetime, complete: date | None) -> list[Metric]:
    yesterday = shop_day(now, settings.shop_timezone) - timedelta(days=1)
    return [
        _one("data_age_days", "Days by which orders are behind yesterday in the shop's time zone; 0: they are all in",
             None if complete is None else max((yesterday - complete).days, 0)),
        _one("complete_through_timestamp_seconds", "Midnight UTC of the last date whose orders are all in, Unix time",
             None if complete is None else datetime(complete.year, complete.month, complete.day, tzinfo=UTC).timestamp()),
    ]


def _health(connection: Connection) -> list[Metric]:
    causes = _counts(connection, (
        sa.select(health_causes.c.cause, sa.func.count()).where(health_causes.c.closed_at.is_(None)).group_by(health_causes.c.cause)))
    beat = connection.execute(
        sa.select(sa.func.max(actions.c.alert_date)).where(actions.c.slot == HEARTBEAT_SLOT, actions.c.state == ledger.SENT)).scalar()
    return [
        _by("health_causes_open", "gauge", "Open health causes, by cause; each has a runbook", "cause", health.CAUSES, causes),
        _one("last_heartbeat_date_timestamp_seconds", "Midnight UTC of the newest day whose heartbeat went out, Unix time",
             beat and datetime(beat.year, beat.month, beat.day, tzinfo=UTC).timestamp()),
    ]


# -- the two forms -------------------------------------------------------------------------------------------------------


def as_numbers(found: Iterable[Metric]) -> dict[str, Any]:
    """name -> number, or name -> {label value: number}; None where a number is not known."""
    shown: dict[str, Any] = {}
    for metric in found:
        labelled = {next(iter(labels.values())): _plain(value) for labels, value in metric.values if labels}
        shown[metric.name] = labelled or (_plain(metric.values[0][1]) if metric.values else None)
    return shown


def _plain(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def exposition(found: Iterable[Metric]) -> str:
    """The Prometheus text format; a metric without a value is left out."""
    lines = []
    for metric in found:
        if not metric.values:
            continue
        lines += [f"# HELP {PREFIX}{metric.name} {metric.help}", f"# TYPE {PREFIX}{metric.name} {metric.kind}"]
        lines += [f"{PREFIX}{metric.name}{_labels(labels)} {_plain(value)!r}" for labels, value in metric.values]
    return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    pairs = (f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return "{" + ",".join(pairs) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def metrics_path(settings: Settings) -> Path | None:
    """Where the text file is, or None: a relative path lies in the home."""
    return settings.home / settings.metrics_file if settings.metrics_file else None


def write_metrics(engine: Engine, lake: Warehouse, settings: Settings, clock: Clock) -> Path | None:
    """Renews the text file in one step, so that a collector reads the old one or the new one; None where none is wanted.

    It is readable by everybody: the collector is another user, and there is nothing in it but counts.
    """
    path = metrics_path(settings)
    if path:
        write_atomic(path, exposition(metrics(engine, lake, settings, clock)), mode=0o644)
    return path
