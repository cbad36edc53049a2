"""`retention-ops ingest`: files in, and what was found in them."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from retention_ops.commands import shared
from retention_ops.commands.shared import Json, count, say, say_next
from retention_ops.settings import Settings

app = typer.Typer()
ORDERS = ("orders", "refunds")
"""what makes a version of the orders"""


@app.command(epilog="Examples:\n\n  retention-ops ingest orders.csv --preset orders\n\n"
                    "  retention-ops ingest year1.parquet year2.xlsx --preset uci-online-retail\n\n"
                    "  retention-ops ingest orders.csv --preset orders --replace --complete-through 2026-06-30\n\n"
                    "  retention-ops ingest refunds.csv --preset refunds\n\n"
                    "  retention-ops ingest do_not_contact.csv --preset suppressions")
def ingest(
    files: Annotated[list[Path], typer.Argument(
        metavar="FILE...", help="csv, xlsx, parquet; several at once.", show_default=False)],
    preset: Annotated[str, typer.Option("--preset", help="uci-online-retail, cdnow, orders, refunds, customers or suppressions.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Known orders and refunds are corrected; suppressions: the whole list.")
    ] = False,
    complete_through: Annotated[date | None, shared.date_option("--complete-through", "Last date whose orders are all in.")] = None,
    show_values: Annotated[bool, typer.Option("--show-values", help="Show the offending values in error messages.")] = False,
    as_json: Json = False,
) -> None:
    """Check order files and add them to the lake. A file is taken whole or not at all."""
    from retention_ops.detect.compute import workspace
    from retention_ops.sources.ingest import ingest as take_in
    from retention_ops.status import packs_with_opted_out
    from retention_ops.warehouse.freshness import stored_from

    settings = shared.settings()
    lake = shared.lake(settings)
    with shared.err.status("opening files") if not as_json else shared.nothing() as spinner:
        report = take_in(
            files, preset, settings, replace=replace, complete_through=complete_through, show_values=show_values,
            progress=lambda text: spinner.update(escape(text)) if spinner else None,
        )
    record_ingestions(settings)
    if report.dataset in ORDERS:
        with workspace(lake):  # derives customer_days, so that the views are never without it
            pass
    lake.refresh_views()
    if report.dataset not in ORDERS:
        stale = packs_with_opted_out(lake)
    else:
        stale = stored_from(lake, report.stale_from) if report.changed and report.stale_from else []
    if as_json:
        shared.print_json({**shared.plain(report), "stale_dates": stale})
        return
    _show_ingest(report, stale, settings)


def record_ingestions(settings: Settings) -> None:
    """Copies what was taken in to the ops database; what a kill left out is made up by the next ingest."""
    from retention_ops.log import runs
    from retention_ops.log.database import ops_database
    from retention_ops.warehouse.versions import current_customers, current_suppressions, orders_versions

    customers, suppressions = current_customers(settings), current_suppressions(settings)
    with ops_database(settings) as engine:
        runs.record_ingestions(engine, "orders", orders_versions(settings))
        runs.record_ingestions(engine, "customers", [customers] if customers else [])
        runs.record_ingestions(engine, "suppressions", [suppressions] if suppressions else [])


def _show_ingest(report: Any, stale: list[date], settings: Settings) -> None:
    if not report.changed:
        say(f"Nothing new: these files are already in version {report.version}.")
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_row("records read", f"{report.records_read:,}")
    for reason, number in report.excluded.items():
        table.add_row(f"  left out: {escape(reason)}", f"{number:,}")
    if report.ids_hashed:
        table.add_row("customer ids kept as keyed hashes", f"{report.ids_hashed:,}")
    if report.dataset == "refunds":
        table.add_row("refunds known", f"{report.refunds:,} ({report.currency})")
        table.add_row("  added / changed / taken back / known",
                      f"{report.added:,} / {report.replaced:,} / {report.removed:,} / {report.unchanged:,}")
    elif report.dataset == "orders":
        table.add_row("orders in the lake", f"{report.rows:,} of {count(report.customers, 'customer')} ({report.currency})")
        table.add_row("  added / replaced / known", f"{report.added:,} / {report.replaced:,} / {report.unchanged:,}")
        table.add_row("dates", f"{report.first_date} to {report.last_date}")
        note = f": {report.complete_through_note}" if report.complete_through_note else ""
        table.add_row("complete through", f"{report.complete_through}{note}  (change with --complete-through)")
    elif report.dataset == "suppressions":
        table.add_row("customers suppressed", f"{report.rows:,}")
        table.add_row("  added / changed / lifted / known",
                      f"{report.added:,} / {report.replaced:,} / {report.removed:,} / {report.unchanged:,}  (only --replace lifts)")
    else:
        table.add_row("customers in the lake", f"{report.rows:,}")
        table.add_row("consent withdrawn / granted", f"{report.consent_withdrawn:,} / {report.consent_granted:,}")
    table.add_row("version", report.version)
    shared.out.print(table)
    for warning in report.warnings:
        say(f"[yellow]warning[/yellow] {escape(warning)}")
    if stale:
        named = "with lists that name customers who refused consent or are suppressed"
        why = {"orders": "built from older orders", "refunds": "built before these refunds were known"}.get(report.dataset, named)
        say(f"[yellow]Stale: {shared.dates(stale)}[/yellow], {why}.")
        say_next(shared.command(settings, f"backfill --from {stale[0]} --to {stale[-1]}"))
    elif report.dataset in ORDERS and report.complete_through < report.first_date:
        say("No day of these orders is over yet; come back tomorrow.")
    elif report.dataset in ORDERS:
        say_next(
            shared.command(settings, f"run --date {report.complete_through}"),
            shared.command(settings, f"backfill --from {report.first_date} --to {report.complete_through}"),
        )
    else:
        say_next(shared.command(settings, "status"))
