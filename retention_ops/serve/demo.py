"""The morning as one scripted conversation over the real protocol: a shop, its own Dagster, a server on stdio, a client that confirms.

Every number of every answer is compared with the tables themselves, read by their files and not through the server.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import anyio
import mcp_types
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client

from retention_ops.detect.alerts import AT_RISK, OTHERS, alert_of, alerts_by_day, row_of
from retention_ops.errors import RetentionOpsError
from retention_ops.execute.destinations.dagster import Dagster
from retention_ops.log import runs
from retention_ops.log.database import ops_database
from retention_ops.package.pack import find_pack, records
from retention_ops.settings import Settings, load_settings
from retention_ops.warehouse.files import write_atomic
from retention_ops.warehouse.lake import Lake

TARGET_SECONDS = 90
READY_SECONDS = 120
LIMIT = 50
NO_DAEMON = """
run_coordinator:
  module: dagster._core.run_coordinator
  class: DefaultRunCoordinator
"""
"""runs start at once: the demo has a webserver and no daemon, so that no sensor answers before the conversation does"""
Say = Callable[[str], None]


@dataclass
class Report:
    """What the conversation said, how long it took, and what did not agree with the tables."""

    home: Path
    pack: Path
    seconds: float
    checked: int = 0
    wrong: list[str] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)

    @property
    def consistent(self) -> bool:
        return not self.wrong

    def expect(self, what: str, told: Any, stored: Any) -> None:
        self.checked += 1
        if told != stored:
            self.wrong.append(f"{what}: told {told!r}, stored {stored!r}")


def play(home: Path, customers: int, seed: int, say: Say, environment: dict[str, str] | None = None) -> Report:
    """Prepares a shop without an answer, starts Dagster's webserver, and talks. Raises RetentionOpsError where that cannot be done."""
    given = {"RETENTION_OPS_HOME": str(home), "RETENTION_OPS_SHOP_NAME": "Demo shop", "RETENTION_OPS_MODE": "shadow", **(environment or {})}
    say("Preparing: a shop with an incident, computed and packed, nobody told yet.")
    settings, day = _prepare(home, customers, seed)
    with _webserver(settings, given, say) as url:
        environment = {**os.environ, **given, "RETENTION_OPS_DAGSTER_URL": url}
        settings = settings.model_copy(update={"dagster_url": url})
        started = time.monotonic()
        try:
            answers = anyio.run(_talk, environment, day, say)
        except BaseExceptionGroup as group:  # the client's task groups wrap what went wrong in the conversation
            raise _first(group) from None
        seconds = time.monotonic() - started
    report = Report(home, settings.packs / str(day), seconds, answers=answers)
    _check(report, settings, day)
    say(f"\n{seconds:.1f} s from the first question to the playbook (target {TARGET_SECONDS}).")
    say(f"{report.checked} values compared with the tables: " + ("all equal." if report.consistent else f"{len(report.wrong)} differ."))
    for line in report.wrong:
        say(f"  {line}")
    return report


# -- the shop and its Dagster ------------------------------------------------------------------------------------------


def _prepare(home: Path, customers: int, seed: int) -> tuple[Settings, date]:
    """A fresh home with the newest days detected and packed in mode off, so that nothing is answered."""
    from retention_ops.definitions import build_loop
    from retention_ops.launch import dagster_home, run_dates
    from retention_ops.sources.ingest import ingest
    from retention_ops.sources.shop import write_shop

    if home.exists() and not (home / "recipe.json").is_file():
        raise RetentionOpsError(f"{home} is no demo; move it away")
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    write_atomic(home / "recipe.json", json.dumps({"customers": customers, "seed": seed}))
    settings = load_settings(home=home, shop_name="Demo shop", mode="off")
    shop = write_shop(home / "shop", customers=customers, seed=seed)
    for file, preset in ((shop.orders, "orders"), (shop.customers, "customers")):
        ingest([file], preset, settings)
    file = dagster_home(settings) / "dagster.yaml"
    outcome = run_dates(build_loop(settings), shop.last_date - timedelta(days=13), shop.last_date)
    if not outcome.success:
        raise RetentionOpsError("; ".join(outcome.errors))
    write_atomic(file, file.read_text() + NO_DAEMON)
    return settings.model_copy(update={"mode": "shadow"}), shop.last_date


