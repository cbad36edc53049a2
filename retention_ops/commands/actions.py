"""`retention-ops actions`: what is to be sent, what waits for a person, and what that person decides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any, Literal
from uuid import uuid4

import typer
from rich.markup import escape
from sqlalchemy.engine import Engine

from retention_ops.clock import system_clock
from retention_ops.commands import content, shared
from retention_ops.commands.shared import By, Json, Why, count, examples, moment, say, say_next
from retention_ops.errors import UsageError
from retention_ops.settings import Settings

app = shared.group("actions", "What leaves this machine: look at it, decide what waits for a person, send what is due, stop everything.")

Row = dict[str, Any]
Key = Annotated[str, typer.Argument(
    parser=shared.clean, metavar="KEY", help="Start of the action's key, as `actions list` shows it.", show_default=False,
)]
Audience = Annotated[str, typer.Option(
    "--audience", parser=shared.clean, metavar="SHA", help="At least 8 digits of the list's hash: says which list is meant.",
)]
NEWEST_SENT = 10
STATES = ("planned", "sending", "unknown", "sent", "failed", "needs_human", "cancelled", "awaiting_approval")
WHAT_NEXT = {
    "awaiting_approval": ("actions approve {key} --audience {sha} --by NAME", "actions refuse {key} --audience {sha} --by NAME --why TEXT"),
    "failed": ("actions retry {key} --by NAME --why TEXT", "actions cancel {key} --by NAME --why TEXT"),
    "needs_human": ("actions retry {key} --by NAME --why TEXT", "actions resolve {key} --sent EXTERNAL_ID --by NAME --why TEXT",
                    "actions cancel {key} --by NAME --why TEXT"),
    "unknown": ("actions work", "actions resolve {key} --sent EXTERNAL_ID --by NAME --why TEXT"),
    "planned": ("actions work",),
}
"""what a person can do about an action in this state"""


# -- looking -----------------------------------------------------------------------------------------------------------


@app.command("list", epilog=examples("actions list", "actions list --state needs_human", "actions list --date 2026-06-30 --json"))
def list_(
    state: Annotated[
        str | None, typer.Option("--state", parser=shared.clean, metavar="STATE", help=f"Only this state: {', '.join(STATES)}.")
    ] = None,
    day: Annotated[date | None, shared.date_option("--date", "Only this alert date.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every action, oldest first.")] = False,
    as_json: Json = False,
) -> None:
    """What is open or waits for a person, then the newest sent."""
    if state and state not in STATES:
        raise UsageError(f"--state is one of {', '.join(STATES)}, not {state!r}")
    settings = shared.settings()
    with shared.database(settings) as engine:
        rows = _selected(engine, state, day, everything)
        halted = _halted(engine)
    if as_json:
        shared.print_json([_without_payload(row) for row in rows])
        return
    if halted:
        say(f"[red]{escape(halted)}[/red]")
    for row in rows:
        _show_line(row)
    if not rows:
        say("No such action.")
    waiting = next((row for row in rows if row["state"] in WHAT_NEXT), None)
    say_next(shared.command(settings, f"actions show {waiting['key'][:12]}" if waiting else "incidents list"))


def _selected(engine: Engine, state: str | None, day: date | None, everything: bool) -> list[Row]:
    from retention_ops.execute import ledger

    where: dict[str, Any] = ({"state": state} if state else {}) | ({"alert_date": day} if day else {})
    rows = ledger.find(engine, **where)
    if where or everything:
        return rows
    waiting = [row for row in rows if row["state"] in (*ledger.HELD_STATES, *ledger.OPEN_STATES)]
    return waiting + [row for row in rows if row["state"] == ledger.SENT][-NEWEST_SENT:]


def _without_payload(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in ("payload", "position")}


def _show_line(row: Row) -> None:
    say(f"{row['key'][:12]}  {row['alert_date']}  {row['mode']:<6}  {shared.state(row['state'])}  {_what(row)}")
    proof = row["external_url"] or row["external_id"] if row["state"] == "sent" else row["last_error"]
    if proof:
        say(f"  [dim]{escape(str(proof))}[/dim]")


def _what(row: Row) -> str:
    return escape(f"{row['slot']} {row['kind']} by {row['destination']}")


def _halted(engine: Engine) -> str:
    """Who halted everything and why, or why the ledger is held, or nothing."""
    from retention_ops.execute import ledger
    from retention_ops.execute.door import HALTED
    from retention_ops.execute.hold import why_held

    switch = ledger.read_state(engine, HALTED)
    if not switch or switch["value"] != "yes":
        held = why_held(engine)
        return f"{held[0].upper()}{held[1:]}." if held else ""
    return f"Halted by {switch['by']} at {moment(switch['at'])}: {switch['why']}. Nothing leaves."


@app.command("show", epilog=examples("actions show 1f3a", "actions show 1f3a --payload", "actions show 1f3a --json"))
def show(
    key: Key, payload: Annotated[bool, typer.Option("--payload", help="The whole content, not only its outline.")] = False,
    as_json: Json = False,
) -> None:
    """One action: what it says, where it goes, what happened to it."""
    from retention_ops.execute import ledger
    from retention_ops.execute.story import action_approval, action_events

    settings = shared.settings()
    with shared.database(settings) as engine:
        row = ledger.by_prefix(engine, key)
        events, approval = action_events(engine, row["key"]), action_approval(engine, row["key"])
    if as_json:
        shared.print_json({**row, "approval": approval, "events": events} if payload else
                          {**row, "payload": content.shortened(row["payload"]), "approval": approval, "events": events})
        return
    shared.facts_table(_facts(row, approval))
    _show_content(row, payload)
    say("[bold]What happened[/bold]")
    for event in events:
        say(f"  {event['at']:%Y-%m-%d %H:%M:%S}  {shared.state(event['event'])}  {escape(event['detail'])}  "
            f"[dim]{escape(event['actor'])}[/dim]")
    _say_what_next(settings, row, approval)


def _facts(row: Row, approval: Row | None) -> Iterator[tuple[str, str]]:
    yield "key", row["key"]
    yield "action", _what(row) + escape(f", {row['target'] or 'no target'}")
    yield "for", f"{row['alert_date']}, mode {row['mode']}" + (f", incident {row['incident_id']}" if row["incident_id"] else "")
    yield "state", shared.state(row["state"]) + f", {count(row['attempts'], 'attempt')}"
    if row["last_error"]:
        yield "why", escape(row["last_error"])
    if row["not_before"]:
        yield "waits until", moment(row["not_before"])
    if row["parent_key"]:
        yield "builds on", f"action {row['parent_key'][:12]}"
    if row["external_id"]:
        yield "proof", escape(" ".join(filter(None, (row["external_id"], row["external_url"]))))
    if approval:
        decided = f" by {approval['decided_by']}, {moment(approval['decided_at'])}" if approval["decided_by"] else ""
        yield "approval", escape(f"{approval['state']}{decided}: {count(approval['customers'], 'customer')}, "
                                 f"audience {approval['audience_sha256'][:12]}")


def _show_content(row: Row, whole: bool) -> None:
    say("[bold]Content[/bold]" + ("" if whole else " (outline; --payload shows all of it)"))
    if whole:
        lines = content.full_lines(row["slot"], row["destination"], row["payload"])
    else:
        lines = (f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
                 for name, value in content.shortened(row["payload"]).items())
    for line in lines:
        say(f"  {escape(line)}")


def _say_what_next(settings: Settings, row: Row, approval: Row | None) -> None:
    words = WHAT_NEXT.get(row["state"], ("actions list",))
    sha = approval["audience_sha256"][:12] if approval else "SHA"
    say_next(*(shared.command(settings, text.format(key=row["key"][:12], sha=sha)) for text in words))


# -- deciding ----------------------------------------------------------------------------------------------------------


@app.command("retry", epilog=examples('actions retry 1f3a --by Ada --why "channel exists now"'))
def retry(key: Key, by: By, why: Why, as_json: Json = False) -> None:
    """Send a failed or held action again."""
    _by_hand(key, "retry", by, why, as_json)


@app.command("cancel", epilog=examples('actions cancel 1f3a --by Ada --why "told them by phone"'))
def cancel(key: Key, by: By, why: Why, as_json: Json = False) -> None:
    """Never send it."""
    _by_hand(key, "cancel", by, why, as_json)


@app.command("resolve", epilog=examples('actions resolve 1f3a --sent RET-12 --by Ada --why "found the ticket"',
                                        'actions resolve 1f3a --absent --by Ada --why "not in the channel"'))
def resolve(
    key: Key, by: By, why: Why,
    sent: Annotated[
        str | None, typer.Option("--sent", parser=shared.clean, metavar="EXTERNAL_ID", help="It is there, under this id.")
    ] = None,
    absent: Annotated[bool, typer.Option("--absent", help="It is not there: it may be sent again.")] = False,
    as_json: Json = False,
) -> None:
    """Say whether an action that nobody could tell about is there or not."""
    if bool(sent) == absent:
        raise UsageError("say either --sent EXTERNAL_ID (it is there) or --absent (it is not)")
    _by_hand(key, "absent" if absent else "sent", by, why, as_json, external_id=sent or "")


def _by_hand(key: str, what: Literal["retry", "cancel", "sent", "absent"], by: str, why: str, as_json: bool, external_id: str = "") -> None:
    from retention_ops.execute import ledger
    from retention_ops.execute.story import action_approval

    settings, now = shared.settings(), system_clock()
    with shared.database(settings) as engine:
        key = ledger.by_prefix(engine, key)["key"]
        if what == "absent":
            row = ledger.absent(engine, key, by, why, now)
        else:
            # who was handed over belongs to the proof, also where a person gives it
            recorded = responder(settings, engine).door.recorded
            row = ledger.by_hand(engine, key, what, by, why, now, external_id=external_id, recorded=recorded)
        warning, approval = _blocked(engine, settings, row), action_approval(engine, key)
    if as_json:
        shared.print_json(_without_payload(row))
        return
    say(f"{_what(row)} for {row['alert_date']} is {shared.state(row['state'])} now; recorded for {escape(by)}.")
    if warning:
        say(f"[yellow]{escape(warning)}[/yellow]")
    _say_what_next(settings, row, approval)


def _blocked(engine: Engine, settings: Settings, row: Row) -> str:
    """Why a planned action will not leave yet, or nothing."""
    if row["state"] != "planned":
        return ""
    if row["mode"] != settings.mode:
        return f"It was planned in mode {row['mode']}; the mode is {settings.mode} now, so it stays here."
    return _halted(engine)


@app.command("approve", epilog=examples("actions approve 1f3a --audience 9c41d2aa --by Ada",
                                        "actions approve 1f3a --audience 9c41d2aa --by Ada --now"))
def approve(
    key: Key, audience: Audience, by: By, why: Why = "",
    now: Annotated[bool, typer.Option("--now", help="Deliver at once, with everything else that is due.")] = False,
    as_json: Json = False,
) -> None:
    """Let exactly one list leave, named by its hash. A list that changes afterwards needs another approval."""
    settings = shared.settings()
    row = _decide(settings, key, audience, by, why, True, quiet=as_json)
    worked = _work(settings) if now else None
    if as_json:
        shared.print_json({**_without_payload(row), **({"work": worked} if now else {})})
    elif worked:
        _show_work(settings, worked)
    else:
        say("It is delivered by `actions work`, or within a minute where `retention-ops ui` (the daemon) runs.")
        say_next(shared.command(settings, "actions work"))
    if worked and worked["failed"]:
        raise typer.Exit(1)


@app.command("refuse", epilog=examples('actions refuse 1f3a --audience 9c41d2aa --by Ada --why "too many"'))
def refuse(key: Key, audience: Audience, by: By, why: Why, as_json: Json = False) -> None:
    """Keep a list here."""
    settings = shared.settings()
    row = _decide(settings, key, audience, by, why, False, quiet=as_json)
    if as_json:
        shared.print_json(_without_payload(row))
    else:
        say_next(shared.command(settings, "actions list"))


def _decide(settings: Settings, key: str, audience: str, by: str, why: str, yes: bool, quiet: bool) -> Row:
    """Shows the list, then records the person's word on it."""
    from retention_ops.execute import ledger
    from retention_ops.execute.story import action_approval

    with shared.database(settings) as engine:
        row = ledger.by_prefix(engine, key)
        approval = action_approval(engine, row["key"])
        if approval and not quiet:
            say(f"The hand-over of {row['alert_date']} by {escape(row['destination'])} to {escape(row['target'] or 'its only target')}: "
                f"{count(approval['customers'], 'customer')}, audience {approval['audience_sha256'][:12]}")
            for line in content.worksheet_lines(row["payload"]):
                say(f"  {escape(line)}")
        row = ledger.decide_approval(engine, row["key"], yes, audience.lower(), by, why, system_clock())
        warning = _blocked(engine, settings, row)
    if not quiet:
        say(f"{'Approved' if yes else 'Refused'} by {escape(by)}; the action is {shared.state(row['state'])} now.")
        if warning:
            say(f"[yellow]{escape(warning)}[/yellow]")
    return row


