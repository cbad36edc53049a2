"""The production warehouse: one BigQuery dataset, written by no job that could leave half a partition.

    base_customers, retention_snapshot, ... alert_logic     partitioned by reference date, clustered by their key
    orders__<version>, refunds__<version>, customers__<version>   ingested versions, loaded once, never changed
    customer_days__<version>                                derived from them once; orders, refunds, customers, customer_days are views
    cohort_retention_evolution, audience_current, ops_runs_log   replaced whole
    partition_log                                           what each partition was made from; only ever appended to
    staging_<table>_<token>                                 rows under check, those of customers partitioned like their table;
                                                            gone after the step, at the latest after a day

A rule's statement is computed into a staging table, checked there, and then one query job with WRITE_TRUNCATE replaces
`table$YYYYMMDD`. Reading back the staged day bills its own rows only, while checking first and computing again would bill the
whole input twice; a copy job would be free, but takes rows of any date, where the query job refuses those of another one.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd
import pyarrow as pa
from google.api_core import exceptions
from google.cloud import bigquery

from retention_ops.errors import QualityError, SettingsError, WarehouseError
from retention_ops.settings import Settings
from retention_ops.warehouse.bigquery_jobs import LABELS, Client, Jobs
from retention_ops.warehouse.catalog import DUCKDB_TYPES, RELATIONS, TABLES, Column, Table
from retention_ops.warehouse.connection import Connect
from retention_ops.warehouse.dialect import literal as duckdb_literal
from retention_ops.warehouse.dialect import parquet_scan
from retention_ops.warehouse.seam import PER_CUSTOMER, Connection, Part, Warehouse
from retention_ops.warehouse.versions import Version

ARROW_TYPES: dict[str, pa.DataType] = {
    "STRING": pa.string(), "DATE": pa.date32(), "INT64": pa.int64(), "FLOAT64": pa.float64(), "BOOL": pa.bool_(),
    "TIMESTAMP": pa.timestamp("us", tz="UTC"),
}
VIEWS = ("orders", "refunds", "customers", "customer_days")
"""tables kept per version; suppressions never leave this machine, as no rule reads them"""
STAGING_HOURS = 24
MOST_PARTITIONS = 4_000
"""partitions that BigQuery lets one job write"""

PARTITION_LOG = Table(
    "partition_log", "What each partition was made from and what that cost; the newest row of a partition counts.", "whole",
    ("table_name", "part"), (
        Column("table_name", "STRING", "Table"),
        Column("part", "STRING", "Reference date, or empty for a whole table"),
        Column("state", "STRING", "stored; replacing: rows are whole but may be of another make; removed"),
        Column("made_from", "STRING", "Versions and rules, as JSON"),
        Column("row_count", "INT64", "Rows stored"),
        Column("job_id", "STRING", "The job that replaced it"),
        Column("bytes_billed", "INT64", "Bytes that job billed"),
        Column("recorded_at", "TIMESTAMP", "When this row was written"),
    ))
_NEWEST = """SELECT part, state, made_from, recorded_at FROM (
  SELECT *, ROW_NUMBER() OVER (PARTITION BY part ORDER BY recorded_at DESC) AS age FROM {log} WHERE table_name = @table_name
) WHERE age = 1 AND state <> 'removed'"""


class BigQuery(Warehouse):
    """Tables in one dataset. `client` supplies clients (Dagster passes its BigQueryResource's `get_client`)."""

    engine = "bigquery"

    def __init__(
        self, settings: Settings, connect: Connect | None = None, client: Client | None = None, *, writes: bool = True,
        jobs: Jobs | None = None,
    ):
        super().__init__(settings, connect)
        self.jobs = jobs or Jobs(settings, client)
        self.writes = writes
        self.dataset = bigquery.DatasetReference(settings.bigquery_project, settings.bigquery_dataset)
        self._ready = False
        self._log_of: dict[str, dict[str, dict[str, Any]]] = {}

    # -- where things are ------------------------------------------------------------------------------------------

    def path(self, table: str, part: Part = None) -> str:
        """project.dataset.table, with $YYYYMMDD for a day and __<version> for a version."""
        return f"{self.settings.bigquery_project}.{self.settings.bigquery_dataset}.{_physical(table, part)}"

    def sql(self, table: str, part: Part = None) -> str:
        """The same as a statement names it; a day is chosen by a WHERE."""
        return f"`{self.path(table, None if isinstance(part, date) else part)}`"

    def reference(self, table: str, part: Part = None) -> bigquery.TableReference:
        return self.dataset.table(_physical(table, part))

    def days(self, table: str) -> list[date]:
        return sorted(date.fromisoformat(part) for part in self._log(table) if part)

    def exists(self, table: str, part: Part = None) -> bool:
        if TABLES[table].stored == "version":
            return _physical(table, part) in self._tables()
        return _key(part) in self._log(table)

    def computed_at(self, table: str, day: date) -> datetime:
        return self._log(table)[_key(day)]["recorded_at"]

    def provenance(self, table: str, part: Part = None) -> dict[str, str]:
        return self._log(table).get(_key(part), {}).get("made_from", {})

    def provenances(self, tables: Sequence[str], first: date = date.min, last: date = date.max) -> list[tuple[date, dict[str, str]]]:
        return [
            (day, row["made_from"]) for table in tables for part, row in sorted(self._log(table).items())
            if part and first <= (day := date.fromisoformat(part)) <= last
        ]

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(
        self, table: str, part: Part = None, order_by: str | None = None, columns: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """The rows of one partition, by `order_by` or else the key; the WHERE prunes to that partition."""
        declared = TABLES[table] if columns is None else TABLES[table].only(columns)
        if declared.stored == "version" and not self.exists(table, part):
            return self.frame(declared, [])
        values: dict[str, Any] = {"day": part} if isinstance(part, date) else {}
        where = f"{declared.date_column} = @day" if values else "TRUE"
        return self._select(declared, self.sql(table, part), where, values, order_by or ", ".join(declared.key))

    def read_range(self, table: str, first: date, last: date) -> pd.DataFrame:
        declared = TABLES[table]
        order = ", ".join(dict.fromkeys([declared.date_column, *declared.key]))
        where = f"{declared.date_column} BETWEEN @first AND @last"
        return self._select(declared, self.sql(table), where, {"first": first, "last": last}, order)

    def _select(self, declared: Table, source: str, where: str, values: Mapping[str, Any], order: str) -> pd.DataFrame:
        self.make_ready()
        job = self.jobs.query(
            f"SELECT {', '.join(declared.column_names)} FROM {source} WHERE {where} ORDER BY {order}", values, name=f"read-{declared.name}")
        return self.frame(declared, self.jobs.rows(job))

    def frame(self, declared: Table, rows: list[tuple]) -> pd.DataFrame:
        """Rows with the column types the lake gives, so that nothing after this depends on the engine."""
        arrow = pa.table({
            column.name: pa.array([row[place] for row in rows], ARROW_TYPES[column.type]) for place, column in enumerate(declared.columns)
        })
        with self.connection() as connection:
            connection.register("fetched", arrow)
            return connection.sql("SELECT * FROM fetched").df()

    # -- writing ---------------------------------------------------------------------------------------------------

    def write(
        self, connection: Connection, table: str, part: Part, provenance: Mapping[str, str],
        *, order_by: str | None = None, where: str = "true",
    ) -> int:
        """Replaces a partition, or a whole table, in one job that either commits or changes nothing.

        From a Session the rows are those staged in BigQuery; from a local DuckDB connection they are loaded. Order is kept by
        clustering, not by `order_by`.
        """
        self.make_ready()
        if not self.writes:
            return connection.execute(f"SELECT COUNT(*) FROM {table} WHERE {where}").fetchall()[0][0]
        self._doubt(table, part, provenance)
        if isinstance(connection, Session):
            rows = self._replace(connection, table, part, where)
        else:
            rows = self._load_table(connection, table, where, order_by)
        self._record(table, part, "stored", provenance, rows)
        return rows

    def _replace(self, session: Session, table: str, part: Part, where: str) -> int:
        declared = TABLES[table]
        whole = part is None
        into = bigquery.QueryJobConfig(
            destination=self.reference(table, part), create_disposition="CREATE_NEVER",
            # of a partition only the rows are replaced; of a whole table the plain form would drop the columns' descriptions
            write_disposition="WRITE_TRUNCATE_DATA" if whole else "WRITE_TRUNCATE",
            time_partitioning=partitioning(declared), clustering_fields=clustering(declared),
        )
        statement = session.statement(f"SELECT {', '.join(declared.column_names)} FROM {table} WHERE {where}")
        return self.jobs.row_count(self.jobs.query(statement, name=_job_name("replace", table, part), into=into))

    def _load_table(self, connection: Connection, table: str, where: str, order_by: str | None) -> int:
        declared = TABLES[table]
        columns = ", ".join(f"CAST({c.name} AS {DUCKDB_TYPES[c.type]}) AS {c.name}" for c in declared.columns)
        with tempfile.TemporaryDirectory(prefix="retention-ops-load-") as folder:
            file = Path(folder) / f"{table}.parquet"
            order = order_by or ", ".join(declared.key)
            connection.execute(
                f"COPY (SELECT {columns} FROM {table} WHERE {where} ORDER BY {order}) TO {duckdb_literal(file)} (FORMAT parquet)")
            expected = connection.execute(f"SELECT COUNT(*) FROM {parquet_scan(file)}").fetchall()[0][0]
            written = self.jobs.load(file, self.reference(table), load_config(declared), name=_job_name("load", table, None))
        if written != expected:
            raise QualityError(f"{table}: BigQuery took {written} of {expected} rows")
        return written

    def remove(self, table: str) -> None:
        """Empties a whole table's place: it is created anew, empty, when it is needed."""
        if not self.writes:
            return
        self.jobs.call(f"dropping {table}", lambda **how: self.jobs.client.delete_table(self.reference(table), not_found_ok=True, **how))
        self._record(table, None, "removed", {}, 0)
        self._ready = False

    def prune_snapshots(self, table: str, newest: date) -> list[date]:
        oldest_kept = newest - timedelta(days=self.settings.snapshot_keep_days - 1)
        if not TABLES[table].snapshot:
            return []
        stored = self._log_of[table] if table in self._log_of else self._log(table)
        dropped = sorted(day for day in (date.fromisoformat(part) for part in stored) if day < oldest_kept)
        for day in dropped:
            partition = self.reference(table, day)
            self.jobs.call(f"dropping {table} of {day}",
                           lambda partition=partition, **how: self.jobs.client.delete_table(partition, not_found_ok=True, **how))
            self._record(table, day, "removed", {}, 0)
        return dropped

    # -- one person ------------------------------------------------------------------------------------------------

    def rows_of(self, table: str, customer_ids: Sequence[str]) -> pd.DataFrame:
        declared = TABLES[table]
        reach = f"{declared.date_column} >= DATE '1970-01-01' AND " if declared.date_column else ""
        order = ", ".join(dict.fromkeys([declared.date_column or declared.key[0], *declared.key]))
        return self._select(declared, self.sql(table), f"{reach}{_one_of(customer_ids)}", {}, order)

    def parts_holding(self, customer_ids: Sequence[str]) -> list[tuple[str, Part, int]]:
        """Asked by digests: the text of a job stays readable in the project's history for half a year."""
        self.make_ready()
        found: list[tuple[str, Part, int]] = []
        for table in PER_CUSTOMER:
            part = table.date_column if table.stored == "day" else "NULL"
            reach = f"{part} >= DATE '1970-01-01' AND " if table.stored == "day" else ""
            rows = self.jobs.rows(self.jobs.query(
                f"SELECT {part} AS part, COUNT(*) AS customers FROM {self.sql(table.name)} WHERE {reach}{_one_of(customer_ids)} "
                "GROUP BY part", name=f"find-{table.name}"))
            found += [(table.name, day, count) for day, count in sorted(rows, key=str)]
        in_force = {_physical(name, version.version) for name, version in self._in_force().items() if version}
        for name in VIEWS:
            for physical in sorted(table for table in self._tables() if table.startswith(f"{name}__") and table not in in_force):
                (count,) = self.jobs.rows(self.jobs.query(
                    f"SELECT COUNT(*) AS customers FROM `{self.path(physical)}` WHERE {_one_of(customer_ids)}", name=f"find-{name}"))[0]
                found += [(name, physical.removeprefix(f"{name}__"), count)] if count else []
        return found

    def erase_part(self, table: str, part: Part, customer_ids: Sequence[str]) -> None:
        if TABLES[table].stored == "version":
            old = self.dataset.table(f"{table}__{part}")
            self.jobs.call(f"dropping {old.table_id}", lambda **how: self.jobs.client.delete_table(old, not_found_ok=True, **how))
            return
        made_from = self.provenance(table, part)
        session = Session(self)
        session.show_part(table, part)
        rows = self._replace(session, table, part, f"NOT {_one_of(customer_ids)}")
        erased = int(made_from.get("erased", 0)) + len(customer_ids)
        self._record(table, part, "stored", {**made_from, "erased": str(erased)}, rows)

    # -- what partitions were made from ----------------------------------------------------------------------------

    def _log(self, table: str) -> dict[str, dict[str, Any]]:
        """part -> its newest row in partition_log."""
        self.make_ready()
        statement = _NEWEST.format(log=self.sql("partition_log"))
        rows = self.jobs.rows(self.jobs.query(statement, {"table_name": table}, name=f"log-{table}"))
        self._log_of[table] = {
            part: {"made_from": json.loads(made_from) if state == "stored" else {}, "recorded_at": recorded_at}
            for part, state, made_from, recorded_at in rows
        }
        return self._log_of[table]

    def _doubt(self, table: str, part: Part, provenance: Mapping[str, str]) -> None:
        """Says before a replacement by another make that the old make no longer holds: a kill in between must not leave it standing."""
        known = self._log_of[table] if table in self._log_of else self._log(table)
        if known.get(_key(part), {}).get("made_from", provenance) != provenance:
            self._record(table, part, "replacing", {}, 0)

    def _record(self, table: str, part: Part, state: str, made_from: Mapping[str, str], rows: int) -> None:
        values = {
            "table_name": table, "part": _key(part), "state": state, "made_from": json.dumps(dict(made_from), sort_keys=True),
            "row_count": rows, "job_id": self.jobs.last_job, "bytes_billed": self.jobs.last_billed,
        }
        names = ", ".join(values)
        self.jobs.query(
            f"INSERT INTO {self.sql('partition_log')} ({names}, recorded_at) "
            f"VALUES ({', '.join('@' + name for name in values)}, CURRENT_TIMESTAMP())", values, name=f"record-{table}")
        if state == "removed":
            self._log_of.get(table, {}).pop(_key(part), None)
        elif table in self._log_of:
            self._log_of[table][_key(part)] = {"made_from": dict(made_from) if state == "stored" else {}}

    # -- tables ----------------------------------------------------------------------------------------------------

    def make_ready(self) -> None:
        """Creates the dataset and the tables that are missing. Raises SettingsError where the dataset is in another location."""
        if self._ready:
            return
        try:
            found = self.jobs.call("reading the dataset", lambda **how: self.jobs.client.get_dataset(self.dataset, **how))
        except exceptions.NotFound:
            found = self._create_dataset()
        if (found.location or "").lower() != self.settings.bigquery_location.lower():
            raise SettingsError(
                f"dataset {self.dataset.project}.{self.dataset.dataset_id} is in {found.location}, "
                f"RETENTION_OPS_BIGQUERY_LOCATION says {self.settings.bigquery_location}")
        there = self._tables()
        for declared in (PARTITION_LOG, *(table for table in TABLES.values() if table.stored != "version")):
            if declared.name not in there:
                self._create(self._table(declared))
            elif declared.stored == "day":
                self._widen(declared)
        self._ready = True

    def _create_dataset(self) -> bigquery.Dataset:
        wanted = bigquery.Dataset(self.dataset)
        wanted.location = self.settings.bigquery_location
        wanted.description = "RetentionOps: written by its jobs only"
        wanted.labels = LABELS
        return self.jobs.call("creating the dataset", lambda **how: self.jobs.client.create_dataset(wanted, exists_ok=True, **how))

    def _tables(self) -> set[str]:
        def names(retry: None, timeout: float) -> set[str]:
            return {item.table_id for item in self.jobs.client.list_tables(self.dataset, retry=retry, timeout=timeout)}

        try:
            return self.jobs.call("listing tables", names)
        except exceptions.NotFound:
            return set()

    def _table(self, declared: Table) -> bigquery.Table:
        table = bigquery.Table(self.reference(declared.name), schema=schema(declared))
        table.description, table.labels = declared.description, LABELS
        table.time_partitioning, table.clustering_fields = partitioning(declared), clustering(declared)
        # a read that forgets its day would scan, and bill, all of them
        table.require_partition_filter = declared.stored == "day" or None
        return table

    def _create(self, table: bigquery.Table) -> None:
        self.jobs.call(f"creating {table.table_id}", lambda **how: self.jobs.client.create_table(table, exists_ok=True, **how))

    def _widen(self, declared: Table) -> None:
        """Gives a table of an older version of this code the columns it lacks: at its end, where a new column has to be declared."""
        reference = self.reference(declared.name)
        table = self.jobs.call(f"looking at {declared.name}", lambda **how: self.jobs.client.get_table(reference, **how))
        there = {field.name for field in table.schema}
        added = [field for field in schema(declared) if field.name not in there]
        if added:
            table.schema = [*table.schema, *added]
            self.jobs.call(f"adding columns to {declared.name}", lambda **how: self.jobs.client.update_table(table, ["schema"], **how))

    # -- versions --------------------------------------------------------------------------------------------------

    def take_over(self, table: str, version: Version, file: Path | None = None) -> None:
        """Loads an ingested version (its `file`, where it has several) where it is not there yet. A load makes its table whole or not at
        all."""
        if self.exists(table, version.version):
            return
        self.make_ready()
        self.jobs.load(
            file or version.path, self.reference(table, version.version), load_config(TABLES[table]),
            name=_job_name("load", table, version.version))

    def derive(self, table: str, version: str, select: str) -> None:
        """Computes a table of an orders version once; another run doing the same at this moment changes nothing."""
        declared = TABLES[table]
        columns = ", ".join(f"{c.name} {c.type} OPTIONS(description={google_literal(c.description)})" for c in declared.columns)
        self.jobs.query(
            f"CREATE TABLE IF NOT EXISTS {self.sql(table, version)} ({columns})\nPARTITION BY DATE_TRUNC(order_date, MONTH)\n"
            f"CLUSTER BY {', '.join(clustering(declared))}\nOPTIONS(description={google_literal(declared.description)})\nAS\n{select}",
            name=_job_name("derive", table, version))

    def refresh_views(self) -> None:
        """Points orders, customers and customer_days at the versions in force and drops versions older than orders_keep_versions."""
        if not self.writes:
            return
        self.make_ready()
        there = self._tables()
        for name, version in self._in_force().items():
            if version and _physical(name, version.version) in there:
                self._point(name, version.version)
            elif version and name == "refunds" and name in there:  # those of an older version are taken back
                self.jobs.call("dropping view refunds", lambda **how: self.jobs.client.delete_table(
                    self.reference("refunds"), not_found_ok=True, **how))
        for name in VIEWS:
            versions = sorted(table for table in there if table.startswith(f"{name}__"))
            for old in versions[:-self.settings.orders_keep_versions]:
                self.jobs.call(f"dropping {old}", lambda old=old, **how: self.jobs.client.delete_table(
                    self.dataset.table(old), not_found_ok=True, **how))

    def _in_force(self) -> dict[str, Version | None]:
        orders = self.orders()
        return {"orders": orders, "refunds": orders, "customer_days": orders, "customers": self.customers()}

    def _point(self, name: str, version: str) -> None:
        declared = TABLES[name]
        view = bigquery.Table(self.reference(name))
        view.view_query = f"SELECT {', '.join(declared.column_names)} FROM {self.sql(name, version)}"
        view.description = declared.description
        found = self.jobs.table(self.path(name))
        if found is None:
            self._create(view)
        elif found.view_query != view.view_query:
            self.jobs.call(f"pointing view {name}", lambda **how: self.jobs.client.update_table(view, ["view_query"], **how))


class Session:
    """Runs SELECTs in which a rule's table stands for the rows at hand: staged ones, a stored day, or a version."""

    def __init__(self, warehouse: BigQuery):
        self.warehouse = warehouse
        self.token = uuid4().hex[:12]
        self._relations: dict[str, str] = {}
        self._staged: set[str] = set()

    def show(self, table: str, select: str) -> None:
        """From now on `table` means this SELECT, which names tables in full."""
        self._relations[table] = select

    def show_part(self, table: str, part: Part) -> None:
        """`table` means one stored partition or version."""
        declared = TABLES[table]
        where = f" WHERE {declared.date_column} = DATE '{part}'" if isinstance(part, date) else ""
        self.show(table, f"SELECT {', '.join(declared.column_names)} FROM {self.warehouse.sql(table, part)}{where}")

    def show_nothing(self, table: str) -> None:
        """`table` has no rows."""
        columns = ", ".join(f"CAST(NULL AS {column.type}) AS {column.name}" for column in RELATIONS[table].columns)
        self.show(table, f"SELECT {columns} FROM UNNEST([1]) WHERE FALSE")

    def statement(self, text: str) -> str:
        """`text` with what its tables mean in front of it; the text itself stays as it was written."""
        used = {name: select for name, select in self._relations.items() if re.search(rf"\b(FROM|JOIN)\s+{name}\b", text)}
        if not used:
            return text
        meanings = ",\n".join(f"{name} AS (\n  {select}\n)" for name, select in used.items())
        # parentheses keep a rule's own WITH apart; a plain SELECT keeps its ORDER BY outermost without them
        return f"WITH {meanings}\n{text}" if text.startswith("SELECT") else f"WITH {meanings}\n(\n{text}\n)"

    def execute(self, statement: str) -> Fetched:
        jobs = self.warehouse.jobs
        return Fetched(jobs.rows(jobs.query(self.statement(statement.strip()), name="ask")))

    def stage(self, table: str, rule: str, values: Mapping[str, Any]) -> None:
        """Computes a rule into a staging table, which `table` means from now on."""
        declared = RELATIONS[table]
        name = f"staging_{table}_{self.token}"
        target = f"`{self.warehouse.path(name)}`"
        self._staged.add(name)
        # each day of a range is then read back alone; a table of one row per day is too small to be worth it
        by_day = f"PARTITION BY {declared.date_column}\n" if declared.date_column and "customer_id" in declared.key else ""
        self.warehouse.jobs.query(
            f"CREATE OR REPLACE TABLE {target}\n{by_day}"
            f"OPTIONS(expiration_timestamp=TIMESTAMP_ADD(CURRENT_TIMESTAMP(), INTERVAL {STAGING_HOURS} HOUR))\nAS\n{self.statement(rule)}",
            values, name=_job_name("stage", table, None))
        self.show(table, f"SELECT {', '.join(declared.column_names)} FROM {target}")

    def close(self) -> None:
        """Drops the staging tables; those that cannot be dropped now expire by themselves."""
        for name in sorted(self._staged):
            with suppress(WarehouseError):
                self.warehouse.jobs.call(f"dropping {name}", lambda name=name, **how: self.warehouse.jobs.client.delete_table(
                    self.warehouse.dataset.table(name), not_found_ok=True, **how))


class Fetched:
    """The rows of a statement."""

    def __init__(self, rows: list[tuple]):
        self._rows = rows

    def fetchall(self) -> list[tuple]:
        return self._rows


# -- declarations as BigQuery has them ----------------------------------------------------------------------------------


def schema(declared: Table) -> list[bigquery.SchemaField]:
    """Columns with their descriptions. None is REQUIRED: a query's result never is, and would not fit; no_nulls checks instead."""
    return [bigquery.SchemaField(column.name, column.type, description=column.description) for column in declared.columns]


def partitioning(declared: Table) -> bigquery.TimePartitioning | None:
    """By reference date; versions by the month of the order, since ten years of days come near the limit of 4,000 per job."""
    if declared.date_column:
        return bigquery.TimePartitioning(type_="DAY", field=declared.date_column)
    if declared.stored == "version" and "order_date" in declared.column_names:
        return bigquery.TimePartitioning(type_="MONTH", field="order_date")
    return None


def clustering(declared: Table) -> list[str] | None:
    """The key without the partitioning date; versions by customer."""
    if declared.stored == "version":
        return ["customer_id"]
    return [name for name in declared.key if name != declared.date_column][:4] or None


def load_config(declared: Table) -> bigquery.LoadJobConfig:
    """Replaces the whole table by a Parquet file."""
    return bigquery.LoadJobConfig(
        source_format="PARQUET", write_disposition="WRITE_TRUNCATE", schema=schema(declared), time_partitioning=partitioning(declared),
        clustering_fields=clustering(declared), destination_table_description=declared.description,
    )


def google_literal(text: str) -> str:
    """A GoogleSQL string literal."""
    return json.dumps(text, ensure_ascii=False)


def _one_of(customer_ids: Sequence[str]) -> str:
    """A condition that names customers without saying their ids."""
    digests = ", ".join(f"'{hashlib.sha256(each.encode()).hexdigest()}'" for each in customer_ids)
    return f"(TO_HEX(SHA256(customer_id)) IN ({digests}))"


def _physical(table: str, part: Part) -> str:
    if isinstance(part, date):
        return f"{table}${part:%Y%m%d}"
    return f"{table}__{part.replace('-', '_')}" if part else table


def _key(part: Part) -> str:
    return part.isoformat() if isinstance(part, date) else part or ""


def _job_name(what: str, table: str, part: Part) -> str:
    return "-".join(filter(None, (what, table, _key(part).replace("-", ""))))
