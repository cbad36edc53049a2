"""Detect: facts, status, churn risk, cohorts and the macro alert, one asset per rule in sql/."""

import dagster as dg

from retention_ops.detect.alerts import AT_RISK, SHORTFALL
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
        space, "base_customers", one_order_customers="COUNT(CASE WHEN total_orders = 1 THEN 1 END)",
        first_order_date="MIN(first_order_date)", last_order_date="MAX(last_order_date)", total_revenue="SUM(total_revenue_cents) / 100",
    )


def _statuses(space: Workspace) -> dict:
    tables = counts_tables(space, "retention_snapshot", ["retention_status"])
    return {day: {"distribution": table} for day, table in tables.items()}


def _risks(space: Workspace) -> dict:
    tables = counts_tables(space, "churn_detection", ["retention_status", "churn_risk_level"])
    signals = by_day(
        space, "churn_detection", late_by_own_rhythm="COUNT(CASE WHEN is_frequency_drop THEN 1 END)",
        spending_less="COUNT(CASE WHEN is_value_drop THEN 1 END)", not_settled="COUNT(CASE WHEN is_status_inconsistent THEN 1 END)",
    )
    return {day: {"distribution": table, **signals[day]} for day, table in tables.items()}


def _daily(space: Workspace) -> dict:
    names = ("customers", "active", "at_risk", "inactive", "at_risk_pct")
    return by_day(space, "retention_daily", **{name: f"any_value({name})" for name in names})


def _alert(space: Workspace) -> dict:
    def of(rule: str, column: str) -> str:
        return f"MAX(CASE WHEN alert_type = '{rule}' THEN {column} END)"

    names = ("severity", "alert_flag", "gate", "current_value", "baseline_value", "delta_pct", "delta_relative_pct", "sample_size")
    shortfall = ("severity", "gate", "sentence", "observed", "expected", "expected_low", "score", "window_days")
    return by_day(
        space, "alert_logic", **{name: of(AT_RISK, name) for name in names},
        **{f"returning_{name}": of(SHORTFALL, name) for name in shortfall},
    )


def day_assets(partitions_def: dg.DailyPartitionsDefinition) -> list[dg.AssetsDefinition]:
    """The assets with one partition per reference date."""

    def table_asset(table: str, deps: list[str], compute, describe, code_version: str = "1") -> dg.AssetsDefinition:
        @dg.asset(
            **described(table, "detect", "duckdb", "sql"), deps=deps, partitions_def=partitions_def,
            backfill_policy=dg.BackfillPolicy.single_run(), check_specs=check_specs(table), code_version=code_version,
        )
        def _asset(context: dg.AssetExecutionContext, loop: dg.ResourceParam[Loop]):
            yield from store_days(context, loop, table, compute(table), describe)

        return _asset

    return [
        table_asset("base_customers", ["customer_days"], one_by_one, _facts),
        table_asset("retention_snapshot", ["base_customers"], one_by_one, _statuses),
        table_asset("churn_detection", ["retention_snapshot"], one_by_one, _risks),
        table_asset("retention_daily", ["customer_days"], in_one_pass, _daily),
        table_asset("alert_logic", ["retention_daily", "customer_days"], in_one_pass, _alert, code_version="2"),
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
