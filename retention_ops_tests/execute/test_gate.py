"""What is to be done about a date: a table of cases, each with its reason."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest

from retention_ops.errors import PackError
from retention_ops.execute import incidents, ledger
from retention_ops.execute.gate import ARMED
from retention_ops_tests.execute.stage import CRITICAL, DAY, RESOLVED_ON, RISE, WARNINGS, FakeClock, Stage, morning_after, staged, truncated

CALM = DAY - timedelta(days=1)


def decide(stage, day, **changes):
    return (stage.with_settings(**changes) if changes else stage).responder().gate(day)


def arm(stage, day):
    stage.clock.now = morning_after(day)
    stage.responder().gatekeeper.horizon()


@pytest.mark.parametrize(("mode", "day", "verdict", "says"), [
    ("off", DAY, "skip", "switched off"),
    ("live", DAY, "open", "WARNING: AT_RISK 46.2 %, +19.1 % against the 7 days before (38.7 %)"),
    ("live", CALM, "skip", "no alert: severity INFO"),
    ("live", CRITICAL, "open", "CRITICAL"),
    ("pilot", DAY, "open", "WARNING"),
    ("pilot", CRITICAL, "skip", "pilot answers WARNING only"),
    ("shadow", DAY, "history", "orders are complete through 2024-05-27, only that day is rehearsed in shadow"),
])
def test_the_mode_decides(template, tmp_path, mode, day, verdict, says):
    with staged(template, tmp_path, first=day, mode=mode) as stage:
        stage.compute(day)
        decision = decide(stage, day)
    assert (decision.verdict, says in decision.reason) == (verdict, True), decision.reason


def test_shadow_rehearses_the_last_complete_day_and_arms_nothing(tmp_path):
    truncated(tmp_path / "home", DAY, mode="shadow")
    stage = Stage(tmp_path / "home", FakeClock(datetime(2031, 1, 1, tzinfo=UTC)), {"mode": "shadow"})
    stage.compute(CALM, DAY)
    assert (decide(stage, DAY).verdict, decide(stage, CALM).verdict) == ("open", "skip")
    assert ledger.read_state(stage.engine, ARMED) is None
    stage.close()


def test_a_gated_day_names_the_safeguard(template, tmp_path):
    with staged(template, tmp_path, min_sample=1000) as stage:
        stage.compute(DAY)
        assert decide(stage, DAY).reason == "no alert: severity INFO (held back by min_sample)"


def test_a_date_nobody_computed_is_an_error_that_says_how(stage):
    with pytest.raises(PackError, match=f"retention-ops run --date {DAY}"):
        decide(stage, DAY)


# -- history -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("days_later", "verdict"), [(7, "open"), (8, "history")])
def test_older_than_max_alert_age_days_is_history(stage, days_later, verdict):
    arm(stage, DAY)
    stage.compute(DAY)
    stage.clock.now = datetime.combine(DAY + timedelta(days_later), datetime.min.time(), UTC) + timedelta(hours=12)
    decision = decide(stage, DAY)
    assert decision.verdict == verdict and (verdict == "open" or "older than 7 days (max_alert_age_days)" in decision.reason)


def test_the_age_is_counted_in_the_shops_days(stage):
    """22:00 UTC on the 26th is already the 27th in Auckland: the alert of the 19th is 8 days old there."""
    arm(stage, DAY)
    stage.compute(DAY)
    stage.clock.now = datetime(2024, 2, 26, 22, 0, tzinfo=UTC)
    assert decide(stage, DAY).verdict == "open"
    assert decide(stage, DAY, shop_timezone="Pacific/Auckland").verdict == "history"


def test_what_was_before_the_arming_is_history_and_the_morning_of_it_belongs_to_yesterday(stage):
    arm(stage, WARNINGS[1])
    stage.compute(*WARNINGS[:2])
    decision = decide(stage, WARNINGS[0])
    assert decision.verdict == "history" and decision.reason == "history: before the response was armed on 2024-02-21"
    assert decide(stage, WARNINGS[1]).verdict == "open"


def test_arming_happens_once_and_says_why(stage):
    arm(stage, DAY)
    arm(stage, RISE)
    armed = ledger.read_state(stage.engine, ARMED)
    assert armed["value"] == DAY.isoformat() and "mode is live for the first time" in armed["why"]


def test_a_preview_arms_nothing_and_writes_nothing(stage):
    stage.compute(DAY)
    decision, intents = stage.responder().preview(DAY)
    assert decision.verdict == "open"
    assert [(one.slot, one.kind) for one in intents] == [
        ("slack", "post"), ("slack", "chart"), ("ticket", "create"), ("sheets", "publish"), ("webhook", "post")]
    assert ledger.read_state(stage.engine, ARMED) is None and stage.actions() == stage.answers() == incidents.find(stage.engine) == []
    assert stage.world.tally() == {}


def test_an_old_answer_is_not_told_anew_when_the_orders_of_that_day_are_corrected(stage):
    day = WARNINGS[1]
    stage.answer(day)
    stage.orders_found(day, stage.quiet_customers(day)[:1])
    stage.compute(day)
    assert stage.verdict(day) == "update"
    stage.clock.forward(days=20)
    decision = decide(stage, day)
    assert (decision.verdict, "what was answered then stands" in decision.reason) == ("skip", True)


# -- one incident ------------------------------------------------------------------------------------------------------


def test_the_same_result_is_answered_once(stage):
    stage.answer(DAY)
    decision = decide(stage, DAY)
    assert (decision.verdict, decision.reason) == ("resume", "already answered by run run-1: same result")


def test_a_flagged_day_with_a_newer_one_is_covered(stage):
    arm(stage, DAY)
    stage.clock.now = morning_after(WARNINGS[2])
    stage.compute(DAY, WARNINGS[2])
    assert [stage.verdict(day) for day in WARNINGS[:3]] == ["covered", "covered", "open"]
    newest = decide(stage, WARNINGS[2])
    assert newest.covers == tuple(WARNINGS[:2])
    assert decide(stage, DAY).reason == f"the newest flagged date {WARNINGS[2]} stands for it"


def test_tomorrows_alert_row_stands_for_nothing(stage):
    """A backfill may have computed days that are not over yet."""
    stage.compute(DAY, WARNINGS[3])
    stage.clock.now = morning_after(DAY) - timedelta(hours=7)
    assert stage.verdict(DAY) == "open"


def test_the_next_flagged_day_updates(stage):
    stage.answer(DAY)
    stage.clock.now = morning_after(WARNINGS[1])
    stage.compute(WARNINGS[1])
    assert decide(stage, WARNINGS[1]).reason == "incident 1 goes on" and stage.verdict(WARNINGS[1]) == "update"


def test_a_rise_to_critical_escalates(template, tmp_path):
    with staged(template, tmp_path, first=RISE) as stage:
        stage.answer(RISE)
        stage.clock.now = morning_after(CRITICAL)
        stage.compute(CRITICAL)
        assert stage.verdict(CRITICAL) == "escalate"
        incidents.snooze(stage.engine, 1, stage.clock() + timedelta(days=3), "Ada", "known", stage.clock())
        assert stage.verdict(CRITICAL) == "escalate", "a snooze does not hold back a rise"


def test_a_snoozed_incident_is_quiet_until_then(stage):
    stage.answer(DAY)
    stage.clock.now = morning_after(WARNINGS[1])
    stage.compute(WARNINGS[1])
    incidents.snooze(stage.engine, 1, stage.clock() + timedelta(hours=1), "Ada", "known", stage.clock())
    assert stage.verdict(WARNINGS[1]) == "snoozed"
    stage.clock.forward(hours=2)
    assert stage.verdict(WARNINGS[1]) == "update"


def test_an_answered_day_that_is_no_alert_any_more_is_retracted(stage):
    stage.answer(DAY)
    stage.orders_found(DAY, stage.quiet_customers(DAY))
    stage.compute(DAY)
    decision = decide(stage, DAY)
    assert (decision.verdict, decision.reason) == ("retract", f"{DAY} is no alert any more")


def test_three_calm_days_resolve_and_missing_ones_neither_count_nor_start_again(stage):
    for day in WARNINGS:
        stage.answer(day)
    calm = [RESOLVED_ON - timedelta(2), RESOLVED_ON - timedelta(1), RESOLVED_ON]
    stage.clock.now = morning_after(RESOLVED_ON)
    stage.compute(WARNINGS[-1] + timedelta(1), RESOLVED_ON)
    assert [stage.verdict(day) for day in calm] == ["skip", "skip", "resolve"]
    stage.lake.path("alert_logic", calm[1]).unlink()
    assert stage.verdict(RESOLVED_ON) == "skip"
    stage.compute(RESOLVED_ON + timedelta(1))
    decision = decide(stage, RESOLVED_ON + timedelta(1))
    assert decision.verdict == "resolve" and "3 calm days, the last on 2024-03-04" in decision.reason


def test_a_gated_day_between_calm_ones_does_not_count(stage):
    for day in WARNINGS:
        stage.answer(day)
    stage.clock.now = morning_after(RESOLVED_ON)
    stage.compute(WARNINGS[-1] + timedelta(1), RESOLVED_ON)
    gated = stage.with_settings(min_sample=1000)
    gated.compute(RESOLVED_ON - timedelta(1))
    assert stage.verdict(RESOLVED_ON) == "skip"
    stage.compute(RESOLVED_ON + timedelta(1))
    assert stage.verdict(RESOLVED_ON + timedelta(1)) == "resolve"


def test_a_pilot_stands_for_no_critical_day(template, tmp_path):
    """Only WARNING is answered in pilot, so a CRITICAL day before it is not named either."""
    with staged(template, tmp_path, first=RISE, mode="pilot") as stage:
        arm(stage, RISE)
        last = date(2024, 4, 4)
        stage.clock.now = morning_after(last)
        stage.compute(RISE, last)
        assert stage.verdict(RISE) == "covered" and stage.verdict(CRITICAL) == "skip"
        assert decide(stage, last).covers == (RISE,)


def test_a_rehearsal_does_not_use_up_the_real_answer(tmp_path):
    truncated(tmp_path / "home", DAY)
    shadow = Stage(tmp_path / "home", FakeClock(morning_after(DAY)), {"mode": "shadow"})
    shadow.answer(DAY)
    assert shadow.verdict(DAY) == "resume"
    live = shadow.with_settings(mode="live")
    assert live.verdict(DAY) == "open"
    live.close()
    shadow.close()


@pytest.mark.parametrize(("day", "prepare", "concerned"), [
    (DAY, lambda stage: None, True), (CALM, lambda stage: None, False),
    (WARNINGS[-1] + timedelta(1), lambda stage: stage.answer(DAY), True),
])
def test_a_calm_day_concerns_us_only_while_an_incident_is_open(stage, day, prepare, concerned):
    prepare(stage)
    stage.compute(day)
    keeper = stage.responder().gatekeeper
    assert keeper.concerns(day, keeper.alert(day)) is concerned
