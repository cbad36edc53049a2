"""Log: the audit trail as a table, as a file in each pack, and in the Dagster UI."""

import dagster as dg

from retention_ops.execute.trail import markdown, publish_log
from retention_ops.log import runs
from retention_ops.log.database import ops_database
from retention_ops.orchestration import Loop, days_of, described


def log_assets(partitions_def: dg.DailyPartitionsDefinition) -> list[dg.AssetsDefinition]:
    """ops_runs_log."""

    @dg.asset(
        **described("ops_runs_log", "log", "sqlite", "parquet"), deps=["incident_response"], partitions_def=partitions_def,
        backfill_policy=dg.BackfillPolicy.single_run(), code_version="1",
    )
    def ops_runs_log(context: dg.AssetExecutionContext, loop: dg.ResourceParam[Loop]) -> dg.MaterializeResult:
        days = days_of(context)
        with ops_database(loop.settings) as engine:
            total = publish_log(loop.lake, engine, days)
            by_day = runs.by_date(engine, days[0], days[-1])
        failed = []
        for done, day in enumerate(days, start=1):
            rows = by_day.get(day, [])
            context.add_asset_metadata(
                {"dagster/row_count": total, "rows_of_this_date": len(rows),
                 **({"answers": dg.MetadataValue.md(markdown(rows))} if rows else {})},
                partition_key=day.isoformat(),
            )
            failed += [row for row in rows if row["run_id"] == context.run.run_id and row["status"] == "failed"]
            loop.progress("ops_runs_log", done, len(days))
        if failed:
            raise dg.Failure("the response failed and is logged: " + "; ".join(f"{r['alert_date']}: {r['error_message']}" for r in failed))
        return dg.MaterializeResult()

    return [ops_runs_log]
