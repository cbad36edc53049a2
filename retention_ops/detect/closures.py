"""The shop's calendar: public holidays of its country and the closures it planned. What counts as closed is in sql/05_closed_days.sql.

Settings choose both: `holiday_country` (ISO 3166, as the library `holidays` knows it) and `closures_file` (from, to, reason).
"""

from __future__ import annotations

import difflib
import tempfile
import warnings
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import duckdb

from retention_ops.errors import SettingsError
from retention_ops.settings import Settings
from retention_ops.sources.presets import Field, Preset
from retention_ops.sources.reading import Source, open_files
from retention_ops.sources.validation import Bounds, Findings, Problem, check, load

MAX_DAYS = 62
"""a longer range is a year mistyped rather than a closure; a shop that stays shut that long is no longer the shop it was compared with"""
FIRST_YEAR, LAST_YEAR = 1970, 2100
"""no order may be older than the first; the library ends with the last"""

CLOSURES = Preset(
    name="closures", title="one planned closure per record", dataset="closures", formats=("csv",),
    fields=(Field("first_day", "end_date", "from"), Field("last_day", "end_date", "to", filled=False), Field("reason", "text", "reason")),
    key="first_day", key_field="first_day", repeated="",
)


@dataclass(frozen=True, order=True)
class Closure:
    """A planned closure, both dates included."""

    first: date
    last: date
    reason: str

    @property
    def days(self) -> list[date]:
        return [self.first + timedelta(step) for step in range((self.last - self.first).days + 1)]


@dataclass(frozen=True)
class CalendarDay:
    """A day on which the shop may not trade. A public holiday that lies in a planned closure is one: the plan decides."""

    day: date
    reason: str
    kind: Literal["planned closure", "public holiday"]


def calendar(settings: Settings, closures: tuple[Closure, ...], first: date, last: date) -> list[CalendarDay]:
    """Public holidays and planned closures from `first` to `last`, one entry per day, oldest first."""
    known = {day: CalendarDay(day, name, "public holiday") for day, name in public_holidays(settings.holiday_country).items()}
    known |= {day: CalendarDay(day, closure.reason, "planned closure") for closure in closures for day in closure.days}
    return [known[day] for day in sorted(known) if first <= day <= last]


def identity(settings: Settings, closures: tuple[Closure, ...]) -> dict[str, Any]:
    """What of the calendar results depend on, as plain values; empty where nothing is set.

    The holidays themselves are in it, not only the country: another release of the library may know one more.
    """
    found: dict[str, Any] = {}
    if settings.holiday_country:
        holidays = public_holidays(settings.holiday_country)
        found["public_holidays"] = [settings.holiday_country, *([str(day), name] for day, name in sorted(holidays.items()))]
    if closures:
        found["closures"] = [[str(closure.first), str(closure.last), closure.reason] for closure in closures]
    return found


# -- public holidays ---------------------------------------------------------------------------------------------------


@cache
def public_holidays(country: str) -> dict[date, str]:
    """Every public holiday the library knows of `country` ('' has none), with its name, and days observed instead of it."""
    if not country:
        return {}
    import holidays  # takes a while, and most commands need no calendar

    code, _, subdivision = country.partition("-")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of some countries only some of the years are known
        found = holidays.country_holidays(code, subdiv=subdivision or None, years=range(FIRST_YEAR, LAST_YEAR + 1), expand=False)
    return dict(found.items())


