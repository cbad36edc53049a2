"""The words of the response around the brief: titles, thread updates, ticket comments. Numbers come in, sentences go out.

The brief itself is written by package/brief.py; nothing here names a customer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from retention_ops.detect.alerts import SHORTFALL, also_flagged
from retention_ops.package.audiences import TIERS
from retention_ops.package.brief import fit_slack
from retention_ops.settings import Settings

Row = Mapping[str, Any]
# beginnings by which a record is recognised later: said and looked for through these names only
HALTED_BY, THE_MODE = "halted by", "the mode"


def escape_slack(text: str) -> str:
    """Text that Slack shows as it is: no mention, no link, no entity."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def person(name: str) -> str:
    """An owner as Slack mentions one: a member id becomes a mention, a name stays a name."""
    looks_like_id = len(name) >= 9 and name[0] in "UW" and name.isalnum() and name.isupper()
    return f"<@{name}>" if looks_like_id else escape_slack(name)


def title(alert: Row) -> str:
    if alert["alert_type"] == SHORTFALL:
        return f"Retention {alert['severity']}: returning customers {alert['delta_relative_pct']:+.0f} % on {alert['alert_date']}"
    return f"Retention {alert['severity']}: AT_RISK {alert['current_value']:.1f} % on {alert['alert_date']}"


def reading(alert: Row) -> str:
    """What the day says, the flagged rules beside the leading one included."""
    return "; also ".join(_reading(row) for row in (alert, *also_flagged(alert)))


def _reading(alert: Row) -> str:
    if alert["alert_type"] == SHORTFALL:
        return alert["sentence"] or "nobody was due"
    if alert["current_value"] is None:
        return "no customers"
    text = f"AT_RISK {alert['current_value']:.1f} %"
    if alert["delta_relative_pct"] is None:
        return text
    return f"{text}, {alert['delta_relative_pct']:+.1f} % against the 7 days before ({alert['baseline_value']:.1f} %)"


def contacts(audiences: Mapping[str, Row]) -> str:
    """'P1 12, P2 40 (5 new)' from a manifest's audiences."""
    parts = []
    for tier in TIERS:
        entry = audiences[tier]
        new = entry.get("new", entry["rows"])
        parts.append(f"{tier} {entry['rows']:,}" + (f" ({new:,} new)" if new != entry["rows"] else ""))
    return ", ".join(parts)


def covered_by(newest: date) -> str:
    return f"the newest flagged date {newest} stands for it"


def stands_for(days: Sequence[tuple[date, str]]) -> str:
    """The sentence about earlier flagged dates, each with its severity."""
    if not days:
        return ""
    listed = ", ".join(f"{day} ({severity})" for day, severity in days[:7]) + (f" and {len(days) - 7} more" if len(days) > 7 else "")
    return f"Also stands for the flagged {'date' if len(days) == 1 else 'dates'} {listed}, which nobody was told about."


def ownership(incident: Row) -> str:
    """Who is asked, and by when."""
    owner = f"Owner {incident['owner']}" if incident["owner"] else "No owner is set (setting owner)"
    backup = f", backup {incident['backup_owner']}" if incident["backup_owner"] else ""
    return f"Incident {incident['id']}. {owner}{backup}. Acknowledge by {incident['ack_by']:%Y-%m-%d %H:%M} UTC."


def ownership_slack(incident: Row) -> str:
    """The same with mentions."""
    owner = f"Owner {person(incident['owner'])}" if incident["owner"] else "No owner is set"
    backup = f", backup {person(incident['backup_owner'])}" if incident["backup_owner"] else ""
    return f"Incident {incident['id']}. {owner}{backup}. Acknowledge by {incident['ack_by']:%Y-%m-%d %H:%M} UTC."


def frozen(incident: Row) -> str:
    """The baseline an incident is held against, in its rule's unit."""
    unit = " % of the returns usual in half a year" if incident["alert_type"] == SHORTFALL else " %"
    return f"{incident['frozen_baseline']:.1f}{unit}"


