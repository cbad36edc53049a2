"""The read tools: each reads a few files of the lake by their exact paths and starts nothing.

One DuckDB lives as long as the server; every call takes a cursor of its own. Nothing is computed that a run has not stored.
"""

from __future__ import annotations

import json
from datetime import date, datetime, timedelta
from typing import Any

from retention_ops.detect.alerts import AT_RISK, OTHERS, alert_of, alerts_by_day, answered_rules, row_of
from retention_ops.detect.explain import gate_sentence, sentences_for
from retention_ops.errors import PackError, SettingsError
from retention_ops.execute.asked import CALLER_TAG, DATE_TAG
from retention_ops.execute.destinations.dagster import Dagster, Run
from retention_ops.execute.destinations.seam import DestinationError
from retention_ops.package.brief import with_cids
from retention_ops.package.pack import Pack, find_pack, pack_days, plain
from retention_ops.serve.answers import (
    AlertDecision,
    Brief,
    Comparison,
    CustomerExplanation,
    DaySummary,
    MetricDay,
    OperationalContext,
    OtherRule,
    RunStatus,
)
from retention_ops.serve.refusal import Refused, quoted
from retention_ops.settings import Settings
from retention_ops.sources.identity import held_as
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.dialect import declared_scan, parquet_scan
from retention_ops.warehouse.freshness import Changes
from retention_ops.warehouse.lake import Lake

METRIC_DAYS = 14
BRIEF_CHARACTERS = 12_000
"""HTML has some 2.5 characters a token, so one answer stays near 5,000 tokens"""
STATUSES = ("ACTIVE", "AT_RISK", "INACTIVE")
LEVELS = ("HIGH", "MEDIUM", "LOW")
TIERS = ("P1", "P2", "P3")
STAKES = ("usual_spend_90d", "p_no_return_90d", "spend_at_stake", "at_stake_reason")


