"""`retention-ops run`, `backfill` and `demo`: start the loop and say what came of it."""

from __future__ import annotations

import json
import shlex
import shutil
from collections import Counter
from datetime import date, timedelta
from typing import Annotated, Any

import typer
from rich.markup import escape

from retention_ops.commands import shared
from retention_ops.commands.ingest import record_ingestions
from retention_ops.commands.shared import Json, say, say_next
from retention_ops.errors import NoOrders
from retention_ops.settings import Settings, load_settings

app = typer.Typer()
SHOWN_ANSWERS = 10
"""rows of ops_runs_log that are printed"""


@app.command(epilog="Examples:\n\n  retention-ops run --date 2011-09-30\n\n  retention-ops run --date 2011-09-30 --json")
def run(
    day: Annotated[date, shared.date_option("--date", "Reference date.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what BigQuery would scan; nothing is computed or billed.")] = False,
    as_json: Json = False,
) -> None:
    """Detect and package for one date, and respond according to the mode."""
    if dry_run:
        from retention_ops.commands.estimate import show_estimate

        show_estimate(shared.settings(), day, as_json)
        return
    run_range(shared.settings(), day, day, as_json)


@app.command(epilog="Examples:\n\n  retention-ops backfill --from 2011-01-01 --to 2011-12-09")
def backfill(
    first: Annotated[date, shared.date_option("--from", "First reference date.")],
    last: Annotated[date, shared.date_option("--to", "Last reference date.")],
    as_json: Json = False,
) -> None:
    """The same for every date of a range, in one run. A range that failed half-way heals by running it again."""
    run_range(shared.settings(), first, last, as_json)


def ask_source(settings: Settings, as_json: bool = False) -> None:
    """Brings the orders up to date where a source is set, and sees once a day whether they say the same."""
    if settings.source:
        from retention_ops.sources.check import pull_and_check

        with shared.err.status("pulling the orders") if not as_json else shared.nothing():
            pull_and_check(shared.lake(settings))


def run_range(settings: Settings, first: date, last: date, as_json: bool, *, show_json: bool = True) -> dict[str, Any]:
    """Runs the dates, shows what came of them (as JSON only with `show_json`); exits 1 where the run failed."""
    if shared.lake(settings).orders() is None:
        ask_source(settings, as_json)  # the first run has no dates before its orders are in; later ones pull by themselves
    if settings.home.exists() is False or shared.lake(settings).orders() is None:
        raise NoOrders("no orders yet: run `retention-ops ingest FILE --preset orders`, or `retention-ops demo` to look around")
    with shared.err.status("starting Dagster") if not as_json else shared.nothing():
        from retention_ops.definitions import build_loop
        from retention_ops.launch import run_dates
        from retention_ops.package.brief import check_templates
    check_templates(settings)  # a mistake in a company's template is found before anything is computed
    loop = build_loop(settings)
    with shared.progress(quiet=as_json) as step:
        loop.progress = step
        outcome = run_dates(loop, first, last)
    if not outcome.success:
        if as_json:
            shared.print_json({"run_id": outcome.run_id, "success": False, "errors": outcome.errors})
        if outcome.interrupted:
            shared.err.print("stopped. Finished dates are kept; the same command does the rest.")
            raise typer.Exit(130)
        for message in outcome.errors or ["the run failed; see it in `retention-ops ui`"]:
            shared.err.print(f"[red]failed[/red] {escape(message)}", soft_wrap=True)
        shared.err.print(f"run {outcome.run_id}. What was finished is kept; the same command heals the rest.")
        raise typer.Exit(1)
    summary = _summary(settings, first, last, outcome.run_id)
    if not as_json:
        _show_run(summary, settings)
    elif show_json:
        shared.print_json(summary)
    return summary


def _rises(alert: dict[str, Any]) -> bool:
    """The change alone would have been an alarm, before any safeguard."""
    change, limit = alert["delta_relative_pct"], alert["threshold_warning"]
    return change is not None and limit is not None and (round(change, 9) >= limit if limit > 0 else round(change, 9) <= round(limit, 9))


def _summary(settings: Settings, first: date, last: date, run_id: str) -> dict[str, Any]:
    from retention_ops.detect.alerts import alerts_by_day, answered_rules
    from retention_ops.log import runs
    from retention_ops.log.database import ops_database
    from retention_ops.package.pack import find_pack, records

    rows = records(shared.lake(settings).read_range("alert_logic", first, last))
    alerts = list(alerts_by_day(rows, answered_rules(settings)).values())
    pack = find_pack(settings, last)
    with ops_database(settings) as engine:
        log = [row for row in runs.rows(engine, first=first, last=last) if row["run_id"] == run_id]
    return {
        "run_id": run_id, "success": True, "from": first, "to": last, "dates": len(alerts),
        "flagged": [a for a in alerts if a["alert_flag"]],
        "gates": {gate: sum(a["gate"] == gate for a in alerts) for gate in sorted({a["gate"] for a in alerts if a["gate"]})},
        "silenced": sum(bool(a["gate"]) and _rises(a) for a in alerts),
        "alert": alerts[-1],
        "counts": {tier: entry["listed"] for tier, entry in pack.manifest["audiences"].items()},
        "handed_over": {tier: entry["rows"] for tier, entry in pack.manifest["audiences"].items()},
        "left_out": sum((Counter(entry["excluded"]) for entry in pack.manifest["audiences"].values()), Counter()),
        "packs": sum((settings.packs / alert["alert_date"]).exists() for alert in alerts),
        "pack": pack.folder, "files": sorted(pack.manifest["files"]),
        "facts_sha256": pack.facts_sha256, "audience_sha256": pack.manifest["audience_sha256"],
        "log": log,
    }


