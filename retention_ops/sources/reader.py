"""Opens the source that the settings name. Each kind reads a statement's rows in its own module; nothing here or there writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from retention_ops.errors import UsageError
from retention_ops.settings import Secrets
from retention_ops.sources.select import Dialect, Select
from retention_ops.warehouse.seam import Warehouse

ROWS = 20_000
"""rows held at once while they are read"""


@dataclass(frozen=True)
class Finding:
    """What a source says of itself: true, false, or None where a person should look."""

    ok: bool | None
    sentence: str
    cure: str = ""


class Reader(Protocol):
    """A source, open: everything it is asked sees one and the same state where the kind can do that."""

    dialect: Dialect

    def columns(self, select: Select) -> Mapping[str, bool]:
        """The SELECT's columns, in order: name -> whether it is text, which cannot be compared with a date."""

    def rows(self, statement: str) -> Iterator[Sequence[Sequence[str | None]]]:
        """The rows of a statement, piece by piece."""

    def findings(self, select: Select) -> Iterator[Finding]:
        """Who we are there, and whether that is more than is needed."""


@contextmanager
def open_reader(lake: Warehouse, show_values: bool = False) -> Iterator[Reader]:
    """The source of this installation. Raises SourceError where it cannot be reached.

    An error names a value of the data only with `show_values`, and a credential never.
    """
    settings = lake.settings
    dialect_of(settings.source)
    match settings.source:
        case "postgres":
            from retention_ops.sources.postgres import open_postgres

            with open_postgres(settings, Secrets(), show_values) as reader:
                yield reader
        case "files":
            from retention_ops.sources.files import open_files_source

            with open_files_source(settings, show_values) as reader:
                yield reader
        case "bigquery":
            from retention_ops.sources.bigquery import open_bigquery

            with open_bigquery(lake, show_values) as reader:
                yield reader


def dialect_of(source: str) -> Dialect:
    """Whose SQL source_sql is written in. Raises UsageError where no source is set."""
    dialects: dict[str, Dialect] = {"postgres": "postgres", "files": "duckdb", "bigquery": "bigquery"}
    if source not in dialects:
        raise UsageError(
            "no source is set: orders come by `retention-ops ingest`.\nFor a source that is read each morning set RETENTION_OPS_SOURCE "
            "to postgres, files or bigquery; `retention-ops init` writes a working example."
        )
    return dialects[source]
