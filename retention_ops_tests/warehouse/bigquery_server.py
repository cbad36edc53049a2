"""A loopback BigQuery for the real client: REST v2 as far as the warehouse uses it, stricter than the original where it can be.

Every statement is analyzed by GoogleSQL before DuckDB executes its rendering. Refused are: unknown or unused parameters,
writes outside the writable dataset, rows of another date in a partition, a schema that does not fit, a job id used twice,
a read of a partitioned table without its filter, bytes beyond maximumBytesBilled. Jobs commit whole or not at all.

Faults: those of LoopbackServer on any request; `fail_job(reason, match, times)` ends jobs with an error; `polls` keeps every
job RUNNING for so many looks.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import sqlglot
from sqlglot import exp
from sqlglot.optimizer.merge_subqueries import merge_subqueries
from sqlglot.optimizer.pushdown_predicates import pushdown_predicates
from sqlglot.optimizer.qualify import qualify

from retention_ops.warehouse.bigquery import ARROW_TYPES
from retention_ops.warehouse.catalog import DUCKDB_TYPES
from retention_ops_tests.execute.servers.loopback import LoopbackServer, Reply, Request
from retention_ops_tests.warehouse.google_sql import engine

GOOGLE_TYPES = {name: google for google, name in DUCKDB_TYPES.items()}
LEGACY = {"INTEGER": "INT64", "FLOAT": "FLOAT64", "BOOLEAN": "BOOL"}
LEAST_BILLED = 10 * 1024 * 1024
PAGE = 500
PREFIX = "/bigquery/v2/projects/"


class Refused(Exception):
    """An error as BigQuery gives it: HTTP status, reason and message."""

    def __init__(self, status: int, reason: str, message: str):
        super().__init__(message)
        self.status, self.reason = status, reason

    def body(self) -> dict[str, Any]:
        entry = {"reason": self.reason, "message": str(self)}
        return {"error": {"code": self.status, "message": str(self), "errors": [entry], "status": self.reason}}


@dataclass
class Scan:
    """How much of a table one statement read."""

    table: str
    rows: int
    partitions: int | None
    """of a partitioned table"""
    filtered: bool


@dataclass
class Job:
    resource: dict[str, Any]
    columns: list[tuple[str, str]] = field(default_factory=list)
    rows: list[tuple] = field(default_factory=list)
    polls: int = 0
    scans: list[Scan] = field(default_factory=list)


@dataclass
class JobFault:
    reason: str
    match: str
    times: int


class BigQueryServer(LoopbackServer):
    """`project` holds the writable `dataset`, created by the client, and any read-only one a test adds by `add_table`."""

    def __init__(self, project: str = "shop-project", dataset: str = "retention", location: str = "EU"):
        super().__init__()
        self.project, self.dataset, self.location = project, dataset, location
        self.datasets: dict[str, dict[str, Any]] = {}
        self.tables: dict[tuple[str, str], dict[str, Any]] = {}
        self.jobs: dict[str, Job] = {}
        self.job_faults: list[JobFault] = []
        self.polls = 0
        self._faults_for, self._skip = "", 0
        self._lost_every, self._lost_match, self._counted = 0, "", 0
        self.uploads: dict[str, dict[str, Any]] = {}
        self._duck = duckdb.connect(":memory:", config={"threads": 1})
        self._duck.execute("SET TimeZone = 'UTC'")

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._duck.close()

    def fail_job(self, reason: str, match: str = ".*", times: int = 1) -> None:
        """The next `times` jobs whose id matches end with this error and change nothing."""
        self.job_faults.append(JobFault(reason, match, times))

    def only_faults_for(self, match: str, skip: int = 0) -> None:
        """Ordered faults hit only requests whose body matches, after the first `skip` of these."""
        self._faults_for, self._skip = match, skip

    def lost_every(self, count: int, match: str) -> None:
        """Of the requests that match, every `count`-th is carried out and its reply is lost; its repetition is answered."""
        self._lost_every, self._lost_match = count, match

    def may_fail(self, request: Request) -> bool:
        if self._lost_every and re.search(self._lost_match, f"{request.method} {request.path}"):
            self._counted += 1
            if self._counted % self._lost_every == 0:
                self.fail("lost_after", self._lost_match)
        if not re.search(self._faults_for, request.body.decode(errors="replace")):
            return False
        self._skip -= 1
        return self._skip < 0

    def fault_body(self, status: int) -> Any:
        return Refused(status, {429: "rateLimitExceeded", 500: "backendError", 503: "backendError"}[status], "try again").body()

    # -- what a test looks at ---------------------------------------------------------------------------------------

    def rows(self, table: str, order: str = "ALL") -> list[tuple]:
        """All rows of a table, bypassing REST."""
        with self.lock:
            return self._duck.execute(f'SELECT * FROM "{self.dataset}"."{table}" ORDER BY {order}').fetchall()

    def done(self, match: str) -> list[Job]:
        """Jobs that ended without an error and whose id matches, in order."""
        return [job for job in self.jobs.values()
                if re.search(match, job.resource["jobReference"]["jobId"]) and "errorResult" not in job.resource["status"]]

    def add_table(self, dataset: str, name: str, columns: dict[str, str], rows: list[tuple]) -> None:
        """A table somebody else owns."""
        self.datasets.setdefault(dataset, {"location": self.location})
        fields = [{"name": column, "type": kind} for column, kind in columns.items()]
        self._make(dataset, name, {"schema": {"fields": fields}})
        self._fill((dataset, name), rows)

    # -- routes -----------------------------------------------------------------------------------------------------

    def handle(self, request: Request) -> Reply:
        try:
            return Reply(200, *self._route(request))
        except Refused as error:
            return Reply(error.status, error.body())

    def _route(self, request: Request) -> tuple[Any, dict[str, str]]:
        if request.path == "/token":
            return {"access_token": "loopback", "expires_in": 3600, "token_type": "Bearer"}, {}
        if request.path.startswith(("/upload/bigquery/v2/", "/resumable/upload/bigquery/v2/")):
            return self._upload(request)
        parts = request.path.removeprefix(PREFIX).split("/")
        if parts[0] != self.project:
            raise Refused(404, "notFound", f"Not found: Project {parts[0]}")
        match (request.method, *parts[1:]):
            case ("POST", "jobs"):
                return self._insert_job(request.json()), {}
            case ("GET", "jobs"):
                return self._list_jobs(request), {}
            case ("GET", "jobs", job_id):
                return self._seen(self._job(job_id)).resource, {}
            case ("GET", "queries", job_id):
                return self._results(self._job(job_id), request), {}
            case ("POST", "datasets"):
                return self._create_dataset(request.json()), {}
            case ("GET", "datasets", name):
                return self._dataset(name), {}
            case ("GET", "datasets", name, "tables"):
                self._dataset(name)
                found = [{"tableReference": self._table_reference(*key), "type": "TABLE"} for key in self.tables if key[0] == name]
                return {"tables": found, "totalItems": len(found)}, {}
            case ("POST", "datasets", name, "tables"):
                body = request.json()
                return self._create_table(name, body["tableReference"]["tableId"], body), {}
            case ("GET", "datasets", name, "tables", table):
                return self._table(name, table), {}
            case ("PATCH" | "PUT", "datasets", name, "tables", table):
                return self._patch_table(name, table, request.json()), {}
            case ("DELETE", "datasets", name, "tables", table):
                return self._delete_table(name, table), {}
        raise Refused(404, "notFound", f"this fake has no {request.method} {request.path}")

    def _create_dataset(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body["datasetReference"]["datasetId"]
        if name in self.datasets:
            raise Refused(409, "duplicate", f"Already Exists: Dataset {name}")
        self._writable(name)
        self.datasets[name] = body | {"id": f"{self.project}:{name}"}
        self._duck.execute(f'CREATE SCHEMA "{name}"')
        return self.datasets[name]

    def _dataset(self, name: str) -> dict[str, Any]:
        if name not in self.datasets:
            raise Refused(404, "notFound", f"Not found: Dataset {self.project}:{name}")
        return self.datasets[name]

    def _writable(self, dataset: str) -> None:
        if dataset != self.dataset:
            raise Refused(403, "accessDenied", f"Access Denied: Dataset {self.project}:{dataset}: permission to write denied")

    # -- tables -----------------------------------------------------------------------------------------------------

    def _table_reference(self, dataset: str, table: str) -> dict[str, str]:
        return {"projectId": self.project, "datasetId": dataset, "tableId": table}

    def _table(self, dataset: str, table: str) -> dict[str, Any]:
        found = self.tables.get((dataset, table.partition("$")[0]))
        if found is None:
            raise Refused(404, "notFound", f"Not found: Table {self.project}:{dataset}.{table}")
        return found

    def columns(self, dataset: str, table: str) -> dict[str, str]:
        """column -> type of a table or view."""
        resource = self._table(dataset, table)
        return {item["name"]: LEGACY.get(item["type"], item["type"]) for item in resource["schema"]["fields"]}

    def _create_table(self, dataset: str, table: str, body: dict[str, Any]) -> dict[str, Any]:
        self._dataset(dataset)
        self._writable(dataset)
        if (dataset, table) in self.tables:
            raise Refused(409, "duplicate", f"Already Exists: Table {self.project}:{dataset}.{table}")
        return self._make(dataset, table, body)

    def _make(self, dataset: str, table: str, body: dict[str, Any]) -> dict[str, Any]:
        self._duck.execute(f'CREATE SCHEMA IF NOT EXISTS "{dataset}"')
        if "view" in body:
            tree = self._tree(body["view"]["query"])
            columns = self._analyzed(body["view"]["query"], tree, {}).columns
            body = body | {"schema": {"fields": [{"name": name, "type": kind} for name, kind in columns]}}
            self._duck.execute(f'CREATE OR REPLACE VIEW "{dataset}"."{table}" AS {self._rendered(tree)}')
        else:
            declared = ", ".join(
                f'"{item["name"]}" {DUCKDB_TYPES[LEGACY.get(item["type"], item["type"])]}' for item in body["schema"]["fields"])
            self._duck.execute(f'CREATE TABLE "{dataset}"."{table}" ({declared})')
        resource = body | {"tableReference": self._table_reference(dataset, table), "id": f"{self.project}:{dataset}.{table}", "etag": "1",
                           "type": "VIEW" if "view" in body else "TABLE", "lastModifiedTime": "1700000000000"}
        self.tables[dataset, table] = resource
        return resource

    def _patch_table(self, dataset: str, table: str, body: dict[str, Any]) -> dict[str, Any]:
        self._writable(dataset)
        if "view" in body:
            return self._make(dataset, table, self._table(dataset, table) | body)
        if "schema" in body:
            self._change_schema(dataset, table, body["schema"]["fields"])
        return self._table(dataset, table) | body

    def _change_schema(self, dataset: str, table: str, fields: list[dict[str, Any]]) -> None:
        """Columns may be added, nullable only, and REQUIRED may be relaxed; nothing else."""
        before = {item["name"]: item for item in self._table(dataset, table)["schema"]["fields"]}
        after = {item["name"]: item for item in fields}

        def refuse(why: str) -> None:
            raise Refused(400, "invalid", f"Provided Schema does not match Table {self.project}:{dataset}.{table}. {why}")

        if gone := before.keys() - after.keys():
            refuse(f"Field {min(gone)} is missing in new schema")
        for name, item in after.items():
            mode, old = item.get("mode", "NULLABLE"), before.get(name)
            if old is None and mode == "REQUIRED":
                refuse(f"Cannot add required fields to an existing schema. (field: {name})")
            if old is not None and LEGACY.get(item["type"], item["type"]) != LEGACY.get(old["type"], old["type"]):
                refuse(f"Field {name} has changed type from {old['type']} to {item['type']}")
            if old is not None and mode == "REQUIRED" and old.get("mode", "NULLABLE") != "REQUIRED":
                refuse(f"Field {name} has changed mode from NULLABLE to REQUIRED")
            if old is None:
                kind = DUCKDB_TYPES[LEGACY.get(item["type"], item["type"])]
                self._duck.execute(f'ALTER TABLE "{dataset}"."{table}" ADD COLUMN "{name}" {kind}')
        self._table(dataset, table)["schema"] = {"fields": fields}

    def _delete_table(self, dataset: str, table: str) -> dict[str, Any]:
        self._writable(dataset)
        resource = self._table(dataset, table)
        name, _, day = table.partition("$")
        if day:
            self._duck.execute(f'DELETE FROM "{dataset}"."{name}" WHERE "{_partition_field(resource)}" = ?', [_day(day)])
        else:
            self._duck.execute(f'DROP {"VIEW" if "view" in resource else "TABLE"} "{dataset}"."{name}"')
            del self.tables[dataset, name]
        return {}

    # -- jobs -------------------------------------------------------------------------------------------------------

    def _job(self, job_id: str) -> Job:
        if job_id not in self.jobs:
            raise Refused(404, "notFound", f"Not found: Job {self.project}:{self.location}.{job_id}")
        return self.jobs[job_id]

    def _seen(self, job: Job) -> Job:
        """One look at a job: it is RUNNING until it was looked at `polls` times."""
        job.polls -= 1
        job.resource["status"]["state"] = "RUNNING" if job.polls >= 0 else "DONE"
        return job

    def _list_jobs(self, request: Request) -> dict[str, Any]:
        since = int(request.query.get("minCreationTime", ["0"])[0])
        jobs = [job.resource for job in self.jobs.values() if int(job.resource["statistics"]["creationTime"]) >= since]
        start = int(request.query.get("pageToken", ["0"])[0])
        more = {"nextPageToken": str(start + 50)} if start + 50 < len(jobs) else {}
        return {"jobs": jobs[start:start + 50], **more}

    def _insert_job(self, body: dict[str, Any], data: bytes | None = None) -> dict[str, Any]:
        configuration = body["configuration"]
        if configuration.get("dryRun"):
            return self._dry_run(body)
        job_id = body["jobReference"]["jobId"]
        if body["jobReference"].get("location") != self.location:
            raise Refused(404, "notFound", f"Not found: Dataset was not found in location {body['jobReference'].get('location')}")
        if job_id in self.jobs:
            raise Refused(409, "duplicate", f"Already Exists: Job {self.project}:{self.location}.{job_id}")
        now = str(int(datetime.now(UTC).timestamp() * 1000))
        job = Job({
            "kind": "bigquery#job", "id": f"{self.project}:{self.location}.{job_id}", "jobReference": body["jobReference"],
            "configuration": configuration, "status": {"state": "DONE"},
            "statistics": {"creationTime": now, "startTime": now, "endTime": now},
        }, polls=self.polls)
        fault = next((f for f in self.job_faults if f.times > 0 and re.search(f.match, job_id)), None)
        try:
            if fault:
                fault.times -= 1
                raise Refused(503, fault.reason, "the job was given up")
            self._duck.execute("BEGIN")
            if "query" in configuration:
                self._run_query(job, configuration)
            else:
                self._run_load(job, configuration["load"], data)
            self._duck.execute("COMMIT")
        except Exception as error:
            if not fault:
                self._duck.execute("ROLLBACK")
            refused = error if isinstance(error, Refused) else Refused(400, "invalidQuery", f"{type(error).__name__}: {error}")
            if refused.reason in ("invalidQuery", "accessDenied", "notFound"):  # found before the job exists
                raise refused from error
            job.resource["status"] |= {"errorResult": refused.body()["error"]["errors"][0], "errors": refused.body()["error"]["errors"]}
        self.jobs[job_id] = job
        job.resource["status"]["state"] = "RUNNING" if job.polls > 0 else "DONE"
        return job.resource

    def _dry_run(self, body: dict[str, Any]) -> dict[str, Any]:
        query = body["configuration"]["query"]
        values, kinds = _parameters(query)
        tree = self._tree(query["query"])
        columns = self._analyzed(query["query"], tree, kinds).columns
        fields = [{"name": name, "type": kind, "mode": "NULLABLE"} for name, kind in columns or []]
        scanned = _bytes(self._scans(tree, values))
        return {
            "kind": "bigquery#job", "jobReference": body["jobReference"], "configuration": body["configuration"],
            "status": {"state": "DONE"},
            "statistics": {"totalBytesProcessed": str(scanned), "query": {
                "totalBytesProcessed": str(scanned), "schema": {"fields": fields}}},
        }

    def _run_query(self, job: Job, configuration: dict[str, Any]) -> None:
        query = configuration["query"]
        values, kinds = _parameters(query)
        tree = self._tree(query["query"])
        used = {node.this.name for node in tree.find_all(exp.Parameter)}
        if set(values) - used:
            raise Refused(400, "invalidQuery", f"parameters nobody asked for: {sorted(set(values) - used)}")
        statement = self._analyzed(query["query"], tree, kinds)
        job.scans = self._scans(tree, values)
        processed = _bytes(job.scans)
        billed = max(processed, LEAST_BILLED) if processed else 0
        if billed > int(query.get("maximumBytesBilled", billed)):
            raise Refused(400, "bytesBilledLimitExceeded",
                          f"Query exceeded limit for bytes billed: {query['maximumBytesBilled']}. {billed} or higher required.")
        if isinstance(tree, exp.Create):
            job.columns = self._create_as(tree, statement.columns, values)
        elif isinstance(tree, exp.Insert):
            self._writable(tree.find(exp.Table).db)
            self._duck.execute(self._rendered(tree), values)
        else:
            job.columns = statement.columns
            job.rows = self._select(tree, statement.columns, values)
            if "destinationTable" in query:
                self._replace(query, job)
        job.resource["statistics"] |= {"totalBytesProcessed": str(processed), "query": {
            "totalBytesProcessed": str(processed), "totalBytesBilled": str(billed), "statementType": statement.kind}}

    def _select(self, tree: exp.Expression, columns: list[tuple[str, str]], values: dict[str, Any]) -> list[tuple]:
        select = self._rendered(tree)
        cells = ", ".join(f'CAST("{name}" AS {DUCKDB_TYPES[kind]})' if _is_name(name) else f"#{place}"
                          for place, (name, kind) in enumerate(columns, start=1))
        if not all(_is_name(name) for name, _ in columns):
            return self._duck.execute(select, values).fetchall()
        return self._duck.execute(f"SELECT {cells} FROM ({select})", values).fetchall()

    def _create_as(self, tree: exp.Create, columns: list[tuple[str, str]], values: dict[str, Any]) -> list[tuple[str, str]]:
        target = tree.find(exp.Table)
        self._writable(target.db)
        key = (target.db, target.name)
        if key in self.tables and tree.args.get("exists"):
            return []
        if key in self.tables:
            self._delete_table(*key)
        body: dict[str, Any] = {"schema": {"fields": [{"name": name, "type": kind} for name, kind in columns]}}
        definitions = tree.this.expressions if isinstance(tree.this, exp.Schema) else []
        if definitions:
            body["schema"]["fields"] = [
                {"name": item.name, "type": item.args["kind"].sql("bigquery"), "description": _described(item.sql("bigquery"))}
                for item in definitions]
        header = tree.sql("bigquery").partition("SELECT")[0]
        parted = re.search(r"PARTITION BY (?:DATE_TRUNC\((\w+), MONTH\)|(\w+))", header)
        if parted:
            body["timePartitioning"] = {"type": "MONTH" if parted[1] else "DAY", "field": parted[1] or parted[2]}
        clustered = re.search(r"CLUSTER BY (\w+(?:, \w+)*)", header)
        if clustered:
            body["clustering"] = {"fields": [name.strip() for name in clustered[1].split(",")]}
        if "expiration_timestamp" in header:
            body["expirationTime"] = "set"
        body["description"] = _described(header.rpartition("CLUSTER BY")[2])
        self._make(*key, body)
        self._fill(key, self._select(tree.expression, columns, values))
        return []

    def _fill(self, key: tuple[str, str], rows: list[tuple]) -> None:
        columns = self.columns(*key)
        self._duck.register("filling", pa.table({
            name: pa.array([row[place] for row in rows], ARROW_TYPES[kind]) for place, (name, kind) in enumerate(columns.items())
        }))
        self._duck.execute(f'INSERT INTO "{key[0]}"."{key[1]}" SELECT * FROM filling')
        self._duck.unregister("filling")

    def _replace(self, query: dict[str, Any], job: Job) -> None:
        """A query's rows in place of a partition's or a table's."""
        target = query["destinationTable"]
        name, _, decorator = target["tableId"].partition("$")
        self._writable(target["datasetId"])
        resource = self._table(target["datasetId"], name)
        declared = self.columns(target["datasetId"], name)
        if list(declared.items()) != job.columns:
            raise Refused(400, "invalid", f"Provided Schema does not match Table {name}: {job.columns}")
        for setting in ("timePartitioning", "clustering"):
            if (query.get(setting) or None) != (resource.get(setting) or None):
                raise Refused(400, "invalid", f"Incompatible table partitioning specification: {setting} of {name}")
        disposition = query.get("writeDisposition")
        place = f'"{target["datasetId"]}"."{name}"'
        if decorator:
            if disposition != "WRITE_TRUNCATE":
                raise Refused(400, "invalid", "a partition is replaced by WRITE_TRUNCATE")
            field_name, day = _partition_field(resource), _day(decorator)
            position = list(declared).index(field_name)
            if any(row[position] != day for row in job.rows):
                raise Refused(
                    400, "invalid", f"Some rows belong to different partitions rather than destination partition {decorator}")
            self._duck.execute(f'DELETE FROM {place} WHERE "{field_name}" = ?', [day])
        elif disposition == "WRITE_TRUNCATE_DATA" and not resource.get("timePartitioning"):
            self._duck.execute(f"DELETE FROM {place}")
        else:
            raise Refused(400, "invalid", f"{disposition} of the whole of {name} would lose partitions or descriptions")
        self._fill((target["datasetId"], name), job.rows)

    def _run_load(self, job: Job, load: dict[str, Any], data: bytes | None) -> None:
        target = load["destinationTable"]
        key = (target["datasetId"], target["tableId"])
        self._dataset(key[0])
        self._writable(key[0])
        if load["sourceFormat"] != "PARQUET" or load["writeDisposition"] != "WRITE_TRUNCATE":
            raise Refused(400, "invalid", "only whole Parquet files are loaded")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "part.parquet"
            file.write_bytes(data)
            found = [(row[0], GOOGLE_TYPES[row[1]]) for row in self._duck.execute(f"DESCRIBE FROM '{file}'").fetchall()]
            declared = [(item["name"], LEGACY.get(item["type"], item["type"])) for item in load["schema"]["fields"]]
            if found != declared:
                raise Refused(400, "invalid", f"the file has {found}, the schema says {declared}")
            properties = load.get("destinationTableProperties", {})
            body = {name: load[name] for name in ("schema", "timePartitioning", "clustering") if load.get(name)} | properties
            if key in self.tables:
                self._delete_table(*key)
            self._make(*key, body)
            self._duck.execute(f'INSERT INTO "{key[0]}"."{key[1]}" FROM \'{file}\'')
            count = self._duck.execute(f'SELECT COUNT(*) FROM "{key[0]}"."{key[1]}"').fetchall()[0][0]
        job.resource["statistics"]["load"] = {"outputRows": str(count), "inputFiles": "1"}

    def _upload(self, request: Request) -> tuple[Any, dict[str, str]]:
        kind = request.query["uploadType"][0]
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)"?', request.headers["content-type"])[1].encode()
            _, first, second, _ = request.body.split(b"--" + boundary)
            content = second.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
            return self._insert_job(json.loads(first.split(b"\r\n\r\n", 1)[1]), content), {}
        if request.method == "POST":
            token = f"upload{len(self.uploads)}"
            self.uploads[token] = request.json()
            return {}, {"Location": f"{self.url}{request.path}?uploadType=resumable&upload_id={token}"}
        return self._insert_job(self.uploads[request.query["upload_id"][0]], request.body), {}

    def _results(self, job: Job, request: Request) -> dict[str, Any]:
        status = job.resource["status"]
        if "errorResult" in status:
            raise Refused(400, status["errorResult"]["reason"], status["errorResult"]["message"])
        asked = int(request.query.get("maxResults", [str(PAGE)])[0])
        start = int(request.query.get("pageToken", request.query.get("startIndex", ["0"]))[0])
        micros = request.query.get("formatOptions.useInt64Timestamp", ["false"])[0].lower() == "true"
        page = job.rows[start:start + min(asked, PAGE)]
        more = {"pageToken": str(start + len(page))} if page and start + len(page) < len(job.rows) else {}
        return {
            "kind": "bigquery#getQueryResultsResponse", "jobReference": job.resource["jobReference"], "jobComplete": True,
            "schema": {"fields": [{"name": name if _is_name(name) else f"f{place}_", "type": kind}
                                  for place, (name, kind) in enumerate(job.columns)]}, "totalRows": str(len(job.rows)),
            # asked for none, the real one leaves the key out, and the client relies on that
            **({"rows": [{"f": [{"v": _cell(value, micros)} for value in row]} for row in page]} if asked else {}), **more,
        }

    # -- statements -------------------------------------------------------------------------------------------------

    def _tree(self, text: str) -> exp.Expression:
        try:
            return sqlglot.parse_one(text, read="bigquery")
        except sqlglot.errors.ParseError as error:
            raise Refused(400, "invalidQuery", f"Syntax error: {error}") from error

    def _named(self, tree: exp.Expression) -> list[exp.Table]:
        """The tables a statement names in full."""
        return [table for table in tree.find_all(exp.Table) if table.db]

    def _analyzed(self, text: str, tree: exp.Expression, kinds: dict[str, str]):
        target = tree.find(exp.Table) if isinstance(tree, exp.Create) else None
        tables = {}
        for table in self._named(tree):
            if table is not target:
                tables[f"{table.catalog}.{table.db}.{table.name}"] = self.columns(table.db, table.name)
        try:
            # names of staging tables are drawn; without what was drawn the analysis of an earlier run is this one's
            return engine().analyze(_undrawn(text), {_undrawn(name): columns for name, columns in tables.items()}, kinds)
        except Exception as error:
            raise Refused(400, "invalidQuery", str(error)) from error

    def _rendered(self, tree: exp.Expression) -> str:
        """The statement as DuckDB runs it here."""
        copy = tree.copy()
        for table in self._named(copy):
            table.set("catalog", None)
            table.this.set("quoted", True)
        return copy.sql(dialect="duckdb")

    def _scans(self, tree: exp.Expression, values: dict[str, Any]) -> list[Scan]:
        """What each table named in full has to give: the partitions that its conditions leave.

        A condition on a WITH that is nothing but a table's columns counts as one on the table, as BigQuery documents it for
        views and subqueries; sqlglot moves it there. One that is read twice is computed twice, likewise documented.
        """
        query = tree.expression if isinstance(tree, (exp.Create, exp.Insert)) else tree
        if not isinstance(query, exp.Query):
            return []
        known: dict[str, Any] = {}
        for table in self._named(query):
            known.setdefault(table.catalog, {}).setdefault(table.db, {})[table.name] = self.columns(table.db, table.name)
        if known:
            query = _pushed_down(query.sql(dialect="bigquery"), json.dumps(known))
        return [self._scan(table, values) for table in self._named(query)]

    def _scan(self, table: exp.Table, values: dict[str, Any]) -> Scan:
        resource = self._table(table.db, table.name)
        field_name = _partition_field(resource) if resource.get("timePartitioning") else None
        conditions = _conditions(table, field_name) if field_name else []
        if resource.get("requirePartitionFilter") and not conditions:
            raise Refused(400, "invalidQuery", f"Cannot query over table '{table.db}.{table.name}' without a filter over column(s) "
                                               f"'{field_name}' that can be used for partition elimination")
        where = " AND ".join(condition.sql(dialect="duckdb") for condition in conditions) or "true"
        used = {name: value for name, value in values.items() if f"${name}" in where}
        count = f'COUNT(DISTINCT "{field_name}")' if field_name else "NULL"
        rows, partitions = self._duck.execute(
            f'SELECT COUNT(*), {count} FROM "{table.db}"."{table.name}" WHERE {where}', used).fetchall()[0]
        return Scan(table.name, rows * len(self.columns(table.db, table.name)), partitions, bool(conditions))


