"""The heartbeat: once after each good day, never after another one, and its address is seen by nobody."""

from __future__ import annotations

import logging
import sqlite3
from datetime import UTC, date, datetime, timedelta

import pytest
from pydantic import SecretStr

from retention_ops.errors import SettingsError
from retention_ops.execute import health, ledger, quiet
from retention_ops.execute.destinations.heartbeat import Heartbeat
from retention_ops.execute.destinations.seam import Outgoing, Rejected
from retention_ops.execute.door import HALTED
from retention_ops.metrics import as_numbers, metrics
from retention_ops.settings import Secrets
from retention_ops_tests.execute.servers.loopback import LoopbackServer, Reply, Request
from retention_ops_tests.execute.stage import Killed, staged, store_alerts

D = date(2024, 5, 27)
"""the small shop's last day, complete"""
MORNING = datetime(2024, 5, 28, 6, 30, tzinfo=UTC)
CANARY = "canary-ping-5f0c"


class Monitor(LoopbackServer):
    """Counts the calls that it answered."""

    def __init__(self):
        super().__init__()
        self.beats = 0

    def handle(self, request: Request) -> Reply:
        if request.method != "GET" or request.path != f"/{CANARY}" or request.body:
            return Reply(404, f"no such check: {request.path}")
        self.beats += 1
        return Reply(200, b"OK")


@pytest.fixture
def monitor():
    with Monitor() as running:
        yield running


@pytest.fixture
def stage(template, tmp_path):
    with staged(template, tmp_path, digest="off", holdout_pct=0) as made:
        made.clock.now = MORNING
        yield made


def secrets(monitor) -> Secrets:
    return Secrets(heartbeat_url=SecretStr(f"{monitor.url}/{CANARY}"))


def tell(stage, monitor, **changes):
    return quiet.tell(stage.responder(**{"destinations": None, "secrets": secrets(monitor), **changes}))


def ran(stage, day=D, status="success"):
    if status == "success":
        store_alerts(stage.lake, day, day)
    name = f"{status}-{day}-{stage.clock():%m%d%H%M%S}"
    run = {"run_id": name, "first_date": day, "last_date": day, "status": status, "started_at": None, "ended_at": stage.clock()}
    health.record_runs(stage.engine, [run], stage.clock)


def test_once_after_a_good_day_whatever_is_run_again(stage, monitor):
    tell(stage, monitor)
    assert monitor.beats == 0, "the run is not done yet"
    ran(stage)
    for _ in range(3):
        tell(stage, monitor)
        ran(stage)
        stage.clock.forward(minutes=5)
    assert monitor.beats == 1
    found = as_numbers(metrics(stage.engine, stage.lake, stage.settings, stage.clock))
    assert found["last_heartbeat_date_timestamp_seconds"] == datetime(2024, 5, 27, tzinfo=UTC).timestamp()


@pytest.mark.parametrize("status", ["failure", "canceled"])
def test_not_while_the_newest_run_of_the_day_did_not_succeed(stage, monitor, status):
    ran(stage)
    stage.clock.forward(minutes=1)
    ran(stage, status=status)
    tell(stage, monitor)
    assert monitor.beats == 0
    stage.clock.forward(minutes=1)
    ran(stage)
    tell(stage, monitor)
    assert monitor.beats == 1


def test_not_while_orders_are_missing_and_not_for_days_nobody_waits_for(stage, monitor):
    stage.clock.forward(days=1)
    ran(stage, D + timedelta(days=1))  # computed, but its orders are not in
    ran(stage, D)  # the day before yesterday, caught up
    tell(stage, monitor)
    assert monitor.beats == 0
    stage.ingest("orders", f"order_id,customer_id,order_date,order_amount\nlate,c1,{D + timedelta(days=1)},10.00\n")
    tell(stage, monitor)
    assert monitor.beats == 0, "the day as computed knows nothing of them"
    ran(stage, D + timedelta(days=1))
    tell(stage, monitor)
    assert monitor.beats == 1


