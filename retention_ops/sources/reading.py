"""Finds the records in an input file, whatever it is called, and refuses what cannot be read as records at all.

A file becomes one Source (a workbook: one per sheet), which is SQL giving the wanted columns as trimmed text, NULL where
empty, in file order. Nothing is typed here and nothing outside the scratch folder is written.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import re
import zipfile
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import python_calamine

from retention_ops.errors import InputRefused
from retention_ops.sources.presets import Field, Preset
from retention_ops.warehouse.dialect import file_list, identifier, parquet_scan

Progress = Callable[[str], None]

# parallel: measured with DuckDB 2.0, a ragged record just behind a multiple of 16,000,000 bytes ends the parallel reader
# without a word and what follows is lost. The single reader takes 0.2 s more for a million; it drops a record whose quote is never
# closed without a word. Hence `settle`, which counts the records again wherever they are not simply the lines.
CSV_OPTIONS = (
    "delim = ',', quote = '\"', escape = '\"', header = true, auto_detect = false, strict_mode = true, null_padding = false, "
    "hive_partitioning = false, parallel = false"
)
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
TEXTUAL_TYPES = re.compile(r"^(VARCHAR|U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|FLOAT|DOUBLE|DECIMAL|DATE|TIMESTAMP|BOOLEAN|ENUM|UUID)")
CHUNK = 1 << 20
# a field is quoted when its first character that is no blank is a quote; a quote further on is an ordinary character.
# No possessive quantifiers: Python up to 3.11.4 gets repeated groups wrong with them. There is one way to read a line, so
# a mismatch costs one pass all the same.
CSV_FIELD = rb'(?: *"[^"]*(?:""[^"]*)*" *|(?! *")[^,]*)'
CSV_RECORD = re.compile(CSV_FIELD + rb"(?:," + CSV_FIELD + rb")*")
CSV_REST = re.compile(rb'[^"]*(?:""[^"]*)*" *(?:,' + CSV_FIELD + rb")*")
OPEN_QUOTE = "has a quote that is not closed or not doubled"


@dataclass
class Source:
    """A table of text: a csv or parquet file, or one sheet of a workbook.

    `scan` is SQL for the file's own columns, given further options of the reading function as `, name = value`.
    `headers` maps field names to the header in the file. `broken` are the records that could not be split into fields;
    they have a number like the others but no row among the `records` rows. A record's place in the file is `places[n - 1]`,
    known for every format but parquet; a csv file (`path`) has it once it is settled. `numbered` is false where the quotes
    are such that nobody can say which records the rows are.
    """

    label: str
    file: int
    scan: Callable[[str], str]
    select: str
    headers: dict[str, str]
    is_csv: bool
    path: Path | None = None
    columns: int = 0
    lines: int = 0
    mixed_line_ends: bool = False
    places: Sequence[int] | None = None
    place_word: str = "line"
    broken: list[tuple[int, str]] = field(default_factory=list)
    numbered: bool = True
    records: int = 0

    def sql(self, options: str = "") -> str:
        """A SELECT of every wanted column as text."""
        return f"SELECT {self.select} FROM {self.scan(options)}"

    def number(self, row: int) -> int:
        """The number of the record in that row (from 1), counting the broken records before it too."""
        return row + bisect_right(range(len(self.broken)), row, key=lambda index: self.broken[index][0] - index)

    def place(self, record: int) -> str:
        """Where a person finds record number `record` (from 1)."""
        return f"{self.place_word} {self.places[record - 1]}" if self.places is not None else f"record {record}"

    def settle(self, rejected: Sequence[tuple[int, str]], miscounted: bool) -> None:
        """Find the line of every record of a csv file, after DuckDB took some of them and rejected the others.

        `rejected` are (byte at which the record begins, what is wrong) in file order; `miscounted`: whether it is nothing
        but the number of their fields. Raises InputRefused when DuckDB neither took nor rejected some record.
        """
        expected, still_open = self.records + len(rejected), False
        places: Sequence[int] = range(2, self.lines + 1)
        if len(places) != expected:
            places, still_open = _record_lines(self.path, self.columns)
        broken = list(zip(_lines_at(self.path, [start for start, _ in rejected]), (what for _, what in rejected), strict=True))
        if still_open and places[-1] not in (line for line, _ in broken):
            broken.append((places[-1], OPEN_QUOTE))
        numbers = [bisect_left(places, line) + 1 for line, _ in broken]
        if len(places) == expected and miscounted and not still_open and self._stand_at(places, numbers, broken):
            self.places = places
            self.broken = [(number, what) for number, (_, what) in zip(numbers, broken, strict=True)]
        elif broken:
            # where a line is remains certain, so every line counts as a record
            self.places, self.broken, self.numbered = range(1, broken[-1][0] + 1), broken, False
        else:
            raise refusal(self.label, "cannot be read to its end", "Check its quotes and line ends, or export it again.")

    @staticmethod
    def _stand_at(places: Sequence[int], numbers: list[int], broken: list[tuple[int, str]]) -> bool:
        """Whether each broken record begins in the line of the record of that number."""
        return all(number <= len(places) and places[number - 1] == line for number, (line, _) in zip(numbers, broken, strict=True))


@dataclass
class InputFile:
    """One file as it was found, with the tables in it."""

    name: str
    path: Path
    sha256: str
    sources: list[Source]
    ignored_columns: list[str]
    skipped_sheets: list[str]
    stamp: tuple[int, int]

    @property
    def records(self) -> int:
        return sum(source.records for source in self.sources)

    def check_unchanged(self) -> None:
        """Raise InputRefused when the file changed since it was opened, so that sha256 names what was read."""
        if _stamp(self.path) != self.stamp:
            raise refusal(self.name, "changed while it was being read", "Wait until it is complete and ingest it again.")


def refusal(label: str, what: str, then: str) -> InputRefused:
    """The error for a file as a whole: what is wrong with it and what to do."""
    return InputRefused(f"{label} {what}; nothing was written.\n{then}")


def open_files(
    files: Sequence[Path], preset: Preset, con: duckdb.DuckDBPyConnection, scratch: Path, progress: Progress
) -> list[InputFile]:
    """Look into every file. Raises InputRefused at the first one that has no readable records of this preset."""
    names = [path.name or str(path) for path in files]  # "." and "/" have no name
    opened: list[InputFile] = []
    for number, path in enumerate(files):
        name = names[number] if names.count(names[number]) == 1 else str(path)
        progress(f"reading {name}")
        opened.append(_open(path, name, number, preset, con, scratch, progress))
    return opened


def _open(
    path: Path, name: str, number: int, preset: Preset, con: duckdb.DuckDBPyConnection, scratch: Path, progress: Progress
) -> InputFile:
    """Recognise one file by its content and hand it to the reader for that format."""
    try:
        _check_is_file(path, name)
        stamp = _stamp(path)
        if stamp[0] == 0:
            raise refusal(name, "is empty", "Export it again.")
        kind = _recognise(path, name)
        allowed = ("csv", "text") if kind == "text" else (kind,)
        if not set(allowed) & set(preset.formats):
            raise refusal(name, f"is {kind}, which preset {preset.name} does not read", f"It reads {', '.join(preset.formats)}.")
        file = InputFile(name, path, "", [], [], [], stamp)
        if kind == "text":
            probe = probe_text(path, name)
            file.sha256 = probe.sha256
            reader = _open_cdnow if "text" in preset.formats else _open_csv
            reader(file, number, preset, probe, scratch)
        elif kind == "xlsx":
            file.sha256 = _sha256(path)
            _open_workbook(file, number, preset, scratch, progress)
        else:
            file.sha256 = _sha256(path)
            _open_parquet(file, number, preset, con)
    except OSError as error:
        raise refusal(name, f"cannot be read: {error.strerror or type(error).__name__}", "Check its permissions.") from error
    return file


def _check_is_file(path: Path, name: str) -> None:
    if path.is_dir():
        raise refusal(name, "is a directory, not a file", "Name the files in it one by one.")
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise refusal(name, what, "Check the path.")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _recognise(path: Path, name: str) -> str:
    """'text', 'xlsx' or 'parquet', by content. Raises InputRefused for formats nothing here reads."""
    with path.open("rb") as handle:
        head = handle.read(8)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"\x1f\x8b"):
        raise refusal(name, "is gzip-compressed", f"Unpack it first: gunzip -k {name}")
    if head.startswith(b"\xd0\xcf\x11\xe0"):
        raise refusal(name, "is an old .xls or a password-protected workbook", "Save it as .xlsx without a password.")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise refusal(name, "is UTF-16 text, not UTF-8", f"Convert it: {_iconv(name, 'UTF-16')}")
    if not head.startswith(b"PK\x03\x04"):
        return "text"
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise refusal(name, "is a damaged workbook or zip archive", "Export it again.") from error
    if "xl/workbook.xml" in members:
        return "xlsx"
    raise refusal(name, "is a zip archive, not a workbook", "Unpack it and name the files in it.")


# --- text files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextProbe:
    sha256: str
    lines: int
    mixed_line_ends: bool


def _iconv(name: str, encoding: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return f"iconv -f {encoding} -t UTF-8 {name} > {stem or suffix}.utf8{dot}{suffix if stem else ''}"


def probe_text(path: Path, name: str) -> TextProbe:
    """One pass over the bytes: hash, number of lines up to the last non-blank one, proof that it is UTF-8 text."""
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    lines, trailing, crlf, newlines, last = 1, 0, 0, 0, b""
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            if b"\0" in chunk:
                _refuse_impostor(name)
                raise refusal(name, "is binary, not text", "Export it as csv, xlsx or parquet.")
            digest.update(chunk)
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                _refuse_impostor(name)
                line = newlines + error.object[: error.start].count(b"\n") + 1
                raise refusal(
                    name, f"is not UTF-8: line {line} has a byte that only another encoding explains",
                    f"It is probably Latin-1 / Windows-1252. Convert it: {_iconv(name, 'WINDOWS-1252')}",
                ) from None
            body = chunk.rstrip(b" \t\r\n")
            if body:
                lines += trailing + body.count(b"\n")
                trailing = 0
            trailing += chunk[len(body):].count(b"\n")
            newlines += chunk.count(b"\n")
            crlf += chunk.count(b"\r\n") + (last == b"\r" and chunk.startswith(b"\n"))
            last = chunk[-1:]
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        _refuse_impostor(name)
        raise refusal(name, f"is not UTF-8: it ends inside a character in line {lines}", "Export it again.") from None
    return TextProbe(digest.hexdigest(), lines, 0 < crlf < newlines)


def _refuse_impostor(name: str) -> None:
    """Raise InputRefused for a file that is no text, for what its name says it should be."""
    for suffix, what in ((".parquet", "parquet file"), (".xlsx", "workbook")):
        if name.lower().endswith(suffix):
            raise refusal(name, f"is not a readable {what}: its content is something else", "Export it again.")


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a text file with their ends, which are bare carriage returns where there is no newline at all."""
    with path.open("rb") as handle:
        first = handle.readline()
        rest = handle.readline()
        yield from [first, rest] if rest else first.splitlines(keepends=True)
        yield from handle


