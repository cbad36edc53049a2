"""The story of one incident, from the alert to a person's verdict: read once, shown as text, Markdown or one HTML page.

It holds numbers, dates, addresses and the names of those who decided; never a customer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import jinja2
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from retention_ops.execute import incidents, wording
from retention_ops.log import runs
from retention_ops.log.database import approvals, exposures, ops_events
from retention_ops.package.brief import escape_markdown

Row = dict[str, Any]
_RUN = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}")
_WORKER = re.compile(r".+:\d+:[0-9a-f]{8}")


@dataclass(frozen=True)
class Link:
    """A cell that leads somewhere."""

    text: str
    address: str


@dataclass(frozen=True)
class Section:
    """One table of the story."""

    heading: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str | Link]]


@dataclass(frozen=True)
class Story:
    """What a person reads: a title, a few sentences, tables."""

    title: str
    sentences: Sequence[str]
    sections: Sequence[Section]


# -- reading -----------------------------------------------------------------------------------------------------------


def action_events(engine: Engine, key: str) -> list[Row]:
    """What happened to one action, oldest first."""
    query = sa.select(ops_events).where(ops_events.c.action_key == key).order_by(ops_events.c.id)
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def action_approval(engine: Engine, key: str) -> Row | None:
    """The newest approval asked for an action."""
    query = sa.select(approvals).where(approvals.c.action_key == key).order_by(approvals.c.id.desc()).limit(1)
    with engine.connect() as connection:
        row = connection.execute(query).mappings().first()
    return dict(row) if row else None


def facts(engine: Engine, number: int) -> dict[str, Any]:
    """{'incident', 'answers', 'actions' (without content), 'events', 'approvals', 'exposures', 'log'}. Raises LedgerError."""
    found = incidents.story(engine, number)
    keys = [row["key"] for row in found["actions"]]
    days = [row["alert_date"] for row in found["answers"]]
    with engine.connect() as connection:
        asked = connection.execute(sa.select(approvals).where(approvals.c.action_key.in_(keys)).order_by(approvals.c.id)).mappings().all()
        known = {event["id"] for event in found["events"]}
        more = connection.execute(
            sa.select(ops_events).where(ops_events.c.action_key.in_(keys), ops_events.c.id.not_in(known))
        ).mappings().all()
        exposed = connection.execute(
            sa.select(exposures.c.alert_date, exposures.c.tier, exposures.c.arm, sa.func.count().label("customers"))
            .where(exposures.c.incident_id == number).group_by(exposures.c.alert_date, exposures.c.tier, exposures.c.arm)
            .order_by(exposures.c.alert_date, exposures.c.tier, exposures.c.arm.desc())
        ).mappings().all()
    log = runs.rows(engine, first=min(days), last=max(days)) if days else []
    mode = found["incident"]["mode"]
    return {
        **found,
        "actions": [{name: value for name, value in row.items() if name != "payload"} for row in found["actions"]],
        "events": sorted([*found["events"], *map(dict, more)], key=lambda event: event["id"]),
        "approvals": [dict(row) for row in asked],
        "exposures": [dict(row) for row in exposed],
        "log": [row for row in log if row["alert_date"] in set(days) and row["mode"] == mode],
    }


# -- telling -----------------------------------------------------------------------------------------------------------


def tell(found: Mapping[str, Any]) -> Story:
    """The facts as a person reads them."""
    incident = found["incident"]
    return Story(
        f"Incident {incident['id']}: retention {incident['severity']}, {_days(incident)}",
        [sentence for sentence in _sentences(found) if sentence],
        [section for section in (
            _alerts(found), _actions(found["actions"]), _approvals(found), _exposed(found["exposures"]), _timeline(found),
            _log(found["log"])) if section.rows],
    )


def _days(incident: Row) -> str:
    first, last = incident["opened_on"], incident["last_flagged_on"]
    return str(first) if first == last else f"{first} to {last}"


def _sentences(found: Mapping[str, Any]) -> list[str]:
    incident, actions_ = found["incident"], found["actions"]
    counts = {state: sum(row["state"] == state for row in actions_) for state in dict.fromkeys(row["state"] for row in actions_)}
    told = ", ".join(f"{number} {state.replace('_', ' ')}" for state, number in counts.items())
    return [
        f"Mode {incident['mode']}; state {incident['state']}. Opened {_at(incident['created_at'])}; the baseline is frozen at "
        f"{wording.frozen(incident)}, the alarm starts {abs(incident['frozen_warning_pct']):.4g} % "
        f"{'below' if incident['frozen_warning_pct'] < 0 else 'above'} it.",
        _ownership(incident),
        f"{len(actions_)} actions: {told}." if actions_ else "Nothing was planned for it.",
        f"Quiet until {_at(incident['snoozed_until'])}." if incident["snoozed_until"] else "",
        f"Judged {incident['verdict']} by {incident['closed_by']}, {_at(incident['closed_at'])}." if incident["verdict"]
        else "Nobody has judged yet whether the alarm was right.",
    ]


def _ownership(incident: Row) -> str:
    who = f"Owner {incident['owner']}." if incident["owner"] else "No owner is set."
    if incident["acked_at"]:
        return f"{who} Acknowledged by {incident['acked_by']}, {_at(incident['acked_at'])} (asked for by {_at(incident['ack_by'])})."
    told = " The backup was told." if incident["escalated_at"] else ""
    return f"{who} Not acknowledged; asked for by {_at(incident['ack_by'])}.{told}"


def _alerts(found: Mapping[str, Any]) -> Section:
    """Each answered date with its numbers, as the log has them, and what the gate decided."""
    measured = {row["alert_date"]: row for row in found["log"] if row["current_value"] is not None}
    rows = []
    for answer in found["answers"]:
        row = measured.get(answer["alert_date"])
        reading = wording.reading(row) if row else ""
        rows.append((
            str(answer["alert_date"]), answer["severity"], reading, answer["verdict"], answer["reason"], _at(answer["answered_at"])))
    return Section("Detected and decided", ("date", "severity", "measured", "decision", "why", "decided at"), rows)


def _actions(rows: Sequence[Row]) -> Section:
    table = [
        (str(row["alert_date"]), f"{row['slot']} {row['kind']}", row["destination"], row["state"].replace("_", " "), str(row["attempts"]),
         _proof(row), row["key"][:12]) for row in rows
    ]
    return Section("Done about it", ("date", "action", "by", "state", "attempts", "where", "key"), table)


def _proof(row: Row) -> str | Link:
    if row["state"] != "sent":
        return row["last_error"] or ""
    return Link(row["external_id"], row["external_url"]) if _is_web(row["external_url"]) else row["external_id"] or ""


def _approvals(found: Mapping[str, Any]) -> Section:
    rows = [
        (row["action_key"][:12], f"{row['customers']:,}", row["audience_sha256"][:12], row["state"], row["decided_by"] or "",
         _at(row["decided_at"]), row["why"] or "") for row in found["approvals"]
    ]
    return Section("Approvals", ("action", "customers", "audience", "state", "by", "at", "why"), rows)


def _exposed(rows: Sequence[Row]) -> Section:
    table = [(str(row["alert_date"]), row["tier"], row["arm"], f"{row['customers']:,}") for row in rows]
    return Section("Handed over and held out", ("date", "tier", "arm", "customers"), table)


def _timeline(found: Mapping[str, Any]) -> Section:
    named = {row["key"]: f"{row['slot']} {row['kind']} " for row in found["actions"]}
    rows = [
        (_at(event["at"]), named.get(event["action_key"], "") + event["event"].replace("_", " "), event["detail"], _who(event["actor"]))
        for event in found["events"] if not _routine(event, found["actions"])
    ]
    return Section("Timeline", ("at", "what", "details", "by"), rows)


def _routine(event: Row, actions: Sequence[Row]) -> bool:
    """Every action is planned and claimed; the table of actions says the same in one line."""
    planned = {f"{row['slot']} {row['kind']} by {row['destination']}" for row in actions}
    return bool(event["action_key"]) and (event["event"] == "sending" or (event["event"] == "planned" and event["detail"] in planned))


def _who(actor: str) -> str:
    """A person as named; a run by the start of its id; a worker as what it is."""
    if _RUN.fullmatch(actor):
        return f"run {actor[:8]}"
    return "worker" if _WORKER.fullmatch(actor) else actor


def _log(rows: Sequence[Row]) -> Section:
    table = [
        (str(row["alert_date"]), _at(row["run_timestamp"]), row["status"], f"{row['total_exported']:,}", row["error_message"] or "",
         row["row_hash"][:12]) for row in rows
    ]
    return Section("Log rows", ("date", "written", "status", "handed over", "message", "row hash"), table)


def _at(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC" if moment else ""


def _is_web(address: str | None) -> bool:
    return bool(address) and urlsplit(address).scheme in ("http", "https") and not re.search(r"[\s()<>\"]", address)


# -- Markdown and HTML -------------------------------------------------------------------------------------------------


def markdown(story: Story) -> str:
    """The story as Markdown; whatever people or services wrote is shown literally."""
    lines = [f"# {escape_markdown(story.title)}", "", *(f"{escape_markdown(sentence)}\n" for sentence in story.sentences)]
    for section in story.sections:
        lines += [f"## {section.heading}", "", f"| {' | '.join(section.columns)} |", "|" + "---|" * len(section.columns)]
        lines += [f"| {' | '.join(_markdown_cell(cell) for cell in row)} |" for row in section.rows]
        lines.append("")
    return "\n".join(lines)


def _markdown_cell(cell: str | Link) -> str:
    if isinstance(cell, Link):
        return f"[{escape_markdown(cell.text)}]({cell.address.replace('|', '%7C')})"
    return str(escape_markdown(cell)) if cell else ""


_PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ story.title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
div { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid #d1d9e0 }
th { font-weight: 600; color: #59636e }
td { overflow-wrap: anywhere; min-width: 4rem }
@media (prefers-color-scheme: dark) {
  body { color: #e6edf3; background: #0d1117 } th, td { border-color: #3d444d } th { color: #9198a1 } a { color: #58a6ff }
}
</style>
</head>
<body>
<h1>{{ story.title }}</h1>
{% for sentence in story.sentences %}
<p>{{ sentence }}</p>
{% endfor %}
{% for section in story.sections %}
<h2>{{ section.heading }}</h2>
<div><table>
<thead><tr>{% for name in section.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.rows %}
<tr>{% for cell in row %}<td>{% if cell.address is defined %}<a href="{{ cell.address }}">{{ cell.text }}</a>\
{% else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
</body>
</html>
""")


def html(story: Story) -> str:
    """The story as one page that needs nothing else."""
    return _PAGE.render(story=story) + "\n"
