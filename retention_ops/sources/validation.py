"""Turns text into typed values and checks every record against the rules of its field, in SQL made from the preset.

Each kind of field is declared once, in `_KINDS`: how its text becomes a value, when that value is acceptable, and what to
say when it is not. Findings gathers what is wrong, names the place, and never shows a value unless asked to.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date, timedelta

import duckdb

from retention_ops.clock import Clock, shop_day
from retention_ops.errors import InputRefused
from retention_ops.settings import Settings
from retention_ops.sources.presets import Field, Kind, Preset
from retention_ops.sources.reading import OPEN_QUOTE, Source, refusal
from retention_ops.warehouse.dialect import identifier, literal

MAX_LISTED = 100
MAX_ID_LENGTH = 128
MAX_WHOLE = 1_000_000_000
EARLIEST = date(1970, 1, 1)
# above this many currency units sums of DECIMAL(38, 12) could overflow
AMOUNT_CEILING = 10**12

CONTROL = r"[\p{Cc}\x{2028}\x{2029}]"
WHOLE = r"[+-]?\d+(\.0*)?"
DECIMAL = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?"
ISO_DATE = r"\d{4}-\d{2}-\d{2}"
TIME = r"\d{1,2}:\d{2}(:\d{2}(\.\d{1,9})?)?"
ISO_TIMESTAMP = rf"{ISO_DATE}[ T]{TIME}"
OFFSET_TIMESTAMP = rf"{ISO_TIMESTAMP} ?(Z|[+-]\d{{2}}(:?\d{{2}})?)"
THOUSANDS = r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?"
DECIMAL_COMMA = r"[+-]?\d+(\.\d{3})*,\d+"
US_DATE = rf"\d{{1,2}}/\d{{1,2}}/\d{{4}}( {TIME})?"


@dataclass(frozen=True)
class Bounds:
    """The limits that come from settings and clock."""

    zone: str
    today: date
    latest: date
    max_amount: int
    max_amount_setting: int


def bounds(settings: Settings, clock: Clock) -> Bounds:
    """Limits for this shop and its today. Dates may be one day ahead, because the shop's day may begin before the clock's."""
    today = shop_day(clock(), settings.shop_timezone)
    cap = min(settings.max_order_amount, AMOUNT_CEILING)
    return Bounds(settings.shop_timezone, today, today + timedelta(days=1), cap, settings.max_order_amount)


@dataclass(frozen=True)
class Rule:
    """`when` holds for a value that breaks the rule; rules are tried in order and the first one that holds is reported."""

    text: str
    when: str


@dataclass(frozen=True)
class _Kind:
    """SQL for one kind of field: `raw` is the text, `value` the typed result, NULL where it cannot be parsed."""

    type: str
    parse: Callable[[str, Bounds], str]
    accept: Callable[[str, Bounds], str]
    rules: Callable[[str, str, Bounds], list[Rule]]


def _matches(text: str, pattern: str) -> str:
    return f"regexp_full_match({text}, {literal(pattern)})"


def _string_rules(raw: str, value: str, limits: Bounds) -> list[Rule]:
    return [
        Rule(f"is longer than {MAX_ID_LENGTH} characters", f"length({value}) > {MAX_ID_LENGTH}"),
        Rule("has control characters", "true"),
    ]


def _string_accept(value: str, limits: Bounds) -> str:
    return f"length({value}) <= {MAX_ID_LENGTH} AND NOT regexp_matches({value}, {literal(CONTROL)})"


def _numeric_id(raw: str, limits: Bounds) -> str:
    """Ids that a detour through floating point left as '17850.0', and the 'nan' it leaves where there was none."""
    return f"CASE WHEN lower({raw}) = 'nan' THEN NULL ELSE regexp_replace({raw}, '^(\\d+)\\.0+$', '\\1') END"


def _decimal(raw: str, limits: Bounds) -> str:
    return f"CASE WHEN {_matches(raw, DECIMAL)} THEN TRY_CAST({raw} AS DECIMAL(28, 12)) END"


def _decimal_rules(raw: str, value: str, limits: Bounds) -> list[Rule]:
    return [
        Rule("is not a finite number: write 1234.50, not 1,234.50", _matches(raw, THOUSANDS)),
        Rule("is not a finite number: write 1234.50, not 1234,50", _matches(raw, DECIMAL_COMMA)),
        Rule("is not a finite number", f"NOT {_matches(raw, DECIMAL)}"),
        _too_large(limits),
    ]


def _money_rules(raw: str, value: str, limits: Bounds) -> list[Rule]:
    *not_a_number, too_large = _decimal_rules(raw, value, limits)
    return [*not_a_number, Rule("is negative", f"{raw} LIKE '-%'"), too_large]


def _too_large(limits: Bounds) -> Rule:
    return Rule(f"is above max_order_amount ({limits.max_amount_setting:,})", "true")


def _whole_rules(raw: str, value: str, limits: Bounds) -> list[Rule]:
    return [Rule("is not a whole number", f"NOT {_matches(raw, WHOLE)}"), Rule(f"is beyond {MAX_WHOLE:,}", "true")]


def _iso_cases(raw: str, limits: Bounds) -> str:
    # a pattern first: a bare cast would also take '2024-1-5' or 'epoch'; and no cast takes a blank before the offset
    moment = f"TRY_CAST(regexp_replace({raw}, ' ([Z+-])', '\\1') AS TIMESTAMPTZ)"
    return (
        f"WHEN {_matches(raw, ISO_DATE)} THEN TRY_CAST({raw} AS DATE) "
        f"WHEN {_matches(raw, ISO_TIMESTAMP)} THEN CAST(TRY_CAST({raw} AS TIMESTAMP) AS DATE) "
        f"WHEN {_matches(raw, OFFSET_TIMESTAMP)} THEN CAST(timezone({literal(limits.zone)}, {moment}) AS DATE)"
    )


def _us_date(raw: str, limits: Bounds) -> str:
    us = f"CAST(try_strptime(split_part({raw}, ' ', 1), '%m/%d/%Y') AS DATE)"
    return f"CASE {_iso_cases(raw, limits)} WHEN {_matches(raw, US_DATE)} THEN {us} END"


def _date_rules(expected: str) -> Callable[[str, str, Bounds], list[Rule]]:
    def rules(raw: str, value: str, limits: Bounds) -> list[Rule]:
        return [
            Rule(f"is not a date (expected {expected})", f"{value} IS NULL"),
            Rule(f"is before {EARLIEST}", f"{value} < DATE '{EARLIEST}'"),
            Rule(f"is later than {limits.latest}, in the future (tomorrow is allowed because of time zones)", "true"),
        ]

    return rules


def _end_date_rules(raw: str, value: str, limits: Bounds) -> list[Rule]:
    return [Rule("is not a date (expected YYYY-MM-DD)", f"{value} IS NULL"), Rule(f"is before {EARLIEST}", "true")]


def _date_accept(value: str, limits: Bounds) -> str:
    return f"{value} BETWEEN DATE '{EARLIEST}' AND DATE '{limits.latest}'"


def _boolean(raw: str, limits: Bounds) -> str:
    return f"CASE WHEN lower({raw}) IN ('true', 'yes', '1') THEN true WHEN lower({raw}) IN ('false', 'no', '0') THEN false END"


def _one_rule(text: str) -> Callable[[str, str, Bounds], list[Rule]]:
    return lambda raw, value, limits: [Rule(text, "true")]


def _not_null(value: str, limits: Bounds) -> str:
    return f"{value} IS NOT NULL"


_STRING = _Kind("VARCHAR", lambda raw, limits: raw, _string_accept, _string_rules)
_KINDS: dict[Kind, _Kind] = {
    "id": _STRING,
    "text": _STRING,
    "numeric_id": _Kind("VARCHAR", _numeric_id, _string_accept, _string_rules),
    "whole": _Kind(
        "BIGINT", lambda raw, limits: f"CASE WHEN {_matches(raw, WHOLE)} THEN TRY_CAST({raw} AS BIGINT) END",
        lambda value, limits: f"{value} BETWEEN -{MAX_WHOLE} AND {MAX_WHOLE}", _whole_rules,
    ),
    "decimal": _Kind(
        "DECIMAL(28, 12)", _decimal, lambda value, limits: f"{value} BETWEEN -{limits.max_amount} AND {limits.max_amount}",
        _decimal_rules,
    ),
    "money": _Kind("DECIMAL(28, 12)", _decimal, lambda value, limits: f"{value} BETWEEN 0 AND {limits.max_amount}", _money_rules),
    "date": _Kind(
        "DATE", lambda raw, limits: f"CASE {_iso_cases(raw, limits)} END", _date_accept, _date_rules("YYYY-MM-DD")
    ),
    "end_date": _Kind(  # may lie in the future
        "DATE", lambda raw, limits: f"CASE {_iso_cases(raw, limits)} END", lambda value, limits: f"{value} >= DATE '{EARLIEST}'",
        _end_date_rules,
    ),
    "us_date": _Kind("DATE", _us_date, _date_accept, _date_rules("YYYY-MM-DD hh:mm:ss or M/D/YYYY h:mm")),
    "compact_date": _Kind(
        "DATE", lambda raw, limits: f"CASE WHEN {_matches(raw, '[0-9]{8}')} THEN CAST(try_strptime({raw}, '%Y%m%d') AS DATE) END",
        _date_accept, _date_rules("YYYYMMDD"),
    ),
    "boolean": _Kind("BOOLEAN", _boolean, _not_null, _one_rule("is not true/false, yes/no or 1/0")),
    "currency": _Kind(
        "VARCHAR", lambda raw, limits: f"CASE WHEN {_matches(raw, '[A-Za-z]{3}')} THEN upper({raw}) END", _not_null,
        _one_rule("is not a currency code of three letters"),
    ),
}


def field_type(entry: Field) -> str:
    """The DuckDB type of a field's values."""
    return _KINDS[entry.kind].type