def _lines_at(path: Path, starts: Sequence[int]) -> list[int]:
    """The line in which each record begins, given the byte, ascending; DuckDB's byte may lie on blank lines before it."""
    found: list[int] = []
    offset = line = 0
    for line, text in enumerate(_lines(path), start=1):
        if len(found) == len(starts):
            break
        if body := len(text.rstrip(b"\r\n")):
            while len(found) < len(starts) and starts[len(found)] < offset + body:
                found.append(line)
        offset += len(text)
    return found + [line] * (len(starts) - len(found))


def _record_lines(path: Path, columns: int) -> tuple[Sequence[int], bool]:
    """The line in which each record after the header begins, and whether the last one has a quote that is never closed.

    A blank line is a record only where there is one column, as for DuckDB.
    """
    starts, quoted = array("I"), False
    for line, text in enumerate(_lines(path), start=1):
        body = (text.removeprefix(codecs.BOM_UTF8) if line == 1 else text).rstrip(b"\r\n")
        if not quoted:
            if body or columns == 1:
                starts.append(line)
            quoted = b'"' in body and not CSV_RECORD.fullmatch(body)
        elif b'"' in body:
            quoted = not CSV_REST.fullmatch(body)
    return starts[1:], quoted


def check_whole(path: Path, name: str, columns: int, lines: int, rows: int) -> None:
    """Raise InputRefused where DuckDB read another number of rows than a csv file of so many lines and columns has records."""
    if rows == lines - 1:
        return
    places, still_open = _record_lines(path, columns)
    if still_open:
        raise refusal(name, f"{OPEN_QUOTE}, from line {places[-1] if places else 1} on", "Correct it, or export it again.")
    if len(places) != rows:
        raise refusal(name, "cannot be read to its end", "Check its quotes and line ends, or export it again.")


