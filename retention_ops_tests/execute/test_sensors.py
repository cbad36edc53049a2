"""What starts a response by itself: no event missed, none asked for under two names, nothing forgotten that failed."""

from __future__ import annotations

import os
from datetime import UTC, date, datetime, timedelta

import dagster as dg
import pytest

from retention_ops.execute import incidents, ledger, sensors
from retention_ops.execute.destinations import SLOTS
from retention_ops.execute.job import follow_up_job, incident_response_job
from retention_ops.execute.sensors import FIRST_ANSWER, HISTORY, MAX_TRIES, alert_sensor, follow_up_sensor
from retention_ops.log.database import ops_database
from retention_ops_tests.execute.stage import (
    CRITICAL,
    DAY,
    OPENED,
    RISE,
    WARNINGS,
    FakeClock,
    Killed,
    Stage,
    morning_after,
    staged,
    truncated,
)

FLAGGED = [*WARNINGS, *(RISE + timedelta(number) for number in range(7))]


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as stored:
        yield stored


def computed(instance, *days):
    for day in days:
        instance.report_runless_asset_event(dg.AssetMaterialization("alert_logic", partition=day.isoformat()))


def tick(sensor, stage, instance, cursor=None):
    context = dg.build_sensor_context(instance=instance, cursor=cursor, resources={"loop": stage.loop()})
    result = sensor(context)
    return result.run_requests or [], result.cursor


def dates(request) -> list[date]:
    return [date.fromisoformat(day) for day in request.run_config["ops"]["gate"]["config"]["alert_dates"]]


def run(job, stage, instance, request=None):
    return job.execute_in_process(
        instance=instance, resources={"loop": stage.loop()}, run_config=request.run_config if request else {}, raise_on_error=False,
        tags=request.tags if request else {},
    )


def storage_id(instance) -> str:
    return str(instance.fetch_materializations(dg.AssetKey("alert_logic"), limit=1).records[0].storage_id)


# -- alert_sensor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("days", [50, pytest.param(400, marks=pytest.mark.slow)])
def test_four_hundred_events_in_one_go_are_all_seen(stage, instance, days):
    """A year backfilled: every flagged date is asked for, the newest as a response, history in one run."""
    stage.clock.now = morning_after(FLAGGED[-1])
    stage.responder().gatekeeper.horizon()
    first = FLAGGED[-1] - timedelta(days - 1)
    stage.compute(first, FLAGGED[-1])
    computed(instance, *(first + timedelta(number % days) for number in range(400)))
    requests, cursor = tick(alert_sensor, stage, instance)
    assert cursor == storage_id(instance)
    (response,), (history,) = ([one for one in requests if one.tags[HISTORY] == word] for word in ("false", "true"))
    assert dates(response) == [FLAGGED[-1]] and dates(history) == FLAGGED[:-1]
    assert int(response.tags["dagster/priority"]) > int(history.tags["dagster/priority"])
    assert tick(alert_sensor, stage, instance, cursor) == ([], cursor)


def test_more_dates_than_one_tick_decides_are_left_to_the_next(stage, instance, monkeypatch):
    monkeypatch.setattr(sensors, "MAX_DATES", 20)
    monkeypatch.setattr(sensors, "BATCH", 10)
    stage.clock.now = morning_after(FLAGGED[-1])
    stage.compute(FLAGGED[0], FLAGGED[-1])
    computed(instance, *(FLAGGED[-1] - timedelta(number) for number in reversed(range(46))))
    seen, cursor, ticks = [], None, 0
    while cursor != storage_id(instance):
        requests, cursor = tick(alert_sensor, stage, instance, cursor)
        seen += [day for request in requests for day in dates(request)]
        ticks += 1
    assert (ticks, sorted(seen)) == (3, FLAGGED)


def test_a_tick_that_died_after_asking_asks_under_the_same_names(stage, instance):
    stage.responder().gatekeeper.horizon()
    stage.clock.now = morning_after(WARNINGS[2])
    stage.compute(DAY, WARNINGS[2])
    computed(instance, *WARNINGS[:3])
    first, again = tick(alert_sensor, stage, instance)[0], tick(alert_sensor, stage, instance)[0]
    assert [one.run_key for one in first] == [one.run_key for one in again] and len({one.run_key for one in first}) == len(first) == 2


