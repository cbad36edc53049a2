"""The digest: that we looked, whether the data was whole, and what there was to see, as Markdown and as a Slack message.

Like the brief it is templates over plain values: the words are in templates/digest/words.j2, the layout in one template per format,
and all of them can be overridden from `settings.templates_dir` (folder `digest` there). It counts; it names no customer.
Nothing here reads a clock or a table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from retention_ops.detect.alerts import AT_RISK, RANK, SHORTFALL
from retention_ops.package.brief import as_date, render_template, slack_message, sparkline
from retention_ops.settings import Settings

STATUSES = (("ACTIVE", "active"), ("AT_RISK", "at_risk"), ("INACTIVE", "inactive"))
SPARK_DAYS = 21
LINES = (2 / 3, 1.0, 4 / 3)
"""the warning lines that are looked at, as multiples of the one in force: 10, 15 and 20 % by default"""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class DigestFacts:
    """Everything a digest may show; whatever is not in here is not in it. Percentages are 0..100, counts are customers.

    `alerts` are those of detect/alerts.py (the leading row, the others under 'others'), `rows` plain alert_logic rows.
    """

    period: str
    """weekly or daily"""
    first: date
    last: date
    """the days it is about, both included"""
    complete_through: date | None
    """last date whose orders are all in; None before the first orders"""
    alerts: Mapping[date, Row]
    """the alert of each computed day of the period"""
    daily: Row | None
    """retention_daily of the newest computed day up to `last`"""
    daily_before: Row | None
    """the same a period earlier"""
    trend: Sequence[Row]
    """the first rule's alert_logic rows of the last days, oldest first"""
    queue: Mapping[str, tuple[int, int | None, int | None]] | None
    """tier -> (customers, of these new against a period earlier, gone since then); None where no queue was computed"""
    incidents: Sequence[Row]
    """open incidents: id, severity, opened_on, last_flagged_on, acked_by"""
    health: Sequence[tuple[str, str]]
    """open health causes: what people call it, and one sentence"""
    thresholds: Sequence[Row]
    """{'rule', 'line', 'days': flagged at that line, 'in_force'}, see `at_other_lines`"""
    threshold_days: int
    """days that these lines were held against"""
    shop_name: str
    mode: str


def at_other_lines(rows: Sequence[Row], settings: Settings, first: date = date.min) -> list[dict[str, Any]]:
    """How many days from `first` on each rule would have flagged had its warning line been another.

    `rows` are alert_logic's, oldest first; one day before `first` helps to judge it. Days that a safeguard held back stay held back.
    At the line in force the count is that of alert_flag. A rule without rows is left out.
    """
    rise = [row for row in rows if row["alert_type"] == AT_RISK and not row["gate"] and as_date(row["alert_date"]) >= first]
    due = [row for row in rows if row["alert_type"] == SHORTFALL]
    found = []
    for factor in LINES:
        line = settings.warning_pct * factor
        # rounded as the rule does before it compares
        days = sum(round(row["delta_relative_pct"], 9) >= round(line, 9) for row in rise)
        found.append({"rule": "at_risk", "line": line, "days": days, "in_force": factor == 1})
    for factor in LINES if due else ():
        line = settings.shortfall_warning * factor
        days = _short_days(due, line, settings.min_due, first)
        found.append({"rule": "returning", "line": line, "days": days, "in_force": factor == 1})
    return found


def _short_days(rows: Sequence[Row], line: float, min_due: int, first: date) -> int:
    """Days from `first` on whose shortfall reaches `line`; a day that falls out alone counts from the second one on, as in the rule."""
    days, eve = 0, False
    for row in rows:
        short = _is_short(row, line, min_due)
        held = row["gate"] not in (None, "partial_day") or (row["day_alone"] and not eve)
        days += bool(short and not held and as_date(row["alert_date"]) >= first)
        eve = short
    return days


