"""Every rule in sql/ is valid GoogleSQL over the declared catalog, by Google's own reference analyzer.

That is not the same as having run on BigQuery, which no test here does.
"""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from retention_ops.settings import load_settings
from retention_ops.warehouse.catalog import PRIORITY_INTERVALS, TABLES
from retention_ops.warehouse.render import FAST_FILES, FILES, fast_query, query

KNOWN = {**TABLES, PRIORITY_INTERVALS.name: PRIORITY_INTERVALS}
RULES = [*(query(table) for table in FILES), *(fast_query(table) for table in FAST_FILES)]


@pytest.fixture(scope="module")
def google_sql():
    """analyze(sql, parameters) -> [(column, type)]"""
    from zetasql.core import wasm_client

    class CachedConfig(wasm_client.Config):
        """Keeps the compiled analyzer: 1 s instead of 20 s from the second start on."""

        def __init__(self) -> None:
            super().__init__()
            self.cache = True

    wasm_client.Config = CachedConfig
    from zetasql import types as zt
    from zetasql.api import Analyzer, CatalogBuilder, TableBuilder
    from zetasql.types import AnalyzerOptions, LanguageOptions, ProductMode, TypeKind, ZetaSQLBuiltinFunctionOptions

    kinds = {
        "STRING": TypeKind.TYPE_STRING, "DATE": TypeKind.TYPE_DATE, "INT64": TypeKind.TYPE_INT64, "FLOAT64": TypeKind.TYPE_DOUBLE,
        "BOOL": TypeKind.TYPE_BOOL, "TIMESTAMP": TypeKind.TYPE_TIMESTAMP,
    }
    names = {int(kind): name for name, kind in kinds.items()}
    language = LanguageOptions.maximum_features()
    language.product_mode = ProductMode.PRODUCT_EXTERNAL
    language.reserved_keywords = ["QUALIFY"]
    catalog = CatalogBuilder("lake")
    for table in KNOWN.values():
        builder = TableBuilder(table.name)
        for column in table.columns:
            builder.add_column(column.name, kinds[column.type])
        catalog.add_table(builder.build())
    built = catalog.with_builtin_functions(ZetaSQLBuiltinFunctionOptions(language_options=language)).build()

    def analyze(sql: str, parameters: dict[str, str]) -> list[tuple[str, str]]:
        options = AnalyzerOptions(
            language_options=language, default_timezone="UTC",
            query_parameters=[
                AnalyzerOptions.QueryParameter(name=name, type=zt.Type(type_kind=kinds[type_])) for name, type_ in parameters.items()
            ],
        )
        statement = Analyzer(options, built).analyze_statement(sql)
        return [(column.name, names[int(column.column.type.type_kind)]) for column in statement.output_column_list]

    return analyze


def google_type(value: Any) -> str:
    return {bool: "BOOL", int: "INT64", float: "FLOAT64", str: "STRING", date: "DATE"}[type(value)]


@pytest.mark.parametrize("rule", RULES, ids=[*FILES, *FAST_FILES.values()])
def test_the_rule_is_google_sql_and_yields_the_declared_columns_and_types(google_sql, rule):
    day = date(2024, 2, 29)
    known = {**load_settings().rule_parameters(), **dict.fromkeys(("complete_through", "reference_date", "from_date", "to_date"), day)}
    columns = google_sql(rule.google_sql, {name: google_type(known[name]) for name in rule.parameters})
    assert columns == [(column.name, column.type) for column in KNOWN[rule.table].columns]


def test_the_analyzer_refuses_what_is_not_google_sql(google_sql):
    with pytest.raises(Exception, match=r"Syntax error"):
        google_sql("SELECT customer_id::TEXT FROM orders", {})
