"""`retention-ops forget`, `export-person` and `ids`: what the law asks for about one person, and how to find them here."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from retention_ops.clock import system_clock
from retention_ops.commands import shared
from retention_ops.commands.shared import Json, count, examples, moment, say, say_next
from retention_ops.errors import InputRefused, RetentionOpsError, SettingsError, UsageError
from retention_ops.settings import Settings

app = typer.Typer()
Ids = Annotated[list[str], typer.Argument(
    metavar="ID...", parser=shared.clean, show_default=False, help="Customer ids or e-mail addresses; - reads them from standard input.")]
FROM_INPUT = "-"


@app.command(epilog=examples("forget C000123 --dry-run", "forget anna@example.com", "forget - --yes < ids.txt"))
def forget(
    ids: Ids,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be erased and what could not be reached.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Erase people everywhere and keep them out of later files. Totals and the audit log stay as they were."""
    from retention_ops.commands.actions import responder
    from retention_ops.execute import forget as erasing
    from retention_ops.log.database import ops_database
    from retention_ops.sources.identity import MAKE_A_KEY, identity_of

    settings = shared.settings()
    lake = shared.lake(settings)
    if lake.orders() is None:
        raise RetentionOpsError(f"nothing was ever ingested into {settings.home}, so nobody is held there; name another home with --home")
    identity = identity_of(settings)
    if not identity.key and not dry_run:
        raise SettingsError(
            f"to keep forgotten customers out of later files a key is needed, and RETENTION_OPS_ID_KEY is not set.\n{MAKE_A_KEY}")
    given, held = _people(settings, ids)
    with ops_database(settings) as engine:
        acting = responder(settings, engine)
        if dry_run:
            found = erasing.preview(acting, [*held, *given])
            _show_preview(settings, found, as_json)
            return
        if going := _runs_under_way(settings):
            raise RetentionOpsError(f"{going}: what is erased now could be written back. Wait until they have ended, or stop them in the "
                                    "UI, and run the same command again")
        if not yes:
            _ask(erasing.preview(acting, [*held, *given]), len(held), as_json)
        with shared.err.status("erasing") if not as_json else shared.nothing() as spinner:
            outcome = erasing.forget(acting, held, identity, given, lambda step: spinner.update(escape(step)) if spinner else None)
    begun = _runs_under_way(settings)  # it may have read the old orders before they went
    if as_json:
        shared.print_json({"erased": outcome.erased, "unreached": outcome.unreached, "waiting": outcome.waiting, "before": outcome.before,
                           "run_again": bool(begun)})
    else:
        _show_outcome(settings, outcome, len(held))
    if begun:
        shared.err.print(f"[yellow]{begun} since[/yellow]: run the same command again once they have ended.", soft_wrap=True)
    if outcome.waiting or begun:
        raise typer.Exit(1)


def _people(settings: Settings, ids: list[str]) -> tuple[list[str], list[str]]:
    """(as given, as held here) without repeats."""
    from retention_ops.sources.identity import held_as

    given = [line.strip() for line in sys.stdin] if ids == [FROM_INPUT] else [each.strip() for each in ids]
    given = list(dict.fromkeys(filter(None, given)))
    if not given:
        raise UsageError("name at least one customer id")
    return given, list(dict.fromkeys(held_as(settings, each) for each in given))


def _runs_under_way(settings: Settings) -> str:
    """Runs that hold rows in memory and could write them back, in words; empty where there are none."""
    from retention_ops.launch import instance, runs_under_way

    with instance(settings) as stored:
        going = runs_under_way(stored)
    return f"{count(len(going), 'run')} under way ({', '.join(each[:8] for each in going)})" if going else ""


def _ask(found: Any, people: int, as_json: bool) -> None:
    if as_json:
        raise UsageError("--json asks nothing: say --yes to erase, or --dry-run to look first")
    _say_places(found.places, "is held")
    if not typer.confirm(f"Erase {count(people, 'customer')} for good?"):
        raise typer.Exit(1)


def _say_places(places: dict[str, int], what: str) -> None:
    for place, number in places.items():
        say(f"  {escape(place)}: {number:,}")
    if not places:
        say(f"Nothing {what}.")


def _show_preview(settings: Settings, found: Any, as_json: bool) -> None:
    if as_json:
        shared.print_json({"would_erase": found.places, "unreached": found.unreached})
        return
    say("Would be erased (rows, files or partitions):")
    _say_places(found.places, "would be erased")
    _say_unreached(found.unreached)
    say_next(shared.command(settings, "forget ID..."))


def _say_unreached(unreached: list[str]) -> None:
    say("Out of reach, for you to see to:")
    for text in unreached:
        say(f"  - {escape(text)}")


