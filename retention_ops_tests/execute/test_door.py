"""The one door on SQLite and on Postgres: whatever the far side, the network or the process does, one action is one message."""

from __future__ import annotations

import threading

import pytest

from retention_ops.errors import PackError, SettingsError
from retention_ops.execute import ledger
from retention_ops.execute.destinations.seam import Conflict, Lookup, Receipt
from retention_ops.execute.door import ASK_AGAIN_SECONDS, HALTED, MAX_ATTEMPTS, Content, Door, ListChanged
from retention_ops_tests.execute.stage import DAY, FakeClock, Killed, Memory, intent, morning_after


class Corridor:
    """A ledger, a door and one destination behind it."""

    def __init__(self, engine, folder, name="slack", **changes):
        self.engine, self.clock, self.mode = engine, FakeClock(morning_after(DAY)), "live"
        self.memory = Memory(name, folder / f"{name}.jsonl")
        self.door = self.another(**changes)

    def another(self, **changes) -> Door:
        return Door(**{
            "engine": self.engine, "destination": lambda row: self.memory, "mode": lambda: self.mode, "clock": self.clock,
            "sleep": self.clock.sleep, "lease_seconds": 300, **changes,
        })

    def plan(self, **changes) -> str:
        changes = {"destination": self.memory.name, "kind": next(iter(self.memory.lookups)), **changes}
        with self.engine.begin() as connection:
            return ledger.plan(connection, [intent(**changes)], self.clock(), "run-1", {})[0]

    def deliver(self, key, patience=0.0, **changes):
        return (self.another(**changes) if changes else self.door).deliver(key, patience)

    def follow_up(self, key, minutes=6):
        """Comes back until nothing moves any more, as the follow-up sensor does."""
        for _ in range(12):
            self.clock.forward(minutes=minutes)
            row = self.deliver(key)
        return row

    def sends(self) -> int:
        return sum(what == "send" for what, _ in self.memory.calls)

    def row(self, key):
        return ledger.find(self.engine, key=key)[0]


@pytest.fixture
def corridor(engine, tmp_path):
    return Corridor(engine, tmp_path)


def test_a_delivered_action_holds_its_proof_and_is_not_sent_again(corridor):
    key = corridor.plan()
    row = corridor.deliver(key)
    assert (row["state"], row["attempts"], row["external_id"]) == ("sent", 1, corridor.memory.arrived[0]["id"])
    assert corridor.deliver(key)["state"] == "sent" and corridor.sends() == 1


