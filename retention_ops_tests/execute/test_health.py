"""Is the installation well? Each cause is told once when it begins and once when it is over, whatever dies in between."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import dagster as dg
import pytest
from pydantic import SecretStr

from retention_ops.definitions import build_defs
from retention_ops.execute import health, ledger, quiet
from retention_ops.execute.door import HALTED
from retention_ops.execute.health import CAUSES, DATA_LATE, NEEDS_HUMAN, NONE_AT_ALL, RUN_FAILED, SOURCE_OFF, TOO_MANY, Cause
from retention_ops.execute.sensors import quiet_sensor
from retention_ops.execute.wording import HEALTH
from retention_ops.log import runs
from retention_ops.log.database import ops_database
from retention_ops.orchestration import JOB, record_ended_runs
from retention_ops.settings import Secrets
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.conftest import settings_for
from retention_ops_tests.execute.servers.mail import MailServer
from retention_ops_tests.execute.servers.slack import CHANNEL, TOKEN, SlackServer, channel
from retention_ops_tests.execute.stage import DAY, WARNINGS, FakeClock, Killed, Stage, intent, staged
from retention_ops_tests.shops import lake_with, orders_frame

OWNER = "C0HEALTH1"
COMPLETE = date(2024, 5, 27)
"""through when the small shop's orders are complete"""
WELL = datetime(2024, 5, 28, 9, tzinfo=UTC)
"""a morning on which nothing is late"""


FED = {"source": "files", "source_path": "exports"}


@pytest.fixture
def owned(template, tmp_path):
    """A live installation with a data owner and without digests, on a morning when all is well."""
    with staged(template, tmp_path, health_channel=OWNER, digest="off", **FED) as stage:
        stage.clock.now = WELL
        yield stage


def found(stage: Stage) -> list[str]:
    return [cause.key for cause in health.look(stage.engine, stage.lake, stage.settings, stage.clock)]


def tell(stage: Stage, **changes: Any) -> list[dict[str, Any]]:
    return quiet.tell(stage.responder(**changes))


def told(stage: Stage) -> list[tuple[str, str]]:
    """(kind, first line) of what arrived at Slack."""
    return [(entry["kind"], entry["payload"]["text"]) for entry in stage.world.slack.arrived]


# -- how each cause begins and ends -------------------------------------------------------------------------------------


def ran(stage: Stage, first: date, last: date | None = None, status: str = "success", number: int = 0) -> None:
    name = f"{status}-{number}-{first}-{stage.clock():%H%M%S}"
    health.record_runs(stage.engine, [{"run_id": name, "first_date": first, "last_date": last or first, "status": status,
                                       "started_at": stage.clock() - timedelta(minutes=1), "ended_at": stage.clock()}], stage.clock)


def logged(stage: Stage, day: date, *, flag: bool = False, status: str = "success", mode: str = "live", run_id: str = "") -> None:
    runs.append(stage.engine, {
        "run_id": run_id or f"run-{len(runs.rows(stage.engine))}", "run_timestamp": stage.clock(), "alert_date": day,
        "alert_type": "retention_status_degradation", "severity": "WARNING" if flag else "INFO", "alert_flag": flag, "current_value": 20.0,
        "baseline_value": 19.0, "delta_relative_pct": 5.0, "sample_size": 100, "p1_count": 0, "p2_count": 0, "p3_count": 0,
        "total_exported": 0, "slack_posted": False, "slack_message_ts": None, "ticket_id": None, "export_p1_link": None,
        "export_p2_link": None, "export_p3_link": None, "status": status, "error_message": None, "execution_time_ms": 1, "mode": mode,
        "facts_sha256": None, "audience_sha256": None,
    })


def checked(stage: Stage, ok: bool) -> None:
    differences = [] if ok else [{"date": "2024-05-26", "orders_here": 9, "orders_there": 10}]
    health.record_source_check(stage.engine, COMPLETE, ok, differences, stage.clock)


def held(stage: Stage, day: date = DAY, **changes: Any) -> str:
    """An action that began to need a human just now."""
    with stage.engine.begin() as connection:
        (key,) = ledger.plan(connection, [intent(alert_date=day, hold="a look", **changes)], stage.clock(), "test", {})
    return key


def late(stage: Stage) -> None:
    stage.clock.now = datetime(2024, 5, 29, 8, tzinfo=UTC)


