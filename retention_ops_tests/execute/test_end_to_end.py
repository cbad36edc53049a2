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
import sqlalchemy as sa

from retention_ops.execute import ledger
from retention_ops.execute.ledger import NEEDS_HUMAN, OPEN_STATES, SENT
from retention_ops.log import runs
from retention_ops.log.database import answers, ops_database, ops_events
from retention_ops_tests.execute import chaos
from retention_ops_tests.execute.browser import CHROMIUM, chromium
from retention_ops_tests.execute.servers import jira, loopback, roundup, slack
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
        "RETENTION_OPS_DIGEST": "off", "RETENTION_OPS_MESSAGES_TO": "slack", "RETENTION_OPS_SLACK_API_URL": server.api_url,
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
            launch(ui, "alert_logic", day)
            wait_for("the same alert again", 60, lambda: _alerts_stored() == 2)
            for server in ui.processes("code server"):
                chaos.kill(server)
            chaos.materialize(settings, ("alert_logic",), flagged[0], flagged[0])
            # the code server came back by itself and the sensor went on: an older date is logged, and nothing is sent twice
            (earlier,) = wait_for("the earlier date's log row", 180, lambda: _log_of(settings, flagged[0]))
            assert earlier["status"] == "skipped" and str(day) in earlier["error_message"]
            _one_of_each(channel, tracker)
    if not CHROMIUM:
        pytest.skip("everything but the screenshots was checked: no chromium on this machine")


def _alerts_stored() -> int:
    with dg.DagsterInstance.get() as instance:
        return len(instance.fetch_materializations(dg.AssetRecordsFilter(asset_key=dg.AssetKey("alert_logic")), limit=10).records)


def _log_of(settings, day: date) -> list[dict]:
    with ops_database(settings) as engine:
        return runs.rows(engine, first=day, last=day)


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
        page.open(f"{base}/runs/{run_id}", "incident_response_job", "gate", "plan", "slack", "ticket", "sheets", "webhook",
                  "record", "Success")
        page.drag(645, 367, 520)  # more room for the steps
        page.picture(folder / "incident_run.png")
        page.open(f"{base}/assets/incident_response?view=partitions&partition={day}", str(day), "ticket_id", "RET-1", "link_message",
                  "success")
        page.picture(folder / "audit_metadata.png")
        page.open(f"{base}/locations/__repository__@retention_ops.definitions/sensors/alert_sensor", "alert_sensor", "Running",
                  "incident_response_job", "1 run requested")
        page.picture(folder / "sensor.png")


class Slow:
    """Takes as long as an API on the internet, so that kills also fall between a call and its answer."""

    def handle(self, request: loopback.Request) -> loopback.Reply:
        time.sleep(0.8)
        reply = super().handle(request)
        time.sleep(0.8)
        return reply


class SlowSlack(Slow, slack.SlackServer):
    pass


class SlowRoundup(Slow, roundup.RoundupServer):
    pass


