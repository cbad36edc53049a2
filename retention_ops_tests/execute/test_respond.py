"""The whole answer, story by story: what people get, what is on the lists, what stands in the log, whatever died on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import date, timedelta

import pytest
import sqlalchemy as sa

from retention_ops.errors import SettingsError
from retention_ops.execute import incidents, ledger
from retention_ops.execute.destinations.local import Local
from retention_ops.execute.destinations.seam import Outgoing, Rejected
from retention_ops.execute.door import HALTED
from retention_ops.log import runs
from retention_ops.log.database import approvals, pending_handovers
from retention_ops.package.pack import OUTBOX, find_pack
from retention_ops_tests.execute.stage import (
    CRITICAL,
    DAY,
    OPENED,
    RESOLVED_ON,
    RISE,
    WARNINGS,
    FakeClock,
    Killed,
    Stage,
    morning_after,
    staged,
    truncated,
)


def statuses(stage, day=None):
    return [row["status"] for row in stage.log(day)]


def events(stage, name):
    with stage.engine.connect() as connection:
        return connection.execute(sa.text("SELECT detail FROM ops_events WHERE event = :name"), {"name": name}).scalars().all()


def world(stage):
    """What exists, however often the one message was edited."""
    tally = stage.world.tally()
    assert stage.world.twice() == []
    return {**tally, "slack": {**tally["slack"], "update": min(1, tally["slack"].get("update", 0))}}


def incident(stage, number=1):
    return incidents.find(stage.engine, id=number)[0]


# -- the stories of one incident ---------------------------------------------------------------------------------------


def test_the_first_flagged_day_posts_opens_hands_over_and_calls(stage):
    row = stage.answer(DAY)
    assert stage.world.tally() == OPENED
    assert (row["status"], row["error_message"], row["slack_posted"]) == ("success", None, True)
    post, ticket, lists, hook = (memory.arrived[0] for memory in (
        stage.world.slack, stage.world.jira, stage.world.sheets, stage.world.webhook))
    assert (row["slack_message_ts"], row["ticket_id"]) == (post["id"], ticket["id"])
    assert row["export_p1_link"] == "https://sheets.invalid/P1-2024-02-19" and row["export_p3_link"] is None
    assert ticket["payload"]["priority"] == "High" and "Owner Ada" in ticket["payload"]["description"]
    assert list(lists["tables"]) == ["P1 2024-02-19", "P2 2024-02-19"], "WARNING hands over P1 and P2"
    assert row["total_exported"] == sum(len(rows) for _, rows in lists["tables"].values()) > 0
    assert hook["payload"]["ticket_url"].endswith(ticket["id"]) and hook["payload"]["message_url"].endswith(post["id"])
    assert hook["payload"]["export_urls"]["P2"] == "https://sheets.invalid/P2-2024-02-19"
    chart, update = stage.world.slack.arrived[1:]
    assert chart["parent"] == post["id"] and chart["files"] == ["at_risk_trend.png"]
    assert update["parent"] == post["id"] and ticket["id"] in json.dumps(update["payload"])
    with stage.engine.connect() as connection:
        assert not connection.execute(sa.select(pending_handovers)).all(), "who was handed over stands in exposures now"


def test_nobody_is_named_where_customers_must_not_be_named(stage):
    """An opaque id is all that leaves; addresses and columns of single customers stay on the lists."""
    stage.answer(DAY)
    told = json.dumps([stage.world.slack.arrived, stage.world.jira.arrived, stage.world.webhook.arrived])
    assert "@" not in told.replace("@at_risk", "") and "priority_score" not in told
    assert all(not entry["tables"] for entry in stage.world.slack.arrived + stage.world.jira.arrived + stage.world.webhook.arrived)


def test_the_second_flagged_day_answers_in_the_thread(stage):
    stage.answer(DAY)
    row = stage.answer(WARNINGS[1])
    assert stage.world.tally() == {
        "slack": {"post": 1, "chart": 1, "update": 2, "reply": 1}, "jira": {"create": 1, "comment": 1}, "sheets": {"publish": 2},
        "webhook": {"post": 2}}
    reply, comment, linked = stage.world.slack.arrived[-2], stage.world.jira.arrived[-1], stage.world.slack.arrived[-1]
    assert linked["parent"] == reply["id"] and f"P1-{WARNINGS[1]}" in json.dumps(linked["payload"]), "the new lists are linked in the reply"
    assert reply["parent"] == stage.world.slack.arrived[0]["id"] and comment["parent"] == stage.world.jira.arrived[0]["id"]
    assert "2024-02-20: still WARNING" in reply["payload"]["text"] and "the baseline of this incident is 38.7 %" in reply["payload"]["text"]
    assert row["status"] == "success" and incident(stage)["last_flagged_on"] == WARNINGS[1]


def test_a_rise_raises_the_ticket_and_adds_the_win_back_list(template, tmp_path):
    with staged(template, tmp_path, first=RISE) as stage:
        stage.answer(RISE)
        incidents.acknowledge(stage.engine, 1, "Ada", stage.clock())
        before = incident(stage)["ack_by"]
        stage.answer(CRITICAL)
        assert [entry["payload"].get("priority") for entry in stage.world.jira.arrived if entry["kind"] == "priority"] == ["Highest"]
        assert "risen to CRITICAL" in stage.world.slack.arrived[-1]["payload"]["text"]
        assert set(stage.world.sheets.arrived[-1]["tables"]) == {f"{tier} {CRITICAL}" for tier in ("P1", "P2", "P3")}
        now = incident(stage)
        assert now["severity"] == "CRITICAL" and now["acked_at"] is None and now["ack_by"] != before, "somebody must say so again"


def test_corrected_orders_retract_and_say_so(stage):
    stage.answer(DAY)
    stage.orders_found(DAY, stage.quiet_customers(DAY))
    row = stage.answer(DAY)
    assert row["status"] == "success" and incident(stage)["state"] == "retracted"
    assert "no alert any more" in stage.world.slack.arrived[-1]["payload"]["text"]
    assert stage.world.jira.kinds() == {"create": 1, "comment": 1, "resolve": 1}
    assert stage.world.sheets.kinds() == {"publish": 1}, "no list is handed over for it again"
    assert stage.world.webhook.arrived[-1]["payload"]["event"] == "retract"


def test_one_of_two_dates_retracted_leaves_the_incident_open(stage):
    stage.answer(DAY)
    stage.answer(WARNINGS[1])
    stage.orders_found(WARNINGS[1], stage.quiet_customers(WARNINGS[1]))
    stage.answer(WARNINGS[1])
    assert (incident(stage)["state"], incident(stage)["last_flagged_on"]) == ("open", DAY)
    assert "resolve" not in stage.world.jira.kinds()


def test_three_calm_days_resolve_the_incident(stage):
    for day in WARNINGS:
        stage.answer(day)
    stage.compute(WARNINGS[-1] + timedelta(1), RESOLVED_ON)
    stage.answer(RESOLVED_ON)
    assert incident(stage)["state"] == "resolved"
    assert "Resolved: three days in a row" in stage.world.slack.arrived[-1]["payload"]["text"]
    assert stage.world.jira.kinds()["resolve"] == 1 and len(incidents.find(stage.engine)) == 1
    assert stage.verdict(RESOLVED_ON) == "resume"


def test_a_result_that_flips_back_and_forth_is_told_each_time(stage):
    day = WARNINGS[1]
    stage.answer(day)
    (customer,) = stage.quiet_customers(day)[:1]
    stage.orders_found(day, [customer])
    stage.answer(day)
    stage.orders_found(day, [customer], amount="0.00")
    stage.answer(day)
    assert stage.verdict(day) == "resume"
    told = [(answer["seq"], answer["verdict"]) for answer in stage.answers(day)]
    assert told == [(1, "open"), (2, "update"), (3, "update")]
    assert stage.answers(day)[0]["version"] == stage.answers(day)[2]["version"]
    assert stage.world.slack.kinds()["reply"] == 2 and stage.world.twice() == []


def test_a_snoozed_incident_records_and_sends_nothing(stage):
    stage.answer(DAY)
    incidents.snooze(stage.engine, 1, stage.clock() + timedelta(days=3), "Ada", "known campaign", stage.clock())
    before = stage.world.tally()
    row = stage.answer(WARNINGS[1])
    assert row["status"] == "skipped" and "snoozed until" in row["error_message"]
    assert stage.world.tally() == before and incident(stage)["last_flagged_on"] == WARNINGS[1]


# -- killed and run again ----------------------------------------------------------------------------------------------

STEPS = ["claimed", "before_send", "after_send", "recorded"]


@pytest.mark.parametrize(("step", "slot"), [
    *((step, slot) for step in STEPS for slot in ("slack", "sheets")), ("before_send", "ticket"), ("after_send", "ticket"),
    ("claimed", "webhook"), ("after_send", "webhook"),
])
def test_killed_anywhere_and_run_again_everything_is_there_once(stage, step, slot):
    stage.world.webhook.lookups = {**stage.world.webhook.lookups, "post": stage.world.sheets.lookups["publish"]}

    def kill(at, row):
        if (at, row["slot"]) == (step, slot):
            raise Killed

    with pytest.raises(Killed):
        stage.answer(DAY, checkpoint=kill)
    assert stage.log() == []
    for _ in range(3):
        stage.clock.forward(minutes=7)
        stage.responder().answer(DAY)
    assert world(stage) == OPENED
    assert all(row["state"] == "sent" for row in stage.actions())
    assert statuses(stage)[-1] == "skipped" and len(stage.answers()) == 1
    assert len({customer for _, customer, _, _ in stage.exposed()}) == 17


@pytest.mark.parametrize("kind", ["post", "chart", "create", "publish"])
def test_a_lost_answer_of_any_call_is_found_again(stage, kind):
    memory = next(memory for memory in stage.world.known.values() if kind in memory.lookups)
    memory.orders[kind] = ["lost"]
    row = stage.answer(DAY)
    # a list can be looked for at once; the others need a while to be visible
    assert row["status"] == ("success" if kind == "publish" else "failed")
    for _ in range(4):
        stage.clock.forward(minutes=6)
        stage.responder().work()
    assert world(stage) == OPENED and {row["state"] for row in stage.actions()} == {"sent"}


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite", pytest.param("postgres", marks=pytest.mark.slow)], indirect=True)
def test_sixteen_processes_answer_one_incident_once(template, tmp_path, database_url, request):
    with staged(template, tmp_path, ops_database_url=database_url) as stage:
        stage.compute(DAY)
        what = [str(stage.home), database_url, str(DAY), stage.clock().isoformat()]
        done = subprocess.run(
            [sys.executable, "-m", "retention_ops_tests.execute.racers", *what],
            cwd=str(request.config.rootpath), capture_output=True, text=True, check=False,
        )
        assert done.returncode == 0, done.stderr
        assert len(stage.answers()) == len(incidents.find(stage.engine)) == 1 and len(stage.log()) == 16
        stage.clock.forward(minutes=6)
        stage.responder().work()  # what a racer left to another one that had already looked
        assert world(stage) == OPENED
        assert runs.first_broken_row(stage.engine) is None


# -- the log says what happened, also when nothing worked --------------------------------------------------------------


def test_a_date_nobody_computed_is_logged_as_failed(stage):
    row = stage.responder().answer(DAY)
    assert row["status"] == "failed" and "has no alert_logic row" in row["error_message"] and stage.actions() == []


def test_a_pack_that_cannot_be_built_is_logged_and_nothing_is_planned(stage):
    stage.compute(WARNINGS[1])
    stage.clock.now = morning_after(WARNINGS[1])
    stage.settings.packs.rename(stage.home / "elsewhere")
    stage.settings.packs.write_text("a file where a folder should be")
    row = stage.responder().answer(WARNINGS[1])
    assert row["status"] == "failed" and row["error_message"]
    assert stage.actions() == stage.answers() == [] and stage.world.tally() == {}
    stage.settings.packs.unlink()
    assert stage.responder().answer(WARNINGS[1])["status"] == "success", "a failed answer is no answer"


def test_a_follow_up_of_a_date_whose_pack_is_gone_lies_in_the_homes_outbox(stage):
    local = Local(stage.settings, "live")
    stage.answer(DAY)
    for name, gone in (("ticket", False), ("ticket_comment", True)):
        if gone:
            shutil.rmtree(stage.settings.packs)
        planned = Outgoing(key=name, kind="comment", target=f"{DAY}/{name}", payload={"text": "over"})
        assert local.send(planned).external_id == f"local:{DAY}/{name}"
        pack = find_pack(stage.settings, DAY)
        lies = (stage.settings.outbox / str(DAY) if gone else pack.folder / OUTBOX) / f"{name}.json"
        assert json.loads(lies.read_text())["content"] == {"text": "over"} and lies.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Rejected, match="has no Action Pack"):
        local.send(Outgoing(key="x", kind="export", target=f"{DAY}/x", payload={"worksheets": [{"file": "a.csv", "rows": 0}]},
                            files={"a.csv": b""}))


def test_missing_settings_of_a_destination_are_logged_with_the_reason(stage):
    stage.world.broken["jira"] = SettingsError("RETENTION_OPS_TICKET_TOKEN is missing")
    row = stage.answer(DAY)
    assert row["status"] == "failed" and "RETENTION_OPS_TICKET_TOKEN is missing" in row["error_message"]
    assert row["slack_posted"] and stage.world.sheets.kinds() == {"publish": 1}, "the others went out"


@pytest.mark.parametrize(("name", "kind"), [("slack", "post"), ("jira", "create"), ("sheets", "publish"), ("webhook", "post")])
def test_a_refusal_is_logged_and_does_not_stop_the_others(stage, name, kind):
    stage.world.known[name].orders[kind] = ["reject"]
    row = stage.answer(DAY)
    assert row["status"] == "failed" and f"failed ({name} refuses)" in row["error_message"]
    expected = {other: kinds for other, kinds in OPENED.items() if other != name}
    assert {other: kinds for other, kinds in stage.world.tally().items() if other != "slack"} == {
        other: kinds for other, kinds in expected.items() if other != "slack"}
    assert name == "sheets" or len(stage.exposed()) == 17


def test_a_changed_brief_on_disk_is_built_again(stage):
    (find_pack(stage.settings, DAY).folder / "briefing.html").write_text("someone else's brief")
    assert stage.answer(DAY)["status"] == "success"


def test_a_failed_webhook_is_told_by_mail(template, tmp_path):
    with staged(template, tmp_path, smtp_host="mail.invalid", mail_from="a@shop.invalid", mail_to="b@shop.invalid") as stage:
        stage.world.webhook.orders["post"] = ["reject"]
        row = stage.answer(DAY)
        assert row["status"] == "success" and "webhook post failed (webhook refuses)" in row["error_message"]
        (mail,) = stage.world.mail.arrived
        assert mail["target"] == "b@shop.invalid" and "WARNING" in mail["payload"]["subject"]
        assert "cid:at_risk_trend.png" in mail["payload"]["html"] and mail["files"] == ["at_risk_trend.png"]
        stage.ingest("suppressions", "customer_id\nc1\n")  # another list: the pack is built anew
        find_pack(stage.settings, DAY).folder.unlink()
        stage.responder().planner.pack(DAY, stage.responder().gatekeeper.alert(DAY))
        again = stage.responder().answer(DAY)
        assert again["status"] == "skipped" and len(stage.world.mail.arrived) == 1


def test_a_halt_is_in_the_log_and_all_of_it_leaves_later_with_links(stage):
    ledger.set_state(stage.engine, HALTED, "yes", "Ada", "wrong numbers", stage.clock())
    row = stage.answer(DAY)
    assert row["status"] == "failed" and "halted by Ada: wrong numbers" in row["error_message"] and stage.world.tally() == {}
    ledger.set_state(stage.engine, HALTED, "no", "Ada", "fixed", stage.clock())
    stage.clock.forward(minutes=5)
    (followed,) = stage.responder().work()
    assert followed["status"] == "success" and stage.world.tally() == OPENED
    assert "ticket_url" in stage.world.webhook.arrived[0]["payload"]


def test_switching_off_stops_what_is_under_way(template, tmp_path):
    modes = iter(["live", "live", "live"])  # asked before the content is frozen, and before each send
    with staged(template, tmp_path) as stage:
        stage.mode_now = lambda: next(modes, "off")
        row = stage.answer(DAY)
        assert stage.world.tally() == {"slack": {"post": 1, "chart": 1}}
        assert row["status"] == "failed" and "the mode is off now" in row["error_message"]


# -- downtime and history ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["newest first", "oldest first"])
def test_after_downtime_the_newest_day_is_answered_and_names_the_others(template, tmp_path, order):
    days = [RISE + timedelta(number) for number in range(5)]
    with staged(template, tmp_path, first=RISE) as stage:
        stage.responder().gatekeeper.horizon()
        stage.clock.now = morning_after(days[-1])
        stage.compute(days[0], days[-1])
        for day in reversed(days) if order == "newest first" else days:
            stage.responder().answer(day)
        assert stage.world.tally() == OPENED
        message = json.dumps(stage.world.slack.arrived[0]["payload"])
        assert all(str(day) in message for day in days[:-1]) and "which nobody was told about" in message
        for day in days[:-1]:
            assert [(answer["verdict"], answer["incident_id"]) for answer in stage.answers(day)] == [("covered", 1)]
            assert set(statuses(stage, day)) == {"skipped"}
        stage.answer(days[-1] + timedelta(1))
        assert "Also stands for" not in stage.world.slack.arrived[-1]["payload"]["text"], "they are named once"


def test_days_an_answer_stands_for_are_logged_also_when_it_was_killed(stage):
    stage.responder().gatekeeper.horizon()
    stage.clock.now = morning_after(WARNINGS[1])
    stage.compute(*WARNINGS[:2])
    with pytest.raises(Killed):
        stage.responder(checkpoint=_kill_at("after_send")).answer(WARNINGS[1])
    stage.clock.forward(minutes=6)
    for _ in range(2):
        stage.responder().answer(WARNINGS[1])
    assert statuses(stage, DAY) == ["skipped"]


def _kill_at(step):
    def kill(at, row):
        if at == step:
            raise Killed

    return kill


def test_a_year_of_history_sends_nothing_and_logs_a_row_each(stage):
    first, last = date(2024, 1, 1), date(2024, 5, 27)
    stage.clock.now = morning_after(date(2025, 2, 1))
    stage.compute(first, last)
    rows = stage.lake.read_range("alert_logic", first, last)
    flagged = sorted(rows.loc[rows["alert_flag"], "alert_date"].dt.date)
    responder = stage.responder()
    logged = [responder.answer(day) for day in flagged]
    assert len(flagged) == 11 and stage.world.tally() == {} and stage.actions() == [] and incidents.find(stage.engine) == []
    assert all(row["status"] == "skipped" and row["error_message"].startswith("history: older than 7 days") for row in logged)


# -- modes -------------------------------------------------------------------------------------------------------------


def test_shadow_rehearses_everything_and_touches_nobody(tmp_path):
    truncated(tmp_path / "home", DAY)
    stage = Stage(tmp_path / "home", FakeClock(morning_after(DAY)), {"mode": "shadow"})
    row = stage.answer(DAY)
    assert row["status"] == "success" and (row["slack_posted"], row["ticket_id"]) == (False, None)
    assert stage.world.tally() == {} and stage.exposed() == []
    outbox = {path.stem: json.loads(path.read_text()) for path in (find_pack(stage.settings, DAY).folder / OUTBOX).iterdir()}
    assert {"slack", "ticket", "sheets", "webhook"} <= set(outbox)
    assert all(message["sent"] is False and message["mode"] == "shadow" for message in outbox.values())
    assert outbox["ticket"]["in_live"] == "jira" and outbox["ticket"]["content"]["priority"] == "High"
    live = stage.with_settings(mode="live")
    assert live.answer(DAY)["status"] == "success" and live.world.tally() == OPENED, "the rehearsal was no answer"
    assert [(row["mode"], row["id"]) for row in incidents.find(live.engine)] == [("live", 2), ("shadow", 1)]
    live.close()
    stage.close()


def test_a_pilot_keeps_to_the_test_channel(template, tmp_path):
    with staged(template, tmp_path, mode="pilot") as stage:
        stage.answer(DAY)
        assert {entry["target"] for entry in stage.world.slack.arrived} == {"C0TEST001"}
        assert stage.world.jira.arrived[0]["target"] == "TEST" and stage.world.sheets.arrived[0]["target"] == "test-sheet"
        assert stage.exposed() and {arm for *_, arm in stage.exposed()} == {"treated"}, "nobody is held out of a pilot"


# -- lists -------------------------------------------------------------------------------------------------------------


def test_the_holdout_is_recorded_and_never_on_a_list(template, tmp_path):
    with staged(template, tmp_path, holdout_pct=50) as stage:
        stage.answer(DAY)
        arms = {arm: {customer for _, customer, _, found in stage.exposed() if found == arm} for arm in ("treated", "holdout")}
        assert arms["holdout"] and arms["treated"] == set().union(*stage.handed_over().values())
        stage.answer(WARNINGS[1])
        assert not arms["holdout"] & set().union(*stage.handed_over().values())


def test_nobody_is_handed_over_twice_within_the_cooldown(template, tmp_path):
    with staged(template, tmp_path) as stage:
        for day in WARNINGS[:3]:
            stage.answer(day)
        lists = [set().union(*({row[table[0].index("customer_id")] for row in table[1]} for table in entry["tables"].values()))
                 for entry in stage.world.sheets.arrived]
        assert lists[0] and not (lists[0] & lists[1] or lists[0] & lists[2] or lists[1] & lists[2])


def test_exposures_are_recorded_also_when_the_process_died_after_the_hand_over(stage):
    stage.world.sheets.orders["publish"] = ["die after"]
    with pytest.raises(Killed):
        stage.answer(DAY)
    assert stage.exposed() == []
    stage.clock.forward(minutes=6)
    stage.responder().work()
    assert {arm for *_, arm in stage.exposed()} == {"treated", "holdout"} and stage.world.sheets.kinds() == {"publish": 1}
    assert {customer for _, customer, _, arm in stage.exposed() if arm == "treated"} == set().union(*stage.handed_over().values())


def test_who_said_no_after_planning_is_not_on_the_list_that_leaves(stage):
    def says_no(step, row):
        if step == "claimed" and row["slot"] == "ticket":
            stage.ingest("suppressions", "customer_id\nc1\n")

    row = stage.answer(DAY, checkpoint=says_no)
    assert "c1" not in set().union(*stage.handed_over().values()) and stage.world.sheets.kinds() == {"publish": 1}
    assert [state for slot, _, state in stage.states(slot="sheets")] == ["cancelled", "sent"]
    assert row["status"] == "success" and row["total_exported"] == 12


def test_who_says_no_at_the_last_moment_is_not_on_it_either(stage):
    """After the lists were read again for planning, before they are read for sending."""
    def says_no(step, row):
        if step == "claimed" and row["slot"] == "sheets" and row["attempts"] and not stage.lake.suppressions():
            stage.ingest("suppressions", "customer_id\nc1\n")

    stage.answer(DAY, checkpoint=says_no)
    assert "c1" not in set().union(*stage.handed_over().values())
    assert [state for slot, _, state in stage.states(slot="sheets")] == ["cancelled", "sent"]


@pytest.fixture
def asking(template, tmp_path):
    """A CRITICAL list that waits for a person."""
    with staged(template, tmp_path, first=CRITICAL, approval_above=1) as stage:
        stage.row = stage.answer(CRITICAL)
        yield stage


def pending(stage):
    (waiting,) = ledger.pending_approvals(stage.engine)
    return waiting


def test_a_large_critical_list_waits_for_a_person_and_the_rest_goes_out(asking):
    assert asking.row["status"] == "success" and "sheets publish awaiting approval" in asking.row["error_message"]
    assert set(asking.world.tally()) == {"slack", "jira", "webhook"} and asking.exposed() == []
    waiting = pending(asking)
    ledger.decide_approval(asking.engine, waiting["action_key"], True, waiting["audience_sha256"][:12], "Ada", "", asking.clock())
    asking.responder().work()
    assert asking.world.sheets.kinds() == {"publish": 1} and asking.exposed()


def test_a_refused_list_stays(asking):
    waiting = pending(asking)
    ledger.decide_approval(asking.engine, waiting["action_key"], False, waiting["audience_sha256"], "Ada", "too many", asking.clock())
    asking.responder().work()
    asking.responder().answer(CRITICAL)
    assert asking.world.sheets.kinds() == {} and asking.states(slot="sheets") == [("sheets", "publish", "cancelled")]


@pytest.mark.parametrize("approved", [False, True])
def test_an_approval_is_void_when_the_list_changed(asking, approved):
    waiting = pending(asking)
    if approved:
        ledger.decide_approval(asking.engine, waiting["action_key"], True, waiting["audience_sha256"], "Ada", "", asking.clock())
    pack = find_pack(asking.settings, CRITICAL)
    listed = (pack.folder / pack.manifest["audiences"]["P2"]["file"]).read_text().splitlines()[1]
    asking.ingest("suppressions", "customer_id\n" + listed.split(",")[1].strip('"') + "\n")
    asking.responder().answer(CRITICAL)
    again = pending(asking)
    assert again["audience_sha256"] != waiting["audience_sha256"] and again["customers"] == waiting["customers"] - 1
    assert asking.world.sheets.kinds() == {}
    with asking.engine.connect() as connection:
        states = dict(connection.execute(sa.select(approvals.c.action_key, approvals.c.state)).tuples().all())
    assert states == {waiting["action_key"]: "void", again["action_key"]: "pending"}


def test_a_list_that_waits_is_withdrawn_with_its_alert(asking):
    waiting = pending(asking)
    asking.orders_found(CRITICAL, asking.quiet_customers(CRITICAL))
    asking.answer(CRITICAL)
    assert ledger.pending_approvals(asking.engine) == []
    assert asking.states(slot="sheets") == [("sheets", "publish", "cancelled")] and waiting


def test_an_update_of_the_same_date_replaces_the_list_that_waits(asking):
    first = pending(asking)
    asking.orders_found(CRITICAL, asking.quiet_customers(CRITICAL)[:1])
    asking.answer(CRITICAL)
    second = pending(asking)
    assert second["action_key"] != first["action_key"] and [state for *_, state in asking.states(slot="sheets")] == [
        "cancelled", "awaiting_approval"]


# -- what time brings --------------------------------------------------------------------------------------------------


def test_a_missed_acknowledgement_is_told_once_to_the_backup(stage):
    stage.answer(DAY)
    stage.clock.now = incident(stage)["ack_by"] + timedelta(minutes=1)
    for _ in range(3):
        stage.responder().work()
        stage.clock.forward(hours=3)
    replies = [entry["payload"]["text"] for entry in stage.world.slack.arrived if entry["kind"] == "reply"]
    assert len(replies) == 1 and replies[0].startswith("Grace: Nobody has acknowledged incident 1")
    assert stage.world.jira.kinds() == {"create": 1, "comment": 1} and len(events(stage, "not acknowledged in time")) == 1


def test_an_acknowledged_incident_wakes_nobody(stage):
    stage.answer(DAY)
    incidents.acknowledge(stage.engine, 1, "Ada", stage.clock())
    stage.clock.forward(days=5)
    assert stage.responder().work() == [] and "reply" not in stage.world.slack.kinds()


def test_a_rehearsed_incident_wakes_nobody(tmp_path):
    truncated(tmp_path / "home", DAY)
    stage = Stage(tmp_path / "home", FakeClock(morning_after(DAY)), {"mode": "shadow"})
    stage.answer(DAY)
    stage.clock.forward(days=5)
    assert stage.responder().work() == [] and incident(stage)["escalated_at"] is None
    stage.close()


def test_following_up_finishes_what_waited_for_the_message(stage):
    stage.world.slack.orders["post"], stage.world.slack.retry_after = ["throttle"], 120
    assert stage.answer(DAY)["status"] == "failed"
    assert "slack" not in stage.world.tally()
    stage.clock.forward(minutes=3)
    (row,) = stage.responder().work()
    assert row["status"] == "success" and stage.world.tally() == OPENED


def test_more_incidents_in_a_day_than_allowed_wait_for_a_person(template, tmp_path):
    with staged(template, tmp_path, max_incidents_per_day=1) as stage:
        stage.answer(DAY)
        incidents.close(stage.engine, 1, "false", "Ada", "", stage.clock())
        stage.clock.now = morning_after(DAY) + timedelta(hours=17)
        stage.compute(WARNINGS[1])
        row = stage.responder().answer(WARNINGS[1])
        assert row["status"] == "failed" and "1 incidents opened in 24 hours (max_incidents_per_day 1)" in row["error_message"]
        assert stage.world.slack.kinds()["post"] == 1
