"""What must hold for a table before it replaces the old one. Each check counts its violations, all days in one query.

They run on the rows just computed, before the partition is replaced, so a broken rule never overwrites a good day.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from retention_ops.settings import Settings
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.seam import Connection

# table -> check name -> SQL that is true of a row that breaks the rule; names in braces are settings
_ROW_RULES: dict[str, dict[str, str]] = {
    "retention_snapshot": {
        "status_matches_days": """days_since_last_order < 0 OR retention_status <>
            CASE WHEN days_since_last_order <= {active} THEN 'ACTIVE' WHEN days_since_last_order <= {at_risk} THEN 'AT_RISK'
            ELSE 'INACTIVE' END""",
    },
    "churn_detection": {
        "scores_in_range": "churn_risk_score NOT BETWEEN 0 AND 100",
        "levels_match_scores": """churn_risk_level <>
            CASE WHEN churn_risk_score >= {high} THEN 'HIGH' WHEN churn_risk_score >= {medium} THEN 'MEDIUM' ELSE 'LOW' END""",
    },
    "cohort_retention_evolution": {
        "month_0_is_100": "months_since_acquisition = 0 AND retention_rate <> 100",
        "rates_in_range": "retention_rate NOT BETWEEN 0 AND 100",
    },
    "retention_daily": {
        "statuses_sum_to_customers": "active + at_risk + inactive <> customers OR least(active, at_risk, inactive) < 0",
    },
    "alert_logic": {
        "gated_rows_are_silent": "(gate IS NOT NULL AND (alert_flag OR severity <> 'INFO')) OR alert_flag <> (severity <> 'INFO')",
        "severity_matches_delta": """gate IS NULL AND alert_type = 'retention_status_degradation' AND severity <>
            CASE WHEN round(delta_relative_pct, 9) >= threshold_critical THEN 'CRITICAL'
            WHEN round(delta_relative_pct, 9) >= threshold_warning THEN 'WARNING' ELSE 'INFO' END""",
        "severity_matches_score": """gate IS NULL AND alert_type = 'returning_customers_shortfall' AND severity <>
            CASE WHEN round(greatest(score, COALESCE(1.5 * lasting_score, score)), 9) >= {shortfall_critical} THEN 'CRITICAL'
            WHEN round(greatest(score, COALESCE(1.5 * lasting_score, score)), 9) >= {shortfall_warning} THEN 'WARNING' ELSE 'INFO' END""",
    },
    "customer_priority": {
        "scores_in_range": "priority_score NOT BETWEEN 0 AND 100",
        "tiers_match_rules": """NOT CASE priority_tier
            WHEN 'P1' THEN retention_status = 'ACTIVE' AND churn_risk_level IN {p1_levels}
            WHEN 'P2' THEN retention_status = 'AT_RISK' AND churn_risk_level IN {p2_levels}
            WHEN 'P3' THEN retention_status = 'INACTIVE' AND churn_risk_level IN {p1_levels} AND days_since_last_order <= 2 * {at_risk}
            ELSE false END""",
        "stakes_are_shares": "NOT (spend_at_stake BETWEEN 0 AND usual_spend_90d AND p_no_return_90d BETWEEN 0 AND 1)",
        "every_row_has_a_reason": "length(priority_reason) = 0",
    },
    "audience_current": {
        "handed_over_before": "new_since_handover <> (last_handed_over IS NULL) OR last_handed_over >= alert_date",
    },
}
# the same for what only all rows together can break: SQL that counts
_TABLE_RULES: dict[str, dict[str, str]] = {
    "audience_current": {"lists_of_one_date": "greatest(COUNT(DISTINCT alert_date), COUNT(DISTINCT audience_sha256), 1) - 1"},
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
    return ["key_is_unique", "no_nulls", *_TABLE_RULES.get(table, {}), *_ROW_RULES.get(table, {})]


def check(connection: Connection, table: str, settings: Settings) -> list[Check]:
    """Runs every check of `table` on all rows of the connection's table of that name."""
    counts = connection.execute(f"SELECT {', '.join(_counts(table, settings))} FROM {table}").fetchall()[0]
    return _checks(table, counts)


def check_days(connection: Connection, table: str, settings: Settings) -> dict[date, list[Check]]:
    """The same day by day, for a table with a date column; a day without rows has nothing to check and is not listed."""
    day = TABLES[table].date_column
    rows = connection.execute(f"SELECT {day}, {', '.join(_counts(table, settings))} FROM {table} GROUP BY {day}").fetchall()
    return {row[0]: _checks(table, row[1:]) for row in rows}


def _counts(table: str, settings: Settings) -> list[str]:
    """SQL that counts the violations of each check."""
    declared = TABLES[table]
    nulls = " OR ".join(f"{column.name} IS NULL" for column in declared.columns if not column.nullable)
    anybody = settings.membership == "at_stake"
    values = {
        "p1_levels": "('HIGH', 'MEDIUM', 'LOW')" if anybody else "('HIGH')",
        "p2_levels": "('HIGH', 'MEDIUM', 'LOW')" if anybody else "('HIGH', 'MEDIUM')",
        "active": settings.active_limit, "at_risk": settings.at_risk_limit,
        "high": settings.high_risk_score, "medium": settings.medium_risk_score,
        "shortfall_warning": float(settings.shortfall_warning), "shortfall_critical": float(settings.shortfall_critical),
    }
    broken_rows = [nulls, *(rule.format(**values) for rule in _ROW_RULES.get(table, {}).values())]
    null_count, *row_counts = (f"COUNT(CASE WHEN {condition} THEN 1 END)" for condition in broken_rows)
    # within a day its date is no longer part of the key
    key = _as_one([name for name in declared.key if name != declared.date_column] or declared.key)
    return [f"COUNT(*) - COUNT(DISTINCT {key})", null_count, *_TABLE_RULES.get(table, {}).values(), *row_counts]


def _as_one(key: Sequence[str]) -> str:
    """SQL for the key as one value: GoogleSQL has no COUNT(DISTINCT (a, b)). Of two columns only the first may hold a space."""
    return key[0] if len(key) == 1 else "CONCAT(" + ", ' ', ".join(f"CAST({name} AS STRING)" for name in key) + ")"


def _checks(table: str, counts: Sequence[int]) -> list[Check]:
    return [Check(name, int(count)) for name, count in zip(check_names(table), counts, strict=True)]
