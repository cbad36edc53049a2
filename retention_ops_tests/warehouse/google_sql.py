"""Google's own GoogleSQL, compiled to WebAssembly: analyzes statements and executes them with the reference implementation.

`zetasql` is a test dependency only. That SQL passes here means it is GoogleSQL; it does not mean it has run on BigQuery.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from typing import Any

EPOCH = date(1970, 1, 1)
Columns = Mapping[str, str]
"""column -> GoogleSQL type"""


@dataclass(frozen=True)
class Statement:
    """What the analyzer says: the kind of statement, and names and types of the columns it yields."""

    kind: str
    columns: list[tuple[str, str]]


def type_of(value: Any) -> str:
    """The GoogleSQL type of a parameter's value."""
    return {bool: "BOOL", int: "INT64", float: "FLOAT64", str: "STRING", date: "DATE"}[type(value)]


@cache
def engine() -> GoogleSql:
    """One per process: starting it takes a second, or twenty the first time on a machine."""
    return GoogleSql()


class GoogleSql:
    """Analyzer and reference implementation over tables given with each call."""

    def __init__(self) -> None:
        from zetasql.core import wasm_client

        plain = wasm_client.Config

        class CachedConfig(plain):
            """Keeps the compiled module under ~/.cache."""

            def __init__(self) -> None:
                super().__init__()
                self.cache = True

        if plain.__name__ != "CachedConfig":
            wasm_client.Config = CachedConfig
        import zetasql.api as api
        import zetasql.types as types

        self._api, self._types = api, types
        kind = types.TypeKind
        self._kinds = {
            "STRING": kind.TYPE_STRING, "DATE": kind.TYPE_DATE, "INT64": kind.TYPE_INT64, "FLOAT64": kind.TYPE_DOUBLE,
            "BOOL": kind.TYPE_BOOL, "TIMESTAMP": kind.TYPE_TIMESTAMP,
        }
        self._names = {int(value): name for name, value in self._kinds.items()}
        self._analyzed: dict[tuple, Statement] = {}
        self._language = types.LanguageOptions.maximum_features()
        self._language.product_mode = types.ProductMode.PRODUCT_EXTERNAL
        self._language.reserved_keywords = ["QUALIFY"]

    def analyze(self, sql: str, tables: Mapping[str, Columns], parameters: Columns) -> Statement:
        """Raises zetasql's error where `sql` is not GoogleSQL over these tables with these parameters."""
        asked = (sql, tuple((name, tuple(columns.items())) for name, columns in tables.items()), tuple(parameters.items()))
        if asked not in self._analyzed:
            self._analyzed[asked] = self._analyze(sql, tables, parameters)
        return self._analyzed[asked]

    def _analyze(self, sql: str, tables: Mapping[str, Columns], parameters: Columns) -> Statement:
        from zetasql.core.local_service import ZetaSqlLocalService, local_service_pb2

        request = self._types.AnalyzeRequest(sql_statement=sql, options=self._options(parameters), simple_catalog=self._catalog(tables))
        # read off the answer as it comes: making zetasql's own objects of the whole tree takes as long as the analysis
        resolved = ZetaSqlLocalService.get_instance().wasm_client.call_grpc_func(
            "ZetaSqlLocalService_Analyze", request.to_proto(), local_service_pb2.AnalyzeResponse).resolved_statement
        while "node" in resolved.DESCRIPTOR.oneofs_by_name:  # any statement, any statement that creates, ...
            resolved = getattr(resolved, resolved.WhichOneof("node"))
        bearer = resolved
        while "output_column_list" not in bearer.DESCRIPTOR.fields_by_name and "parent" in bearer.DESCRIPTOR.fields_by_name:
            bearer = bearer.parent
        columns = [(column.name, self._names.get(column.column.type.type_kind, "?"))
                   for column in getattr(bearer, "output_column_list", [])]
        return Statement(resolved.DESCRIPTOR.name.removesuffix("Proto"), columns)

    def run(self, sql: str, tables: Mapping[str, tuple[Columns, Iterable[Sequence[Any]]]], values: Mapping[str, Any]) -> list[tuple]:
        """The rows of a query; `tables` are name -> (columns, rows)."""
        from zetasql.core.local_service import ZetaSqlLocalService

        types = self._types
        content = {
            name: types.TableContent(table_data=types.TableData(row=[
                types.TableData.Row(cell=[self._value(kind, cell) for kind, cell in zip(columns.values(), row, strict=True)])
                for row in rows
            ]))
            for name, (columns, rows) in tables.items()
        }
        response = ZetaSqlLocalService.get_instance().evaluate_query(
            sql=sql, options=self._options({name: type_of(value) for name, value in values.items()}),
            simple_catalog=self._catalog({name: columns for name, (columns, _) in tables.items()}), table_content=content,
            params=[types.Parameter(name=name, value=self._value(type_of(value), value)) for name, value in values.items()],
        )
        data = response.content.table_data  # None where there is no row
        return [tuple(_plain(cell) for cell in row.cell) for row in (data.row if data else [])]

    def _options(self, parameters: Columns):
        types = self._types
        declared = [
            types.AnalyzerOptions.QueryParameter(name=name, type=types.Type(type_kind=self._kinds[kind]))
            for name, kind in parameters.items()
        ]
        return types.AnalyzerOptions(language_options=self._language, default_timezone="UTC", query_parameters=declared)

    def _catalog(self, tables: Mapping[str, Columns]):
        catalog = self._api.CatalogBuilder("warehouse")
        for name, columns in tables.items():
            builder = self._api.TableBuilder(name)
            for column, kind in columns.items():
                builder.add_column(column, self._kinds[kind])
            catalog.add_table(builder.build())
        functions = self._types.ZetaSQLBuiltinFunctionOptions(language_options=self._language)
        return catalog.with_builtin_functions(functions).build()

    def _value(self, kind: str, value: Any):
        make = self._types.Value
        if value is None:
            return make()
        match kind:
            case "STRING":
                return make(string_value=value)
            case "DATE":
                return make(date_value=(value - EPOCH).days)
            case "INT64":
                return make(int64_value=value)
            case "FLOAT64":
                return make(double_value=float(value))
            case _:
                return make(bool_value=value)


def _plain(value: Any) -> Any:
    """A result cell as a Python value; a TIMESTAMP, which zetasql 0.1.5 cannot hand out, as None (only created_at is one)."""
    try:
        proto = value.to_proto() if hasattr(value, "to_proto") else value
    except NotImplementedError:
        return None
    kind = proto.WhichOneof("value")
    if kind is None:
        return None
    cell = getattr(proto, kind)
    if kind == "date_value":
        return EPOCH + timedelta(days=cell)
    return cell
