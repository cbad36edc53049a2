"""Detect: facts, status, churn risk, cohorts and the macro alert, one asset per rule in sql/."""

import dagster as dg

from retention_ops.detect.compute import Workspace
from retention_ops.orchestration import (
    CheckTally,
    Loop,
    by_day,
    check_specs,
    counts_tables,
    described,
    in_one_pass,
    one_by_one,
    store_days,
)


def _facts(space: Workspace) -> dict:
    return by_day(
        space, "base_customers", one_order_customers="COUNT(*) FILTER (total_orders = 1)",
        first_order_date="CAST(MIN(first_order_date) AS VARCHAR)", last_order_date="CAST(MAX(last_order_date) AS VARCHAR)",
        total_revenue="SUM(total_revenue_cents) / 100",
    )


def _statuses(space: Workspace) -> dict:
    tables = counts_tables(space, "retention_snapshot", ["retention_status"])
    return {day: {"distribution": table} for day, table in tables.items()}


def _risks(space: Workspace) -> dict:
    tables = counts_tables(space, "churn_detection", ["retention_status", "churn_risk_level"])
    signals = by_day(
        space, "churn_detection", late_by_own_rhythm="COUNT(*) FILTER (is_frequency_drop)",
        spending_less="COUNT(*) FILTER (is_value_drop)", not_settled="COUNT(*) FILTER (is_status_inconsistent)",
    )
    return {day: {"distribution": table, **signals[day]} for day, table in tables.items()}


def _daily(space: Workspace) -> dict:
    names = ("customers", "active", "at_risk", "inactive", "at_risk_pct")
    return by_day(space, "retention_daily", **{name: f"any_value({name})" for name in names})


def _alert(space: Workspace) -> dict:
    names = ("severity", "alert_flag", "gate", "current_value", "baseline_value", "delta_pct", "delta_relative_pct", "sample_size")
    return by_day(space, "alert_logic", **{name: f"any_value({name})" for name in names})


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
    with loop.workspace(context.run_id) as space:
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
