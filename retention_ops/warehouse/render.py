"""sql/*.sql is GoogleSQL; here it becomes DuckDB's dialect at run time, and nothing else happens to it."""

from __future__ import annotations

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
    "customer_priority": "06_customer_priority.sql",
}
"""table -> the file in sql/ that states its rule"""


@dataclass(frozen=True)
class Query:
    """A rule as written (`google_sql`) and as DuckDB runs it (`duckdb_sql`), with the names of its parameters."""

    table: str
    google_sql: str
    duckdb_sql: str
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
    """The query that computes `table`."""
    text = (sql_folder() / FILES[table]).read_text(encoding="utf-8")
    tree = sqlglot.parse_one(text, read="bigquery")
    parameters = frozenset(node.this.name for node in tree.find_all(exp.Parameter))
    return Query(table, text, tree.sql(dialect="duckdb", pretty=True, comments=False), parameters)