def _field_rules(entry: Field, limits: Bounds) -> list[Rule]:
    """Rules of one field; number 0 is always the missing value."""
    raw, value = f"raw_{entry.name}", f"value_{entry.name}"
    empty = value if field_type(entry) == "VARCHAR" and entry.kind != "currency" else raw
    return [Rule("is missing", f"{empty} IS NULL"), *_KINDS[entry.kind].rules(raw, value, limits)]


def _issue(entry: Field, limits: Bounds) -> str:
    """SQL: the number of the first broken rule, NULL when the value is fine."""
    value = f"value_{entry.name}"
    rules = _field_rules(entry, limits)
    missing = 0 if entry.filled else "NULL"
    others = " ".join(f"WHEN {rule.when} THEN {number}" for number, rule in enumerate(rules) if number)
    return f"CASE WHEN {_KINDS[entry.kind].accept(value, limits)} THEN NULL WHEN {rules[0].when} THEN {missing} {others} END"


# --- findings -------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """One broken rule at one record, by its number; `column` is empty when the record as a whole is wrong."""

    source: Source
    record: int
    column: str
    rule: str
    value: str | None = None


@dataclass
class Findings:
    """Everything wrong with the input: the first problems one by one, all of them counted per column and rule."""

    problems: list[Problem] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, problems: Iterable[Problem], column: str, rule: str, count: int) -> None:
        """Note `count` problems of one kind, of which `problems` are the first."""
        self.problems.extend(problems)
        self.counts[column, rule] += count

    def raise_if_any(self, then: str) -> None:
        """Raise InputRefused with the whole story, ending in what to do, if anything was found."""
        if not self.counts:
            return
        total = self.counts.total()
        listed = sorted(self.problems, key=lambda item: (item.source.file, item.source.label, item.record))[:MAX_LISTED]
        labels = list(dict.fromkeys(problem.source.label for problem in listed))
        lines = [f"{', '.join(labels)}: {total:,} problem{'s' if total != 1 else ''}; nothing was written."]
        for problem in listed:
            where = f"{problem.source.label} {problem.source.place(problem.record)}"
            shown = [problem.column] if problem.column else []
            shown += [_shown(problem.value)] if problem.value is not None else []
            lines.append(f"  {where}: {' '.join([*shown, problem.rule])}")
        if total > len(listed):
            lines.append(f"  ... and {total - len(listed):,} more")
            lines.append("All problems by column and rule:")
            for (column, rule), count in self.counts.most_common():
                lines.append(f"  {count:,} x {column + ' ' if column else ''}{rule}")
        raise InputRefused("\n".join([*lines, then]))