def _open_csv(file: InputFile, number: int, preset: Preset, probe: TextProbe, scratch: Path) -> None:
    with file.path.open(encoding="utf-8-sig", newline="") as handle:
        first = handle.readline(CHUNK)
        handle.seek(0)
        try:
            names = next(csv.reader(handle, strict=True), [])
        except csv.Error as error:
            raise refusal(file.name, "has a header that is not valid csv", "Check the quotes in its first line.") from error
    if not any(name.strip() for name in names):
        raise refusal(file.name, "starts with a blank line", "The first line must be the header.")
    header = _Header(names, preset)
    if header.missing:
        _check_separator(file.name, first, header, preset)
    header.check(file.name, preset)
    file.ignored_columns = header.ignored
    file.sources.append(
        _csv_source(
            file.name, number, file.path, len(names), header, path=file.path, columns=len(names), lines=probe.lines,
            mixed_line_ends=probe.mixed_line_ends,
        )
    )


def _csv_source(label: str, number: int, csv_path: Path, width: int, header: _Header, **details: Any) -> Source:
    """A Source over a csv file of `width` columns; its header decides which of them are wanted."""
    types = ", ".join(f"'c{index}': 'VARCHAR'" for index in range(width))

    def scan(options: str) -> str:
        return f"read_csv({file_list(csv_path)}, {CSV_OPTIONS}, columns = {{{types}}}{options})"

    columns = {name: f"nullif(trim(c{position}), '')" for name, position in header.positions.items()}
    select = ", ".join(f"{columns.get(name, 'CAST(NULL AS VARCHAR)')} AS {name}" for name in header.fields)
    return Source(label, number, scan, select, header.present, is_csv=True, **details)


