"""What somebody asks for from outside Dagster: a run, or a list. Each is an action of the ledger: asked for once, found again by its
key, approved where a person must look, and delivered later where Dagster is down.

A request that was cancelled, refused or whose run failed is spent: asking again makes a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date, datetime
from typing import Any

from sqlalchemy.engine import Engine

from retention_ops.errors import LedgerError
from retention_ops.execute import ledger
from retention_ops.execute.destinations.choice import BUILD, EXPORT, EXPORT_SLOT, RESPOND, RUN_SLOT, chosen, target_of
from retention_ops.execute.ledger import Intent
from retention_ops.log.database import lock_responses
from retention_ops.package.audiences import Audience
from retention_ops.settings import Settings

SOURCE_TAG, CALLER_TAG, DATE_TAG = "retention_ops/source", "retention_ops/requested_by", "retention_ops/date"
QUEUE_ASSETS = ("base_customers", "retention_snapshot", "churn_detection", "customer_priority", "action_pack")
"""not alert_logic: computing it is what the sensor answers to"""
ASSET_JOB, RESPONSE_JOB, EXPORT_JOB = "__ASSET_JOB", "incident_response_job", "export_audience_job"
MAX_SPENT = 1000

Draft = Callable[[str], Intent]
"""part -> intent: the same request under another key"""


def ask(
    engine: Engine, draft: Draft, version: str, now: datetime, caller: str, limits: Mapping[str, int],
    spent: Callable[[ledger.Row], bool] = lambda row: False,
) -> tuple[ledger.Row, bool]:
    """The request's row, and whether it was there already. `spent` says of a sent one that it must be asked for anew."""
    for number in range(MAX_SPENT):
        intent = draft(f"{version}:{number}")
        with engine.begin() as connection:
            lock_responses(connection)
            known = ledger.get(connection, intent.key)
            if known is None:
                ledger.plan(connection, [intent], now, caller, limits)
                return ledger.get(connection, intent.key), False
        if known["state"] not in (ledger.CANCELLED, ledger.FAILED) and not (known["state"] == ledger.SENT and spent(known)):
            return known, True
    raise LedgerError(f"asked for {MAX_SPENT} times without success; see `retention-ops actions list --all`")


def _run(
    settings: Settings, kind: str, day: date, payload: Mapping[str, Any], caller: str, about: str = "",
    approval: Mapping[str, Any] | None = None,
) -> Draft:
    """`about` tells apart what is asked of one day; who asks does not, so that two who ask for the same get one run."""
    tags = {"dagster/partition": day.isoformat()} if payload.get("assets") else {DATE_TAG: day.isoformat()}
    full = {**payload, "tags": {**tags, SOURCE_TAG: "mcp", CALLER_TAG: caller[:100]}}

    def draft(part: str) -> Intent:
        return Intent(
            # what is computed is the same in every mode
            identity=f"asked:{day}:{'' if kind == BUILD else settings.mode}:{about}", slot=RUN_SLOT, destination="dagster", kind=kind,
            target=payload["job"], payload=full, alert_date=day, mode=settings.mode, part=part, approval=approval or {},
        )

    return draft


def build_run(settings: Settings, day: date, caller: str) -> Draft:
    """The run that computes the queue and the Action Pack of D."""
    return _run(settings, BUILD, day, {"job": ASSET_JOB, "assets": list(QUEUE_ASSETS)}, caller)


def response_run(
    settings: Settings, day: date, version: str, caller: str, worksheets: list[dict[str, Any]], audience_sha256: str,
) -> Draft:
    """The run that answers D's alert, once a person has approved; it refuses another mode or another result than this one."""
    config = {"ops": {"gate": {"config": {"alert_dates": [day.isoformat()], "mode": settings.mode, "version": version}}}}
    approval = {"audience_sha256": audience_sha256, "customers": sum(sheet["rows"] for sheet in worksheets)}
    payload = {"job": RESPONSE_JOB, "config": config, "worksheets": worksheets, "audience_sha256": audience_sha256}
    return _run(settings, RESPOND, day, payload, caller, about="alert", approval=approval)


def export_run(settings: Settings, day: date, keys: list[str], caller: str) -> Draft:
    """The run that delivers planned exports."""
    payload = {"job": EXPORT_JOB, "config": {"ops": {"export_lists": {"config": {"keys": keys}}}}}
    return _run(settings, EXPORT, day, payload, caller, about="+".join(keys))


def export_list(
    settings: Settings, day: date, to: str, cut: Audience, lists_sha256: str, answer: Mapping[str, Any] | None, needs_approval: bool,
) -> Draft:
    """The hand-over of the first rows of one tier: `to` 'csv' is a file in the pack, 'gsheet' what the mode has for lists."""
    name = f"{cut.tier}_{day}_top{cut.rows}"
    sheet = {"title": f"{cut.tier} {day} top {cut.rows}", "tier": cut.tier, "file": f"audience_{name}.csv", "rows": cut.rows,
             "excluded": cut.excluded}
    destination = "local" if to == "csv" else chosen("sheets", settings, settings.mode)
    target = f"{day}/sheets_{name}" if destination == "local" else target_of("sheets", settings, settings.mode)

    def draft(part: str) -> Intent:
        return Intent(
            identity=f"asked:{day}:{settings.mode}:{name}:{to}", slot=EXPORT_SLOT, destination=destination,
            kind="export" if to == "csv" else "publish", target=target, alert_date=day, mode=settings.mode, part=part,
            payload={"audience_sha256": lists_sha256, "worksheets": [sheet]}, answer_id=answer["id"] if answer else None,
            incident_id=answer["incident_id"] if answer else None,
            approval={"audience_sha256": lists_sha256, "customers": cut.rows} if needs_approval else {},
        )

    return draft
