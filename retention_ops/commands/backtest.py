"""`retention-ops backtest`: what each rule and threshold, and each order of the queue, is worth on this shop's own orders; what to set."""

from __future__ import annotations

import json
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from retention_ops.commands import shared
from retention_ops.commands.shared import Json, say, say_next
from retention_ops.errors import UsageError
from retention_ops.settings import Settings

app = typer.Typer(name="backtest", invoke_without_command=True, rich_markup_mode="rich", pretty_exceptions_enable=False)
SHOWN_KINDS = ("outage_30", "outage_50", "decline", "segment")
"""kinds of loss in the terminal's table; report.md has them all"""


@app.callback(epilog=shared.examples(
    "backtest", "backtest --budget 1 --outages 100",
    "backtest --tune-from 2010-03-10 --tune-to 2010-12-31 --from 2011-01-01 --to 2011-12-09", "backtest --json > backtest.json",
))
def backtest(
    context: typer.Context,
    budget: Annotated[float, typer.Option("--budget", min=0, max=365, help="False episodes a year, outside holidays, that are fine.")] = 2,
    outages: Annotated[int, typer.Option("--outages", min=1, max=10_000, help="Losses of each kind to inject.")] = 60,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31, help="Other dates, other orders lost.")] = 611,
    first: Annotated[date | None, shared.date_option("--from", "First day reported; default: the second half of the history.")] = None,
    last: Annotated[date | None, shared.date_option("--to", "Last day reported.")] = None,
    tune_from: Annotated[date | None, shared.date_option("--tune-from", "First day thresholds are chosen on; default: all before.")] = None,
    tune_to: Annotated[date | None, shared.date_option("--tune-to", "Last day thresholds are chosen on.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for report.md, report.json and charts; default in the home.")] = None,
    as_json: Json = False,
) -> None:
    """Injects outages, declines, lost segments and late data into your own orders; says who notices, when, and what to set.

    Thresholds are chosen on one part of the history by their false alarms and reported on the other. Nothing is sent or changed.
    """
    if context.invoked_subcommand:
        return
    from retention_ops.detect import backtest as measuring
    from retention_ops.detect.injections import injected_orders

    settings = shared.settings()
    began = time.monotonic()
    with injected_orders(shared.lake(settings, writes=False)) as space, shared.progress(quiet=as_json) as step:
        plan = measuring.planned(
            space, tune_from=tune_from, tune_to=tune_to, first=first, last=last, budget=budget, outages=outages, seed=seed,
        )
        result = {**measuring.backtest(space, plan, step), "seconds": 0.0}
    result["seconds"] = round(time.monotonic() - began, 1)
    folder = out or settings.home / "backtests" / f"{plan.report.first}_{plan.report.last}"
    words = (f"backtest --tune-from {plan.tune.first} --tune-to {plan.tune.last} --from {plan.report.first} --to {plan.report.last} "
             f"--budget {budget:g} --outages {outages} --seed {seed}")
    _write(folder, result, words)
    if as_json:
        shared.print_json(result)
        return
    _show(result, settings, folder)