def _shown(value: str) -> str:
    """A value that can neither fill nor garble a terminal."""
    return repr(value[:40]) + ("..." if len(value) > 40 else "")


# --- loading --------------------------------------------------------------------------------------------------------


def load(con: duckdb.DuckDBPyConnection, source: Source, preset: Preset, limits: Bounds, table: str) -> None:
    """Create `table` with one row per record, in file order: the typed fields, and issue_<field> for the broken rule.

    Sets source.records; a record that is not even the right shape has no row and is noted in source.broken.
    Raises InputRefused when the file cannot be parsed at all.
    """
    raw = ", ".join(f"{entry.name} AS raw_{entry.name}" for entry in preset.fields)
    values = ", ".join(
        f"{_KINDS[entry.kind].parse(f'raw_{entry.name}', limits)} AS value_{entry.name}" for entry in preset.fields
    )
    fields = ", ".join(
        f"CAST(value_{entry.name} AS {field_type(entry)}) AS {entry.name}, "
        f"CAST({_issue(entry, limits)} AS UTINYINT) AS issue_{entry.name}" for entry in preset.fields
    )
    rejects = f", store_rejects = true, rejects_table = '{table}_rejects', rejects_scan = '{table}_scan'" if source.is_csv else ""
    try:
        con.execute(
            f"CREATE TABLE {table} AS SELECT {fields} FROM "
            f"(SELECT *, {values} FROM (SELECT {raw} FROM ({source.sql(rejects)})))"
        )
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise _unparseable(source, error) from error
    source.records = _one(con, f"SELECT count(*) FROM {table}")
    if source.path is not None:
        _settle(con, source, f"{table}_rejects")
    elif source.places is not None and len(source.places) != source.records + len(source.broken):
        raise refusal(source.label, "has a record longer than 2 MB", "Check its line ends, or export it again.")