def arrived(stage: Stage) -> None:
    """Yesterday's orders are in, whatever the day is."""
    yesterday = stage.clock().date() - timedelta(days=1)
    stage.ingest("orders", f"order_id,customer_id,order_date,order_amount\nlate-{yesterday},c1,{yesterday},10.00\n")


def waiting(stage: Stage) -> None:
    held(stage, part=str(stage.clock()))
    stage.clock.forward(hours=1)


def decided(stage: Stage) -> None:
    for row in ledger.find(stage.engine, state=ledger.NEEDS_HUMAN):
        ledger.by_hand(stage.engine, row["key"], "cancel", "Ada", "not wanted", stage.clock())


def many(stage: Stage) -> None:
    newest = max((row["alert_date"] for row in runs.rows(stage.engine)), default=COMPLETE) + timedelta(days=5)
    for number in range(6):
        logged(stage, newest - timedelta(days=4 * number), flag=True)


def calm_month(stage: Stage) -> None:
    newest = max(row["alert_date"] for row in runs.rows(stage.engine))
    logged(stage, newest + timedelta(days=25))


def silent(stage: Stage) -> None:
    newest = max((row["alert_date"] for row in runs.rows(stage.engine)), default=COMPLETE - timedelta(days=59))
    logged(stage, newest)
    logged(stage, newest + timedelta(days=60))


def alarmed(stage: Stage) -> None:
    logged(stage, max(row["alert_date"] for row in runs.rows(stage.engine)), flag=True)


def late_again(stage: Stage) -> None:
    stage.clock.forward(days=2)


STORIES: dict[str, tuple[Callable, Callable, Callable]] = {
    # cause: how it begins, how it is mended, how it begins again
    RUN_FAILED: (lambda stage: ran(stage, DAY, status="failure"), lambda stage: ran(stage, DAY), lambda stage: (
        stage.clock.forward(minutes=1), ran(stage, DAY, status="failure", number=2))),
    DATA_LATE: (late, arrived, late_again),
    SOURCE_OFF: (lambda stage: checked(stage, False), lambda stage: checked(stage, True), lambda stage: checked(stage, False)),
    NEEDS_HUMAN: (waiting, decided, waiting),
    TOO_MANY: (many, calm_month, many),
    NONE_AT_ALL: (silent, alarmed, silent),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_cause_is_told_once_when_it_begins_and_once_when_it_is_over(owned, cause):
    begins, ends, begins_again = STORIES[cause]
    assert found(owned) == [] and tell(owned) == []
    begins(owned)
    (key,) = found(owned)
    assert key.partition(":")[0] == cause
    tell(owned)
    title = f"{HEALTH[cause][0].lower()}{HEALTH[cause][1:]}"
    ((kind, text),) = told(owned)
    assert kind == "post" and text.startswith(f"Health: {title}")
    (message,) = owned.world.slack.arrived
    assert message["target"] == OWNER and f"health --runbook {cause}" in json.dumps(message["payload"]["blocks"])
    assert tell(owned) == [] and len(told(owned)) == 1, "it stays as it is: nothing is said"
    ends(owned)
    assert found(owned) == []
    tell(owned)
    end = owned.world.slack.arrived[1]
    assert end["kind"] == "reply" and end["parent"] == message["id"] and end["payload"]["text"].startswith(f"Over: {title}")
    assert tell(owned) == [] and health.open_causes(owned.engine) == []
    begins_again(owned)
    tell(owned)
    assert [kind for kind, _ in told(owned)] == ["post", "reply", "post"] and owned.world.twice() == []
    first, second = [row for row in health.causes(owned.engine) if row["cause"] == cause]
    assert first["closed_at"] and not second["closed_at"] and first["opened_key"] != second["opened_key"]


# -- what counts as a cause ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("zone", "now", "is_late"), [
    ("UTC", "2024-05-29T07:59:59", False), ("UTC", "2024-05-29T08:00:00", True), ("UTC", "2024-05-30T00:10:00", True),
    ("Europe/London", "2024-05-29T06:59:59", False), ("Europe/London", "2024-05-29T07:00:00", True),  # summer time
    ("America/Los_Angeles", "2024-05-29T14:59:59", False), ("America/Los_Angeles", "2024-05-29T15:00:00", True),
])
def test_data_is_late_from_the_deadline_on_in_the_shops_own_time(owned, zone, now, is_late):
    stage = owned.with_settings(shop_timezone=zone)
    stage.clock.now = datetime.fromisoformat(now).replace(tzinfo=UTC)
    assert found(stage) == ([DATA_LATE] if is_late else [])
    stage.close()