def check_country(country: str) -> None:
    """Raises ValueError naming the nearest valid code where the library knows no such country, or not this part of it."""
    import holidays
    from holidays.registry import COUNTRIES

    code, dash, subdivision = country.partition("-")
    parts = holidays.list_supported_countries(include_aliases=False)
    if code not in parts:
        spellings = {_plain(name): names[1] for names in COUNTRIES.values() for name in names} | {_plain(code): code for code in parts}
        nearest = _nearest(code if _plain(code) in spellings else country, spellings)
        raise ValueError(f"{code!r} is not a country code that has public holidays here (ISO 3166, two letters); "
                         f"the nearest one is {nearest}")
    if not dash or subdivision in parts[code]:
        return
    if not parts[code]:
        raise ValueError(f"{code} has no parts with holidays of their own here; write {code} instead of {country!r}")
    aliases = getattr(holidays, code).subdivisions_aliases
    spellings = {_plain(part): part for part in parts[code]} | {_plain(name): part for name, part in aliases.items()}
    raise ValueError(f"{subdivision!r} is not a part of {code} with holidays of its own; "
                     f"the nearest one is {code}-{_nearest(subdivision, spellings)} (there are {', '.join(parts[code])})")


def _plain(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def _nearest(text: str, spellings: dict[str, str]) -> str:
    """The valid value whose spelling (codes, names, aliases) is most like `text`."""
    return spellings[difflib.get_close_matches(_plain(text), spellings, 1, cutoff=0.0)[0]]


# -- planned closures --------------------------------------------------------------------------------------------------


def planned_closures(settings: Settings) -> tuple[Closure, ...]:
    """The closures of `closures_file`, oldest first; none where the setting is empty. The file is read again when it changed.

    Raises SettingsError where it is missing, InputRefused naming file, line, column and rule where it breaks one.
    """
    path = settings.closures_file
    if path is None:
        return ()
    try:
        found = path.stat()
    except OSError as error:
        raise SettingsError(f"RETENTION_OPS_CLOSURES_FILE: {path} cannot be read ({error.strerror}); "
                            "correct the path, or leave the setting empty") from error
    return _read(path.absolute(), settings.shop_timezone, (found.st_mtime_ns, found.st_size, found.st_ino))


@lru_cache(maxsize=8)
def _read(path: Path, zone: str, stamp: tuple[int, ...]) -> tuple[Closure, ...]:
    """The closures of a file as it is at `stamp`."""
    limits = Bounds(zone, today=date.max, latest=date.max, max_amount=0, max_amount_setting=0)
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="retention-ops-") as scratch, duckdb.connect(":memory:", config={"threads": 1}) as con:
        [file] = open_files([path], CLOSURES, con, Path(scratch), lambda text: None)
        [source] = file.sources
        load(con, source, CLOSURES, limits, "closures")
        check(con, source, CLOSURES, limits, "closures", findings, show_values=True)
        rows = con.execute(
            "SELECT rowid + 1, first_day, coalesce(last_day, first_day), reason FROM closures "
            "WHERE issue_first_day IS NULL AND issue_last_day IS NULL ORDER BY first_day, rowid").fetchall()
        file.check_unchanged()
    _check_ranges(source, [(source.number(row), first, last) for row, first, last, _ in rows], findings)
    findings.raise_if_any(f"Correct {path.name} (RETENTION_OPS_CLOSURES_FILE); nothing is computed by a wrong calendar.")
    return tuple(Closure(first, last, reason) for _, first, last, reason in rows)


def _check_ranges(source: Source, ranges: list[tuple[int, date, date]], findings: Findings) -> None:
    """Adds ranges (record, first day, last day; by first day) that run backwards, are too long, or overlap one that is in order."""
    latest: tuple[int, date] | None = None
    for record, first, last in ranges:
        days = (last - first).days + 1
        if days < 1:
            findings.add([Problem(source, record, "to", f"is before from ({first})", str(last))], "to", "is before from", 1)
        elif days > MAX_DAYS:
            rule = f"makes a closure of more than {MAX_DAYS} days"
            findings.add([Problem(source, record, "to", rule, str(last))], "to", rule, 1)
        elif latest and first <= latest[1]:
            rule = "overlaps another closure"
            where = f"{rule}, that of {source.place(latest[0])}, which ends on {latest[1]}"
            findings.add([Problem(source, record, "from", where, str(first))], "from", rule, 1)
        if 1 <= days <= MAX_DAYS and (latest is None or last > latest[1]):
            latest = record, last
