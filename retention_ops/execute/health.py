"""Is the installation itself well? What the data owner must know, told once when it begins and once when it ends.

    look ──found, not open──> opened (told once)      open ──found no more──> closed (told once, to whom the opening was told)

A cause is a row of health_causes. It is about the installation, so it opens and closes in every mode; what is told about it is an
action of the ledger, of one mode, like any message: nothing in `off`, into the outbox in `shadow`. Looking reads the ops database
and the version of the orders in force, and no table of the warehouse: it may be done every minute, on BigQuery too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from retention_ops.clock import Clock, system_clock
from retention_ops.execute import ledger, wording
from retention_ops.execute.destinations.choice import HEALTH_SLOT, chosen, target_of
from retention_ops.execute.ledger import Intent
from retention_ops.log import runs
from retention_ops.log.database import actions, health_causes, lock_responses, loop_runs, ops_runs_log, response_state, source_checks
from retention_ops.log.exposures import insert_once
from retention_ops.settings import REAL_MODES, TRIAL, Settings
from retention_ops.warehouse.freshness import Changes
from retention_ops.warehouse.seam import Warehouse

RUN_FAILED, DATA_LATE, SOURCE_OFF = "run_failed", "data_late", "source_check_off"
NEEDS_HUMAN, TOO_MANY, NONE_AT_ALL = "action_needs_human", "too_many_alerts", "no_alerts"
CAUSES = (RUN_FAILED, DATA_LATE, SOURCE_OFF, NEEDS_HUMAN, TOO_MANY, NONE_AT_ALL)
"""each has a page in docs/runbooks"""
FAILED_RUN_DAYS = 7
"""a run that failed longer ago is history, as an alert of that age is"""
WAITS_FOR_A_PERSON = timedelta(hours=1)
MONTH_DAYS, MOST_ALERTS = 30, 5
SILENT_DAYS = 60
AWAITED = "first orders awaited"
"""since when a source is set that has not given any order yet"""
APART_DAYS = 3
"""flagged dates with fewer calm days between them are one alert, as an incident ends with its third calm day"""

Row = dict[str, Any]


@dataclass(frozen=True)
class Cause:
    """Something that is not well now. `subject` tells two of a kind apart: an alert date, or nothing; `detail` is one sentence."""

    cause: str
    detail: str
    subject: str = ""

    @property
    def key(self) -> str:
        return f"{self.cause}:{self.subject}" if self.subject else self.cause


# -- facts that others write down ----------------------------------------------------------------------------------------


def record_source_check(
    engine: Engine, day: date, ok: bool, differences: Sequence[Mapping[str, Any]], clock: Clock = system_clock,
) -> None:
    """What `source check` found: the orders up to `day` agree with the source, or how they differ.

    `differences` are plain values by date, such as {'date': '2026-06-29', 'orders_here': 410, 'orders_there': 412, 'cents_here': …,
    'cents_there': …}: counts and sums, never an order or a customer. The newest check says whether the source is off.
    """
    with engine.begin() as connection:
        connection.execute(source_checks.insert().values(
            day=day, ok=ok, differences=[dict(difference) for difference in differences], checked_at=clock(),
        ))


def newest_source_check(engine: Engine) -> Row | None:
    """What the newest check of the source found."""
    with engine.connect() as connection:
        return _newest_check(connection)


def _newest_check(connection: Connection) -> Row | None:
    row = connection.execute(sa.select(source_checks).order_by(source_checks.c.id.desc()).limit(1)).mappings().first()
    return dict(row) if row else None


def record_runs(engine: Engine, ended: Iterable[Mapping[str, Any]], clock: Clock = system_clock) -> int:
    """Writes down runs of the daily loop that ended ({'run_id', 'first_date', 'last_date', 'status', 'started_at', 'ended_at'}), in the
    order of their ends; a run that is known stays as it is. Returns how many were new."""
    now = clock()
    rows = [{**run, "seen_at": now} for run in sorted(ended, key=lambda run: run["ended_at"])]
    if not rows:
        return 0
    with engine.begin() as connection:
        lock_responses(connection)
        known = set(connection.execute(
            sa.select(loop_runs.c.run_id).where(loop_runs.c.run_id.in_([row["run_id"] for row in rows]))).scalars())
        new = [row for row in rows if row["run_id"] not in known]
        if new:
            connection.execute(insert_once(connection, loop_runs), new)
    return len(new)


def newest_run(engine: Engine) -> Row | None:
    """The run of the daily loop that ended last."""
    with engine.connect() as connection:
        row = connection.execute(sa.select(loop_runs).order_by(loop_runs.c.id.desc()).limit(1)).mappings().first()
    return dict(row) if row else None


# -- looking -------------------------------------------------------------------------------------------------------------


def look(engine: Engine, lake: Warehouse, settings: Settings, clock: Clock) -> list[Cause]:
    """Everything that is not well at this moment, in the order of CAUSES. Changes nothing."""
    with engine.connect() as connection:
        return list(found(connection, lake, settings, clock()))


def found(connection: Connection, lake: Warehouse, settings: Settings, now: datetime) -> Iterator[Cause]:
    """The same inside a transaction."""
    yield from _failed_run(connection, now)
    yield from _late_data(connection, lake, settings, now)
    yield from _source_off(connection, settings)
    yield from _waiting_actions(connection, now)
    yield from _alert_frequency(connection, lake, settings)


def expected_through(settings: Settings, now: datetime) -> date:
    """The date through which orders must be complete by now: yesterday from `data_deadline` on, before it the day before."""
    local = now.astimezone(ZoneInfo(settings.shop_timezone))
    due = local.timetz().replace(tzinfo=None) >= time.fromisoformat(settings.data_deadline)
    return local.date() - timedelta(days=1 if due else 2)


def good_day(connection: Connection, lake: Warehouse, day: date) -> bool:
    """Whether D's orders were all in, the newest run of D succeeded, and D was computed from them: orders that came after an incomplete
    day was computed make it good only when it is computed again."""
    orders = lake.orders()
    if orders is None or orders.complete_through < day:
        return False
    newest = connection.execute(
        sa.select(loop_runs.c.status).where(loop_runs.c.first_date <= day, loop_runs.c.last_date >= day)
        .order_by(loop_runs.c.id.desc()).limit(1)
    ).scalar()
    return newest == "success" and lake.exists("alert_logic", day) and not Changes(lake).since(
        lake.provenance("alert_logic", day).get("orders_version", ""), day)


def _failed_run(connection: Connection, now: datetime) -> Iterator[Cause]:
    """A run of the last days that failed and whose dates no later run brought to a good end.

    Where only the response failed, its own log says whether it succeeded since: the sensor tries again outside the daily run.
    """
    since = now - timedelta(days=FAILED_RUN_DAYS)
    recent = connection.execute(sa.select(loop_runs).where(loop_runs.c.seen_at > since).order_by(loop_runs.c.id)).mappings().all()
    log = connection.execute(
        sa.select(ops_runs_log).where(ops_runs_log.c.run_timestamp > since).order_by(ops_runs_log.c.position)).mappings().all()
    answered_badly = {row["run_id"] for row in log if row["status"] == "failed"}
    sentences = []
    for row in recent:
        if row["status"] == "failure" and row["first_date"] and row["run_id"] not in answered_badly:
            later = [each for each in recent if each["status"] == "success" and each["id"] > row["id"] and each["first_date"]]
            if not _covered(row, later):
                sentences.append(f"The run for {_span(row['first_date'], row['last_date'])} failed (run {row['run_id'][:8]}).")
    failed = runs.failed_dates([dict(row) for row in log])
    if failed:
        days = f"{failed[-1]}" + (f" and {len(failed) - 1} more" if len(failed) > 1 else "")
        sentences.append(f"The response for {days} failed.")
    if sentences:
        yield Cause(RUN_FAILED, sentences[-1] if len(sentences) == 1 else f"{sentences[-1]} {len(sentences) - 1} before it.")


def _covered(run: Mapping[str, Any], later: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each date of `run` is a date of one of the others."""
    day = run["first_date"]
    while day <= run["last_date"]:
        over = [each["last_date"] for each in later if each["first_date"] <= day <= each["last_date"]]
        if not over:
            return False
        day = max(over) + timedelta(days=1)
    return True