def sentence(verdict: str, alert: Row, incident: Row, audiences: Mapping[str, Row] | None) -> str:
    """What a thread reply or a ticket comment says."""
    day, now = alert["alert_date"], reading(alert)
    baseline, side = frozen(incident), "above" if incident["frozen_warning_pct"] < 0 else "below"
    to_contact = f" To contact: {contacts(audiences)}." if audiences else ""
    match verdict:
        case "update":
            return f"{day}: still {alert['severity']}. {now}; the baseline of this incident is {baseline}.{to_contact}"
        case "escalate":
            return f"{day}: risen to {alert['severity']}. {now}; the baseline of this incident is {baseline}.{to_contact}"
        case "retract":
            return (f"Retracted for {day}: with the orders known now that date is no alert any more ({now}). "
                    "Lists handed over for it should not be used further.")
        case "resolve":
            return (f"Resolved: three days in a row {side} this incident's warning line ({baseline}, "
                    f"{incident['frozen_warning_pct']:+.4g} %), the last on {day}: {now}. "
                    f"Was it real, expected, data or false? `retention-ops incidents close {incident['id']} --verdict ...`")
        case "unacknowledged":
            return (f"Nobody has acknowledged incident {incident['id']} ({incident['severity']} on {incident['opened_on']}) by "
                    f"{incident['ack_by']:%Y-%m-%d %H:%M} UTC. `retention-ops incidents ack {incident['id']} --by NAME`")
    raise ValueError(verdict)


def slack_sentence(text: str, prefix: str = "") -> dict[str, Any]:
    """A thread reply: the sentence, with an optional prefix (a mention) that is not escaped."""
    shown = f"{prefix}{escape_slack(text)}"
    return fit_slack(shown, [{"type": "section", "text": {"type": "mrkdwn", "text": shown}}])


def slack_with_context(message: Row, *lines: str) -> dict[str, Any]:
    """A message with more small lines at its end; `lines` are Slack's mrkdwn already."""
    context = [{"type": "context", "elements": [{"type": "mrkdwn", "text": line}]} for line in lines if line]
    return fit_slack(message["text"], [*message["blocks"], *context])


def slack_links(links: Mapping[str, str]) -> str:
    return " · ".join(f"<{escape_slack(url)}|{escape_slack(label)}>" for label, url in links.items())


# -- health --------------------------------------------------------------------------------------------------------------

HEALTH = {
    "run_failed": "A run failed", "data_late": "Data is late", "source_check_off": "The source check is off",
    "action_needs_human": "An action needs a human", "too_many_alerts": "Too many alerts", "no_alerts": "No alert for a long time",
}
"""cause -> what people call it"""


def health_title(row: Row) -> str:
    """The first line about a cause: that it began, or that it is over."""
    title = HEALTH[row["cause"]] + (f" ({row['subject']})" if row["subject"] else "")
    return f"Over: {title[0].lower()}{title[1:]}" if row["closed_at"] else f"Health: {title[0].lower()}{title[1:]}"


def health_lines(row: Row, settings: Settings) -> list[str]:
    """What else is said: what was found, or for how long it was so; and where the runbook is."""
    if row["closed_at"]:
        return [f"Since {row['opened_at']:%Y-%m-%d %H:%M} UTC, over at {row['closed_at']:%Y-%m-%d %H:%M} UTC. Nothing is left to do."]
    return [row["detail"], f"Since {row['opened_at']:%Y-%m-%d %H:%M} UTC at the latest. You are told once more, when it is over.",
            f"What to do: {runbook(row['cause'], settings)}"]


def runbook(cause: str, settings: Settings) -> str:
    """Where a cause's one-page runbook is: its address, or the command that prints it."""
    if settings.runbooks_url:
        return f"{settings.runbooks_url.rstrip('/')}/{cause}.md"
    return f"retention-ops health --runbook {cause}"


def slack_health(title_line: str, lines: Sequence[str]) -> dict[str, Any]:
    """A health alert as a Slack message: one bold line, then the rest. Addresses become links by themselves."""
    text = "\n".join([f"*{escape_slack(title_line)}*", *(escape_slack(line) for line in lines)])
    return fit_slack(escape_slack(title_line), [{"type": "section", "text": {"type": "mrkdwn", "text": text}}])
