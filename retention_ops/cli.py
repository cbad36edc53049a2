"""The command `retention-ops`. Each command prints what happened and what to do next; `--json` prints data only.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 stopped by Ctrl-C. Dagster is imported only by commands that start runs.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from retention_ops.errors import NoOrders, RetentionOpsError, UsageError
from retention_ops.settings import Settings, load_settings

app = typer.Typer(
    name="retention-ops", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False,
    help="Detect slipping customers, package what to do about it, execute it once, log whether it worked.",
    epilog="Try it: retention-ops demo   ·   Your data: retention-ops ingest orders.csv --preset orders",
)
out = Console()
err = Console(stderr=True)
_home: Path | None = None

Json = Annotated[bool, typer.Option("--json", help="Print data as JSON, for scripts.")]
STORAGE = ("duckdb", "_duckdb", "sqlalchemy", "sqlite3", "yaml")
"""whose errors mean damaged or unreachable storage rather than a bug"""
SEVERITY_STYLE = {"CRITICAL": "bold red", "WARNING": "bold yellow", "INFO": "green"}


def _day(text: str) -> date:
    try:
        if len(text) != 10:
            raise ValueError
        return date.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a date like 2011-09-30") from error


def _date_option(flag: str, help_: str) -> Any:
    return typer.Option(flag, parser=_day, metavar="YYYY-MM-DD", help=help_)


@app.callback()
def _options(
    home: Annotated[
        Path | None, typer.Option("--home", help="Folder with all state; default RETENTION_OPS_HOME or ./.retention_ops.")
    ] = None,
) -> None:
    global _home
    _home = home


def _settings() -> Settings:
    settings = load_settings(**({"home": _home} if _home else {}))
    if settings.home.exists() and not settings.home.is_dir():
        raise UsageError(f"home {settings.home} is not a folder; choose another with --home")
    return settings


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    from retention_ops.package.pack import plain

    value = plain(value)
    return value.as_posix() if isinstance(value, Path) else value


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")


def _command(settings: Settings, words: str) -> str:
    """A command as this user would type it, home included."""
    where = f" --home {shlex.quote(str(settings.home))}" if settings.home != load_settings().home else ""
    return f"{_program()}{where} {words}"


def _program() -> str:
    """`retention-ops` where the shell finds it, else the path it was started by (after `make demo` it is not on PATH)."""
    started = Path(sys.argv[0])
    if shutil.which("retention-ops") or started.name != "retention-ops":
        return "retention-ops"
    return shlex.quote(os.path.relpath(started) if started.is_relative_to(Path.cwd()) else str(started))


def _say(text: str) -> None:
    """A line that wraps where the terminal wraps, so that paths can be copied; markup in `text` is interpreted."""
    out.print(text, soft_wrap=True, highlight=False)


def _next(*commands: str) -> None:
    _say("[bold]Next:[/bold]")
    for command in commands:
        _say(f"  {escape(command)}")


@contextmanager
def _progress(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A bar per step on stderr."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet) as bars:
        tasks: dict[str, Any] = {}

        def step(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield step


# -- orders in -------------------------------------------------------------------------------------------------------


@app.command(epilog="Examples:\n\n  retention-ops ingest orders.csv --preset orders\n\n"
                    "  retention-ops ingest year1.parquet year2.xlsx --preset uci-online-retail\n\n"
                    "  retention-ops ingest orders.csv --preset orders --replace --complete-through 2026-06-30\n\n"
                    "  retention-ops ingest do_not_contact.csv --preset suppressions")
def ingest(
    files: Annotated[list[Path], typer.Argument(
        metavar="FILE...", help="csv, xlsx, parquet; several at once; or bigquery:project.dataset.table.", show_default=False)],
    preset: Annotated[str, typer.Option("--preset", help="uci-online-retail, cdnow, orders, customers or suppressions.")],
    replace: Annotated[bool, typer.Option("--replace", help="Known orders are corrected; suppressions: the whole list.")] = False,
    complete_through: Annotated[date | None, _date_option("--complete-through", "Last date whose orders are all in.")] = None,
    show_values: Annotated[bool, typer.Option("--show-values", help="Show the offending values in error messages.")] = False,
    as_json: Json = False,
) -> None:
    """Check order files and add them to the lake. A file is taken whole or not at all."""
    from retention_ops.detect.compute import workspace
    from retention_ops.sources.bigquery_table import as_files
    from retention_ops.sources.ingest import ingest as take_in
    from retention_ops.status import packs_with_opted_out
    from retention_ops.warehouse.choice import open_warehouse
    from retention_ops.warehouse.freshness import stored_from

    settings = _settings()
    lake = open_warehouse(settings)
    with err.status("opening files") if not as_json else _nothing() as spinner, as_files(files, lake) as opened:
        report = take_in(
            opened, preset, settings, replace=replace, complete_through=complete_through, show_values=show_values,
            progress=lambda text: spinner.update(escape(text)) if spinner else None,
        )
    _record_ingestions(settings)
    if report.dataset == "orders":
        with workspace(lake):  # derives customer_days, so that the views are never without it
            pass
    lake.refresh_views()
    if report.dataset != "orders":
        stale = packs_with_opted_out(lake)
    else:
        stale = stored_from(lake, report.stale_from) if report.changed and report.stale_from else []
    if as_json:
        _print_json({**_plain(report), "stale_dates": stale})
        return
    _show_ingest(report, stale, settings)


def _record_ingestions(settings: Settings) -> None:
    """Copies what was taken in to the ops database; what a kill left out is made up by the next ingest."""
    from retention_ops.log import runs
    from retention_ops.log.database import ops_database
    from retention_ops.warehouse.versions import current_customers, current_suppressions, orders_versions

    customers, suppressions = current_customers(settings), current_suppressions(settings)
    with ops_database(settings) as engine:
        runs.record_ingestions(engine, "orders", orders_versions(settings))
        runs.record_ingestions(engine, "customers", [customers] if customers else [])
        runs.record_ingestions(engine, "suppressions", [suppressions] if suppressions else [])


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def _show_ingest(report: Any, stale: list[date], settings: Settings) -> None:
    if not report.changed:
        _say(f"Nothing new: these files are already in version {report.version}.")
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_row("records read", f"{report.records_read:,}")
    for reason, count in report.excluded.items():
        table.add_row(f"  left out: {escape(reason)}", f"{count:,}")
    if report.dataset == "orders":
        table.add_row("orders in the lake", f"{report.rows:,} of {_count(report.customers, 'customer')} ({report.currency})")
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
    out.print(table)
    for warning in report.warnings:
        _say(f"[yellow]warning[/yellow] {escape(warning)}")
    if stale:
        named = "with lists that name customers who refused consent or are suppressed"
        why = "built from older orders" if report.dataset == "orders" else named
        _say(f"[yellow]Stale: {_dates(stale)}[/yellow], {why}.")
        _next(_command(settings, f"backfill --from {stale[0]} --to {stale[-1]}"))
    elif report.dataset == "orders" and report.complete_through < report.first_date:
        _say("No day of these orders is over yet; come back tomorrow.")
    elif report.dataset == "orders":
        _next(
            _command(settings, f"run --date {report.complete_through}"),
            _command(settings, f"backfill --from {report.first_date} --to {report.complete_through}"),
        )
    else:
        _next(_command(settings, "status"))


# -- the loop --------------------------------------------------------------------------------------------------------


@app.command(epilog="Examples:\n\n  retention-ops run --date 2011-09-30\n\n  retention-ops run --date 2011-09-30 --json")
def run(
    day: Annotated[date, _date_option("--date", "Reference date.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what BigQuery would scan; nothing is computed or billed.")] = False,
    as_json: Json = False,
) -> None:
    """Detect and package for one date, and respond according to the mode."""
    if dry_run:
        from retention_ops.commands.estimate import show_estimate

        show_estimate(_settings(), day, as_json)
        return
    _run_range(_settings(), day, day, as_json)


@app.command(epilog="Examples:\n\n  retention-ops backfill --from 2011-01-01 --to 2011-12-09")
def backfill(
    first: Annotated[date, _date_option("--from", "First reference date.")],
    last: Annotated[date, _date_option("--to", "Last reference date.")],
    as_json: Json = False,
) -> None:
    """The same for every date of a range, in one run. A range that failed half-way heals by running it again."""
    _run_range(_settings(), first, last, as_json)


def _run_range(settings: Settings, first: date, last: date, as_json: bool) -> dict[str, Any]:
    """Runs the dates, shows what came of them; exits 1 where the run failed."""
    if settings.bigquery_source:
        from retention_ops.sources.bigquery_table import take_in_source

        take_in_source(_lake(settings))  # the first run has no dates before its orders are in
    if settings.home.exists() is False or _lake(settings).orders() is None:
        raise NoOrders("no orders yet: run `retention-ops ingest FILE --preset orders`, or `retention-ops demo` to look around")
    with err.status("starting Dagster") if not as_json else _nothing():
        from retention_ops.definitions import build_loop
        from retention_ops.launch import run_dates
        from retention_ops.package.brief import check_templates
    check_templates(settings)  # a mistake in a company's template is found before anything is computed
    loop = build_loop(settings)
    with _progress(quiet=as_json) as step:
        loop.progress = step
        outcome = run_dates(loop, first, last)
    if not outcome.success:
        if as_json:
            _print_json({"run_id": outcome.run_id, "success": False, "errors": outcome.errors})
        if outcome.interrupted:
            err.print("stopped. Finished dates are kept; the same command does the rest.")
            raise typer.Exit(130)
        for message in outcome.errors or ["the run failed; see it in `retention-ops ui`"]:
            err.print(f"[red]failed[/red] {escape(message)}", soft_wrap=True)
        err.print(f"run {outcome.run_id}. What was finished is kept; the same command heals the rest.")
        raise typer.Exit(1)
    summary = _summary(settings, first, last, outcome.run_id)
    if as_json:
        _print_json(summary)
    else:
        _show_run(summary, settings)
    return summary


def _rises(alert: dict[str, Any]) -> bool:
    """The increase alone would have been an alarm, before any safeguard."""
    return alert["delta_relative_pct"] is not None and round(alert["delta_relative_pct"], 9) >= alert["threshold_warning"]


def _lake(settings: Settings) -> Any:
    from retention_ops.warehouse.choice import open_warehouse

    return open_warehouse(settings)


def _summary(settings: Settings, first: date, last: date, run_id: str) -> dict[str, Any]:
    from retention_ops.log import runs
    from retention_ops.log.database import ops_database
    from retention_ops.package.pack import find_pack, records

    alerts = records(_lake(settings).read_range("alert_logic", first, last))
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
    alert, last, counts, left_out = summary["alert"], summary["to"], summary["handed_over"], summary["left_out"]
    if summary["dates"] > 1:
        _say(_range_sentence(summary))
        for row in [row for row in summary["flagged"] if row["alert_date"] != last.isoformat()][-10:]:
            _say(f"  {row['alert_date']}  {_severity(row['severity'])}  {_reading(row)}")
    _say(f"{last}  {_severity(alert['severity'])}  {_reading(alert)}" + (f"  held back: {alert['gate']}" if alert["gate"] else ""))
    _say(f"To contact: P1 {counts['P1']:,} (prevention), P2 {counts['P2']:,} (intervention), P3 {counts['P3']:,} (win-back)"
         + (f"; left out: {', '.join(f'{count:,} {reason}' for reason, count in left_out.items())}" if left_out else ""))
    for row in summary["log"]:
        reason = row["error_message"] or "written to the outbox, nothing sent"
        _say(escape(f"Response for {row['alert_date']}: {row['status']} in mode {row['mode']}, {reason}"))
    _say(f"Pack: {escape(str(summary['pack']))}" + (
        f" (and {summary['packs'] - 1:,} more; of a range the newest {settings.pack_keep_days} dates and flagged ones get a pack)"
        if summary["packs"] > 1 else ""))
    brief = next(name for name in summary["files"] if name.endswith(".md"))
    _next(
        f"open {shlex.quote(str(summary['pack'] / 'briefing.html'))}   (or read {brief} beside it)",
        _command(settings, f"explain --date {last}"),
        _command(settings, "ui"),
    )


def _range_sentence(summary: dict[str, Any]) -> str:
    text = f"{summary['dates']:,} dates from {summary['from']} to {summary['to']}: {len(summary['flagged']):,} flagged"
    if summary["gates"]:
        held = ", ".join(f"{count:,} by {gate}" for gate, count in summary["gates"].items())
        text += f"; held back by a safeguard: {held} ({summary['silenced']:,} of these would have alarmed)"
    return text + "."


def _severity(name: str) -> str:
    return f"[{SEVERITY_STYLE[name]}]{name}[/]"


def _reading(row: dict[str, Any]) -> str:
    if row["current_value"] is None:
        return "no customers yet"
    text = f"AT_RISK {row['current_value']:.1f} %"
    if row["delta_relative_pct"] is not None:
        text += f", {row['delta_relative_pct']:+.1f} % against the 7 days before ({row['baseline_value']:.1f} %)"
    return text


@app.command(epilog="Examples:\n\n  retention-ops demo\n\n  retention-ops demo --customers 50000 --seed 3")
def demo(
    customers: Annotated[int, typer.Option(min=1, max=5_000_000, help="Size of the synthetic shop.")] = 6000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another shop; the same seed, the same bytes.")] = 7,
    days: Annotated[int, typer.Option(min=1, max=365, help="Run the loop for the last N days of the shop.")] = 30,
) -> None:
    """Synthetic shop with a retention incident; runs the whole loop and says where to look."""
    from retention_ops.sources.ingest import ingest as take_in

    settings = load_settings(home=_settings().home / "demo", shop_name="Demo shop", warehouse="lake")  # a demo fills nobody's dataset
    shop = _demo_shop(settings, customers, seed)
    for file, preset in ((shop.orders, "orders"), (shop.customers, "customers")):
        with err.status(f"taking in {file.name}"):
            take_in([file], preset, settings)
    _record_ingestions(settings)
    orders = _lake(settings).orders()
    _say(escape(f"A synthetic shop: {orders.orders:,} orders of {orders.customers:,} customers, {orders.first_date} to {orders.last_date} "
                f"({shop.orders})."))
    _say(f"The story: a promotion from {shop.promotion_from} to {shop.promotion_to} won {shop.cohort_size:,} customers "
         "who did not come back.")
    _run_range(settings, max(shop.last_date - timedelta(days=days - 1), orders.first_date), shop.last_date, as_json=False)


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
    with err.status("inventing a shop") as spinner:
        return write_shop(settings.home / "shop", customers=customers, seed=seed, progress=lambda text: spinner.update(escape(text)))


# -- asking ----------------------------------------------------------------------------------------------------------


@app.command(epilog="Examples:\n\n  retention-ops alerts --from 2026-06-01 --to 2026-06-30\n\n"
                    "  retention-ops alerts --from 2026-06-01 --to 2026-06-30 --json")
def alerts(
    first: Annotated[date, _date_option("--from", "First date.")],
    last: Annotated[date, _date_option("--to", "Last date.")],
    as_json: Json = False,
) -> None:
    """The stored alert_logic rows of a range."""
    from retention_ops.package.pack import records

    settings = _settings()
    if first > last:
        raise UsageError(f"--from {first} is after --to {last}")
    rows = records(_lake(settings).read_range("alert_logic", first, last))
    if as_json:
        _print_json(rows)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    numbers = ("AT_RISK %", "baseline", "change %", "customers")
    for name in ("date", "severity", *numbers, "held back by"):
        table.add_column(name, no_wrap=True, justify="right" if name in numbers else "left")
    for row in rows:
        number = [f"{row[name]:.2f}" if row[name] is not None else "" for name in ("current_value", "baseline_value", "delta_relative_pct")]
        table.add_row(row["alert_date"], _severity(row["severity"]), *number, f"{row['sample_size']:,}", row["gate"] or "")
    out.print(table)
    missing = (last - first).days + 1 - len(rows)
    if missing:
        _say(f"{missing} of {_count((last - first).days + 1, 'date')} not built.")
        orders = _lake(settings).orders()
        start = max(first, settings.start_date or orders.first_date) if orders else first
        if start <= last:
            _next(_command(settings, f"backfill --from {start} --to {last}"))


@app.command(epilog="Examples:\n\n  retention-ops explain --date 2011-01-20\n\n  retention-ops explain --customer 17381 --date 2011-09-30")
def explain(
    day: Annotated[date, _date_option("--date", "Reference date.")],
    customer: Annotated[str | None, typer.Option("--customer", help="Explain this customer instead of the alert.")] = None,
    as_json: Json = False,
) -> None:
    """The rule, the numbers and the verdict of a date, or of one customer on a date, in sentences."""
    from retention_ops.detect.explain import explain_customer, explain_date

    lake = _lake(_settings())
    facts, sentences = explain_customer(lake, customer, day) if customer else explain_date(lake, day)
    if as_json:
        _print_json({"facts": facts, "sentences": sentences})
        return
    for sentence in sentences:
        _say(f"- {escape(sentence)}")


@app.command(epilog="Examples:\n\n  retention-ops status\n\n  retention-ops status --json")
def status(as_json: Json = False) -> None:
    """Data, complete_through, last run, mode, flagged dates, failed answers, stale dates, lake and events."""
    from retention_ops.status import status as look

    settings = _settings()
    facts = look(settings)
    if as_json:
        _print_json(facts)
        return
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for name, text in _status_lines(facts):
        table.add_row(name, text)
    out.print(table)
    _next(*(_command(settings, words) for words in facts["next"]))


def _status_lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each line, markup included."""
    orders, run, answer = facts["orders"], facts["last_run"], facts["last_answer"]
    yield "home", escape(str(facts["home"]))
    if orders:
        yield "orders", f"{orders.orders:,} of {_count(orders.customers, 'customer')}, {orders.first_date} to {orders.last_date}"
        yield "orders version", orders.version
        yield "complete through", str(orders.complete_through)
    else:
        yield "orders", "none yet"
    yield "customer attributes", _count(facts["customers"], "customer") if facts["customers"] is not None else "none (optional)"
    yield "dates built", f"{facts['dates_built']:,}" + (f", newest {facts['newest_date']}" if facts["newest_date"] else "")
    yield "mode", facts["mode"] + (" (nothing leaves this machine)" if facts["mode"] in ("off", "shadow") else "")
    yield "last run", _last_run(run) if run else "none yet"
    yield "last answer", (f"{answer['alert_date']} {answer['severity']}, {answer['status']}, {answer['run_timestamp']:%Y-%m-%d %H:%M} UTC"
                          if answer else "none yet")
    yield "flagged, last 30 dates built", ", ".join(f"{row['alert_date']} {row['severity']}" for row in facts["flagged"]) or "none"
    yield "audit log", f"[red]{facts['audit']}[/red]" if facts["audit_broken_at"] else facts["audit"]
    for name, words in (
        ("stale_dates", "built from older orders"), ("stale_packs", "with a pack that is damaged or from older orders"),
        ("unfinished_dates", "have tables but no pack: a run was interrupted"),
        ("unanswered_dates", "flagged but not answered"), ("failed_answers", "with a failed answer"),
        ("packs_with_opted_out", "with lists naming customers who refused consent or were suppressed since"),
        ("other_rules_dates", "built under other settings"),
    ):
        if facts[name]:
            yield "attention", f"[yellow]{_dates(facts[name])} {words}[/yellow]"
    yield "lake and events", escape("; ".join(facts["mismatches"])) or "agree"