def _span(first: date, last: date) -> str:
    return f"{first}" if first == last else f"{first} to {last}"


def _late_data(connection: Connection, lake: Warehouse, settings: Settings, now: datetime) -> Iterator[Cause]:
    """A home without orders is just new, unless a source is set and a deadline has passed since somebody first looked."""
    orders, due = lake.orders(), expected_through(settings, now)
    when = f"those of {due} were due by {settings.data_deadline} {settings.shop_timezone}."
    if orders is not None and orders.complete_through < due:
        yield Cause(DATA_LATE, f"Orders are complete through {orders.complete_through}; {when}")
    elif orders is None and settings.source:
        since = _awaited_since(connection)
        if since and due > expected_through(settings, since):
            yield Cause(DATA_LATE, f"The source has not given any orders yet; {when}")


def _awaited_since(connection: Connection) -> datetime | None:
    return connection.execute(sa.select(response_state.c.at).filter_by(name=AWAITED)).scalar()


def _await_first_orders(connection: Connection, lake: Warehouse, settings: Settings, now: datetime, actor: str) -> list[str]:
    """Notes since when they are awaited, so that a source that is broken from its first day is told of."""
    known, awaited = _awaited_since(connection) is not None, bool(settings.source) and lake.orders() is None
    if known == awaited:
        return []
    if known:
        connection.execute(response_state.delete().filter_by(name=AWAITED))
        return ["the first orders are awaited no more"]
    connection.execute(insert_once(connection, response_state).values(
        name=AWAITED, value="yes", by=actor, why="a source is set and has given no orders yet", at=now))
    return ["the first orders are awaited"]


