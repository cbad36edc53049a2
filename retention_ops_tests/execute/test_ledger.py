"""The ledger on SQLite and on Postgres: one claim at a time, every change told, nothing planned by halves."""

from __future__ import annotations

import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from retention_ops.errors import LedgerError
from retention_ops.execute import incidents, ledger
from retention_ops.execute.destinations.seam import Receipt
from retention_ops.log import database, runs
from retention_ops.log.database import MIGRATIONS, metadata, ops_database, reservations
from retention_ops_tests.conftest import settings_for
from retention_ops_tests.execute.stage import DAY, intent
from retention_ops_tests.log.test_runs_log import row as log_row

NOW = datetime(2024, 2, 20, 6, 30, tzinfo=UTC)
LIMITS = {"*": 40}


def plan(engine, *intents, now=NOW, limits=LIMITS):
    with engine.begin() as connection:
        return ledger.plan(connection, intents, now, "run-1", limits)


def planned(engine, **changes) -> str:
    return plan(engine, intent(**changes))[0]


def row(engine, key):
    return ledger.find(engine, key=key)[0]


def later(**span):
    return NOW + timedelta(**span)


def events(engine, key=None):
    with engine.connect() as connection:
        found = connection.execute(sa.text("SELECT event, actor, detail, action_key FROM ops_events ORDER BY id")).all()
    return [(event, actor, detail) for event, actor, detail, about in found if key in (None, about)]


def count(engine, table):
    with engine.connect() as connection:
        return connection.execute(sa.text(f"SELECT COUNT(*) FROM {table}")).scalar_one()


# -- planning ----------------------------------------------------------------------------------------------------------


def test_planning_twice_writes_one_action(engine):
    assert planned(engine) == planned(engine)
    assert count(engine, "actions") == count(engine, "reservations") == 1


def test_content_never_changes_under_a_key(engine):
    key = planned(engine)
    with pytest.raises(LedgerError, match="planned already with another content"):
        planned(engine, payload={"text": "something else"})
    assert row(engine, key)["payload"] == {"text": "hello"}


@pytest.mark.parametrize("changes", [{"identity": "another"}, {"slot": "ticket"}, {"kind": "reply"}, {"part": "2"}])
def test_the_key_follows_from_what_is_said_where(changes):
    assert intent(**changes).key != intent().key


def test_the_key_does_not_follow_from_run_answer_or_wording():
    assert intent(payload={"text": "x"}, answer_id=3, incident_id=4, target="elsewhere").key == intent().key


def test_the_41st_message_in_24_hours_waits_for_a_human(engine):
    plan(engine, *(intent(part=str(number)) for number in range(40)))
    key = planned(engine, part="40")
    held = row(engine, key)
    assert held["state"] == ledger.NEEDS_HUMAN and "40 actions for slack in 24 hours (max_messages_per_day 40)" in held["last_error"]
    assert ledger.claim(engine, key, "w", NOW, 60).task == "nothing"
    assert row(engine, planned(engine, destination="jira", slot="ticket", kind="create"))["state"] == ledger.PLANNED
    (next_day,) = plan(engine, intent(part="41"), now=later(hours=24, seconds=1))
    assert row(engine, next_day)["state"] == ledger.PLANNED, "the window has passed"


def test_another_mode_has_a_limit_of_its_own(engine):
    plan(engine, *(intent(part=str(number)) for number in range(40)))
    assert row(engine, planned(engine, mode="pilot", part="40"))["state"] == ledger.PLANNED


def test_two_planners_at_once_do_not_share_the_last_free_place(engine):
    plan(engine, *(intent(part=str(number)) for number in range(39)))
    start = threading.Barrier(8)

    def one(number):
        start.wait()
        plan(engine, intent(part=f"race{number}"))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    states = [action["state"] for action in ledger.find(engine) if action["state"] == ledger.PLANNED]
    assert len(states) == 40


def test_intent_and_reservation_are_there_together_or_not_at_all(engine):
    with pytest.raises(KeyboardInterrupt), engine.begin() as connection:
        ledger.plan(connection, [intent()], NOW, "run-1", LIMITS)
        assert connection.execute(sa.select(sa.func.count()).select_from(reservations)).scalar_one() == 1
        raise KeyboardInterrupt
    assert count(engine, "actions") == count(engine, "reservations") == count(engine, "ops_events") == 0


