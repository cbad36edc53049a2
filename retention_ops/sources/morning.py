"""What the daily loop owes at this moment: dates to compute, a source to ask again, or something to wait for.

Read from what is stored and from one clock. A machine that slept for a week, a change of the clocks and a month of downtime
need no memory of their own: whatever is missing then is due, oldest first.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from retention_ops.clock import Clock
from retention_ops.settings import Settings
from retention_ops.warehouse.freshness import KEPT_FOR_EVER, Changes
from retention_ops.warehouse.seam import Warehouse

ASKED_AGAIN = timedelta(minutes=15)
"""between two looks for data that is not complete, until data_deadline"""
ASKED_LATE = timedelta(hours=1)
"""the same after it, and between two tries of a run that failed"""


@dataclass(frozen=True)
class Morning:
    """What is owed now. `due`: dates to compute in one run, oldest first, or empty.

    `newest` is the last date the loop owes anybody: yesterday in shop_timezone, before schedule_time the day before that.
    `late` says that its data is not complete and data_deadline has passed; `waits` is a sentence about what is not done, and why.
    `slot` numbers the look: the same look asks for the same thing once.
    """

    newest: date
    complete_through: date | None
    due: tuple[date, ...]
    missed: int
    stale: int
    late: bool
    waits: str
    slot: str


def owed(lake: Warehouse, clock: Clock) -> Morning:
    """Decides from stored partitions, the orders in force and the time of day. Changes nothing."""
    settings = lake.settings
    now = clock().astimezone(ZoneInfo(settings.shop_timezone))
    moment, start, deadline = now.timestamp(), *(_of_day(now, wanted) for wanted in (settings.schedule_time, settings.data_deadline))
    newest = now.date() - timedelta(days=1 if moment >= start else 2)
    orders = lake.orders()
    complete = orders.complete_through if orders else None
    missing = complete is None or complete < newest
    late = missing and not start <= moment < deadline
    # a date whose data did not come is computed all the same, held back as data_incomplete, so that the record has no hole; but a
    # home that was not fed for longer (a demo, last year's file) is not followed through the calendar
    stopped = complete is not None and newest - complete > timedelta(days=settings.rebuild_days)
    reach = newest if not missing or (late and not stopped) else complete
    missed, stale = (_missed(lake, reach), _stale(lake, reach)) if orders and reach else ([], [])
    due = tuple(sorted({*missed, *stale}))
    return Morning(
        newest=newest, complete_through=complete, due=due, missed=len(missed), stale=len(stale), late=late,
        waits=_waits(settings, newest, complete, late) if missing else "",
        slot=f"{now.date()}:{_look(moment - start, late or not missing)}",
    )


def _of_day(now: datetime, wanted: str) -> float:
    """hh:mm of today, seconds since 1970: the first where the clocks show it twice, as much later as they skip where they skip it."""
    return datetime.combine(now.date(), time.fromisoformat(wanted), tzinfo=now.tzinfo).timestamp()


def _look(seconds: float, hourly: bool) -> str:
    return f"{int(seconds // (ASKED_LATE if hourly else ASKED_AGAIN).total_seconds())}{'h' if hourly else 'q'}"


def _missed(lake: Warehouse, reach: date) -> list[date]:
    """Dates after the newest one computed. Where none was, the newest alone: how far back to begin is for `backfill` to say."""
    built = lake.days("alert_logic")
    first = built[-1] + timedelta(days=1) if built else reach
    first = max(first, lake.settings.start_date or lake.orders().first_date)
    return [first + timedelta(days=step) for step in range((reach - first).days + 1)]


def _stale(lake: Warehouse, reach: date) -> list[date]:
    """Dates whose orders were corrected since, no older than rebuild_days; `status` names older ones."""
    changed, oldest = Changes(lake), reach - timedelta(days=lake.settings.rebuild_days - 1)
    return sorted({
        day for day, made_from in lake.provenances(KEPT_FOR_EVER, oldest, reach) if changed.since(made_from.get("orders_version", ""), day)
    })


def _waits(settings: Settings, newest: date, complete: date | None, late: bool) -> str:
    known = f"orders are complete through {complete}" if complete else "no orders came yet"
    if late:
        return f"{known}, not {newest}, and {settings.data_deadline} has passed: late; looked for again every hour"
    return f"{known}, not {newest}: looked for again until {settings.data_deadline}, every {int(ASKED_AGAIN.total_seconds() // 60)} minutes"
