"""A home is lost and restored: nothing leaves before somebody looked outside, nothing is ever sent twice, and new alerts are answered.

Slack and Sheets are loopback servers that the real clients talk to; the ticket system is a real Roundup.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests

from retention_ops.backup import back_up, restore
from retention_ops.errors import LedgerError
from retention_ops.execute import health, hold, ledger, quiet
from retention_ops.execute.reconcile import Findings, reconcile
from retention_ops.execute.respond import Responder
from retention_ops.log import runs
from retention_ops.log.database import ops_database
from retention_ops.settings import Secrets, Settings
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.execute.servers import roundup, slack
from retention_ops_tests.execute.servers.sheets import EMAIL, Sheet, SheetsServer
from retention_ops_tests.execute.stage import (  # noqa: F401
    CRITICAL,
    RISE,
    WARNINGS,
    FakeClock,
    morning_after,
    staged,
    store_alerts,
    template,
)


@dataclass
class Outside:
    """What the world has, and how to reach it."""

    slack: slack.SlackServer
    tracker: roundup.RoundupServer
    sheets: SheetsServer

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "messages_to": "slack", "slack_channel": slack.CHANNEL, "slack_api_url": self.slack.api_url, "webhook_to": "local",
            "tickets_to": "roundup", "ticket_user": "admin", "ticket_priority_warning": "urgent", "ticket_priority_critical": "critical",
            "ticket_resolved_status": "resolved", "ticket_url": self.tracker.url, "lists_to": "sheets", "sheets_spreadsheet": "book",
            "sheets_api_url": self.sheets.url,
        }

    @property
    def secrets(self) -> Secrets:
        return Secrets(slack_token=slack.TOKEN, ticket_token=roundup.PASSWORD, google_credentials=self.sheets.credentials())

    def tally(self) -> dict[str, int]:
        """How many of each exist there."""
        issues = self._read("issue?@fields=extkey,messages&@verbose=0")
        # Roundup keeps an issue's own text as a message too
        return {
            "messages": sum(bool(message["metadata"]) for message in self.slack.messages),
            "charts": sum(bool(message["files"]) for message in self.slack.messages),
            "tickets": len(issues), "comments": sum(len(issue["messages"]) for issue in issues) - len(issues),
            "worksheets": len(self.sheets.sheets["book"]) - 1,
        }

    def twice(self) -> list[str]:
        keys = Counter(message["metadata"]["event_payload"]["key"] for message in self.slack.messages if message["metadata"])
        keys += Counter(issue["extkey"] for issue in self._read("issue?@fields=extkey"))
        return [key for key, count in keys.items() if count > 1]

    def _read(self, path: str) -> list[dict[str, Any]]:
        answer = requests.get(f"{self.tracker.url}/rest/data/{path}", auth=("admin", roundup.PASSWORD), timeout=30)
        return answer.json()["data"]["collection"]


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    """A world of its own for each test: keys follow from the alert, so the next test would find this one's tickets."""
    with roundup.RoundupServer(tmp_path / "tracker") as tracker, SheetsServer() as sheets, slack.SlackServer() as messages:
        sheets.sheets = {"book": [Sheet(0, "Sheet1", 1000, 26)]}
        sheets.editors = {"book": {EMAIL}}
        yield Outside(messages, tracker, sheets)


@dataclass
class Installation:
    """One home, its clock, and the runs on it."""

    settings: Settings
    secrets: Secrets
    clock: FakeClock
    number: int = 0
    names: list[str] = field(default_factory=list)

    @property
    def lake(self) -> Lake:
        return Lake(self.settings)

    @contextmanager
    def responder(self, **changes: Any) -> Iterator[Responder]:
        self.number += 1
        with ops_database(self.settings) as engine:
            yield Responder(self.lake, engine, self.settings, f"{self.settings.home.name}-{self.number}", **{
                "clock": self.clock, "sleep": self.clock.sleep, "secrets": self.secrets, **changes})

    def morning(self, day: date) -> dict[str, Any]:
        """D is computed and answered."""
        self.clock.now = max(self.clock.now, morning_after(day))
        store_alerts(self.lake, day, day)
        with self.responder() as responder:
            return responder.answer(day)

    def reconcile(self, **options: Any) -> Findings:
        with self.responder(reconciling=True) as responder:
            return reconcile(responder, **options)

    def states(self) -> set[tuple[str, str, str, str]]:
        with ops_database(self.settings) as engine:
            return {(row["mode"], row["slot"], row["kind"], row["state"]) for row in ledger.find(engine)}

    def log(self, day: date) -> list[str]:
        with ops_database(self.settings) as engine:
            return [f"{row['mode']} {row['status']}" for row in runs.rows(engine, first=day, last=day)]


@pytest.fixture
def shop(template: Path, tmp_path: Path, outside: Outside) -> Installation:  # noqa: F811
    home = tmp_path / "lost"
    shutil.copytree(template, home, symlinks=True)
    settings = Settings(_env_file=None, home=home, mode="live", min_sample=10, owner="Ada", shop_name="Small shop", **outside.settings)
    return Installation(settings, outside.secrets, FakeClock(morning_after(WARNINGS[0])))


