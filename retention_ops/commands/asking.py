"""`retention-ops alerts` and `explain`: what was measured, and why it was judged so."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from retention_ops.commands import shared
from retention_ops.commands.shared import Json, count, say, say_next
from retention_ops.errors import UsageError
from retention_ops.settings import Settings

app = typer.Typer()
RULE_NAMES = {"retention_status_degradation": "AT_RISK %", "returning_customers_shortfall": "returning"}


@app.command(epilog="Examples:\n\n  retention-ops alerts --from 2026-06-01 --to 2026-06-30\n\n"
                    "  retention-ops alerts --from 2026-06-01 --to 2026-06-30 --json")
def alerts(
    first: Annotated[date, shared.date_option("--from", "First date.")],
    last: Annotated[date, shared.date_option("--to", "Last date.")],
    as_json: Json = False,
) -> None:
    """The stored alert_logic rows of a range."""
    from retention_ops.package.pack import records

    settings = shared.settings()
    if first > last:
        raise UsageError(f"--from {first} is after --to {last}")
    rows = records(shared.lake(settings).read_range("alert_logic", first, last))
    if as_json:
        shared.print_json(rows)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    numbers = ("value", "baseline", "change %")
    for name in ("date", "rule", "severity", *numbers, "held back by"):
        table.add_column(name, no_wrap=True, justify="right" if name in numbers else "left")
    for row in rows:
        number = [f"{row[name]:.2f}" if row[name] is not None else "" for name in ("current_value", "baseline_value", "delta_relative_pct")]
        table.add_row(row["alert_date"], RULE_NAMES.get(row["alert_type"], row["alert_type"]), shared.severity(row["severity"]), *number,
                      row["gate"] or "")
    shared.out.print(table)
    say("AT_RISK %: the share against the mean of the 7 days before. returning: customers who came back against how many were due.")
    missing = (last - first).days + 1 - len({row["alert_date"] for row in rows})
    if missing:
        say(f"{missing} of {count((last - first).days + 1, 'date')} not built.")
        orders = shared.lake(settings).orders()
        start = max(first, settings.start_date or orders.first_date) if orders else first
        if start <= last:
            say_next(shared.command(settings, f"backfill --from {start} --to {last}"))


@app.command(epilog="Examples:\n\n  retention-ops explain --date 2011-01-20\n\n  retention-ops explain --customer 17381 --date 2011-09-30")
def explain(
    day: Annotated[date, shared.date_option("--date", "Reference date.")],
    customer: Annotated[
        str | None, typer.Option("--customer", parser=shared.clean, metavar="ID", help="Explain this customer instead of the alert.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The rule, the numbers and the verdict of a date, or of one customer on a date, in sentences.

    Of a date also what was seen then: how its stored alert differs from the one computed now, and which orders, settings or rules changed.
    """
    from retention_ops.detect.explain import explain_customer, explain_date

    settings = shared.settings()
    lake = shared.lake(settings)
    if customer:
        from retention_ops.sources.identity import held_as

        customer = held_as(settings, customer)
    facts, sentences = explain_customer(lake, customer, day) if customer else explain_date(lake, day, _recorded(settings, day))
    if as_json:
        shared.print_json({"facts": facts, "sentences": sentences})
        return
    for sentence in sentences:
        say(f"- {escape(sentence)}")


def _recorded(settings: Settings, day: date) -> Any:
    """What the ops database knows of D; nothing where there is none yet."""
    from retention_ops.detect.since import Records
    from retention_ops.log import runs, settings_history
    from retention_ops.log.database import ops_database

    if not shared.has_database(settings):
        return Records()
    with ops_database(settings) as engine:
        sets = settings_history.every(engine)
        return Records(sets.get, tuple(runs.rows(engine, first=day, last=day)))