def _source_off(connection: Connection, settings: Settings) -> Iterator[Cause]:
    row = _newest_check(connection)
    if row and not row["ok"] and settings.source:  # who went back to files has nothing left to agree with
        yield Cause(SOURCE_OFF, f"The orders here differ from the source on {len(row['differences']) or 'some'} "
                                f"{'date' if len(row['differences']) == 1 else 'dates'} up to {row['day']}.")


def _waiting_actions(connection: Connection, now: datetime) -> Iterator[Cause]:
    """One cause for each alert date: another morning's action is another matter. A list that waits for its approval waits for a person as
    well. What health itself could not tell is not counted: it would be told by the same way."""
    asks = sa.func.sum(sa.case((actions.c.state == ledger.AWAITING, 1), else_=0))
    query = (
        sa.select(actions.c.alert_date, sa.func.count(), asks, sa.func.min(actions.c.key))
        .where(actions.c.state.in_((ledger.NEEDS_HUMAN, ledger.AWAITING)), actions.c.mode.in_(REAL_MODES), actions.c.slot != HEALTH_SLOT,
               actions.c.updated_at <= now - WAITS_FOR_A_PERSON)
        .group_by(actions.c.alert_date).order_by(actions.c.alert_date)
    )
    for day, number, asked, key in connection.execute(query).tuples():
        what = f"Action {key[:12]} of {day} waits" if number == 1 else f"{number} actions of {day} wait"
        whom = "for approval" if asked == number else "for a person" + (f" ({asked} for approval)" if asked else "")
        yield Cause(NEEDS_HUMAN, f"{what} {whom}, for more than an hour.", str(day))


