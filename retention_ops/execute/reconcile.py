"""After a restore: finds out what the lost installation sent since the backup, and takes it into the ledger as sent.

The mornings between backup and loss are gone through again, one by one, as they were answered then. Keys follow from the alert, not
from the ledger, so each destination can be asked for exactly what was sent. A date of which something is found was answered: its
answer is written, and what is there counts as sent. A date of which nothing is found was not, and is answered as any other later.
Nothing is sent here. What cannot be asked for (a webhook, a mail) waits for a person when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from typing import Any

from retention_ops.clock import shop_day
from retention_ops.errors import LedgerError, SettingsError
from retention_ops.execute import hold, ledger
from retention_ops.execute.destinations.choice import EXPORT_SLOT, RUN_SLOT
from retention_ops.execute.destinations.seam import CannotTell, DestinationError, Receipt
from retention_ops.execute.gate import ARMED, Decision, Gate
from retention_ops.execute.ledger import Intent, Row
from retention_ops.execute.respond import Responder
from retention_ops.settings import REAL_MODES
from retention_ops.warehouse.freshness import Changes

NOT_SENT = (*ledger.OPEN_STATES, *ledger.HELD_STATES)
MOST_ANSWERS = 20
"""of one date, before something is wrong"""


@dataclass
class Findings:
    """What was found out. `lifted`: the ledger is no longer held; otherwise `problems` says what is in the way."""

    restored: hold.Restored
    asked: int = 0
    adopted: list[Row] = field(default_factory=list)
    absent: int = 0
    cannot_tell: list[str] = field(default_factory=list)
    """in sentences: what waits for a person when its turn comes"""
    answered: list[date] = field(default_factory=list)
    """dates the lost installation had answered"""
    problems: list[str] = field(default_factory=list)
    missing: list[date] = field(default_factory=list)
    """dates it can have answered that are not computed here from orders that are all in"""
    lifted: bool = False


def last_lost(lost: hold.Restored, shop_timezone: str) -> date:
    """The last alert date the lost installation can have answered: the day before the restore, unless a person said otherwise."""
    return lost.through or shop_day(lost.restored_at, shop_timezone) - timedelta(days=1)


def reconcile(responder: Responder, *, through: date | None = None, who: str = "retention-ops", why: str = "") -> Findings:
    """Asks, adopts, and lifts the hold where everything could be asked. `responder` has `reconciling` set and the mode to go on in.

    `through`: a person (`who`, `why`) knows that nothing after this alert date was answered. Raises LedgerError for a ledger that was
    never restored. Killed at any moment, it may be run again.
    """
    with responder.engine.connect() as connection:
        lost = hold.restored(connection)
    if lost is None:
        raise LedgerError("this ledger was never restored from a backup; there is nothing to reconcile")
    if through:
        if not why.strip():
            raise LedgerError("say who knows it (--by) and why (--why); both are recorded")
        lost = replace(lost, through=through)
    search = _Search(responder, Findings(lost))
    search.known_actions()
    search.lost_mornings()
    return search.end(who, why)


@dataclass
class _Search:
    responder: Responder
    found: Findings

    @property
    def lost(self) -> hold.Restored:
        return self.found.restored

    # -- what the backup knew of ---------------------------------------------------------------------------------------

    def known_actions(self) -> None:
        """Actions that were waiting, under way or held when the backup was made."""
        for row in ledger.find(self.responder.engine, state=NOT_SENT, mode=REAL_MODES):
            if not ledger.may_be_there(self.lost, row):
                continue
            parent = self._parent(row, {})
            if row["parent_key"] and parent is None:
                continue  # what it builds on is not there, so neither is it
            self._settle(row, self._ask(row, parent))

    def _settle(self, row: Row, receipt: Receipt | None) -> None:
        """Adopts what was found. What was not found stays as it is: the door looks once more before it sends."""
        if receipt is None:
            return
        if row["slot"] in ("sheets", EXPORT_SLOT) and row["incident_id"] is not None:
            # who was on the list that left is known only as far as it can be drawn up again
            self.responder.remember_lists(row, self.responder.lists(row["alert_date"]))
        self.found.adopted.append(self.responder.door.adopt(row["key"], receipt, self.responder.run_id))

    def _ask(self, row: Mapping[str, Any], parent: str | None) -> Receipt | None:
        """What is there. Not being told by a service that cannot tell holds up that action only; not reaching it, everything."""
        what = f"{row['slot']} {row['kind']} of {row['alert_date']} by {row['destination']}"
        if row["destination"] == "local":
            return None
        self.found.asked += 1
        try:
            receipt = self.responder.door.found(row, parent, row.get("first_attempt_at") or self.lost.backup_at)
        except CannotTell as error:
            self.found.cannot_tell.append(f"{what}: {self.responder.text(error)}")
            return None
        except (DestinationError, SettingsError) as error:
            self.found.problems.append(f"{what} could not be asked for: {self.responder.text(error)}")
            return None
        self.found.absent += receipt is None
        return receipt

    def _parent(self, row: Mapping[str, Any], receipts: Mapping[str, Receipt]) -> str | None:
        """The external id of what an action builds on, from this search or from the ledger."""
        if not row["parent_key"]:
            return None
        if row["parent_key"] in receipts:
            return receipts[row["parent_key"]].external_id
        known = ledger.find(self.responder.engine, key=row["parent_key"])
        return known[0]["external_id"] if known and known[0]["state"] == ledger.SENT else None

    # -- what it cannot know of ----------------------------------------------------------------------------------------

    def lost_mornings(self) -> None:
        """Goes through the dates the lost installation can have answered, oldest first."""
        if self.responder.settings.mode not in REAL_MODES:
            if ledger.read_state(self.responder.engine, ARMED):
                self.found.problems.append(
                    f"the mode is {self.responder.settings.mode}, but this installation has sent before: set RETENTION_OPS_MODE to what it "
                    "was when it was lost (nothing is sent by it) and run this again")
            return
        if self.responder.lake.orders() is None:
            return
        last = last_lost(self.lost, self.responder.settings.shop_timezone)
        self.found.missing = self._not_computed(last)
        for day in self._looking().days_in_reach():
            # after a date that is not there yet the story would be another one
            if day > last or any(missing < day for missing in self.found.missing) or self.found.problems:
                break
            for answering in self._answering():
                self._one_morning(answering, day)

    def _looking(self) -> Gate:
        """The gate, without starting the response's history."""
        return replace(self.responder.gatekeeper, arms=False)

    def _answering(self) -> Iterator[Responder]:
        yield self.responder
        if self.responder.settings.mode == "live" and self.responder.settings.shortfall_response:
            yield self.responder.trial()

    def _not_computed(self, last: date) -> list[date]:
        """Dates without an alert row of the orders in force, or whose orders are not all in: what they will say is not known yet."""
        lake = self.responder.lake
        orders, changes = lake.orders(), Changes(lake)
        first = max(self._looking().horizon(), orders.first_date)
        stored = dict(lake.provenances(["alert_logic"], first, last))

        def known(day: date) -> bool:
            return day in stored and day <= orders.complete_through and not changes.since(stored[day].get("orders_version", ""), day)

        span = (first + timedelta(days=offset) for offset in range(max((last - first).days + 1, 0)))
        return [day for day in span if not known(day)]

    def _one_morning(self, answering: Responder, day: date) -> None:
        """Every answer of D that something is found of."""
        gate = replace(answering.gatekeeper, one_by_one=True, arms=False)
        planner = replace(answering.planner, gate=gate)
        try:
            gate.alert(day)
        except Exception:  # no rule of this mode has a row
            return
        for _ in range(MOST_ANSWERS):
            decision = gate.decide(day)
            if not decision.acts:
                return
            intents = planner.preview(decision, day)
            receipts = self._look_for(intents)
            if self.found.problems or not receipts:
                return
            planner.write(decision, day)
            self._take_over(answering, day, decision, intents, receipts)

    def _look_for(self, intents: Sequence[Intent]) -> dict[str, Receipt]:
        """key -> what is there, of actions nobody has planned in this ledger."""
        receipts: dict[str, Receipt] = {}
        for intent in intents:
            row = {**vars(intent), "key": intent.key}
            parent = self._parent(row, receipts)
            if intent.slot == RUN_SLOT or (intent.parent_key and parent is None):
                continue
            receipt = self._ask(row, parent)
            if receipt:
                receipts[intent.key] = receipt
        return receipts

    def _take_over(
        self, answering: Responder, day: date, decision: Decision, intents: Sequence[Intent], receipts: Mapping[str, Receipt],
    ) -> None:
        for intent in intents:
            for row in ledger.find(answering.engine, key=intent.key):
                self._settle(row, receipts.get(intent.key))
        self.found.answered.append(day)
        if all(row["state"] not in ledger.OPEN_STATES for row in answering.actions(day)):  # else whoever ends it logs it
            answering.record(day, decision)

    # -- the end -------------------------------------------------------------------------------------------------------

    def end(self, who: str, why: str) -> Findings:
        """Lifts the hold where nothing is left to be found out."""
        if self.found.problems or self.found.missing:
            return self.found
        now: datetime = self.responder.clock()
        told = f"{len(self.found.adopted)} found and adopted, {self.found.absent} not there, {len(self.found.cannot_tell)} cannot be told"
        done = replace(self.lost, reconciled_at=now)
        with self.responder.engine.begin() as connection:
            hold.write_restored(connection, done, who, f"reconciled: {told}" + (f"; {why}" if why else ""), now)
        self.found.restored, self.found.lifted = done, True
        return self.found