# -- claims ------------------------------------------------------------------------------------------------------------


def test_sixteen_racing_workers_get_one_claim(engine):
    key = planned(engine)
    start, tasks = threading.Barrier(16), []

    def race(number):
        start.wait()
        tasks.append(ledger.claim(engine, key, f"worker-{number}", NOW, 60).task)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(tasks) == ["nothing"] * 15 + ["send"]
    assert row(engine, key)["attempts"] == 1


def test_a_lease_that_ran_out_is_looked_up_never_sent_again(engine):
    key = planned(engine)
    assert ledger.claim(engine, key, "a", NOW, 60).task == "send"
    assert ledger.claim(engine, key, "b", later(seconds=59), 60).why == "another worker has it"
    settling = ledger.claim(engine, key, "b", later(seconds=61), 60, settle_seconds=300)
    assert (settling.task, settling.row["state"]) == ("nothing", ledger.UNKNOWN), "the destination may need time to show it"
    assert ledger.claim(engine, key, "b", later(seconds=301), 60, settle_seconds=300).task == "look_up"
    assert ledger.claim(engine, key, "c", later(seconds=302), 60).task == "nothing", "a look-up is a claim too"
    assert ledger.claim(engine, key, "c", later(seconds=362), 60).task == "look_up", "and its lease runs out as well"


def test_an_action_waits_for_the_one_it_builds_on(engine):
    parent = planned(engine)
    child = planned(engine, kind="reply", parent_key=parent)
    assert ledger.claim(engine, child, "w", NOW, 60).why == "waits for the action it builds on"
    assert [action["key"] for action in ledger.due(engine, NOW)] == [parent]
    ledger.claim(engine, parent, "w", NOW, 60)
    with engine.begin() as connection:
        ledger.sent(connection, parent, "w", Receipt("ts-1"), NOW)
    assert [action["key"] for action in ledger.due(engine, NOW)] == [child]
    assert ledger.claim(engine, child, "w", NOW, 60).task == "send"


def test_what_was_touched_just_now_is_left_to_whoever_touched_it(engine):
    key = planned(engine)
    assert ledger.due(engine, later(seconds=30), grace_seconds=60) == []
    assert [action["key"] for action in ledger.due(engine, later(seconds=60), grace_seconds=60)] == [key]


def test_a_receipt_that_comes_after_the_lease_is_recorded(engine):
    key = planned(engine)
    ledger.claim(engine, key, "slow", NOW, 60)
    ledger.claim(engine, key, "other", later(seconds=61), 60)
    with engine.begin() as connection:
        done = ledger.sent(connection, key, "slow", Receipt("ts-1", "https://x"), later(seconds=62))
    assert (done["state"], done["external_id"], done["attempts"]) == (ledger.SENT, "ts-1", 1)
    assert any("after its lease had ended" in detail for _, _, detail in events(engine, key))
    assert ledger.release(engine, key, "other", ledger.PLANNED, "not there", later(seconds=63)) is None, "the claim is gone"
    assert row(engine, key)["state"] == ledger.SENT


def test_a_second_receipt_is_told_as_a_duplicate(engine):
    key = planned(engine)
    ledger.claim(engine, key, "a", NOW, 60)
    with engine.begin() as connection:
        ledger.sent(connection, key, "a", Receipt("ts-1"), NOW)
        ledger.sent(connection, key, "b", Receipt("ts-2"), NOW)
        ledger.sent(connection, key, "b", Receipt("ts-1"), NOW)
    assert [detail for event, _, detail in events(engine, key) if event == "duplicate"] == ["also exists as ts-2"]
    assert row(engine, key)["external_id"] == "ts-1"


def test_an_attempt_without_a_call_does_not_count(engine):
    key = planned(engine)
    ledger.claim(engine, key, "w", NOW, 60)
    ledger.release(engine, key, "w", ledger.PLANNED, "halted", NOW, tried=False)
    assert (row(engine, key)["attempts"], row(engine, key)["first_attempt_at"]) == (0, None)