def test_on_the_days_the_clocks_change_the_deadline_is_what_the_wall_says(owned):
    stage = owned.with_settings(shop_timezone="Europe/London")
    for day, hour in ((date(2024, 10, 27), 8), (date(2025, 3, 30), 7)):
        at = datetime(day.year, day.month, day.day, hour, tzinfo=UTC)
        yesterday = day - timedelta(days=1)
        assert health.expected_through(stage.settings, at) == yesterday
        assert health.expected_through(stage.settings, at - timedelta(seconds=1)) == yesterday - timedelta(days=1)
    stage.close()


def test_before_the_first_orders_nothing_is_late(owned, tmp_path):
    settings = settings_for(tmp_path / "nothing")
    with ops_database(settings) as engine:
        assert health.look(engine, Lake(settings), settings, owned.clock) == []


def new_home(folder: Path, source: str) -> Stage:
    """A live installation without any orders, at nine in the morning: today's deadline was before anybody looked."""
    folder.mkdir()
    return Stage(folder, FakeClock(datetime(2024, 5, 28, 7, tzinfo=UTC)), {
        "health_channel": OWNER, "digest": "off", "shop_timezone": "Europe/Berlin", "source": source, "source_path": "exports"})


def test_a_source_that_is_broken_from_its_first_day_is_told_once_after_its_first_deadline(tmp_path):
    stage = new_home(tmp_path / "home", "files")
    assert tell(stage) == [] and quiet.pending(stage.responder()) == []
    stage.clock.now = datetime(2024, 5, 29, 5, 59, 59, tzinfo=UTC)
    assert quiet.pending(stage.responder()) == []
    stage.clock.forward(seconds=1)
    (cause,) = health.look(stage.engine, stage.lake, stage.settings, stage.clock)
    assert cause == health.Cause(DATA_LATE, "The source has not given any orders yet; those of 2024-05-28 were due by 08:00 Europe/Berlin.")
    tell(stage)
    stage.clock.forward(days=3)
    assert tell(stage) == [] and [kind for kind, _ in told(stage)] == ["post"]
    arrived(stage)
    tell(stage)
    assert [kind for kind, _ in told(stage)] == ["post", "reply"] and health.open_causes(stage.engine) == []
    stage.close()


@pytest.mark.parametrize("source", ["", "files"])
def test_since_when_the_first_orders_are_awaited_is_written_by_a_run_and_only_where_a_source_is_set(tmp_path, source):
    """What `pending` finds is rolled back, so it must ask for a run."""
    stage = new_home(tmp_path / "home", source)
    assert quiet.pending(stage.responder()) == (["the first orders are awaited"] if source else [])
    tell(stage)
    stage.clock.forward(days=9)
    assert quiet.pending(stage.responder()) == ([f"opened {DATA_LATE}", f"told {DATA_LATE}"] if source else [])
    stage.close()


def test_a_failed_range_is_mended_when_every_date_of_it_ran_well(owned):
    ran(owned, DAY, DAY + timedelta(days=4), status="failure")
    ran(owned, DAY, DAY + timedelta(days=1))
    ran(owned, DAY + timedelta(days=3), DAY + timedelta(days=9))
    assert found(owned) == [RUN_FAILED]
    ran(owned, DAY + timedelta(days=2))
    assert found(owned) == []


def test_a_run_somebody_stopped_is_no_failure_and_an_old_failure_is_history(owned):
    ran(owned, DAY, status="canceled")
    assert found(owned) == []
    ran(owned, DAY, status="failure")
    owned.clock.forward(days=3)
    assert RUN_FAILED in found(owned)
    owned.clock.forward(days=5)
    assert RUN_FAILED not in found(owned)


def test_a_failed_response_is_mended_by_the_response_that_succeeded(owned):
    """The daily run failed with it and is not run again: the sensor tries only the response."""
    logged(owned, DAY, flag=True, status="failed", run_id="daily")
    health.record_runs(owned.engine, [{"run_id": "daily", "first_date": DAY, "last_date": DAY, "status": "failure",
                                       "started_at": None, "ended_at": owned.clock()}], owned.clock)
    (cause,) = health.look(owned.engine, owned.lake, owned.settings, owned.clock)
    assert cause.detail == f"The response for {DAY} failed."
    logged(owned, DAY, flag=True)
    assert found(owned) == []


