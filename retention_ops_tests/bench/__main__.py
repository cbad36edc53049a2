"""`python -m retention_ops_tests.bench`: makes the shops, runs every task in interleaved rounds, writes docs/benchmarks.{md,json,png}."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import duckdb

from retention_ops.detect.compute import workspace
from retention_ops.settings import Settings
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.bench.report import GOALS, write_report
from retention_ops_tests.bench.tasks import EXPORT, LAST, TASKS, days
from retention_ops_tests.shops import write_big_shop

HERE = Path(__file__).resolve().parent
CUSTOMERS = {"100k": 4_900, "1M": 49_000, "10M": 490_000, "100M": 4_900_000}
"""size -> customers of the shop with about that many orders"""
RIVALS = ("pandas_one_day", "polars_one_day", "lifetimes_summary")
LIMITS = {"100M": "2GB"}
"""DuckDB's memory_limit, also while loading"""
IN_2_GB = ("floor", "floor_by_customer", "derive", "one_day", "alerts_365", "intervals_365")
"""what runs at 100M orders; pandas, polars and lifetimes need some 2 GB at 10M already"""
FLOOR_TASK = "floor"


@dataclass
class Row:
    """A line of the table: medians in seconds and megabytes, and the ratio of wall clocks to another task of the same size."""

    task: str
    size: str
    wall_s: float
    cpu_s: float
    peak_mb: float
    ratio_to: str
    ratio: float | None
    cpu_ratio: float | None
    rounds: int


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def measured(command: Sequence[str | Path], **environment: str) -> dict[str, Any]:
    """Runs a task's process and reads its JSON; raises with its last words where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


OUTSIDE = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[2:], stdout=open(sys.argv[1], "wb"), stderr=subprocess.STDOUT)
_, status, used = os.wait4(process.pid, 0)
print(json.dumps({"wall_s": time.perf_counter() - began, "cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1024,
                  "found": {"status": status}}))
"""
"""measures a command from a small process: until it starts its own program, a child counts its parent's memory as its own"""


def timed(command: Sequence[str | Path], limit: str = "") -> dict[str, Any]:
    """A command as a user runs it, measured from outside: interpreter, imports and all. `limit` is DuckDB's memory_limit."""
    with tempfile.NamedTemporaryFile() as words:
        found = measured([sys.executable, "-S", "-c", OUTSIDE, words.name, *command], RETENTION_OPS_DUCKDB_MEMORY_LIMIT=limit)
        if found["found"]["status"]:
            raise SystemExit(f"{' '.join(map(str, command))}\n{words.read()[-2000:].decode()}")
    return found


def command(home: Path, *words: str) -> list[str | Path]:
    return [sys.executable, "-m", "retention_ops.cli", "--home", home, *words]


def make_shop(folder: Path, size: str) -> dict[str, list[dict]]:
    """A shop of that size in folder/home, unless it stands; its last day comes in as a file of its own. Returns what loading cost."""
    costs, limit = folder / "loading.json", LIMITS.get(size, "")
    if costs.exists():
        return json.loads(costs.read_text())
    say(f"{size}: making the shop")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    whole, before, last = folder / "whole.parquet", folder / "orders.parquet", folder / "last_day.parquet"
    write_big_shop(whole, CUSTOMERS[size])
    with duckdb.connect() as connection:
        for path, operator in ((before, "<"), (last, "=")):
            connection.execute(f"COPY (FROM '{whole}' WHERE order_date {operator} DATE '{LAST}') TO '{path}' (FORMAT parquet)")
    whole.unlink()
    say(f"{size}: loading it")
    home = folder / "home"
    loaded = {
        "ingest_all": [timed(command(home, "ingest", str(before), "--preset", "orders"), limit)],
        "ingest_one_more_day": [
            timed(command(home, "ingest", str(last), "--preset", "orders", "--complete-through", str(LAST)), limit)],
    }
    lake = Lake(Settings(_env_file=None, home=home, duckdb_memory_limit=limit))
    with workspace(lake) as space:  # which makes customer_days on first sight
        space.connection.execute(f"""
            COPY (SELECT order_id, customer_id, order_date, order_cents FROM orders ORDER BY order_date, order_id)
            TO '{folder / EXPORT}' (FORMAT parquet, COMPRESSION zstd)""")
    costs.write_text(json.dumps(loaded))
    return loaded