# -- doing -------------------------------------------------------------------------------------------------------------


def responder(settings: Settings, engine: Engine, *, writes: bool = True, reconciling: bool = False) -> Any:
    """What acts for this command; the mode is read anew before each send. A preview `writes` nothing into the warehouse."""
    from retention_ops.execute.respond import Responder

    run_id = f"command-{uuid4().hex[:12]}"
    return Responder(shared.lake(settings, writes=writes), engine, settings, run_id, mode=lambda: shared.settings().mode,
                     reconciling=reconciling)


@app.command("work", epilog=examples("actions work", "actions work --json"))
def work(as_json: Json = False) -> None:
    """Do what is due now: send, look up what nobody knows, tell the backup. The daemon does the same by itself."""
    settings = shared.settings()
    worked = _work(settings)
    if as_json:
        shared.print_json(worked)
    else:
        _show_work(settings, worked)
    if worked["failed"]:
        raise typer.Exit(1)


def _work(settings: Settings) -> dict[str, Any]:
    """{'moved': actions that changed, 'waiting': open ones left, 'log': rows written, 'halted', 'failed'}."""
    from retention_ops.execute import ledger
    from retention_ops.execute.trail import publish_log

    with shared.database(settings) as engine:
        before = {row["key"]: (row["state"], row["attempts"], row["looked_up"]) for row in ledger.find(engine)}
        acting = responder(settings, engine)
        log = acting.work()
        if log:
            publish_log(acting.lake, engine, sorted({row["alert_date"] for row in log}))
        rows = ledger.find(engine)
        halted = _halted(engine)
    moved = [
        {**_without_payload(row), "before": before.get(row["key"], ("new",))[0]}
        for row in rows if before.get(row["key"]) != (row["state"], row["attempts"], row["looked_up"])
    ]
    waiting = [_without_payload(row) for row in rows if row["state"] in ledger.OPEN_STATES]
    return {"moved": moved, "waiting": waiting, "log": log, "halted": halted, "failed": any(row["status"] == "failed" for row in log)}


