"""The plan: turns a decision into one transaction of answer, incident, intents and reservations, or into nothing at all.

Before anything is written the date's Action Pack must be there, whole, and about this very result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from retention_ops.clock import Clock
from retention_ops.detect.alerts import SHORTFALL
from retention_ops.errors import LedgerError, PackError
from retention_ops.execute import incidents, ledger, wording
from retention_ops.execute.destinations import chosen, target_of
from retention_ops.execute.destinations.choice import QUIET_SLOTS, RUN_SLOT
from retention_ops.execute.gate import ACTED, PASSED, Decision, Gate
from retention_ops.execute.ledger import Intent
from retention_ops.log import exposures
from retention_ops.log.database import answers, lock_responses
from retention_ops.log.database import incidents as incident_table
from retention_ops.package.audiences import TIERS, audience_sha256
from retention_ops.package.brief import CHART_FILE, RETURNING_FILE
from retention_ops.package.pack import Pack, alert_version, current_audiences, find_pack, renew_pack, verify
from retention_ops.settings import REAL_MODES, Settings
from retention_ops.warehouse.seam import Warehouse

EXPORTED_TIERS = {"WARNING": ("P1", "P2"), "CRITICAL": ("P1", "P2", "P3")}
MAX_REDECISIONS = 10


@dataclass(frozen=True)
class Planner:
    """Plans for one installation in the name of one run."""

    lake: Warehouse
    engine: Engine
    settings: Settings
    clock: Clock
    run_id: str
    gate: Gate

    def write(self, decision: Decision, day: date) -> Decision:
        """Writes the decision and its intents in one transaction; another one where the ground had moved meanwhile.

        Raises PackError, with no intent written, where D's pack cannot be built or names another result.
        """
        for _ in range(MAX_REDECISIONS):
            if decision.verdict in ("skip", "resume"):
                return decision
            alert = self.gate.alert(day)
            pack = self.pack(day, alert) if decision.verdict in ACTED else None
            with self.engine.begin() as connection:
                if self._write(connection, decision, alert, pack) is not None:
                    return decision
            decision = self.gate.decide(day)
        raise LedgerError(f"{day} was answered again and again by others meanwhile; run it once more")

    def preview(self, decision: Decision, day: date) -> list[Intent]:
        """What `write` would plan, without writing it: the same transaction, rolled back."""
        if not decision.acts:
            return []
        alert = self.gate.alert(day)
        pack = self.pack(day, alert) if decision.verdict in ACTED else None
        with self.engine.connect() as connection, connection.begin() as transaction:
            intents = self._write(connection, decision, alert, pack)
            transaction.rollback()
        return intents or []

    def pack(self, day: date, alert: Mapping[str, Any]) -> Pack:
        """D's Action Pack, built anew where it is missing, older than the result, or lists people it may not; proven whole."""
        pack = self._found(day)
        handed_over = exposures.handed_over_around(self.engine, day, self.settings.handover_cooldown_days)
        if pack is None or not pack.is_of(alert) or \
                pack.manifest["audience_sha256"] != audience_sha256(current_audiences(self.lake, day, handed_over)):
            pack = renew_pack(self.lake, day, handed_over, run_id=self.run_id, clock=self.clock)
        prove(pack, alert)
        return pack

    def _found(self, day: date) -> Pack | None:
        try:
            pack = find_pack(self.settings, day)
            if pack:
                verify(pack)
            return pack
        except PackError:
            return None  # damaged: built again

    def _write(
        self, connection: Connection, decision: Decision, alert: Mapping[str, Any], pack: Pack | None
    ) -> list[Intent] | None:
        """Answer, incident, intents and reservations; None, and nothing written, where another worker was faster."""
        now, day = self.clock(), date.fromisoformat(alert["alert_date"])
        lock_responses(connection)
        last = self.gate.last_answer(connection, alert)
        if (last["seq"] if last else 0) != decision.seq:
            return None
        if decision.verdict in PASSED:
            if not last or (last["version"], last["verdict"]) != (decision.version, decision.verdict):
                self._insert_answer(connection, alert, decision, None, None, now)
            return []
        incident = incidents.current(connection, alert["scope"], self.settings.mode)
        if decision.verdict == "retract":
            incident = incidents.get(connection, last["incident_id"])
        elif (decision.verdict == "open") != (incident is None) or (decision.verdict == "resolve" and day <= incident["last_flagged_on"]):
            return None
        hold = ""
        if decision.verdict == "open":
            hold = self._too_many_incidents(connection, now)
            incident = incidents.open_incident(connection, alert, self.settings.mode, self.settings, now, self.run_id)
        answer_id = self._insert_answer(connection, alert, decision, incident["id"], pack, now)
        for covered in decision.covers:
            self._insert_covered(connection, covered, day, incident["id"], now)
        incident = self._advance(connection, decision, alert, incident, now)
        if not decision.acts:
            return []
        self._withdraw(connection, decision, day, now)
        intents = self._intents(connection, decision, alert, incident, pack, answer_id, hold)
        ledger.plan(connection, intents, now, self.run_id, {"*": self.settings.max_messages_per_day})
        return intents

    def _withdraw(self, connection: Connection, decision: Decision, day: date, now: datetime) -> None:
        """Lists of an earlier answer of D that have not left never will: this answer brings its own. A retraction takes back
        everything of D that has not left."""
        table = ledger.actions
        query = sa.select(table.c.key).where(
            table.c.alert_date == day, table.c.mode == self.settings.mode, table.c.slot.not_in((RUN_SLOT, *QUIET_SLOTS)),
        ).order_by(table.c.position)
        if decision.verdict != "retract":
            query = query.where(table.c.slot == "sheets")
        for key in connection.execute(query).scalars().all():
            ledger.supersede(connection, key, f"{day} was answered anew", now, self.run_id)

    def _too_many_incidents(self, connection: Connection, now: datetime) -> str:
        if self.settings.mode == "shadow":
            return ""
        recent = connection.execute(
            sa.select(sa.func.count()).select_from(incident_table)
            .where(incident_table.c.mode == self.settings.mode, incident_table.c.created_at > now - timedelta(hours=24))
        ).scalar_one()
        limit = self.settings.max_incidents_per_day
        return f"guardrail: {recent} incidents opened in 24 hours (max_incidents_per_day {limit})" if recent >= limit else ""

    def _insert_answer(
        self, connection: Connection, alert: Mapping[str, Any], decision: Decision, incident_id: int | None, pack: Pack | None,
        now: datetime,
    ) -> int:
        return connection.execute(answers.insert().values(
            alert_type=alert["alert_type"], scope=alert["scope"], alert_date=date.fromisoformat(alert["alert_date"]),
            mode=self.settings.mode, seq=decision.seq + 1, version=decision.version, severity=decision.severity,
            verdict=decision.verdict, reason=decision.reason, incident_id=incident_id, run_id=self.run_id, answered_at=now,
            facts_sha256=pack.facts_sha256 if pack else None,
            audience_sha256=pack.manifest["audience_sha256"] if pack else None, made_from=dict(decision.made_from) or sa.null(),
        )).inserted_primary_key[0]

    def _insert_covered(
        self, connection: Connection, covered: date, by: date, incident_id: int, now: datetime
    ) -> None:
        row = self.gate.alert(covered)
        last = self.gate.last_answer(connection, row)
        if last and last["verdict"] == "covered" and last["incident_id"] is None:  # passed over by itself: now it has its message
            connection.execute(
                answers.update().where(answers.c.id == last["id"]).values(incident_id=incident_id, reason=wording.covered_by(by))
            )
        if last:
            return
        decision = Decision("covered", wording.covered_by(by), alert_version(row), row["severity"])
        self._insert_answer(connection, row, decision, incident_id, None, now)

    def _advance(
        self, connection: Connection, decision: Decision, alert: Mapping[str, Any], incident: dict[str, Any], now: datetime
    ) -> dict[str, Any]:
        """The incident after this answer."""
        day, number = date.fromisoformat(alert["alert_date"]), incident["id"]
        match decision.verdict:
            case "update" | "escalate" | "snoozed":
                values: dict[str, Any] = {"last_flagged_on": max(day, incident["last_flagged_on"])}
                if decision.verdict == "escalate":
                    deadline = incidents.business_deadline(now, self.settings.ack_hours_critical, self.settings)
                    values |= {"severity": alert["severity"], "acked_at": None, "acked_by": None, "escalated_at": None,
                               "snoozed_until": None, "ack_by": deadline}
                return incidents.change(connection, number, now, self.run_id, decision.verdict, decision.reason, **values)
            case "resolve":
                return incidents.change(connection, number, now, self.run_id, "resolved", decision.reason, state="resolved")
            case "retract":
                left = self._flagged_answers(connection, number) - {day}
                if left:
                    return incidents.change(connection, number, now, self.run_id, "date retracted", decision.reason,
                                            last_flagged_on=max(left))
                state = "retracted" if incident["state"] == "open" else incident["state"]
                return incidents.change(connection, number, now, self.run_id, "retracted", decision.reason, state=state)
        return incident

    def _flagged_answers(self, connection: Connection, incident_id: int) -> set[date]:
        """Dates of an incident whose newest answer says that they are flagged."""
        rows = connection.execute(
            sa.select(answers.c.alert_date, answers.c.verdict).where(answers.c.incident_id == incident_id).order_by(answers.c.seq)
        ).all()
        newest = {day: verdict for day, verdict in rows}
        return {day for day, verdict in newest.items() if verdict in (*ACTED, "snoozed")}

    # -- intents -------------------------------------------------------------------------------------------------------

    def _intents(
        self, connection: Connection, decision: Decision, alert: Mapping[str, Any], incident: Mapping[str, Any], pack: Pack | None,
        answer_id: int, hold: str,
    ) -> list[Intent]:
        """Everything this answer is going to do, in the order it is done."""
        verdict = decision.verdict
        posted = self.first(connection, incident["id"], "slack", "post")
        ticket = self.first(connection, incident["id"], "ticket", "create")
        note = wording.stands_for([(day, self.gate.alert(day)["severity"]) for day in decision.covers])
        manifest = pack.manifest["audiences"] if pack else None
        plan = Draft(self.settings, alert, incident, decision.seq + 1, answer_id, hold)
        if verdict == "open" or (verdict in ACTED and posted is None):
            message = plan.add("slack", "post", self.message(pack, incident, alert, note), bound=False)
            plan.add("slack", "chart", _chart(pack, alert), message.key)
        elif posted:
            text = wording.sentence(verdict, alert, incident, manifest) + (f" {note}" if note else "")
            reply = {**wording.slack_sentence(text), "broadcast": verdict == "escalate" and self.settings.broadcast}
            plan.add("slack", "reply", reply, posted["key"])
        if verdict == "open" or (verdict in ACTED and ticket is None):
            plan.add("ticket", "create", self.ticket(pack, incident, alert, note), bound=False)
        elif ticket:
            text = wording.sentence(verdict, alert, incident, manifest) + (f" {note}" if note else "")
            plan.add("ticket", "comment", {"text": text}, ticket["key"])
            if verdict == "escalate":
                plan.add("ticket", "priority", {"priority": self.settings.ticket_priority_critical}, ticket["key"])
            if verdict == "resolve" or incident["state"] == "retracted":
                plan.add("ticket", "resolve", {"status": self.settings.ticket_resolved_status}, ticket["key"])
        if verdict in ACTED:
            plan.intents.append(self.handover(pack, alert, incident["id"], answer_id, f"{decision.seq + 1}.0", hold))
            plan.add("webhook", "post", self.webhook(pack, alert, incident, verdict), bound=False)
        else:
            plan.add("webhook", "post", self._ended(alert, incident, verdict))
        return plan.intents

    def first(self, connection: Connection, incident_id: int, slot: str, kind: str) -> dict[str, Any] | None:
        """The incident's message or ticket that later actions build on; a cancelled or refused one counts as none."""
        table = ledger.actions
        row = connection.execute(
            sa.select(table).where(
                table.c.incident_id == incident_id, table.c.slot == slot, table.c.kind == kind,
                table.c.state.not_in((ledger.CANCELLED, ledger.FAILED)),
            ).order_by(table.c.position).limit(1)
        ).mappings().first()
        return dict(row) if row else None

    def message(self, pack: Pack, incident: Mapping[str, Any], alert: Mapping[str, Any], note: str) -> dict[str, Any]:
        brief = json.loads((pack.folder / "briefing.slack.json").read_text(encoding="utf-8"))
        broadcast = self.settings.broadcast and alert["severity"] == "CRITICAL"
        return {**wording.slack_with_context(brief, wording.ownership_slack(incident), note), "broadcast": broadcast, "note": note}

    def ticket(self, pack: Pack, incident: Mapping[str, Any], alert: Mapping[str, Any], note: str) -> dict[str, Any]:
        severity = alert["severity"]
        priority = self.settings.ticket_priority_critical if severity == "CRITICAL" else self.settings.ticket_priority_warning
        return {
            "title": wording.title(alert), "priority": priority, "severity": severity,
            "labels": ["retention", severity.lower(), alert["alert_type"]], "note": note,
            "description": "\n\n".join(part for part in (wording.ownership(incident), note, brief_markdown(pack)) if part),
        }

    def webhook(self, pack: Pack, alert: Mapping[str, Any], incident: Mapping[str, Any], verdict: str) -> dict[str, Any]:
        """The seed's payload; links come in when the lists and the ticket exist."""
        lists = pack.manifest["audiences"]
        return {
            **self._ended(alert, incident, verdict),
            "brief_markdown": brief_markdown(pack),
            "priority_counts": {tier: lists[tier]["rows"] for tier in TIERS},
            "export_urls": {tier: lists[tier]["file"] for tier in EXPORTED_TIERS[alert["severity"]]},
        }

    def _ended(self, alert: Mapping[str, Any], incident: Mapping[str, Any], verdict: str) -> dict[str, Any]:
        return {
            "event": verdict, "incident": incident["id"], "date": alert["alert_date"], "severity": alert["severity"],
            "alert_flag": alert["alert_flag"],
            "metrics": {name: alert[name] for name in (
                "metric_name", "current_value", "baseline_value", "delta_pct", "delta_relative_pct", "sample_size")},
        }

    def handover(
        self, pack: Pack, alert: Mapping[str, Any], incident_id: int, answer_id: int, part: str, hold: str = ""
    ) -> Intent:
        """The intent that hands the lists of D over; with a large CRITICAL audience it waits for a person."""
        lists = {tier: pack.manifest["audiences"][tier] for tier in EXPORTED_TIERS[alert["severity"]]}
        customers, sha = sum(entry["rows"] for entry in lists.values()), pack.manifest["audience_sha256"]
        limit = self.settings.approval_above
        asks = alert["severity"] == "CRITICAL" and limit is not None and customers > limit and self.settings.mode in REAL_MODES
        return Draft(self.settings, alert, {"id": incident_id}, 0, answer_id, hold).intent(
            "sheets", "publish", {
                "audience_sha256": sha,
                "worksheets": [
                    {"title": f"{tier} {alert['alert_date']}", "tier": tier, **{name: entry[name] for name in ("file", "rows", "excluded")}}
                    for tier, entry in lists.items()
                ],
            }, part=part, approval={"audience_sha256": sha, "customers": customers} if asks else {},
        )