def _is_short(row: Row, line: float, min_due: int) -> bool:
    lasting = row["lasting_score"] is not None and round(1.5 * row["lasting_score"], 9) >= round(line, 9)
    telling = row["score"] is not None and (row["expected"] or 0) >= min_due
    return lasting or (telling and round(row["score"], 9) >= round(line, 9))


# -- the two formats ------------------------------------------------------------------------------------------------------


def render_markdown(facts: DigestFacts, settings: Settings) -> str:
    """The digest as Markdown. Raises PackError for whatever goes wrong inside a template."""
    text = render_template("markdown", "digest/digest.md.j2", settings, {"digest": view(facts)})
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def render_slack(facts: DigestFacts, settings: Settings) -> dict[str, Any]:
    """The digest as {'text', 'blocks'} within Slack's limits. Raises PackError likewise."""
    return slack_message(render_template("slack", "digest/digest.slack.j2", settings, {"digest": view(facts)}))


def view(facts: DigestFacts) -> dict[str, Any]:
    """The `digest` that templates see: plain values; templates/digest/words.j2 lists them."""
    days = (facts.last - facts.first).days + 1
    alerts = [facts.alerts[day] for day in sorted(facts.alerts)]
    rows = [row for alert in alerts for row in (alert, *alert.get("others", ()))]
    incomplete = sorted({as_date(row["alert_date"]) for row in rows if row["gate"] == "data_incomplete"})
    partial = sorted({as_date(row["alert_date"]) for row in rows if row["gate"] == "partial_day"})
    flagged = [alert for alert in alerts if alert["alert_flag"]]
    unjudged = [alert for alert in alerts if alert["gate"] and alert["gate"] != "data_incomplete"]
    complete = facts.complete_through
    whole = complete is not None and complete >= facts.last and not incomplete and not partial
    wrong = bool(flagged or facts.incidents or facts.health or unjudged)
    return {
        "period": facts.period, "first": facts.first, "last": facts.last, "days": days, "looked": len(alerts),
        "complete_through": complete, "whole": whole, "partial": partial, "incomplete": len(incomplete),
        "fine": len(alerts) == days and whole and not wrong,
        "flagged": [{"date": as_date(alert["alert_date"]), "severity": alert["severity"]} for alert in flagged],
        "worst": max((alert["severity"] for alert in flagged), key=RANK.__getitem__, default=None),
        "unjudged": len(unjudged), "unjudged_gate": unjudged[-1]["gate"] if unjudged else None,
        "as_of": as_date(facts.daily["as_of_date"]) if facts.daily else None,
        "before": as_date(facts.daily_before["as_of_date"]) if facts.daily_before else None,
        "customers": facts.daily["customers"] if facts.daily else 0,
        "mix": _mix(facts),
        "spark": sparkline(list(facts.trend)[-SPARK_DAYS:]) if facts.trend else "",
        "spark_days": min(len(facts.trend), SPARK_DAYS),
        "queue": None if facts.queue is None else [
            {"tier": tier, "customers": number, "new": new, "gone": gone} for tier, (number, new, gone) in facts.queue.items()],
        "queue_compared": facts.queue is not None and all(new is not None for _, new, _ in facts.queue.values()),
        "incidents": [dict(row) for row in facts.incidents],
        "health": [{"title": title, "detail": detail} for title, detail in facts.health],
        "thresholds": [dict(row) for row in facts.thresholds], "threshold_days": facts.threshold_days,
        "shop": facts.shop_name, "mode": facts.mode,
    }


def _mix(facts: DigestFacts) -> list[dict[str, Any]]:
    """Each status with its people, its share, and the change of the share as shown (in points)."""
    if facts.daily is None:
        return []
    found = []
    for name, column in STATUSES:
        share = facts.daily[f"{column}_pct"]
        before = facts.daily_before[f"{column}_pct"] if facts.daily_before else None
        points = None if share is None or before is None else round(round(share, 1) - round(before, 1), 1)
        found.append({"status": name, "people": facts.daily[column], "share": share, "points": points})
    return found
