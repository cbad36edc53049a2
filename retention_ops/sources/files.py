"""Orders in files that somebody exports: csv or parquet in a folder or a bucket, read by DuckDB as the view `source_files`.

Every column of a csv is text there, so that ids keep their zeros and amounts their cents; `source_file` names the file of each
row. Files of a bucket are copied to this machine first, one whole pull at a time, and removed after it.
"""

from __future__ import annotations

import csv
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

import duckdb

from retention_ops.errors import SourceError
from retention_ops.settings import LOGIN, Settings, without_login
from retention_ops.sources.reader import ROWS, Finding
from retention_ops.sources.reading import CSV_OPTIONS, check_whole, probe_text, refusal
from retention_ops.sources.select import Select
from retention_ops.warehouse.connection import connect_in_memory
from retention_ops.warehouse.dialect import file_list, identifier, literal
from retention_ops.warehouse.files import scratch_folder

KINDS = (".csv", ".parquet")
WILDCARD = re.compile(r"[*?\[]")
HARMLESS = (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException)
"""errors about the SELECT itself; others may quote a row"""


@contextmanager
def open_files_source(settings: Settings, show_values: bool) -> Iterator[Files]:
    """The view `source_files` over everything that RETENTION_OPS_SOURCE_PATH names. Raises SourceError where that is nothing."""
    with (
        scratch_folder(settings.home / "tmp", "files-") as scratch,
        connect_in_memory(settings, spill_to=scratch / "spill") as connection,
    ):
        connection.execute("SET TimeZone = 'UTC'")
        paths = _copied(settings.source_path, scratch) if "://" in settings.source_path else _local(settings.source_path)
        kinds = {path.suffix.lower() for path in paths}
        if not paths or len(kinds) > 1:
            what = "has both csv and parquet files; name one kind, such as folder/*.csv" if paths else "has no csv or parquet file"
            raise SourceError(f"RETENTION_OPS_SOURCE_PATH {without_login(settings.source_path)} {what}.\nNothing was written.")
        reader = Files(connection, paths, without_login(settings.source_path), show_values)
        reader.create_view(csv_files=kinds == {".csv"})
        yield reader


def _local(pattern: str) -> list[Path]:
    """The csv and parquet files of a folder and those below it, or those a pattern matches; oldest name first."""
    path = Path(pattern)
    if path.is_dir():
        found = [file for file in path.rglob("*") if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(pattern, recursive=True)]
    return sorted(file for file in found if file.suffix.lower() in KINDS and file.is_file())


def _copied(address: str, scratch: Path) -> list[Path]:
    """Copies of a bucket's files. Credentials are the ones the cloud's own tools use; those of an address are never shown."""
    from pyarrow import fs

    named = without_login(address)
    address, _, query = address.partition("?")
    wild = WILDCARD.search(address)
    base = address[: address.rindex("/", 0, wild.start())] if wild else address
    asked = base + (f"?{query}" if query else "")
    try:
        system, root = fs.FileSystem.from_uri(asked)
        found = system.get_file_info(fs.FileSelector(root, recursive=True)) if wild or not address.lower().endswith(KINDS) else [
            system.get_file_info(root)]
        pattern = root + address[len(base):] if wild else "*"
        wanted = sorted(item.path for item in found if item.type == fs.FileType.File and item.path.lower().endswith(KINDS)
                        and fnmatch(item.path, pattern))
        copies = []
        for number, path in enumerate(wanted):
            folder = scratch / f"{number:06d}"  # two folders may hold files of one name
            folder.mkdir()
            fs.copy_files(path, str(folder / Path(path).name), source_filesystem=system)
            copies.append(folder / Path(path).name)
        return copies
    except (OSError, ValueError) as error:  # pyarrow's own are among them
        said = LOGIN.sub("://***@", str(error).replace(asked, without_login(asked)))
        raise SourceError(f"{named} cannot be read: {said.partition('Detail:')[0].strip()[:300]}\nNothing was written.") from None