def test_sixteen_doors_send_once(corridor):
    key = corridor.plan()
    start = threading.Barrier(16)

    def race():
        start.wait()
        corridor.another(sleep=lambda seconds: None).deliver(key)

    threads = [threading.Thread(target=race) for _ in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert corridor.sends() == len(corridor.memory.arrived) == 1


# -- the answer was lost -----------------------------------------------------------------------------------------------


def test_a_lost_answer_is_found_there_and_not_sent_again(corridor):
    key = corridor.plan()
    corridor.memory.orders["post"] = ["lost"]
    assert corridor.deliver(key)["state"] == "unknown"
    assert corridor.deliver(key)["state"] == "unknown" and len(corridor.memory.calls) == 1, "not asked before it can be visible"
    row = corridor.follow_up(key)
    assert (row["state"], row["attempts"], corridor.sends()) == ("sent", 1, 1)
    assert row["external_id"] == corridor.memory.arrived[0]["id"]


def test_what_never_arrived_is_sent_again_once(corridor):
    key = corridor.plan()
    corridor.memory.orders["post"] = ["never"]
    corridor.deliver(key)
    row = corridor.follow_up(key)
    assert (row["state"], row["attempts"], len(corridor.memory.arrived)) == ("sent", 2, 1)


def test_a_worker_that_died_after_sending_is_looked_up(corridor):
    key = corridor.plan()
    corridor.memory.orders["post"] = ["die after"]
    with pytest.raises(Killed):
        corridor.deliver(key)
    assert corridor.row(key)["state"] == "sending"
    row = corridor.follow_up(key)
    assert (row["state"], row["attempts"], corridor.sends()) == ("sent", 1, 1)


def test_absence_counts_after_as_many_look_ups_as_the_destination_needs(engine, tmp_path):
    """Jira's search shows a new ticket minutes later: twice nothing, five minutes apart, is absence."""
    corridor = Corridor(engine, tmp_path, "jira")
    key = corridor.plan()
    corridor.memory.orders["create"] = ["lost"]
    corridor.memory.asked = ["blind"]
    corridor.deliver(key)
    corridor.clock.forward(minutes=5)
    assert (corridor.deliver(key)["state"], corridor.row(key)["looked_up"]) == ("unknown", 1)
    corridor.clock.forward(minutes=4)
    assert corridor.deliver(key)["looked_up"] == 1, "too early to ask again"
    row = corridor.follow_up(key)
    assert (row["state"], corridor.sends()) == ("sent", 1)


def test_two_look_ups_without_a_trace_send_again(engine, tmp_path):
    corridor = Corridor(engine, tmp_path, "jira")
    key = corridor.plan()
    corridor.memory.orders["create"] = ["never"]
    corridor.deliver(key)
    assert corridor.follow_up(key)["state"] == "sent"
    assert [what for what, _ in corridor.memory.calls] == ["send", "find", "find", "send"]


@pytest.mark.parametrize("asked", ["no answer", "throttle"])
def test_a_look_up_without_an_answer_is_asked_again_and_proves_nothing(corridor, asked):
    key = corridor.plan()
    corridor.memory.orders["post"], corridor.memory.asked = ["lost"], [asked, asked]
    corridor.deliver(key)
    row = corridor.follow_up(key)
    assert (row["state"], corridor.sends()) == ("sent", 1)


def test_what_nobody_can_tell_waits_for_a_person(corridor):
    key = corridor.plan()
    corridor.memory.orders["post"], corridor.memory.asked = ["lost"], ["cannot tell"]
    corridor.deliver(key)
    row = corridor.follow_up(key)
    assert (row["state"], row["last_error"], corridor.sends()) == ("needs_human", "no scope to look", 1)


def test_mail_that_may_have_gone_out_is_never_sent_again_by_itself(engine, tmp_path):
    corridor = Corridor(engine, tmp_path, "mail")
    key = corridor.plan()
    corridor.memory.orders["mail"] = ["never"]
    corridor.deliver(key)
    row = corridor.follow_up(key)
    assert row["state"] == "needs_human" and "a person's decision" in row["last_error"] and corridor.sends() == 1
    ledger.absent(engine, key, "Ada", "no mail arrived", corridor.clock())
    assert corridor.deliver(key)["state"] == "sent"


def test_a_call_that_changes_nothing_twice_is_repeated_without_a_look_up(corridor):
    parent = corridor.plan()
    corridor.deliver(parent)
    corridor.memory.orders["update"] = ["lost"]
    row = corridor.deliver(corridor.plan(kind="update", parent_key=parent), patience=5)
    assert (row["state"], row["attempts"]) == ("sent", 2)
    assert all(what == "send" for what, _ in corridor.memory.calls)
    assert corridor.memory.arrived[-1]["parent"] == corridor.row(parent)["external_id"]


def test_a_bug_of_ours_counts_as_no_answer(corridor):
    key = corridor.plan()
    corridor.memory.orders["post"] = ["bug"]
    row = corridor.deliver(key)
    assert row["state"] == "unknown" and row["last_error"] == "KeyError: 'ours'"


# -- the answer was no -------------------------------------------------------------------------------------------------


def test_a_refusal_is_final_until_a_person_says_so(corridor):
    key = corridor.plan()
    corridor.memory.orders["post"] = ["reject"]
    assert corridor.deliver(key)["state"] == "failed"
    assert corridor.follow_up(key)["state"] == "failed" and corridor.sends() == 1
    ledger.by_hand(corridor.engine, key, "retry", "Ada", "channel is back", corridor.clock())
    assert corridor.deliver(key)["state"] == "sent"


def test_a_short_pause_is_waited_for_a_long_one_is_left_to_later(corridor):
    key = corridor.plan()
    corridor.memory.orders["post"] = ["throttle"]
    assert corridor.deliver(key, patience=20)["state"] == "sent"
    long = corridor.plan(part="2")
    corridor.memory.orders["post"], corridor.memory.retry_after = ["throttle"], 600
    row = corridor.deliver(long, patience=20)
    assert row["state"] == "planned" and row["not_before"] > corridor.clock()
    assert corridor.deliver(long, patience=20)["attempts"] == 1, "nothing is asked while it waits"
    assert corridor.follow_up(long)["state"] == "sent"


def test_what_is_throttled_for_ever_ends_with_a_person(corridor):
    key = corridor.plan()
    corridor.memory.orders["post"] = ["throttle"] * 99
    row = corridor.follow_up(key)
    assert (row["state"], row["attempts"], corridor.sends()) == ("needs_human", MAX_ATTEMPTS, MAX_ATTEMPTS)


def test_what_never_arrives_ends_with_a_person(corridor):
    key = corridor.plan()
    corridor.memory.orders["post"] = ["never"] * 99
    corridor.deliver(key)
    for _ in range(5):
        row = corridor.follow_up(key)
    assert (row["state"], row["attempts"]) == ("needs_human", MAX_ATTEMPTS) and "after 8 attempts" in row["last_error"]


def test_the_far_side_already_has_it(corridor):
    key = corridor.plan()
    corridor.memory.orders["post"] = [Conflict("exists", Receipt("there-1"))]
    row = corridor.deliver(key)
    assert (row["state"], row["external_id"]) == ("sent", "there-1")


def test_missing_settings_leave_the_action_to_a_shell_that_has_them_and_show_no_secret(corridor):
    def missing(row):
        raise SettingsError("RETENTION_OPS_SLACK_TOKEN is missing, not xoxb-1234-secret")

    row = corridor.deliver(corridor.plan(), destination=missing)
    assert row["state"] == "planned" and "RETENTION_OPS_SLACK_TOKEN" in row["last_error"] and "1234" not in row["last_error"]
    corridor.clock.sleep(61)
    assert corridor.deliver(row["key"])["state"] == "sent"


def test_a_missing_file_fails_and_nothing_leaves(corridor):
    def gone(row):
        raise PackError("the chart is gone")

    assert corridor.deliver(corridor.plan(), load=gone)["last_error"] == "the chart is gone"
    assert corridor.sends() == 0


# -- switches ----------------------------------------------------------------------------------------------------------


def halt(corridor, value="yes"):
    ledger.set_state(corridor.engine, HALTED, value, "Ada", "wrong numbers", corridor.clock())


def test_a_halt_between_claim_and_send_keeps_it_in(corridor):
    def halts(step, row):
        if step == "claimed":
            halt(corridor)

    key = corridor.plan()
    row = corridor.deliver(key, checkpoint=halts)
    assert row["state"] == "planned" and row["last_error"] == "halted by Ada: wrong numbers" and row["lease_owner"] is None
    assert corridor.sends() == 0
    halt(corridor, "no")
    corridor.clock.forward(seconds=ASK_AGAIN_SECONDS)
    assert corridor.deliver(key)["state"] == "sent"


def test_a_halt_of_days_uses_up_no_attempt_and_no_search_window(corridor):
    key = corridor.plan()
    halt(corridor)
    for _ in range(3):
        corridor.follow_up(key, minutes=600)
    assert (corridor.row(key)["attempts"], corridor.row(key)["first_attempt_at"]) == (0, None)
    halt(corridor, "no")
    corridor.memory.orders["post"] = ["throttle"]
    assert corridor.follow_up(key)["state"] == "sent"


def test_links_are_filled_in_when_it_may_leave_not_while_it_is_halted(corridor):
    found = {"text": "no link yet"}
    key = corridor.plan(bound=False)
    halt(corridor)
    corridor.deliver(key, bind=lambda row: dict(found))
    halt(corridor, "no")
    found["text"] = "https://ticket"
    corridor.clock.forward(minutes=2)
    corridor.deliver(key, bind=lambda row: dict(found))
    assert corridor.memory.arrived[0]["payload"] == {"text": "https://ticket"}


def test_nothing_leaves_after_the_mode_changed(corridor):
    def changes(step, row):
        if step == "claimed":
            corridor.mode = "off"

    key = corridor.plan()
    row = corridor.deliver(key, checkpoint=changes)
    assert row["state"] == "planned" and row["last_error"] == "the mode is off now; this was planned in live"
    assert corridor.sends() == 0


def test_a_mode_that_cannot_be_read_keeps_it_in(corridor):
    def unreadable():
        raise SettingsError("RETENTION_OPS_MODE: unexpected value")

    row = corridor.deliver(corridor.plan(), mode=unreadable)
    assert row["state"] == "planned" and "cannot be read" in row["last_error"] and corridor.sends() == 0


def test_what_took_longer_to_prepare_than_the_lease_is_not_sent_on_it(corridor):
    def slow(row):
        if corridor.sends() == 0 and not slow.done:
            slow.done = True
            corridor.clock.forward(seconds=301)
        return Content()

    slow.done = False
    key = corridor.plan()
    assert corridor.deliver(key, load=slow)["state"] == "planned" and corridor.sends() == 0
    assert corridor.deliver(key, load=slow)["state"] == "sent"


def test_a_slow_worker_whose_lease_another_took_sends_nothing(corridor):
    key, others = corridor.plan(), []

    def slow(step, row):
        if step == "before_send":
            corridor.clock.forward(seconds=301)
            others.append(corridor.deliver(key)["state"])

    row = corridor.deliver(key, checkpoint=slow)
    assert (others, row["state"], corridor.sends()) == (["planned"], "planned", 0), "the other one looked and found nothing"
    assert corridor.follow_up(key)["state"] == "sent" and len(corridor.memory.arrived) == 1


def test_a_list_that_changed_does_not_leave_and_its_approval_is_void_once_it_is_replaced(engine, tmp_path):
    corridor = Corridor(engine, tmp_path, "sheets")
    key = corridor.plan(slot="sheets", approval={"audience_sha256": "a" * 64, "customers": 3})
    ledger.decide_approval(engine, key, True, "a" * 64, "Ada", "", corridor.clock())

    def changed(row):
        raise ListChanged("one customer said no")

    assert corridor.deliver(key, load=changed)["state"] == "planned" and corridor.sends() == 0
    with engine.begin() as connection:
        assert ledger.supersede(connection, key, "another list", corridor.clock(), "run-2")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT state FROM approvals").scalars().all() == ["void"]


def test_proof_and_what_follows_from_it_are_recorded_together(corridor):
    """Killed between the two nothing is recorded, and the look-up records both."""
    written = []

    def dies(connection, row):
        if not written:
            written.append("died")
            raise Killed
        ledger.note(connection, corridor.clock(), "exposed", "test", action_key=row["key"])

    key = corridor.plan()
    with pytest.raises(Killed):
        corridor.deliver(key, recorded=dies)
    assert corridor.row(key)["state"] == "sending" and corridor.sends() == 1
    for _ in range(3):
        corridor.clock.forward(minutes=6)
        row = corridor.deliver(key, recorded=dies)
    assert (row["state"], corridor.sends()) == ("sent", 1)
    with corridor.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT COUNT(*) FROM ops_events WHERE event = 'exposed'").scalar() == 1


def test_the_kinds_of_a_repeatable_look_up_are_sent_again_after_a_kill(engine, tmp_path):
    corridor = Corridor(engine, tmp_path, "sheets")
    corridor.memory.lookups = {"publish": Lookup(repeatable=True)}
    key = corridor.plan()
    corridor.memory.orders["publish"] = ["die after"]
    with pytest.raises(Killed):
        corridor.deliver(key)
    assert corridor.follow_up(key)["state"] == "sent" and all(what == "send" for what, _ in corridor.memory.calls)