def test_late_links_are_filled_in_once_and_then_frozen(engine):
    key = planned(engine, bound=False)
    ledger.bind(engine, key, {"text": "with link"}, NOW)
    ledger.bind(engine, key, {"text": "another"}, NOW)
    assert row(engine, key)["payload"] == {"text": "with link"} and row(engine, key)["bound"]
    assert planned(engine, bound=False) == key, "planning it again does not call that another content"


# -- by hand -----------------------------------------------------------------------------------------------------------


def failed(engine, state=ledger.FAILED, **changes) -> str:
    key = planned(engine, **changes)
    ledger.claim(engine, key, "w", NOW, 60)
    ledger.release(engine, key, "w", state, "refused there", NOW)
    return key


@pytest.mark.parametrize(("what", "state"), [("retry", ledger.PLANNED), ("cancel", ledger.CANCELLED), ("sent", ledger.SENT)])
def test_a_persons_decision_is_recorded_with_name_and_reason(engine, what, state):
    key = failed(engine)
    assert ledger.by_hand(engine, key, what, "Ada", "channel was archived", NOW, external_id="ts-9")["state"] == state
    assert events(engine, key)[-1] == (state, "Ada", f"by hand ({what}): channel was archived")


@pytest.mark.parametrize(("who", "why"), [("", "because"), ("Ada", " ")])
def test_nobody_and_no_reason_decide_nothing(engine, who, why):
    with pytest.raises(LedgerError, match="both are recorded"):
        ledger.by_hand(engine, failed(engine), "retry", who, why, NOW)


@pytest.mark.parametrize(("state", "what", "says"), [
    (ledger.SENT, "cancel", "is sent already"), (ledger.CANCELLED, "retry", "is cancelled already"),
    (ledger.UNKNOWN, "retry", "looked up first"),
])
def test_decisions_that_would_send_twice_are_refused(engine, state, what, says):
    key = planned(engine)
    ledger.claim(engine, key, "w", NOW, 60)
    if state == ledger.SENT:
        with engine.begin() as connection:
            ledger.sent(connection, key, "w", Receipt("ts-1"), NOW)
    else:
        ledger.release(engine, key, "w", state, "?", NOW)
    with pytest.raises(LedgerError, match=says):
        ledger.by_hand(engine, key, what, "Ada", "why not", NOW)


def test_nobody_decides_while_it_is_being_sent(engine):
    key = planned(engine)
    ledger.claim(engine, key, "w", NOW, 60)
    for decide in (lambda: ledger.by_hand(engine, key, "cancel", "Ada", "stop", later(seconds=30)),
                   lambda: ledger.absent(engine, key, "Ada", "looked", later(seconds=30))):
        with pytest.raises(LedgerError):
            decide()


def test_it_is_there_needs_an_id(engine):
    with pytest.raises(LedgerError, match="--sent ID"):
        ledger.by_hand(engine, failed(engine), "sent", "Ada", "I saw it", NOW)


def test_what_a_person_did_not_find_may_be_sent_again(engine):
    key = failed(engine, ledger.NEEDS_HUMAN)
    assert ledger.absent(engine, key, "Ada", "not in the channel", NOW)["state"] == ledger.PLANNED
    with pytest.raises(LedgerError, match="only one that nobody could tell about"):
        ledger.absent(engine, key, "Ada", "again", NOW)


def test_an_action_is_named_by_the_start_of_its_key(engine):
    key = planned(engine)
    assert ledger.by_prefix(engine, key[:8])["key"] == key
    with pytest.raises(LedgerError, match="no actions have a key that starts with 'zzz'"):
        ledger.by_prefix(engine, "zzz")
    planned(engine, part="2")
    with pytest.raises(LedgerError, match="2 actions"):
        ledger.by_prefix(engine, "")


# -- approvals ---------------------------------------------------------------------------------------------------------

SHA = "a1b2c3d4" * 8


def asking(engine, **changes) -> str:
    approval = {"audience_sha256": SHA, "customers": 9}
    return planned(engine, slot="sheets", destination="sheets", kind="publish", approval=approval, **changes)


