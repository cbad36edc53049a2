"""Two rules, one alert a day: which row leads, one incident whichever fires, the switch and the pilot period of the second."""

from __future__ import annotations

import json
from datetime import date, timedelta

import pytest

from retention_ops.detect.alerts import AT_RISK, SHORTFALL, alert_of, row_of
from retention_ops.errors import PackError
from retention_ops.execute import incidents, ledger
from retention_ops.execute.gate import ARMED_SHORTFALL
from retention_ops.package.pack import alert_version, find_pack
from retention_ops.settings import TRIAL
from retention_ops_tests.execute.stage import DAY, OPENED, morning_after, staged

SHORT = {"shortfall_warning": 1.586, "shortfall_critical": 50.0}
"""the small shop's returns are short of these on FLAGGED, days before its share of AT_RISK rises"""
FLAGGED = date(2024, 2, 14)
TRIED = {**SHORT, "shortfall_pilot_days": 0}


@pytest.fixture
def short(template, tmp_path):
    """The pilot period is over."""
    with staged(template, tmp_path, first=FLAGGED, **TRIED) as opened:
        yield opened


def row(rule: str, severity: str, **changes):
    return {"alert_type": rule, "alert_date": "2024-02-14", "severity": severity, "alert_flag": severity != "INFO", **changes}


@pytest.mark.parametrize(("first", "second", "leads"), [
    ("INFO", "INFO", AT_RISK), ("WARNING", "WARNING", AT_RISK), ("INFO", "WARNING", SHORTFALL), ("WARNING", "CRITICAL", SHORTFALL),
    ("CRITICAL", "WARNING", AT_RISK),
])
def test_the_most_severe_row_leads_and_the_first_rule_where_they_tie(first, second, leads):
    rows = [row(AT_RISK, first), row(SHORTFALL, second)]
    alert = alert_of(rows)
    assert alert["alert_type"] == leads and [row_of(alert, rule)["severity"] for rule in (AT_RISK, SHORTFALL)] == [first, second]
    assert alert_of(rows, (AT_RISK,))["alert_type"] == AT_RISK
    with pytest.raises(PackError):
        alert_of(rows[1:], (AT_RISK,))


def test_a_shortfall_alone_is_answered_like_any_alert(short):
    short.compute(FLAGGED - timedelta(1), FLAGGED)
    answered = short.answer(FLAGGED)
    assert (answered["status"], answered["alert_type"], answered["severity"]) == ("success", SHORTFALL, "WARNING")
    assert short.world.tally() == OPENED
    alert = short.responder().gatekeeper.alert(FLAGGED)
    message = short.world.slack.arrived[0]["payload"]
    assert alert["sentence"] in message["text"] and alert["sentence"].startswith("35 customers were due back in 14 days, 26 came: -27 %")
    assert short.world.jira.arrived[0]["payload"]["title"] == "Retention WARNING: returning customers -27 % on 2024-02-14"
    (picture,) = [arrived for arrived in short.world.slack.arrived if arrived["kind"] == "chart"]
    assert picture["files"] == ["returning_customers.png"] and picture["payload"]["title"] == f"Returning customers to {FLAGGED}"
    assert (find_pack(short.settings, FLAGGED).folder / "briefing.html").read_text().count("data:image/png") == 2
    (incident,) = incidents.find(short.engine)
    assert incident["frozen_baseline"] == pytest.approx(100 * alert["level"]) and incident["frozen_warning_pct"] < 0


def test_both_rules_on_two_days_are_one_incident(short):
    """The shortfall opens it; the rise of AT_RISK days later goes into the same thread and ticket."""
    short.compute(FLAGGED, DAY)
    for day in (FLAGGED, DAY):
        short.clock.now = morning_after(day)
        assert short.answer(day)["status"] == "success"
    (incident,) = incidents.find(short.engine)
    assert (incident["alert_type"], incident["opened_on"], incident["last_flagged_on"]) == (SHORTFALL, FLAGGED, DAY)
    assert {kind: count for kind, count in short.world.tally()["slack"].items() if kind != "update"} == {"post": 1, "chart": 1, "reply": 1}
    assert short.world.tally()["jira"] == {"create": 1, "comment": 1}
    assert [answer["alert_type"] for answer in short.answers(DAY)] == [AT_RISK]


def test_both_rules_on_one_day_are_one_answer_that_names_both(template, tmp_path):
    with staged(template, tmp_path, first=DAY, shortfall_warning=0.3, shortfall_critical=50.0, shortfall_pilot_days=0) as stage:
        stage.compute(DAY - timedelta(1), DAY)
        alert = stage.responder().gatekeeper.alert(DAY)
        assert {each["alert_type"]: each["alert_flag"] for each in (alert, *alert["others"])} == {AT_RISK: True, SHORTFALL: True}
        assert stage.answer(DAY)["status"] == "success" and stage.world.tally() == OPENED
        assert "; also " in stage.answers(DAY)[0]["reason"] and "were due back" in stage.answers(DAY)[0]["reason"]
        brief = (find_pack(stage.settings, DAY).folder / "briefing_WARNING.md").read_text()
        assert "Returning customers:" in brief and "That is WARNING by itself." in brief


