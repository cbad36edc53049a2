"""What an attack on the response found: each story was shown to go wrong once."""

from __future__ import annotations

import csv
import json
import re
from datetime import timedelta

import sqlalchemy as sa

from retention_ops.execute import incidents, ledger
from retention_ops.execute.door import HALTED
from retention_ops.log import exposures
from retention_ops.log.database import answers
from retention_ops.package.audiences import in_holdout
from retention_ops.package.pack import find_pack, renew_pack
from retention_ops_tests.execute.stage import CRITICAL, DAY, WARNINGS, staged


def lists(stage, day=None):
    return [row for row in ledger.find(stage.engine, slot="sheets") if day in (None, row["alert_date"])]


def handed_over(stage):
    """The customers of every list that arrived, list by list."""
    return [{row[1] for _, rows in entry["tables"].values() for row in rows} for entry in stage.world.sheets.arrived]


def halt(stage, value="yes"):
    ledger.set_state(stage.engine, HALTED, value, "Ada", "wait", stage.clock())


def test_a_look_up_by_hand_is_no_approval(template, tmp_path):
    with staged(template, tmp_path, first=CRITICAL, approval_above=1, max_messages_per_day=1) as stage:
        stage.answer(CRITICAL)
        (waiting,) = [row for row in lists(stage)]
        if waiting["state"] == "awaiting_approval":  # the guardrail counts per destination
            ledger.release(stage.engine, waiting["key"], "nobody", "planned", "", stage.clock())
        with stage.engine.begin() as connection:
            connection.execute(ledger.actions.update().where(ledger.actions.c.key == waiting["key"]).values(state="needs_human"))
        assert ledger.absent(stage.engine, waiting["key"], "Ada", "looked", stage.clock())["state"] == "awaiting_approval"
        stage.responder().work()
        assert not stage.world.sheets.arrived


def test_files_built_in_another_mode_are_not_what_was_approved(template, tmp_path):
    """`local` hands the pack's files over, and a run in mode off writes them without a holdout."""
    with staged(template, tmp_path, first=CRITICAL, lists_to="local", approval_above=1, holdout_pct=50) as stage:
        stage.answer(CRITICAL)
        (waiting,) = lists(stage)
        off = stage.with_settings(mode="off")
        renew_pack(off.lake, CRITICAL, {}, run_id="off")
        ledger.decide_approval(stage.engine, waiting["key"], True, waiting["payload"]["audience_sha256"], "Ada", "", stage.clock())
        stage.responder().work()
        pack = find_pack(stage.settings, CRITICAL)
        on_file = {
            row["customer_id"] for entry in pack.manifest["audiences"].values()
            for row in csv.DictReader((pack.folder / entry["file"]).read_text(encoding="utf-8").splitlines())
        }
        assert lists(stage)[-1]["state"] == "sent" and on_file
        assert not any(in_holdout(customer, 50, stage.settings.holdout_salt) for customer in on_file)


def test_a_retraction_takes_back_what_has_not_left(stage):
    stage.world.sheets.orders["publish"] = ["throttle"]
    stage.world.sheets.retry_after = 3600
    stage.answer(DAY)
    assert lists(stage)[-1]["state"] == "planned"
    stage.orders_found(DAY, stage.quiet_customers(DAY))
    row = stage.answer(DAY)
    stage.clock.forward(hours=2)
    stage.responder().work()
    assert not stage.world.sheets.arrived and {row["state"] for row in lists(stage)} == {"cancelled"}
    assert row["status"] == "success", row["error_message"]


def test_one_action_that_cannot_be_moved_does_not_hold_up_the_others(stage):
    halt(stage)
    stage.answer(DAY)
    halt(stage, "no")
    stage.clock.forward(minutes=2)
    stage.lake.path("alert_logic", DAY).write_bytes(b"not parquet")
    rows = stage.responder().work()
    assert [row["status"] for row in rows] == ["failed"] and rows[0]["error_message"]


