"""The gate: what to do about one date, from its alert row, what was answered before, the mode and today's date. It only reads.

Identity of an alert is its date (and scope) within a mode, whichever rules flag it: two that fire on one date are one matter. Its
version is a hash of the result. The same version again: nothing. Another one: update, escalation or retraction. What is older than the
response itself is history.

A rule in its pilot period is answered in the mode `trial` while the others are live: as in pilot, beside them, with its own incidents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import cached_property
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from retention_ops.clock import Clock, shop_day
from retention_ops.detect.alerts import AT_RISK, RANK, SHORTFALL, alerts_by_day, answered_rules
from retention_ops.errors import PackError
from retention_ops.execute import incidents, ledger, wording
from retention_ops.log.database import answers
from retention_ops.log.runs import ANSWERED_ALREADY
from retention_ops.package.pack import alert_version, records, versions_of
from retention_ops.settings import REAL_MODES, TEST_MODES, TRIAL, Settings
from retention_ops.warehouse.freshness import Changes
from retention_ops.warehouse.seam import Warehouse

ACTED = ("open", "update", "escalate")
"""verdicts that told people about an alert"""
PASSED = ("history", "covered")
"""verdicts that logged a flagged date and told nobody"""
ARMED = "armed"
UPGRADED = "upgraded:"
ARMED_SHORTFALL = f"armed:{SHORTFALL}"

Verdict = Literal["open", "update", "escalate", "retract", "resolve", "history", "covered", "snoozed", "resume", "skip"]


@dataclass(frozen=True)
class Decision:
    """What to do about one date, and why, as a sentence for people and the log."""

    verdict: Verdict
    reason: str
    version: str = ""
    severity: str = "INFO"
    seq: int = 0
    """number of the newest answer of this date when the decision was taken"""
    covers: tuple[date, ...] = ()
    """earlier flagged dates nobody was told about, which this answer stands for"""
    made_from: Mapping[str, Any] = field(default_factory=dict)
    """provenance of the alert rows decided on, and under `rows` what identifies each"""

    @property
    def acts(self) -> bool:
        return self.verdict in (*ACTED, "retract", "resolve")


@dataclass(frozen=True)
class Gate:
    """Decides for one installation at the moment its clock says."""

    lake: Warehouse
    engine: Engine
    settings: Settings
    clock: Clock
    arms: bool = True
    """false for a preview, which must not start the response's history"""
    one_by_one: bool = False
    """answers a date though a newer one is flagged: how mornings that are lost were answered, when they are gone through again"""

    @cached_property
    def rules(self) -> tuple[str, ...]:
        """The rules answered in this mode: in trial the one on trial, in live the others meanwhile. Asked once: it may be asked for
        inside a transaction, and a run does not change its mind."""
        if self.settings.mode == TRIAL:
            return (SHORTFALL,)
        return (AT_RISK,) if self.on_trial() else answered_rules(self.settings)

    def on_trial(self) -> bool:
        """Whether the shortfall is still in its pilot period, which begins with the first date decided in live."""
        days = self.settings.shortfall_pilot_days
        if self.settings.mode not in ("live", TRIAL) or not self.settings.shortfall_response or not days:
            return False
        armed, today = ledger.read_state(self.engine, ARMED_SHORTFALL), self.today()
        return today < (date.fromisoformat(armed["value"]) if armed else today) + timedelta(days=days)

    def _begin_trial(self) -> None:
        days = self.settings.shortfall_pilot_days
        if self.arms and self.settings.mode in ("live", TRIAL) and self.settings.shortfall_response and days:
            why = f"the pilot period of {SHORTFALL} begins ({days} days, shortfall_pilot_days)"
            ledger.set_state(self.engine, ARMED_SHORTFALL, self.today().isoformat(), "retention-ops", why, self.clock(), once=True)

    def alerts(self, first: date, last: date) -> dict[date, dict[str, Any]]:
        """The alerts of a range in one look; days without one are left out."""
        return alerts_by_day(records(self.lake.read_range("alert_logic", first, last)), self.rules)

    def alert(self, day: date, known: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """The alert of D, from the alert_logic rows `known` where they have it. Raises PackError where there is none."""
        rows = [row for row in known if row["alert_date"] == day.isoformat()]
        if not rows and self.lake.exists("alert_logic", day):
            rows = records(self.lake.read("alert_logic", day))
        found = alerts_by_day(rows, self.rules).get(day)
        if found is None:
            raise PackError(f"{day} has no alert_logic row; `retention-ops run --date {day}` computes it")
        return found

    def concerns(self, day: date, alert: Mapping[str, Any]) -> bool:
        """Whether a date needs an answer at all: it is flagged, was answered before, or an incident is open that it may end."""
        if alert["alert_flag"]:
            return True
        with self.engine.connect() as connection:
            open_now = incidents.current(connection, alert["scope"], self.settings.mode)
            return self.last_answer(connection, alert) is not None or bool(open_now and day > open_now["last_flagged_on"])

    def decide(self, day: date) -> Decision:
        """What to do about D, from the alert row, what was answered before, the mode and today's date."""
        self._begin_trial()
        alert = self.alert(day)
        version, mode, severity = alert_version(alert), self.settings.mode, alert["severity"]
        with self.engine.connect() as connection:
            last = self.last_answer(connection, alert)
            open_now = incidents.current(connection, alert["scope"], mode)
        seq = last["seq"] if last else 0

        def decided(verdict: Verdict, reason: str, covers: tuple[date, ...] = ()) -> Decision:
            return Decision(verdict, reason, version, severity, seq, covers, self._made_from(day, alert, verdict))

        if mode == "off":
            return decided("skip", "the response is switched off (mode off)")
        if mode in REAL_MODES:
            self.horizon()  # a calm morning arms, too: by cron there is no sensor that does, and the first alert after a nap is no history
        if last and last["version"] == version and last["verdict"] not in PASSED:
            return decided("resume", f"{ANSWERED_ALREADY} {last['run_id']}: same result", self._stood_for(last))
        if last and last["verdict"] not in PASSED and self._only_by_upgrade(day, alert, last):
            why = f"{ANSWERED_ALREADY} {last['run_id']}: same orders and settings, a new release says it differently"
            return decided("resume", why, self._stood_for(last))
        if last is None and self._came_with_upgrade(day, alert):
            return decided("skip", "this result came with an upgrade: the orders and settings are those it was quiet with")
        past = self._past(day) if alert["alert_flag"] or last else ""
        if past and last and last["verdict"] not in PASSED:
            return decided("skip", f"{past}; what was answered then stands")
        if not alert["alert_flag"]:
            return decided(*self._calm(alert, last, open_now))
        if past:
            return decided("history", past)
        if mode in TEST_MODES and severity != "WARNING":
            return decided("skip", f"{mode} answers WARNING only")
        if (last is None or last["verdict"] in PASSED) and not self.one_by_one and (newer := self._newer_flagged(day)):
            return decided("covered", wording.covered_by(newer))
        covers = self._unanswered_before(day)
        if open_now is None:
            return decided("open", f"{severity}: {wording.reading(alert)}", covers)
        if RANK[severity] > RANK[open_now["severity"]]:
            return decided("escalate", f"incident {open_now['id']} rises to {severity}", covers)
        if open_now["snoozed_until"] and open_now["snoozed_until"] > self.clock():
            return decided("snoozed", f"incident {open_now['id']} is snoozed until {open_now['snoozed_until']:%Y-%m-%d %H:%M} UTC")
        return decided("update", f"incident {open_now['id']} goes on", covers)

    def _made_from(self, day: date, alert: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
        """What an answer remembers of the rows it is about; nothing where none is written."""
        if verdict in ("skip", "resume"):
            return {}
        return {**self.lake.provenance("alert_logic", day), "rows": versions_of(alert)}

    def _only_by_upgrade(self, day: date, alert: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
        """Whether D's rows differ from those answered although neither its orders nor the rules' settings changed: then the program
        did, and people are not told the same thing in other words."""
        then, changes = last["made_from"], Changes(self.lake)
        if not then:  # answered by a release that did not remember; its answer stands where the matter is the same
            known = [version.version for version in self.lake.orders_versions() if version.created_at <= last["answered_at"]]
            flagged = last["verdict"] not in ("retract", "resolve")
            same = alert["severity"] == last["severity"] and alert["alert_flag"] == flagged
            return same and bool(known) and not changes.since(known[-1], day)
        now = self.lake.provenance("alert_logic", day)
        same_rules = bool(then.get("rules_sha256")) and then["rules_sha256"] == now.get("rules_sha256")
        return same_rules and then.get("rows") != versions_of(alert) and not changes.since(then.get("orders_version", ""), day)

    def _came_with_upgrade(self, day: date, alert: Mapping[str, Any]) -> bool:
        """Whether `retention-ops upgrade` computed these very rows for a date that nobody had to be told about before."""
        state = ledger.read_state(self.engine, f"{UPGRADED}{day}")
        return state is not None and state["value"] == ledger.digest(versions_of(alert))

    def last_answer(self, connection: Connection, alert: Mapping[str, Any]) -> dict[str, Any] | None:
        """The newest answer of an alert in this mode, or None."""
        query = (
            sa.select(answers).filter_by(
                scope=alert["scope"], alert_date=date.fromisoformat(alert["alert_date"]), mode=self.settings.mode,
            ).order_by(answers.c.seq.desc()).limit(1)
        )
        row = connection.execute(query).mappings().first()
        return dict(row) if row else None

    def _calm(self, alert: Mapping[str, Any], last: Mapping[str, Any] | None, open_now: Mapping[str, Any] | None) -> tuple[Verdict, str]:
        """A date without an alert: nothing, a retraction, or the end of an incident."""
        day = date.fromisoformat(alert["alert_date"])
        if last and last["verdict"] in (*ACTED, "snoozed"):
            return "retract", f"{day} is no alert any more"
        if open_now and day > open_now["last_flagged_on"]:
            over = incidents.calm_since(dict(open_now), list(self.alerts(open_now["last_flagged_on"], day).values()))
            if over:
                return "resolve", f"incident {open_now['id']}: {incidents.CALM_DAYS} calm days, the last on {over}"
        held = f" (held back by {alert['gate']})" if alert["gate"] else ""
        return "skip", f"no alert: severity {alert['severity']}{held}"

    def today(self) -> date:
        return shop_day(self.clock(), self.settings.shop_timezone)

    def horizon(self) -> date:
        """The oldest date that is still answered in pilot and live; arms the response when it is asked for the first time."""
        today = self.today()
        # the morning on which the response is armed belongs to yesterday's orders
        start = (today - timedelta(days=1)).isoformat()
        why = f"mode is {self.settings.mode} for the first time; flagged dates before this one are history"
        if self.arms:
            ledger.set_state(self.engine, ARMED, start, "retention-ops", why, self.clock(), once=True)
        armed = ledger.read_state(self.engine, ARMED)
        start = armed["value"] if armed else start
        return max(date.fromisoformat(start), today - timedelta(days=self.settings.max_alert_age_days))

    def _past(self, day: date) -> str:
        """Why D is history, or nothing."""
        if self.settings.mode == "shadow":
            complete = self.lake.orders().complete_through
            return "" if day >= complete else f"history: orders are complete through {complete}, only that day is rehearsed in shadow"
        horizon = self.horizon()
        if day >= horizon:
            return ""
        oldest = self.today() - timedelta(days=self.settings.max_alert_age_days)
        why = f"older than {self.settings.max_alert_age_days} days (max_alert_age_days)" if day < oldest else \
            f"before the response was armed on {horizon + timedelta(days=1)}"
        return f"history: {why}"

    def days_in_reach(self) -> list[date]:
        """Dates with an alert row that pilot and live still answer, flagged or not: a calm one may retract or resolve."""
        first, last = self.horizon(), self.today()
        return [day for day in self.lake.days("alert_logic") if first <= day <= last]

    def _flagged(self, first: date, last: date) -> list[date]:
        if first > last:
            return []
        found = {day: alert for day, alert in self.alerts(first, last).items() if alert["alert_flag"]}
        # pilot answers no other
        return sorted(day for day, alert in found.items() if self.settings.mode not in TEST_MODES or alert["severity"] == "WARNING")

    def _newer_flagged(self, day: date) -> date | None:
        """The newest flagged date after D that this mode answers."""
        return max(self._flagged(day + timedelta(days=1), self.today()), default=None)

    def _unanswered_before(self, day: date) -> tuple[date, ...]:
        """Flagged dates before D that still count and that nobody was told about."""
        if self.settings.mode == "shadow":
            return ()
        flagged = self._flagged(self.horizon(), day - timedelta(days=1))
        if not flagged:
            return ()
        with self.engine.connect() as connection:
            known = set(connection.execute(
                sa.select(answers.c.alert_date).where(
                    answers.c.mode == self.settings.mode, answers.c.verdict != "history",
                    # passed over, but no message has named it yet
                    sa.or_(answers.c.verdict != "covered", answers.c.incident_id.is_not(None)),
                )
            ).scalars())
        return tuple(found for found in flagged if found not in known)

    def _stood_for(self, last: Mapping[str, Any]) -> tuple[date, ...]:
        """The dates an answer stands for, as it was written."""
        query = sa.select(answers.c.alert_date).where(
            answers.c.mode == last["mode"], answers.c.verdict == "covered", answers.c.incident_id == last["incident_id"],
            answers.c.reason == wording.covered_by(last["alert_date"]),
        ).order_by(answers.c.alert_date)
        with self.engine.connect() as connection:
            return tuple(connection.execute(query).scalars()) if last["incident_id"] else ()