def _show_work(settings: Settings, worked: dict[str, Any]) -> None:
    if worked["halted"]:
        say(f"[red]{escape(worked['halted'])}[/red]")
    for row in worked["moved"]:
        why = row["external_url"] or row["external_id"] if row["state"] == "sent" else row["last_error"]
        say(f"{row['key'][:12]}  {row['alert_date']}  {_what(row)}: {row['before'].replace('_', ' ')} → {shared.state(row['state'])}"
            + (f"  [dim]{escape(str(why))}[/dim]" if why else ""))
    if not worked["moved"]:
        say("Nothing was due.")
    other = [row for row in worked["waiting"] if row["mode"] != settings.mode]
    if other:
        say(f"[yellow]{count(len(other), 'action')} planned in another mode than {settings.mode} stay here.[/yellow]")
    for row in worked["waiting"]:
        if row["mode"] == settings.mode:
            until = f"until {moment(row['not_before'])}" if row["not_before"] else "for the action it builds on"
            say(f"{row['key'][:12]}  {_what(row)}: waits {until}")
    for row in worked["log"]:
        if row["status"] == "failed":
            say(f"[red]{row['alert_date']}: {escape(row['error_message'])}[/red]")
    say_next(shared.command(settings, "actions resume --by NAME --why TEXT" if worked["halted"] else "actions list"))