def test_a_run_is_written_down_once(owned):
    run = {"run_id": "a", "first_date": DAY, "last_date": DAY, "status": "failure", "started_at": None, "ended_at": owned.clock()}
    assert [health.record_runs(owned.engine, [run], owned.clock) for _ in range(2)] == [1, 0]
    assert health.record_runs(owned.engine, [], owned.clock) == 0


def test_waiting_actions_of_another_date_are_another_cause(owned):
    held(owned, WARNINGS[0])
    owned.clock.forward(minutes=30)
    held(owned, WARNINGS[1], part="2")
    held(owned, WARNINGS[1], part="3")
    held(owned, WARNINGS[2], part="4", mode="shadow")
    owned.clock.forward(minutes=30)
    assert found(owned) == [f"{NEEDS_HUMAN}:{WARNINGS[0]}"]
    owned.clock.forward(minutes=30)
    _, second = health.look(owned.engine, owned.lake, owned.settings, owned.clock)
    assert second.key == f"{NEEDS_HUMAN}:{WARNINGS[1]}"
    assert second.detail == f"2 actions of {WARNINGS[1]} wait for a person, for more than an hour."


def test_a_list_that_waits_for_approval_waits_for_a_person_too(owned):
    asks = {"audience_sha256": "a" * 64, "customers": 900}
    with owned.engine.begin() as connection:
        (key,) = ledger.plan(connection, [intent(slot="sheets", approval=asks)], owned.clock(), "test", {})
        ledger.plan(connection, [intent(slot="sheets", approval=asks, mode="shadow")], owned.clock(), "test", {})
    assert owned.actions(key=key)[0]["state"] == ledger.AWAITING
    owned.clock.forward(minutes=59)
    assert found(owned) == []
    owned.clock.forward(minutes=1)
    (cause,) = health.look(owned.engine, owned.lake, owned.settings, owned.clock)
    assert cause == Cause(NEEDS_HUMAN, f"Action {key[:12]} of {DAY} waits for approval, for more than an hour.", str(DAY))
    held(owned)
    owned.clock.forward(hours=1)
    (cause,) = health.look(owned.engine, owned.lake, owned.settings, owned.clock)
    assert cause.detail == f"2 actions of {DAY} wait for a person (1 for approval), for more than an hour."
    decided(owned)
    ledger.decide_approval(owned.engine, key, False, asks["audience_sha256"], "Ada", "not now", owned.clock())
    assert found(owned) == []


def test_what_health_could_not_tell_is_told_by_nobody_else(owned):
    checked(owned, False)
    owned.world.slack.orders["post"] = ["never"]
    owned.world.slack.asked = ["cannot tell"]
    tell(owned)
    owned.clock.forward(minutes=10)
    tell(owned)
    (row,) = owned.actions(slot="health")
    assert row["state"] == ledger.NEEDS_HUMAN
    owned.clock.forward(hours=2)
    assert found(owned) == [SOURCE_OFF]


def test_consecutive_flagged_dates_are_one_alert(owned):
    for number in range(28):
        logged(owned, COMPLETE - timedelta(days=number), flag=number % 4 < 2)  # two calm days between them
    assert found(owned) == []
    for number in range(6):
        logged(owned, COMPLETE + timedelta(days=5 + 5 * number), flag=True)
    assert found(owned) == [TOO_MANY]


def test_silence_counts_only_where_the_alarm_was_listening(owned, tmp_path):
    logged(owned, COMPLETE - timedelta(days=58))
    logged(owned, COMPLETE)
    assert found(owned) == [], "59 dates"
    ran(owned, COMPLETE - timedelta(days=59), COMPLETE)
    assert found(owned) == [NONE_AT_ALL], "a backfill computed the first of the 60"
    young = lake_with(orders_frame([("a", COMPLETE - timedelta(days=120), 100), ("a", COMPLETE, 100)]), tmp_path / "young")
    assert health.look(owned.engine, young, young.settings, owned.clock) == [], "its first dates had too short a history to be judged"


# -- once, whatever dies ------------------------------------------------------------------------------------------------


def later(stage: Stage) -> None:
    """Other workers come by until nothing moves any more: health itself, and the follow-up."""
    for _ in range(4):
        stage.clock.forward(minutes=10)
        stage.responder().work()
        tell(stage)