@contextmanager
def _webserver(settings: Settings, environment: dict[str, str], say: Say) -> Iterator[str]:
    """Dagster's webserver for this home on a free port; its address once it serves our code location."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, home = f"http://127.0.0.1:{port}", (settings.home / "dagster").absolute()
    say(f"Starting Dagster's webserver on {url} (its runs page shows what the tools start).")
    with open(settings.home / "webserver.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster_webserver", "-m", "retention_ops.definitions", "-h", "127.0.0.1", "-p", str(port)],
            env={**os.environ, **environment, "DAGSTER_HOME": str(home), "RETENTION_OPS_DAGSTER_URL": url},
            stdout=log, stderr=log, start_new_session=True,
        )
    try:
        dagster = Dagster.connect(settings.model_copy(update={"dagster_url": url}))
        deadline = time.monotonic() + READY_SECONDS
        while not dagster.check()[0].ok:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RetentionOpsError(f"Dagster's webserver did not come up; see {settings.home / 'webserver.log'}")
            time.sleep(0.5)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)


# -- the conversation --------------------------------------------------------------------------------------------------


async def _talk(environment: dict[str, str], day: date, say: Say) -> dict[str, Any]:
    """The questions of the morning in their order; tool -> structured answer."""
    server = stdio_client(StdioServerParameters(command=sys.executable, args=["-m", "retention_ops.cli", "mcp"], env=environment))
    answers: dict[str, Any] = {}

    async def confirm(context: Any, params: mcp_types.ElicitRequestParams) -> mcp_types.ElicitResult:
        say(f"  the server asks a person: {params.message}")
        say("  the person says yes.")
        return mcp_types.ElicitResult(action="accept", content={"confirm": True})

    async with Client(server, elicitation_callback=confirm) as client:

        async def ask(question: str, tool: str, **arguments: Any) -> dict[str, Any]:
            started = time.monotonic()
            result = await client.call_tool(tool, arguments)
            if result.is_error or result.structured_content.get("status") in ("failed", "pending", "running"):
                raise RetentionOpsError(f"{tool}: {result.content[0].text}")
            say(f"\n{question}\n  {tool}({', '.join(f'{name}={value}' for name, value in arguments.items())})  "
                f"{time.monotonic() - started:.2f} s")
            answers.setdefault(tool, []).append(result.structured_content)
            return result.structured_content

        alert = await ask("Did anything happen?", "get_alert_decision", date=str(day))
        say(f"  {alert['severity']}: AT_RISK {alert['current_value']:.1f} %, {alert['delta_relative_pct']:+.1f} % against its baseline of "
            f"{alert['baseline_value']:.1f} %.")
        context = await ask("How bad is it?", "get_operational_context", date=str(day))
        say(f"  {context['total_customers']:,} customers: {context['status_distribution']}; "
            f"AT_RISK by risk {context['at_risk_by_risk_level']}.")
        queue = await ask("Who should we contact first?", "build_priority_queue", date=str(day))
        say(f"  P1 {queue['p1_count']:,}, P2 {queue['p2_count']:,}, P3 {queue['p3_count']:,}; run {queue['run_url']}")
        brief = await ask("Give me the brief.", "generate_brief", date=str(day), format="markdown")
        say("  " + brief["text"].splitlines()[0] + f" ... ({brief['total']:,} characters)")
        first = {"tier": "P1", "destination": "csv", "limit": LIMIT}
        export = await ask("Hand me the first of P1 as a file.", "export_audience", date=str(day), **first)
        say(f"  {export['rows_exported']} of {export['total']}: {export['exports'][0]['path']}")
        playbook = await ask("Trigger the playbook.", "trigger_playbook", date=str(day), severity=alert["severity"])
        say(f"  {playbook['message']} Incident {playbook['incident']}, ticket {playbook['ticket_id']}.")
        await ask("And if somebody triggers it again?", "trigger_playbook", date=str(day), severity=alert["severity"])
        say(f"  {answers['trigger_playbook'][-1]['status']}: {answers['trigger_playbook'][-1]['message']}")
    return answers


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


# -- the proof ---------------------------------------------------------------------------------------------------------


def _check(report: Report, settings: Settings, day: date) -> None:
    """Each value told against the file it came from."""
    lake, answers = Lake(settings), report.answers
    alert = alert_of(records(lake.read("alert_logic", day)))
    for name, value in alert.items():
        if name == OTHERS:
            continue
        report.expect(f"get_alert_decision.{name}", answers["get_alert_decision"][0][name], value)
    _check_context(report, lake, day, answers["get_operational_context"][0])
    priority = lake.read("customer_priority", day)
    counts = priority["priority_tier"].value_counts()
    queue = answers["build_priority_queue"][0]
    for tier in ("P1", "P2", "P3"):
        report.expect(f"build_priority_queue.{tier}", queue[f"{tier.lower()}_count"], int(counts.get(tier, 0)))
    report.expect("build_priority_queue.total", queue["total"], len(priority))
    report.expect("build_priority_queue.table_updated", queue["table_updated"], True)
    pack = find_pack(settings, day)
    brief = answers["generate_brief"][0]
    report.expect("generate_brief.text", brief["text"], (pack.folder / f"briefing_{alert['severity']}.md").read_text()[: brief["limit"]])
    _check_export(report, priority, answers["export_audience"][0])
    _check_playbook(report, settings, day, answers["trigger_playbook"])


def _check_context(report: Report, lake: Lake, day: date, context: dict[str, Any]) -> None:
    daily = records(lake.read("retention_daily", day))[0]
    report.expect("get_operational_context.total_customers", context["total_customers"], daily["customers"])
    for status, count in context["status_distribution"].items():
        report.expect(f"get_operational_context.{status}", count, daily[status.lower()])
    churn = lake.read("churn_detection", day)
    levels = churn[churn["retention_status"] == "AT_RISK"]["churn_risk_level"].value_counts()
    for level, count in context["at_risk_by_risk_level"].items():
        report.expect(f"get_operational_context.{level}", count, int(levels.get(level, 0)))
    history = alerts_by_day(records(lake.read_range("alert_logic", day - timedelta(days=13), day)))
    report.expect("get_operational_context.last_days", len(context["last_days"]), len(history))
    for told, alert in zip(context["last_days"], history.values(), strict=True):
        report.expect(f"last_days {alert['alert_date']}", (told["date"], told["at_risk_pct"], told["severity"]),
                      (alert["alert_date"], row_of(alert, AT_RISK)["current_value"], alert["severity"]))


def _check_export(report: Report, priority: Any, export: dict[str, Any]) -> None:
    import csv

    path = Path(export["exports"][0]["path"])
    with open(path, encoding="utf-8", newline="") as lines:
        exported = [row["customer_id"] for row in csv.DictReader(lines)]
    with open(path.parent.parent / f"audience_P1_{export['date']}.csv", encoding="utf-8", newline="") as lines:
        listed = [row["customer_id"] for row in csv.DictReader(lines)]
    report.expect("export_audience rows", exported, listed[:LIMIT])
    report.expect("export_audience.rows_exported", export["rows_exported"], len(exported))
    report.expect("export_audience.total", export["total"], len(listed))
    tier = int((priority["priority_tier"] == "P1").sum())
    report.expect("export_audience total and left out", export["total"] + sum(export["left_out"].values()), tier)


def _check_playbook(report: Report, settings: Settings, day: date, told: list[dict[str, Any]]) -> None:
    from retention_ops.execute import ledger

    first, again = told
    with ops_database(settings) as engine:
        acted = [row for row in ledger.find(engine, alert_date=day, mode=first["mode"]) if row["slot"] not in ("run", "export")]
        log = [row for row in runs.rows(engine, first=day, last=day) if row["run_id"] == first["run_id"]]
    report.expect("trigger_playbook.status", (first["status"], again["status"]), ("triggered", "already_triggered"))
    for name, action in zip([f"{row['slot']} {row['kind']}" for row in acted], acted, strict=True):
        shown = next((each for each in first["actions"] if each["action"] == name), {})
        report.expect(f"trigger_playbook {name}", (shown.get("state"), shown.get("destination")), (action["state"], action["destination"]))
    report.expect("trigger_playbook.actions", len(first["actions"]), len(acted))
    report.expect("triggered again: the same actions", again["actions"], first["actions"])
    ticket = next(row for row in acted if (row["slot"], row["kind"]) == ("ticket", "create"))
    report.expect("trigger_playbook.ticket_id", first["ticket_id"], ticket["external_id"])
    report.expect("ops_runs_log", [(row["status"], row["mode"]) for row in log], [("success", first["mode"])])
