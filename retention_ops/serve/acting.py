"""The write tools: each puts a request into the ledger, submits it to Dagster through the one door, and says what came of it.

Settings are read anew for each call, so a changed mode counts at once. Whatever a call leaves half done (Dagster is down, the caller is
gone, the process is killed) stands in the ledger: the next write tool, `retention-ops actions work` or the daemon goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from retention_ops.clock import Clock, system_clock
from retention_ops.errors import LedgerError
from retention_ops.execute import asked, ledger, wording
from retention_ops.execute.destinations import SLOTS, chosen
from retention_ops.execute.destinations.choice import ASKED_SLOTS, RUN_SLOT
from retention_ops.execute.destinations.dagster import Dagster, Run
from retention_ops.execute.destinations.seam import DestinationError
from retention_ops.execute.door import HALTED
from retention_ops.execute.gate import PASSED, Decision
from retention_ops.execute.plan import EXPORTED_TIERS
from retention_ops.execute.respond import Responder, links_of
from retention_ops.log.database import answers
from retention_ops.package.audiences import Audience, audience_sha256
from retention_ops.package.pack import alert_version, canonical_sha256
from retention_ops.serve.answers import Exported, ExportedTo, Playbook, PlaybookAction, PriorityQueue
from retention_ops.serve.reading import Reader, no_orders
from retention_ops.serve.refusal import Refused
from retention_ops.settings import REAL_MODES, Settings

ASKED_AGAIN = "asked for before; no second run was started"


@dataclass(frozen=True)
class Proposal:
    """What triggering a playbook would do, and on which lists."""

    settings: Settings
    day: date
    severity: str
    version: str
    decision: Decision
    worksheets: list[dict[str, Any]]
    audience_sha256: str
    reading: str
    over: bool
    """nothing is left to do: what was done is told"""

    def question(self) -> str:
        """What a person confirms."""
        lists = ", ".join(f"{sheet['tier']} {sheet['rows']:,}" for sheet in self.worksheets)
        mode = self.settings.mode
        to = {slot: chosen(slot, self.settings, mode) for slot in SLOTS}
        leaves = "Nothing leaves this machine: it is rehearsed into the outbox." if mode == "shadow" else (
            "It goes out: " + ", ".join(f"{slot} to {name}" for slot, name in to.items()) + "."
        )
        return (
            f"Trigger the {self.severity} playbook for {self.day}? {self.reading}. Decision: {self.decision.verdict} "
            f"({self.decision.reason}). Mode {mode}. {leaves} Lists: {lists} customers (audience {self.audience_sha256[:12]})."
        )


class Actor:
    """Write tools of one home. `settings` reads them anew; `engine` is the ops database."""

    def __init__(self, settings: Callable[[], Settings], engine: Engine, reader: Reader, clock: Clock = system_clock):
        self._settings = settings
        self._engine = engine
        self._reader = reader
        self._clock = clock

    def settings(self) -> Settings:
        """As they are now."""
        return self._settings()

    def _responder(self, settings: Settings, caller: str) -> Responder:
        return Responder(
            self._reader.lake, self._engine, settings, caller, clock=self._clock, mode=lambda: self._settings().mode, patience=0)

    def request(self, key: str) -> ledger.Row | None:
        """The line in the ledger that a request's key names; what answers an alert is nobody's request."""
        with suppress(LedgerError):
            row = ledger.by_prefix(self._engine, key)
            return row if row["slot"] in ASKED_SLOTS else None
        return None

    # -- what every write tool does ------------------------------------------------------------------------------------

    def _deliver_waiting(self, settings: Settings, caller: str) -> None:
        """Submits the requests that found Dagster down."""
        door = self._responder(settings, caller).door
        for row in ledger.due(self._engine, self._clock()):
            if row["slot"] == RUN_SLOT and (row["kind"] == "build" or row["mode"] == settings.mode):
                door.deliver(row["key"])

    def _ask_for_run(self, settings: Settings, draft: asked.Draft, version: str, caller: str) -> tuple[ledger.Row, bool]:
        dagster = Dagster.connect(settings)
        row, known = asked.ask(self._engine, draft, version, self._clock(), caller, {}, spent=lambda row: _spent(dagster, row))
        if row["state"] in ledger.OPEN_STATES:
            row = self._responder(settings, caller).door.deliver(row["key"])
        return row, known

    def run(self, row: ledger.Row) -> Run | None:
        """The run of a submitted request; None where it was not submitted, or Dagster does not tell."""
        if row["slot"] != RUN_SLOT or row["state"] != ledger.SENT:
            return None
        with suppress(DestinationError):
            return Dagster.connect(self._settings()).run(row["external_id"])
        return None

    def _refuse_while_off(self, settings: Settings) -> None:
        if settings.mode == "off":
            raise Refused("The response is switched off (mode off).", "shadow, pilot or live", "RETENTION_OPS_MODE, set by a person")
        halted = ledger.read_state(self._engine, HALTED)
        if halted and halted["value"] == "yes":
            raise Refused(f"Everything is halted by {halted['by']}: {halted['why']}", "nothing leaves until it is resumed",
                          "`retention-ops actions resume --by NAME --why TEXT`, by a person")

    # -- build_priority_queue ------------------------------------------------------------------------------------------

    def build_queue(self, day: date, caller: str) -> tuple[ledger.Row, bool]:
        """Asks for the run that computes D's queue and pack."""
        settings, lake = self.settings(), self._reader.lake
        orders, customers, suppressions = lake.orders(), lake.customers(), lake.suppressions()
        if orders is None:
            raise no_orders(settings)
        if not orders.first_date <= day <= orders.complete_through:
            raise Refused(f"{day} has no complete orders.", f"{orders.first_date} to {orders.complete_through}",
                          f'build_priority_queue(date="{orders.complete_through}")')
        self._deliver_waiting(settings, caller)
        made_from = canonical_sha256([
            orders.version, customers.version if customers else "", suppressions.version if suppressions else "", settings.rules_sha256()])
        return self._ask_for_run(settings, asked.build_run(settings, day, caller), made_from[:16], caller)

    def queue_answer(self, day: date, row: ledger.Row, known: bool, run: Run | None) -> PriorityQueue:
        """The queue as it stands: counts as stored, and whether the run has replaced them."""
        status, message = _told(row, run)
        done = status == "done"
        tiers = self._reader.tiers(day) if done else None
        counts = {f"{tier.lower()}_count": tiers[tier] if tiers else None for tier in ("P1", "P2", "P3")}
        return PriorityQueue(
            date=day, status=status, **counts, total=sum(tiers.values()) if tiers else None, table_updated=done and tiers is not None,
            found_again=known, run_id=run.run_id if run else row["external_id"], run_url=row["external_url"], request=row["key"],
            message=f"{message} ({ASKED_AGAIN})" if known else message,
            next=f'generate_brief(date="{day}", format="markdown")' if done else _follow(row),
        )

    # -- trigger_playbook ----------------------------------------------------------------------------------------------

    def propose(self, day: date, severity: str, caller: str) -> Proposal:
        """What would be done; changes nothing. Raises Refused unless D's alert has this severity and the response is on."""
        settings = self.settings()
        alert = self._reader.alert_decision(day)
        look = f'get_alert_decision(date="{day}")'
        if not alert.alert_flag:
            held = f", held back by {alert.gate}" if alert.gate else ""
            raise Refused(f"{day} has no alert to answer: severity {alert.severity}{held}.", "flagged dates", look)
        if alert.severity != severity:
            raise Refused(f"The alert of {day} is {alert.severity}, not {severity}; nothing was triggered.", alert.severity, look)
        self._refuse_while_off(settings)
        responder = self._responder(settings, caller).on(day)
        row = responder.gatekeeper.alert(day)
        decision = replace(responder.gatekeeper, arms=False).decide(day)
        lists = responder.lists(day)
        worksheets = [
            {"title": f"{tier} {day}", "tier": tier, "file": lists[tier].file, "rows": lists[tier].rows, "excluded": lists[tier].excluded}
            for tier in EXPORTED_TIERS[severity]
        ]
        unfinished = any(each["state"] in ledger.OPEN_STATES for each in responder.actions(day))
        over = decision.verdict in ("skip", *PASSED, "snoozed") or (decision.verdict == "resume" and not unfinished)
        return Proposal(
            settings, day, severity, alert_version(row), decision, worksheets, audience_sha256(lists), wording.reading(row), over)

    def ask_for_response(self, proposal: Proposal, caller: str, confirmed: bool) -> tuple[ledger.Row, bool]:
        """Puts the request into the ledger; it waits for a person unless one has confirmed it here."""
        settings, day = proposal.settings, proposal.day
        self._deliver_waiting(settings, caller)
        draft = asked.response_run(settings, day, proposal.version, caller, proposal.worksheets, proposal.audience_sha256)
        version = f"{proposal.version[:16]}:{proposal.audience_sha256[:16]}:{proposal.decision.seq}"
        dagster = Dagster.connect(settings)
        row, known = asked.ask(self._engine, draft, version, self._clock(), caller, {}, spent=lambda row: _spent(dagster, row))
        known = known and row["state"] == ledger.SENT  # one that waited for this very person is triggered by them
        if confirmed and row["state"] == ledger.AWAITING:
            with suppress(LedgerError):  # another client's person was faster
                ledger.decide_approval(
                    self._engine, row["key"], True, proposal.audience_sha256, caller, "confirmed in the conversation", self._clock())
            row = ledger.by_prefix(self._engine, row["key"])
        if row["state"] in ledger.OPEN_STATES:
            row = self._responder(settings, caller).door.deliver(row["key"])
        return row, known

    def playbook_answer(self, proposal: Proposal, row: ledger.Row | None, known: bool, run: Run | None, caller: str) -> Playbook:
        """What the response did for D, from the ledger."""
        settings, day = proposal.settings, proposal.day
        responder = self._responder(settings, caller).on(day)
        rows = responder.actions(day)
        acted = [each for each in rows if each["state"] != ledger.CANCELLED]
        links = links_of(rows)
        ticket = next((each for each in acted if (each["slot"], each["kind"], each["state"]) == ("ticket", "create", ledger.SENT)), None)
        common: dict[str, Any] = {
            "date": day, "severity": proposal.severity, "mode": settings.mode,
            "incident": next((each["incident_id"] for each in rows if each["incident_id"]), None),
            "ticket_id": ticket["external_id"] if ticket else None, "ticket_url": links.get("ticket"), "message_url": links.get("message"),
            "actions": [PlaybookAction(action=f"{each['slot']} {each['kind']}", destination=each["destination"], state=each["state"],
                                       where=each["external_url"] or each["external_id"]) for each in acted],
        }
        if row is None:
            answered = proposal.decision.verdict == "resume"
            status = "already_triggered" if answered else "nothing_to_do"
            return Playbook(**common, status=status, message=_sentence(proposal.decision.reason))
        status, message = _told(row, run)
        if status == "pending_approval":
            return Playbook(
                **common, status=status, request=row["key"], how_to_approve=_how_to_approve(row["key"], proposal.audience_sha256),
                message="Nothing was triggered yet: a person has to approve it.", next=_follow(row))
        if status == "done":
            status, message = ("already_triggered" if known else "triggered"), _done_sentence(settings.mode, acted)
        return Playbook(
            **common, status=status, message=message, run_id=row["external_id"], run_url=row["external_url"], request=row["key"],
            next=None if status in ("triggered", "already_triggered") else _follow(row),
        )

    # -- export_audience -----------------------------------------------------------------------------------------------

    def plan_export(self, day: date, tier: str, to: str, limit: int, caller: str) -> tuple[Settings, Audience, str, list[ledger.Row]]:
        """Plans the hand-over of a tier's first `limit` customers who may be contacted; (settings, whole list, its hash, actions)."""
        settings = self.settings()
        self._refuse_while_off(settings)
        if self._reader.tiers(day) is None:
            raise Refused(f"The queue of {day} was not built.", "dates with a queue", f'build_priority_queue(date="{day}")')
        pack = self._reader.pack(day)
        responder = self._responder(settings, caller)
        alert, answer = responder.gatekeeper.alert(day), self._answer(settings, day)
        self._check_destination(settings, day, to, alert, answer)
        lists = responder.lists(day)
        audience, sha = lists[tier], audience_sha256(lists)
        if not audience.rows:
            left_out = ", ".join(f"{number:,} {reason}" for reason, number in audience.excluded.items()) or "the tier is empty"
            raise Refused(f"Nobody of {tier} may be contacted on {day}: {left_out}.", "another tier",
                          f'compare_dates(a="{day}", b="{day}") has the counts of the tiers')
        cut = audience.first(limit)
        asks = alert["severity"] == "CRITICAL" and settings.approval_above is not None and cut.rows > settings.approval_above \
            and settings.mode in REAL_MODES
        self._deliver_waiting(settings, caller)
        rows = []
        for each in ("csv", "gsheet") if to == "both" else (to,):
            draft = asked.export_list(settings, day, each, cut, sha, answer, asks)
            # a file lies in one build of the pack; the next build starts without it
            build = pack.folder.resolve().name if each == "csv" else ""
            limits = {"*": settings.max_messages_per_day}
            row, _ = asked.ask(self._engine, draft, f"{sha[:16]}:{build}", self._clock(), caller, limits)
            rows.append(row)
        return settings, audience, sha, rows

    def _answer(self, settings: Settings, day: date) -> dict[str, Any] | None:
        """The newest answer of D in this mode."""
        query = sa.select(answers).filter_by(alert_date=day, mode=settings.mode).order_by(answers.c.seq.desc()).limit(1)
        with self._engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        return dict(row) if row else None

    def _check_destination(self, settings: Settings, day: date, to: str, alert: dict[str, Any], answer: dict[str, Any] | None) -> None:
        real = settings.mode in REAL_MODES
        if real and to != "csv" and chosen("sheets", settings, settings.mode) == "local":
            raise Refused("No Google spreadsheet is configured (lists_to is local).", "csv",
                          "RETENTION_OPS_LISTS_TO=sheets, set by a person")
        if real and (answer is None or answer["incident_id"] is None):
            # whoever is handed over is kept in exposures, and those belong to an incident
            trigger = f'trigger_playbook(date="{day}", severity="{alert["severity"]}")'
            raise Refused(
                f"In mode {settings.mode} lists leave only for an incident, and {day} has none.", "dates whose playbook was triggered",
                trigger if alert["alert_flag"] else f'get_alert_decision(date="{day}")')

    def submit_export(self, settings: Settings, day: date, rows: list[ledger.Row], caller: str) -> ledger.Row | None:
        """Asks Dagster to deliver what may leave now; None where nothing waits."""
        keys = [row["key"] for row in rows if row["state"] in ledger.OPEN_STATES]
        if not keys:
            return None
        row, _ = self._ask_for_run(settings, asked.export_run(settings, day, keys, caller), "1", caller)
        return row

    def export_answer(
        self, settings: Settings, day: date, limit: int, audience: Audience, sha: str, keys: list[str], launched: ledger.Row | None,
        run: Run | None,
    ) -> Exported:
        """Where each list is, or what it waits for."""
        rows = [ledger.by_prefix(self._engine, key) for key in keys]
        exports = [self._exported(settings, row, launched, run) for row in rows]
        order = ("failed", "pending_approval", "pending", "running", "done")
        status = min((each.status for each in exports), key=order.index)
        waits = next((each for each in exports if each.status == "pending_approval"), None)
        return Exported(
            date=day, tier=audience.tier, mode=settings.mode, status=status,
            rows_exported=min(limit, audience.rows) if status == "done" else 0, limit=limit, total=audience.rows,
            truncated=audience.rows > limit, left_out=audience.excluded, audience_sha256=sha, exports=exports,
            run_id=launched["external_id"] if launched else None, run_url=launched["external_url"] if launched else None,
            how_to_approve=_how_to_approve(waits.request, sha) if waits else None,
            next=None if status in ("done", "failed") else _follow(launched or rows[0]),
        )

    def _exported(self, settings: Settings, row: ledger.Row, launched: ledger.Row | None, run: Run | None) -> ExportedTo:
        to = "csv" if row["kind"] == "export" else "gsheet"
        path = url = None
        if row["state"] == ledger.SENT:
            status, message = "done", "handed over"
            if to == "csv":
                path = str((settings.packs / str(row["alert_date"]) / row["detail"]["file"]).absolute())
            else:
                url = next(iter((row["detail"] or {}).get("links", {}).values()), row["external_url"])
            if settings.mode == "shadow":
                message = "rehearsed: nothing left this machine" if to == "gsheet" else "written; in shadow no hand-over is recorded"
        elif row["state"] == ledger.AWAITING:
            status, message = "pending_approval", "a person has to approve this list"
        elif row["state"] in ledger.OPEN_STATES:
            status, message = _told(launched, run) if launched else ("pending", "waits")
            status = "running" if status == "done" else status
        else:
            status, message = "failed", (row["last_error"] or row["state"].replace("_", " "))
        return ExportedTo(destination=to, status=status, path=path, url=url, request=row["key"], message=message)