# -- the kill switch ---------------------------------------------------------------------------------------------------


@app.command("halt", epilog=examples('actions halt --by Ada --why "wrong prices in the shop"'))
def halt(by: By, why: Why, as_json: Json = False) -> None:
    """Kill switch: nothing leaves any more, whatever is under way. Detection and packs go on."""
    _switch("yes", by, why, as_json)


@app.command("resume", epilog=examples('actions resume --by Ada --why "prices are right again"'))
def resume(by: By, why: Why, as_json: Json = False) -> None:
    """Take the kill switch back; what waited leaves when it is due."""
    _switch("no", by, why, as_json)


def _switch(value: str, by: str, why: str, as_json: bool) -> None:
    from retention_ops.errors import LedgerError
    from retention_ops.execute import ledger
    from retention_ops.execute.door import HALTED
    from retention_ops.log.database import ops_database

    if not by.strip() or not why.strip():
        raise LedgerError("say who decides (--by) and why (--why); both are recorded")
    settings = shared.settings()
    with ops_database(settings) as engine:
        row = ledger.set_state(engine, HALTED, value, by, why, system_clock())
    if as_json:
        shared.print_json(row)
        return
    say("[red]Halted.[/red] Nothing leaves until somebody resumes." if value == "yes" else "[green]Resumed.[/green]")
    say_next(shared.command(settings, "actions resume --by NAME --why TEXT" if value == "yes" else "actions work"))
