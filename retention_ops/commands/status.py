"""`retention-ops status`: the state of everything in one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import typer
from rich.markup import escape

from retention_ops.commands import shared
from retention_ops.commands.shared import Json, count, moment, say_next

app = typer.Typer()


@app.command(epilog="Examples:\n\n  retention-ops status\n\n  retention-ops status --json")
def status(as_json: Json = False) -> None:
    """Data, last run, mode, open incidents, what waits for a person, flagged and stale dates, lake and events."""
    from retention_ops.status import status as look

    settings = shared.settings()
    facts = look(settings)
    if as_json:
        shared.print_json(facts)
        return
    shared.facts_table(_lines(facts))
    say_next(*(shared.command(settings, words) for words in facts["next"]))


def _lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each line, markup included."""
    orders, run, answer = facts["orders"], facts["last_run"], facts["last_answer"]
    yield "home", escape(str(facts["home"]))
    if orders:
        yield "orders", f"{orders.orders:,} of {count(orders.customers, 'customer')}, {orders.first_date} to {orders.last_date}"
        yield "orders version", orders.version
        yield "complete through", str(orders.complete_through)
    else:
        yield "orders", "none yet"
    yield "customer attributes", count(facts["customers"], "customer") if facts["customers"] is not None else "none (optional)"
    yield "dates built", f"{facts['dates_built']:,}" + (f", newest {facts['newest_date']}" if facts["newest_date"] else "")
    quiet = facts["mode"] in ("off", "shadow") or facts["held"]
    yield "mode", facts["mode"] + (" (nothing leaves this machine)" if quiet else "")
    if facts["held"]:
        yield "held", f"[red]{escape(facts['held'])}[/red]"
    if facts["armed"]:
        yield "answers since", f"{facts['armed']} (flagged dates before it are history)"
    if facts["mode"] == "live" and facts["shortfall_pilot_until"] and facts["shortfall_pilot_until"] > facts["today"]:
        yield "pilot period", f"shortfalls go to the test targets until {facts['shortfall_pilot_until']} (shortfall_pilot_days)"
    yield "last run", _last_run(run) if run else "none yet"
    yield "last answer", (f"{answer['alert_date']} {answer['severity']}, {answer['status']}, {answer['run_timestamp']:%Y-%m-%d %H:%M} UTC"
                          if answer else "none yet")
    yield "flagged, last 30 dates built", ", ".join(f"{row['alert_date']} {row['severity']}" for row in facts["flagged"]) or "none"
    yield from _response_lines(facts)
    for row in facts["health"]:
        yield "health", f"[yellow]{escape(row['detail'])}[/yellow] since {moment(row['opened_at'])}"
    yield "audit log", f"[red]{facts['audit']}[/red]" if facts["audit_broken_at"] else facts["audit"]
    for name, words in (
        ("stale_dates", "built from older orders"), ("stale_packs", "with a pack that is damaged or from older orders"),
        ("unfinished_dates", "have tables but no pack: a run was interrupted"),
        ("unanswered_dates", "flagged but not answered"), ("failed_answers", "with a failed answer"),
        ("packs_with_opted_out", "with lists naming customers who refused consent or were suppressed since"),
        ("other_rules_dates", "built under other settings"),
    ):
        if facts[name]:
            yield "attention", f"[yellow]{shared.dates(facts[name])} {words}[/yellow]"
    yield "lake and events", escape("; ".join(facts["mismatches"])) or "agree"


def _response_lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is going on and what waits for a person."""
    if halted := facts["halted"]:
        yield "halted", f"[red]nothing leaves: {escape(halted['by'])}, {moment(halted['at'])}: {escape(halted['why'])}[/red]"
    for row in facts["open_incidents"]:
        yield "open incident", (f"{row['id']}: {shared.severity(row['severity'])}, {row['opened_on']} to {row['last_flagged_on']}, mode "
                                f"{row['mode']}, {_acknowledged(row)}")
    for row in facts["pending_approvals"]:
        yield "waits for approval", (f"[yellow]{row['alert_date']}: {count(row['customers'], 'customer')}, audience "
                                     f"{row['audience_sha256'][:12]}, action {row['action_key'][:12]}[/yellow]")
    for row in facts["duplicates"]:
        yield "attention", (f"[yellow]action {row['key'][:12]} exists twice: {escape(str(row['external_id']))} and "
                            f"{escape(row['detail'])}[/yellow]")
    states = Counter(row["state"] for row in facts["actions_in_trouble"])
    for state, number in states.items():
        yield "actions", f"{number:,} {shared.state(state)}"
    precision = facts["precision"]
    if precision and precision["judged"]:
        yield "alarms that were right", f"{precision['right']} of {precision['judged']} judged ({precision['share']:.0%})"


def _acknowledged(row: dict[str, Any]) -> str:
    if row["mode"] == "shadow":
        return "a rehearsal"
    if row["acked_by"]:
        return f"acknowledged by {escape(row['acked_by'])}"
    due = f"acknowledge by {moment(row['ack_by'])}"
    return f"[red]overdue: {due}[/red]" if row["overdue"] else due


def _last_run(run: dict[str, Any]) -> str:
    dates = run["from"] if run["from"] == run["to"] else f"{run['from']} to {run['to']}"
    style = {"success": "green", "failure": "red"}.get(run["status"], "yellow")
    return f"{dates} [{style}]{run['status']}[/], {run['started']:%Y-%m-%d %H:%M} UTC"
