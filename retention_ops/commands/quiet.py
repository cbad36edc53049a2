"""`retention-ops health` and `retention-ops digest`: is the installation itself well, and what a quiet week looks like."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from sqlalchemy.engine import Engine

from retention_ops.clock import shop_day, system_clock
from retention_ops.commands import shared
from retention_ops.commands.shared import Json, examples, moment, say, say_next
from retention_ops.errors import NoOrders, RetentionOpsError, UsageError
from retention_ops.settings import Settings

app = typer.Typer()

Row = dict[str, Any]


@app.command(epilog=examples("health", "health --json", "health --tell", "health --runbook data_late"))
def health(
    tell: Annotated[bool, typer.Option(
        "--tell", help="Also write down what began and what is over, and send what is due: alerts, digest, heartbeat.")] = False,
    runbook: Annotated[
        str | None, typer.Option("--runbook", parser=shared.clean, metavar="CAUSE", help="Print the one-page runbook of a cause.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What the data owner must know: a failed run, late data, a source that differs, waiting actions, too many alerts or none.

    Looks and sends nothing, unless --tell asks for what the daemon does every minute. Exits 1 while something is not well.
    """
    if runbook is not None:
        say(escape(_runbook(runbook)))
        return
    settings = shared.settings()
    with shared.database(settings) as engine:
        found, sent = _look(settings, engine, tell)
    if as_json:
        shared.print_json({"well": not found, "causes": found, "told": sent})
    else:
        _show(settings, found, sent, tell)
    if found:
        raise typer.Exit(1)


def _look(settings: Settings, engine: Engine, tell: bool) -> tuple[list[Row], list[Row]]:
    """What is not well now, each with when it opened where that was written down; and what --tell moved."""
    from retention_ops.commands.actions import responder
    from retention_ops.execute import health as watch
    from retention_ops.execute import quiet
    from retention_ops.launch import close_killed_runs, instance
    from retention_ops.metrics import write_metrics
    from retention_ops.orchestration import record_ended_runs

    with instance(settings) as stored:
        close_killed_runs(stored)
        record_ended_runs(engine, stored, system_clock)
    lake, sent = shared.lake(settings, writes=False), []
    if tell:
        rows = quiet.tell(responder(settings, engine))
        sent = [{name: row[name] for name in ("key", "slot", "kind", "destination", "state", "last_error")} for row in rows]
        write_metrics(engine, lake, settings, system_clock)
    opened = {(row["cause"], row["subject"]): row["opened_at"] for row in watch.open_causes(engine)}
    return [
        {"cause": each.cause, "subject": each.subject, "detail": each.detail, "opened_at": opened.get((each.cause, each.subject))}
        for each in watch.look(engine, lake, settings, system_clock)
    ], sent


def _show(settings: Settings, found: list[Row], sent: list[Row], tell: bool) -> None:
    from retention_ops.execute.wording import HEALTH

    for row in found:
        since = f", open since {moment(row['opened_at'])}" if row["opened_at"] else ""
        say(f"[yellow]{HEALTH[row['cause']]}[/yellow] ({row['cause']}{since}): {escape(row['detail'])}")
    if not found:
        say("[green]Well.[/green] The newest run succeeded, data is in time, nothing waits for a person.")
    for row in sent:
        say(escape(f"{row['slot']} {row['kind']} by {row['destination']}: {row['state']}")
            + (f" [dim]{escape(row['last_error'])}[/dim]" if row["last_error"] else ""))
    if tell and not sent:
        say("Nothing was due.")
    say_next(shared.command(settings, f"health --runbook {found[0]['cause']}" if found else "status"))


def _runbook(cause: str) -> str:
    """The page of docs/runbooks, which the package brings along."""
    from retention_ops.execute.health import CAUSES

    if cause not in CAUSES:
        raise UsageError(f"--runbook is one of {', '.join(CAUSES)}, not {cause!r}")
    package = Path(__file__).resolve().parents[1]
    # in a checkout the pages lie in docs/, in an installed wheel inside the package
    pages = (folder / f"{cause}.md" for folder in (package.parent / "docs" / "runbooks", package / "runbooks"))
    found = next((page for page in pages if page.is_file()), None)
    if found is None:
        raise RetentionOpsError(f"the runbook {cause}.md is missing beside {package}; install the package again")
    return found.read_text(encoding="utf-8").rstrip()


@app.command(epilog=examples("digest", "digest --date 2026-06-28", "digest --date 2026-06-28 --period daily --json"))
def digest(
    day: Annotated[date | None, shared.date_option("--date", "Last day of the period; default: that of the digest now due.")] = None,
    period: Annotated[
        Literal["weekly", "daily"] | None, typer.Option("--period", help="Default: the setting digest, or weekly while it is off.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Preview a digest: that we looked, whether the data was whole, and what there was to see. Sends nothing."""
    from retention_ops.execute.digest import collect, current_period, period_ending
    from retention_ops.package.digest import render_markdown, render_slack, view

    settings = shared.settings()
    if not settings.home.exists():
        raise NoOrders(f"there is nothing in {settings.home} yet; `retention-ops ingest FILE --preset orders` comes first")
    name = period or ("weekly" if settings.digest == "off" else settings.digest)
    today = shop_day(system_clock(), settings.shop_timezone)
    due = current_period(settings.model_copy(update={"digest": name}), today)
    wanted = period_ending(name, day) if day else due
    if wanted.last >= today:
        raise UsageError(f"{wanted.last} is not over yet in {settings.shop_timezone}; the newest full day is {today - timedelta(days=1)}")
    with shared.database(settings) if shared.has_database(settings) else shared.nothing() as engine:
        facts = collect(engine, shared.lake(settings, writes=False), settings, wanted)
    if as_json:
        shared.print_json({"digest": view(facts), "slack": render_slack(facts, settings), "markdown": render_markdown(facts, settings)})
        return
    say(escape(render_markdown(facts, settings)))
    say(f"A preview: nothing was sent. Setting digest is {settings.digest}, mode {settings.mode}.")
    say_next(shared.command(settings, "health --tell"), shared.command(settings, "status"))