def _undrawn(text: str) -> str:
    return re.sub(r"\bstaging_(\w+)_[0-9a-z]+\b", r"staging_\1", text)


@cache
def _pushed_down(text: str, schema: str) -> exp.Query:
    """Only to be read: one for every time that a statement is asked."""
    query = _inlined(sqlglot.parse_one(text, read="bigquery"))
    query = qualify(query, dialect="bigquery", schema=json.loads(schema), validate_qualify_columns=False)
    return pushdown_predicates(merge_subqueries(query), dialect="bigquery")


def _inlined(query: exp.Query) -> exp.Query:
    """A statement in which a WITH over a stored table stands wherever it is read, if it is read more than once."""
    for cte in [cte for cte in query.ctes if any(table.db for table in cte.find_all(exp.Table))]:
        reads = [table for table in query.find_all(exp.Table) if table.name == cte.alias and not table.db]
        if len(reads) > 1:
            for table in reads:
                table.replace(exp.Subquery(this=cte.this.copy(), alias=exp.TableAlias(this=exp.to_identifier(table.alias_or_name))))
            cte.pop()
    return query


def _bytes(scans: list[Scan]) -> int:
    """Eight bytes a cell."""
    return sum(scan.rows for scan in scans) * 8


def _conditions(table: exp.Table, field_name: str) -> list[exp.Expression]:
    """The conjuncts of the table's own SELECT that only compare its partitioning column with constants and parameters."""
    select = table.find_ancestor(exp.Select)
    where = select.args.get("where") if select else None
    found = []
    for condition in (where.this.flatten() if isinstance(where.this, exp.And) else [where.this]) if where else []:
        columns = list(condition.find_all(exp.Column))
        if columns and all(column.name == field_name for column in columns) and not condition.find(exp.Select):
            plain = condition.copy()
            for column in plain.find_all(exp.Column):
                column.set("table", None)
            found.append(plain)
    return found