def alert_starts(connection: Connection, days: int) -> tuple[date | None, list[date], list[date]]:
    """(newest date answered, flagged dates, dates on which an alert began) of the newest `days` dates, as the log has them."""
    newest = connection.execute(sa.select(sa.func.max(ops_runs_log.c.alert_date))).scalar()
    if newest is None:
        return None, [], []
    first = newest - timedelta(days=days - 1)
    rows = connection.execute(
        sa.select(ops_runs_log.c.alert_date, ops_runs_log.c.mode, ops_runs_log.c.alert_flag)
        .where(ops_runs_log.c.alert_date >= first - timedelta(days=APART_DAYS)).order_by(ops_runs_log.c.position)
    ).tuples()
    # of one date the row written last; a rule in its pilot period has rows of its own beside those of live
    flags = {(day, mode == TRIAL): flag for day, mode, flag in rows}
    flagged = sorted({day for (day, _), flag in flags.items() if flag})
    starts = [day for place, day in enumerate(flagged) if place == 0 or day - flagged[place - 1] > timedelta(days=APART_DAYS)]
    return newest, [day for day in flagged if day >= first], [day for day in starts if day >= first]


def _alert_frequency(connection: Connection, lake: Warehouse, settings: Settings) -> Iterator[Cause]:
    newest, _, starts = alert_starts(connection, MONTH_DAYS)
    if newest is None:
        return
    if len(starts) > MOST_ALERTS:
        yield Cause(TOO_MANY, f"{len(starts)} alerts began in the {MONTH_DAYS} days to {newest}; of more than {MOST_ALERTS} none is read.")
    first = newest - timedelta(days=SILENT_DAYS - 1)
    if _watched_since(connection, lake, settings, first) and not alert_starts(connection, SILENT_DAYS)[1]:
        yield Cause(NONE_AT_ALL, f"No alert in the {SILENT_DAYS} days to {newest}. That may well be true; make sure that it could alarm.")


def _watched_since(connection: Connection, lake: Warehouse, settings: Settings, first: date) -> bool:
    """Whether dates were computed from `first` on, with enough history for the rule to judge them."""
    orders = lake.orders()
    if orders is None or (first - orders.first_date).days < settings.at_risk_limit + 7:
        return False
    ran = connection.execute(sa.select(sa.func.min(loop_runs.c.first_date)).where(loop_runs.c.status == "success")).scalar()
    logged = connection.execute(sa.select(sa.func.min(ops_runs_log.c.alert_date))).scalar()
    return min(day for day in (ran, logged) if day is not None) <= first


# -- opening and closing -------------------------------------------------------------------------------------------------


def open_causes(engine: Engine) -> list[Row]:
    """Causes that are open, oldest first."""
    with engine.connect() as connection:
        return _open(connection)


def _open(connection: Connection) -> list[Row]:
    query = sa.select(health_causes).where(health_causes.c.closed_at.is_(None)).order_by(health_causes.c.id)
    return [dict(row) for row in connection.execute(query).mappings()]


def causes(engine: Engine) -> list[Row]:
    """Every cause there was, oldest first."""
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(sa.select(health_causes).order_by(health_causes.c.id)).mappings()]


def settle(connection: Connection, lake: Warehouse, settings: Settings, now: datetime, actor: str) -> list[str]:
    """Opens what is found, closes what is gone, plans what there is to tell in this mode; returns what changed, in words.

    All in the caller's transaction: killed before its end nothing has happened, after it everything is written down.
    """
    lock_responses(connection)
    changes = _await_first_orders(connection, lake, settings, now, actor)
    now_found = {cause.key: cause for cause in found(connection, lake, settings, now)}
    known = {_named(row): row for row in _open(connection)}
    for key, cause in now_found.items():
        if key not in known:
            connection.execute(health_causes.insert().values(
                cause=cause.cause, subject=cause.subject, detail=cause.detail, opened_at=now))
            ledger.note(connection, now, "health opened", actor, f"{key}: {cause.detail}")
            changes.append(f"opened {key}")
    for key, row in known.items():
        if key not in now_found:
            connection.execute(health_causes.update().where(health_causes.c.id == row["id"]).values(closed_at=now))
            ledger.note(connection, now, "health closed", actor, key)
            changes.append(f"closed {key}")
    return changes + (_tell(connection, settings, now, actor) if settings.mode != "off" else [])