@pytest.mark.slow
def test_thirty_alerts_are_answered_once_while_processes_are_killed(tmp_path):
    began = time.monotonic()
    rules = {"warning_pct": 0.5, "critical_pct": 20.0, "min_sample": 10}
    settings, flagged = chaos.prepared_home(tmp_path / "home", **rules)
    days = flagged[-ALERTS:]
    assert len(days) == ALERTS
    chaos.materialize(settings, chaos.BEFORE_THE_ALERT, days[0], days[-1])
    while time.time() % 300 > 180:  # no look of the schedule, each five minutes, before it can be switched off
        time.sleep(1)
    with SlowSlack() as channel, SlowRoundup(tmp_path / "tracker") as tracker:
        environment = slack_settings(channel) | {f"RETENTION_OPS_{name.upper()}": str(value) for name, value in rules.items()} | {
            "RETENTION_OPS_LEASE_SECONDS": "60", "RETENTION_OPS_MAX_MESSAGES_PER_DAY": "10000",
            "RETENTION_OPS_TICKETS_TO": "roundup", "RETENTION_OPS_TICKET_URL": tracker.url, "RETENTION_OPS_TICKET_USER": "admin",
            "RETENTION_OPS_TICKET_TOKEN": roundup.PASSWORD, "RETENTION_OPS_TICKET_PRIORITY_WARNING": "urgent",
            "RETENTION_OPS_TICKET_PRIORITY_CRITICAL": "critical",
        }
        with chaos.Installation(settings.home, free_port(), environment) as ui, chaos.Arrivals(ui) as alerts:
            wait_for("the code location", 120, lambda: ui.ask(LOCATION)["repositoriesOrError"]["nodes"])
            ui.switch_off_schedules()
            killer = chaos.Killer(ui, KILLS, SEED, lambda: _logged(settings))
            hunt = threading.Thread(target=killer.run, args=(2700,), daemon=True)
            hunt.start()
            for number, day in enumerate(days):
                while hunt.is_alive() and killer.done < number * KILLS / ALERTS:
                    time.sleep(0.5)
                alerts.arrive(day)
            hunt.join()
            hunted = time.monotonic()
            _settle(settings, days, 600)
            ended = time.monotonic()
        assert killer.done == KILLS
        counted = _count(settings, days, channel, tracker)
    counted = {
        "killed": f"{_words(killer.killed)}; {killer.power_cuts} times all at once",
        "starts of `retention-ops ui`": ui.starts, "alerts": ALERTS, **counted,
        "minutes": f"{(ended - began) / 60:.1f}, {(ended - hunted) / 60:.1f} of them after the last kill", "seed": SEED,
    }
    print("\nCHAOS " + "; ".join(f"{name}: {value}" for name, value in counted.items()))
    if SUMMARY:
        Path(SUMMARY).write_text("| what | count |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in counted.items()))


def _logged(settings) -> int:
    with ops_database(settings) as engine:
        return len(runs.rows(engine))


def _words(counts: Counter) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items())) or "none"


def _settle(settings, days: list[date], seconds: float) -> None:
    """Waits until nothing is left to do and nothing has happened for a while."""
    deadline, before, since = time.monotonic() + seconds, None, time.monotonic()
    while time.monotonic() < deadline:
        busy, now = _state(settings, days)
        if busy or now != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > QUIET_SECONDS:
            return
        time.sleep(2)
    pytest.fail(f"not quiet after {seconds} s: {busy}")


def _state(settings, days: list[date]) -> tuple[list[str], tuple[int, int]]:
    """What is left to do, in words; and how much happened so far."""
    with dg.DagsterInstance.get() as instance, ops_database(settings) as engine:
        found = instance.get_runs()
        busy = [f"run {run.run_id} of {run.job_name} is {run.status.value}" for run in found if not run.is_finished]
        busy += [f"{row['alert_date']}: {row['slot']} {row['kind']} is {row['state']} ({row['last_error']})"
                 for row in ledger.find(engine, state=OPEN_STATES)]
        with engine.connect() as connection:
            answered = set(connection.execute(sa.select(answers.c.alert_date)).scalars())
        busy += [f"{day} is not answered" for day in days if day not in answered]
        return busy, (len(found), len(runs.rows(engine)))


