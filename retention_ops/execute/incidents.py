"""Incidents: consecutive flagged days are one story with an owner, a deadline to acknowledge, and an end that somebody judges.

    open ──3 calm days──> resolved      open ──no flagged date left──> retracted      any ──a person's verdict──> closed

Nothing is sent here. Times are UTC; acknowledging is counted in the shop's business hours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from retention_ops.detect.alerts import SHORTFALL, row_of
from retention_ops.errors import LedgerError
from retention_ops.execute.ledger import note
from retention_ops.log.database import actions, answers, incidents, ops_events
from retention_ops.settings import REAL_MODES, Settings

CALM_DAYS = 3
VERDICTS = ("real", "expected", "data", "false")
"""real: customers did slip away; expected: known cause (season, campaign); data: orders were wrong; false: nothing happened"""
WORKDAYS = {"mon-fri": 5, "mon-sat": 6, "mon-sun": 7}

Row = dict[str, Any]


def business_deadline(start: datetime, hours: float, settings: Settings) -> datetime:
    """`start` plus `hours` of the shop's business time, in UTC. A day with a clock change is as long as it is."""
    zone = ZoneInfo(settings.shop_timezone)
    opens, closes = (time.fromisoformat(text) for text in settings.business_hours.split("-"))
    left, overnight = timedelta(hours=hours), closes <= opens
    day = start.astimezone(zone).date() - timedelta(days=1)  # yesterday's shift may still be running
    while True:
        if day.weekday() < WORKDAYS[settings.business_days]:
            # compared in UTC: two times of one zone compare by what the wall shows
            first = max(datetime.combine(day, opens, zone).astimezone(UTC), start)
            last = datetime.combine(day + timedelta(days=overnight), closes, zone).astimezone(UTC)
            if first < last:
                if left <= last - first:
                    return first.astimezone(UTC) + left
                left -= last - first
        day += timedelta(days=1)


def open_incident(connection: Connection, alert: Mapping[str, Any], mode: str, settings: Settings, now: datetime, actor: str) -> Row:
    """A new incident whose baseline is frozen at that of the alert that opened it: AT_RISK %, or the level of returns in %."""
    day = date.fromisoformat(alert["alert_date"])
    values = {
        "alert_type": alert["alert_type"], "scope": alert["scope"], "mode": mode, "state": "open", "severity": alert["severity"],
        "opened_on": day, "last_flagged_on": day, "frozen_baseline": baseline(alert),
        "frozen_warning_pct": alert["threshold_warning"], "owner": settings.owner, "backup_owner": settings.backup_owner,
        "ack_by": business_deadline(now, ack_hours(alert["severity"], settings), settings), "created_at": now, "updated_at": now,
    }
    number = connection.execute(incidents.insert().values(values)).inserted_primary_key[0]
    note(connection, now, "incident opened", actor, f"{alert['severity']} on {day}", incident_id=number)
    return get(connection, number)


def ack_hours(severity: str, settings: Settings) -> int:
    return settings.ack_hours_critical if severity == "CRITICAL" else settings.ack_hours_warning


def get(connection: Connection, number: int, lock: bool = False) -> Row:
    """One incident; `lock` keeps others from changing it until the transaction ends."""
    query = sa.select(incidents).where(incidents.c.id == number)
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if row is None:
        raise LedgerError(f"there is no incident {number}; `retention-ops incidents list` shows them")
    return dict(row)


def current(connection: Connection, scope: str, mode: str) -> Row | None:
    """The open incident, whichever rule opened it, or None."""
    query = sa.select(incidents).filter_by(scope=scope, mode=mode, state="open")
    row = connection.execute(query).mappings().first()
    return dict(row) if row else None


def change(connection: Connection, number: int, now: datetime, actor: str, event: str, detail: str = "", **values: Any) -> Row:
    connection.execute(incidents.update().where(incidents.c.id == number).values(**values, updated_at=now))
    note(connection, now, event, actor, detail, incident_id=number)
    return get(connection, number)


def baseline(alert: Mapping[str, Any]) -> float:
    """What an incident's days are held against: the mean AT_RISK % before it, or how many returned of 100 by half-year habit."""
    return 100 * alert["level"] if alert["alert_type"] == SHORTFALL else alert["baseline_value"]


def reading_of(row: Mapping[str, Any]) -> float | None:
    """A day's value in the unit of `baseline`.

    A shortfall's own expectation follows the fall within weeks; measured against the half-year habit it does not, so that a lasting
    loss is not taken for a recovery.
    """
    if row["alert_type"] != SHORTFALL:
        return row["current_value"]
    return 100 * row["level"] * row["observed"] / row["expected"] if row["expected"] else None