def _unparseable(source: Source, error: duckdb.Error) -> InputRefused:
    """DuckDB's own message quotes the record, so only the line number is taken from it."""
    if not source.is_csv:
        return refusal(source.label, "is a damaged parquet file", "Export it again.")
    if source.mixed_line_ends:
        return refusal(
            source.label, "mixes Windows and Unix line ends",
            "Make them all the same, for instance: sed -i 's/\\r$//' " + source.label,
        )
    line = re.search(r"Line: (\d+)", str(error))
    where = f" near line {line[1]}" if line else ""
    return refusal(source.label, f"is not valid csv{where}", "Check its quotes and line ends, or export it again.")


_REJECTS = {
    "UNQUOTED VALUE": OPEN_QUOTE,
    "LINE SIZE OVER MAXIMUM": "is longer than 2 MB",
    "INVALID ENCODING": "is not UTF-8",
}
MISCOUNTED = ("MISSING COLUMNS", "TOO MANY COLUMNS")


def _settle(con: duckdb.DuckDBPyConnection, source: Source, rejects: str) -> None:
    """Have the records placed, and those noted whose shape is wrong."""
    rows = con.execute(
        "SELECT line_byte_position - 1, min(CAST(error_type AS VARCHAR)), arg_min(error_message, column_idx) "
        f"FROM {rejects} GROUP BY 1 ORDER BY 1"
    ).fetchall()
    rejected = [(start, _REJECTS.get(kind) or _shape(message or "")) for start, kind, message in rows]
    try:
        source.settle(rejected, miscounted=all(kind in MISCOUNTED for _, kind, _ in rows))
    except OSError as error:
        raise refusal(source.label, "went away while it was being read", "Ingest it again once it stays in place.") from error


