"""What must hold for a table before it replaces the old one. Each check counts its violations; one query asks them all.

They run on the rows just computed, before the partition is replaced, so a broken rule never overwrites a good day.
"""

from __future__ import annotations

from dataclasses import dataclass

from retention_ops.settings import Settings
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.seam import Connection

# table -> check name -> SQL counting violations; {rows} are the rows under check, the rest are settings
_RULES: dict[str, dict[str, str]] = {
    "retention_snapshot": {
        "status_matches_days": """SELECT COUNT(*) FROM {rows} WHERE days_since_last_order < 0 OR retention_status <>
            CASE WHEN days_since_last_order <= {active} THEN 'ACTIVE' WHEN days_since_last_order <= {at_risk} THEN 'AT_RISK'
            ELSE 'INACTIVE' END""",
    },
    "churn_detection": {
        "scores_in_range": "SELECT COUNT(*) FROM {rows} WHERE churn_risk_score NOT BETWEEN 0 AND 100",
        "levels_match_scores": """SELECT COUNT(*) FROM {rows} WHERE churn_risk_level <>
            CASE WHEN churn_risk_score >= {high} THEN 'HIGH' WHEN churn_risk_score >= {medium} THEN 'MEDIUM' ELSE 'LOW' END""",
    },
    "cohort_retention_evolution": {
        "month_0_is_100": """SELECT COUNT(*) FROM {rows}
            WHERE months_since_acquisition = 0 AND retention_rate <> 100""",
        "rates_in_range": "SELECT COUNT(*) FROM {rows} WHERE retention_rate NOT BETWEEN 0 AND 100",
    },
    "retention_daily": {
        "statuses_sum_to_customers": "SELECT COUNT(*) FROM {rows} WHERE active + at_risk + inactive <> customers",
    },
    "alert_logic": {
        "gated_rows_are_silent": """SELECT COUNT(*) FROM {rows}
            WHERE (gate IS NOT NULL AND (alert_flag OR severity <> 'INFO')) OR alert_flag <> (severity <> 'INFO')""",
        "severity_matches_delta": """SELECT COUNT(*) FROM {rows} WHERE gate IS NULL AND severity <>
            CASE WHEN round(delta_relative_pct, 9) >= threshold_critical THEN 'CRITICAL'
            WHEN round(delta_relative_pct, 9) >= threshold_warning THEN 'WARNING' ELSE 'INFO' END""",
    },
    "customer_priority": {
        "scores_in_range": "SELECT COUNT(*) FROM {rows} WHERE priority_score NOT BETWEEN 0 AND 100",
        "tiers_match_rules": """SELECT COUNT(*) FROM {rows} WHERE NOT CASE priority_tier
            WHEN 'P1' THEN retention_status = 'ACTIVE' AND churn_risk_level = 'HIGH'
            WHEN 'P2' THEN retention_status = 'AT_RISK' AND churn_risk_level IN ('HIGH', 'MEDIUM')
            WHEN 'P3' THEN retention_status = 'INACTIVE' AND churn_risk_level = 'HIGH' AND days_since_last_order <= 2 * {at_risk}
            ELSE false END""",
        "every_row_has_a_reason": "SELECT COUNT(*) FROM {rows} WHERE length(priority_reason) = 0",
    },
    "audience_current": {
        "lists_of_one_date": """SELECT CASE WHEN COUNT(*) = 0 THEN 0 ELSE COUNT(*) - 1 END
            FROM (SELECT DISTINCT alert_date, audience_sha256 FROM {rows})""",
        "handed_over_before": """SELECT COUNT(*) FROM {rows}
            WHERE new_since_handover <> (last_handed_over IS NULL) OR last_handed_over >= alert_date""",
    },
}


@dataclass(frozen=True)
class Check:
    """One rule and how many rows broke it."""

    name: str
    violations: int

    @property
    def passed(self) -> bool:
        return self.violations == 0


def check_names(table: str) -> list[str]:
    """All checks of a table, in order."""
    return ["key_is_unique", "no_nulls", *_RULES.get(table, {})]


def check(connection: Connection, table: str, settings: Settings, where: str = "true") -> list[Check]:
    """Runs every check of `table` on the rows (`where`) of the connection's temp table of that name."""
    rows = f"(SELECT * FROM {table} WHERE {where})"
    declared = TABLES[table]
    key = ", ".join(declared.key)
    nulls = " OR ".join(f"{column.name} IS NULL" for column in declared.columns if not column.nullable)
    values = {
        "rows": rows,
        "active": settings.active_limit, "at_risk": settings.at_risk_limit,
        "high": settings.high_risk_score, "medium": settings.medium_risk_score,
    }
    statements = {
        "key_is_unique": f"SELECT COALESCE(SUM(copies - 1), 0) FROM (SELECT COUNT(*) AS copies FROM {rows} GROUP BY {key})",
        "no_nulls": f"SELECT COUNT(*) FROM {rows} WHERE {nulls}",
        **{name: sql.format(**values) for name, sql in _RULES.get(table, {}).items()},
    }
    counts = connection.execute("SELECT " + ", ".join(f"({sql}) AS {name}" for name, sql in statements.items())).fetchall()[0]
    return [Check(name, int(count)) for name, count in zip(statements, counts, strict=True)]