def calm_since(incident: Row, alerts: Sequence[Mapping[str, Any]]) -> date | None:
    """The day the incident is over by the rule: the third calm day in a row after its last flagged one, or None.

    `alerts` are those of detect.alerts, oldest first. A calm day is flagged by no rule, and by the rule that opened the incident ungated
    and on the good side of the frozen baseline's warning line; one beyond it starts the count again; gated and missing days are neither.
    """
    line, calm = incident["frozen_baseline"] * (1 + incident["frozen_warning_pct"] / 100), 0
    for alert in alerts:
        row = row_of(alert, incident["alert_type"])
        if date.fromisoformat(alert["alert_date"]) <= incident["last_flagged_on"] or row is None:
            continue
        value = reading_of(row)
        if row["gate"] or value is None:
            continue
        good = round(value, 9) > round(line, 9) if incident["frozen_warning_pct"] < 0 else round(value, 9) < round(line, 9)
        calm = calm + 1 if good and not alert["alert_flag"] else 0
        if calm == CALM_DAYS:
            return date.fromisoformat(alert["alert_date"])
    return None


# -- what people do ------------------------------------------------------------------------------------------------------


def find(engine: Engine, **where: Any) -> list[Row]:
    """Incidents by exact column values, newest first."""
    with engine.connect() as connection:
        query = sa.select(incidents).filter_by(**where).order_by(incidents.c.id.desc())
        return [dict(row) for row in connection.execute(query).mappings()]


def acknowledge(engine: Engine, number: int, who: str, now: datetime) -> Row:
    """Somebody has it. A second acknowledgement changes nothing."""
    with engine.begin() as connection:
        row = _open(connection, number, who)
        if row["acked_at"]:
            return row
        return change(connection, number, now, who, "acknowledged", acked_at=now, acked_by=who)


def snooze(engine: Engine, number: int, until: datetime, who: str, why: str, now: datetime) -> Row:
    """Quiet until then: updates are recorded, not sent; an escalation still is."""
    if until <= now:
        raise LedgerError(f"a snooze ends in the future, {until:%Y-%m-%d %H:%M} UTC has passed")
    with engine.begin() as connection:
        _open(connection, number, who)
        return change(connection, number, now, who, "snoozed", f"until {until:%Y-%m-%d %H:%M} UTC: {why}", snoozed_until=until)


def close(engine: Engine, number: int, verdict: str, who: str, why: str, now: datetime) -> Row:
    """A person's judgement; open incidents end with it, ended ones get it afterwards."""
    if verdict not in VERDICTS:
        raise LedgerError(f"the verdict is one of {', '.join(VERDICTS)}, not {verdict!r}")
    if not who.strip():
        raise LedgerError("say who decides (--by)")
    with engine.begin() as connection:
        row = get(connection, number, lock=True)
        if row["verdict"]:
            raise LedgerError(f"incident {number} was judged {row['verdict']} by {row['closed_by']} already")
        return change(connection, number, now, who, "closed", f"{verdict}: {why}", state="closed", verdict=verdict, closed_at=now,
                      closed_by=who)


def _open(connection: Connection, number: int, who: str) -> Row:
    if not who.strip():
        raise LedgerError("say who you are (--by)")
    row = get(connection, number, lock=True)
    if row["state"] != "open":
        raise LedgerError(f"incident {number} is {row['state']}, not open")
    return row


def overdue(engine: Engine, mode: str, now: datetime) -> list[Row]:
    """Open incidents nobody acknowledged in time and nobody was told about a second time; a snooze is quiet."""
    query = sa.select(incidents).where(
        incidents.c.state == "open", incidents.c.mode == mode, incidents.c.acked_at.is_(None), incidents.c.escalated_at.is_(None),
        incidents.c.ack_by <= now, sa.or_(incidents.c.snoozed_until.is_(None), incidents.c.snoozed_until <= now),
    )
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def precision(engine: Engine) -> dict[str, Any]:
    """How often the alarm was right: {'judged', 'right', 'share', <verdict>: n}; real and expected count as right alarms.

    An expected rise did happen in the numbers; only `data` and `false` say that the alarm should not have come. Rehearsals
    do not count.
    """
    query = (
        sa.select(incidents.c.verdict, sa.func.count()).where(incidents.c.verdict.is_not(None), incidents.c.mode.in_(REAL_MODES))
        .group_by(incidents.c.verdict)
    )
    with engine.connect() as connection:
        counts = {verdict: 0 for verdict in VERDICTS} | dict(connection.execute(query).tuples().all())
    judged, right = sum(counts.values()), counts["real"] + counts["expected"]
    return {"judged": judged, "right": right, "share": right / judged if judged else None, **counts}


def story(engine: Engine, number: int) -> dict[str, Any]:
    """Everything about one incident, oldest first: {'incident', 'answers', 'actions', 'events'}."""
    with engine.connect() as connection:
        found = {"incident": get(connection, number)}
        for name, table, order in (("answers", answers, answers.c.id), ("actions", actions, actions.c.position),
                                   ("events", ops_events, ops_events.c.id)):
            query = sa.select(table).where(table.c.incident_id == number).order_by(order)
            found[name] = [dict(row) for row in connection.execute(query).mappings()]
    return found