@pytest.mark.parametrize("fault", ["lost_before", "lost_after", "429", "500_before", "500_after", "503"])
def test_a_fault_on_the_way_delays_it(stage, monitor, fault):
    """At least once: after a lost answer the same call is made again, and that is all it can do."""
    monitor.fail(fault, times=2)
    ran(stage)
    for _ in range(4):
        tell(stage, monitor)
        stage.clock.forward(minutes=2)
    assert monitor.beats in (1, 2, 3) and [row["state"] for row in stage.actions(slot="heartbeat")] == [ledger.SENT]
    calls = len(monitor.requests)
    tell(stage, monitor)
    assert len(monitor.requests) == calls


def test_a_monitor_that_is_down_for_two_minutes_is_called_again_for_longer(stage, monitor):
    monitor.fail("503", times=6)
    ran(stage)
    begun = stage.clock()
    while monitor.beats == 0:
        tell(stage, monitor)
        stage.clock.forward(seconds=15)
    assert [row["state"] for row in stage.actions(slot="heartbeat")] == [ledger.SENT] and len(monitor.requests) == 7
    assert stage.clock() - begun >= timedelta(seconds=2 + 4 + 8 + 16 + 32 + 60)


def test_killed_after_the_call_it_is_made_again_and_recorded(stage, monitor):
    ran(stage)

    def kill(step, row):
        if step == "after_send":
            raise Killed

    with pytest.raises(Killed):
        tell(stage, monitor, checkpoint=kill)
    stage.clock.forward(minutes=6)
    tell(stage, monitor)
    assert monitor.beats == 2 and [row["state"] for row in stage.actions(slot="heartbeat")] == [ledger.SENT]


def test_one_that_waited_until_the_next_day_no_longer_vouches_for_anything(stage, monitor):
    ledger.set_state(stage.engine, HALTED, "yes", "Ada", "wait", stage.clock())
    ran(stage)
    tell(stage, monitor)
    ledger.set_state(stage.engine, HALTED, "no", "Ada", "go on", stage.clock())
    stage.clock.forward(days=1)
    tell(stage, monitor)
    assert monitor.beats == 0 and [row["state"] for row in stage.actions(slot="heartbeat")] == [ledger.CANCELLED]


@pytest.mark.parametrize(("mode", "beats"), [("off", 0), ("shadow", 0), ("pilot", 1), ("live", 1)])
def test_modes(stage, monitor, mode, beats):
    other = stage.with_settings(mode=mode)
    ran(other)
    tell(other, monitor)
    assert monitor.beats == beats
    assert bool(list(other.settings.outbox.rglob("heartbeat.json"))) is (mode == "shadow")
    other.close()


def test_without_an_address_there_is_none(stage):
    ran(stage)
    assert quiet.tell(stage.responder(destinations=None)) == []


def test_the_address_is_seen_by_nobody(stage, monitor, caplog):
    """Neither a log, at DEBUG, nor the ledger, nor an error that repeats it, nor a setting holds it."""
    caplog.set_level(logging.DEBUG)
    ran(stage)
    address = Secrets(heartbeat_url=SecretStr(f"{monitor.url}/{CANARY}-unknown"))
    tell(stage, monitor, secrets=address)
    (row,) = stage.actions(slot="heartbeat")
    assert row["state"] == ledger.FAILED and "404" in row["last_error"]
    dump = "\n".join(sqlite3.connect(stage.home / "ops.sqlite").iterdump())
    assert CANARY not in dump and CANARY not in caplog.text and CANARY not in repr(address) + repr(stage.settings)
    assert all(CANARY not in file.read_text() for file in stage.home.rglob("*.json"))


@pytest.mark.parametrize(("url", "says"), [
    ("", "is not set"), ("http://ping.example/x", "must begin with https"), ("https://user:pass@ping.example/x", "user name"),
    ("nonsense", "not an address"),
])
def test_an_address_that_cannot_be_called_is_refused_by_name(url, says):
    with pytest.raises(SettingsError, match=says) as caught:
        Heartbeat.connect(Secrets(heartbeat_url=SecretStr(url) if url else None))
    assert "RETENTION_OPS_HEARTBEAT_URL" in str(caught.value) and (not url or url not in str(caught.value))


def test_it_does_nothing_else(monitor):
    beat = Heartbeat.connect(secrets(monitor))
    assert [finding.ok for finding in beat.check()] == [None] and not monitor.requests
    with pytest.raises(Rejected):
        beat.send(Outgoing("k", "post", "", {}))
