"""What happens after an alert: gate, plan, deliver, record. Sensor, schedule and command line all come through here.

`gate` only reads. `plan` writes the decision and every intended action in one transaction. `deliver` moves actions through the
door. `record` adds the ops_runs_log row, whatever happened. Any of them may be killed and run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from retention_ops.clock import Clock, system_clock
from retention_ops.detect.alerts import AT_RISK
from retention_ops.errors import LedgerError, PackError, RetentionOpsError
from retention_ops.execute import hold, incidents, ledger, withdrawals, wording
from retention_ops.execute.destinations import SLOTS, Destinations, chosen, target_of
from retention_ops.execute.destinations.choice import (
    ASKED_SLOTS,
    BUILD,
    EXPORT_SLOT,
    HEARTBEAT_SLOT,
    QUIET_SLOTS,
    RUN_SLOT,
    WITHDRAW,
    WITHDRAWAL_SLOT,
)
from retention_ops.execute.destinations.seam import Destination, Table
from retention_ops.execute.door import Content, Door, ListChanged, Obsolete
from retention_ops.execute.gate import Decision, Gate
from retention_ops.execute.ledger import Intent
from retention_ops.execute.plan import Draft, Planner
from retention_ops.execute.redact import redact
from retention_ops.log import exposures, runs
from retention_ops.log.database import answers, lock_responses
from retention_ops.package.audiences import TIERS, Audience, allowed_table, audience_sha256
from retention_ops.package.brief import CHART_FILE, CHART_FILES, with_cids
from retention_ops.package.pack import alert_version, current_audiences, find_pack, records
from retention_ops.settings import REAL_MODES, TRIAL, Secrets, Settings
from retention_ops.warehouse.seam import Warehouse

APART = (*ASKED_SLOTS, *QUIET_SLOTS)
"""slots of actions that answer no alert: none waits for them, and no row of the log is about them"""
LIST_CHANGES = 3
"""a list that changes that often while it is handed over waits for the next run"""
MOVES = ("key", "state", "attempts", "looked_up", "last_error")
"""what tells that a follow-up changed something about an action"""
PATIENCE_SECONDS = 20.0


@dataclass
class Responder:
    """Everything a response needs. `mode` is read anew before each send, so switching off stops what is under way."""

    lake: Warehouse
    engine: Engine
    settings: Settings
    run_id: str
    clock: Clock = system_clock
    secrets: Secrets = field(default_factory=Secrets)
    mode: Callable[[], str] | None = None
    destinations: Callable[[str, str], Destination] | None = None
    patience: float = PATIENCE_SECONDS
    sleep: Callable[[float], None] = time.sleep
    checkpoint: Callable[[str, ledger.Row], None] = lambda step, row: None
    reconciling: bool = False
    """decides as the mode says although the ledger is held: only to find out what a lost installation did; nothing leaves even so"""

    def __post_init__(self) -> None:
        if self.settings.mode in REAL_MODES and not self.reconciling and hold.why_held(self.engine):
            self.settings = self.settings.model_copy(update={"mode": "shadow"})
            self.mode = lambda: "shadow"
        self.gatekeeper = Gate(self.lake, self.engine, self.settings, self.clock)
        self.planner = Planner(self.lake, self.engine, self.settings, self.clock, self.run_id, self.gatekeeper)
        connect = self.destinations or Destinations(self.settings, self.secrets, self.clock)
        self.door = Door(
            engine=self.engine, destination=lambda row: connect(row["destination"], row["mode"]),
            mode=self.mode or (lambda: self.settings.mode), load=self._load, bind=self._bind, recorded=self._recorded,
            clock=self.clock, lease_seconds=self.settings.lease_seconds, hidden=self.secrets.values, sleep=self.sleep,
            checkpoint=self.checkpoint,
        )

    # -- who answers ---------------------------------------------------------------------------------------------------

    def trial(self) -> Responder:
        """The same for the rule in its pilot period: test targets, and incidents of its own."""
        now = self.mode or (lambda: self.settings.mode)
        return replace(
            self, settings=self.settings.model_copy(update={"mode": TRIAL}), mode=lambda: TRIAL if now() == "live" else now(),
        )

    def known(self, first: date, last: date) -> list[dict[str, Any]]:
        """alert_logic of a range in one look, for `on` and `gatekeeper.alert`."""
        return records(self.lake.read_range("alert_logic", first, last))

    def on(self, day: date, known: Sequence[Mapping[str, Any]] = ()) -> Responder:
        """Who answers D: this one, or its trial where D concerns nothing but the rule in its pilot period."""
        if self.settings.mode != "live" or not replace(self.gatekeeper, arms=False).on_trial():
            return self
        trial = self.trial()
        looks = [replace(each.gatekeeper, arms=False) for each in (self, trial)]
        try:
            mine, theirs = (look.concerns(day, look.alert(day, known)) for look in looks)
        except Exception:  # unreadable or missing: said where it is answered
            return self
        return trial if theirs and not mine else self

    # -- the whole answer ----------------------------------------------------------------------------------------------

    def answer(self, day: date) -> dict[str, Any]:
        """Answers one date and returns its ops_runs_log row; a failed answer is logged, never raised."""
        started, decision, problem = time.monotonic(), None, ""
        try:
            decision = self.plan(self.gate(day), day)
            for slot in SLOTS:
                self.deliver(day, slot)
            self.link(day)
        except Exception as error:
            problem = self.text(error)
        return self.record(day, decision, problem, started)

    def gate(self, day: date) -> Decision:
        """What to do about D; changes nothing but, once, the date from which the response is armed."""
        return self.gatekeeper.decide(day)

    def plan(self, decision: Decision, day: date) -> Decision:
        """Writes decision and intents; see Planner.write."""
        return self.planner.write(decision, day)

    def preview(self, day: date) -> tuple[Decision, list[Intent]]:
        """What an answer would decide and do; nothing is planned or sent (a missing Action Pack is built)."""
        gate = replace(self.gatekeeper, arms=False)
        decision = gate.decide(day)
        return decision, replace(self.planner, gate=gate).preview(decision, day)

    def text(self, error: Exception) -> str:
        """An error as the log may keep it."""
        name = "" if isinstance(error, RetentionOpsError) else f"{type(error).__name__}: "
        return redact(f"{name}{error}", self.secrets.values())[:1000]

    # -- deliver -------------------------------------------------------------------------------------------------------

    def deliver(self, day: date, slot: str) -> list[ledger.Row]:
        """Moves D's actions of one slot as far as they go now; returns them."""
        rows = [self._deliver(row) for row in self.actions(day, slot)]
        if slot == "webhook" and any(row["state"] == ledger.FAILED for row in rows):
            rows += self._mail_instead(day, [row for row in rows if row["state"] == ledger.FAILED])
        return rows

    def actions(self, day: date, slot: str | None = None) -> list[ledger.Row]:
        """What answers D in this mode, in the order it was planned."""
        where = {"slot": slot} if slot else {}
        found = ledger.find(self.engine, alert_date=day, mode=self.settings.mode, **where)
        return found if slot else [row for row in found if row["slot"] not in APART]

    def _deliver(self, row: ledger.Row) -> ledger.Row:
        if row["slot"] != "sheets":
            return self.door.deliver(row["key"], self.patience) if row["state"] in ledger.OPEN_STATES else row
        for _ in range(LIST_CHANGES):
            row = self._refreshed(row)
            if row["state"] not in ledger.OPEN_STATES:
                return row
            row = self.door.deliver(row["key"], self.patience)
            if row["state"] != ledger.PLANNED or row["not_before"]:
                return row
        return row

    def _refreshed(self, row: ledger.Row) -> ledger.Row:
        """Consent, suppressions and earlier hand-overs are read again: a list that changed is planned anew, its approval void.

        Both happen in one transaction, so that no list is lost between them.
        """
        if row["state"] not in (ledger.PLANNED, ledger.AWAITING):
            return row
        sha = audience_sha256(self.lists(row["alert_date"]))
        alert = self.gatekeeper.alert(row["alert_date"])
        if sha == row["payload"]["audience_sha256"] or not alert["alert_flag"]:
            return row
        pack, now = self.planner.pack(row["alert_date"], alert), self.clock()
        with self.engine.begin() as connection:
            lock_responses(connection)
            if not ledger.supersede(connection, row["key"], f"the list changed to {sha[:12]} before it left", now, self.run_id):
                return ledger.get(connection, row["key"])
            seq = connection.execute(sa.select(answers.c.seq).where(answers.c.id == row["answer_id"])).scalar_one()
            before = connection.execute(
                sa.select(sa.func.count()).select_from(ledger.actions)
                .where(ledger.actions.c.answer_id == row["answer_id"], ledger.actions.c.slot == "sheets")
            ).scalar_one()
            intent = self.planner.handover(pack, alert, row["incident_id"], row["answer_id"], f"{seq}.{before}")
            (key,) = ledger.plan(connection, [intent], now, self.run_id, {"*": self.settings.max_messages_per_day})
            return ledger.get(connection, key)

    def _mail_instead(self, day: date, failed: Sequence[ledger.Row]) -> list[ledger.Row]:
        """The backup: a mail where the webhook failed for good."""
        if chosen("mail", self.settings, self.settings.mode) == "local":
            return []
        alert = self.gatekeeper.alert(day)
        pack = find_pack(self.settings, day)
        html = (pack.folder / "briefing.html").read_text(encoding="utf-8") if pack else ""
        keys = []
        with self.engine.begin() as connection:
            for row in failed:
                intent = Intent(
                    identity=f"webhook:{row['key']}", slot="mail", destination="mail", kind="mail",
                    target=target_of("mail", self.settings, self.settings.mode), alert_date=day, mode=row["mode"],
                    answer_id=row["answer_id"], incident_id=row["incident_id"], payload={
                        "subject": wording.title(alert) if alert["alert_flag"] else f"Retention: {row['payload']['event']} {day}",
                        "text": row["payload"].get("brief_markdown") or json.dumps(row["payload"]["metrics"], indent=1),
                        "html": with_cids(html, pack.folder) if pack and alert["alert_flag"] else "",
                    },
                )
                if ledger.get(connection, intent.key) is None:  # a pack built again words it differently; the first mail stands
                    ledger.plan(connection, [intent], self.clock(), self.run_id, {"*": self.settings.max_messages_per_day})
                keys.append(intent.key)
        return [self.door.deliver(key, self.patience) for key in keys]

    def link(self, day: date) -> None:
        """Adds the ticket and the sheets to D's Slack message once they exist: the first post, or the newest thread reply."""
        rows = self.actions(day)
        told = [row for row in rows if row["slot"] == "slack" and row["kind"] in ("post", "reply") and row["answer_id"]]
        post = next((row for row in reversed(told) if row["state"] == ledger.SENT), None)
        links = {name: url for name, url in links_of(rows).items() if name != "message"}
        if post is None or post["destination"] == "local" or not links:
            return
        payload = {name: post["payload"][name] for name in ("text", "blocks")}
        intent = Intent(
            identity=f"slack:{post['key']}", slot="slack", destination="slack", kind="update", target=post["target"],
            payload=wording.slack_with_context(payload, wording.slack_links(links)), alert_date=day, mode=post["mode"],
            part=ledger.digest(links)[:16], answer_id=post["answer_id"], incident_id=post["incident_id"], parent_key=post["key"],
        )
        with self.engine.begin() as connection:
            for older in told_again(rows, post["key"], intent.key):
                ledger.supersede(connection, older, "newer links", self.clock(), self.run_id)
            keys = ledger.plan(connection, [intent], self.clock(), self.run_id, {})
        for key in keys:
            self.door.deliver(key, self.patience)

    # -- what the door asks for ----------------------------------------------------------------------------------------

    def lists(self, day: date) -> dict[str, Audience]:
        """Who may be contacted for D, by what is known at this moment."""
        return current_audiences(self.lake, day, exposures.handed_over_around(self.engine, day, self.settings.handover_cooldown_days))

    def _load(self, row: ledger.Row) -> Content:
        """Files and lists, read now: nobody who said no since the list was planned is on it."""
        day = row["alert_date"]
        if row["slot"] == WITHDRAWAL_SLOT:
            return Content()
        if row["slot"] in QUIET_SLOTS:
            self._still_news(row)
            return Content()
        self._still_wanted(row)
        if row["slot"] in ASKED_SLOTS:
            return self._asked_for(row)
        if row["slot"] == "sheets":
            lists = self.lists(day)
            if audience_sha256(lists) != row["payload"]["audience_sha256"]:
                raise ListChanged(f"the list of {day} changed since it was planned")
            if row["destination"] == "local" and self._files(day) != row["payload"]["audience_sha256"]:
                raise ListChanged(f"the list files of {day} are not those that were planned")
            leaving = self.remember_lists(row, lists)
            if row["destination"] == "local":
                return Content()
            return Content(tables={title: Table(*map(tuple, allowed_table(lists[tier], "sheets"))) for tier, title in leaving.items()})
        if row["kind"] in ("chart", "mail") and row["destination"] != "local":
            pack = find_pack(self.settings, day)
            if pack:
                return Content(files={name: (pack.folder / name).read_bytes() for name in _pictures(row) if (pack.folder / name).is_file()})
            if row["kind"] == "chart":
                raise PackError(f"the Action Pack of {day} is gone, and its chart with it; `retention-ops run --date {day}` builds it")
        return Content()

    def _asked_for(self, row: ledger.Row) -> Content:
        """What was asked for names the lists it was shown; where they changed since, it has to be asked for again."""
        payload, day = row["payload"], row["alert_date"]
        if "audience_sha256" not in payload:
            return Content()
        lists = self.lists(day)
        if audience_sha256(lists) != payload["audience_sha256"]:
            raise Obsolete(f"the lists of {day} changed since it was asked for; ask again")
        if row["slot"] == RUN_SLOT:
            return Content()
        (sheet,) = payload["worksheets"]
        cut = lists[sheet["tier"]].first(sheet["rows"])
        self._remember(row, {sheet["tier"]: cut})
        if row["kind"] == "export":
            return Content(files={sheet["file"]: cut.csv.encode()})
        if row["destination"] == "local":
            return Content()
        return Content(tables={sheet["title"]: Table(*map(tuple, allowed_table(cut, row["destination"])))})

    def _files(self, day: date) -> str:
        """The hash of the list files in D's pack, which are what `local` hands over; built anew where another mode replaced them."""
        return self.planner.pack(day, self.gatekeeper.alert(day)).manifest["audience_sha256"]

    def _still_wanted(self, row: ledger.Row) -> None:
        """Raises Obsolete where the alert was retracted, its incident judged no alarm, or its date has become history."""
        with self.engine.connect() as connection:
            newest = connection.execute(
                sa.select(answers.c.id, answers.c.verdict)
                .where(answers.c.alert_date == row["alert_date"], answers.c.mode == row["mode"]).order_by(answers.c.seq.desc()).limit(1)
            ).first()
            incident = incidents.get(connection, row["incident_id"]) if row["incident_id"] else None
        if newest and newest.verdict == "retract" and row["answer_id"] not in (None, newest.id):
            raise Obsolete(f"{row['alert_date']} was retracted")
        if incident and incident["verdict"] in ("data", "false"):
            raise Obsolete(f"incident {incident['id']} was judged {incident['verdict']}")
        if row["mode"] in REAL_MODES and row["kind"] != "update":
            oldest = self.gatekeeper.today() - timedelta(days=self.settings.max_alert_age_days)
            if row["alert_date"] < oldest and row["answer_id"]:
                raise Obsolete(f"{row['alert_date']} is older than {self.settings.max_alert_age_days} days (max_alert_age_days)")

    def _still_news(self, row: ledger.Row) -> None:
        """Raises Obsolete where a quiet morning's word waited until the next one: an old heartbeat would vouch for a dead loop."""
        last_day = row["payload"].get("last_day")
        if last_day and self.gatekeeper.today() > date.fromisoformat(last_day):
            what = "heartbeat" if row["slot"] == HEARTBEAT_SLOT else "digest"
            raise Obsolete(f"the next {what} is due by now")

    def remember_lists(self, row: ledger.Row, lists: Mapping[str, Audience]) -> dict[str, str]:
        """Keeps who a hand-over of `lists` names until it is recorded; tier -> title of the worksheets that leave."""
        leaving = {sheet["tier"]: sheet["title"] for sheet in row["payload"]["worksheets"]}
        self._remember(row, {tier: lists[tier] for tier in leaving})
        return leaving

    def _remember(self, row: ledger.Row, lists: Mapping[str, Audience]) -> None:
        """Keeps who is handed over until it is recorded, so that a kill after sending forgets nobody."""
        if row["mode"] in REAL_MODES:
            arms = {tier: {exposures.TREATED: list(a.treated_ids), exposures.HOLDOUT: list(a.holdout_ids)} for tier, a in lists.items()}
            exposures.remember(self.engine, row["key"], arms)

    def _recorded(self, connection: Connection, row: ledger.Row) -> None:
        """In the transaction that records a hand-over: every customer of it, treated or held out."""
        if row["slot"] not in ("sheets", EXPORT_SLOT) or row["mode"] not in REAL_MODES or row["incident_id"] is None:
            return
        remembered = exposures.take_remembered(connection, row["key"])
        if remembered is None:
            raise LedgerError(f"action {row['key'][:12]} never left, so nobody was handed over; retry or cancel it")
        arms = {
            customer: (tier, arm) for tier, by_arm in remembered.items() for arm, ids in by_arm.items() for customer in ids
        }
        exposures.record(connection, row["incident_id"], row["alert_date"], row["key"], arms, self.clock())

    def _bind(self, row: ledger.Row) -> Mapping[str, Any]:
        """The final content just before the first attempt: nobody who opted out since is named; the webhook learns the links."""
        row = {**row, "payload": self._renewed(row)}
        if row["slot"] != "webhook":
            return row["payload"]
        rows = [other for other in self.actions(row["alert_date"]) if other["answer_id"] == row["answer_id"]]
        sheets = next((other for other in rows if other["slot"] == "sheets" and other["state"] != ledger.CANCELLED), None)
        urls = dict(row["payload"].get("export_urls", {}))
        if sheets and sheets["state"] == ledger.SENT and sheets["detail"] and "links" in sheets["detail"]:
            urls = {tier: sheets["detail"]["links"].get(f"{tier} {row['alert_date']}", file) for tier, file in urls.items()}
        elif sheets and sheets["state"] == ledger.AWAITING:
            urls = {}
        links = links_of(rows)
        found = {f"{name}_url": links[name] for name in ("ticket", "message") if name in links}
        return {**row["payload"], "export_urls": urls, **found}

    def _renewed(self, row: ledger.Row) -> Mapping[str, Any]:
        """The content from D's pack as it is now; as planned where the result itself has changed, which has its own answer."""
        alert, payload = self.gatekeeper.alert(row["alert_date"]), row["payload"]
        with self.engine.connect() as connection:
            answer = connection.execute(sa.select(answers).where(answers.c.id == row["answer_id"])).mappings().first()
            incident = incidents.get(connection, row["incident_id"])
        if answer is None or answer["version"] != alert_version(alert):
            return payload
        try:
            pack = self.planner.pack(row["alert_date"], alert)
        except RetentionOpsError:
            return payload  # the pack cannot be built again now; what was planned is still true
        match row["slot"]:
            case "slack":
                return self.planner.message(pack, incident, alert, payload["note"])
            case "ticket":
                return self.planner.ticket(pack, incident, alert, payload["note"])
        return self.planner.webhook(pack, alert, incident, payload["event"])

    # -- record --------------------------------------------------------------------------------------------------------

    def record(self, day: date, decision: Decision | None, problem: str = "", started: float | None = None) -> dict[str, Any]:
        """The ops_runs_log row of this run for D, and one for each date its answer stands for."""
        alert = self._alert_or_blank(day)
        rows = self.actions(day)
        for covered in decision.covers if decision else ():
            if decision.acts or not self._logged(covered):
                self._append(self._alert_or_blank(covered), "skipped", wording.covered_by(day), [], started)
        verdict = decision.verdict if decision else "skip"
        acted = [row for row in rows if decision is None or decision.acts or verdict == "resume"]
        troubles = [_trouble(row) for row in acted if row["state"] not in (ledger.SENT, ledger.CANCELLED, ledger.AWAITING)]
        troubles += [_trouble(row) for row in acted if row["state"] == ledger.CANCELLED and row["last_error"]]
        waits = [_trouble(row) for row in acted if row["state"] == ledger.AWAITING]
        if problem or (troubles and not _backed_up(acted)):
            return self._append(alert, "failed", "; ".join([problem] if problem else troubles), acted, started)
        if decision and decision.acts:
            return self._append(alert, "success", "; ".join(waits + troubles) or None, acted, started)
        if verdict == "resume" and acted and not self._succeeded(day):  # what another run began ends here
            return self._append(alert, "success", "; ".join([f"finished: {decision.reason}", *waits]), acted, started)
        reason = decision.reason if decision else "followed up"
        return self._append(alert, "success" if decision is None else "skipped", "; ".join([reason, *waits]), acted, started)

    def _succeeded(self, day: date) -> bool:
        found = runs.rows(self.engine, first=day, last=day)
        return any(row["mode"] == self.settings.mode and row["status"] == "success" for row in found)

    def _logged(self, day: date) -> bool:
        return any(row["mode"] == self.settings.mode for row in runs.rows(self.engine, first=day, last=day))

    def _alert_or_blank(self, day: date) -> dict[str, Any]:
        """The alert row, or the least the log needs where it is missing."""
        try:
            return self.gatekeeper.alert(day)
        except Exception:
            return {"alert_date": day.isoformat(), "alert_type": AT_RISK, "severity": "INFO", "alert_flag": False,
                    "current_value": None, "baseline_value": None, "delta_relative_pct": None, "sample_size": 0}

    def _append(
        self, alert: Mapping[str, Any], status: str, message: str | None, rows: Sequence[ledger.Row], started: float | None
    ) -> dict[str, Any]:
        day = date.fromisoformat(alert["alert_date"])
        try:
            pack = find_pack(self.settings, day)
        except PackError:
            pack = None
        counts = {tier: pack.manifest["audiences"][tier]["listed"] for tier in TIERS} if pack else {}
        sent = [row for row in rows if row["state"] == ledger.SENT]
        sheets = next((row for row in reversed(sent) if row["slot"] == "sheets"), None)
        exports = {sheet["tier"]: sheet for sheet in sheets["payload"]["worksheets"]} if sheets else {}
        urls = (sheets["detail"] or {}).get("links", {}) if sheets else {}
        message_ts, ticket = _message_ts(sent), _ticket_id(sent)
        return runs.append(self.engine, {
            "run_id": self.run_id,
            "run_timestamp": self.clock(),
            "alert_date": day,
            **{name: alert[name] for name in (
                "alert_type", "severity", "alert_flag", "current_value", "baseline_value", "delta_relative_pct", "sample_size")},
            **{f"{tier.lower()}_count": counts.get(tier) for tier in TIERS},
            "total_exported": sum(sheet["rows"] for sheet in exports.values()) if self.settings.mode in REAL_MODES else 0,
            "slack_posted": message_ts is not None,
            "slack_message_ts": message_ts,
            "ticket_id": ticket,
            **{f"export_{tier.lower()}_link": urls.get(exports[tier]["title"], exports[tier]["file"]) if tier in exports else None
               for tier in TIERS},
            "status": status,
            "error_message": redact(message, self.secrets.values())[:2000] if message else None,
            "execution_time_ms": round((time.monotonic() - started) * 1000) if started else 0,
            "mode": self.settings.mode,
            "facts_sha256": pack.facts_sha256 if pack else None,
            "audience_sha256": pack.manifest["audience_sha256"] if pack else None,
        })

    # -- lists that must go --------------------------------------------------------------------------------------------

    def withdraw(self, intents: Sequence[Intent]) -> list[ledger.Row]:
        """Deletes worksheets of ours, whatever the mode; returns the actions, also those of earlier calls that are still open."""
        with self.engine.begin() as connection:
            lock_responses(connection)
            keys = ledger.plan(connection, intents, self.clock(), self.run_id, {})
        waiting = ledger.find(self.engine, slot=WITHDRAWAL_SLOT, state=ledger.OPEN_STATES)
        for key in dict.fromkeys([*keys, *(row["key"] for row in waiting)]):
            self.door.deliver(key)
        return [row for row in ledger.find(self.engine, slot=WITHDRAWAL_SLOT) if row["key"] in {*keys, *(each["key"] for each in waiting)}]

    def expire_lists(self) -> list[ledger.Row]:
        """Deletes worksheets that were published more than sheets_keep_days ago."""
        oldest = self.clock() - timedelta(days=self.settings.sheets_keep_days)
        return self.withdraw(withdrawals.expired(self.engine, oldest))

    # -- what time brings ----------------------------------------------------------------------------------------------

    def work(self, grace_seconds: float = 0) -> list[dict[str, Any]]:
        """Does what is due: missed acknowledgements, waiting and unknown actions. Returns the log rows of the dates it moved."""
        moved = self.trial().work(grace_seconds) if self.settings.mode == "live" else []
        return [*moved, *self._work(grace_seconds)]

    def _work(self, grace_seconds: float) -> list[dict[str, Any]]:
        self._escalate_overdue()
        touched: dict[date, None] = {}
        problems: dict[date, str] = {}
        for row in ledger.due(self.engine, self.clock(), grace_seconds):
            if row["mode"] != self.settings.mode and (row["kind"] not in (BUILD, WITHDRAW) or self.settings.mode == TRIAL):
                continue
            before = [row[name] for name in MOVES]
            try:
                done = self._deliver(row)
            except Exception as error:  # one that cannot be moved must not hold up the others
                problems[row["alert_date"]] = self.text(error)
                continue
            if row["slot"] in APART:
                continue  # no answer to an alert, so no row of the log
            if [done[name] for name in MOVES] != before and not switched_off(done):
                touched[row["alert_date"]] = None
        written = []
        for day in dict.fromkeys([*touched, *problems]):
            problem = problems.get(day, "")
            try:
                for slot in SLOTS:  # what waited for an action that went out just now
                    self.deliver(day, slot)
                self.link(day)
            except Exception as error:
                problem = self.text(error)
            written.append(self.record(day, None, problem))
        return written

    def _escalate_overdue(self) -> None:
        """Tells the backup once about an incident nobody acknowledged in time."""
        if self.settings.mode not in REAL_MODES:
            return
        for incident in incidents.overdue(self.engine, self.settings.mode, self.clock()):
            with self.engine.begin() as connection:
                lock_responses(connection)
                fresh = incidents.get(connection, incident["id"])
                if fresh["escalated_at"] or fresh["acked_at"] or fresh["state"] != "open":
                    continue
                now = self.clock()
                incidents.change(connection, fresh["id"], now, self.run_id, "not acknowledged in time", escalated_at=now)
                intents = self._unacknowledged(connection, fresh)
                ledger.plan(connection, intents, now, self.run_id, {"*": self.settings.max_messages_per_day})

    def _unacknowledged(self, connection: Connection, incident: dict[str, Any]) -> list[Intent]:
        text = wording.sentence("unacknowledged", {"alert_type": AT_RISK, "alert_date": "", "current_value": None}, incident, None)
        plan = Draft(self.settings, {"alert_date": incident["last_flagged_on"].isoformat()}, incident, 0, None, "",
                      identity=f"incident:{incident['id']}:{incident['ack_by'].isoformat()}")
        posted = self.planner.first(connection, incident["id"], "slack", "post")
        ticket = self.planner.first(connection, incident["id"], "ticket", "create")
        to = incident["backup_owner"] or incident["owner"]
        said = {**wording.slack_sentence(text, f"{wording.person(to)}: " if to else ""), "broadcast": False}
        if posted:
            plan.add("slack", "reply", said, posted["key"])
        else:  # the alarm itself never arrived: all the more reason to say something
            plan.add("slack", "post", said)
        if ticket:
            plan.add("ticket", "comment", {"text": text}, ticket["key"])
        return plan.intents