def _last_run(run: dict[str, Any]) -> str:
    dates = run["from"] if run["from"] == run["to"] else f"{run['from']} to {run['to']}"
    style = {"success": "green", "failure": "red"}.get(run["status"], "yellow")
    return f"{dates} [{style}]{run['status']}[/], {run['started']:%Y-%m-%d %H:%M} UTC"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _dates(days: list[date]) -> str:
    """How many dates, and from when to when."""
    return str(days[0]) if len(days) == 1 else f"{len(days):,} dates between {min(days)} and {max(days)}"


@app.command(epilog="Examples:\n\n  retention-ops ui\n\n  retention-ops --home .retention_ops/demo ui --port 3001")
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the Dagster UI.")] = 3000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Dagster's own UI and daemon on this home. Stop with Ctrl-C."""
    from retention_ops.launch import dagster_home

    settings = _settings()
    home = dagster_home(settings)
    _check_free(host, port)
    # one daemon per home; the lock goes with the process that this one becomes
    held = os.open(home / ".ui.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"`retention-ops ui` already runs for {settings.home}; stop it first, or open the page it named") from None
    os.set_inheritable(held, True)
    environment = {
        **os.environ, "DAGSTER_HOME": str(home), "RETENTION_OPS_HOME": str(settings.home.absolute()),
        "RETENTION_OPS_DAGSTER_URL": os.environ.get("RETENTION_OPS_DAGSTER_URL") or f"http://{host}:{port}",
    }
    _say(f"Dagster on http://{host}:{port} for {escape(str(settings.home))}; its runs page is /runs. Stop with Ctrl-C.")
    # started with & from a script, SIGINT arrives ignored, and Dagster would then ignore SIGTERM as well
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    command = [
        sys.executable, "-m", "dagster", "dev", "-m", "retention_ops.definitions", "-h", host, "-p", str(port),
        # by default a code server that was killed is never started again, and sensors stand still; so the daemon does it in a minute
        "--use-legacy-code-server-behavior",
    ]
    os.execve(sys.executable, command, environment)


def _check_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error


def main() -> None:
    """Entry point: runs the command, turns expected errors into one clear message and an exit code."""
    try:
        app()
    except RetentionOpsError as error:
        err.print(f"[red]error[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        err.print(f"[red]error[/red] {escape(f'{error.strerror or error}{where}')}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in STORAGE:
            raise
        err.print(f"[red]error[/red] stored data or a database cannot be used: {escape(str(error))}", soft_wrap=True, highlight=False)
        err.print("Running the date it names again builds a damaged partition anew; orders come back by ingesting their files.")
        sys.exit(1)


if __name__ == "__main__":
    main()
