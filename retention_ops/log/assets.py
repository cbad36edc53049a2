"""Log: the audit trail as a table, as a file in each pack, and in the Dagster UI."""

import json

import dagster as dg

from retention_ops.log import runs
from retention_ops.log.database import ops_database
from retention_ops.orchestration import Loop, days_of, described
from retention_ops.package.pack import LOG_FILE, add_files, find_pack, plain

_SHOWN = ("alert_date", "severity", "status", "mode", "p1_count", "p2_count", "p3_count", "total_exported", "error_message")


def _markdown(rows: list[dict]) -> str:
    lines = [f"| {' | '.join(_SHOWN)} |", "|" + "---|" * len(_SHOWN)]
    for row in rows:
        cells = ("" if row[name] is None else str(row[name]).replace("|", "\\|").replace("\n", " ") for name in _SHOWN)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def log_assets(partitions_def: dg.DailyPartitionsDefinition) -> list[dg.AssetsDefinition]:
    """ops_runs_log."""

    @dg.asset(
        **described("ops_runs_log", "log", "sqlite", "parquet"), deps=["incident_response"], partitions_def=partitions_def,
        backfill_policy=dg.BackfillPolicy.single_run(), code_version="1",
    )
    def ops_runs_log(context: dg.AssetExecutionContext, loop: dg.ResourceParam[Loop]) -> dg.MaterializeResult:
        days = days_of(context)
        with ops_database(loop.settings) as engine:
            total = runs.export(engine, loop.lake)
            by_day: dict = {}
            for row in runs.rows(engine, first=days[0], last=days[-1]):
                by_day.setdefault(row["alert_date"], []).append(row)
        failed = []
        for done, day in enumerate(days, start=1):
            rows = by_day.get(day, [])
            pack = find_pack(loop.settings, day)
            if pack and rows:
                content = json.dumps([{name: plain(value) for name, value in row.items()} for row in rows], indent=1)
                add_files(pack, {LOG_FILE: (content.encode(), len(rows))})
            context.add_asset_metadata(
                {"dagster/row_count": total, "rows_of_this_date": len(rows),
                 **({"answers": dg.MetadataValue.md(_markdown(rows))} if rows else {})},
                partition_key=day.isoformat(),
            )
            failed += [row for row in rows if row["run_id"] == context.run.run_id and row["status"] == "failed"]
            loop.progress("ops_runs_log", done, len(days))
        loop.lake.refresh_views()
        if failed:
            raise dg.Failure("the response failed and is logged: " + "; ".join(f"{r['alert_date']}: {r['error_message']}" for r in failed))
        return dg.MaterializeResult()

    return [ops_runs_log]