def _partition_field(resource: dict[str, Any]) -> str:
    return resource["timePartitioning"]["field"]


def _day(decorator: str) -> date:
    return datetime.strptime(decorator, "%Y%m%d").date()


def _is_name(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z_]\w*", name)) and not name.startswith("$")


def _described(text: str) -> str:
    """The description among the OPTIONS in a piece of DDL."""
    found = re.search(r"OPTIONS ?\(\s*description='((?:[^'\\]|\\.)*)'\s*\)", text)
    return found[1].replace("\\'", "'") if found else ""


def _parameters(query: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and types of a query's named parameters."""
    values, kinds = {}, {}
    for item in query.get("queryParameters", []):
        kind = item["parameterType"]["type"]
        text = item["parameterValue"]["value"]
        kinds[item["name"]] = kind
        values[item["name"]] = {
            "INT64": int, "FLOAT64": float, "DATE": date.fromisoformat, "BOOL": lambda given: str(given).lower() == "true",
        }.get(kind, str)(text)
    return values, kinds


def _cell(value: Any, micros: bool) -> Any:
    """A value as REST has it."""
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime):
        seconds = value.timestamp()
        return str(round(seconds * 1_000_000)) if micros else repr(seconds)
    return value.isoformat() if isinstance(value, date) else str(value)