def test_switched_off_the_rows_and_flags_stay_and_nobody_is_told(template, tmp_path):
    with staged(template, tmp_path, first=FLAGGED, **TRIED, shortfall_response=False) as stage:
        stage.compute(FLAGGED - timedelta(1), FLAGGED)
        rows = stage.lake.read("alert_logic", FLAGGED)
        assert list(rows.loc[rows["alert_type"] == SHORTFALL, "alert_flag"]) == [True]
        assert stage.answer(FLAGGED)["status"] == "skipped" and stage.world.tally() == {}


def test_the_first_rules_version_does_not_hang_on_a_quiet_second_row(short):
    short.compute(DAY - timedelta(1), DAY)
    alert = short.responder().gatekeeper.alert(DAY)
    assert [each["alert_flag"] for each in alert["others"]] == [False]
    other = {**alert, "others": [{**alert["others"][0], "score": 0.123}]}
    assert alert_version(other) == alert_version(alert)
    assert alert_version({**other, "others": [{**alert["others"][0], "alert_flag": True}]}) != alert_version(alert)


# -- the pilot period --------------------------------------------------------------------------------------------------


def test_in_its_pilot_period_a_shortfall_goes_to_the_test_targets(template, tmp_path):
    with staged(template, tmp_path, first=FLAGGED, **SHORT) as stage:
        stage.compute(FLAGGED - timedelta(1), FLAGGED)
        responder = stage.responder()
        responder.gate(FLAGGED)  # the first live morning begins it
        assert ledger.read_state(stage.engine, ARMED_SHORTFALL)["value"] == (FLAGGED + timedelta(1)).isoformat()
        answered = responder.on(FLAGGED).answer(FLAGGED)
        assert (answered["status"], answered["mode"], answered["alert_type"]) == ("success", TRIAL, SHORTFALL)
        sent = {(action["slot"], action["target"]) for action in stage.actions() if action["state"] == "sent"}
        assert {("slack", "C0TEST001"), ("ticket", "TEST"), ("sheets", "test-sheet")} <= sent
        assert {target for slot, target in sent if slot == "webhook"} == {f"{FLAGGED}/webhook"}, "no workflow is set off"
        assert [incident["mode"] for incident in incidents.find(stage.engine)] == [TRIAL]
        assert stage.responder().on(FLAGGED).gate(FLAGGED).verdict == "resume"


def test_the_pilot_period_begins_with_a_shortfall_too(template, tmp_path):
    with staged(template, tmp_path, first=FLAGGED, **SHORT) as stage:
        stage.compute(FLAGGED - timedelta(1), FLAGGED)
        stage.responder().on(FLAGGED).gate(FLAGGED)
        assert ledger.read_state(stage.engine, ARMED_SHORTFALL)["value"] == (FLAGGED + timedelta(1)).isoformat()


def test_a_rise_of_at_risk_meanwhile_is_live_and_opens_its_own_incident(template, tmp_path):
    with staged(template, tmp_path, first=FLAGGED, **SHORT) as stage:
        stage.compute(FLAGGED, DAY)
        for day in (FLAGGED, DAY):
            stage.clock.now = morning_after(day)
            stage.responder().gate(day)
            stage.responder().on(day).answer(day)
        assert {(incident["mode"], incident["alert_type"]) for incident in incidents.find(stage.engine)} == {
            (TRIAL, SHORTFALL), ("live", AT_RISK)}
        posts = [json.dumps(arrived["target"]) for arrived in stage.world.slack.arrived if arrived["kind"] == "post"]
        assert posts == ['"C0TEST001"', '"C0LIVE001"']


def test_after_the_pilot_period_it_is_live(template, tmp_path):
    with staged(template, tmp_path, first=FLAGGED, **SHORT) as stage:
        stage.clock.now = morning_after(FLAGGED - timedelta(20))
        stage.compute(FLAGGED - timedelta(21), FLAGGED)
        stage.responder().gate(FLAGGED - timedelta(21))
        stage.clock.now = morning_after(FLAGGED)
        responder = stage.responder().on(FLAGGED)
        assert responder.settings.mode == "live" and responder.gatekeeper.alert(FLAGGED)["alert_type"] == SHORTFALL


def test_live_without_test_targets_keeps_a_trial_at_home(template, tmp_path):
    bare = {"slack_test_channel": "", "ticket_test_project": "", "sheets_test_spreadsheet": ""}
    with staged(template, tmp_path, first=FLAGGED, **SHORT, **bare) as stage:
        stage.compute(FLAGGED - timedelta(1), FLAGGED)
        assert stage.responder().on(FLAGGED).answer(FLAGGED)["status"] == "success"
        assert stage.world.tally() == {} and {action["destination"] for action in stage.actions()} == {"local"}


def test_what_a_trial_left_open_is_finished_by_the_live_follow_up(template, tmp_path):
    with staged(template, tmp_path, first=FLAGGED, **SHORT) as stage:
        stage.compute(FLAGGED - timedelta(1), FLAGGED)
        stage.world.slack.orders = {"post": ["throttle"]}
        stage.responder(patience=0).on(FLAGGED).answer(FLAGGED)
        assert "post" not in stage.world.tally().get("slack", {})
        stage.clock.forward(hours=1)
        stage.responder().work()
        assert stage.world.tally()["slack"]["post"] == 1