def test_another_result_of_the_same_date_is_asked_for_under_another_name(stage, instance):
    day = WARNINGS[1]
    stage.clock.now = morning_after(day)
    woken, keys = stage.quiet_customers(day)[:1], []
    for amount in (None, "25.00", "0.00"):
        if amount:
            stage.orders_found(day, woken, amount)
        stage.compute(day)
        computed(instance, day)
        (request,) = tick(alert_sensor, stage, instance)[0]
        keys.append(request.run_key)
        stage.responder().answer(day)
    assert len(set(keys)) == 3, "the third result is the first one again, and yet another answer"


def test_an_answered_date_is_not_asked_for_again(stage, instance):
    stage.answer(DAY)
    computed(instance, DAY)
    assert tick(alert_sensor, stage, instance)[0] == []


def test_an_event_whose_row_is_gone_is_a_visible_failure(stage, instance):
    computed(instance, DAY)
    (request,) = tick(alert_sensor, stage, instance)[0]
    assert request.run_key.startswith(f"missing:{DAY}:")
    outcome = run(incident_response_job, stage, instance, request)
    assert not outcome.success
    (row,) = stage.log(DAY)
    assert row["status"] == "failed" and "has no alert_logic row" in row["error_message"]


def test_in_mode_off_nobody_is_asked(template, tmp_path, instance):
    with staged(template, tmp_path, mode="off") as stage:
        stage.compute(DAY)
        computed(instance, DAY)
        requests, cursor = tick(alert_sensor, stage, instance)
    assert requests == [] and cursor == storage_id(instance)


def test_the_cursor_survives_a_restart_of_everything(stage, tmp_path):
    stage.compute(DAY, WARNINGS[1])
    with dg.DagsterInstance.local_temp(str(tmp_path)) as stored:
        computed(stored, DAY)
        requests, cursor = tick(alert_sensor, stage, stored)
        assert [dates(one) for one in requests] == [[DAY]]
    with dg.DagsterInstance.local_temp(str(tmp_path)) as stored:
        stage.responder().answer(DAY)
        stage.clock.now = morning_after(WARNINGS[1])
        computed(stored, WARNINGS[1])
        assert [dates(one) for one in tick(alert_sensor, stage, stored, cursor)[0]] == [[WARNINGS[1]]]


# -- the job -----------------------------------------------------------------------------------------------------------


def materialized(instance, day, asset="incident_response"):
    found = instance.fetch_materializations(
        dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[day.isoformat()]), limit=5).records
    return [record.asset_materialization for record in found]


def test_the_job_answers_and_shows_its_trail_in_the_catalog(stage, instance):
    stage.compute(DAY)
    computed(instance, DAY)
    (request,) = tick(alert_sensor, stage, instance)[0]
    assert run(incident_response_job, stage, instance, request).success
    assert stage.world.tally() == OPENED and [row["status"] for row in stage.log()] == ["success"]
    (event,) = materialized(instance, DAY)
    assert event.metadata["status"].value == "success"
    assert event.metadata["link_ticket"].value.startswith("https://jira.invalid/jira-")
    assert event.metadata["link_message"].value.startswith("https://slack.invalid/")
    assert event.metadata["link_P2_2024_02_19"].value == "https://sheets.invalid/P2-2024-02-19"
    assert "| webhook | post |" in event.metadata["actions"].value
    (log,) = materialized(instance, DAY, "ops_runs_log")
    assert log.metadata["dagster/row_count"].value == 1 and len(stage.lake.read("ops_runs_log")) == 1
    assert run(incident_response_job, stage, instance, request).success, "the same request again changes nothing"
    assert stage.world.tally() == OPENED


def test_history_is_one_run_one_row_each_and_one_digest(stage, instance):
    stage.clock.now = morning_after(date(2025, 1, 1))
    stage.compute(FLAGGED[0], FLAGGED[-1])
    computed(instance, *FLAGGED)
    (request,) = tick(alert_sensor, stage, instance)[0]
    assert dates(request) == FLAGGED and run(incident_response_job, stage, instance, request).success
    assert stage.world.tally() == {} and [row["status"] for row in stage.log()] == ["skipped"] * len(FLAGGED)
    (digest,) = instance.fetch_observations(dg.AssetKey("incident_response"), limit=5).records
    text = digest.event_log_entry.asset_observation.metadata["history_digest"].value
    assert "11 dates, 2024-02-19 to 2024-04-04. Nothing was sent for them." in text