def _tell(connection: Connection, settings: Settings, now: datetime, actor: str) -> list[str]:
    """Plans each opening that this mode has not told, and each end of one that it has."""
    limits, changes = {"*": settings.max_messages_per_day}, []
    for row in _open(connection):
        intent = _message(connection, row, settings)
        if ledger.get(connection, intent.key) is None:
            ledger.plan(connection, [intent], now, actor, limits)
            connection.execute(health_causes.update().where(health_causes.c.id == row["id"]).values(opened_key=intent.key))
            changes.append(f"told {_named(row)}")
    ended = sa.select(health_causes).where(
        health_causes.c.closed_at.is_not(None), health_causes.c.opened_key.is_not(None), health_causes.c.closed_key.is_(None))
    for row in connection.execute(ended.order_by(health_causes.c.id)).mappings().all():
        opening = ledger.get(connection, row["opened_key"])
        if opening["mode"] != settings.mode:
            continue  # told by another mode, which tells its end when it is in force again
        key = opening["key"]
        if opening["state"] not in (ledger.FAILED, ledger.CANCELLED) and not ledger.supersede(
                connection, key, "over before anybody was told", now, actor):
            (key,) = ledger.plan(connection, [_message(connection, row, settings, opening)], now, actor, limits)
        connection.execute(health_causes.update().where(health_causes.c.id == row["id"]).values(closed_key=key))
        changes.append(f"told the end of {_named(row)}")
    return changes


def _named(row: Mapping[str, Any]) -> str:
    return Cause(row["cause"], "", row["subject"]).key


def _which(connection: Connection, row: Mapping[str, Any], day: date, settings: Settings) -> str:
    """What tells this cause from every other: its kind, the day it opened on, and how many of its kind had opened before on that day.

    Not the row's number: a restored ledger gives the numbers it lost to other causes, and these would be taken for told.
    """
    start = datetime.combine(day, time.min, ZoneInfo(settings.shop_timezone)).astimezone(UTC)
    before = connection.execute(
        sa.select(sa.func.count()).select_from(health_causes)
        .where(health_causes.c.cause == row["cause"], health_causes.c.subject == row["subject"], health_causes.c.id < row["id"],
               health_causes.c.opened_at >= start)
    ).scalar_one()
    return f"{_named(row)}:{day}:{before + 1}"


def _message(connection: Connection, row: Mapping[str, Any], settings: Settings, opening: Mapping[str, Any] | None = None) -> Intent:
    """What tells of a cause's opening, or of its end where `opening` is the action that told of it; that one is answered where it was."""
    part = "closed" if opening else "opened"
    destination = opening["destination"] if opening else chosen(HEALTH_SLOT, settings, settings.mode)
    day = row["opened_at"].astimezone(ZoneInfo(settings.shop_timezone)).date()
    target = opening["target"] if opening else target_of(HEALTH_SLOT, settings, settings.mode)
    if destination == "local":
        target = f"{day}/health_{row['cause']}_{row['id']}" + ("_closed" if opening else "")
    title = wording.health_title(row)
    lines = wording.health_lines(row, settings)
    if destination == "mail":
        kind, payload = "mail", {"subject": title, "text": "\n\n".join([title, *lines])}
    else:
        kind, payload = "reply" if opening else "post", {**wording.slack_health(title, lines), "broadcast": False}
    return Intent(
        identity=f"health:{_which(connection, row, day, settings)}:{settings.mode}", slot=HEALTH_SLOT, destination=destination, kind=kind,
        target=target, part=part,
        payload={"cause": row["cause"], **payload}, alert_date=day, mode=settings.mode, parent_key=opening["key"] if opening else None,
    )
