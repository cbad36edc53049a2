"""`retention-ops ui` is a working Dagster: the code location loads, the schedule runs, a backfill from the UI is one run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from datetime import timedelta

import pytest

from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.conftest import LAST_DAY, settings_for

PER_DAY = [name for name, table in TABLES.items() if table.stored == "day"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(what, seconds: float, condition):
    """The first true value of `condition`, or a failure that says what was awaited."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            value = condition()
        except OSError:
            value = None
        if value:
            return value
        time.sleep(1)
    pytest.fail(f"{what} did not happen within {seconds} s")


@pytest.fixture
def ui(small_lake):
    """A function that asks the running UI's GraphQL."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "retention_ops.cli", "--home", str(small_lake.settings.home), "ui", "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )

    def ask(query: str, **variables):
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/graphql", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            result = json.load(answer)
        assert "errors" not in result, result
        return result["data"]

    try:
        yield ask
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


LOCATION = """{ repositoriesOrError { ... on RepositoryConnection { nodes {
    schedules { name scheduleState { status } } assetGroups { groupName } } } } }"""
BACKFILL = """mutation($p: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $p) {
    __typename ... on LaunchBackfillSuccess { backfillId } } }"""
STATUS = "query($b: String!) { partitionBackfillOrError(backfillId: $b) { ... on PartitionBackfill { status } } }"
RUNS = "{ runsOrError { ... on Runs { results { status jobName } } } }"


@pytest.mark.slow
def test_the_ui_loads_everything_and_backfills_a_range_in_one_run(ui, small_lake):
    nodes = wait_for("the code location", 120, lambda: ui(LOCATION)["repositoriesOrError"]["nodes"])
    assert {group["groupName"] for group in nodes[0]["assetGroups"]} == {"detect", "package", "execute", "log"}
    assert [(s["name"], s["scheduleState"]["status"]) for s in nodes[0]["schedules"]] == [("daily_loop_schedule", "RUNNING")]
    days = [LAST_DAY - timedelta(offset) for offset in range(4, -1, -1)]
    started = ui(BACKFILL, p={
        "assetSelection": [{"path": [name]} for name in (*PER_DAY, "action_pack", "incident_response", "ops_runs_log")],
        "partitionNames": [day.isoformat() for day in days],
    })["launchPartitionBackfill"]
    assert started["__typename"] == "LaunchBackfillSuccess"
    done = ("COMPLETED_SUCCESS", "COMPLETED_FAILED", "FAILED", "CANCELED")

    def finished():
        status = ui(STATUS, b=started["backfillId"])["partitionBackfillOrError"]["status"]
        return status if status in done else None

    status = wait_for("the backfill", 240, finished)
    assert status == "COMPLETED_SUCCESS"
    # the shop's data is old, which the data owner is told by a run of its own
    ran = [run for run in ui(RUNS)["runsOrError"]["results"] if run["jobName"] != "quiet_morning"]
    assert ran == [{"status": "SUCCESS", "jobName": "__ASSET_JOB"}]
    lake = Lake(settings_for(small_lake.settings.home))
    assert all(lake.days(table) == days for table in PER_DAY)
    assert (lake.settings.packs / LAST_DAY.isoformat() / "briefing.html").is_file()