def _check_separator(name: str, first_line: str, header: _Header, preset: Preset) -> None:
    """Raise InputRefused when another separator than the comma explains the header better."""
    for separator, word in SEPARATORS.items():
        other = _Header(next(csv.reader([first_line], delimiter=separator), []), preset)
        if len(other.missing) < len(header.missing):
            raise refusal(
                name, f"is separated by {word}, not commas",
                "Save it as comma-separated csv (UTF-8) with a decimal point, for instance from a spreadsheet, and ingest that.",
            )


def _open_cdnow(file: InputFile, number: int, preset: Preset, probe: TextProbe, scratch: Path) -> None:
    """Fields by position: four, or five of which the first is dropped; the first line decides which."""
    with file.path.open(encoding="utf-8-sig") as handle:
        numbered = ((line, _split(text)) for line, text in enumerate(handle, start=1) if text.strip())
        first = next(numbered, None)
        if first is None:
            raise refusal(file.name, "is blank", "Export it again.")
        width = len(first[1])
        if width not in (4, 5):
            separator = next((word for mark, word in SEPARATORS.items() if mark in " ".join(first[1])), None)
            hint = f": it seems to be separated by {separator}" if separator else ""
            raise refusal(
                file.name, f"has {width} field{'s' if width != 1 else ''} in line {first[0]}, not 4 or 5{hint}",
                "Preset cdnow reads customer, date (YYYYMMDD), quantity, value, separated by blanks or commas.",
            )
        is_header = not any(text[:1].isdigit() for text in first[1])
        rows = numbered if is_header else _chain(first, numbered)
        header = _Header([entry.header for entry in preset.fields], preset)
        file.sources.append(_converted(file.name, number, header, range(width - 4, width), rows, width, scratch))


def _split(line: str) -> list[str]:
    return re.split(r"\s*,\s*|\s+", line.strip())