class Files:
    """A Reader on DuckDB in memory; a file that changes meanwhile is noticed and refused."""

    dialect = "duckdb"

    def __init__(self, connection: duckdb.DuckDBPyConnection, paths: Sequence[Path], named: str, show_values: bool):
        self._connection, self._paths, self._named, self._show_values = connection, paths, named, show_values
        self._stamps = self._look()

    def create_view(self, csv_files: bool) -> None:
        """View `source_files`. Raises InputRefused for a file that cannot be read to its end."""
        try:
            if csv_files:
                scan = " UNION ALL BY NAME ".join(self._csv(path) for path in self._paths)
            else:
                scan = (f"SELECT * REPLACE (parse_filename(source_file) AS source_file) FROM read_parquet({file_list(*self._paths)}, "
                        "union_by_name = true, hive_partitioning = false, filename = 'source_file')")
            self._connection.execute(f"CREATE VIEW source_files AS {scan}")
        except OSError as error:
            raise SourceError(f"{self._named}: {error.strerror or type(error).__name__}\nNothing was written.") from None
        except duckdb.Error as error:
            self._fail(error)

    def _csv(self, path: Path) -> str:
        """SQL for one csv file, proven to be read to its end."""
        lines = probe_text(path, path.name).lines
        with path.open(encoding="utf-8-sig", newline="") as handle:
            try:
                names = next(csv.reader(handle, strict=True), [])
            except csv.Error:
                raise refusal(path.name, "has a header that is not valid csv", "Check the quotes in its first line.") from None
        if not any(name.strip() for name in names):
            raise refusal(path.name, "starts with a blank line", "The first line must be the header.")
        types = ", ".join(f"'c{place}': 'VARCHAR'" for place in range(len(names)))
        scan = f"read_csv({file_list(path)}, {CSV_OPTIONS}, columns = {{{types}}})"
        # the last column: a count of nothing but rows need not look at their shape
        rows = self._connection.execute(f"SELECT count(*), count(c{len(names) - 1}) FROM {scan}").fetchone()[0]
        check_whole(path, path.name, len(names), lines, rows)
        columns = ", ".join(f"nullif(c{place}, '') AS {identifier(name)}" for place, name in enumerate(_distinct(names)))
        return f"SELECT {columns}, {literal(path.name)} AS source_file FROM {scan}"

    def columns(self, select: Select) -> Mapping[str, bool]:
        try:
            described = self._connection.execute(f"DESCRIBE SELECT * FROM (\n{select.text}\n) AS q").fetchall()
        except duckdb.Error as error:
            self._fail(error, f"{select.path}: ")
        return {row[0]: row[1] == "VARCHAR" for row in described}

    def rows(self, statement: str) -> Iterator[Sequence[Sequence[str | None]]]:
        try:
            cursor = self._connection.execute(statement)
            while rows := cursor.fetchmany(ROWS):
                yield rows
        except duckdb.Error as error:
            self._fail(error)
        if self._look() != self._stamps:
            raise SourceError(f"{self._named} changed while it was being read; nothing was written.\nPull again when the export is done.")

    def findings(self, select: Select) -> Iterator[Finding]:
        rights = ("s3:ListBucket and s3:GetObject, or roles/storage.objectViewer, on the bucket" if "://" in self._named
                  else "the right to read these files")
        count = len(self._paths)
        yield Finding(True, f"{count:,} file{'' if count == 1 else 's'} in {self._named}; needed is no more than {rights}")

    def _look(self) -> list[tuple[int, int]]:
        try:
            return [(status.st_size, status.st_mtime_ns) for status in (path.stat() for path in self._paths)]
        except OSError:
            return []

    def _fail(self, error: duckdb.Error, where: str = "") -> NoReturn:
        """Raises SourceError without what may quote a row; DuckDB's own line numbers become the user's."""
        said = re.sub(r"LINE (\d+):", lambda found: f"line {int(found[1]) - 1}:", str(error))
        if not isinstance(error, HARMLESS) and not self._show_values:
            line = re.search(r"CSV Error on Line: (\d+)", str(error))
            near = f" near line {line[1]} of a file" if line else ""
            said = f"{type(error).__name__}{near} (its text may hold values; see it with --show-values)"
        raise SourceError(f"{where}DuckDB: {said}\nNothing was written.") from None


def _distinct(names: Sequence[str]) -> list[str]:
    """Names as SQL can tell them apart: case does not count, and a header without a name gets its place."""
    found: list[str] = []
    for place, name in enumerate(names):
        name = name.strip() or f"column{place + 1}"
        taken = {other.casefold() for other in found}
        while name.casefold() in taken:
            name += "_1"
        found.append(name)
    return found