def lost_and_restored(shop: Installation, file: Path, tmp_path: Path, **changes: Any) -> Installation:
    """The home is gone; the backup is restored into another one five hours after the last answer."""
    shutil.rmtree(shop.settings.home)
    shop.clock.forward(hours=5)
    settings = shop.settings.model_copy(update={"home": tmp_path / "restored", **changes})
    restore(file, settings, clock=shop.clock)
    return Installation(settings, shop.secrets, shop.clock)


def test_a_lost_home_restored_from_a_backup_sends_nothing_twice_and_goes_on(shop, outside, tmp_path):
    """Opened before the backup; two more mornings answered after it; then the home is gone."""
    assert shop.morning(WARNINGS[0])["status"] == "success"
    file = back_up(shop.settings, tmp_path / "friday.tar", clock=shop.clock).file
    for day in WARNINGS[1:3]:
        assert shop.morning(day)["status"] == "success"
    before = outside.tally()
    assert before["messages"] == 3 and before["tickets"] == 1 and before["comments"] == 2 and before["worksheets"] > 2

    again = lost_and_restored(shop, file, tmp_path)
    for day in WARNINGS[1:3]:  # the schedule, the sensor, a person in a hurry: whatever runs before somebody looked
        again.morning(day)
    with again.responder() as responder:
        responder.work()
        assert responder.settings.mode == "shadow"
    assert outside.tally() == before, "nothing leaves before the ledger is reconciled"

    found = again.reconcile()
    assert found.lifted and not found.problems and not found.missing
    assert found.answered == WARNINGS[1:3]
    assert Counter((row["slot"], row["kind"]) for row in found.adopted) == {
        ("slack", "reply"): 2, ("ticket", "comment"): 2, ("sheets", "publish"): 2}
    assert outside.tally() == before

    for day in WARNINGS[1:3]:
        again.morning(day)
    with again.responder() as responder:
        responder.work()
    assert outside.tally() == before, "what was adopted is not sent again"
    assert {state for mode, *_, state in again.states() if mode == "live"} == {ledger.SENT}

    row = again.morning(WARNINGS[3])
    assert row["status"] == "success" and row["mode"] == "live"
    after = outside.tally()
    assert after["messages"] == before["messages"] + 1 and after["comments"] == before["comments"] + 1 and after["tickets"] == 1
    assert outside.twice() == []
    with ops_database(again.settings) as engine:
        assert runs.first_broken_row(engine) is None


def test_what_is_wrong_after_a_restore_is_told_although_the_lost_home_had_told_something_else(shop, outside, tmp_path):
    """Both are the first cause of their ledger."""
    shop.settings = shop.settings.model_copy(update={
        "health_channel": slack.CHANNEL, "digest": "off", "source": "files", "source_path": "exports"})
    file = back_up(shop.settings, tmp_path / "friday.tar", clock=shop.clock).file

    def told(at: Installation) -> list[str]:
        with at.responder() as responder:
            quiet.tell(responder)
        return [message["text"].splitlines()[0] for message in outside.slack.messages if message["metadata"]]

    with shop.responder() as responder:
        health.record_source_check(responder.engine, WARNINGS[0], False, [{"date": str(WARNINGS[0])}], shop.clock)
    before = told(shop)
    assert len(before) == 1 and "source" in before[0]
    again = lost_and_restored(shop, file, tmp_path)
    with again.responder() as responder:
        day = WARNINGS[0]
        health.record_runs(responder.engine, [{"run_id": "r", "first_date": day, "last_date": day, "status": "failure",
                                               "started_at": None, "ended_at": again.clock()}], again.clock)
    assert again.reconcile(through=WARNINGS[0] - timedelta(1), who="Ada", why="it was switched off").lifted
    after = told(again)
    assert len(after) == 2 and "run" in after[1]
    assert told(again) == after


@pytest.mark.slow
def test_an_incident_opened_after_the_backup_is_taken_over_and_goes_on_in_its_thread(shop, outside, tmp_path):
    with shop.responder() as responder:
        responder.gatekeeper.horizon()  # armed before anything was flagged
    file = back_up(shop.settings, tmp_path / "friday.tar", clock=shop.clock).file
    for day in WARNINGS[:2]:
        assert shop.morning(day)["status"] == "success"
    before = outside.tally()
    again = lost_and_restored(shop, file, tmp_path)

    found = again.reconcile()
    assert not found.lifted and found.missing == WARNINGS[:2], "dates it can have answered are not computed yet"
    with_late_orders = again.lake.orders()
    path = tmp_path / "late.csv"
    path.write_text(f"order_id,customer_id,order_date,order_amount\nlate-1,c1,{WARNINGS[0] - timedelta(40)},1.00\n")
    ingest([path], "orders", again.settings, replace=True, complete_through=with_late_orders.complete_through)
    store_alerts(again.lake, WARNINGS[0], WARNINGS[1])  # both at once, as a backfill does
    found = again.reconcile()
    assert found.lifted and found.answered == WARNINGS[:2]
    assert {(row["slot"], row["kind"]) for row in found.adopted} >= {("slack", "post"), ("slack", "chart"), ("ticket", "create")}

    again.morning(WARNINGS[2])
    assert outside.twice() == [] and outside.tally()["tickets"] == 1
    reply = outside.slack.messages[-1]
    (post,) = [message for message in outside.slack.messages if message["metadata"] and message["thread_ts"] in (None, message["ts"])]
    assert reply["thread_ts"] == post["ts"] and outside.tally()["messages"] == before["messages"] + 1