def _count(settings, days: list[date], channel: slack.SlackServer, tracker: roundup.RoundupServer) -> dict[str, object]:
    """Compares ledger, Slack and tracker, and returns the numbers."""
    with ops_database(settings) as engine:
        rows = ledger.find(engine)
        with engine.connect() as connection:
            verdicts = connection.execute(sa.select(answers.c.alert_date, answers.c.verdict, answers.c.id)).all()
        log = runs.rows(engine)
        assert runs.first_broken_row(engine) is None
    assert sorted(day for day, _, _ in verdicts) == days, "every flagged date has one answer, and only one"
    for day, verdict, answer in verdicts:
        slots = {row["slot"] for row in rows if row["answer_id"] == answer}
        assert slots == (set() if verdict == "covered" else {"slack", "ticket", "sheets", "webhook"}), (day, verdict, slots)
    assert {row["alert_date"] for row in log} == set(days), "every date is in the log"
    for row in rows:
        assert row["state"] in (SENT, NEEDS_HUMAN), row
        assert row["state"] == SENT or row["last_error"], row
    with dg.DagsterInstance.get() as instance:
        statuses = Counter(f"{run.status.value.lower()} of {run.job_name}" for run in instance.get_runs() if run.job_name != "daily_loop")
    return {
        "answers": _words(Counter(verdict for _, verdict, _ in verdicts)), "runs": _words(statuses), "rows of ops_runs_log": len(log),
        **_slack_agrees(channel, rows), **_tracker_agrees(tracker, rows),
        "actions": _words(Counter(f"{row['slot']} {row['kind']} {row['state']}" for row in rows)),
        "sent after more than one attempt": sum(row["attempts"] > 1 for row in rows),
        "found there after a kill": _found_there(settings),
    }


def _slack_agrees(channel: slack.SlackServer, rows: list[ledger.Row]) -> dict[str, int]:
    """One message for each action that says it was sent, none twice, none that nobody planned."""
    messages = Counter(message["metadata"]["event_payload"]["key"] for message in channel.messages if message["metadata"])
    charts = Counter(file["title"].partition("[retention-ops ")[2][:12] for message in channel.messages for file in message["files"])
    assert len(messages) + len(charts) == len(channel.messages)
    planned = [row for row in rows if row["destination"] == "slack"]
    _agree(messages, {row["key"]: row["state"] for row in planned if row["kind"] in ("post", "reply")})
    _agree(charts, {row["key"][:12]: row["state"] for row in planned if row["kind"] == "chart"})
    in_thread = sum(bool(message["metadata"]) and message["thread_ts"] not in (None, message["ts"]) for message in channel.messages)
    return {"Slack messages": len(messages) - in_thread, "Slack replies": in_thread, "Slack charts": len(charts)}


def _tracker_agrees(tracker: roundup.RoundupServer, rows: list[ledger.Row]) -> dict[str, int]:
    """One issue for each ticket that says it was opened, one message of it for each comment."""

    def ask(path: str) -> list[dict]:
        answer = requests.get(f"{tracker.url}/rest/data/{path}", auth=("admin", roundup.PASSWORD), timeout=30)
        answer.raise_for_status()
        return answer.json()["data"]["collection"]

    issues = ask("issue?@fields=extkey,messages&@verbose=0")
    named = {str(message) for issue in issues for message in issue["messages"]}
    written = [message["messageid"] for message in ask("msg?@fields=messageid") if str(message["id"]) in named]
    comments = Counter(said.strip("<>").partition("@")[0] for said in written)
    comments -= Counter(issue["extkey"] for issue in issues)  # an issue's own text is a message too
    planned = [row for row in rows if row["destination"] == "roundup"]
    _agree(Counter(issue["extkey"] for issue in issues), {row["key"]: row["state"] for row in planned if row["kind"] == "create"})
    _agree(comments, {row["key"]: row["state"] for row in planned if row["kind"] == "comment"})
    return {"tickets": len(issues), "ticket comments": comments.total()}


def _agree(there: Counter, planned: dict[str, str]) -> None:
    assert set(there) <= set(planned), "something is there that no action planned"
    assert [key for key, number in there.items() if number > 1] == [], "something is there twice"
    assert [key for key, state in planned.items() if state == SENT and not there[key]] == [], "sent, but not there"


def _found_there(settings) -> int:
    """How many actions went out although their worker died before it could say so."""
    with ops_database(settings) as engine, engine.connect() as connection:
        return connection.execute(
            sa.select(sa.func.count()).select_from(ops_events)
            .where(ops_events.c.event == SENT, ops_events.c.detail.startswith("found there"))
        ).scalar_one()