def _spent(dagster: Dagster, row: ledger.Row) -> bool:
    """A submitted request whose run failed or is gone is asked for anew; one that cannot be looked at now stands."""
    try:
        run = dagster.run(row["external_id"])
    except DestinationError:
        return False
    return run is None or run.status in ("FAILURE", "CANCELED")


def _told(row: ledger.Row, run: Run | None) -> tuple[str, str]:
    """(status, message) of a request for a run."""
    match row["state"]:
        case ledger.AWAITING:
            return "pending_approval", "A person has to approve it."
        case ledger.SENT if run and run.status == "SUCCESS":
            return "done", "The run succeeded."
        case ledger.SENT if run and run.ended:
            return "failed", "The run failed; its page says where." if run.status == "FAILURE" else "The run was stopped."
        case ledger.SENT:
            return "running", "The run was submitted and is not over yet."
        case ledger.NEEDS_HUMAN | ledger.FAILED | ledger.CANCELLED:
            return "failed", f"{row['state'].replace('_', ' ').capitalize()}: {row['last_error'] or 'a person decided so'}"
    why = f" {row['last_error']}." if row["last_error"] else ""
    return "pending", f"Kept in the ledger and not lost.{why} It is submitted by the next write tool, by `retention-ops actions work` or " \
        "by the daemon, once Dagster answers."


def _follow(row: ledger.Row) -> str:
    """The call that says how a request goes on."""
    return f'get_run_status(run_id="{row["external_id"] or row["key"]}")'


def _how_to_approve(key: str, sha: str) -> str:
    return f"retention-ops actions approve {key[:12]} --audience {sha[:12]} --by NAME --now"


def _done_sentence(mode: str, rows: list[ledger.Row]) -> str:
    states = {row["state"] for row in rows}
    where = "rehearsed into the outbox, nothing left this machine" if mode == "shadow" else "sent"
    waiting = sorted(f"{row['slot']} {row['kind']} {row['state'].replace('_', ' ')}" for row in rows if row["state"] != ledger.SENT)
    if states <= {ledger.SENT}:
        return f"Playbook triggered: {len(rows)} actions {where}."
    return f"Playbook triggered; not everything is done: {', '.join(waiting)}."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
