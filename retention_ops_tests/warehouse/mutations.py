"""Turns around one comparison at a time in sql/ and says which tests notice.

    python -m retention_ops_tests.warehouse.mutations > docs/sql_mutations.md

A mutant that nobody notices is a line of the rules that no test stands on.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from retention_ops.detect.compute import queue_of_range
from retention_ops.warehouse import render
from retention_ops_tests.warehouse import edges, second_rule

TURNED = {"<=": "<", ">=": ">", "<": "<=", ">": ">=", "<>": "=", "=": "<>", "BETWEEN": "NOT BETWEEN"}
COMPARISON = re.compile(r"<>|<=|>=|<|>|=|(?<!ROWS )\bBETWEEN\b")


@dataclass(frozen=True)
class Mutant:
    """One comparison turned around."""

    file: str
    line: int
    before: str
    after: str
    text: str
    """the whole file"""


def mutants() -> Iterator[Mutant]:
    """Every comparison of every rule, one at a time; comments are left alone."""
    for name in (*render.FILES.values(), *render.FAST_FILES.values()):
        text = (render.sql_folder() / name).read_text(encoding="utf-8")
        code = re.sub(r"--[^\n]*|'[^']*'", lambda found: " " * len(found[0]), text)
        for found in COMPARISON.finditer(code):
            changed = text[:found.start()] + TURNED[found[0]] + text[found.end():]
            line = text.count("\n", 0, found.start())
            yield Mutant(name, line + 1, text.splitlines()[line].strip(), changed.splitlines()[line].strip(), changed)


@contextmanager
def in_force(mutant: Mutant) -> Iterator[None]:
    """While it lasts, the rules are those of sql/ with this one file changed."""
    original = render.sql_folder
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(original(), folder, dirs_exist_ok=True)
        (Path(folder) / mutant.file).write_text(mutant.text, encoding="utf-8")
        render.sql_folder = lambda: Path(folder)
        _forget()
        try:
            yield
        finally:
            render.sql_folder = original
            _forget()


def _forget() -> None:
    for read_once in (render.query, render.fast_query, queue_of_range):
        read_once.cache_clear()


def _rule(mutant: Mutant) -> render.Query:
    """As it is in force."""
    return next(
        read(table) for read, files in ((render.query, render.FILES), (render.fast_query, render.FAST_FILES))
        for table, name in files.items() if name == mutant.file)


def _analysis(mutant: Mutant) -> list[str]:
    try:
        edges.analyzed(_rule(mutant))
    except Exception as error:
        return [str(error)]
    return []


def noticed(mutant: Mutant, cases: list[edges.Case], checks: second_rule.Checks) -> tuple[str, str] | None:
    """(tier, first difference) of the first tier that notices, or None. The reference implementation is asked last: it is slow.

    Files of the second rule are asked of `checks`, which DuckDB answers; all others of `cases`.
    """
    with in_force(mutant):
        wrong = _analysis(mutant)
        if wrong:
            return "1 analysis", wrong[0]
        if mutant.file in second_rule.FILES:
            return _checked(mutant, checks)
        if mutant.file == "06_customer_priority.sql" and (found := _checked(mutant, checks)):
            return found
        return _executed(cases, "2 DuckDB against the oracle", edges.by_duckdb) or _executed(
            [case for case in cases if "customer_priority" in case.tables], "2 reference implementation against the oracle",
            edges.by_google_sql)


def _checked(mutant: Mutant, checks: second_rule.Checks) -> tuple[str, str] | None:
    rule = _rule(mutant)
    for check in checks.of(rule.table):
        try:
            wrong = check.differences(rule)
        except Exception as error:
            wrong = [f"{check.name}: {type(error).__name__}: {str(error).splitlines()[0]}"]
        if wrong:
            return "2 DuckDB against the oracle", wrong[0]
    wrong = checks.reference(rule)
    return ("2 reference implementation against the oracle", wrong[0]) if wrong else None


def _executed(cases: list[edges.Case], tier: str, answer: Callable) -> tuple[str, str] | None:
    for case in cases:
        try:
            wrong = edges.against_oracle(case, answer(case))
        except Exception as error:
            wrong = [f"{case.name}: {type(error).__name__}: {str(error).splitlines()[0]}"]
        if wrong:
            return tier, wrong[0]
    return None


INTRODUCTION = """# Every comparison of sql/, turned around

Written by `python -m retention_ops_tests.warehouse.mutations`. Each of the {count} comparisons (`<`, `<=`, `>`, `>=`, `=`, `<>`,
`BETWEEN`) in `sql/` and `sql/fast/` was turned around alone (`<=` into `<`, `=` into `<>`, ...) and the tiers of the README were asked.
"DuckDB against the oracle" is the test `test_duckdb_gives_what_the_oracle_expects`, "reference implementation" is
`test_the_reference_implementation_gives_what_the_oracle_expects`, both in
[test_google_sql.py](../retention_ops_tests/warehouse/test_google_sql.py); files of the second rule and of return_rates are asked,
by DuckDB, of [second_rule.py](../retention_ops_tests/warehouse/second_rule.py). The {unnoticed} that nobody notices mean the same;
[test_mutations.py](../retention_ops_tests/warehouse/test_mutations.py) says why of each. `make test-all` tries them all.

| file | line | comparison | turned into | tier | first difference |
|---|---|---|---|---|---|"""


def report(cases: list[edges.Case], checks: second_rule.Checks) -> str:
    """docs/sql_mutations.md: a table of all mutants."""
    lines, unnoticed = [], 0
    for mutant in mutants():
        tier, why = noticed(mutant, cases, checks) or ("**none**", "")
        unnoticed += not why
        cells = (f"`{mutant.before}`", f"`{mutant.after}`", tier, why[:140])
        lines.append(f"| {mutant.file} | {mutant.line} | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([INTRODUCTION.format(count=len(lines), unnoticed=unnoticed), *lines])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as where:
        checks = second_rule.Checks(Path(where) / "second")
        print(report(list(edges.cases(Path(where))), checks))
        checks.close()