def test_a_destination_that_refuses_fails_the_run_after_it_was_logged(stage, instance):
    stage.world.jira.orders["create"] = ["reject"]
    stage.compute(DAY)
    computed(instance, DAY)
    (request,) = tick(alert_sensor, stage, instance)[0]
    outcome = run(incident_response_job, stage, instance, request)
    assert not outcome.success
    assert [event.step_key for event in outcome.all_events if event.is_step_failure] == ["record"]
    (row,) = stage.log()
    assert row["status"] == "failed" and "ticket create failed (jira refuses)" in row["error_message"]
    assert stage.world.slack.kinds()["post"] == 1 and stage.world.webhook.kinds() == {"post": 1}
    assert materialized(instance, DAY)[0].metadata["reason"].value == row["error_message"]


# -- follow_up_sensor --------------------------------------------------------------------------------------------------


def unanswered(stage, instance):
    return [one for one in tick(follow_up_sensor, stage, instance)[0] if one.job_name == "incident_response_job"]


def due(stage, instance):
    return [one for one in tick(follow_up_sensor, stage, instance)[0] if one.job_name == "response_follow_up"]


@pytest.mark.slow
def test_a_response_that_failed_is_tried_again_later_each_time_at_most_six_times(stage, instance):
    stage.compute(WARNINGS[1])
    stage.clock.now = morning_after(WARNINGS[1])
    stage.responder().gatekeeper.horizon()
    stage.settings.packs.rename(stage.home / "elsewhere")
    stage.settings.packs.write_text("a file where a folder should be")
    stage.responder().answer(WARNINGS[1])
    keys = []
    for tries in range(1, MAX_TRIES):
        stage.clock.forward(minutes=2**tries, seconds=-1)
        assert unanswered(stage, instance) == []
        stage.clock.forward(seconds=1)
        keys += [one.run_key for one in unanswered(stage, instance)]
        stage.responder().answer(WARNINGS[1])
    stage.clock.forward(days=3)
    assert unanswered(stage, instance) == [], "from here on it is a person's"
    assert len(set(keys)) == MAX_TRIES - 1 and [row["status"] for row in stage.log()] == ["failed"] * MAX_TRIES


def test_a_response_that_died_without_a_word_is_asked_for_again(stage, instance):
    stage.compute(DAY)
    stage.responder().gatekeeper.horizon()
    os.utime(stage.lake.path("alert_logic", DAY), (stage.clock().timestamp(),) * 2)
    assert unanswered(stage, instance) == [], "the alert sensor has it"
    keys, started = [], stage.clock()
    for doublings in range(8):
        stage.clock.now = started + FIRST_ANSWER * 2**doublings
        keys += [one.run_key.rpartition(":")[2] for one in unanswered(stage, instance)]
    assert keys == ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.5", "0.5"]
    assert stage.responder().answer(DAY)["status"] == "success" and unanswered(stage, instance) == []


def test_it_waits_for_the_first_answer(stage, instance):
    stage.compute(DAY)
    stage.responder().gatekeeper.horizon()
    at = stage.clock()
    os.utime(stage.lake.path("alert_logic", DAY), (at.timestamp(),) * 2)
    stage.clock.now = at + FIRST_ANSWER - timedelta(seconds=1)
    assert unanswered(stage, instance) == []
    stage.clock.forward(seconds=2)
    (request,) = unanswered(stage, instance)
    assert run(incident_response_job, stage, instance, request).success and stage.world.tally() == OPENED


def test_a_retraction_that_never_ran_is_asked_for_too(stage, instance):
    stage.answer(DAY)
    stage.orders_found(DAY, stage.quiet_customers(DAY))
    stage.compute(DAY)
    stage.clock.forward(minutes=5)
    (request,) = unanswered(stage, instance)
    assert run(incident_response_job, stage, instance, request).success
    assert incidents.find(stage.engine)[0]["state"] == "retracted" and unanswered(stage, instance) == []


