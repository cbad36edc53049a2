"""The one clock. Ages, leases and time stamps read it; business rules never do (they read the reference date)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo

Clock = Callable[[], datetime]
"""Returns the present moment, with time zone."""


def system_clock() -> datetime:
    return datetime.now(UTC)


def shop_day(moment: datetime, shop_timezone: str) -> date:
    """The date of a moment where the shop is."""
    return moment.astimezone(ZoneInfo(shop_timezone)).date()
