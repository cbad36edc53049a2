"""The incident response as a Dagster job: gate -> plan -> slack, ticket, sheets, webhook -> record.

Every op is thin and may run twice: what was decided and sent stands in the ledger, not in the run. A failure on the way is
carried to `record`, which writes the log first and fails the run afterwards.
"""

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import dagster as dg

from retention_ops.execute import ledger, quiet
from retention_ops.execute.asked import EXPORT_JOB, RESPONSE_JOB
from retention_ops.execute.gate import Decision
from retention_ops.execute.respond import Responder, links_of
from retention_ops.execute.trail import digest_of, markdown, publish_log
from retention_ops.orchestration import Loop, open_responder
from retention_ops.package.pack import alert_version

FOLLOW_UP_JOB = "response_follow_up"
QUIET_JOB = "quiet_morning"
LIMITED = {"dagster/max_runtime": "300"}
"""a run whose worker and code server were killed together stays "started"; after so many seconds it counts as failed"""


class AlertDates(dg.Config):
    """Which flagged dates to answer, YYYY-MM-DD; several where they are history."""

    alert_dates: list[str]
    mode: str = ""
    """the mode in which a person approved the answer; another one fails"""
    version: str = ""
    """the alert's version that person saw"""


class ListsToExport(dg.Config):
    """Keys of planned exports."""

    keys: list[str]


def _days(passed: dict) -> list[date]:
    return [date.fromisoformat(day) for day in passed]


@dg.op(description="Reads alert, earlier answers, mode and dates; decides for each date and changes nothing.")
def gate(context: dg.OpExecutionContext, config: AlertDates, loop: dg.ResourceParam[Loop]) -> dict:
    passed = {}
    with open_responder(loop, context.run.run_id) as responder:
        _as_approved(responder, config)
        for day in sorted(set(config.alert_dates)):
            when = date.fromisoformat(day)
            passed[day] = _tried(responder, lambda when=when: _plain(responder.on(when).gate(when)))
            context.log.info(f"{day}: {passed[day].get('verdict', 'failed')}: {passed[day].get('reason') or passed[day]['problem']}")
    return passed


def _as_approved(responder: Responder, config: AlertDates) -> None:
    """Raises Failure, with nothing answered or logged, where this is not what a person approved."""
    if config.mode and config.mode != responder.settings.mode:
        raise dg.Failure(f"asked for in mode {config.mode}, but this Dagster runs in mode {responder.settings.mode}: nothing was answered")
    for day in config.alert_dates if config.version else ():
        when = date.fromisoformat(day)
        if alert_version(responder.on(when).gatekeeper.alert(when)) != config.version:
            raise dg.Failure(f"the alert of {day} changed since its answer was asked for: look at it again, nothing was answered")


@dg.op(description="Builds or finds the Action Pack, proves it, and writes decision, intents and reservations in one transaction.")
def plan(context: dg.OpExecutionContext, loop: dg.ResourceParam[Loop], gated: dict) -> dict:
    planned = {}
    with open_responder(loop, context.run.run_id) as responder:
        for day, decision in gated.items():
            when = date.fromisoformat(day)
            if "problem" in decision:
                planned[day] = decision
            else:
                planned[day] = _tried(responder, lambda when=when, d=decision: _plain(responder.on(when).plan(_decision(d), when)))
    return planned


def _deliver(context: dg.OpExecutionContext, loop: Loop, planned: dict, slot: str) -> dict:
    """Problems by date; a destination's own failure stands in the ledger and is none."""
    problems = {}
    with open_responder(loop, context.run.run_id) as responder:
        for day, decision in planned.items():
            if "problem" in decision or decision["verdict"] in ("skip", "history", "covered", "snoozed"):
                continue
            when = date.fromisoformat(day)
            tried = _tried(responder, lambda when=when: {
                "rows": [(row["kind"], row["state"], row["last_error"]) for row in responder.on(when).deliver(when, slot)]})
            for kind, state, error in tried.get("rows", []):
                context.log.info(f"{day}: {slot} {kind} {state}" + (f" ({error})" if error else ""))
            if "problem" in tried:
                problems[day] = tried["problem"]
    return problems


@dg.op(description="Message, chart and thread updates.")
def slack(context: dg.OpExecutionContext, loop: dg.ResourceParam[Loop], planned: dict) -> dict:
    return _deliver(context, loop, planned, "slack")


@dg.op(description="Opens, comments, raises or resolves the ticket.")
def ticket(context: dg.OpExecutionContext, loop: dg.ResourceParam[Loop], planned: dict) -> dict:
    return _deliver(context, loop, planned, "ticket")


@dg.op(description="Hands the audience lists over, after consent and suppressions were read once more.")
def sheets(context: dg.OpExecutionContext, loop: dg.ResourceParam[Loop], planned: dict) -> dict:
    return _deliver(context, loop, planned, "sheets")


@dg.op(ins={"after": dg.In(dg.Nothing)}, description="Signed webhook with links to lists and ticket; a mail where it fails for good.")
def webhook(context: dg.OpExecutionContext, loop: dg.ResourceParam[Loop], planned: dict) -> dict:
    return _deliver(context, loop, planned, "webhook")


@dg.op(description="Writes ops_runs_log whatever happened, adds links to the message, shows the trail in the asset catalog.")
def record(context: dg.OpExecutionContext, loop: dg.ResourceParam[Loop], planned: dict, problems: list[dict]) -> None:
    failed = []
    with open_responder(loop, context.run.run_id) as responder:
        rows = []
        for day, decision in planned.items():
            when, found = date.fromisoformat(day), [decision.get("problem", ""), *(problem.get(day, "") for problem in problems)]
            answering = responder.on(when)
            if "problem" not in decision:
                found.append(_tried(responder, lambda when=when, answering=answering: answering.link(when) or {}).get("problem", ""))
            rows.append(answering.record(when, None if "problem" in decision else _decision(decision), "; ".join(filter(None, found))))
            failed += [f"{day}: {rows[-1]['error_message']}"] if rows[-1]["status"] == "failed" else []
        _show(context, loop, responder, _days(planned), rows)
    if failed:
        raise dg.Failure("the response failed and is logged: " + "; ".join(failed))


