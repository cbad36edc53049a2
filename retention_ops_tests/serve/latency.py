"""`make bench-mcp`: how long the read tools take, through a real client over stdio, on a million customers beside a running backfill.

    python -m retention_ops_tests.serve.latency [--customers N] [--calls N] [--home DIR] [--quiet]

Prints one Markdown table. Nothing is asserted: the figures belong to the machine that made them. --quiet leaves the backfill out.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import anyio
import duckdb
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client

from retention_ops.definitions import build_loop
from retention_ops.launch import run_dates
from retention_ops.settings import Settings
from retention_ops.sources.ingest import ingest

LAST = date(2026, 6, 30)
DAYS = 14
BACKFILL_DAYS = 200
ORDERS = """COPY (
    SELECT 'o' || (c * 8 + n) AS order_id, 'c' || c AS customer_id,
           DATE '{last}' - CAST(hash(c * 8 + n) % 600 AS INTEGER) AS order_date,
           CAST(5 + hash(c * 131 + n) % 20000 / 100 AS DECIMAL(12, 2)) AS order_amount
    FROM range({customers}) customers(c), range(6) orders(n) WHERE n = 0 OR hash(c + n * 7919) % 10 < 7
) TO '{path}' (FORMAT parquet)"""


def prepared(home: Path, customers: int) -> Settings:
    """A home of `customers` with about 4.5 orders each, its newest days computed, the last one packed."""
    settings = Settings(_env_file=None, home=home, mode="off")
    if not (home / "ready").exists():
        home.mkdir(parents=True, exist_ok=True)
        path = home / "orders.parquet"
        duckdb.sql(ORDERS.format(last=LAST, customers=customers, path=path))
        ingest([path], "orders", settings, complete_through=LAST)
        outcome = run_dates(build_loop(settings), LAST - timedelta(days=DAYS - 1), LAST)
        assert outcome.success, outcome.errors
        (home / "ready").touch()
    return settings


def backfill(home: Path) -> subprocess.Popen[bytes]:
    """A range of earlier dates in a process of its own."""
    last = LAST - timedelta(days=DAYS)
    first = last - timedelta(days=BACKFILL_DAYS)
    return subprocess.Popen(
        [sys.executable, "-m", "retention_ops.cli", "--home", str(home), "backfill", "--from", str(first), "--to", str(last), "--json"],
        env={**os.environ, "RETENTION_OPS_MODE": "off"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )


async def measured(home: Path, customers: int, calls: int, alive: Any) -> dict[str, list[float]]:
    """tool -> milliseconds of each call, as the client sees them; stops early when `alive` says that the backfill is over."""
    environment = {**os.environ, "RETENTION_OPS_HOME": str(home), "RETENTION_OPS_MODE": "off"}
    server = stdio_client(StdioServerParameters(command=sys.executable, args=["-m", "retention_ops.cli", "mcp"], env=environment))
    draw, took = random.Random(5), {}
    day = str(LAST)
    async with Client(server) as client:
        for number in range(calls + 5):
            for tool, arguments in (
                ("get_alert_decision", {"date": day}), ("get_operational_context", {"date": day}),
                ("generate_brief", {"date": day, "format": "markdown"}), ("compare_dates", {"a": str(LAST - timedelta(days=7)), "b": day}),
                ("explain_customer", {"customer_id": f"c{draw.randrange(customers)}", "date": day}),
            ):
                started = time.perf_counter()
                result = await client.call_tool(tool, arguments)
                if result.is_error:
                    raise RuntimeError(result.content[0].text)
                if number >= 5:  # the first ones open files and import
                    took.setdefault(tool, []).append(1000 * (time.perf_counter() - started))
            if not alive():
                break
    return took


def table(took: dict[str, list[float]]) -> str:
    def at(share: float, values: list[float]) -> float:
        return sorted(values)[min(len(values) - 1, int(share * len(values)))]

    lines = ["| tool | calls | p50 ms | p95 ms | p99 ms | max ms |", "|---|---|---|---|---|---|"]
    for tool, values in took.items():
        figures = " | ".join(f"{value:.1f}" for value in (at(0.5, values), at(0.95, values), at(0.99, values), max(values)))
        lines.append(f"| {tool} | {len(values)} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--customers", type=int, default=1_000_000)
    arguments.add_argument("--calls", type=int, default=200)
    arguments.add_argument("--home", type=Path)
    arguments.add_argument("--quiet", action="store_true")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="retention-ops-latency-") as folder:
        settings = prepared((given.home or Path(folder)).absolute(), given.customers)
        running = None if given.quiet else backfill(settings.home)
        if running:
            time.sleep(15)  # until it computes
        started = time.monotonic()
        took = anyio.run(measured, settings.home, given.customers, given.calls, lambda: running is None or running.poll() is None)
        seconds = time.monotonic() - started
        over = "without a backfill" if running is None else "beside a backfill" + ("" if running.poll() is None else " that ended before")
        if running:
            running.terminate()
            running.wait()
    print(f"{given.customers:,} customers, {over}, {seconds:.0f} s, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print(table(took))


if __name__ == "__main__":
    main()