def test_lists_that_leave_in_another_order_share_nobody(stage):
    stage.world.sheets.orders["publish"] = ["reject"]
    stage.answer(DAY)
    stage.answer(WARNINGS[1])
    (held,) = [row for row in lists(stage, DAY) if row["state"] == "failed"]
    ledger.by_hand(stage.engine, held["key"], "retry", "Ada", "the sheet is shared now", stage.clock())
    stage.responder().work()
    first, second = handed_over(stage)
    assert first and not first & second


def test_what_was_judged_no_alarm_does_not_go_out_afterwards(stage):
    halt(stage)
    stage.answer(DAY)
    incidents.close(stage.engine, 1, "data", "Ada", "orders were missing", stage.clock())
    halt(stage, "no")
    stage.clock.forward(minutes=5)
    (row, *_) = stage.responder().work()
    assert stage.world.tally() == {}
    assert row["status"] == "failed" and "judged data" in row["error_message"], "the log says what did not go out"


def test_what_waited_until_it_was_history_does_not_go_out(stage):
    halt(stage)
    stage.answer(DAY)
    halt(stage, "no")
    stage.clock.forward(days=30)
    stage.responder().work()
    assert stage.world.tally() == {}


def test_recomputing_the_past_retracts_nothing(stage):
    stage.answer(DAY)
    before = stage.world.tally()
    stage.clock.forward(days=300)
    stage.orders_found(DAY, stage.quiet_customers(DAY))
    stage.compute(DAY)
    row = stage.responder().answer(DAY)
    assert row["status"] == "skipped" and "what was answered then stands" in row["error_message"]
    assert stage.world.tally() == before


def test_who_opts_out_before_the_message_leaves_is_not_named(stage):
    halt(stage)
    stage.answer(DAY)
    planned = json.dumps(ledger.find(stage.engine, slot="ticket")[0]["payload"])
    pack = find_pack(stage.settings, DAY)
    listed = [
        row["customer_id"] for entry in pack.manifest["audiences"].values()
        for row in csv.DictReader((pack.folder / entry["file"]).read_text(encoding="utf-8").splitlines())
    ]
    named = [customer for customer in listed if re.search(rf"\b{customer}\b", planned)]
    assert named, "the brief names its top customers"
    stage.ingest("suppressions", "customer_id\n" + "\n".join(named) + "\n")
    halt(stage, "no")
    stage.clock.forward(minutes=5)
    stage.responder().work()
    told = json.dumps([stage.world.slack.arrived, stage.world.jira.arrived, stage.world.webhook.arrived])
    assert stage.world.slack.arrived and not [customer for customer in named if re.search(rf"\b{customer}\b", told)]


def test_a_pilot_uses_nobody_up_for_live(template, tmp_path):
    with staged(template, tmp_path, mode="pilot") as pilot:
        pilot.answer(DAY)
        assert pilot.world.sheets.arrived
        assert exposures.last_handed_over(pilot.engine, DAY + timedelta(days=1)) == {}


def test_an_escalation_without_a_message_to_reply_to_is_a_message_of_its_own(stage):
    stage.world.slack.orders["post"] = ["reject"]
    stage.world.jira.orders["create"] = ["reject"]
    stage.answer(DAY)
    stage.clock.forward(days=7)
    stage.responder().work()
    assert "Nobody has acknowledged incident 1" in stage.world.slack.arrived[-1]["payload"]["text"]


def test_a_run_that_finishes_anothers_work_says_so(stage):
    halt(stage)
    stage.answer(DAY)
    halt(stage, "no")
    stage.clock.forward(minutes=5)
    row = stage.responder().answer(DAY)
    assert (row["status"], row["slack_posted"]) == ("success", True) and row["error_message"].startswith("finished:")


def test_days_an_answer_stands_for_are_named_with_their_severity(template, tmp_path):
    with staged(template, tmp_path, first=CRITICAL) as stage:
        stage.compute(CRITICAL)
        stage.verdict(CRITICAL)  # arms the response; then everything is down for a day
        stage.answer(CRITICAL + timedelta(days=1))
        text = json.dumps(stage.world.slack.arrived[0]["payload"])
        with stage.engine.connect() as connection:
            covered = connection.execute(sa.select(answers.c.alert_date).filter_by(verdict="covered")).scalars().all()
        assert CRITICAL in covered and f"{CRITICAL} (CRITICAL)" in text
