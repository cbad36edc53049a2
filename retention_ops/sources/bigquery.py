"""Orders in BigQuery: the SELECT is one job there, priced by a dry run before, its rows read page by page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from retention_ops.errors import SourceError, WarehouseError
from retention_ops.sources.reader import ROWS, Finding
from retention_ops.sources.select import Select, shape
from retention_ops.warehouse.seam import Warehouse

QUOTING = ("invalidQuery", "invalid")
"""reasons of failures whose messages may quote a row's value"""


@contextmanager
def open_bigquery(lake: Warehouse, show_values: bool) -> Iterator[BigQuery]:
    """The warehouse's own account where it is BigQuery too, else Application Default Credentials."""
    if lake.engine == "bigquery":
        yield BigQuery(lake.jobs, show_values)
        return
    from retention_ops.warehouse.bigquery_jobs import Jobs  # importing its client takes a second

    yield BigQuery(Jobs(lake.settings), show_values)


class BigQuery:
    """A Reader; each statement is a job of its own and sees the tables as they are when it starts."""

    dialect = "bigquery"

    def __init__(self, jobs: Any, show_values: bool):
        self._jobs, self._show_values = jobs, show_values

    def columns(self, select: Select) -> Mapping[str, bool]:
        return {name: kind == "STRING" for name, kind in self._jobs.schema(shape(select)).items()}

    def rows(self, statement: str) -> Iterator[Sequence[Sequence[str | None]]]:
        try:
            job = self._jobs.query(statement, name="read-source")
        except WarehouseError as error:
            cause = error.__cause__
            reasons = {getattr(cause, "reason", ""), *(item.get("reason") for item in getattr(cause, "errors", None) or [])}
            if self._show_values or not reasons & set(QUOTING):
                raise
            raise SourceError(
                f"{str(error).partition(' failed: ')[0]} failed on a row's value (its text may hold it; see it with --show-values)."
                "\nNothing was written."
            ) from None
        given = 0
        while rows := self._jobs.rows_from(job, given, ROWS):
            yield rows
            given += len(rows)

    def findings(self, select: Select) -> Iterator[Finding]:
        scanned = self._jobs.estimate(select.text)
        named = ", ".join(select.tables()) or "the tables of the SELECT"
        payer = self._jobs.settings.bigquery_project
        yield Finding(True, f"the whole SELECT would scan {scanned / 10**9:,.3f} GB, paid by {payer}; needed is no more than "
                            f"roles/bigquery.jobUser on the project and roles/bigquery.dataViewer on {named}")
