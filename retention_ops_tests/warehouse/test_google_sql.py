"""The rules in sql/ are GoogleSQL: analyzed, executed and compared by Google's own reference implementation.

Tier 1 analyzes every file against the declared catalog. Tier 2 executes every file as it is written, executes its rendering on
DuckDB over the same shops, and holds both against the naive oracle. That is not the same as having run on BigQuery.
"""

from __future__ import annotations

import re
from datetime import date, timedelta

import pytest

from retention_ops.detect.compute import BASELINE_DAYS, DUE_DAYS, queue_of_range, workspace
from retention_ops.warehouse.catalog import RELATIONS, TABLES
from retention_ops.warehouse.render import FAST_FILES, FILES, Query, fast_query, query
from retention_ops_tests import oracle
from retention_ops_tests.detect.test_closures import closed, given, naive, random_shop
from retention_ops_tests.detect.test_returning_customers import close, some_attributes
from retention_ops_tests.oracle_returning import Returning
from retention_ops_tests.shops import lake_with, small_shop
from retention_ops_tests.warehouse import edges
from retention_ops_tests.warehouse.google_sql import engine

RULES = {file: read(table) for read, files in ((query, FILES), (fast_query, FAST_FILES)) for table, file in files.items()}
# silently wrong in one of the two dialects, or failing loudly in BigQuery or DuckDB 2.0
BANNED = {
    "DIV of an unparenthesised sum": r"\bDIV\(\s*[^()\s,]+\s*[-+]",
    "day of week, ISO week or week truncation": r"\b(DAYOFWEEK|ISOWEEK|WEEK)\b",
    "COUNTIF, which is NULL over a group of nulls": r"\bCOUNTIF\b",
    "MAX_BY or MIN_BY, unknown to GoogleSQL": r"\b(MAX_BY|MIN_BY)\b",
    "APPROX functions, which differ by engine": r"\bAPPROX_\w+",
    "a truncated or added date without CAST AS DATE": r"(?<!CAST\()\bDATE_(TRUNC|ADD)\(",
    "bare NUMERIC": r"\b(BIG)?NUMERIC\b",
    "ARRAY_AGG with LIMIT": r"ARRAY_AGG\([^)]*LIMIT",
}


@pytest.mark.parametrize("rule", [*RULES.values(), queue_of_range()], ids=[*RULES, "the queue of a range"])
def test_the_rule_is_google_sql_and_yields_the_declared_columns_and_types(rule: Query):
    assert edges.analyzed(rule).columns == [(column.name, column.type) for column in RELATIONS[rule.table].columns]


@pytest.mark.parametrize("file", RULES)
def test_the_rule_keeps_to_the_subset_both_engines_read_alike(file):
    code = re.sub(r"--[^\n]*", "", RULES[file].google_sql)
    assert [why for why, pattern in BANNED.items() if re.search(pattern, code)] == []


def test_the_analyzer_refuses_what_is_not_google_sql():
    with pytest.raises(Exception, match=r"Syntax error"):
        engine().analyze("SELECT customer_id::TEXT FROM orders", edges.CATALOG, {})


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return list(edges.cases(tmp_path_factory.mktemp("edges")))


GROUPS = {
    "customers on every line": lambda case: case.name == "customers on every line",
    "every other shop": lambda case: not case.scores and not case.learns and case.name != "customers on every line",
    "other scores": lambda case: case.scores,
    "what is learned": lambda case: case.learns,
}


ONE, *OTHERS = GROUPS


