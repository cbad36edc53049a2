"""Execute: the answer to each flagged date, according to the mode."""

from datetime import date
from typing import Any

import dagster as dg

from retention_ops.errors import PackError
from retention_ops.execute.respond import respond
from retention_ops.log.database import ops_database
from retention_ops.orchestration import OWNERS, Loop, days_of
from retention_ops.package.audiences import TIERS
from retention_ops.package.pack import find_pack, records


def answer_day(loop: Loop, engine, day: date, alert: dict[str, Any], run_id: str) -> dict[str, Any]:
    """Answers one date and returns its ops_runs_log row. Raises PackError where the date has no pack."""
    pack = find_pack(loop.settings, day)
    if pack is None:
        raise PackError(f"{day} has no Action Pack; `retention-ops run --date {day}` builds it")
    counts = {tier: pack.manifest["audiences"][tier]["listed"] for tier in TIERS}
    complete_through = loop.lake.orders().complete_through
    return respond(pack, alert, complete_through, engine, loop.settings, run_id=run_id, counts=counts, clock=loop.clock)


def execute_assets(partitions_def: dg.DailyPartitionsDefinition) -> list[dg.AssetsDefinition]:
    """incident_response."""

    @dg.asset(
        name="incident_response", group_name="execute", kinds={"python"}, owners=OWNERS,
        description="Answers every flagged date of the run, and its newest date in any case; each answer is a row of ops_runs_log.",
        deps=["action_pack", "alert_logic"], partitions_def=partitions_def,
        backfill_policy=dg.BackfillPolicy.single_run(), code_version="1",
    )
    def incident_response(context: dg.AssetExecutionContext, loop: dg.ResourceParam[Loop]) -> dg.MaterializeResult:
        days = days_of(context)
        alerts = {row["alert_date"]: row for row in records(loop.lake.read_range("alert_logic", days[0], days[-1]))}
        with ops_database(loop.settings) as engine:
            for done, day in enumerate(days, start=1):
                if day.isoformat() not in alerts:
                    raise PackError(f"{day} has no alert_logic row; `retention-ops run --date {day}` computes it")
                alert = alerts[day.isoformat()]
                if alert["alert_flag"] or day == days[-1]:
                    row = answer_day(loop, engine, day, alert, context.run.run_id)
                    metadata = {name: row[name] for name in ("status", "mode", "severity", "total_exported", "row_hash")}
                    if row["error_message"]:
                        metadata["reason"] = row["error_message"]
                else:
                    metadata = {"status": "quiet", "severity": alert["severity"], "mode": loop.settings.mode}
                context.add_asset_metadata(metadata, partition_key=day.isoformat())
                loop.progress("incident_response", done, len(days))
        return dg.MaterializeResult()

    return [incident_response]
