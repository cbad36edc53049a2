"""The user's SELECT of orders: what it must give, and how it is asked for a part of what it gives.

It stays as it was written, in the SQL of wherever it runs; a pull puts it in brackets and chooses columns and rows around it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import sqlglot
from sqlglot import exp
from sqlglot.tokens import TokenType

from retention_ops.errors import InputRefused, SourceError

Dialect = Literal["postgres", "duckdb", "bigquery"]

NEEDED = ("order_id", "customer_id", "ordered_at", "order_amount", "currency", "status", "is_test")
OPTIONAL = ("updated_at", "refund_amount")
UNUSED = ("country", "brand")
"""may be there; no rule uses them yet, so they are not read"""
TEXT_TYPE = {"postgres": "TEXT", "duckdb": "VARCHAR", "bigquery": "STRING"}


@dataclass(frozen=True)
class Select:
    """One SELECT: `path` as the settings name it, `text` without a closing semicolon."""

    path: Path
    text: str
    dialect: Dialect

    def tables(self) -> list[str]:
        """The tables it reads, as it names them; empty where its SQL is beyond sqlglot."""
        try:
            tree = sqlglot.parse_one(self.text, read=self.dialect)
        except sqlglot.errors.SqlglotError:
            return []
        local = {cte.alias_or_name.lower() for cte in tree.find_all(exp.CTE)}
        named = [".".join(part.name for part in table.parts) for table in tree.find_all(exp.Table)]
        return sorted({name for name in named if name and name.lower() not in local})


def read_select(path: Path, dialect: Dialect) -> Select:
    """The SELECT in that file. Raises SourceError where there is none, or more than one statement."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SourceError(
            f"{path} is not there: it holds your SELECT of the orders.\nWrite an example with `retention-ops init`, or name another "
            "file in RETENTION_OPS_SOURCE_SQL (paths count from the folder you start in)."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or 'wrong encoding'}") from None
    try:
        tokens = sqlglot.tokenize(text, read=dialect)
    except sqlglot.errors.SqlglotError:
        return Select(path, text, dialect)  # the database will say what is wrong, in its own words
    while tokens and tokens[-1].token_type == TokenType.SEMICOLON:
        text = text[: tokens.pop().start]
    if not tokens:
        raise SourceError(f"{path} is empty: it must hold one SELECT of the orders")
    first = tokens[0].text.upper()
    if any(token.token_type == TokenType.SEMICOLON for token in tokens):
        raise SourceError(f"{path} holds several statements; it must be one SELECT and nothing else")
    if first not in ("SELECT", "WITH", "(", "FROM"):
        raise SourceError(f"{path} begins with {first[:20]!r}; it must be one SELECT and nothing else")
    return Select(path, text, dialect)


def check_columns(select: Select, found: Sequence[str]) -> dict[str, str]:
    """column of the contract -> the name the SELECT gives it. Raises InputRefused for what is missing, unknown or there twice."""
    folded = [name.lower() for name in found]
    wrong = [f"  {name} is given twice" for name in sorted({name for name in folded if folded.count(name) > 1})]
    unknown = [name for name in found if name.lower() not in (*NEEDED, *OPTIONAL, *UNUSED)]
    for name in NEEDED:
        if name not in folded:
            near = difflib.get_close_matches(name, [other.lower() for other in unknown], n=1, cutoff=0.6)
            wrong.append(f"  {name} is missing" + (f" (nearest present: {near[0]!r})" if near else ""))
    for name in unknown:
        near = difflib.get_close_matches(name.lower(), [*NEEDED, *OPTIONAL, *UNUSED], n=1, cutoff=0.6)
        wrong.append(f"  {name[:60]!r} is not known" + (f" (did you mean {near[0]}?)" if near else ""))
    if wrong:
        raise InputRefused("\n".join([
            f"{select.path} does not give the columns of an order; nothing was written.", *wrong,
            f"It must give {', '.join(NEEDED)}; it may give {', '.join((*OPTIONAL, *UNUSED))}.",
        ]))
    return {name: found[folded.index(name)] for name in (*NEEDED, *OPTIONAL) if name in folded}


def statement(select: Select, columns: Mapping[str, str], where: str = "") -> str:
    """SQL for the rows of the SELECT that `where` chooses, every column as text, so that amounts stay exact.

    The user's text begins on the second line, so that a place in it can be told.
    """
    wanted = ", ".join(f"CAST({_column(select, columns[name])} AS {TEXT_TYPE[select.dialect]}) AS {name}" for name in columns)
    return f"SELECT {wanted} FROM (\n{select.text}\n) AS q" + (f" WHERE {where}" if where else "")


def shape(select: Select) -> str:
    """SQL that tells the columns and gives no row."""
    return f"SELECT * FROM (\n{select.text}\n) AS q LIMIT 0"


def newer_than(select: Select, columns: Mapping[str, str], ordered: date, changed: date | None) -> str:
    """SQL: ordered since, or changed since, or of no date at all, which must not go unseen.

    The dates stand in quotes without a type, which all three engines read as whatever type the column has, so that an index
    or a partition of it can be used.
    """
    ordered_at = _column(select, columns["ordered_at"])
    condition = f"{ordered_at} >= '{ordered}' OR {ordered_at} IS NULL"
    return condition + (f" OR {_column(select, columns['updated_at'])} >= '{changed}'" if changed else "")


def with_ids(select: Select, columns: Mapping[str, str], ids: Sequence[str]) -> str:
    """SQL: the orders of these ids."""
    listed = ", ".join(exp.Literal.string(value).sql(dialect=select.dialect) for value in ids)
    return f"CAST({_column(select, columns['order_id'])} AS {TEXT_TYPE[select.dialect]}) IN ({listed})"


def _column(select: Select, name: str) -> str:
    mark = "`" if select.dialect == "bigquery" else '"'
    return f"q.{mark}{name}{mark}"