def rivals_python(work: Path) -> Path:
    """The interpreter of the environment the other tools have to themselves."""
    python = work / "rivals" / "bin" / "python"
    ready = work / "rivals" / "ready.txt"
    wanted = (HERE / "requirements.txt").read_text()
    if not ready.exists() or ready.read_text() != wanted:
        say("setting up pandas, polars and lifetimes in an environment of their own")
        venv.create(work / "rivals", with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", HERE / "requirements.txt"]
        subprocess.run(install, check=True)
        ready.write_text(wanted)
    return python


def run_tasks(folder: Path, size: str, rounds: int, rivals: Path | None, only: Sequence[str] = ()) -> dict[str, list[dict]]:
    """Every task (or `only` these) once per round: {task: [measurement]}. The rivals must find what the rules find."""
    home, large = folder / "home", size in LIMITS
    taken: dict[str, list[dict]] = {}
    for turn in range(1 if large else rounds):
        for task in IN_2_GB if large else TASKS:
            if only and task not in only:
                continue
            say(f"{size}: round {turn + 1}: {task}")
            words = [sys.executable, "-m", "retention_ops_tests.bench.tasks", task, home, LIMITS.get(size, "")]
            taken.setdefault(task, []).append(measured(words))
        for rival in RIVALS if rivals else ():
            say(f"{size}: round {turn + 1}: {rival}")
            words = [rivals, HERE / "rivals.py", rival, folder / EXPORT, str(LAST), folder / "rival.parquet"]
            taken.setdefault(rival, []).append(measured(words))
    for rival in RIVALS[:2] if rivals else ():
        ours, theirs = taken["one_day"][0]["found"], taken[rival][0]["found"]
        if any(abs(ours[name] - theirs[name]) > (0.01 if name == "points" else 0) for name in ours):
            raise SystemExit(f"{rival} found {theirs}, the rules {ours}")
    return taken


def run_pipeline(folder: Path, size: str, rounds: int) -> tuple[dict[str, list[dict]], dict[str, float]]:
    """`run` for one date and `backfill` for 365 in fresh copies of the home: ({task: [measurement]}, {step: seconds} of the backfill)."""
    taken: dict[str, list[dict]] = {"run_1_date": [], "backfill_365_dates": []}
    steps: dict[str, float] = {}
    for turn in range(rounds):
        for task, count in (("run_1_date", 1), ("backfill_365_dates", 365)):
            say(f"{size}: round {turn + 1}: {task}")
            home = folder / "pipeline"
            shutil.rmtree(home, ignore_errors=True)
            shutil.copytree(folder / "home", home, copy_function=os.link)
            words = ("run", "--date", str(LAST)) if count == 1 else ("backfill", "--from", str(days(count)[0]), "--to", str(LAST))
            taken[task].append(timed(command(home, *words)))
            if count > 1:
                steps = step_seconds(home, taken[task][-1]["wall_s"])
            shutil.rmtree(home)
    return taken, steps


def step_seconds(home: Path, wall: float) -> dict[str, float]:
    """Where a backfill's time went: each asset's step by Dagster's own record, and what lies outside all steps."""
    from retention_ops.launch import instance

    with instance(Settings(_env_file=None, home=home)) as stored:
        run = max(stored.get_run_records(), key=lambda record: record.create_timestamp)
        stats = stored.get_run_step_stats(run.dagster_run.run_id)
        planning = (run.start_time or 0) - run.create_timestamp.timestamp()
    steps = {step.step_key: step.end_time - step.start_time for step in stats if step.end_time and step.start_time}
    return {"starting, planning and reporting": wall - sum(steps.values()), "of which planned events": planning, **steps}


def rows_of(taken: dict[str, list[dict]], size: str) -> list[Row]:
    middle = {task: {key: median(one[key] for one in several) for key in ("wall_s", "cpu_s", "peak_mb")} for task, several in taken.items()}
    rows = []
    for task, several in taken.items():
        other = RATIO_TO.get(task, FLOOR_TASK)
        own, base = middle[task], middle.get(other)
        wall, cpu = (round(own[key] / base[key], 2) if base else None for key in ("wall_s", "cpu_s"))
        seconds = round(own["wall_s"], 3), round(own["cpu_s"], 3)
        rows.append(Row(task, size, *seconds, round(own["peak_mb"]), other if base else "", wall, cpu, len(several)))
    return rows


RATIO_TO = {
    "pandas_one_day": "one_day", "polars_one_day": "one_day", "lifetimes_summary": "one_day", "one_day_in_four": "one_day",
    "alerts_365_per_date": "alerts_365", "intervals_30": "one_day", "intervals_365": "one_day", "intervals_1000": "one_day",
    "scores_365": "one_day", "scores_365_per_date": "scores_365", "queue_365": "one_day", "queue_365_per_date": "queue_365",
    "ingest_one_more_day": "ingest_all", "backfill_365_dates": "run_1_date",
    "empty_graph": "backfill_365_dates", "empty_graph_in_batches": "empty_graph",
}
"""task -> what it is compared with; everything else with the floor"""


def machine() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("duckdb", "dagster", "sqlglot"))
    wanted = [line for line in (HERE / "requirements.txt").read_text().splitlines() if "==" in line]
    return {
        "machine": f"{os.cpu_count()} cores, {memory:.0f} GB, {platform.system()} {platform.machine()}",
        "versions": f"Python {platform.python_version()}, {versions}; against {', '.join(wanted)}",
        "load": f"{os.getloadavg()[0]:.1f} when it began",
    }


