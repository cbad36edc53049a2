"""The one door: every message, ticket, list and mail leaves through `Door.deliver`, and nothing else calls a destination.

Claim, look at the kill switch, send once, record. A call that did not answer is looked up before it is ever made again.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection, Engine

from retention_ops.clock import Clock, system_clock
from retention_ops.errors import SettingsError
from retention_ops.execute import hold, ledger, wording
from retention_ops.execute.destinations.choice import BUILD, WITHDRAW
from retention_ops.execute.destinations.seam import (
    Ambiguous,
    CannotTell,
    Conflict,
    Destination,
    DestinationError,
    Lookup,
    Outgoing,
    Receipt,
    Rejected,
    Table,
    Throttled,
    Unreachable,
)
from retention_ops.execute.ledger import CANCELLED, FAILED, NEEDS_HUMAN, PLANNED, SENT, UNKNOWN, Row
from retention_ops.execute.redact import redact
from retention_ops.settings import REAL_MODES

HALTED = "halted"
STAYS_HERE = (BUILD,)
"""kinds that only compute: detection and packs go on whatever the mode and the kill switch say"""
ASK_AGAIN_SECONDS = 60
"""after a look-up that got no answer"""
MAX_ATTEMPTS = 8
"""then a person looks: something is wrong that time does not heal"""


class Obsolete(Exception):
    """What an action was about has ended meanwhile; the message says how. It never leaves."""


class ListChanged(Exception):
    """The list about to leave is no longer the one that was planned; the message says what changed."""


@dataclass(frozen=True)
class Content:
    """What is read just before an action leaves."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)


