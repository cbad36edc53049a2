"""Whole mornings with nothing left out: the command over stdio, Dagster's own webserver, a Slack and a tracker on loopback."""

from __future__ import annotations

import json
import os
import sys
from datetime import date

import anyio
import pytest
import sqlalchemy as sa
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client

from retention_ops.log import runs
from retention_ops.log.database import exposures, ops_database
from retention_ops.serve import demo
from retention_ops.settings import Settings
from retention_ops.warehouse.files import write_atomic
from retention_ops_tests.execute import chaos
from retention_ops_tests.execute.servers import jira, slack
from retention_ops_tests.execute.test_end_to_end import slack_settings
from retention_ops_tests.serve.house import DAY, answer, says


def over_stdio(environment, script, mode="auto", **client):
    """Runs `script` on a client of the command itself."""

    async def run():
        server = stdio_client(StdioServerParameters(
            command=sys.executable, args=["-m", "retention_ops.cli", "mcp"], env={**os.environ, **environment}))
        async with Client(server, mode=mode, **client) as connected:
            return await script(connected)

    return anyio.run(run)


@pytest.mark.parametrize("mode", ["auto", pytest.param("legacy", marks=pytest.mark.slow)])
def test_a_session_over_stdio(house, mode):
    async def script(client):
        names = [tool.name for tool in (await client.list_tools()).tools]
        alert = answer(await client.call_tool("get_alert_decision", {"date": str(DAY)}))
        misspelt = answer(await client.call_tool("explain_customer", {"customer": "c0", "date": str(DAY)}))
        pending = answer(await client.call_tool("trigger_playbook", {"date": str(DAY), "severity": "CRITICAL"}))
        return client.protocol_version, names, alert, misspelt, pending

    environment = {"RETENTION_OPS_HOME": str(house.home), "RETENTION_OPS_MIN_SAMPLE": "10", "RETENTION_OPS_DAGSTER_URL": house.dagster.url}
    version, names, alert, misspelt, pending = over_stdio(environment, script, mode)
    assert version == {"auto": "2026-07-28", "legacy": "2025-11-25"}[mode]
    assert len(names) == 9 and alert["severity"] == "CRITICAL" and "did you mean customer_id?" in misspelt
    assert pending["status"] == "pending_approval" and [event["what"] for event in house.events("mcp_call")] == [
        "get_alert_decision", "explain_customer", "trigger_playbook"]


@pytest.mark.slow
def test_the_demo_conversation_agrees_with_every_table(tmp_path):
    told: list[str] = []
    report = demo.play(tmp_path / "demo", 2000, 7, told.append)
    assert report.consistent and report.checked > 50, report.wrong
    assert [list(report.answers)] == [["get_alert_decision", "get_operational_context", "build_priority_queue", "generate_brief",
                                       "export_audience", "trigger_playbook"]]
    assert "all equal" in "\n".join(told) and "the person says yes" in "\n".join(told)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_from_the_first_question_to_a_real_ticket_in_live(tmp_path, mode):
    """One message, one ticket, one hand-over, whoever asks again."""
    settings, flagged = chaos.prepared_home(tmp_path / "home")
    day = flagged[-1]
    chaos.materialize(settings, (*chaos.BEFORE_THE_ALERT, "alert_logic"), day, day)
    file = settings.home / "dagster" / "dagster.yaml"
    write_atomic(file, file.read_text() + demo.NO_DAEMON)
    with slack.SlackServer() as channel, jira.FakeJira() as tracker:
        environment = slack_settings(channel) | {
            "RETENTION_OPS_HOME": str(settings.home), "RETENTION_OPS_TICKETS_TO": "jira", "RETENTION_OPS_TICKET_URL": tracker.url,
            "RETENTION_OPS_TICKET_USER": jira.USER, "RETENTION_OPS_TICKET_TOKEN": jira.TOKEN, "RETENTION_OPS_TICKET_PROJECT": "RET",
        }
        with demo._webserver(settings, environment, lambda text: None) as url:
            morning = over_stdio({**environment, "RETENTION_OPS_DAGSTER_URL": url}, _morning(day), mode, elicitation_callback=says(True))
        _judged(settings, day, morning, channel, tracker)


def _morning(day: date):
    async def script(client):
        async def ask(tool, **arguments):
            return answer(await client.call_tool(tool, arguments))

        alert = await ask("get_alert_decision", date=str(day))
        early = await ask("export_audience", date=str(day), tier="P1", destination="csv", limit=5)
        queue = await ask("build_priority_queue", date=str(day))
        first = await ask("trigger_playbook", date=str(day), severity=alert["severity"])
        again = await ask("trigger_playbook", date=str(day), severity=alert["severity"])
        export = await ask("export_audience", date=str(day), tier="P1", destination="csv", limit=5)
        run = await ask("get_run_status", run_id=first["run_id"])
        return {"early": early, "queue": queue, "first": first, "again": again, "export": export, "run": run}

    return script


def _judged(settings: Settings, day: date, morning, channel, tracker) -> None:
    first, again = morning["first"], morning["again"]
    assert "has no Action Pack" in morning["early"] or "lists leave only for an incident" in morning["early"]
    assert morning["queue"]["status"] == "done" and morning["queue"]["table_updated"] is True
    assert (first["status"], first["ticket_id"], first["mode"]) == ("triggered", "RET-1", "live")
    assert first["ticket_url"] == f"{tracker.url}/browse/RET-1" and "slack.com/archives" in first["message_url"]
    assert again["status"] == "already_triggered" and again["ticket_id"] == "RET-1"
    assert list(tracker.issues) == ["RET-1"] and len([message for message in channel.messages if message["metadata"]]) == 1
    assert morning["run"]["status"] == "SUCCESS" and morning["run"]["requested_by"].startswith("mcp:stdio:")
    assert morning["export"]["rows_exported"] == 5 and morning["export"]["left_out"]["holdout"] > 0
    with ops_database(settings) as engine, engine.connect() as connection:
        (row,) = [row for row in runs.rows(engine) if row["run_id"] == first["run_id"]]
        exposed = connection.execute(sa.select(sa.func.count()).select_from(exposures)).scalar_one()
        logged = connection.execute(sa.text("SELECT detail FROM ops_events WHERE event = 'mcp_call' ORDER BY id")).scalars().all()
    assert (row["status"], row["ticket_id"], row["mode"]) == ("success", "RET-1", "live") and exposed > 0
    assert [json.loads(detail)["outcome"] for detail in logged].count("ok") == 6
