"""`retention-ops closures`: public holidays and planned closures, and which of them count as days without trade."""

from __future__ import annotations

from datetime import date
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from retention_ops.commands import shared
from retention_ops.commands.shared import Json, count, examples, say, say_next
from retention_ops.errors import UsageError

app = typer.Typer()
CLOSED = {True: "closed", False: "ordinary day", None: "not known yet"}


@app.command(epilog=examples("closures --from 2026-01-01 --to 2026-12-31", "closures --from 2026-01-01 --to 2026-12-31 --json"))
def closures(
    first: Annotated[date, shared.date_option("--from", "First date.")],
    last: Annotated[date, shared.date_option("--to", "Last date.")],
    as_json: Json = False,
) -> None:
    """Public holidays and planned closures of a range, and which of them count as days without trade."""
    from retention_ops.detect.compute import closures_between

    settings = shared.settings()
    if first > last:
        raise UsageError(f"--from {first} is after --to {last}")
    rows = closures_between(shared.lake(settings), first, last)
    if as_json:
        shared.print_json(rows)
        return
    if rows:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for name in ("date", "", "kind", "orders", "counts as", "reason"):
            table.add_column(name, no_wrap=name != "reason", justify="right" if name == "orders" else "left")
        for row in rows:
            orders = f"{row['orders']:,}" if row["orders"] is not None else ""
            table.add_row(str(row["date"]), f"{row['date']:%a}", row["kind"], orders, CLOSED[row["closed"]], escape(row["reason"]))
        shared.out.print(table)
        say("A planned closure is closed. A public holiday is closed where it had fewer than half the weekday's usual orders; "
            "any other day without orders is an outage or missing data.")
    else:
        say(f"No public holiday and no planned closure in {count((last - first).days + 1, 'day')}.")
    if settings.holiday_country or settings.closures_file:
        say_next(shared.command(settings, "status"))
    else:
        say("Set RETENTION_OPS_HOLIDAY_COUNTRY (such as GB-ENG) or RETENTION_OPS_CLOSURES_FILE (csv from,to,reason).")
        say_next(shared.command(settings, "doctor"))