def worker_name() -> str:
    """Who holds a claim: this machine, this process, and a part no other claim has."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


@dataclass
class Door:
    """`destination(row)` gives the destination of an action, `load(row)` its files and lists (may raise ListChanged),
    `bind(row)` the final payload of an action that waited for links, `recorded(connection, row)` writes what belongs into the
    same transaction as the proof of sending, `mode()` is read anew each time."""

    engine: Engine
    destination: Callable[[Row], Destination]
    mode: Callable[[], str]
    load: Callable[[Row], Content] = lambda row: Content()
    bind: Callable[[Row], Mapping[str, Any]] = lambda row: row["payload"]
    recorded: Callable[[Connection, Row], None] = lambda connection, row: None
    clock: Clock = system_clock
    lease_seconds: float = 300
    hidden: Callable[[], list[str]] = list
    """secrets that must never be recorded"""
    sleep: Callable[[float], None] = time.sleep
    checkpoint: Callable[[str, Row], None] = lambda step, row: None
    """called between the steps; tests stop the world here"""

    def deliver(self, key: str, patience: float = 0) -> Row:
        """Moves one action as far as it will go now; returns its row. Never raises for a destination's failure.

        For up to `patience` seconds it waits for a short pause a destination asked for, or for another worker's send.
        """
        end = time.monotonic() + patience
        while True:
            row, wait = self._step(key)
            if wait is None or time.monotonic() + wait > end:
                return row
            self.sleep(wait)

    def _step(self, key: str) -> tuple[Row, float | None]:
        """One claim and what follows from it; the row, and the seconds after which another step could help (None: no)."""
        row = ledger.find(self.engine, key=key)[0]
        if row["state"] == PLANNED and not row["bound"] and not row["attempts"] and not self._closed(row):
            ledger.bind(self.engine, key, self.bind(row), self.clock())
        lookup = self._lookup(row)
        worker = worker_name()
        claim = ledger.claim(
            self.engine, key, worker, self.clock(), self.lease_seconds, 0 if lookup.repeatable else lookup.wait_seconds, lookup.repeatable,
        )
        self.checkpoint("claimed", claim.row)
        match claim.task:
            case "send":
                return self._send(claim.row, worker, lookup)
            case "look_up":
                return self._look_up(claim.row, worker, lookup)
        if claim.row["state"] in ledger.OPEN_STATES and claim.row["lease_until"] and claim.row["lease_until"] > self.clock():
            return claim.row, 0.5  # somebody else is sending it
        if claim.row["state"] in (PLANNED, UNKNOWN) and claim.row["not_before"]:
            return claim.row, max((claim.row["not_before"] - self.clock()).total_seconds(), 0.01)
        return claim.row, None

    def _lookup(self, row: Row) -> Lookup:
        destination = self._open(row)
        return destination.lookups.get(row["kind"], Lookup(absent="hold")) if destination else Lookup(absent="hold")

    def _open(self, row: Row) -> Destination | None:
        """The destination, or None where its settings are missing (said when it is used)."""
        with suppress(Exception):
            return self.destination(row)
        return None

    def _closed(self, row: Row) -> str:
        """Why nothing may leave now, or nothing. Read after the claim, just before sending."""
        if row["kind"] in STAYS_HERE:
            return ""
        halted = ledger.read_state(self.engine, HALTED)
        if halted and halted["value"] == "yes":
            return f"{wording.HALTED_BY} {halted['by']}: {halted['why']}"
        if row["kind"] == WITHDRAW:
            return ""  # what was put there in another mode has to go all the same
        held = hold.why_held(self.engine)
        if held and row["mode"] in REAL_MODES:
            return f"{wording.THE_MODE} is {held}"
        try:
            mode = self.mode()
        except Exception as error:  # the settings are being edited
            return f"{wording.THE_MODE} cannot be read: {self._text(error)}"
        return "" if mode == row["mode"] else f"{wording.THE_MODE} is {mode} now; this was planned in {row['mode']}"

    def _send(self, row: Row, worker: str, lookup: Lookup) -> tuple[Row, float | None]:
        closed = self._closed(row)
        if closed:
            return self._give_back(row, worker, PLANNED, closed, wait=ASK_AGAIN_SECONDS, tried=False), None
        try:
            destination, action = self.destination(row), self._outgoing(row)
        except Obsolete as end:
            return self._give_back(row, worker, CANCELLED, f"not sent: {end}", tried=False), None
        except ListChanged as change:  # whoever planned it plans it anew, in one transaction
            return self._give_back(row, worker, PLANNED, f"not sent: {change}", tried=False), None
        except SettingsError as error:  # a shell without the secrets must not end what another one can send
            return self._give_back(row, worker, PLANNED, self._text(error), wait=ASK_AGAIN_SECONDS, tried=False), None
        except Exception as error:  # nothing has left: a missing setting or a missing file
            return self._give_back(row, worker, FAILED, self._text(error), tried=False), None
        self.checkpoint("before_send", row)
        if self.clock() >= row["lease_until"]:
            return self._give_back(row, worker, PLANNED, "preparing took longer than the lease; not sent", tried=False), 0.01
        try:
            receipt = destination.update(action) if lookup.repeatable and action.parent else destination.send(action)
        except Conflict as conflict:
            receipt = conflict.existing
        except Unreachable as nobody:
            return self._give_back(row, worker, PLANNED, self._text(nobody), tried=False), None
        except Throttled as throttled:
            state = NEEDS_HUMAN if row["attempts"] >= MAX_ATTEMPTS else PLANNED
            wait = max(throttled.retry_after, 0.01)
            return self._give_back(row, worker, state, self._text(throttled), wait=wait), wait
        except Rejected as rejected:
            return self._give_back(row, worker, FAILED, self._text(rejected)), None
        except Exception as error:  # Ambiguous, or a bug of ours: it may have gone out
            # more and more patience with a call that may be repeated at once, so that a minute without the service does not use it up
            again = min(2 ** row["attempts"], ASK_AGAIN_SECONDS) if row["destination"] != "local" else 0
            wait = again if lookup.repeatable else lookup.wait_seconds
            return self._give_back(row, worker, UNKNOWN, self._text(error), wait=wait, looked_up=0), max(wait, 0.01)
        self.checkpoint("after_send", row)
        done = self._record(row, worker, receipt, "sent"), None
        self.checkpoint("recorded", done[0])
        return done

    def _look_up(self, row: Row, worker: str, lookup: Lookup) -> tuple[Row, float | None]:
        """Asks the destination about an action nobody knows the end of."""
        if lookup.repeatable:
            return self._again(row, worker, "the same call again changes nothing"), 0.01
        try:
            receipt = self.destination(row).find_by_key(self._outgoing(row, content=False))
        except CannotTell as error:
            return self._give_back(row, worker, NEEDS_HUMAN, self._text(error)), None
        except (Throttled, Ambiguous) as error:
            wait = error.retry_after if isinstance(error, Throttled) else ASK_AGAIN_SECONDS
            return self._give_back(row, worker, UNKNOWN, f"could not be looked up: {self._text(error)}", wait=wait), wait
        except SettingsError as error:
            why = f"could not be looked up: {self._text(error)}"
            return self._give_back(row, worker, UNKNOWN, why, wait=ASK_AGAIN_SECONDS), None
        except Exception as error:
            return self._give_back(row, worker, NEEDS_HUMAN, f"could not be looked up: {self._text(error)}"), None
        self.checkpoint("looked_up", row)
        if receipt:
            return self._record(row, worker, receipt, "found there"), None
        looked_up = row["looked_up"] + 1
        if looked_up < lookup.times and row["attempts"]:  # never sent by us, so it is there long since or not at all
            why = f"not there yet, look-up {looked_up} of {lookup.times}"
            return self._give_back(row, worker, UNKNOWN, why, wait=lookup.wait_seconds, looked_up=looked_up), lookup.wait_seconds
        if lookup.absent == "hold":
            return self._give_back(row, worker, NEEDS_HUMAN, "not found there; sending again is a person's decision", absent=True), None
        return self._again(row, worker, "provably not there", absent=True), 0.01

    def _again(self, row: Row, worker: str, why: str, absent: bool = False) -> Row:
        state = NEEDS_HUMAN if row["attempts"] >= MAX_ATTEMPTS else PLANNED
        then = f"{why}, after {row['attempts']} attempts" if state == NEEDS_HUMAN else f"{why}: sent again" if row["attempts"] else why
        return self._give_back(row, worker, state, then, absent=absent)

    # -- after a restore -----------------------------------------------------------------------------------------------

    def found(self, row: Mapping[str, Any], parent: str | None, since: datetime) -> Receipt | None:
        """What the destination has of an action that is not in this ledger, or not as sent; nothing is changed.

        `parent` is the external id of what it builds on, `since` when it can have been sent first. Raises DestinationError,
        SettingsError; returns None also where there is nothing to look for (the local outbox, a call that may be repeated).
        """
        if row["destination"] == "local" or self._lookup(row).repeatable:
            return None
        return self.destination(row).find_by_key(Outgoing(
            key=row["key"], kind=row["kind"], target=row["target"], payload=row["payload"], parent=parent, first_attempt_at=since,
        ))

    def adopt(self, key: str, receipt: Receipt, actor: str) -> Row:
        """Records what `found` found as sent, with all that belongs to the proof."""
        with self.engine.begin() as connection:
            done = ledger.adopt(connection, key, receipt, self.clock(), actor)
            if done["state"] == SENT:
                self.recorded(connection, done)
        return done

    def _outgoing(self, row: Row, content: bool = True) -> Outgoing:
        parent = ledger.find(self.engine, key=row["parent_key"])[0]["external_id"] if row["parent_key"] else None
        loaded = self.load(row) if content else Content()
        return Outgoing(
            key=row["key"], kind=row["kind"], target=row["target"], payload=row["payload"], parent=parent,
            first_attempt_at=row["first_attempt_at"], files=loaded.files, tables=loaded.tables,
        )

    def _record(self, row: Row, worker: str, receipt: Receipt, how: str) -> Row:
        with self.engine.begin() as connection:
            done = ledger.sent(connection, row["key"], worker, receipt, self.clock(), how)
            if done["state"] == SENT:
                self.recorded(connection, done)
        return done

    def _give_back(
        self, row: Row, worker: str, state: str, why: str, wait: float = 0, looked_up: int | None = None, tried: bool = True,
        absent: bool = False,
    ) -> Row:
        released = ledger.release(
            self.engine, row["key"], worker, state, why, self.clock(), wait_seconds=wait, looked_up=looked_up, tried=tried, absent=absent,
        )
        return released or ledger.find(self.engine, key=row["key"])[0]

    def _text(self, error: Exception) -> str:
        known = isinstance(error, DestinationError) or type(error).__module__.startswith("retention_ops")
        return redact(str(error) if known else f"{type(error).__name__}: {error}", self.hidden())[:500]
