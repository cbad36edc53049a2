"""The whole installation as it runs in a shop: Dagster's own processes, its UI, a Slack and a tracker on loopback, and a killer.

RETENTION_OPS_SCREENSHOTS names a folder for the pictures, RETENTION_OPS_CHAOS_KILLS how many processes are killed,
RETENTION_OPS_CHAOS_SEED at which moments, RETENTION_OPS_CHAOS_SUMMARY a file for the count.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from datetime import date
from pathlib import Path

import dagster as dg
import pytest
import requests

from retention_ops.execute import ledger
from retention_ops.execute.destinations.tickets import mark
from retention_ops.execute.ledger import NEEDS_HUMAN, OPEN_STATES, SENT
from retention_ops.log import runs
from retention_ops.log.database import answers, ops_database
from retention_ops_tests.execute import chaos
from retention_ops_tests.execute.browser import CHROMIUM, chromium
from retention_ops_tests.execute.servers import jira, roundup, slack
from retention_ops_tests.test_ui import free_port, wait_for

# read before any test, because each test starts without our variables
SCREENSHOTS = os.environ.get("RETENTION_OPS_SCREENSHOTS")
KILLS = int(os.environ.get("RETENTION_OPS_CHAOS_KILLS", "50"))
SEED = int(os.environ.get("RETENTION_OPS_CHAOS_SEED", "20261121"))
SUMMARY = os.environ.get("RETENTION_OPS_CHAOS_SUMMARY")
ALERTS = 30
QUIET_SECONDS = 70
"""nothing happens for so long: two ticks of either sensor, and longer than a lease"""

LAUNCH = """mutation($p: ExecutionParams!) { launchPipelineExecution(executionParams: $p) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
RUNS = "{ runsOrError { ... on Runs { results { runId status jobName tags { key value } } } } }"
LOCATION = "{ repositoriesOrError { ... on RepositoryConnection { nodes { name location { name } } } } }"


def slack_settings(server: slack.SlackServer) -> dict[str, str]:
    return {
        "RETENTION_OPS_MODE": "live", "RETENTION_OPS_MAX_ALERT_AGE_DAYS": "36500", "RETENTION_OPS_OWNER": "Ada",
        "RETENTION_OPS_MESSAGES_TO": "slack", "RETENTION_OPS_SLACK_API_URL": server.api_url,
        "RETENTION_OPS_SLACK_CHANNEL": slack.CHANNEL, "RETENTION_OPS_SLACK_TOKEN": slack.TOKEN,
    }


def launch(ui: chaos.Installation, asset: str, day: date) -> str:
    """Materializes one partition as the UI's button does; returns the run's id."""
    started = ui.ask(LAUNCH, p={
        "selector": {"repositoryLocationName": "retention_ops.definitions", "repositoryName": "__repository__", "jobName": "__ASSET_JOB",
                     "assetSelection": [{"path": [asset]}], "assetCheckSelection": None},
        "runConfigData": "{}", "mode": "default", "executionMetadata": {"tags": [{"key": "dagster/partition", "value": str(day)}]},
    })["launchPipelineExecution"]
    assert started["__typename"] == "LaunchRunSuccess", started
    return started["run"]["runId"]


def finished(ui: chaos.Installation, job: str) -> dict | None:
    """The newest run of a job, once it has ended."""
    found = [run for run in ui.ask(RUNS)["runsOrError"]["results"] if run["jobName"] == job]
    return found[0] if found and found[0]["status"] not in chaos.UNFINISHED else None


@pytest.mark.slow
def test_one_alert_becomes_one_message_and_one_ticket(tmp_path):
    settings, flagged = chaos.prepared_home(tmp_path / "home", shop_name="Corner Shop")
    day = flagged[-1]
    chaos.materialize(settings, chaos.BEFORE_THE_ALERT, day, day)
    with slack.SlackServer() as channel, jira.FakeJira() as tracker:
        environment = slack_settings(channel) | {
            "RETENTION_OPS_SHOP_NAME": "Corner Shop", "RETENTION_OPS_TICKETS_TO": "jira", "RETENTION_OPS_TICKET_URL": tracker.url,
            "RETENTION_OPS_TICKET_USER": jira.USER, "RETENTION_OPS_TICKET_TOKEN": jira.TOKEN, "RETENTION_OPS_TICKET_PROJECT": "RET",
        }
        with chaos.Installation(settings.home, free_port(), environment) as ui:
            wait_for("the code location", 120, lambda: ui.ask(LOCATION)["repositoriesOrError"]["nodes"])
            launch(ui, "alert_logic", day)
            run = wait_for("the incident run", 180, lambda: finished(ui, "incident_response_job"))
            assert run["status"] == "SUCCESS"
            assert {tag["value"] for tag in run["tags"] if tag["key"] == "dagster/sensor_name"} == {"alert_sensor"}
            _one_of_each(channel, tracker)
            _logged_and_shown(settings, day, run["runId"])
            if CHROMIUM:
                _looked_at(ui, Path(SCREENSHOTS or tmp_path), day, run["runId"], tmp_path / "profile")
            assert launch(ui, "alert_logic", day)
            time.sleep(45)  # two ticks later the same alert has still been answered once
            _one_of_each(channel, tracker)
    if not CHROMIUM:
        pytest.skip("everything but the screenshots was checked: no chromium on this machine")


def _one_of_each(channel: slack.SlackServer, tracker: jira.FakeJira) -> None:
    (message,) = [message for message in channel.messages if message["metadata"]]
    (chart,) = [message for message in channel.messages if message["files"]]
    assert len(channel.messages) == 2
    assert chart["thread_ts"] == message["ts"] and message["updates"] == 1
    assert f"{tracker.url}/browse/RET-1" in str(message["blocks"])
    assert list(tracker.issues) == ["RET-1"]


def _logged_and_shown(settings, day: date, run_id: str) -> None:
    with ops_database(settings) as engine:
        (row,) = [row for row in runs.rows(engine) if row["run_id"] == run_id]
        assert runs.first_broken_row(engine) is None
    assert (row["alert_date"], row["status"], row["mode"], row["ticket_id"]) == (day, "success", "live", "RET-1")
    with dg.DagsterInstance.get() as instance:
        found = instance.fetch_materializations(dg.AssetRecordsFilter(asset_key=dg.AssetKey("incident_response")), limit=10).records
    (shown,) = [record.asset_materialization for record in found]
    assert shown.partition == str(day)
    assert shown.metadata["ticket_id"].value == "RET-1"
    assert shown.metadata["link_ticket"].value.endswith("/browse/RET-1")
    assert "slack.com/archives" in shown.metadata["link_message"].value


def _looked_at(ui: chaos.Installation, folder: Path, day: date, run_id: str, profile: Path) -> None:
    """The three pages a person would look at, by their text; and their pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    base = f"http://127.0.0.1:{ui.port}"
    with chromium(profile) as page:
        page.open(f"{base}/runs/{run_id}", "incident_response_job", "gate", "plan", "slack", "ticket", "sheets", "webhook", "record", "Success")
        page.picture(folder / "incident_run.png")
        page.open(f"{base}/assets/incident_response?view=partitions&partition={day}", str(day), "ticket_id", "RET-1", "link_message", "success")
        page.picture(folder / "audit_metadata.png")
        page.open(f"{base}/locations/__repository__@retention_ops.definitions/sensors/alert_sensor", "alert_sensor", "Running",
                  "incident_response_job", "1 run requested")
        page.picture(folder / "sensor.png")