@pytest.mark.parametrize("step", ["settled", "planned", "claimed", "after_send", "recorded"])
@pytest.mark.parametrize("part", ["opening", "end"])
def test_killed_anywhere_it_is_still_told_once(owned, step, part):
    checked(owned, False)
    if part == "end":
        tell(owned)
        checked(owned, True)

    def kill(reached: str, row: Any) -> None:
        if reached == step:
            raise Killed

    with pytest.raises(Killed):
        tell(owned, checkpoint=kill)
    later(owned)
    assert [kind for kind, _ in told(owned)] == (["post"] if part == "opening" else ["post", "reply"])
    checked(owned, True)
    later(owned)
    assert [kind for kind, _ in told(owned)] == ["post", "reply"] and owned.world.twice() == []


def test_killed_while_it_is_written_down_nothing_has_happened(owned, monkeypatch):
    checked(owned, False)
    with monkeypatch.context() as patch:
        def killed(*args: Any, **options: Any) -> None:
            raise Killed

        patch.setattr(ledger, "plan", killed)
        with pytest.raises(Killed):
            tell(owned)
    assert health.causes(owned.engine) == [] and owned.actions() == []
    tell(owned)
    assert len(told(owned)) == 1


def test_lost_answers_double_nothing(owned):
    checked(owned, False)
    owned.world.slack.orders |= {"post": ["lost"], "reply": ["lost"]}
    tell(owned)
    later(owned)
    checked(owned, True)
    tell(owned)
    later(owned)
    assert [kind for kind, _ in told(owned)] == ["post", "reply"]


@pytest.mark.parametrize("database_url", ["sqlite", pytest.param("postgres", marks=pytest.mark.slow)], indirect=True)
def test_processes_at_the_same_time_tell_it_once(template, tmp_path, database_url, request):
    """A digest, the beginning of one cause and the end of another are raced for."""
    with staged(template, tmp_path, ops_database_url=database_url, health_channel=OWNER, digest="off", **FED) as stage:
        stage.clock.now = WELL
        checked(stage, False)
        tell(stage)
        checked(stage, True)
        late(stage)
        words = [str(stage.home), database_url, "quiet", stage.clock().isoformat(), "4"]
        line = [sys.executable, "-m", "retention_ops_tests.execute.racers", *words]
        race = subprocess.run(line, cwd=str(request.config.rootpath), capture_output=True, text=True, check=False)
        assert race.returncode == 0, race.stderr
        said = [entry["payload"]["text"].partition(":")[0] for entry in stage.world.slack.arrived]
        assert len(said) == 4 and said.count("Health") == 2 and said.count("Over") == 1, said
        assert stage.world.twice() == [] and [row["cause"] for row in health.open_causes(stage.engine)] == [DATA_LATE]


def test_a_whole_story_on_either_database(template, tmp_path, database_url):
    with staged(template, tmp_path, ops_database_url=database_url, health_channel=OWNER, digest="off", **FED) as stage:
        stage.clock.now = WELL
        for ok in (False, False, True, True, False):
            checked(stage, ok)
            tell(stage)
        assert [kind for kind, _ in told(stage)] == ["post", "reply", "post"]
        assert [bool(row["closed_at"]) for row in health.causes(stage.engine)] == [True, False]


# -- switches -----------------------------------------------------------------------------------------------------------


def test_what_was_over_before_it_left_is_told_to_nobody(owned):
    ledger.set_state(owned.engine, HALTED, "yes", "Ada", "wait", owned.clock())
    checked(owned, False)
    tell(owned)
    checked(owned, True)
    tell(owned)
    ledger.set_state(owned.engine, HALTED, "no", "Ada", "go on", owned.clock())
    later(owned)
    assert told(owned) == [] and [row["state"] for row in owned.actions(slot="health")] == [ledger.CANCELLED]


def test_in_off_causes_are_known_and_nothing_is_told_and_live_tells_what_is_still_open(owned):
    off = owned.with_settings(mode="off")
    checked(off, False)
    assert tell(off) == [] and [row["cause"] for row in health.open_causes(off.engine)] == [SOURCE_OFF]
    assert off.actions() == []
    tell(owned)
    assert len(told(owned)) == 1
    checked(owned, True)
    tell(off)  # its end comes while nothing may leave
    assert len(told(owned)) == 1 and health.open_causes(off.engine) == []
    tell(owned)
    assert [kind for kind, _ in told(owned)] == ["post", "reply"]
    off.close()


