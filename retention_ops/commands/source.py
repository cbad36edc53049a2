"""`retention-ops source`: pull the orders from where they are, and see whether ours still say the same."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from retention_ops.commands import shared
from retention_ops.commands.shared import Json, count, examples, group, say, say_next
from retention_ops.settings import Settings

app = group("source", "Orders from where they are: pull them, and check ours against them.")
ShowValues = Annotated[bool, typer.Option("--show-values", help="Show the offending values in error messages.")]
CORRECTIONS = {
    "late": "came after their date was complete", "amount_changed": "have another amount", "date_changed": "have another date",
    "re_owned": "belong to another customer", "withdrawn": "count no more (status, test or amount)", "vanished": "are gone from the source",
    "refunded_late": "were refunded on dates that were complete", "refund_lowered": "are refunded by less than was known",
}
MOST_SHOWN = 40


@app.command("pull", epilog=examples("source pull", "source pull --full", "source pull --json"))
def pull(
    full: Annotated[bool, typer.Option("--full", help="Read everything, not only what may have changed.")] = False,
    accept_vanished: Annotated[
        bool, typer.Option("--accept-vanished", help="Take it that a large share of the known orders is really gone.")
    ] = False,
    show_values: ShowValues = False,
    as_json: Json = False,
) -> None:
    """Bring our orders to what the source has, and say what changed. Running it twice changes nothing."""
    from retention_ops.detect.compute import workspace
    from retention_ops.sources.check import pull_and_check
    from retention_ops.warehouse.freshness import stored_from

    settings = shared.settings()
    lake = shared.lake(settings)
    with shared.err.status("opening the source") if not as_json else shared.nothing() as spinner:
        report = pull_and_check(  # a person who pulls looks at what came; whether all of it did is asked by `source check`
            lake, check=False, full=full, accept_vanished=accept_vanished, show_values=show_values,
            progress=lambda text: spinner.update(escape(text)) if spinner else None,
        )
    with workspace(lake):  # derives customer_days, so that the views are never without it
        pass
    lake.refresh_views()
    stale = stored_from(lake, report.stale_from) if report.stale_from else []
    if as_json:
        shared.print_json({**shared.plain(report), "complete": report.complete, "stale_dates": stale})
        return
    _show_pull(report, stale, settings, lake)


def _show_pull(report: Any, stale: list[date], settings: Settings, lake: Any) -> None:
    if not report.changed:
        say(f"Nothing new: version {report.version} is what the source says.")
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    changed = f" and what changed since {report.changed_since}" if report.changed_since else ""
    table.add_row("read", f"{count(report.rows_read, 'row')}: {'everything' if report.full else f'since {report.since}{changed}'}")
    for reason, number in report.excluded.items():
        table.add_row(f"  left out: {escape(reason)}", f"{number:,}")
    table.add_row("orders in the lake", f"{report.orders:,} of {count(report.customers, 'customer')} ({report.currency})")
    table.add_row("  new / known", f"{report.new:,} / {report.unchanged:,}")
    if report.refunded:
        table.add_row("  refunded, or refunded by more", f"{report.refunded:,}")
    for kind, number in report.corrections.items():
        table.add_row(f"  corrections: {CORRECTIONS[kind]}", f"[yellow]{number:,}[/yellow]")
    if report.kept_before:
        table.add_row("  kept: older than the source's first date", f"{report.kept_before:,}")
    table.add_row("dates", f"{report.first_date} to {report.last_date}")
    table.add_row("complete through", f"{report.complete_through}: {escape(report.complete_note)}")
    table.add_row("version", report.version)
    shared.out.print(table)
    if report.unused_columns:
        say(f"Not used yet: {escape(', '.join(report.unused_columns))}.")
    for warning in report.warnings:
        say(f"[yellow]warning[/yellow] {escape(warning)}")
    if stale:
        say(f"[yellow]Stale: {shared.dates(stale)}[/yellow], built from older orders.")
        say_next(shared.command(settings, f"backfill --from {stale[0]} --to {stale[-1]}"))
    elif report.complete_through < report.first_date:
        say("No day of these orders is over yet; come back tomorrow.")
    elif lake.exists("alert_logic", report.complete_through):
        say_next(shared.command(settings, f"explain --date {report.complete_through}"))
    else:
        say_next(
            shared.command(settings, f"run --date {report.complete_through}"),
            shared.command(settings, f"backfill --from {report.first_date} --to {report.complete_through}"),
        )


@app.command("check", epilog=examples("source check", "source check --week 2026-06-15", "source check --all --json"))
def check(
    week: Annotated[date | None, shared.date_option("--week", "Show the week of this date; default: the last seven days.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Compare every date, not only the last lookback_days.")] = False,
    show_values: ShowValues = False,
    as_json: Json = False,
) -> None:
    """Compare the source with our orders, day by day, and show one week. Changes no order; exits 1 where they differ.

    What it found is recorded for `health`, which tells the data owner while the newest check is off. Each morning's pull checks once.
    """
    from retention_ops.sources.check import check_source, record_check

    settings = shared.settings()
    with shared.err.status("opening the source") if not as_json else shared.nothing() as spinner:
        report = check_source(
            shared.lake(settings, writes=False), week_of=week, everything=everything, show_values=show_values,
            progress=lambda text: spinner.update(escape(text)) if spinner else None,
        )
    if report.version is not None:
        with shared.database(settings) as engine:
            record_check(engine, report)
    if as_json:
        shared.print_json(report)
    else:
        _show_check(report, settings)
    if report.off:
        raise typer.Exit(1)


def _show_check(report: Any, settings: Settings) -> None:
    for reason, number in report.excluded.items():
        say(f"  left out: {escape(reason)}: {number:,}")
    shared.out.print(_days(report.week, ours=report.version is not None))
    if report.version is None:
        say(f"The source answers: {count(report.rows_read, 'row')} of the last {settings.lookback_days} days. Nothing was pulled yet.")
        say_next(shared.command(settings, "source pull"))
        return
    between = f"{report.since} to {report.through}"
    if not report.off:
        say(f"[green]The source and our orders agree[/green] on every day from {between}: {count(report.orders_compared, 'order')}.")
        say_next(shared.command(settings, "status"))
        return
    say(f"[red]{count(len(report.off), 'day')} from {between} differ:[/red]")
    shared.out.print(_days(report.off[-MOST_SHOWN:], ours=True))
    if len(report.off) > MOST_SHOWN:
        say(f"  ... and {len(report.off) - MOST_SHOWN:,} earlier ones (--json has all)")
    say_next(shared.command(settings, "source pull"), shared.command(settings, "source pull --full"))


def _days(days: list[Any], ours: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    names = ["date", "", "orders", "amount"] if not ours else ["date", "", "source", "ours", "source amount", "our amount", "differing"]
    for place, name in enumerate(names):
        table.add_column(name, justify="right" if place > 1 else "left", no_wrap=True)
    for row in days:
        theirs, mine = f"{row.source_cents / 100:,.2f}", f"{row.our_cents / 100:,.2f}"
        cells = [f"{row.source_orders:,}", theirs] if not ours else [
            f"{row.source_orders:,}", f"{row.our_orders:,}", theirs, mine, f"[red]{row.differing:,}[/red]" if row.differing else ""]
        table.add_row(str(row.day), f"{row.day:%a}", *cells)
    return table
