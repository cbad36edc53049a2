"""A comparison turned around in a rule does not go unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from retention_ops.warehouse.render import FAST_FILES, FILES, query
from retention_ops_tests.warehouse import edges, mutations, second_rule

EQUIVALENT = {
    # without a second shopping day gaps and span are both 0, and 0 > 0 is as false as the condition in front of it
    ("03_churn_detection.sql", "gaps > 0 AND 100 * days_since_last_order * gaps > @frequency_drop_pct * span_days AS is_frequency_drop,",
     "gaps >= 0 AND 100 * days_since_last_order * gaps > @frequency_drop_pct * span_days AS is_frequency_drop,"),
    ("03_churn_detection.sql", "OR (gaps > 0 AND 100 * days_since_last_order * gaps > @inconsistent_gap_pct * span_days)",
     "OR (gaps >= 0 AND 100 * days_since_last_order * gaps > @inconsistent_gap_pct * span_days)"),
    # an order on the last day is due on no day of the range: the join, or the runs, leave it out again
    ("05_due_daily.sql", "WHERE order_date < @to_date", "WHERE order_date <= @to_date"),
    *((file, "WHERE order_date < @to_date AND (next_order_date IS NULL OR next_order_date >= @from_date)",
       "WHERE order_date <= @to_date AND (next_order_date IS NULL OR next_order_date >= @from_date)")
      for file in ("07_due_customers.sql", "fast/due_daily.sql")),
    # either branch gives the same value where both sides are equal
    ("05_returning_customers.sql", "CASE WHEN noise.overdispersion > 1 THEN noise.overdispersion ELSE 1.0 END AS overdispersion,",
     "CASE WHEN noise.overdispersion >= 1 THEN noise.overdispersion ELSE 1.0 END AS overdispersion,"),
    ("05_returning_customers.sql",
     "SQRT((CASE WHEN noise.overdispersion > 1 THEN noise.overdispersion ELSE 1.0 END) * windows.expected) AS spread",
     "SQRT((CASE WHEN noise.overdispersion >= 1 THEN noise.overdispersion ELSE 1.0 END) * windows.expected) AS spread"),
    ("05_returning_customers.sql",
     "CASE WHEN expected < warning_line * spread THEN 0.0 ELSE expected - warning_line * spread END AS expected_low,",
     "CASE WHEN expected <= warning_line * spread THEN 0.0 ELSE expected - warning_line * spread END AS expected_low,"),
    ("fast/due_daily.sql", "UNIX_DATE(CASE WHEN next_order_date <= @to_date THEN next_order_date ELSE @to_date END) AS last_day,",
     "UNIX_DATE(CASE WHEN next_order_date < @to_date THEN next_order_date ELSE @to_date END) AS last_day,"),
    # no gap: 0 days > 0 days is false as well
    ("07_due_customers.sql",
     "due.returned = 0 AND as_of_d.gaps > 0 AND as_of_d.days_since_last_order * as_of_d.gaps > as_of_d.span_days AS is_overdue,",
     "due.returned = 0 AND as_of_d.gaps >= 0 AND as_of_d.days_since_last_order * as_of_d.gaps > as_of_d.span_days AS is_overdue,"),
    # nobody more is added to a day that the calendar names anyway
    ("fast/due_daily.sql", "WHERE returned > 0 AND to_day >= UNIX_DATE(@from_date)",
     "WHERE returned >= 0 AND to_day >= UNIX_DATE(@from_date)"),
    # both only spare work: a silence that ended with the range's first day, or with ACTIVE, is cut to nothing further down
    ("fast/priority_intervals.sql", "AND (next_order_date IS NULL OR next_order_date > @from_date)",
     "AND (next_order_date IS NULL OR next_order_date >= @from_date)"),
    ("fast/priority_intervals.sql",
     "OR (last_day > @active_days AND medium_from <= last_day)", "OR (last_day >= @active_days AND medium_from <= last_day)"),
    # either branch gives the same value where both sides are equal
    ("fast/priority_intervals.sql",
     "WHEN refunded.from_date > customer_days.order_date THEN DATE_DIFF(refunded.from_date, customer_days.order_date, DAY)",
     "WHEN refunded.from_date >= customer_days.order_date THEN DATE_DIFF(refunded.from_date, customer_days.order_date, DAY)"),
    ("fast/priority_intervals.sql",
     "WHEN refunded.until_date < next_order_date OR (refunded.until_date IS NOT NULL AND next_order_date IS NULL)",
     "WHEN refunded.until_date <= next_order_date OR (refunded.until_date IS NOT NULL AND next_order_date IS NULL)"),
    # both only spare work: a stretch that begins with the next order, or ends before its silence begins, has no day
    ("fast/priority_intervals.sql", "AND (next_order_date IS NULL OR refunded.from_date < next_order_date)",
     "AND (next_order_date IS NULL OR refunded.from_date <= next_order_date)"),
    ("fast/priority_intervals.sql", "AND (refunded.until_date IS NULL OR refunded.until_date > customer_days.order_date)",
     "AND (refunded.until_date IS NULL OR refunded.until_date >= customer_days.order_date)"),
    # four shopping days are the edge 4 either way
    *((file, f"WHEN {days} < 4 THEN {days}", f"WHEN {days} <= 4 THEN {days}") for file, days in (
        ("06_customer_priority.sql", "order_days"), ("06_return_windows.sql", "order_days_so_far"),
        ("fast/return_windows.sql", "order_days_so_far"))),
    # only spares work: a silence that ended with the range's first day is on none of them
    ("fast/return_windows.sql", "AND (next_order_date IS NULL OR next_order_date > @from_date)",
     "AND (next_order_date IS NULL OR next_order_date >= @from_date)"),
    # either branch gives the same value where both sides are equal
    ("fast/return_windows.sql",
     "CASE WHEN back.number < orders_on.too_long_number THEN back.number ELSE orders_on.too_long_number END AS to_number,",
     "CASE WHEN back.number <= orders_on.too_long_number THEN back.number ELSE orders_on.too_long_number END AS to_number,"),
}
SOME = {
    ("02_retention_snapshot.sql", "WHEN days_since_last_order <= @active_days THEN 'ACTIVE'"),
    ("03_churn_detection.sql", "gaps > 0 AND 100 * days_since_last_order * gaps > @frequency_drop_pct * span_days AS is_frequency_drop,"),
    ("05_alert_logic.sql", "WHEN ROUND(delta_relative_pct, 9) >= @warning_pct THEN 'WARNING'"),
    ("05_retention_daily.sql", "SUM(CASE WHEN days_since_last_order > @at_risk_days THEN 1 ELSE 0 END) AS inactive"),
    ("06_customer_priority.sql", "WHEN total_revenue_cents > @vip_revenue_cents THEN @action_p1_vip"),
    ("fast/retention_daily.sql", "WHERE day <= UNIX_DATE(@to_date)"),
    ("fast/priority_intervals.sql", "WHERE from_day <= to_day"),
    ("05_due_daily.sql", "WHEN silence < 8 THEN 4"),
    ("05_returning_customers.sql",
     "WHEN ROUND(score, 9) >= @shortfall_critical OR ROUND(1.5 * lasting_score, 9) >= @shortfall_critical THEN 'CRITICAL'"),
    ("05_returning_customers.sql", "WHERE window_days = 1 AND 4 * observed < expected"),
    ("07_due_customers.sql", "WHEN silence < 31 THEN 22"),
    ("06_return_days.sql", "WHERE DATE_DIFF(days.day, first_order.first_order_date, DAY) >= looks.needed + 30"),
    ("06_return_windows.sql", "CASE WHEN back_in <= 90 THEN 1 ELSE 0 END AS in_90"),
    ("06_return_rates.sql", "WHERE return_days.purpose <> 'learn'"),
    ("fast/return_windows.sql", "WHEN late_pct < 150 THEN 100"),
    ("08_shortfall_slices.sql", "JOIN returning_customers ON returning_customers.alert_date = @to_date"),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return list(edges.cases(tmp_path_factory.mktemp("edges")))


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    found = second_rule.Checks(tmp_path_factory.mktemp("second"))
    yield found
    found.close()


@pytest.mark.slow
def test_the_checks_find_nothing_in_the_rules_as_they_are_and_some_turned_comparisons(cases, checks):
    """One in each file with a threshold; by DuckDB against the oracle, as the reference implementation gives the same rows.

    One test, so that the checks are made by one worker only.
    """
    assert {check.table for check in checks.checks} == {
        table for table, file in {**FILES, **FAST_FILES}.items() if file in second_rule.FILES} | {"customer_priority"}
    assert [line for check in checks.checks for line in check.differences(query(check.table))] == []
    assert checks.reference(query("due_customers")) == []
    chosen = [mutant for mutant in mutations.mutants()
              if (mutant.file, mutant.before) in SOME and (mutant.file, mutant.before, mutant.after) not in EQUIVALENT]
    assert {(mutant.file, mutant.before) for mutant in chosen} == SOME
    assert [mutant for mutant in chosen if mutations.noticed(mutant, cases, checks) is None] == []


def test_the_report_is_about_the_rules_as_they_are():
    root = Path(__file__).resolve().parents[2]
    reported = [line.split(" | ")[:4] for line in (root / "docs" / "sql_mutations.md").read_text(encoding="utf-8").splitlines()
                if line.startswith("| ") and ".sql" in line]
    mutants = list(mutations.mutants())
    assert reported == [[f"| {mutant.file}", str(mutant.line), f"`{mutant.before}`", f"`{mutant.after}`"] for mutant in mutants]
    assert f"Each of the {len(mutants)} comparisons" in (root / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_turned_comparison_is_noticed(cases, checks):
    unnoticed = {(mutant.file, mutant.before, mutant.after) for mutant in mutations.mutants()
                 if mutations.noticed(mutant, cases, checks) is None}
    assert unnoticed == EQUIVALENT