@app.command(epilog=shared.examples(
    "backtest targeting", "backtest targeting --sizes 50,100,200,400,800",
    "backtest targeting --from 2010-10-22 --to 2011-08-22 --every month --out targeting", "backtest targeting --model",
    "backtest targeting --json > targeting.json",
))
def targeting(
    first: Annotated[date | None, shared.date_option("--from", "First date a list is made of; default: as early as can be.")] = None,
    last: Annotated[date | None, shared.date_option("--to", "Last one; 90 days of orders must follow it.")] = None,
    every: Annotated[str, typer.Option("--every", metavar="DAYS|month", help="Days between two dates, or the same day each month.")] = "14",
    sizes: Annotated[str | None, typer.Option("--sizes", metavar="N,N,...", help="List sizes; default: those that fit the shop.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31, help="Other resamples for the intervals.")] = 707,
    model: Annotated[bool, typer.Option("--model", help="A learned p_no_return_90d beside; needs retention-ops\\[models].")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for report.md, report.json and charts; default in the home.")] = None,
    as_json: Json = False,
) -> None:
    """Whom the queue would have reached on past dates, of those whose spend was then lost; compares lists, says what to set.

    Lists as the rules make them, by revenue, usual spend, spend at stake and hindsight; how true p_no_return_90d is; how steady the lists
    are. Nothing is sent. With --model the verdict is kept: return_model=learned is obeyed only where it was found better.
    """
    from retention_ops.detect import learned, verdict
    from retention_ops.detect import targeting as measuring

    settings = shared.settings()
    if model:
        learned.require()
    began = time.monotonic()
    with measuring.targeting_orders(shared.lake(settings, writes=False)) as space, shared.progress(quiet=as_json) as step:
        plan = measuring.planned(space.orders, first=first, last=last, every=every, sizes=_sizes(sizes), seed=seed)
        result = {**measuring.targeting(space, plan, step, learned.ReturnModel(space) if model else None), "seconds": 0.0}
    result["seconds"] = round(time.monotonic() - began, 1)
    if model:
        verdict.record(settings, result)
    folder = out or settings.home / "backtests" / f"targeting_{plan.dates[0]}_{plan.dates[-1]}"
    words = f"backtest targeting --from {plan.dates[0]} --to {plan.dates[-1]} --every {every} --seed {seed}"
    words += f" --sizes {','.join(str(row['size']) for row in result['sizes'] if row['size'])}"
    words += " --model" if model else ""
    _write_targeting(folder, result, words)
    if as_json:
        shared.print_json(result)
        return
    _show_targeting(result, settings, folder)


def _sizes(text: str | None) -> list[int] | None:
    """List sizes as typed."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise UsageError(f"--sizes {text!r} are numbers of customers from 1 on, like 50,100,200")
    return [int(part) for part in parts]


def _write_targeting(folder: Path, result: dict[str, Any], words: str) -> None:
    from retention_ops.package.targeting_chart import calibration_chart, coverage_chart
    from retention_ops.package.targeting_report import markdown

    _write_all(folder, result, markdown(result, f"retention-ops {words}"),
               {"coverage.png": coverage_chart(result), "calibration.png": calibration_chart(result)})


def _show_targeting(result: dict[str, Any], settings: Settings, folder: Path) -> None:
    from retention_ops.package import targeting_report as report

    for title, columns, rows in (
        report.coverage_table(result, intervals=False), report.queues_table(result, intervals=False), report.ranks_table(result),
        *([report.model_table(result, intervals=False)] if "model" in result else []), report.stability_table(result),
    ):
        _print(title, columns, rows)
    for sentence in report.verdict(result):
        say(f"- {escape(sentence)}")
    say(f"{escape(str(folder))}: report.md with every date and status, report.json, coverage.png, calibration.png "
        f"({result['seconds']:.0f} s)")
    if lines := report.env_lines(result):
        say("[bold]Into .env:[/bold]")
        for line in lines:
            say(f"  {line}")
    elif result["recommendation"]["enough_history"]:
        say("The settings in force are the ones recommended; nothing to change.")
    say_next(shared.command(settings, f"run --date {result['orders']['complete_through']}"),
             shared.command(settings, f"backtest targeting --seed {result['seed'] + 1}"),
             shared.command(settings, "backtest"))


def _write(folder: Path, result: dict[str, Any], words: str) -> None:
    from retention_ops.package.backtest_chart import delay_chart, trade_off_chart
    from retention_ops.package.backtest_report import markdown

    _write_all(folder, result, markdown(result, f"retention-ops {words}"),
               {"tradeoff.png": trade_off_chart(result), "delays.png": delay_chart(result)})


def _write_all(folder: Path, result: dict[str, Any], report: str, pictures: dict[str, bytes]) -> None:
    from retention_ops.warehouse.files import write_atomic

    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "report.json", json.dumps(shared.plain(result), indent=1, ensure_ascii=False) + "\n")
    for name, picture in pictures.items():
        write_atomic(folder / name, picture)
    write_atomic(folder / "report.md", report)


def _show(result: dict[str, Any], settings: Settings, folder: Path) -> None:
    from retention_ops.package import backtest_report as report

    for title, columns, rows in (
        report.thresholds_table(result), *(report.noticed_table(result, kind, main_only=True) for kind in SHOWN_KINDS),
        report.alarms_table(result),
    ):
        _print(title, columns, rows)
    for sentence in report.verdict(result):
        say(f"- {escape(sentence)}")
    say(f"{escape(str(folder))}: report.md with every loss and rule, report.json, tradeoff.png, delays.png ({result['seconds']:.0f} s)")
    advice = result["recommendation"]
    if lines := report.env_lines(result):
        say("[bold]Into .env:[/bold]")
        for line in lines:
            say(f"  {line}")
    elif advice["warning"] is not None and not advice["changes"]:
        say("The settings in force are the ones recommended; nothing to change.")
    looked_into = [each["from"] for each in advice["episodes"] if not each["at_holidays"]][-1:]
    say_next(*(shared.command(settings, f"explain --date {day}") for day in looked_into),
             shared.command(settings, f"backtest --seed {result['seed'] + 1}"),
             shared.command(settings, f"run --date {result['orders']['complete_through']}"))


def _print(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="bold")
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    shared.out.print(table)