def _pictures(row: ledger.Row) -> list[str]:
    """The pack's pictures that a message carries: the chart its payload names, or those its mail shows."""
    if row["kind"] == "chart":
        return [name for name in CHART_FILES if name == row["payload"].get("file", CHART_FILE)]
    html = row["payload"].get("html")
    return [name for name in CHART_FILES if f"cid:{name}" in html] if html else [CHART_FILE]


def switched_off(row: ledger.Row) -> bool:
    """A person stopped it: that is no failure, and nothing to log for the date."""
    return row["state"] == ledger.PLANNED and (row["last_error"] or "").startswith((f"{wording.HALTED_BY} ", f"{wording.THE_MODE} "))


def told_again(rows: Sequence[ledger.Row], parent_key: str, newest: str) -> list[str]:
    """Waiting updates of a message that a newer one makes superfluous."""
    return [row["key"] for row in rows if row["kind"] == "update" and row["parent_key"] == parent_key
            and row["key"] != newest and row["state"] == ledger.PLANNED]


def links_of(rows: Sequence[ledger.Row]) -> dict[str, str]:
    """Where an answer's message, ticket and sheets are: name -> address."""
    found: dict[str, str] = {}
    for row in rows:
        if row["state"] != ledger.SENT or row["destination"] == "local":
            continue
        if row["slot"] == "sheets":
            found |= {title: url for title, url in (row["detail"] or {}).get("links", {}).items() if url}
        elif row["external_url"] and row["kind"] in ("post", "create"):
            name = {"slack": "message", "ticket": "ticket"}.get(row["slot"])
            found |= {name: row["external_url"]} if name else {}
    return found


