"""`retention-ops actions preview`: what an answer would say and where it would go, without planning or sending any of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from sqlalchemy.engine import Engine

from retention_ops.commands import actions, content, shared
from retention_ops.commands.shared import Json, examples, say, say_next
from retention_ops.errors import NoOrders
from retention_ops.settings import Settings

app = typer.Typer()

WRITTEN = "audience_current"
"""the only table that building a pack writes into the lake"""


@app.command("preview", epilog=examples("actions preview --date 2026-06-30",
                                        "actions preview --date 2026-06-30 --mode pilot --json"))
def preview(
    day: Annotated[date, shared.date_option("--date", "Reference date.")],
    mode: Annotated[
        Literal["shadow", "pilot", "live"] | None,
        typer.Option("--mode", help="As this mode would do it; default: the mode in force, or live while that is off or shadow."),
    ] = None,
    as_json: Json = False,
) -> None:
    """A dry run: the decision for a date and every message, ticket and list it would send. Nothing is written or sent."""
    settings = shared.settings()
    if not settings.home.exists():
        raise NoOrders(f"there is nothing in {settings.home} yet; `retention-ops ingest FILE --preset orders` comes first")
    mode = mode or (settings.mode if settings.mode in ("pilot", "live") else "live")
    with _scratch(settings, mode) as (scratch, engine):
        decision, intents = actions.responder(scratch, engine, writes=False).on(day).preview(day)
    rows = [_row(intent) for intent in intents]
    if as_json:
        shared.print_json({"date": day, "mode": mode, "decision": decision, "actions": rows})
        return
    reason = decision.reason.removeprefix(f"{decision.verdict}: ")
    say(f"{day} in mode {mode}: [bold]{decision.verdict}[/bold], {escape(reason)}. Nothing was written or sent.")
    for row in rows:
        _show(row)
    _say_next(settings, day, mode, bool(rows))


@contextmanager
def _scratch(settings: Settings, mode: str) -> Iterator[tuple[Settings, Engine]]:
    """Settings on a throw-away home that reads the real lake, and the real database.

    The pack is built there: lists for another mode differ (holdout) and must not replace those in use.
    """
    with tempfile.TemporaryDirectory(prefix="retention-ops-preview-") as folder:
        home = Path(folder)
        (home / "lake").mkdir()
        for table in (settings.home.absolute() / "lake").glob("*"):
            if table.is_dir() and table.name != WRITTEN:
                (home / "lake" / table.name).symlink_to(table)
        with shared.database(settings) as engine:
            yield settings.model_copy(update={"home": home, "mode": mode}), engine


def _row(intent: Any) -> dict[str, Any]:
    return {
        "slot": intent.slot, "destination": intent.destination, "kind": intent.kind, "target": intent.target, "key": intent.key,
        "held_because": intent.hold, "needs_approval": dict(intent.approval), "payload": dict(intent.payload),
    }


def _show(row: dict[str, Any]) -> None:
    where = f" to {escape(row['target'])}" if row["target"] else ""
    say(f"\n[bold]{row['slot']} {row['kind']}[/bold] by {row['destination']}{where}")
    if row["held_because"]:
        say(f"  [yellow]would wait for a person: {escape(row['held_because'])}[/yellow]")
    if row["needs_approval"]:
        say(f"  [yellow]would wait for the approval of {row['needs_approval']['customers']:,} customers[/yellow]")
    for line in content.full_lines(row["slot"], row["destination"], row["payload"]):
        say(f"  {escape(line)}")


def _say_next(settings: Settings, day: date, mode: str, acts: bool) -> None:
    if not acts:
        say_next(shared.command(settings, f"actions list --date {day}"), shared.command(settings, f"explain --date {day}"))
    elif mode == settings.mode:
        say_next(shared.command(settings, f"run --date {day}"))
    else:
        say_next(shared.command(settings, f"doctor --mode {mode}" if mode != "shadow" else "doctor"))