def test_a_list_waits_until_it_is_approved(engine):
    key = asking(engine)
    assert row(engine, key)["state"] == ledger.AWAITING and ledger.claim(engine, key, "w", NOW, 60).task == "nothing"
    assert ledger.due(engine, NOW) == []
    assert [waiting["customers"] for waiting in ledger.pending_approvals(engine)] == [9]
    with pytest.raises(LedgerError, match="waits for approval"):
        ledger.by_hand(engine, key, "retry", "Ada", "go", NOW)
    ledger.decide_approval(engine, key, True, SHA[:8], "Ada", "", NOW)
    assert ledger.claim(engine, key, "w", NOW, 60).task == "send" and ledger.pending_approvals(engine) == []
    assert any("approved 9 customers, audience a1b2c3d4" in detail and who == "Ada" for _, who, detail in events(engine, key))


def test_a_refused_list_never_leaves(engine):
    key = asking(engine)
    with pytest.raises(LedgerError, match="also needs --why"):
        ledger.decide_approval(engine, key, False, SHA, "Ada", "", NOW)
    assert ledger.decide_approval(engine, key, False, SHA, "Ada", "too many", NOW)["state"] == ledger.CANCELLED
    with pytest.raises(LedgerError, match="it is refused"):
        ledger.decide_approval(engine, key, True, SHA, "Grace", "", NOW)


@pytest.mark.parametrize("named", ["b" * 64, SHA[:7], ""])
def test_approving_another_list_is_refused(engine, named):
    with pytest.raises(LedgerError, match="look at it again"):
        ledger.decide_approval(engine, asking(engine), True, named, "Ada", "", NOW)


def test_a_retry_of_what_a_guardrail_held_does_not_skip_the_approval(engine):
    key = asking(engine, hold="guardrail: too many")
    assert row(engine, key)["state"] == ledger.NEEDS_HUMAN
    assert ledger.by_hand(engine, key, "retry", "Ada", "one more is fine", NOW)["state"] == ledger.AWAITING


def test_an_approval_after_the_list_was_recorded_by_hand_sends_nothing(engine):
    key = asking(engine)
    ledger.by_hand(engine, key, "sent", "Ada", "handed over by mail", NOW, external_id="mail")
    with pytest.raises(LedgerError, match="it is void"):
        ledger.decide_approval(engine, key, True, SHA, "Grace", "", NOW)
    assert row(engine, key)["state"] == ledger.SENT


def test_a_superseded_list_takes_its_approval_with_it(engine):
    key = asking(engine)
    ledger.decide_approval(engine, key, True, SHA, "Ada", "", NOW)
    with engine.begin() as connection:
        assert ledger.supersede(connection, key, "the list changed", NOW, "run-2")
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT state FROM approvals")).scalars().all() == ["void"]
    assert row(engine, key)["state"] == ledger.CANCELLED


def test_a_list_on_its_way_is_not_superseded(engine):
    key = planned(engine)
    ledger.claim(engine, key, "w", NOW, 60)
    with engine.begin() as connection:
        assert not ledger.supersede(connection, key, "too late", NOW, "run-2")


# -- switches and append-only tables -----------------------------------------------------------------------------------


def test_a_switch_is_set_told_and_kept_where_it_may_only_be_set_once(engine):
    ledger.set_state(engine, "armed", "2024-02-19", "retention-ops", "first", NOW, once=True)
    ledger.set_state(engine, "armed", "2024-03-01", "retention-ops", "second", NOW, once=True)
    assert ledger.read_state(engine, "armed")["value"] == "2024-02-19"
    ledger.set_state(engine, "halted", "yes", "Ada", "wrong numbers", NOW)
    ledger.set_state(engine, "halted", "no", "Ada", "fixed", later(hours=1))
    assert (ledger.read_state(engine, "halted")["value"], ledger.read_state(engine, "halted")["why"]) == ("no", "fixed")
    assert [event for event, _, _ in events(engine)] == ["armed", "halted", "halted"]


def exposed(engine) -> None:
    """One customer handed over, and with it lines in both append-only tables."""
    key = planned(engine)
    alert = {"alert_type": "t", "scope": "global", "alert_date": DAY.isoformat(), "severity": "WARNING", "baseline_value": 1.0,
             "threshold_warning": 15.0}
    with engine.begin() as connection:
        number = incidents.open_incident(connection, alert, "live", settings_for("."), NOW, "run-1")["id"]
        connection.execute(database.exposures.insert().values(
            incident_id=number, alert_date=DAY, customer_id="c1", tier="P1", arm="treated", action_key=key, at=NOW))