def test_in_shadow_it_lands_in_the_outbox_and_a_rehearsal_uses_up_nothing(owned):
    shadow = owned.with_settings(mode="shadow")
    checked(shadow, False)
    tell(shadow)
    assert shadow.world.tally() == {}
    (file,) = shadow.settings.outbox.rglob("*.json")
    said = json.loads(file.read_text())
    assert said["sent"] is False and said["in_live"] == "slack" and said["content"]["cause"] == SOURCE_OFF
    assert file.stat().st_mode & 0o777 == 0o600
    tell(owned)
    assert len(told(owned)) == 1
    shadow.close()


@pytest.mark.parametrize(("changes", "target"), [({}, "C0TEST001"), ({"slack_test_channel": ""}, None)])
def test_pilot_keeps_to_the_test_channel(owned, changes, target):
    pilot = owned.with_settings(mode="pilot", **changes)
    checked(pilot, False)
    tell(pilot)
    assert [entry["target"] for entry in pilot.world.slack.arrived] == ([target] if target else [])
    pilot.close()


def test_health_alerts_never_use_up_what_alarms_need(template, tmp_path):
    with staged(template, tmp_path, health_channel=OWNER, digest="off", **FED, max_messages_per_day=6) as stage:
        for ok in (False, True) * 3:
            checked(stage, ok)
            tell(stage)
        assert len(told(stage)) == 6
        checked(stage, False)
        tell(stage)
        assert [row["state"] for row in stage.actions(slot="health")][-1] == ledger.NEEDS_HUMAN, "its own guardrail holds"
        row = stage.answer(DAY)
        assert row["status"] == "success", row["error_message"]


def test_an_answer_neither_withdraws_nor_waits_for_what_is_said_beside_it(stage):
    owned = stage.with_settings(health_channel=OWNER, digest="daily", **FED)
    owned.world.slack.orders["post"] = ["throttle", "throttle"]
    owned.world.slack.retry_after = 3600
    owned.compute(DAY)
    owned.clock.forward(hours=2)  # past the deadline, so the digest waits for nothing
    checked(owned, False)
    tell(owned, patience=0)
    assert {row["slot"] for row in owned.actions(state=ledger.PLANNED)} == {"digest", "health"}
    assert {row["alert_date"] for row in owned.actions(slot="digest")} == {DAY}
    owned.world.slack.orders["post"] = []
    assert owned.answer(DAY)["status"] == "success"
    owned.orders_found(DAY, owned.quiet_customers(DAY))
    owned.answer(DAY)
    assert [each["verdict"] for each in owned.answers(DAY)] == ["open", "retract"]
    owned.clock.forward(hours=2)
    owned.responder().work()
    assert {row["state"] for row in owned.actions(slot=("digest", "health"))} == {ledger.SENT}
    owned.close()


# -- by the real destinations --------------------------------------------------------------------------------------------


def test_at_slack_the_end_stands_in_the_thread(template, tmp_path):
    with SlackServer() as server:
        server.channels[OWNER] = channel("data-owners")
        changes = {"health_channel": OWNER, "messages_to": "local", "slack_channel": "", "slack_api_url": server.api_url, "digest": "off",
                   "runbooks_url": "https://git.example/docs/runbooks"}
        with staged(template, tmp_path, **FED, **changes) as stage:
            stage.clock.now = WELL
            secrets = Secrets(slack_token=SecretStr(TOKEN))
            for ok in (False, True):
                checked(stage, ok)
                tell(stage, destinations=None, secrets=secrets)
        opening, end = server.messages
        assert opening["channel"] == OWNER != CHANNEL and end["thread_ts"] == opening["ts"]
        assert "https://git.example/docs/runbooks/source_check_off.md" in json.dumps(opening["blocks"])
        assert "Health: the source check is off" in json.dumps(opening["blocks"]) and "Over:" in json.dumps(end["blocks"])