def earlier_report(out: Path, now: set[str], only: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Rows and steps of an earlier run, without the sizes (or of these `only` the tasks) that are measured now."""
    if not (out / "benchmarks.json").exists():
        return [], {}
    report = json.loads((out / "benchmarks.json").read_text())
    steps = {size: taken for size, taken in report["backfill_steps_s"].items() if size not in now or only}
    return [row for row in report["rows"] if row["size"] not in now or (only and row["task"] not in only)], steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--sizes", default="1M,10M", help="of 100k, 1M, 10M, 100M")
    parser.add_argument("--pipeline", default="100k,1M,10M", help="sizes at which `run` and `backfill` are timed as a user has them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--add", action="store_true", help="keep what docs/benchmarks.json says of sizes this run does not measure")
    parser.add_argument("--tasks", default="", help="with --add: measure only these again, and the floor to compare them with")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="shops and environments; may be deleted at any time")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    chosen = parser.parse_args()
    sizes, pipelines = ([size for size in text.split(",") if size] for text in (chosen.sizes, chosen.pipeline))
    if unknown := {*sizes, *pipelines} - set(CUSTOMERS):
        parser.error(f"unknown size {', '.join(sorted(unknown))}; allowed: {', '.join(CUSTOMERS)}")
    about, work = machine(), chosen.work.resolve()
    only = [task for task in chosen.tasks.split(",") if task]
    if only and (not chosen.add or set(only) - set(TASKS)):
        parser.error(f"--tasks goes with --add and takes of {', '.join(TASKS)}")
    rivals = rivals_python(work) if set(sizes) - set(LIMITS) and not only else None
    earlier, steps = earlier_report(chosen.out, {*sizes, *pipelines}, only) if chosen.add else ([], {})
    rows: list[Row] = []
    for size in CUSTOMERS:
        if size not in {*sizes, *pipelines}:
            continue
        folder = work / size
        taken = dict(make_shop(folder, size))
        if only:
            rows += [row for row in rows_of(run_tasks(folder, size, chosen.rounds, None, [FLOOR_TASK, *only]), size) if row.task in only]
            continue
        if size in sizes:
            taken |= run_tasks(folder, size, chosen.rounds, rivals if size not in LIMITS else None)
        if size in pipelines:
            more, steps[size] = run_pipeline(folder, size, chosen.rounds if size == "100k" else 1)
            taken |= more
            if size == pipelines[-1]:
                for task in ("empty_graph", "empty_graph_in_batches"):
                    say(f"Dagster with nothing to do: {task}")
                    taken[task] = [measured([sys.executable, "-m", "retention_ops_tests.bench.empty", "8", "365", task])]
        rows += rows_of(taken, size)
        write_report(chosen.out, earlier + [asdict(row) for row in rows], steps, about, GOALS)
    if only:
        write_report(chosen.out, earlier + [asdict(row) for row in rows], steps, about, GOALS)
    say(f"written: {chosen.out}/benchmarks.md, .json, .png")


if __name__ == "__main__":
    main()
