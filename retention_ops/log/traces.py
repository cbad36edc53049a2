"""Finds what texts and SQLite files say about a person, and takes it out without harming the rest.

An id that could be any number ("17381", "31") is looked for only where an id stands: quoted, in code style, or alone in the first cell of
a table's row; one with letters and digits, or an address, wherever it stands by itself.
"""

from __future__ import annotations

import html
import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

GONE = "erased on request"
_ROW = re.compile(r"<tr\b(?:(?!<tr\b)[\s\S])*?</tr>")
_MARKER = re.compile(r"\s*(?:[-*•]|\d+\.)\s+")
SHOWN_CHARACTERS = 64
"""a brief cuts longer ids"""
TELLING_CHARACTERS = 6
BUSY_SECONDS = 30


class Traces:
    """Everything by which one or several people would be recognised: their ids in each spelling a text may have."""

    def __init__(self, names: Iterable[str]):
        self.names = frozenset(names)
        spelled = sorted({each for name in self.names for each in _spellings(name)}, key=len, reverse=True)
        self._pattern = re.compile("|".join(_standing(each) for each in spelled) or r"(?!)", flags=re.M)

    def in_text(self, text: str) -> bool:
        return self._pattern.search(text) is not None

    def in_value(self, value: Any) -> bool:
        """Whether a JSON value names one of them, as a whole string, a key or inside a text."""
        return any(text in self.names or self.in_text(text) for text in _strings(value))

    def in_detail(self, detail: str) -> bool:
        return self.in_value(_parsed(detail))

    def without(self, text: str) -> str:
        """The text with each line, list entry or table row that names one of them replaced by a word that somebody was erased."""
        if not self.in_text(text):
            return text
        if "<tr" in text or "<html" in text:
            text = _ROW.sub(lambda row: f'<tr><td colspan="9">{GONE}</td></tr>' if self.in_text(row[0]) else row[0], text)
            return self._pattern.sub(GONE, text)
        return "\n".join(self._line(line) if self.in_text(line) else line for line in text.split("\n"))

    def _line(self, line: str) -> str:
        if line.startswith("|"):
            return f"| {GONE} |" + " |" * (line.count("|") - 2)
        marker = _MARKER.match(line)
        return (marker[0] if marker else "") + GONE

    def without_value(self, value: Any) -> Any:
        """The same for a JSON value; its shape stays."""
        if isinstance(value, str):
            return GONE if value in self.names else self.without(value)
        if isinstance(value, list):
            return [self.without_value(item) for item in value]
        if isinstance(value, dict):
            return {GONE if name in self.names else name: self.without_value(item) for name, item in value.items()}
        return value

    def without_detail(self, detail: str) -> str:
        """The same for a text that may be JSON."""
        value = _parsed(detail)
        return self.without(value) if isinstance(value, str) else json.dumps(self.without_value(value), ensure_ascii=False)

    def replaced(self, text: str) -> str:
        """The text with nothing but the ids taken out: for what a program wrote and reads again."""
        return self._pattern.sub(GONE, text)

    def in_bytes(self, data: bytes) -> bool:
        """Whether a file holds one of them anywhere, free pages included. Ids that could be any number are not told from numbers."""
        return any(each.encode(errors="surrogatepass") in data for name in self.names if _telling(name) for each in _spellings(name))


def _spellings(name: str) -> set[str]:
    """An id as HTML, JSON, Markdown and a cut brief have it. The ids of a list are found by its column, not by text."""
    cut = name if len(name) <= SHOWN_CHARACTERS else name[: SHOWN_CHARACTERS - 1].rstrip()
    markdown = re.sub(r"([\\`*_{}\[\]()#+.!|<>~-])", r"\\\1", cut)
    only_underscores = cut.replace("_", r"\_")
    found = {name, cut, html.escape(cut), html.escape(name), json.dumps(name)[1:-1], markdown, only_underscores}
    return {each for each in found if each}


def _telling(name: str) -> bool:
    """Whether the id says by itself that it is one."""
    mixed = any(each.isalpha() for each in name) and any(each.isdigit() for each in name)
    return "@" in name or (len(name) >= TELLING_CHARACTERS and (mixed or len(name) >= 2 * TELLING_CHARACTERS))


def _standing(spelled: str) -> str:
    """A pattern for an id where it stands as one."""
    exact = re.escape(spelled)
    if _telling(spelled):
        return rf"(?<![A-Za-z0-9]){exact}(?![A-Za-z0-9])"
    return rf"(?<=[`'\"]){exact}(?=[`'\"])|(?<=monospace\">){exact}(?=</code>)|(?<=<code>){exact}(?=</code>)|(?<=^\| ){exact}(?= \|)"


def _parsed(detail: str) -> Any:
    try:
        value = json.loads(detail)
    except ValueError:
        return detail
    return value if isinstance(value, (dict, list)) else detail


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield str(name)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


# -- files of others: Dagster's storage ------------------------------------------------------------------------------------


def files_with(folder: Path, traces: Traces) -> list[Path]:
    """Files under `folder` that hold a telling id of the person, SQLite journals and free pages included."""
    return [path for path in _files(folder) if traces.in_bytes(_read(path))]


def scrub_files(folder: Path, traces: Traces) -> int:
    """Takes the ids out of texts and SQLite files under `folder`; returns how many files were touched."""
    found = files_with(folder, traces)
    databases = {Path(str(path).removesuffix(end)) for path in found for end in ("-wal", "-shm", "-journal") if str(path).endswith(end)}
    for path in dict.fromkeys([*found, *databases]):
        if path in databases or _is_sqlite(path):
            _scrub_sqlite(path, traces)
        elif path.exists() and not str(path).endswith(("-wal", "-shm", "-journal")):
            data = path.read_bytes()
            text = data.decode("utf-8", "surrogateescape")
            clean = traces.replaced(text)
            path.write_bytes(clean.encode("utf-8", "surrogateescape"))
    return len(found)


def _scrub_sqlite(path: Path, traces: Traces) -> None:
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
        connection.execute("PRAGMA secure_delete = ON")
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")]
        for table in tables:
            columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
            for column in columns:
                rows = connection.execute(f'SELECT rowid, "{column}" FROM "{table}" WHERE typeof("{column}") = \'text\'').fetchall()
                for number, text in rows:
                    if traces.in_text(text):
                        connection.execute(f'UPDATE "{table}" SET "{column}" = ? WHERE rowid = ?', (traces.replaced(text), number))
        connection.commit()
    compact_sqlite(path)


def compact_sqlite(path: str | Path) -> None:
    """Writes a SQLite file anew without its free pages and empties its journal. Raises sqlite3.OperationalError while it is in use."""
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("VACUUM")
        busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if busy:
            raise sqlite3.OperationalError(f"{path} is being read; its journal could not be emptied")


def _is_sqlite(path: Path) -> bool:
    with open(path, "rb") as handle:
        return handle.read(16) == b"SQLite format 3\x00"


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(parent) / name
            if path.is_file() and not path.is_symlink():
                yield path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # a journal that went meanwhile
        return b""
