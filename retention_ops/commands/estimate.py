"""`retention-ops run --dry-run`: what a date would cost in BigQuery, before it costs anything."""

from __future__ import annotations

from datetime import date

from retention_ops.commands import shared
from retention_ops.commands.shared import print_json, say
from retention_ops.settings import Settings


def show_estimate(settings: Settings, day: date, as_json: bool) -> None:
    """Prints the bytes each rule would scan for D, their sum, and what is left of the month's budget."""
    lake = shared.lake(settings)
    if lake.engine == "lake":
        scanned: dict[str, int] = {}
    else:
        from retention_ops.detect.in_bigquery import estimates

        scanned = estimates(lake, day)
    budget = settings.bigquery_monthly_budget_gb
    used = lake.jobs.month_bytes() if scanned and budget else None
    if as_json:
        print_json({"date": day, "engine": lake.engine, "bytes": scanned, "total": sum(scanned.values()), "billed_this_month": used})
        return
    if not scanned:
        say(f"{day}: computed from local files; nothing is billed (RETENTION_OPS_WAREHOUSE=lake).")
        return
    for table, count in scanned.items():
        say(f"{count:>18,} bytes  {table}")
    say(f"{sum(scanned.values()):>18,} bytes in all for {day}. Nothing was computed; BigQuery bills at least 10 MB per table read.")
    if used is not None:
        say(f"{used:>18,} bytes billed this month, of a budget of {budget:g} GB.")
