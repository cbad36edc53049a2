"""`retention-ops morning`: one look of the schedule, for a home whose clock is cron or a timer."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import date
from typing import Annotated

import typer
from rich.markup import escape

from retention_ops.clock import system_clock
from retention_ops.commands import shared
from retention_ops.commands.runs import ask_source, run_range
from retention_ops.commands.shared import Json, say, say_next
from retention_ops.errors import RetentionOpsError
from retention_ops.settings import Settings

app = typer.Typer()


@app.command(epilog=shared.examples("morning", "morning --wait", "morning --json"))
def morning(
    wait: Annotated[bool, typer.Option("--wait", help="Look again every 15 minutes until data is complete or data_deadline has passed.")]
    = False,
    as_json: Json = False,
) -> None:
    """Asks the source, then computes what is owed: yesterday, whatever was missed before it, and what corrections made stale.

    Run it as often as you like: what is done is not done again. While `retention-ops ui` runs, its schedule does the same by itself.
    A source that cannot be read keeps nobody from what can be computed; exits 1 then.
    """
    from retention_ops.sources.morning import ASKED_AGAIN, owed

    settings = shared.settings()
    while True:
        found, summary, problem = owed(shared.lake(settings), system_clock), None, ""
        if found.waits and settings.source:
            try:
                ask_source(settings, as_json)
            except RetentionOpsError as error:
                problem = str(error)
                shared.err.print(f"[red]error[/red] {escape(problem)}", soft_wrap=True, highlight=False)
            found = owed(shared.lake(settings), system_clock)
        due = (found.due[0], found.due[-1]) if found.due else _failed(settings, found.newest)
        if due:
            first, last = due
            if not as_json:
                dates = f"{first} to {last}" if last > first else f"{first}"
                why = f"{found.missed:,} not computed yet, {found.stale:,} corrected since" if found.due else "the run before failed"
                say(f"Due: {dates} ({why})")
            summary = run_range(settings, first, last, as_json, show_json=False)
        if not wait or not found.waits or found.late:
            break
        shared.err.print(escape(found.waits), soft_wrap=True)
        time.sleep(ASKED_AGAIN.total_seconds())
    if as_json:
        shared.print_json({**asdict(found), "run": summary, "source_problem": problem or None})
    elif found.waits:
        say(escape(f"{found.waits[0].upper()}{found.waits[1:]}."))
        say_next(shared.command(settings, "status"))
    elif not due:
        say(f"{found.newest} is computed, and nothing before it was missed.")
        say_next(shared.command(settings, f"explain --date {found.newest}"))
    if problem:
        raise typer.Exit(1)


def _failed(settings: Settings, newest: date) -> tuple[date, date] | None:
    """The dates of the newest run, where it failed after its alerts were stored."""
    if not (settings.home / "dagster").is_dir():
        return None
    from retention_ops.launch import close_killed_runs, instance
    from retention_ops.orchestration import dates_to_repeat

    with instance(settings) as stored:
        close_killed_runs(stored)
        return dates_to_repeat(stored, settings, newest)