def _trouble(row: ledger.Row) -> str:
    why = f" ({row['last_error']})" if row["last_error"] else ""
    return f"{row['slot']} {row['kind']} {row['state'].replace('_', ' ')}{why}"


def _backed_up(rows: Sequence[ledger.Row]) -> bool:
    """The only thing that failed is the webhook, and the mail in its place went out."""
    open_ends = [row for row in rows if row["state"] not in (ledger.SENT, ledger.CANCELLED, ledger.AWAITING)]
    mailed = any(row["slot"] == "mail" and row["state"] == ledger.SENT for row in rows)
    return bool(open_ends) and mailed and all(row["slot"] == "webhook" and row["state"] == ledger.FAILED for row in open_ends)


def _message_ts(sent: Sequence[ledger.Row]) -> str | None:
    """Our own Slack message, or the one the webhook's answer says it posted."""
    for row in sent:
        if row["destination"] == "slack" and row["kind"] in ("post", "reply"):
            return row["external_id"]
    return next((row["detail"]["slack_ts"] for row in sent if row["slot"] == "webhook" and (row["detail"] or {}).get("slack_ts")), None)


def _ticket_id(sent: Sequence[ledger.Row]) -> str | None:
    for row in sent:
        if row["slot"] == "ticket" and row["destination"] != "local" and row["kind"] == "create":
            return row["external_id"]
    return next((row["detail"]["ticket_id"] for row in sent if row["slot"] == "webhook" and (row["detail"] or {}).get("ticket_id")), None)
