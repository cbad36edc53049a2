"""What callers may say: one strict date, tiers, destinations. Whoever serves over another protocol uses the same types."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
DATE_PATTERN = "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"


def business_date(value: Any) -> date:
    """A real date written YYYY-MM-DD and nothing else: no number, no time, no other spelling. Raises ValueError."""
    if type(value) is date:
        return value
    if not isinstance(value, str) or not DATE.fullmatch(value):
        raise ValueError("must be a date written YYYY-MM-DD, such as 2026-06-30")
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise ValueError("is not a day of the calendar; write YYYY-MM-DD, such as 2026-06-30") from None


BusinessDate = Annotated[
    date,
    BeforeValidator(business_date),
    WithJsonSchema({
        "type": "string", "format": "date", "pattern": DATE_PATTERN,
        "description": "Reference date YYYY-MM-DD: everything is as of the end of that day",
    }),
]
Tier = Annotated[
    Literal["P1", "P2", "P3"],
    Field(description="P1 prevention (ACTIVE), P2 intervention (AT_RISK), P3 win-back (INACTIVE)"),
]
BriefFormat = Annotated[
    Literal["slack", "email", "markdown"], Field(description="slack: Block Kit JSON; email: HTML; markdown: for reading here")
]
ExportTo = Annotated[
    Literal["csv", "gsheet", "both"], Field(description="csv: a file in the date's Action Pack; gsheet: the configured Google spreadsheet")
]
FlaggedSeverity = Annotated[
    Literal["WARNING", "CRITICAL"], Field(description="The severity you saw in get_alert_decision; refused if the alert has another one")
]
CustomerId = Annotated[str, Field(min_length=1, max_length=200, description="Opaque customer id, exactly as in the orders")]
RunId = Annotated[str, Field(
    min_length=8, max_length=64, pattern="^[0-9a-f-]+$", description="A run_id, or the request of an answer that said pending",
)]
Offset = Annotated[int, Field(strict=True, ge=0, le=10_000_000, description="Characters to skip; an answer's `next` says how many")]
