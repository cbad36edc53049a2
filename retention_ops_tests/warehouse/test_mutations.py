"""A comparison turned around in a rule does not go unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from retention_ops_tests.warehouse import edges, mutations

EQUIVALENT = {
    # without a second shopping day gaps and span are both 0, and 0 > 0 is as false as the condition in front of it
    ("03_churn_detection.sql", "gaps > 0 AND 100 * days_since_last_order * gaps > @frequency_drop_pct * span_days AS is_frequency_drop,",
     "gaps >= 0 AND 100 * days_since_last_order * gaps > @frequency_drop_pct * span_days AS is_frequency_drop,"),
    ("03_churn_detection.sql", "OR (gaps > 0 AND 100 * days_since_last_order * gaps > @inconsistent_gap_pct * span_days)",
     "OR (gaps >= 0 AND 100 * days_since_last_order * gaps > @inconsistent_gap_pct * span_days)"),
    # both only spare work: a silence that ended with the range's first day, or with ACTIVE, is cut to nothing further down
    ("fast/priority_intervals.sql", "AND (next_order_date IS NULL OR next_order_date > @from_date)",
     "AND (next_order_date IS NULL OR next_order_date >= @from_date)"),
    ("fast/priority_intervals.sql",
     "WHERE active_high_from <= LEAST(last_day, @active_days) OR (last_day > @active_days AND medium_from <= last_day)",
     "WHERE active_high_from <= LEAST(last_day, @active_days) OR (last_day >= @active_days AND medium_from <= last_day)"),
}
SEVEN = {
    ("02_retention_snapshot.sql", "WHEN days_since_last_order <= @active_days THEN 'ACTIVE'"),
    ("03_churn_detection.sql", "gaps > 0 AND 100 * days_since_last_order * gaps > @frequency_drop_pct * span_days AS is_frequency_drop,"),
    ("05_alert_logic.sql", "WHEN ROUND(delta_relative_pct, 9) >= @warning_pct THEN 'WARNING'"),
    ("05_retention_daily.sql", "SUM(CASE WHEN days_since_last_order > @at_risk_days THEN 1 ELSE 0 END) AS inactive"),
    ("06_customer_priority.sql", "WHEN total_revenue_cents > @vip_revenue_cents THEN @action_p1_vip"),
    ("fast/retention_daily.sql", "WHERE day <= UNIX_DATE(@to_date)"),
    ("fast/priority_intervals.sql", "WHERE from_day <= to_day"),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return list(edges.cases(tmp_path_factory.mktemp("edges")))


def test_the_report_is_about_the_rules_as_they_are():
    root = Path(__file__).resolve().parents[2]
    reported = [line.split(" | ")[:4] for line in (root / "docs" / "sql_mutations.md").read_text(encoding="utf-8").splitlines()
                if line.startswith("| ") and ".sql" in line]
    mutants = list(mutations.mutants())
    assert reported == [[f"| {mutant.file}", str(mutant.line), f"`{mutant.before}`", f"`{mutant.after}`"] for mutant in mutants]
    assert f"Each of the {len(mutants)} comparisons" in (root / "README.md").read_text(encoding="utf-8")


def test_seven_turned_comparisons_are_noticed(cases):
    """One in each file with a threshold; by DuckDB against the oracle, as the reference implementation gives the same rows."""
    chosen = [mutant for mutant in mutations.mutants()
              if (mutant.file, mutant.before) in SEVEN and (mutant.file, mutant.before, mutant.after) not in EQUIVALENT]
    assert {(mutant.file, mutant.before) for mutant in chosen} == SEVEN
    assert [mutant for mutant in chosen if mutations.noticed(mutant, cases) is None] == []


@pytest.mark.slow
def test_every_turned_comparison_is_noticed(cases):
    unnoticed = {(mutant.file, mutant.before, mutant.after) for mutant in mutations.mutants() if mutations.noticed(mutant, cases) is None}
    assert unnoticed == EQUIVALENT