class Reader:
    """The lake of one home, for reading. Raises SettingsError where tables live in BigQuery: nothing here asks it yet."""

    def __init__(self, settings: Settings):
        if settings.warehouse != "lake":
            raise SettingsError(
                f"the MCP server reads the lake, not RETENTION_OPS_WAREHOUSE={settings.warehouse}; ask BigQuery's own tools for its tables")
        self.settings = settings
        self.lake = Lake(settings)

    def close(self) -> None:
        self.lake.close()

    # -- what is there -------------------------------------------------------------------------------------------------

    def _require(self, table: str, day: date, next_call: str = "") -> None:
        """Raises Refused, naming the dates there are, where `table` has no partition of D."""
        if self.lake.exists(table, day):
            return
        orders, days = self.lake.orders(), self.lake.days(table)
        if orders is None:
            raise no_orders(self.settings)
        newest = days[-1] if days else None
        allowed = f"dates from {days[0]} to {newest} ({len(days)} computed)" if days else "none: no date was computed yet"
        if day > orders.complete_through:
            allowed += f"; orders are complete through {orders.complete_through}"
        by_person = f"`retention-ops run --date {day}`, by a person"
        raise Refused(f"{table} was not computed for {day}.", allowed, next_call or (f'get_alert_decision(date="{newest}")' if newest
                                                                                   else by_person))

    def _stale(self, table: str, day: date) -> bool:
        return Changes(self.lake).since(self.lake.provenance(table, day).get("orders_version", ""), day)

    def _alert(self, day: date) -> dict[str, Any]:
        self._require("alert_logic", day)
        return alert_of(self._read("alert_logic", day), answered_rules(self.settings))

    def _rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Rows as plain dictionaries; a data frame in between would cost more than the query."""
        with self.lake.connection() as connection:
            found = connection.execute(query, list(values))
            names = [column[0] for column in found.description]
            return [dict(zip(names, map(plain, row), strict=True)) for row in found.fetchall()]

    def _from(self, table: str, *days: date, options: str = "") -> str:
        """Exactly these partitions, never a view over all of them."""
        return declared_scan(TABLES[table], *(self.lake.path(table, day) for day in days), options=options)

    def _read(self, table: str, day: date) -> list[dict[str, Any]]:
        return self._rows(f"SELECT * FROM {self._from(table, day)}")

    # -- tools ---------------------------------------------------------------------------------------------------------

    def alert_decision(self, day: date) -> AlertDecision:
        alert = self._alert(day)
        others = [OtherRule(**{name: row.get(name) for name in OtherRule.model_fields}) for row in alert.pop(OTHERS)]
        follow = f'get_operational_context(date="{day}")' if alert["alert_flag"] else None
        return AlertDecision(**alert, gate_reason=self._why_held(alert), others=others, stale=self._stale("alert_logic", day), next=follow)

    def _why_held(self, row: dict[str, Any]) -> str | None:
        return gate_sentence(row["gate"], row, self.lake.orders().complete_through, self.settings) if row["gate"] else None

    def operational_context(self, day: date) -> OperationalContext:
        self._require("retention_daily", day)
        daily = self._read("retention_daily", day)[0]
        wanted = [day - timedelta(days=back) for back in range(METRIC_DAYS - 1, -1, -1)]
        stored = [each for each in wanted if self.lake.exists("alert_logic", each)]
        history = self._history(stored)
        return OperationalContext(
            date=day, total_customers=daily["customers"], status_distribution=_statuses(daily), at_risk_pct=daily["at_risk_pct"],
            at_risk_by_risk_level=self._risk_levels(day), last_days=history,
            missing_days=[each for each in wanted if each not in stored], limit=METRIC_DAYS, total=len(history), truncated=False,
            next=f'build_priority_queue(date="{day}")' if not self.lake.exists("customer_priority", day)
            else f'generate_brief(date="{day}", format="markdown")',
        )

    def _history(self, days: list[date]) -> list[MetricDay]:
        if not days:
            return []
        rows = self._rows(
            "SELECT alert_date, alert_type, current_value, baseline_value, severity, alert_flag FROM "
            f"{self._from('alert_logic', *days)} ORDER BY alert_date"
        )
        alerts = alerts_by_day(rows, answered_rules(self.settings))
        shares = {day: row_of(alert, AT_RISK) or {} for day, alert in alerts.items()}
        return [MetricDay(date=day, at_risk_pct=shares[day].get("current_value"), baseline_pct=shares[day].get("baseline_value"),
                          severity=alert["severity"], alert_flag=alert["alert_flag"]) for day, alert in alerts.items()]

    def _risk_levels(self, day: date) -> dict[str, int] | None:
        if not self.lake.exists("churn_detection", day):
            return None
        rows = self._rows(
            "SELECT churn_risk_level, COUNT(*) AS customers FROM "
            f"{self._from('churn_detection', day)} WHERE retention_status = 'AT_RISK' GROUP BY 1"
        )
        counts = {row["churn_risk_level"]: row["customers"] for row in rows}
        return {level: counts.get(level, 0) for level in LEVELS}

    def tiers(self, day: date) -> dict[str, int] | None:
        """Customers per tier of the stored queue; None where D has none."""
        if not self.lake.exists("customer_priority", day):
            return None
        rows = self._rows(
            f"SELECT priority_tier, COUNT(*) AS customers FROM {self._from('customer_priority', day)} GROUP BY 1"
        )
        counts = {row["priority_tier"]: row["customers"] for row in rows}
        return {tier: counts.get(tier, 0) for tier in TIERS}

    def customer(self, customer_id: str, day: date) -> CustomerExplanation:
        customer_id = held_as(self.settings, customer_id)
        build = f'build_priority_queue(date="{day}")'
        self._require("churn_detection", day, build)
        self._require("customer_priority", day, build)
        churn = self._rows(f"SELECT * FROM {self._from('churn_detection', day)} WHERE customer_id = ?", customer_id)
        if not churn:
            raise Refused(f"Customer {quoted(customer_id)} has no order by {day}.",
                          "ids exactly as in the orders; a date after their first order", f'get_operational_context(date="{day}")')
        queue = self._from("customer_priority", day, options=", file_row_number = true")
        queued = self._rows(f"SELECT * FROM {queue} WHERE customer_id = ?", customer_id)
        counts = self._rows(f"SELECT COUNT(*) AS listed, COUNT(spend_at_stake) AS staked FROM {self._from('customer_priority', day)}")[0]
        opted_out = self._opted_out(customer_id, day)
        row = {**churn[0], **opted_out, "priority": queued[0] if queued else None}
        row["by_stake"] = self.settings.membership == "at_stake" and counts["staked"] > 0
        row["rank"] = queued[0]["file_row_number"] + 1 if queued else None  # stored in the queue's order
        row |= {name: date.fromisoformat(row[name]) for name in ("first_order_date", "last_order_date")}
        return CustomerExplanation(
            customer_id=customer_id, date=day, priority_tier=queued[0]["priority_tier"] if queued else None, rank=row["rank"],
            queue_length=counts["listed"], priority_score=queued[0]["priority_score"] if queued else None,
            **{name: queued[0][name] if queued else None for name in STAKES},
            retention_status=row["retention_status"], churn_risk_level=row["churn_risk_level"], churn_risk_score=row["churn_risk_score"],
            signals={name: row[f"is_{name}"] for name in ("frequency_drop", "value_drop", "status_inconsistent")},
            may_be_contacted=not any(opted_out.values()),
            sentences=sentences_for({**row, "customer_id": quoted(customer_id)}, day, self.lake.orders().currency, counts["listed"],
                                    self.settings),
            stale=self._stale("churn_detection", day), data_fields=["customer_id", "sentences"],
        )

    def _opted_out(self, customer_id: str, day: date) -> dict[str, bool]:
        """As sources.contact.no_contact has it, for one customer."""
        customers, suppressions = self.lake.customers(), self.lake.suppressions()
        refused = customers and self._rows(
            f"SELECT 1 AS found FROM {parquet_scan(customers.path)} WHERE customer_id = ? AND consent = false", customer_id)
        suppressed = suppressions and self._rows(
            f"SELECT 1 AS found FROM {parquet_scan(suppressions.path)} WHERE customer_id = ? AND (until IS NULL OR until > ?)",
            customer_id, day)
        return {"refused_consent": bool(refused), "suppressed": bool(suppressed)}

    def compare(self, a: date, b: date) -> Comparison:
        first, second = self._summary(a), self._summary(b)
        changes: dict[str, float | None] = {"customers": second.customers - first.customers}
        changes["at_risk_pct"] = None if None in (first.at_risk_pct, second.at_risk_pct) else second.at_risk_pct - first.at_risk_pct
        changes |= {status: second.status_distribution[status] - first.status_distribution[status] for status in STATUSES}
        if first.tiers and second.tiers:
            changes |= {tier: second.tiers[tier] - first.tiers[tier] for tier in TIERS}
        missing = next((day.date for day in (first, second) if day.tiers is None), None)
        return Comparison(a=first, b=second, changes=changes, sentences=_told(first, second, changes),
                          next=f'build_priority_queue(date="{missing}")' if missing else None)

    def _summary(self, day: date) -> DaySummary:
        alert = self._alert(day)
        self._require("retention_daily", day)
        daily = self._read("retention_daily", day)[0]
        return DaySummary(
            date=day, severity=alert["severity"], alert_flag=alert["alert_flag"], gate=alert["gate"], at_risk_pct=daily["at_risk_pct"],
            baseline_pct=(row_of(alert, AT_RISK) or {}).get("baseline_value"), customers=daily["customers"],
            status_distribution=_statuses(daily), tiers=self.tiers(day),
        )

    # -- the pack ------------------------------------------------------------------------------------------------------

    def pack(self, day: date) -> Pack:
        """D's Action Pack. Raises Refused where there is none."""
        try:
            pack = find_pack(self.settings, day)
        except PackError:
            pack = None
        if pack is None:
            days = pack_days(self.settings)
            allowed = f"{len(days)} dates from {days[0]} to {days[-1]}" if days else "none yet"
            raise Refused(f"{day} has no Action Pack, so there is no brief.", f"dates with a pack: {allowed}",
                          f'build_priority_queue(date="{day}") builds queue and pack')
        return pack

    def brief_text(self, pack: Pack, format: str) -> str:
        """A brief as text; pictures are left out of the mail."""
        name = {"slack": "briefing.slack.json", "email": "briefing.html", "markdown": f"briefing_{pack.severity}.md"}[format]
        try:
            text = (pack.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise Refused(f"The Action Pack of {pack.day} has lost {name}.", "", f'build_priority_queue(date="{pack.day}")') from None
        return with_cids(text, pack.folder) if format == "email" else text

    def brief(self, day: date, format: str, offset: int) -> Brief:
        pack = self.pack(day)
        text = self.brief_text(pack, format)
        if offset and offset >= len(text):
            raise Refused(f"offset {offset:,} is past the end of this brief.", f"0 to {len(text) - 1:,}",
                          f'generate_brief(date="{day}", format="{format}")')
        end = offset + BRIEF_CHARACTERS
        more = end < len(text)
        follow = f'generate_brief(date="{day}", format="{format}", offset={end})' if more else None
        if not more and pack.manifest["alert_flag"]:
            follow = f'trigger_playbook(date="{day}", severity="{pack.severity}")'
        return Brief(
            date=day, format=format, severity=pack.severity, text=text[offset:end], offset=offset, limit=BRIEF_CHARACTERS, total=len(text),
            truncated=more, created_at=pack.manifest["created_at"], facts_sha256=pack.facts_sha256, data_fields=["text"], next=follow,
        )

    def manifest(self, day: date) -> dict[str, Any]:
        """The pack's manifest: hashes, counts and file names; no customer."""
        pack = self.pack(day)
        return {**pack.manifest, "files": {name: entry["rows"] for name, entry in pack.manifest["files"].items()}}

    # -- runs ----------------------------------------------------------------------------------------------------------

    def run_status(self, id: str, row: dict[str, Any] | None) -> RunStatus:
        """A run by its id, or a request by its key (`row` is its line in the ledger)."""
        run_id = row["external_id"] if row and row["slot"] == "run" and row["state"] == "sent" else None if row else id
        if run_id is None:
            return self._waiting(id, row)
        dagster = Dagster.connect(self.settings)
        try:
            run = dagster.run(run_id)
        except DestinationError as error:
            if not row:
                raise Refused(f"{error}", "while Dagster is down only requests of this server are known",
                              f'`retention-ops ui`, by a person; then get_run_status(run_id="{id}")') from None
            return RunStatus(id=id, status="submitted", finished=False, run_id=run_id, run_url=dagster.run_url(run_id), job=row["target"],
                             date=str(row["alert_date"]), requested_by=None, started_at=None, ended_at=None,
                             message=f"Submitted; Dagster does not answer now: {error}", data_fields=[],
                             next=f'get_run_status(run_id="{id}")')
        if run is None:
            raise Refused(f"Dagster at {self.settings.dagster_url} knows no run {quoted(id)}.", "ids as the other tools returned them",
                          "build_priority_queue or trigger_playbook start runs")
        return _told_of(id, run, dagster.run_url(run.run_id))

    def _waiting(self, id: str, row: dict[str, Any]) -> RunStatus:
        state = row["state"]
        told = {
            "planned": "Not submitted yet; the next write tool, `retention-ops actions work` or the daemon delivers it.",
            "awaiting_approval": f"Waits for a person: `retention-ops actions show {id[:12]}` says how to approve.",
            "sent": "Done.", "needs_human": f"Held for a person: `retention-ops actions show {id[:12]}`.",
        }.get(state, state.replace("_", " "))
        ended = state in ("sent", "failed", "cancelled")
        reason = f" {row['last_error']}" if row["last_error"] else ""
        job = row["target"] if row["slot"] == "run" else None  # an export's target is a spreadsheet
        return RunStatus(id=id, status=state, finished=ended, run_id=None, run_url=None, job=job, date=str(row["alert_date"]),
                         requested_by=None, started_at=None, ended_at=None, message=told + reason, data_fields=["message"],
                         next=None if ended else f'get_run_status(run_id="{id}")')

    # -- resources -----------------------------------------------------------------------------------------------------

    def dictionary(self, table: str | None = None) -> dict[str, Any]:
        """What every table is, or one table's columns."""
        if table is None:
            return {"tables": {name: {"description": declared.description, "stored": declared.stored, "columns": len(declared.columns)}
                               for name, declared in TABLES.items()}, "next": "retention-ops://tables/{table} has the columns"}
        if table not in TABLES:
            raise Refused(f"There is no table {quoted(table)}.", ", ".join(TABLES), "retention-ops://tables")
        declared = TABLES[table]
        return {"table": table, "description": declared.description, "stored": declared.stored, "key": list(declared.key),
                "columns": [{"name": column.name, "type": column.type, "description": column.description, "nullable": column.nullable}
                            for column in declared.columns]}


def no_orders(settings: Settings) -> Refused:
    return Refused(f"There are no orders in {settings.home} yet.", "", "`retention-ops ingest` or `retention-ops demo`, by a person")


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def _statuses(daily: dict[str, Any]) -> dict[str, int]:
    return {status: daily[status.lower()] for status in STATUSES}


def _told(a: DaySummary, b: DaySummary, changes: dict[str, float | None]) -> list[str]:
    """The comparison in sentences."""
    sentences = []
    if changes["at_risk_pct"] is not None:
        points = f"{changes['at_risk_pct']:+.2f} points"
        sentences.append(f"AT_RISK {a.at_risk_pct:.2f} % on {a.date}, {b.at_risk_pct:.2f} % on {b.date}: {points}.")
    sentences.append(f"Severity {a.severity} on {a.date}, {b.severity} on {b.date}.")
    moved = ", ".join(f"{status} {changes[status]:+,}" for status in STATUSES)
    sentences.append(f"Customers {a.customers:,} and {b.customers:,} ({changes['customers']:+,}): {moved}.")
    if "P1" in changes:
        counts = (f"{tier} {a.tiers[tier]:,} and {b.tiers[tier]:,} ({changes[tier]:+,})" for tier in TIERS)
        sentences.append(f"Queue: {', '.join(counts)}.")
    return sentences


def _told_of(id: str, run: Run, url: str) -> RunStatus:
    day = run.tags.get("dagster/partition") or run.tags.get(DATE_TAG)
    words = {"SUCCESS": "The run succeeded.", "FAILURE": "The run failed; its page says where.", "CANCELED": "The run was stopped."}
    return RunStatus(
        id=id, status=run.status, finished=run.ended, run_id=run.run_id, run_url=url, job=run.job, date=day,
        requested_by=run.tags.get(CALLER_TAG), started_at=_iso(run.started_at), ended_at=_iso(run.ended_at),
        message=words.get(run.status, "The run is not over yet."), data_fields=["requested_by"],
        next=None if run.ended else f'get_run_status(run_id="{run.run_id}")',
    )


def _iso(at: datetime | None) -> str | None:
    return at.isoformat(timespec="seconds") if at else None
