"""The one clock. Ages, leases and time stamps read it; business rules never do (they read the reference date)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Returns the present moment, with time zone."""


def system_clock() -> datetime:
    return datetime.now(UTC)