def _show_run(summary: dict[str, Any], settings: Settings) -> None:
    from retention_ops.execute import wording

    alert, last, counts, left_out = summary["alert"], summary["to"], summary["handed_over"], summary["left_out"]
    if summary["dates"] > 1:
        say(_range_sentence(summary))
        for row in [row for row in summary["flagged"] if row["alert_date"] != last.isoformat()][-10:]:
            say(f"  {row['alert_date']}  {shared.severity(row['severity'])}  {wording.reading(row)}")
    held = f"  held back: {alert['gate']}" if alert["gate"] else ""
    say(f"{last}  {shared.severity(alert['severity'])}  {wording.reading(alert)}{held}")
    say(f"To contact: P1 {counts['P1']:,} (prevention), P2 {counts['P2']:,} (intervention), P3 {counts['P3']:,} (win-back)"
        + (f"; left out: {', '.join(f'{count:,} {reason}' for reason, count in left_out.items())}" if left_out else ""))
    for row in summary["log"][:SHOWN_ANSWERS]:
        reason = row["error_message"] or ("written to the outbox, nothing sent" if row["mode"] == "shadow" else "all its actions are done")
        say(escape(f"Response for {row['alert_date']}: {row['status']} in mode {row['mode']}, {reason}"))
    if len(summary["log"]) > SHOWN_ANSWERS:
        say(f"and {len(summary['log']) - SHOWN_ANSWERS:,} more rows in ops_runs_log")
    say(f"Pack: {escape(str(summary['pack']))}" + (
        f" (and {summary['packs'] - 1:,} more; of a range the newest {settings.pack_keep_days} dates and flagged ones get a pack)"
        if summary["packs"] > 1 else ""))
    brief = next(name for name in summary["files"] if name.endswith(".md"))
    say_next(
        f"open {shlex.quote(str(summary['pack'] / 'briefing.html'))}   (or read {brief} beside it)",
        shared.command(settings, f"explain --date {last}"),
        shared.command(settings, "ui"),
    )


def _range_sentence(summary: dict[str, Any]) -> str:
    text = f"{summary['dates']:,} dates from {summary['from']} to {summary['to']}: {len(summary['flagged']):,} flagged"
    if summary["gates"]:
        held = ", ".join(f"{count:,} by {gate}" for gate, count in summary["gates"].items())
        text += f"; held back by a safeguard: {held} ({summary['silenced']:,} of these would have alarmed)"
    return text + "."


@app.command(epilog="Examples:\n\n  retention-ops demo\n\n  retention-ops demo --customers 50000 --seed 3")
def demo(
    customers: Annotated[int, typer.Option(min=1, max=5_000_000, help="Size of the synthetic shop.")] = 6000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another shop; the same seed, the same bytes.")] = 7,
    days: Annotated[int, typer.Option(min=1, max=365, help="Run the loop for the last N days of the shop.")] = 30,
) -> None:
    """Synthetic shop with a retention incident; runs the whole loop and says where to look."""
    from retention_ops.sources.ingest import ingest as take_in

    settings = load_settings(home=shared.settings().home / "demo", shop_name="Demo shop", warehouse="lake")  # a demo fills nobody's dataset
    shop = _demo_shop(settings, customers, seed)
    for file, preset in ((shop.orders, "orders"), (shop.customers, "customers")):
        with shared.err.status(f"taking in {file.name}"):
            take_in([file], preset, settings)
    record_ingestions(settings)
    orders = shared.lake(settings).orders()
    say(escape(f"A synthetic shop: {orders.orders:,} orders of {orders.customers:,} customers, {orders.first_date} to {orders.last_date} "
                f"({shop.orders})."))
    say(f"The story: a promotion from {shop.promotion_from} to {shop.promotion_to} won {shop.cohort_size:,} customers "
        "who did not come back.")
    run_range(settings, max(shop.last_date - timedelta(days=days - 1), orders.first_date), shop.last_date, as_json=False)


def _demo_shop(settings: Settings, customers: int, seed: int) -> Any:
    """The shop's files; a demo of another size or seed starts over in its own folder."""
    from retention_ops.sources.shop import write_shop
    from retention_ops.warehouse.files import write_atomic

    recipe = settings.home / "recipe.json"
    wanted = json.dumps({"customers": customers, "seed": seed})
    if recipe.is_file() and recipe.read_text() != wanted:
        shutil.rmtree(settings.home)
    settings.home.mkdir(parents=True, exist_ok=True)
    write_atomic(recipe, wanted)
    with shared.err.status("inventing a shop") as spinner:
        return write_shop(settings.home / "shop", customers=customers, seed=seed, progress=lambda text: spinner.update(escape(text)))
