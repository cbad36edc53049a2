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
        SELECT COUNT(CASE WHEN total_orders = 1 THEN 1 END), MIN(first_order_date), MAX(last_order_date), SUM(total_revenue_cents) / 100
        FROM base_customers""").fetchall()[0]
    return {
        "one_order_customers": row[0], "first_order_date": str(row[1]), "last_order_date": str(row[2]), "total_revenue": row[3] or 0.0,
    }


def _statuses(space: Workspace, where: str) -> dict:
    return {"distribution": dg.MetadataValue.md(counts_table(space, "retention_snapshot", ["retention_status"]))}


def _risks(space: Workspace, where: str) -> dict:
    signals = space.connection.execute("""
        SELECT COUNT(CASE WHEN is_frequency_drop THEN 1 END), COUNT(CASE WHEN is_value_drop THEN 1 END),
               COUNT(CASE WHEN is_status_inconsistent THEN 1 END)
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
                **space.cost(),
            })
    loop.lake.refresh_views()
    loop.progress(table, 1, 1)
    yield from tally.finish()


def _cohort_table(space: Workspace) -> str:
    """The newest twelve cohorts, months 0 to 6, in %."""
    rows = space.connection.execute("""
        SELECT cohort_month, cohort_size, months_since_acquisition, ROUND(retention_rate, 1)
        FROM cohort_retention_evolution WHERE months_since_acquisition <= 6
        ORDER BY cohort_month DESC, months_since_acquisition LIMIT 84""").fetchall()
    cohorts: dict[tuple, dict[int, float]] = {}
    for month, size, later, rate in rows:
        cohorts.setdefault((f"{month:%Y-%m}", size), {})[later] = rate
    lines = ["| cohort | customers | M+0 | M+1 | M+2 | M+3 | M+4 | M+5 | M+6 |", "|" + "---|" * 9]
    for cohort, rates in list(cohorts.items())[:12]:
        lines.append("| " + " | ".join(str(value) for value in (*cohort, *(rates.get(later, "") for later in range(7)))) + " |")
    return "\n".join(lines)
