"""The alert of a day: alert_logic has a row for each rule; here they become the one alert that is read, packed and answered.

Whatever both rules say of a date is one matter for people. The row that leads is the most severe one of those the response
answers to; where they tie, the first rule's. The others travel with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any

from retention_ops.errors import PackError
from retention_ops.settings import Settings
from retention_ops.warehouse.catalog import TABLES

AT_RISK = "retention_status_degradation"
SHORTFALL = "returning_customers_shortfall"
RULES = (AT_RISK, SHORTFALL)
RANK = {"INFO": 0, "WARNING": 1, "CRITICAL": 2}
DETAILS = ("window_days", "observed", "expected", "expected_low", "expected_high", "overdispersion", "score", "lasting_score", "level",
           "day_alone", "sentence")
"""columns that the first rule leaves empty"""
OTHERS = "others"
"""key of an alert under which the rows of the rules that do not lead stand"""

Row = dict[str, Any]


def answered_rules(settings: Settings) -> tuple[str, ...]:
    """The rules whose flags the response answers; their rows are computed either way."""
    return RULES if settings.shortfall_response else (AT_RISK,)


def alert_of(rows: Sequence[Mapping[str, Any]], rules: Sequence[str] = RULES) -> Row:
    """One date's rows as its alert: the leading row, with the other ones under OTHERS. Raises PackError where no rule has a row."""
    asked = [row for row in rows if row["alert_type"] in rules]
    if not asked:
        raise PackError("no rule in charge has a row")
    lead = max(asked, key=lambda row: (RANK[row["severity"]], -RULES.index(row["alert_type"])))
    return {**lead, OTHERS: [dict(row) for row in rows if row is not lead]}


def alerts_by_day(rows: Iterable[Mapping[str, Any]], rules: Sequence[str] = RULES) -> dict[date, Row]:
    """The alert of each date in alert_logic's plain rows; dates without a row of `rules` are left out."""
    days: dict[date, list[Mapping[str, Any]]] = {}
    for row in rows:
        days.setdefault(date.fromisoformat(row["alert_date"]), []).append(row)
    return {day: alert_of(found, rules) for day, found in days.items() if any(row["alert_type"] in rules for row in found)}


def row_of(alert: Mapping[str, Any], rule: str) -> Row | None:
    """What one rule says of the alert's date."""
    rows = [alert, *alert.get(OTHERS, ())]
    return next((dict(row) for row in rows if row["alert_type"] == rule), None)


def also_flagged(alert: Mapping[str, Any]) -> list[Row]:
    """The rows that do not lead and are flagged."""
    return [row for row in alert.get(OTHERS, ()) if row["alert_flag"]]


def told_by(alert: Mapping[str, Any]) -> list[Row]:
    """The rows that make up a result of the alert, without empty details: the leading one, and those flagged beside it."""
    columns = TABLES["alert_logic"].column_names
    return [
        {name: row[name] for name in columns if name not in DETAILS or row.get(name) is not None} for row in (alert, *also_flagged(alert))
    ]
