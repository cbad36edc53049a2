"""`retention-ops incidents`: what is going on, who has it, and whether the alarm was right."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import typer
from rich.markup import escape

from retention_ops.clock import system_clock
from retention_ops.commands import shared
from retention_ops.commands.shared import By, Json, Why, examples, moment, say, say_next
from retention_ops.errors import LedgerError, UsageError
from retention_ops.settings import Settings

app = shared.group("incidents", "Consecutive flagged days are one incident: who has it, its whole story, and whether the alarm was right.")

Row = dict[str, Any]
Number = Annotated[
    int,
    typer.Argument(metavar="ID", min=1, max=2**31 - 1, help="The incident's number, as `incidents list` shows it.", show_default=False),
]
LONGEST_SNOOZE = timedelta(days=90)
STATES_WITHOUT_JUDGEMENT = ("resolved", "retracted")


@app.command("list", epilog=examples("incidents list", "incidents list --all --json"))
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Closed ones too.")] = False, as_json: Json = False,
) -> None:
    """Open incidents, then ended ones that nobody has judged; newest first."""
    from retention_ops.execute import incidents

    settings = shared.settings()
    with shared.database(settings) as engine:
        rows = incidents.find(engine)
    if not everything:
        rows = [row for row in rows if row["state"] == "open"] + [row for row in rows if row["state"] in STATES_WITHOUT_JUDGEMENT]
    if as_json:
        shared.print_json(rows)
        return
    for row in rows:
        say(f"{row['id']:>4}  {shared.state(row['state'])}  {shared.severity(row['severity'])}  {row['opened_on']} to "
            f"{row['last_flagged_on']}  {row['mode']}  {_acknowledged(row)}")
    if not rows:
        say("No open incident.")
    say_next(shared.command(settings, f"incidents show {rows[0]['id']}" if rows else "status"))


def _acknowledged(row: Row) -> str:
    if row["verdict"]:
        return escape(f"judged {row['verdict']} by {row['closed_by']}")
    if row["state"] != "open":
        return "not judged yet"
    if row["acked_at"]:
        return escape(f"acknowledged by {row['acked_by']}")
    late = row["ack_by"] <= system_clock()
    return f"[red]acknowledgement overdue since {moment(row['ack_by'])}[/red]" if late else f"acknowledge by {moment(row['ack_by'])}"


@app.command("show", epilog=examples("incidents show 3", "incidents show 3 --html incident_3.html", "incidents show 3 --json"))
def show(
    number: Number,
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write the story as Markdown.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the story as one HTML page.")] = None,
    as_json: Json = False,
) -> None:
    """The story from detection to resolution. It names no customer."""
    from retention_ops.execute import story
    from retention_ops.warehouse.files import write_atomic

    for flag, file in (("--markdown", markdown), ("--html", html)):
        _check_writable(flag, file)
    settings = shared.settings()
    with shared.database(settings) as engine:
        facts = story.facts(engine, number)
    told = story.tell(facts)
    for file, render in ((markdown, story.markdown), (html, story.html)):
        if file:
            write_atomic(file, render(told))
    if as_json:
        shared.print_json(facts)
        return
    written = [file for file in (markdown, html) if file]
    for file in written:
        say(f"Written to {escape(str(file))}")
    if not written:
        _show(told)
    say_next(*(shared.command(settings, words) for words in _what_next(facts["incident"])))


def _check_writable(flag: str, file: Path | None) -> None:
    if file and file.is_dir():
        raise UsageError(f"{flag} {shared.clean(str(file))} is a folder; name a file in it")
    if file and not file.parent.is_dir():
        raise UsageError(f"{flag} {shared.clean(str(file))}: there is no folder {shared.clean(str(file.parent))}")


def _show(told: Any) -> None:
    say(f"[bold]{escape(told.title)}[/bold]")
    for sentence in told.sentences:
        say(escape(sentence))
    for section in told.sections:
        say(f"\n[bold]{section.heading}[/bold]")
        for row in section.rows:
            cells = (cell if isinstance(cell, str) else f"{cell.text} {cell.address}" for cell in row)
            say("  " + escape("  ".join(cell for cell in cells if cell)))


def _what_next(row: Row) -> list[str]:
    if row["state"] == "open" and not row["acked_at"]:
        return [f"incidents ack {row['id']} --by NAME"]
    if row["verdict"]:
        return ["incidents list --all"]
    return [f"incidents close {row['id']} --verdict real|expected|data|false --by NAME --why TEXT"]


@app.command("ack", epilog=examples("incidents ack 3 --by Ada"))
def acknowledge(number: Number, by: By, as_json: Json = False) -> None:
    """Say that somebody has it."""
    from retention_ops.execute import incidents

    settings = shared.settings()
    with shared.database(settings) as engine:
        row = incidents.acknowledge(engine, number, by, system_clock())
    _done(settings, row, f"Incident {number} is acknowledged by {row['acked_by']}, {moment(row['acked_at'])}.", as_json)


@app.command("snooze", epilog=examples('incidents snooze 3 --hours 48 --by Ada --why "known, the fix is on its way"',
                                       'incidents snooze 3 --until "2026-07-03 09:00" --by Ada --why holiday'))
def snooze(
    number: Number, by: By, why: Why,
    until: Annotated[
        str | None,
        typer.Option("--until", parser=shared.clean, metavar="'YYYY-MM-DD[ HH:MM]'", help="The shop's time; a date alone: its start."),
    ] = None,
    hours: Annotated[float | None, typer.Option("--hours", help="From now on; at most 2160, which is 90 days.")] = None,
    as_json: Json = False,
) -> None:
    """Be quiet for a while: updates are recorded, not sent; a rise to CRITICAL still is."""
    from retention_ops.execute import incidents

    if (until is None) == (hours is None):
        raise UsageError("say how long: either --until 'YYYY-MM-DD HH:MM' (shop time) or --hours N")
    if hours is not None and not 0 < hours <= LONGEST_SNOOZE / timedelta(hours=1):  # nan is in no range
        raise UsageError(f"--hours is more than 0 and at most {LONGEST_SNOOZE // timedelta(hours=1)} ({LONGEST_SNOOZE.days} days)")
    if not why.strip():
        raise LedgerError("say why (--why); it is recorded")
    settings, now = shared.settings(), system_clock()
    end = _shop_time(until, settings) if until is not None else now + timedelta(hours=hours)
    if end - now > LONGEST_SNOOZE:
        raise UsageError(f"--until is at most {LONGEST_SNOOZE.days} days from now")
    with shared.database(settings) as engine:
        row = incidents.snooze(engine, number, end, by, why, now)
    local = end.astimezone(ZoneInfo(settings.shop_timezone))
    _done(settings, row, f"Incident {number} is quiet until {local:%Y-%m-%d %H:%M} ({settings.shop_timezone}).", as_json)


def _shop_time(text: str, settings: Settings) -> datetime:
    for form in ("%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M", "%Y-%m-%d"):
        try:
            return datetime.strptime(text.strip(), form).replace(tzinfo=ZoneInfo(settings.shop_timezone)).astimezone(UTC)
        except (ValueError, OverflowError):
            continue
    raise UsageError(f"--until {text!r} is not a time like '2026-07-03 09:00' or a date like 2026-07-03")


@app.command("close", epilog=examples('incidents close 3 --verdict real --by Ada --why "the June promotion\'s customers left"'))
def close(
    number: Number, by: By, why: Why,
    verdict: Annotated[str, typer.Option("--verdict", parser=shared.clean, metavar="real|expected|data|false", help=(
        "real: customers did slip away; expected: known cause; data: the orders were wrong; false: nothing happened."))],
    as_json: Json = False,
) -> None:
    """Judge it. An open one ends with that; verdicts add up to the precision that `status` shows."""
    from retention_ops.execute import incidents

    if verdict not in incidents.VERDICTS:
        raise UsageError(f"--verdict is one of {', '.join(incidents.VERDICTS)}, not {verdict!r}")
    if not why.strip():
        raise LedgerError("say why (--why); it is recorded")
    settings = shared.settings()
    with shared.database(settings) as engine:
        row = incidents.close(engine, number, verdict, by, why, system_clock())
    _done(settings, row, f"Incident {number} is closed: {verdict}, says {by}.", as_json)


def _done(settings: Settings, row: Row, sentence: str, as_json: bool) -> None:
    if as_json:
        shared.print_json(row)
        return
    say(escape(sentence))
    say_next(shared.command(settings, f"incidents show {row['id']}"))
