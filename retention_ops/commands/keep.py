"""`retention-ops backup`, `restore` and `upgrade`: what a disaster or a new release leaves of an installation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from retention_ops.commands import shared
from retention_ops.commands.shared import Json, count, examples, say, say_next
from retention_ops.settings import Settings

app = typer.Typer()
Into = Annotated[Path | None, typer.Option("--into", metavar="HOME", help="Home to restore into; default: the home in force.")]


@app.command(epilog=examples("backup", "backup --to /var/backups/retention-ops", "backup --to friday.tar --json"))
def backup(
    to: Annotated[
        Path, typer.Option("--to", metavar="FOLDER|FILE", help="Where the file goes; in a folder it is named by the time.")] = Path(),
    as_json: Json = False,
) -> None:
    """Write the ops database, the orders, customers and suppressions in force, every alert row and the settings into one file.

    A consistent picture of one moment, also while runs write. Holds personal data (mode 0600) and no secret.
    """
    from retention_ops.backup import back_up

    settings = shared.settings()
    with shared.err.status("looking") if not as_json else shared.nothing() as spinner:
        saved = back_up(settings, to, say=_spin(spinner))
    if as_json:
        manifest = {name: value for name, value in saved.manifest.items() if name != "files"}
        files = len(saved.manifest["files"])
        shared.print_json({"file": saved.file, "bytes": saved.bytes, "sha256": saved.sha256, "files": files, **manifest})
        return
    rows = saved.manifest["rows"]
    say(f"{escape(str(saved.file))}: {saved.bytes:,} bytes, {count(len(saved.manifest['files']), 'file')}, each read back and proven.")
    say(f"Ops database at schema {saved.manifest['ops_schema'] or 'none'}: {count(rows.get('actions', 0), 'action')}, "
        f"{count(rows.get('ops_runs_log', 0), 'log row')}. Not in it: what the orders give again (other partitions, packs) and "
        "Dagster's runs.")
    say_next(f"retention-ops restore {saved.file} --into NEW_HOME")


@app.command(epilog=examples("restore retention-ops-backup-20260630T040000Z.tar", "restore friday.tar --into /srv/retention-ops",
                             "restore friday.tar --force"))
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `backup` wrote.", exists=True, dir_okay=False, show_default=False)],
    into: Into = None,
    force: Annotated[bool, typer.Option("--force", help="Move aside what the home or its ops database holds.")] = False,
    as_json: Json = False,
) -> None:
    """Put a backup in place: whole or not at all, every hash proven first. Stop the services of that home before.

    The ledger then stays in shadow until `actions reconcile` has looked outside.
    """
    from retention_ops.backup import FILES_OF_BACKUP
    from retention_ops.backup import restore as put_back
    from retention_ops.settings import load_settings

    settings = load_settings(home=into) if into else shared.settings()
    with shared.err.status("looking") if not as_json else shared.nothing() as spinner:
        done = put_back(file, settings, force=force, say=_spin(spinner))
    if as_json:
        manifest = {name: value for name, value in done.manifest.items() if name != "files"}
        shared.print_json({"home": done.home, "moved": done.moved, "settings_differ": done.differs, "held": True, **manifest})
        return
    say(f"{escape(str(done.home))} holds the backup of {escape(str(done.manifest['created_at']))}, every file proven.")
    if done.moved:
        say(f"What was there lies in {escape(str(done.moved))}.")
    for name, (then, now) in done.differs.items():
        say(f"[yellow]setting {name} was {escape(str(then))}, is {escape(str(now))}[/yellow]")
    if (own := done.home / FILES_OF_BACKUP).is_dir():
        say(f"As they were then, for you to compare: {', '.join(escape(str(file)) for file in sorted(own.iterdir()))}.")
    say("[red]Nothing leaves[/red] until the ledger is reconciled. Bring in the orders since the backup, build the dates, then reconcile.")
    use = f"--home {done.home} " if into else ""
    orders = "source pull" if settings.source else "ingest FILE --preset orders --replace"
    say_next(f"retention-ops {use}{orders}", f"retention-ops {use}status", f"retention-ops {use}actions reconcile")


@app.command(epilog=examples("upgrade --dry-run", "upgrade", "upgrade --rebuild"))
def upgrade(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is there and what would be done.")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Compute again the dates whose columns or rules are another release's.")] = False,
    as_json: Json = False,
) -> None:
    """After installing a release: migrate the ops database, record the lake's schema, say which dates and packs are another release's.

    Sends nothing: the ledger is held at shadow meanwhile, and what only the new release brings about is answered to nobody.
    """
    from retention_ops.upgrade import plan
    from retention_ops.upgrade import upgrade as go

    settings = shared.settings()
    if dry_run:
        found = plan(settings)
    else:
        with shared.err.status("upgrading") if not as_json else shared.nothing() as spinner:
            found = go(settings, compute=_compute(settings) if rebuild else None, say=_spin(spinner))
    if as_json:
        shared.print_json({**vars(found), "dates": found.dates, "done": not dry_run, "rebuilt": rebuild and not dry_run})
        return
    _show_plan(settings, found, dry_run, rebuild and not dry_run)


def _compute(settings: Settings) -> Any:
    """Runs the daily loop over a range."""
    from retention_ops.definitions import build_loop
    from retention_ops.errors import RetentionOpsError
    from retention_ops.launch import run_dates

    def compute(first: Any, last: Any) -> None:
        outcome = run_dates(build_loop(settings), first, last)
        if not outcome.success:
            raise RetentionOpsError("; ".join(outcome.errors) + "; the ledger stays held, `retention-ops upgrade --rebuild` goes on")

    return compute


def _show_plan(settings: Settings, found: Any, dry_run: bool, rebuilt: bool) -> None:
    was, now = ("", "would be ") if dry_run else ("was ", "")
    there, here = found.ops_schema
    say(f"ops database: {'none yet' if there is None else f'schema {there}'}"
        + (f", {now}migrated to {here}" if there not in (None, here) else ""))
    there, here = found.lake_schema
    say(f"lake: {'none yet' if there is None else f'schema {there}'}" + (f", {now}recorded as {here}" if there not in (None, here) else ""))
    for table in found.tables:
        for columns, days in table.lack_columns.items():
            say(f"{table.table}: {shared.dates(days)} lack {escape(columns)}")
        if table.other_sql:
            say(f"{table.table}: {shared.dates(table.other_sql)} computed by another release's rules")
    if found.packs:
        say(f"packs: {shared.dates(found.packs)} of an older schema")
    if not found.dates:
        say("Every date is this release's.")
    elif rebuilt:
        say(f"[green]{shared.dates(found.dates)} {was}computed again.[/green]")
    else:
        say(f"{shared.dates(found.dates)} {now or 'can be '}computed again with --rebuild; they are read as they are until then.")
    if dry_run:
        say_next(shared.command(settings, "backup"), shared.command(settings, "upgrade" + (" --rebuild" if found.dates else "")))
    else:
        say_next(shared.command(settings, "status") if rebuilt or not found.dates else shared.command(settings, "upgrade --rebuild"))


def _spin(spinner: Any):
    return lambda text: spinner.update(escape(text)) if spinner else None