def test_what_is_due_is_asked_for_once_in_five_minutes(stage, instance):
    stage.world.jira.orders["create"] = ["lost"]
    stage.answer(DAY)
    assert due(stage, instance) == [], "nothing can be found out yet"
    stage.clock.now = datetime(2024, 2, 20, 7, 0, tzinfo=UTC)
    keys = []
    for _ in range(20):
        keys += [one.run_key for one in due(stage, instance)]
        stage.clock.forward(seconds=30)
    assert len(keys) == 20 and len(set(keys)) == 2


def test_a_follow_up_run_finds_what_was_sent_and_logs_it(stage, instance):
    stage.world.jira.orders["create"] = ["lost"]
    stage.answer(DAY)
    stage.clock.forward(minutes=10)
    (request,) = due(stage, instance)
    outcome = run(follow_up_job, stage, instance, request)
    assert outcome.success and stage.world.twice() == [] and stage.world.jira.kinds() == {"create": 1}
    assert [row["status"] for row in stage.log()] == ["failed", "success"] and due(stage, instance) == []
    assert "link_ticket" in materialized(instance, DAY)[0].metadata


def test_a_killed_response_is_finished_by_the_follow_up(stage, instance):
    def kill(step, row):
        if (step, row["slot"]) == ("after_send", "sheets"):
            raise Killed

    with pytest.raises(Killed):
        stage.answer(DAY, checkpoint=kill)
    stage.clock.forward(minutes=10)
    (request,) = due(stage, instance)
    assert run(follow_up_job, stage, instance, request).success
    assert stage.world.tally() == OPENED and {row["state"] for row in ledger.find(stage.engine)} == {"sent"}


def test_a_follow_up_that_leaves_something_open_fails_visibly(stage, instance):
    stage.world.jira.orders["create"], stage.world.jira.asked = ["lost"], ["cannot tell"]
    stage.answer(DAY)
    stage.clock.forward(minutes=10)
    (request,) = due(stage, instance)
    assert not run(follow_up_job, stage, instance, request).success
    row = stage.log()[-1]
    assert row["status"] == "failed" and row["error_message"] == "ticket create needs human (no scope to look)"


def test_an_answer_whose_runs_died_before_the_log_is_logged_later(stage, instance):
    """Decided, sent, and killed each time before the last step: the dates it stands for are logged too."""
    stage.responder().gatekeeper.horizon()
    stage.clock.now = morning_after(WARNINGS[1])
    stage.compute(WARNINGS[0], WARNINGS[1])
    responder = stage.responder()
    responder.plan(responder.gate(WARNINGS[1]), WARNINGS[1])
    for slot in SLOTS:
        responder.deliver(WARNINGS[1], slot)
    assert stage.log() == [] and tick(follow_up_sensor, stage, instance)[0] == []
    stage.clock.forward(minutes=6)
    (request,) = tick(follow_up_sensor, stage, instance)[0]
    assert dates(request) == WARNINGS[:2]
    assert run(incident_response_job, stage, instance, request).success and stage.world.tally() == OPENED
    assert [row["alert_date"] for row in stage.log()] == WARNINGS[:2] and tick(follow_up_sensor, stage, instance)[0] == []


def test_a_missed_acknowledgement_asks_for_a_follow_up(stage, instance):
    stage.answer(DAY)
    stage.clock.now = incidents.find(stage.engine)[0]["ack_by"]
    (request,) = due(stage, instance)
    assert run(follow_up_job, stage, instance, request).success
    assert "reply" in stage.world.slack.kinds() and due(stage, instance) == []


def test_shadow_asks_for_nothing_behind_peoples_backs(tmp_path, instance):
    truncated(tmp_path / "home", CRITICAL)
    stage = Stage(tmp_path / "home", FakeClock(morning_after(CRITICAL)), {"mode": "shadow"})
    stage.answer(CRITICAL)
    stage.clock.forward(days=4)
    assert tick(follow_up_sensor, stage, instance)[0] == []
    stage.close()


def test_a_sensor_opens_an_empty_database(tmp_path, template, instance):
    with staged(template, tmp_path) as stage:
        (stage.home / "ops.sqlite").unlink()
        assert tick(follow_up_sensor, stage, instance)[0] == []
        with ops_database(stage.settings) as opened:
            assert ledger.find(opened) == []
