"""`retention-ops actions reconcile`: what did the lost installation send since the backup?"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any

import typer
from rich.markup import escape

from retention_ops.commands import shared
from retention_ops.commands.shared import Json, count, examples, moment, say, say_next
from retention_ops.settings import Settings

app = typer.Typer()
Row = dict[str, Any]


@app.command("reconcile", epilog=examples(
    "actions reconcile", 'actions reconcile --through 2026-06-28 --by Ada --why "the server was down from the 29th"',
    "actions reconcile --json"))
def reconcile(
    through: Annotated[
        date | None, shared.date_option("--through", "Last alert date the lost installation can have answered; default: the day before the "
                                                     "restore.")] = None,
    by: Annotated[str, typer.Option("--by", parser=shared.clean, metavar="NAME", help="Who knows that; recorded.")] = "",
    why: Annotated[str, typer.Option("--why", parser=shared.clean, metavar="TEXT", help="How; recorded.")] = "",
    as_json: Json = False,
) -> None:
    """After a restore: ask each destination what went out since the backup and take it over as sent. Sends nothing.

    Until it has succeeded a restored ledger stays in shadow.
    """
    from retention_ops.commands.actions import responder
    from retention_ops.execute.reconcile import reconcile as look
    from retention_ops.execute.trail import publish_log

    settings = shared.settings()
    with shared.database(settings) as engine:
        acting = responder(settings, engine, reconciling=True)
        with shared.err.status("asking") if not as_json else shared.nothing():
            found = look(acting, through=through, who=by or "retention-ops actions reconcile", why=why)
        if found.answered:
            publish_log(acting.lake, engine, sorted(set(found.answered)))
    if as_json:
        shared.print_json({**vars(found), "adopted": [_named(row) for row in found.adopted]})
    else:
        _show(settings, found)
    if not found.lifted:
        raise typer.Exit(1)


def _named(row: Row) -> Row:
    return {name: row[name] for name in ("key", "alert_date", "mode", "slot", "kind", "destination", "external_id", "external_url")}


def _show(settings: Settings, found: Any) -> None:
    lost = found.restored
    say(f"Backup of {moment(lost.backup_at)}, restored {moment(lost.restored_at)}: {count(found.asked, 'action')} asked for, "
        f"{len(found.adopted)} found and taken over as sent, {found.absent} not there.")
    for row in found.adopted:
        say(f"  {row['key'][:12]}  {row['alert_date']}  {row['slot']} {row['kind']} by {row['destination']}  "
            f"[dim]{escape(str(row['external_url'] or row['external_id']))}[/dim]")
    if found.answered:
        say(f"Answered before the loss: {', '.join(map(str, sorted(set(found.answered))))}.")
    for text in found.cannot_tell:
        say(f"[yellow]cannot be told: {escape(text)}; it waits for a person when its turn comes[/yellow]")
    for text in found.problems:
        say(f"[red]{escape(text)}[/red]")
    if found.missing:
        say(f"[yellow]{shared.dates(found.missing)} not computed yet, which the lost installation can have answered: bring the orders in "
            "and build them, or say with --through that it did not.[/yellow]")
    if found.lifted:
        say("[green]Reconciled.[/green] The mode is what the settings say again; what people decided since the backup (acknowledged, "
            "approved, closed, halted) is lost and has to be decided again.")
        say_next(shared.command(settings, "actions work"), shared.command(settings, "incidents list"))
        return
    say("Still held at shadow: nothing leaves.")
    if found.missing:
        say_next(shared.command(settings, "source pull" if settings.source else "ingest FILE --preset orders --replace"),
                 shared.command(settings, f"backfill --from {found.missing[0]} --to {found.missing[-1]}"),
                 shared.command(settings, "actions reconcile"))
    else:
        say_next(shared.command(settings, "doctor"), shared.command(settings, "actions reconcile"))
