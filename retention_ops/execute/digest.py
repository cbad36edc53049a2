"""The digest of a week or a day: when it is due, what it is about, and that it leaves once.

Its identity is the period and the mode, so a rerun finds it sent; what was planned first stands. It goes where the brief goes: the
channel in live, the test channel in pilot, the home's outbox in shadow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from retention_ops.detect.alerts import AT_RISK, alerts_by_day, answered_rules
from retention_ops.execute import health, ledger, wording
from retention_ops.execute.destinations.choice import DIGEST_SLOT, chosen, target_of
from retention_ops.execute.ledger import Intent
from retention_ops.log.database import health_causes, incidents
from retention_ops.package.audiences import TIERS
from retention_ops.package.digest import SPARK_DAYS, DigestFacts, at_other_lines, render_markdown, render_slack
from retention_ops.package.pack import records
from retention_ops.settings import TRIAL, Settings
from retention_ops.warehouse.seam import Warehouse

WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
THRESHOLD_DAYS = 30


@dataclass(frozen=True)
class Period:
    """The days `first` to `last`, told about on the morning after `last`, at the latest on `last_day`, when the next one is at hand."""

    name: str
    first: date
    last: date
    last_day: date

    @property
    def identity(self) -> str:
        return f"digest:{self.name}:{self.last}"


def period_ending(name: str, last: date) -> Period:
    """The period of `name` (weekly, daily) whose last day is `last`."""
    days = 7 if name == "weekly" else 1
    return Period(name, last - timedelta(days=days - 1), last, last + timedelta(days=days))


def current_period(settings: Settings, today: date) -> Period | None:
    """The period whose digest is the newest that could be out today; None where digests are off.

    A machine that slept on the day tells of it when it wakes, until the next one.
    """
    if settings.digest == "off":
        return None
    back = (today.weekday() - WEEKDAYS.index(settings.digest_day)) % 7 if settings.digest == "weekly" else 0
    return period_ending(settings.digest, today - timedelta(days=back + 1))


def due(connection: Connection, lake: Warehouse, settings: Settings, now: datetime) -> Period | None:
    """The period to tell about now: not told in this mode yet, and its last day is done, or will not be by `data_deadline`."""
    local = now.astimezone(ZoneInfo(settings.shop_timezone))
    period = current_period(settings, local.date())
    if period is None or settings.mode == "off" or ledger.get(connection, _identified(period, settings).key):
        return None
    morning = local.date() - period.last == timedelta(days=1)
    waits = morning and local.timetz().replace(tzinfo=None) < time.fromisoformat(settings.data_deadline)
    return None if waits and not health.good_day(connection, lake, period.last) else period


def _identified(period: Period, settings: Settings, payload: Mapping[str, Any] | None = None) -> Intent:
    destination = chosen(DIGEST_SLOT, settings, settings.mode)
    target = target_of(DIGEST_SLOT, settings, settings.mode)
    return Intent(
        identity=f"{period.identity}:{settings.mode}", slot=DIGEST_SLOT, destination=destination, kind="post",
        target=f"{period.last}/digest_{period.name}" if destination == "local" else target,
        payload=payload or {}, alert_date=period.last, mode=settings.mode,
    )


def intent(period: Period, facts: DigestFacts, settings: Settings) -> Intent:
    """The digest as an action. Raises PackError where a template cannot be rendered."""
    message = render_slack(facts, settings)
    return _identified(period, settings, {
        **message, "broadcast": False, "markdown": render_markdown(facts, settings), "last_day": period.last_day.isoformat()})


# -- what it is about ----------------------------------------------------------------------------------------------------


def collect(engine: Engine | None, lake: Warehouse, settings: Settings, period: Period) -> DigestFacts:
    """The facts of a period by what is known at this moment; `engine` None: nothing was ever answered."""
    days = [day for day in lake.days("alert_logic") if day <= period.last]
    rules, orders = answered_rules(settings), lake.orders()
    oldest = min(period.first, period.last - timedelta(days=max(THRESHOLD_DAYS, SPARK_DAYS) - 1))
    # one day more: a shortfall that falls out alone is judged by its eve
    rows = records(lake.read_range("alert_logic", oldest - timedelta(days=1), period.last)) if days and days[-1] >= oldest else []
    alerts = {day: alert for day, alert in alerts_by_day(rows, rules).items() if day >= period.first}
    newest = days[-1] if days else None
    earlier = newest - (period.last - period.first + timedelta(days=1)) if newest else None
    judged = [row for row in rows if row["alert_type"] in rules]
    window = period.last - timedelta(days=THRESHOLD_DAYS - 1)
    open_incidents, causes = _open_matters(engine, settings) if engine else ([], [])
    return DigestFacts(
        period=period.name, first=period.first, last=period.last, complete_through=orders.complete_through if orders else None,
        alerts=alerts, daily=_daily(lake, newest), daily_before=_daily(lake, earlier),
        trend=[row for row in rows if row["alert_type"] == AT_RISK][-SPARK_DAYS:], queue=_queue(lake, newest, earlier),
        incidents=open_incidents, health=causes, thresholds=at_other_lines(judged, settings, window),
        threshold_days=len({row["alert_date"] for row in judged if date.fromisoformat(row["alert_date"]) >= window}),
        shop_name=settings.shop_name, mode=settings.mode,
    )


def _daily(lake: Warehouse, day: date | None) -> dict[str, Any] | None:
    if day is None or not lake.exists("retention_daily", day):
        return None
    return next(iter(records(lake.read("retention_daily", day))), None)


def _queue(lake: Warehouse, day: date | None, earlier: date | None) -> dict[str, tuple[int, int | None, int | None]] | None:
    """Each tier's customers, and who is new and gone against the earlier day; sets of ids that end here as three numbers."""
    now = _tiers(lake, day)
    if now is None:
        return None
    before = _tiers(lake, earlier)
    if before is None:
        return {tier: (len(now[tier]), None, None) for tier in TIERS}
    return {tier: (len(now[tier]), len(now[tier] - before[tier]), len(before[tier] - now[tier])) for tier in TIERS}


def _tiers(lake: Warehouse, day: date | None) -> dict[str, set[str]] | None:
    if day is None or not lake.exists("customer_priority", day):
        return None
    rows = lake.read("customer_priority", day, columns=("customer_id", "priority_tier"))
    return {tier: set(rows.loc[rows["priority_tier"] == tier, "customer_id"]) for tier in TIERS}


def _open_matters(engine: Engine, settings: Settings) -> tuple[Sequence[dict[str, Any]], list[tuple[str, str]]]:
    """Open incidents of this mode (of a rule in its pilot period as well), and open health causes."""
    modes = (settings.mode, TRIAL) if settings.mode == "live" else (settings.mode,)
    columns = [incidents.c[name] for name in ("id", "severity", "opened_on", "last_flagged_on", "acked_by")]
    with engine.connect() as connection:
        found = connection.execute(
            sa.select(*columns).where(incidents.c.state == "open", incidents.c.mode.in_(modes)).order_by(incidents.c.id)).mappings().all()
        causes = connection.execute(
            sa.select(health_causes.c.cause, health_causes.c.detail).where(health_causes.c.closed_at.is_(None))
            .order_by(health_causes.c.id)).tuples().all()
    return [dict(row) for row in found], [(wording.HEALTH[cause], detail) for cause, detail in causes]