def _chain(first: tuple[int, list[str]], rest: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    yield first
    yield from rest


def _converted(
    label: str, number: int, header: _Header, positions: Iterable[int], rows: Iterable[tuple[int, list[str]]], width: int,
    scratch: Path, place_word: str = "line",
) -> Source:
    """Write rows (place in the file, values) to a csv in the scratch folder and return a Source over it.

    A row whose width differs is noted as broken. `header` must name the columns in the order of `positions`.
    """
    positions, places, broken = list(positions), array("L"), []
    path = scratch / f"converted-{number}-{len(list(scratch.glob('converted-*')))}.csv"
    with path.open("w", encoding="utf-8", newline="") as handle:
        # everything is quoted: python 3.11 leaves a bare carriage return unquoted, which DuckDB takes for the end of a record
        writer = csv.writer(handle, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow([f"c{index}" for index in range(len(positions))])
        for place, values in rows:
            places.append(place)
            if len(values) != width:
                broken.append((len(places), f"has {len(values)} field{'' if len(values) == 1 else 's'}, expected {width}"))
            else:
                writer.writerow([values[position] for position in positions])
    return _csv_source(label, number, path, len(positions), header, places=places, place_word=place_word, broken=broken)


# --- workbooks ------------------------------------------------------------------------------------------------------


def _open_workbook(file: InputFile, number: int, preset: Preset, scratch: Path, progress: Progress) -> None:
    """Every sheet whose header fits is a source of its own; the others are named as skipped."""
    try:
        with python_calamine.CalamineWorkbook.from_path(str(file.path)) as workbook:
            headers = {
                name: _sheet_source(file, number, preset, workbook, name, scratch, progress) for name in workbook.sheet_names
            }
    except (python_calamine.CalamineError, zipfile.BadZipFile) as error:
        raise refusal(file.name, "is a damaged workbook", "Open it in a spreadsheet and save it again.") from error
    if not file.sources:
        closest = min((header for header in headers.values() if header), key=lambda header: len(header.missing), default=None)
        if closest is None:
            raise refusal(file.name, "has no sheet with any content", "Export it again.")
        closest.check(f"{file.name} (no sheet fits; the closest one)", preset)
        raise refusal(file.name, "has no sheet with customer attributes", "A sheet needs customer_id and at least one of them.")


def _sheet_source(
    file: InputFile, number: int, preset: Preset, workbook: Any, sheet: str, scratch: Path, progress: Progress
) -> _Header | None:
    """Append a source for the sheet if its first non-blank row is a fitting header; returns that header."""
    rows = ((place, row) for place, row in enumerate(workbook.get_sheet_by_name(sheet).iter_rows(), start=1) if any(_filled(row)))
    first = next(rows, None)
    if first is None:
        file.skipped_sheets.append(sheet)
        return None
    names = [_cell_text(value) for value in first[1]]
    header = _Header(names, preset)
    if header.missing or (preset.dataset == "customers" and len(header.positions) == 1):
        # many a sheet has a customer_id; without any attribute it is not about customers
        file.skipped_sheets.append(sheet)
        return header
    label = f"{file.name}, sheet {sheet!r}" if len(workbook.sheet_names) > 1 else file.name
    header.check(label, preset)
    file.ignored_columns.extend(name for name in header.ignored if name not in file.ignored_columns)
    wanted = sorted(header.positions.values())
    text_rows = ((place, [_cell_text(row[position]) for position in wanted]) for place, row in _counted(rows, label, progress))
    narrow = _Header([names[position] for position in wanted], preset)
    source = _converted(label, number, narrow, range(len(wanted)), text_rows, len(wanted), scratch, place_word="row")
    file.sources.append(source)
    return header


def _counted(rows: Iterable[tuple[int, Any]], label: str, progress: Progress) -> Iterator[tuple[int, Any]]:
    """The rows unchanged, with a word of progress now and then: a large workbook takes several seconds."""
    for count, row in enumerate(rows):
        if count and count % 100_000 == 0:
            progress(f"reading {label}: {count:,} rows so far")
        yield row


def _filled(row: Iterable[Any]) -> Iterator[bool]:
    return (value != "" for value in row)


def _cell_text(value: Any) -> str:
    """A cell as the text a csv export would hold: a workbook knows no integers, and its times are fractions of a day."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, datetime) and value.microsecond:
        value = (value + timedelta(microseconds=500_000)).replace(microsecond=0)
    return str(value)


# --- parquet --------------------------------------------------------------------------------------------------------


def _open_parquet(file: InputFile, number: int, preset: Preset, con: duckdb.DuckDBPyConnection) -> None:
    def scan(options: str = "") -> str:
        return parquet_scan(file.path, options=f", binary_as_string = true{options}")

    try:
        described = con.execute(f"DESCRIBE SELECT * FROM {scan()}").fetchall()
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise refusal(file.name, "is a damaged parquet file", "Export it again.") from error
    names, types = [row[0] for row in described], [row[1] for row in described]
    header = _Header(names, preset)
    header.check(file.name, preset)
    columns = []
    for entry in preset.fields:
        position = header.positions.get(entry.name)
        if position is None:
            columns.append(f"CAST(NULL AS VARCHAR) AS {entry.name}")
        elif not TEXTUAL_TYPES.match(types[position]) or types[position].endswith("]"):
            raise refusal(
                file.name, f"holds {types[position].split('(')[0]} in column {names[position]}", "Export text, numbers or dates."
            )
        else:
            columns.append(f"nullif(trim({_as_text(identifier(names[position]), types[position], entry)}), '') AS {entry.name}")
    file.ignored_columns = header.ignored
    file.sources.append(Source(file.name, number, scan, ", ".join(columns), header.present, is_csv=False))


def _as_text(column: str, type_: str, entry: Field) -> str:
    """A parquet column as text. An id stored as a float, which pandas does to hold gaps, loses its '.0' and NaN."""
    text = f"CAST({column} AS VARCHAR)"
    if type_ in ("FLOAT", "DOUBLE") and entry.kind in ("id", "numeric_id", "text", "whole"):
        integral = f"NOT isinf({column}) AND abs({column}) < 1e15 AND {column} = trunc({column})"
        whole = f"CAST(CAST({column} AS BIGINT) AS VARCHAR)"
        text = f"CASE WHEN isnan({column}) THEN NULL WHEN {integral} THEN {whole} ELSE {text} END"
    return text


# --- headers --------------------------------------------------------------------------------------------------------


class _Header:
    """Which columns of a header are which fields of a preset."""

    def __init__(self, names: Sequence[str], preset: Preset):
        self.names = [name.strip() for name in names]
        folded = [name.casefold() for name in self.names]
        self.fields = [entry.name for entry in preset.fields]
        self.candidates: dict[str, list[int]] = {}
        for entry in preset.fields:
            accepted = {header.casefold() for header in entry.headers}
            found = [index for index, name in enumerate(folded) if name in accepted]
            if found:
                self.candidates[entry.name] = found
        self.positions = {name: found[0] for name, found in self.candidates.items()}
        self.present = {name: self.names[position] for name, position in self.positions.items()}
        self.missing = [entry for entry in preset.fields if entry.needed and entry.name not in self.positions]
        self.repeated = sorted({name for name in self.names if name and folded.count(name.casefold()) > 1})
        used = {index for found in self.candidates.values() for index in found}
        self.ignored = [name for index, name in enumerate(self.names) if index not in used and name]

    def check(self, label: str, preset: Preset) -> None:
        """Raise InputRefused for missing, repeated or ambiguous columns."""
        if self.missing:
            parts = [f"  {entry.header} is missing{self._nearest(entry)}" for entry in self.missing]
            if not self.positions:
                parts.append("  none of the expected names is there: is the first line the header?")
            needed = ", ".join(" or ".join(entry.headers) for entry in preset.fields if entry.needed)
            raise refusal(label, "lacks needed columns", "\n".join([*parts, f"Preset {preset.name} needs: {needed}."]))
        if self.repeated:
            raise refusal(label, f"names a column twice: {', '.join(self.repeated)}", "Rename or remove one of them.")
        for name, found in self.candidates.items():
            if len(found) > 1:
                both = " and ".join(self.names[index] for index in found)
                raise refusal(label, f"has two columns for the same thing: {both}", f"Keep one as {preset.field(name).header}.")

    def _nearest(self, entry: Field) -> str:
        """Names the present column most like the missing one."""
        free = {name.casefold(): name for index, name in enumerate(self.names) if index not in self.positions.values()}
        for header in entry.headers:
            if close := difflib.get_close_matches(header.casefold(), list(free), n=1, cutoff=0.6):
                return f" (nearest present: {free[close[0]][:40]!r})"
        return ""