@pytest.mark.parametrize("table", ["ops_events", "exposures"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET at = at", "DELETE FROM {}"])
def test_the_database_itself_refuses_to_change_the_story(engine, table, statement):
    exposed(engine)
    before = count(engine, table)
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
        connection.execute(sa.text(statement.format(table)))
    assert count(engine, table) == before > 0


def test_postgres_refuses_truncate_too(engine):
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no TRUNCATE")
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
        connection.execute(sa.text("TRUNCATE ops_events"))


@pytest.mark.parametrize("table", ["ops_events", "exposures"])
def test_replace_does_not_get_past_append_only(tmp_path, table):
    """SQLite's REPLACE deletes the old row without firing a DELETE trigger."""
    with ops_database(settings_for(tmp_path / "home")) as opened:
        exposed(opened)
        with opened.begin() as connection:
            before = connection.execute(sa.text(f"SELECT * FROM {table}")).all()
            columns = ", ".join("'1999-01-01'" if column.name == "at" else column.name for column in metadata.tables[table].columns)
            connection.execute(sa.text(f"INSERT OR REPLACE INTO {table} SELECT {columns} FROM {table}"))
            assert connection.execute(sa.text(f"SELECT * FROM {table}")).all() == before != []


# -- migrations --------------------------------------------------------------------------------------------------------


def alembic_config(connection):
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def test_a_database_with_rows_is_upgraded_from_0001(tmp_path, database_url, monkeypatch):
    from alembic import command

    settings = settings_for(tmp_path / "home", ops_database_url=database_url)
    settings.home.mkdir()
    old = sa.create_engine(settings.database_url)
    with old.begin() as connection:
        command.upgrade(alembic_config(connection), "0001")
    written = [runs.append(old, log_row(number)) for number in range(3)]
    old.dispose()
    with ops_database(settings) as opened:
        assert runs.rows(opened) == written and runs.first_broken_row(opened) is None
        runs.append(opened, log_row(3))
        assert runs.first_broken_row(opened) is None
        assert row(opened, planned(opened))["state"] == ledger.PLANNED


def test_autogenerate_finds_nothing_to_migrate(engine):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


CLAIMER = """
import os, sys
from datetime import datetime, UTC
from pathlib import Path
from retention_ops.execute import ledger
from retention_ops.log.database import ops_database
from retention_ops.settings import Settings
import psycopg  # loaded before the fork, not sixteen times after it
ready, go = os.pipe(), os.pipe()
children = []
for number in range(16):
    child = os.fork()
    if child == 0:
        os.close(go[1])
        os.read(go[0], 1)
        with ops_database(Settings(_env_file=None, home=Path(sys.argv[1]), ops_database_url=sys.argv[2])) as engine:
            task = ledger.claim(engine, sys.argv[3], f"worker-{number}", datetime(2024, 2, 20, 6, 30, tzinfo=UTC), 60).task
        os._exit({"send": 7, "nothing": 0}.get(task, 1))
    children.append(child)
os.close(go[1])  # all start now
print(sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.slow
def test_sixteen_racing_processes_get_one_claim(tmp_path, database_url, request):
    settings = settings_for(tmp_path / "home", ops_database_url=database_url)
    with ops_database(settings) as opened:
        key = planned(opened)
        done = subprocess.run([sys.executable, "-c", CLAIMER, str(settings.home), database_url, key], capture_output=True, text=True,
                              cwd=str(request.config.rootpath), check=False)
        assert done.stdout.strip() == str([0] * 15 + [7]), done.stderr
        assert row(opened, key)["attempts"] == 1


def test_what_builds_on_a_cancelled_action_is_cancelled_with_it(engine):
    """A reply to a message that was never posted would stay planned for ever."""
    post = planned(engine)
    reply = planned(engine, kind="reply", parent_key=post)
    other = planned(engine, part="other")
    ledger.by_hand(engine, post, "cancel", "Ada", "told them by phone", NOW)
    assert [row(engine, key)["state"] for key in (post, reply, other)] == ["cancelled", "cancelled", "planned"]
    assert events(engine, reply)[-1] == ("cancelled", "Ada", f"what it builds on ({post[:12]}) was cancelled")
