"""Execute: the answer to each flagged date, according to the mode."""

import dagster as dg

from retention_ops.execute.job import metadata_of
from retention_ops.orchestration import OWNERS, Loop, days_of, open_responder


def execute_assets(partitions_def: dg.DailyPartitionsDefinition) -> list[dg.AssetsDefinition]:
    """incident_response."""

    @dg.asset(
        name="incident_response", group_name="execute", kinds={"python"}, owners=OWNERS,
        description="Answers every flagged date of the run, and its newest date in any case; each answer is a row of ops_runs_log.",
        deps=["action_pack", "alert_logic"], partitions_def=partitions_def,
        backfill_policy=dg.BackfillPolicy.single_run(), code_version="2",
    )
    def incident_response(context: dg.AssetExecutionContext, loop: dg.ResourceParam[Loop]) -> dg.MaterializeResult:
        days = days_of(context)
        with open_responder(loop, context.run.run_id) as responder:
            known = responder.known(days[0], days[-1])
            # the newest first: what it stands for is logged with it
            for done, day in enumerate(reversed(days), start=1):
                answering = responder.on(day, known)
                alert = answering.gatekeeper.alert(day, known)
                if answering.gatekeeper.concerns(day, alert) or day == days[-1]:
                    metadata = metadata_of(answering.answer(day), answering.actions(day))
                else:
                    metadata = {"status": "quiet", "severity": alert["severity"], "mode": answering.settings.mode}
                context.add_asset_metadata(metadata, partition_key=day.isoformat())
                loop.progress("incident_response", done, len(days))
            responder.expire_lists()  # what cannot be deleted now stands in the ledger and is tried again
        return dg.MaterializeResult()

    return [incident_response]