@dg.op(description="What time brings: unknown actions are looked up, waiting ones sent, missed acknowledgements told once.")
def follow_up(context: dg.OpExecutionContext, loop: dg.ResourceParam[Loop]) -> None:
    with open_responder(loop, context.run.run_id) as responder:
        rows = responder.work()
        _show(context, loop, responder, sorted({row["alert_date"] for row in rows}), rows)
    failed = [f"{row['alert_date']}: {row['error_message']}" for row in rows if row["status"] == "failed"]
    if failed:
        raise dg.Failure("not everything could be done and that is logged: " + "; ".join(failed))


@dg.op(description="Health alerts and their end, the digest, the heartbeat: each written down, then sent once.")
def tell_quiet_side(context: dg.OpExecutionContext, loop: dg.ResourceParam[Loop]) -> None:
    failed = []
    with open_responder(loop, context.run.run_id) as responder:
        for row in quiet.tell(responder):
            said = f"{row['slot']} {row['kind']} by {row['destination']} {row['state']}"
            context.log.info(said + (f" ({row['last_error']})" if row["last_error"] else ""))
            failed += [said] if row["state"] in (ledger.FAILED, ledger.NEEDS_HUMAN) else []
    if failed:
        raise dg.Failure("not everything could be told: " + "; ".join(failed))


@dg.op(description="Hands planned exports over, after consent and suppressions were read once more.")
def export_lists(context: dg.OpExecutionContext, config: ListsToExport, loop: dg.ResourceParam[Loop]) -> None:
    failed = []
    with open_responder(loop, context.run.run_id) as responder:
        for key in config.keys:
            row = responder.door.deliver(key, responder.patience)
            said = f"{row['alert_date']}: {row['kind']} by {row['destination']} {row['state']}"
            context.log.info(said + (f" ({row['last_error']})" if row["last_error"] else ""))
            failed += [said] if row["state"] not in (ledger.SENT, ledger.PLANNED, ledger.AWAITING) else []
    if failed:
        raise dg.Failure("not everything could be exported: " + "; ".join(failed))


def _show(context: dg.OpExecutionContext, loop: Loop, responder: Responder, days: list[date], rows: list[dict]) -> None:
    """The audit trail in the UI: one materialization per date with its links, the log as a table, history as one digest."""
    total = publish_log(loop.lake, responder.engine, days)
    by_day = {row["alert_date"]: row for row in rows}
    skipped = [row for row in rows if row["status"] == "skipped" and not row["total_exported"] and not row["slack_posted"]]
    for day in days:
        metadata = metadata_of(by_day[day], responder.on(day).actions(day))
        context.log_event(dg.AssetMaterialization("incident_response", partition=day.isoformat(), metadata=metadata))
        context.log_event(dg.AssetMaterialization("ops_runs_log", partition=day.isoformat(), metadata={"dagster/row_count": total}))
    if skipped:
        context.log_event(dg.AssetObservation("incident_response", metadata={"history_digest": dg.MetadataValue.md(digest_of(skipped))}))


def metadata_of(row: Mapping[str, Any], actions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the asset catalog shows about one answer: status, links to message, ticket and sheets, each action's state."""
    shown = {name: row[name] for name in ("status", "mode", "severity", "total_exported", "row_hash")}
    shown |= {name: row[name] for name in ("slack_message_ts", "ticket_id") if row[name]}
    if row["error_message"]:
        shown["reason"] = row["error_message"]
    shown |= {f"link_{name.replace(' ', '_').replace('-', '_')}": dg.MetadataValue.url(url) for name, url in links_of(actions).items()}
    if actions:
        columns = ("slot", "kind", "destination", "state", "attempts", "external_id")
        shown["actions"] = dg.MetadataValue.md(markdown(actions, columns))
    return shown


def _tried(responder: Responder, step) -> dict:
    try:
        return step()
    except Exception as error:
        return {"problem": responder.text(error)}


def _plain(decision: Decision) -> dict:
    return {**vars(decision), "covers": [day.isoformat() for day in decision.covers]}


def _decision(plain: dict) -> Decision:
    return Decision(**{**plain, "covers": tuple(date.fromisoformat(day) for day in plain["covers"])})


@dg.job(name=RESPONSE_JOB, executor_def=dg.in_process_executor, tags=LIMITED,
        description="Answers flagged dates: each action exactly once, or held for a person.")
def incident_response_job() -> None:
    planned = plan(gate())
    message, opened, lists = slack(planned), ticket(planned), sheets(planned)
    record(planned, [message, opened, lists, webhook(planned, after=[message, opened, lists])])


@dg.job(name=EXPORT_JOB, executor_def=dg.in_process_executor, tags=LIMITED,
        description="Hands over the lists somebody asked for: each exactly once, or held for a person.")
def export_audience_job() -> None:
    export_lists()


@dg.job(name=QUIET_JOB, executor_def=dg.in_process_executor, tags=LIMITED,
        description="What there is to say when nothing happened: health, digest, heartbeat.")
def quiet_morning_job() -> None:
    tell_quiet_side()


@dg.job(name=FOLLOW_UP_JOB, executor_def=dg.in_process_executor, tags=LIMITED,
        description="Finishes what could not be finished at once.")
def follow_up_job() -> None:
    follow_up()