@pytest.mark.slow
def test_a_destination_that_cannot_be_reached_keeps_the_ledger_held(shop, outside, tmp_path):
    assert shop.morning(WARNINGS[0])["status"] == "success"
    file = back_up(shop.settings, tmp_path / "friday.tar", clock=shop.clock).file
    assert shop.morning(WARNINGS[1])["status"] == "success"
    again = lost_and_restored(shop, file, tmp_path, slack_api_url="http://127.0.0.1:9/api/")
    store_alerts(again.lake, WARNINGS[1], WARNINGS[1])
    found = again.reconcile()
    assert not found.lifted and "could not be asked" in found.problems[0]
    with ops_database(again.settings) as engine:
        assert hold.why_held(engine)
    without_secret = Installation(again.settings, Secrets(), again.clock)
    assert any("RETENTION_OPS_" in problem for problem in without_secret.reconcile().problems)
    reachable = Installation(again.settings.model_copy(update={"slack_api_url": outside.slack.api_url}), again.secrets, again.clock)
    assert reachable.reconcile().lifted


@pytest.mark.slow
def test_what_was_waiting_in_the_backup_and_went_out_later_is_adopted(shop, outside, tmp_path):
    """The backup was taken between planning and sending."""
    store_alerts(shop.lake, WARNINGS[0], WARNINGS[0])
    with shop.responder() as responder:
        responder.plan(responder.gate(WARNINGS[0]), WARNINGS[0])
    file = back_up(shop.settings, tmp_path / "friday.tar", clock=shop.clock).file
    assert shop.morning(WARNINGS[0])["status"] == "success"
    before = outside.tally()
    again = lost_and_restored(shop, file, tmp_path)
    found = again.reconcile()
    assert found.lifted and len(found.adopted) == 4
    again.morning(WARNINGS[0])
    assert outside.tally() == before and outside.twice() == []


@pytest.mark.slow
def test_an_answer_the_lost_installation_never_gave_is_given_after_reconciling(shop, outside, tmp_path):
    assert shop.morning(WARNINGS[0])["status"] == "success"
    file = back_up(shop.settings, tmp_path / "friday.tar", clock=shop.clock).file
    shop.clock.now = morning_after(WARNINGS[1])
    again = lost_and_restored(shop, file, tmp_path)
    store_alerts(again.lake, WARNINGS[1], WARNINGS[1])
    assert again.reconcile().lifted
    row = again.morning(WARNINGS[1])
    assert row["status"] == "success" and outside.tally()["messages"] == 2


@pytest.mark.slow
def test_the_door_looks_first_even_where_reconciling_found_nothing(shop, outside, tmp_path):
    """A correction after the restore makes the very answer the lost installation had given: it is found, not sent again."""
    assert shop.morning(WARNINGS[0])["status"] == "success"
    file = back_up(shop.settings, tmp_path / "friday.tar", clock=shop.clock).file
    assert shop.morning(WARNINGS[1])["status"] == "success"
    before = outside.tally()
    again = lost_and_restored(shop, file, tmp_path)
    found = again.reconcile(through=WARNINGS[0], who="Ada", why="she is wrong")
    assert found.lifted and not found.answered
    again.morning(WARNINGS[1])
    assert outside.tally() == before and outside.twice() == []


def test_a_person_must_say_why_nothing_was_answered(shop, tmp_path):
    with pytest.raises(LedgerError, match="never restored"):
        shop.reconcile()
    file = back_up(shop.settings, tmp_path / "friday.tar", clock=shop.clock).file
    again = lost_and_restored(shop, file, tmp_path)
    with pytest.raises(LedgerError, match="--why"):
        again.reconcile(through=WARNINGS[0] - timedelta(1))


@pytest.mark.slow
def test_in_shadow_an_installation_that_has_sent_before_is_not_reconciled(shop, outside, tmp_path):
    """In the wrong mode nobody would be asked for what was sent in live."""
    assert shop.morning(WARNINGS[0])["status"] == "success"
    file = back_up(shop.settings, tmp_path / "friday.tar", clock=shop.clock).file
    again = lost_and_restored(shop, file, tmp_path, mode="shadow")
    found = again.reconcile()
    assert not found.lifted and "RETENTION_OPS_MODE" in found.problems[0]