def _shape(message: str) -> str:
    """What is wrong with a record's shape, from 'Expected Number of Columns: 4 Found: 3'."""
    numbers = re.findall(r"\d+", message)
    if len(numbers) != 2:
        return "has a wrong number of fields"
    return f"has {numbers[1]} field{'' if numbers[1] == '1' else 's'}, the header has {numbers[0]}"


def check(
    con: duckdb.DuckDBPyConnection, source: Source, preset: Preset, limits: Bounds, table: str, findings: Findings,
    show_values: bool,
) -> None:
    """Add everything that `load` found wrong with one source to `findings`."""
    if source.broken:
        by_rule = Counter("has a wrong number of fields" if " field" in rule else rule for _, rule in source.broken)
        findings.problems.extend(Problem(source, record, "", rule) for record, rule in source.broken[:MAX_LISTED])
        for rule, count in by_rule.items():
            findings.add([], "", rule, count)
    if not source.numbered:
        return  # a quote that is not closed swallows whole records: what the others seem to hold may be its doing
    counts = con.execute(f"SELECT {', '.join(f'count(issue_{entry.name})' for entry in preset.fields)} FROM {table}").fetchone()
    for entry, count in zip(preset.fields, counts, strict=True):
        if count:
            _add_issues(con, source, entry, limits, table, findings, show_values)


def _add_issues(
    con: duckdb.DuckDBPyConnection, source: Source, entry: Field, limits: Bounds, table: str, findings: Findings,
    show_values: bool,
) -> None:
    """Count one field's broken rules and list the first records of each."""
    rules = _field_rules(entry, limits)
    header = source.headers.get(entry.name, entry.header)
    issue = f"issue_{entry.name}"
    counted = f"SELECT {issue}, count(*) FROM {table} WHERE {issue} IS NOT NULL GROUP BY 1 ORDER BY 1"
    for number, count in con.execute(counted).fetchall():
        found = con.execute(f"SELECT rowid + 1 FROM {table} WHERE {issue} = {number} ORDER BY 1 LIMIT {MAX_LISTED}").fetchall()
        rows = [row[0] for row in found]
        values = raw_values(con, source, entry, rows) if show_values and number else {}
        problems = [Problem(source, source.number(row), header, rules[number].text, values.get(row)) for row in rows]
        findings.add(problems, header, rules[number].text, count)


def raw_values(con: duckdb.DuckDBPyConnection, source: Source, entry: Field, rows: list[int]) -> dict[int, str]:
    """row -> the text as it stands in the file."""
    wanted = ", ".join(str(row) for row in rows)
    scan = source.sql(", ignore_errors = true" if source.is_csv else "")  # leaves out what `load` left out
    return dict(
        con.execute(
            f"SELECT place, text FROM (SELECT row_number() OVER () AS place, {identifier(entry.name)} AS text "
            f"FROM ({scan})) WHERE place IN ({wanted}) AND text IS NOT NULL"
        ).fetchall()
    )


def _one(con: duckdb.DuckDBPyConnection, sql: str) -> int:
    return con.execute(sql).fetchone()[0]
