"""Detect: facts, status, churn risk, cohorts and the macro alert, one asset per rule in sql/."""

import dagster as dg

from retention_ops.detect.compute import Workspace, workspace
from retention_ops.orchestration import (
    CheckTally,
    Loop,
    check_specs,
    counts_table,
    described,
    in_one_pass,
    one_by_one,
    store_days,
)


def _facts(space: Workspace, where: str) -> dict:
    row = space.connection.execute("""
        SELECT COUNT(*) FILTER (total_orders = 1), MIN(first_order_date), MAX(last_order_date), SUM(total_revenue_cents) / 100
        FROM base_customers""").fetchall()[0]
    return {
        "one_order_customers": row[0], "first_order_date": str(row[1]), "last_order_date": str(row[2]), "total_revenue": row[3] or 0.0,
    }


def _statuses(space: Workspace, where: str) -> dict:
    return {"distribution": dg.MetadataValue.md(counts_table(space, "retention_snapshot", ["retention_status"]))}


def _risks(space: Workspace, where: str) -> dict:
    signals = space.connection.execute("""
        SELECT COUNT(*) FILTER (is_frequency_drop), COUNT(*) FILTER (is_value_drop), COUNT(*) FILTER (is_status_inconsistent)
        FROM churn_detection""").fetchall()[0]
    return {
        "distribution": dg.MetadataValue.md(counts_table(space, "churn_detection", ["retention_status", "churn_risk_level"])),
        "late_by_own_rhythm": signals[0], "spending_less": signals[1], "not_settled": signals[2],
    }


def _daily(space: Workspace, where: str) -> dict:
    row = space.connection.execute(f"SELECT customers, active, at_risk, inactive, at_risk_pct FROM retention_daily WHERE {where}")
    customers, active, at_risk, inactive, pct = row.fetchall()[0]
    return {"customers": customers, "active": active, "at_risk": at_risk, "inactive": inactive,
            **({"at_risk_pct": pct} if pct is not None else {})}


def _alert(space: Workspace, where: str) -> dict:
    names = ("severity", "alert_flag", "gate", "current_value", "baseline_value", "delta_pct", "delta_relative_pct", "sample_size")
    row = space.connection.execute(f"SELECT {', '.join(names)} FROM alert_logic WHERE {where}").fetchall()[0]
    return {name: value for name, value in zip(names, row, strict=True) if value is not None}


def day_assets(partitions_def: dg.DailyPartitionsDefinition) -> list[dg.AssetsDefinition]:
    """The assets with one partition per reference date."""

    def table_asset(table: str, deps: list[str], compute, describe) -> dg.AssetsDefinition:
        @dg.asset(
            **described(table, "detect", "duckdb", "sql"), deps=deps, partitions_def=partitions_def,
            backfill_policy=dg.BackfillPolicy.single_run(), check_specs=check_specs(table), code_version="1",
        )
        def _asset(context: dg.AssetExecutionContext, loop: dg.ResourceParam[Loop]):
            yield from store_days(context, loop, table, compute(table), describe)

        return _asset

    return [
        table_asset("base_customers", ["customer_days"], one_by_one, _facts),
        table_asset("retention_snapshot", ["base_customers"], one_by_one, _statuses),
        table_asset("churn_detection", ["retention_snapshot"], one_by_one, _risks),
        table_asset("retention_daily", ["customer_days"], in_one_pass, _daily),
        table_asset("alert_logic", ["retention_daily"], in_one_pass, _alert),
    ]


@dg.asset(
    **described("cohort_retention_evolution", "detect", "duckdb", "sql"), deps=["customer_days"],
    check_specs=check_specs("cohort_retention_evolution"), code_version="1",
)
def cohort_retention_evolution(context: dg.AssetExecutionContext, loop: dg.ResourceParam[Loop]):
    table = "cohort_retention_evolution"
    tally = CheckTally(table)
    with workspace(loop.lake) as space:
        space.build_cohorts()
        if tally.passes(space, "all"):
            rows = loop.lake.write(space.connection, table, None, space.provenance)
            context.add_asset_metadata({
                "dagster/row_count": rows,
                "retention_by_cohort": dg.MetadataValue.md(_cohort_table(space)),
                "path": dg.MetadataValue.path(str(loop.lake.path(table))),
                **space.provenance,
            })
    loop.lake.refresh_views()
    loop.progress(table, 1, 1)
    yield from tally.finish()


def _cohort_table(space: Workspace) -> str:
    """The newest twelve cohorts, months 0 to 6, in %."""
    rows = space.connection.execute("""
        PIVOT (SELECT strftime(cohort_month, '%Y-%m') AS cohort, cohort_size AS customers, months_since_acquisition AS m,
                      round(retention_rate, 1) AS rate
               FROM cohort_retention_evolution WHERE months_since_acquisition <= 6)
        ON m IN (0, 1, 2, 3, 4, 5, 6) USING any_value(rate) ORDER BY cohort DESC LIMIT 12""").fetchall()
    lines = ["| cohort | customers | M+0 | M+1 | M+2 | M+3 | M+4 | M+5 | M+6 |", "|" + "---|" * 9]
    return "\n".join(lines + ["| " + " | ".join("" if value is None else str(value) for value in row) + " |" for row in rows])
