"""Pieces of SQL text as DuckDB reads them: literals, quoted names, files by their exact path. Rules are in sql/."""

from __future__ import annotations

import re
from pathlib import Path

from retention_ops.warehouse.catalog import DUCKDB_TYPES, Table


def literal(value: object) -> str:
    """A string literal."""
    return "'" + str(value).replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A quoted identifier."""
    return '"' + name.replace('"', '""') + '"'


def no_glob(path: Path) -> str:
    """The absolute path with DuckDB's wildcards made literal, for functions that read files.

    COPY TO and ATTACH take a path as it stands.
    """
    return re.sub(r"([*?\[])", r"[\1]", str(path.absolute()))


def file_list(*paths: Path) -> str:
    """Exactly these files, as the argument of a function that reads files."""
    return f"[{', '.join(literal(no_glob(path)) for path in paths)}]"


def parquet_scan(*paths: Path, options: str = "") -> str:
    """The rows of exactly these parquet files with the columns that are in them; `options` as `, name = value`."""
    # hive_partitioning would make a column of every 'name=value' folder on the way, even over a column of the file
    return f"read_parquet({file_list(*paths)}, hive_partitioning = false{options})"


def no_rows(table: Table) -> str:
    """A SELECT with the table's typed columns and nothing in them."""
    columns = ", ".join(f"CAST(NULL AS {DUCKDB_TYPES[column.type]}) AS {column.name}" for column in table.columns)
    return f"SELECT {columns} WHERE false"


def declared_scan(table: Table, *paths: Path, options: str = "") -> str:
    """The rows of these parquet files with the table's columns in their declared order; null where an older file lacks one.

    BY NAME puts them beside a relation without rows: files from before a column was declared need no other reading.
    """
    return f"({no_rows(table)} UNION ALL BY NAME SELECT * FROM {parquet_scan(*paths, options=', union_by_name = true' + options)})"