def test_by_mail_where_there_is_no_channel(template, tmp_path):
    with MailServer() as server:
        changes = {"health_email": "owner@data.example", "smtp_host": "127.0.0.1", "smtp_port": server.port, "smtp_security": "none",
                   "mail_from": "retention@shop.example", "digest": "off", "runbooks_url": "https://git.example/docs/runbooks/"}
        with staged(template, tmp_path, **FED, **changes) as stage:
            stage.clock.now = WELL
            for ok in (False, True):
                checked(stage, ok)
                tell(stage, destinations=None)
        opening, end = [mail.message for mail in server.accepted]
        assert opening["To"] == "owner@data.example"
        assert (opening["Subject"], end["Subject"]) == ("Health: the source check is off", "Over: the source check is off")
        assert "https://git.example/docs/runbooks/source_check_off.md" in opening.get_content()


# -- the sensor ----------------------------------------------------------------------------------------------------------


def tick(stage: Stage, instance: dg.DagsterInstance) -> list[dg.RunRequest]:
    return quiet_sensor(dg.build_sensor_context(instance=instance, resources={"loop": stage.loop()})).run_requests or []


def test_the_sensor_sees_a_failed_run_and_asks_for_one_run_that_tells(template, tmp_path):
    with staged(template, tmp_path, health_channel=OWNER, digest="off", **FED, metrics_file="metrics.prom") as stage, \
            dg.DagsterInstance.ephemeral() as instance:
        stage.clock.now = WELL
        assert tick(stage, instance) == []
        defs = build_defs(stage.settings, stage.loop())
        broken = stage.with_settings(templates_dir=tmp_path / "not there")
        outcome = build_defs(broken.settings, broken.loop()).resolve_job_def(JOB).execute_in_process(
            instance=instance, partition_key=str(DAY), raise_on_error=False)
        assert not outcome.success
        (request,) = tick(stage, instance)
        assert request.run_key == tick(stage, instance)[0].run_key
        done = defs.resolve_job_def("quiet_morning").execute_in_process(instance=instance, raise_on_error=False)
        assert done.success and [kind for kind, _ in told(stage)] == ["post"] and tick(stage, instance) == []
        assert 'retention_ops_runs_total{status="failure"} 1' in (stage.home / "metrics.prom").read_text()
        ran(stage, DAY)
        assert len(tick(stage, instance)) == 1
        broken.close()


def test_a_clock_that_stands_still_is_all_the_look_needs(owned):
    """Looking twice at one moment finds the same, and changes nothing."""
    checked(owned, False)
    before = health.causes(owned.engine)
    assert found(owned) == found(owned) == [SOURCE_OFF] and health.causes(owned.engine) == before
    assert isinstance(owned.clock, FakeClock)
    assert quiet.pending(owned.responder()) == quiet.pending(owned.responder()) != [] and health.causes(owned.engine) == before


@pytest.mark.parametrize(("job", "assets", "counts"), [
    (JOB, None, True), ("__ASSET_JOB", ("alert_logic", "action_pack", "incident_response", "ops_runs_log"), True),
    ("__ASSET_JOB", ("alert_logic",), False), ("response_follow_up", None, False),
])
def test_runs_that_do_the_work_of_a_date_count_whoever_started_them(owned, job, assets, counts):
    ran(owned, DAY, status="failure")
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_run(dg.DagsterRun(
            job_name=job, run_id=str(uuid4()), status=dg.DagsterRunStatus.SUCCESS, tags={"dagster/partition": str(DAY)},
            asset_selection=frozenset(map(dg.AssetKey, assets)) if assets else None,
        ))
        assert record_ended_runs(owned.engine, instance, owned.clock) == counts
    assert found(owned) == ([] if counts else [RUN_FAILED])


def test_a_metrics_file_that_cannot_be_written_stops_nothing(template, tmp_path):
    metrics_file = {"metrics_file": "ops.sqlite/no.prom"}
    with staged(template, tmp_path, digest="off", **metrics_file, **FED) as stage, dg.DagsterInstance.ephemeral() as instance:
        stage.clock.now = WELL
        checked(stage, False)
        assert len(tick(stage, instance)) == 1


def test_what_was_rehearsed_goes_with_its_time(owned):
    shadow = owned.with_settings(mode="shadow")
    checked(shadow, False)
    tell(shadow)
    owned.clock.forward(days=shadow.settings.pack_keep_days)
    tell(shadow)
    assert len(list(shadow.settings.outbox.glob("2024-05-28"))) == 1
    owned.clock.forward(days=1)
    tell(shadow)
    assert not list(shadow.settings.outbox.glob("2024-05-28"))
    shadow.close()
