"""Orders that live in a BigQuery table of somebody else's: read, never written, and taken in through the same door as a file.

The table (or view) has the columns of preset `orders`: order_id, customer_id, order_date, order_amount and, if there is one,
currency. Its rows pass this machine once, are checked as a file's are, and become a version like any other; what vanished
from the table stays known, as with files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from retention_ops.clock import Clock, system_clock
from retention_ops.errors import InputRefused, RetentionOpsError, UsageError
from retention_ops.sources.ingest import IngestReport, ingest
from retention_ops.warehouse.files import scratch_folder, write_atomic
from retention_ops.warehouse.seam import Warehouse

PREFIX = "bigquery:"
NEEDED = ("order_id", "customer_id", "order_date", "order_amount")


@contextmanager
def as_files(given: Sequence[Path], lake: Warehouse):
    """The files to ingest: those given, and for each bigquery:project.dataset.table a Parquet file of its rows."""
    with ExitStack() as stack:
        files = []
        for path in given:
            if str(path).startswith(PREFIX):
                folder = stack.enter_context(scratch_folder(lake.settings.home / "tmp", "source-"))
                files.append(fetch(lake, str(path).removeprefix(PREFIX), folder))
            else:
                files.append(path)
        yield files


def fetch(lake: Warehouse, table: str, folder: Path) -> Path:
    """Writes the rows of a table to a Parquet file in `folder`, every value as text, so that amounts stay exact."""
    jobs = _jobs(lake)
    found = _described(lake, table)
    columns = {field.name for field in found.schema}
    missing = [name for name in NEEDED if name not in columns]
    if missing:
        raise InputRefused(f"{table} has no column {', '.join(missing)}; make a view that names {', '.join(NEEDED)}")
    names = [*NEEDED, *(["currency"] if "currency" in columns else [])]
    job = jobs.query(f"SELECT {', '.join(f'CAST({name} AS STRING) AS {name}' for name in names)} FROM `{table}`", name="read-source")
    file = folder / f"{table}.parquet"
    schema = pa.schema([(name, pa.string()) for name in names])

    def read(retry: None, timeout: float) -> None:
        with pq.ParquetWriter(file, schema) as writer:  # page by page: memory does not grow with the table
            for page in job.result(retry=retry, timeout=timeout, job_retry=None).pages:
                rows = [row.values() for row in page]
                writer.write_table(pa.table({name: [row[place] for row in rows] for place, name in enumerate(names)}, schema=schema))

    jobs.call(f"reading {table}", read)
    return file


def take_in_source(lake: Warehouse, clock: Clock = system_clock) -> IngestReport | None:
    """Ingests the table that the setting bigquery_source names, if it changed since; corrections replace what was known."""
    settings = lake.settings
    if not settings.bigquery_source:
        return None
    marker = settings.home / "lake" / ".source.json"
    found = _described(lake, settings.bigquery_source)
    # a view's own time says nothing of the rows behind it
    now = {"table": settings.bigquery_source, "modified": str(found.modified) if found.table_type == "TABLE" else ""}
    if now["modified"] and _last(marker) == now:
        return None
    with as_files([Path(PREFIX + settings.bigquery_source)], lake) as files:
        report = ingest(files, "orders", settings, replace=True, clock=clock)
    write_atomic(marker, json.dumps(now))
    return report


def _described(lake: Warehouse, table: str):
    if table.count(".") != 2:
        raise UsageError(f"{PREFIX}{table} is not bigquery:project.dataset.table")
    found = _jobs(lake).table(table)
    if found is None:
        raise RetentionOpsError(f"BigQuery has no table {table}, or this account may not read it")
    return found


def _jobs(lake: Warehouse):
    if lake.engine != "bigquery":
        raise UsageError("a table in BigQuery is read with RETENTION_OPS_WAREHOUSE=bigquery")
    return lake.jobs


def _last(marker: Path) -> object:
    try:
        return json.loads(marker.read_text())
    except (OSError, ValueError):
        return None
