"""sql/*.sql is GoogleSQL; here it becomes DuckDB's dialect at run time, and nothing else happens to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import sqlglot
from sqlglot import expressions as exp

from retention_ops.errors import SettingsError

FILES = {
    "customer_days": "00_customer_days.sql",
    "base_customers": "01_base_customers.sql",
    "retention_snapshot": "02_retention_snapshot.sql",
    "churn_detection": "03_churn_detection.sql",
    "cohort_retention_evolution": "04_cohort_retention_evolution.sql",
    "retention_daily": "05_retention_daily.sql",
    "alert_logic": "05_alert_logic.sql",
    "closed_days": "05_closed_days.sql",
    "due_daily": "05_due_daily.sql",
    "return_expectations": "05_return_expectations.sql",
    "returning_customers": "05_returning_customers.sql",
    "customer_priority": "06_customer_priority.sql",
    "return_days": "06_return_days.sql",
    "return_windows": "06_return_windows.sql",
    "return_rates": "06_return_rates.sql",
    "due_customers": "07_due_customers.sql",
    "shortfall_slices": "08_shortfall_slices.sql",
}
"""table -> the file in sql/ that states its rule"""

FAST_FILES = {
    "base_customers": "fast/base_customers.sql",
    "retention_daily": "fast/retention_daily.sql",
    "due_daily": "fast/due_daily.sql",
    "return_windows": "fast/return_windows.sql",
    "priority_intervals": "fast/priority_intervals.sql",
    "retention_snapshot": "fast/retention_snapshot.sql",
}
"""the same rows with less work, most for a whole range; each file says why, and detect/test_fast_ranges.py proves it"""


@dataclass(frozen=True)
class Query:
    """A rule as written (`google_sql`) and as DuckDB runs it (`duckdb_sql`), with the names of its parameters.

    `unordered_sql` leaves the last ORDER BY away: a table has no order, so it is sorted once, when it is read or stored.
    """

    table: str
    google_sql: str
    duckdb_sql: str
    unordered_sql: str
    parameters: frozenset[str]


def sql_folder() -> Path:
    """The folder with the rules: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "sql", package / "sql"):
        if (folder / FILES["base_customers"]).is_file():
            return folder
    raise SettingsError(f"the rules (sql/*.sql) are missing beside {package}; install the package again")


@cache
def query(table: str) -> Query:
    """The query that computes `table`, as the business reads it."""
    return _read(table, FILES[table])


@cache
def fast_query(table: str) -> Query:
    """The query of sql/fast/ that computes the same rows as `query`, or as much of them as a range needs."""
    return _read(table, FAST_FILES[table])


def stacked(*queries: Query) -> Query:
    """One query out of several: each one reads the ones before it under their tables' names, and nothing is stored between."""
    *inner, last = queries

    def text(sql: Callable[[Query], str], keyword: str) -> str:
        named = ",\n".join(f"{query.table} AS {keyword}(\n{sql(query)}\n)" for query in inner)
        return f"WITH {named}\nSELECT * FROM (\n{sql(last)}\n)"

    return Query(
        last.table, text(lambda query: query.google_sql, ""), text(lambda query: query.duckdb_sql, "NOT MATERIALIZED "),
        text(lambda query: query.unordered_sql, "NOT MATERIALIZED "), frozenset().union(*(query.parameters for query in queries)),
    )


@cache
def sql_sha256() -> str:
    """Identifies the rules as written, all of sql/ together; comments and line breaks do not count."""
    digest = hashlib.sha256()
    for file in sorted({*FILES.values(), *FAST_FILES.values()}):
        lines = (line.partition("--")[0] for line in (sql_folder() / file).read_text(encoding="utf-8").splitlines())
        digest.update(f"{file}\n{' '.join(' '.join(lines).split())}\n".encode())
    return digest.hexdigest()


def _read(table: str, file: str) -> Query:
    text = (sql_folder() / file).read_text(encoding="utf-8")
    tree = sqlglot.parse_one(text, read="bigquery")
    parameters = frozenset(node.this.name for node in tree.find_all(exp.Parameter))
    ordered = tree.sql(dialect="duckdb", pretty=True, comments=False)
    tree.set("order", None)
    return Query(table, text, ordered, tree.sql(dialect="duckdb", pretty=True, comments=False), parameters)
