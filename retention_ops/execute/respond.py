"""What happens after an alert. Every answer, and every alert passed over, ends as one row of ops_runs_log.

Here the only destination is `local`: it writes what would have been sent into the pack's outbox and sends nothing.
Switching the response off (mode off) changes no table, no brief and no list.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, Literal
from zoneinfo import ZoneInfo

from sqlalchemy.engine import Engine

from retention_ops.clock import Clock, system_clock
from retention_ops.errors import PackError
from retention_ops.log import runs
from retention_ops.package.audiences import TIERS
from retention_ops.package.pack import OUTBOX, Pack, add_files, alert_version, canonical_sha256, find_pack, verify
from retention_ops.settings import Settings

EXPORTED_TIERS = {"WARNING": ("P1", "P2"), "CRITICAL": ("P1", "P2", "P3")}
TICKET_PRIORITY = {"WARNING": "High", "CRITICAL": "Highest"}


@dataclass(frozen=True)
class Decision:
    """`act`: write the outbox; `skip`: do nothing but say why. `reason` is a sentence for people and the log."""

    verdict: Literal["act", "skip"]
    reason: str


def decide(alert: Mapping[str, Any], complete_through: date, settings: Settings, clock: Clock = system_clock) -> Decision:
    """Whether to answer this alert row (dates as ISO text). Depends on the mode and, in pilot and live, on today's date."""
    day = date.fromisoformat(alert["alert_date"])
    if not alert["alert_flag"]:
        held = f" (held back by {alert['gate']})" if alert["gate"] else ""
        return Decision("skip", f"no alert: severity {alert['severity']}{held}")
    if settings.mode == "off":
        return Decision("skip", "the response is switched off (mode off)")
    if settings.mode == "shadow":
        if day < complete_through:
            return Decision("skip", f"history: orders are complete through {complete_through}, only that day is rehearsed in shadow")
        return Decision("act", "rehearsed in shadow: written to the outbox, nothing sent")
    today = clock().astimezone(ZoneInfo(settings.shop_timezone)).date()
    if day < today - timedelta(days=settings.max_alert_age_days):
        return Decision("skip", f"history: older than {settings.max_alert_age_days} days (max_alert_age_days)")
    if settings.mode == "pilot" and alert["severity"] != "WARNING":
        return Decision("skip", "pilot answers WARNING only")
    return Decision("act", "written to the outbox by the local destination, nothing sent")


def respond(
    pack: Pack, alert: Mapping[str, Any], complete_through: date, engine: Engine, settings: Settings, *, run_id: str,
    counts: Mapping[str, int], clock: Clock = system_clock,
) -> dict[str, Any]:
    """Answers one date and returns its ops_runs_log row, which is written whatever happens; never raises for a failed answer."""
    started = time.monotonic()
    decision, exported, error = None, {}, None
    try:
        decision = decide(alert, complete_through, settings, clock)
        before = runs.answered(engine, pack.day, alert["alert_type"], pack.facts_sha256, settings.mode)
        if decision.verdict == "act" and before and before != run_id:
            decision = Decision("skip", f"already answered by run {before}: same result")
        if decision.verdict == "act":
            pack = find_pack(settings, pack.day) or pack  # another run may have built it again meanwhile
            prove(pack, alert)
            exported = write_outbox(pack, alert, settings)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    status = "failed" if error else "success" if decision.verdict == "act" else "skipped"
    return runs.append(engine, {
        "run_id": run_id,
        "run_timestamp": clock(),
        "alert_date": pack.day,
        **{name: alert[name] for name in (
            "alert_type", "severity", "alert_flag", "current_value", "baseline_value", "delta_relative_pct", "sample_size")},
        **{f"{tier.lower()}_count": counts[tier] for tier in TIERS},
        "total_exported": sum(entry["rows"] for entry in exported.values()),
        "slack_posted": False,
        "slack_message_ts": None,
        "ticket_id": None,
        **{f"export_{tier.lower()}_link": exported.get(tier, {}).get("file") for tier in TIERS},
        "status": status,
        "error_message": error or (decision.reason if status == "skipped" else None),
        "execution_time_ms": round((time.monotonic() - started) * 1000),
        "mode": settings.mode,
        "facts_sha256": pack.facts_sha256,
        "audience_sha256": pack.manifest["audience_sha256"],
    })


def prove(pack: Pack, alert: Mapping[str, Any]) -> None:
    """Raises PackError unless the pack is whole and was built from this very alert result."""
    verify(pack)
    if pack.manifest["alert_version"] != alert_version(alert):
        raise PackError(
            f"the pack of {pack.day} was built from another result than alert_logic holds now; "
            f"`retention-ops run --date {pack.day}` builds it again"
        )


def write_outbox(pack: Pack, alert: Mapping[str, Any], settings: Settings) -> dict[str, dict[str, Any]]:
    """Writes what would go to Slack, the ticket system, Sheets and the webhook; returns the audiences it names, by tier."""
    severity = alert["severity"]
    identity = f"{alert['alert_type']}:{alert['scope']}:{alert['alert_date']}"
    brief = (pack.folder / f"briefing_{severity}.md").read_text(encoding="utf-8")
    lists = {tier: pack.manifest["audiences"][tier] for tier in EXPORTED_TIERS[severity]}
    messages = {
        "slack": json.loads((pack.folder / "briefing.slack.json").read_text(encoding="utf-8")),
        "ticket": {
            "title": f"Retention {severity}: AT_RISK {alert['current_value']:.1f} % on {alert['alert_date']}",
            "priority": TICKET_PRIORITY[severity],
            "labels": ["retention", severity.lower(), alert["alert_type"]],
            "description": brief,
        },
        "sheets": {"worksheets": [{"title": f"{tier} {alert['alert_date']}", **lists[tier]} for tier in lists]},
        "webhook": {
            "date": alert["alert_date"],
            "severity": severity,
            "alert_flag": alert["alert_flag"],
            "brief_markdown": brief,
            "metrics": {name: alert[name] for name in (
                "metric_name", "current_value", "baseline_value", "delta_pct", "delta_relative_pct", "sample_size")},
            "priority_counts": {tier: pack.manifest["audiences"][tier]["listed"] for tier in TIERS},
            "export_urls": {tier: entry["file"] for tier, entry in lists.items()},
        },
    }
    outbox = {}
    for destination, content in messages.items():
        body = {
            "destination": destination,
            "mode": settings.mode,
            "sent": False,
            "idempotency_key": canonical_sha256([identity, pack.manifest["alert_version"], destination])[:32],
            "content": content,
        }
        outbox[f"{OUTBOX}/{destination}.json"] = (json.dumps(body, indent=1, ensure_ascii=False).encode(), 1)
    add_files(pack, outbox)
    return lists