class Draft:
    """Collects the intents of one answer, so that each names its destination, target and parents the same way."""

    def __init__(
        self, settings: Settings, alert: Mapping[str, Any], incident: Mapping[str, Any], seq: int, answer_id: int | None, hold: str,
        identity: str = "",
    ):
        self.settings = settings
        self.day = date.fromisoformat(alert["alert_date"])
        self.identity = identity or f"{alert['alert_type']}:{alert['scope']}:{self.day}:{self.settings.mode}"
        self.common = {"alert_date": self.day, "mode": self.settings.mode, "answer_id": answer_id, "incident_id": incident["id"],
                       "hold": hold}
        self.seq = seq
        self.intents: list[Intent] = []

    def intent(
        self, slot: str, kind: str, payload: Mapping[str, Any], parent_key: str | None = None, *, bound: bool = True, part: str = "",
        approval: Mapping[str, Any] | None = None,
    ) -> Intent:
        mode = self.settings.mode
        destination = chosen(slot, self.settings, mode)
        target = target_of(slot, self.settings, mode)
        part = part or str(self.seq)
        if destination == "local":
            main = kind in ("post", "create", "publish")
            name = slot if main else f"{slot}_{kind}"
            version = "" if part in ("1", "1.0") else f"_{part.replace('.', '_')}"
            target = f"{self.day}/{name}{version}"
        return Intent(
            identity=self.identity, slot=slot, destination=destination, kind=kind, target=target, payload=payload, part=part,
            parent_key=parent_key, bound=bound, approval=approval or {}, **self.common,
        )

    def add(self, slot: str, kind: str, payload: Mapping[str, Any], parent_key: str | None = None, *, bound: bool = True) -> Intent:
        self.intents.append(self.intent(slot, kind, payload, parent_key, bound=bound))
        return self.intents[-1]


def prove(pack: Pack, alert: Mapping[str, Any]) -> None:
    """Raises PackError unless the pack is whole and was built from this very alert result."""
    verify(pack)
    if not pack.is_of(alert):
        raise PackError(
            f"the pack of {pack.day} was built from another result than alert_logic holds now; "
            f"`retention-ops run --date {pack.day}` builds both again"
        )


def _chart(pack: Pack, alert: Mapping[str, Any]) -> dict[str, Any]:
    """The picture of the rule that leads."""
    if alert["alert_type"] == SHORTFALL and RETURNING_FILE in pack.manifest["files"]:
        return {"file": RETURNING_FILE, "title": f"Returning customers to {alert['alert_date']}"}
    return {"file": CHART_FILE, "title": f"AT_RISK % to {alert['alert_date']}"}


def brief_markdown(pack: Pack) -> str:
    return (pack.folder / f"briefing_{pack.severity}.md").read_text(encoding="utf-8")