def _show_outcome(settings: Settings, outcome: Any, people: int) -> None:
    say(f"[green]Erased[/green] {count(people, 'customer')} (rows, files or partitions):")
    _say_places(outcome.erased, "was left to erase")
    for row in outcome.before:
        say(f"[dim]First asked for on {moment(row['requested_at'])}.[/dim]")
    for row in outcome.waiting:
        say(f"[yellow]A worksheet is still there:[/yellow] action {row['key'][:12]} is {shared.state(row['state'])}: "
            f"{escape(row['why'] or '')}")
    _say_unreached(outcome.unreached)
    say("Totals of dates built before still count them; a date built again does not, so its numbers may differ by one.")
    say_next(shared.command(settings, "actions work" if outcome.waiting else "audit verify"))


@app.command("export-person", epilog=examples("export-person C000123", "export-person anna@example.com --out anna.md",
                                              "export-person C000123 --json --out anna.json"))
def export_person(
    customer: Annotated[str, typer.Argument(metavar="ID", parser=shared.clean, show_default=False, help="Customer id or e-mail address.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write it to this file, readable by you only.")] = None,
    as_json: Json = False,
) -> None:
    """Everything that is held about one person, for that person to read."""
    from retention_ops import person
    from retention_ops.log.database import ops_database
    from retention_ops.sources.identity import held_as
    from retention_ops.warehouse.files import write_atomic

    settings = shared.settings()
    lake, held = shared.lake(settings), held_as(settings, customer)
    if shared.has_database(settings):
        with ops_database(settings) as engine:
            found = person.export(lake, engine, held, system_clock())
    else:
        found = person.export(lake, None, held, system_clock())
    if not found["held"]:
        raise RetentionOpsError("nothing is held under this id; ids are written exactly as in the orders")
    orders = lake.orders()
    text = json.dumps(shared.plain(found), indent=2, ensure_ascii=False) if as_json else person.as_markdown(
        found, orders.currency if orders else settings.currency)
    if out is None:
        sys.stdout.write(text + "\n")
        return
    write_atomic(out.absolute(), text + "\n", mode=0o600)
    if not as_json:
        say(f"Written to {escape(str(out))}, readable by you only. Hand it over on a safe way and delete it.")
        say_next(shared.command(settings, "forget ID... --dry-run"))


@app.command(epilog=examples("ids anna@example.com", "ids --file crm.csv --column email --out crm_with_ids.csv"))
def ids(
    given: Annotated[list[str] | None, typer.Argument(
        metavar="[ID]...", parser=shared.clean, show_default=False, help="E-mail addresses or ids of the shop.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="The shop's own list, csv with a header.")] = None,
    column: Annotated[str, typer.Option("--column", help="Its column with the address or id that was ingested.")] = "email",
    out: Annotated[Path | None, typer.Option("--out", help="The same list with a column customer_id; readable by you only.")] = None,
) -> None:
    """Under which id somebody is held here: finds the people of a brief or a list in the shop's own records.

    A hash cannot be turned back. So it goes the other way round: the shop's list gets our ids, and can then be joined with ours.
    """
    from retention_ops.sources.identity import held_as

    settings = shared.settings()
    if bool(given) == bool(file):
        raise UsageError("name ids, or a --file with them")
    if file is None:
        for each in given:
            say(escape(held_as(settings, each)))
        return
    if out is None:
        raise UsageError("--file needs --out: addresses belong into a file that only you can read, not onto a screen")
    rows = _with_ids(settings, file, column, out)
    say(f"{count(rows, 'row')} with their customer_id in {escape(str(out))}, readable by you only. Delete it when you are done.")
    say_next(shared.command(settings, "status"))


def _with_ids(settings: Settings, file: Path, column: str, out: Path) -> int:
    """Copies a csv with a column customer_id in front; returns its rows."""
    from retention_ops.sources.identity import Identity, identity_of, versions_in_force
    from retention_ops.warehouse.files import replacing

    hashed = next((version for version in versions_in_force(settings) if version.id_key), None)
    identity = identity_of(settings)
    if hashed and identity.fingerprint != hashed.id_key:
        raise SettingsError(f"customer ids here were hashed with the key {hashed.id_key}: set RETENTION_OPS_ID_KEY to it")
    kept = Identity(hashed.id_hashing if hashed else "off", identity.key)
    with open(file, encoding="utf-8-sig", newline="") as lines, replacing(out.absolute(), mode=0o600) as partial:
        reader = csv.reader(lines)
        header = next(reader, [])
        if column not in header:
            raise InputRefused(f"{file.name} has no column {column}; it has {', '.join(header[:10])}. Name one with --column")
        place, rows = header.index(column), 0
        partial.touch(mode=0o600)
        with open(partial, "w", encoding="utf-8", newline="") as target:
            writer = csv.writer(target)
            writer.writerow(["customer_id", *header])
            for row in reader:
                value = row[place].strip() if place < len(row) else ""
                writer.writerow([kept.kept(value) if value else "", *row])
                rows += 1
    return rows