@pytest.fixture(scope="module", params=[ONE, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def answers(request, cases):
    """(case, by GoogleSQL's reference implementation, by DuckDB)"""
    return [(case, edges.by_google_sql(case), edges.by_duckdb(case)) for case in cases if GROUPS[request.param](case)]


def test_the_reference_implementation_gives_what_the_oracle_expects(answers):
    assert [line for case, google, _ in answers for line in edges.against_oracle(case, google)] == []


def test_the_reference_implementation_and_duckdb_give_the_same_rows(answers):
    """Bit for bit, floats too; priority_score to its 4 decimals."""
    found = []
    for case, google, duck in answers:
        assert google.keys() == duck.keys()
        for name, day in google:
            lines = oracle.differences(name.removeprefix("fast/"), google[name, day], duck[name, day])
            found += [f"{case.name}, {day}, {name}: {line}" for line in lines]
    assert found == []


def test_duckdb_gives_what_the_oracle_expects(cases):
    assert [line for case in cases for line in edges.against_oracle(case, edges.by_duckdb(case))] == []


@pytest.mark.slow
def test_returning_customers_by_all_three(tmp_path):
    """A shop of its own: the look-back of 385 days makes these statements the dearest for the reference implementation."""
    orders = small_shop()
    few = orders[[customer in {f"c{number}" for number in range(12)} for customer in orders["customer_id"]]].reset_index(drop=True)
    closed, first, last = [date(2024, 1, 1)], date(2024, 4, 9), date(2024, 4, 10)
    given = some_attributes(few)
    lake = lake_with(few, tmp_path, customers=given, min_due=2, shortfall_warning=0.5)
    known = given.reindex(columns=TABLES["customers"].column_names).replace("", None)
    case = edges.Case("a dozen customers", few, lake, (first, last), known)
    google = edges.Reference(case, closed_days=closed)
    google.run(query("customer_days"))
    naive = Returning(few, case.lake.settings, case.complete_through, closed)
    back = first - timedelta(DUE_DAYS)
    for due in (query("due_daily"), fast_query("due_daily")):
        found = google.run(due, from_date=back, to_date=last)
        assert oracle.differences("due_daily", naive.due_daily(oracle.dates(back, last)), found) == []
    google.run(query("return_expectations"), from_date=first, to_date=last)
    expected = naive.frame([first, last])
    found = google.run(query("returning_customers"), from_date=first, to_date=last)
    assert oracle.differences("returning_customers", expected, found) == []
    assert set(expected["gate"]) == {None, "partial_day"} and set(expected["window_days"]) <= set(range(3, 15))
    google.run(query("retention_daily"), from_date=first - timedelta(BASELINE_DAYS), to_date=last)
    alerts = google.run(query("alert_logic"), from_date=first, to_date=last)
    second = oracle.of_rule(oracle.SECOND_RULE, alerts)
    assert oracle.plain_rows(second) == oracle.plain_rows(found)
    days = int(expected["window_days"].iloc[-1])
    missing = {"due_customers": naive.due_customers(last - timedelta(days - 1), last)}
    missing["shortfall_slices"] = naive.shortfall_slices(missing["due_customers"], last, given)
    with workspace(lake) as space:
        close(space, (*closed,))
        space.build_range("alert_logic", first, last)
        assert oracle.differences("alert_logic", alerts, space.rows("alert_logic")) == []
        space.build_missing(last, days)
        for table, rows in missing.items():
            from_google = google.run(query(table), from_date=last - timedelta(days - 1), to_date=last)
            assert oracle.differences(table, rows, from_google) == []
            assert oracle.differences(table, rows, space.rows(table)) == []


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_closed_days_by_all_three(tmp_path, monkeypatch, seed):
    """Small random shops with a calendar of their own, for a range inside; and a shop whose calendar is empty."""
    orders, entries = random_shop(seed)
    lake = lake_with(orders, tmp_path, holiday_country="GB")
    first, last = orders["order_date"].min() + timedelta(20), orders["order_date"].max() + timedelta(5)
    for days in (entries, []):
        google = edges.Reference(edges.Case("random", orders, lake, (first, last)), calendar=days)
        google.run(query("customer_days"))
        found = google.run(query("closed_days"), from_date=first, to_date=last)
        expected = naive(orders, days, first, last)
        assert dict(zip(found["closed_date"], found["reason"], strict=True)) == expected and len(found) == len(expected)
        given(monkeypatch, days)
        with workspace(lake) as space:
            assert closed(space, first, last) == expected


def test_the_shops_are_worth_comparing(cases):
    """Nulls, ties, every gate, severity, status, level and tier are among the answers."""
    answers = [edges.by_duckdb(case) for case in cases if not case.scores]

    def values(table: str, column: str) -> set:
        return {oracle.plain(value) for answer in answers for (name, _), frame in answer.items() if name == table
                for value in frame[column]}

    assert values("alert_logic", "gate") == {"data_incomplete", "history_warmup", "baseline_warmup", "min_sample", None}
    assert values("alert_logic", "severity") == {"INFO", "WARNING", "CRITICAL"}
    assert values("retention_snapshot", "retention_status") == {"ACTIVE", "AT_RISK", "INACTIVE"}
    assert values("churn_detection", "churn_risk_level") == {"HIGH", "MEDIUM", "LOW"}
    assert values("customer_priority", "priority_tier") == {"P1", "P2", "P3"}
    assert {None, "FR"} <= values("base_customers", "country") and None in values("churn_detection", "usual_gap_days")
    assert len(values("customer_priority", "recommended_action")) == 5
