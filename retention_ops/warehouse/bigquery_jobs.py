"""BigQuery jobs that happen once: what is retried, what is not, what it may cost.

Every job has an id chosen here before it is sent. When a reply is lost, the same id is sent again: BigQuery answers 409
where the job exists, and that job is waited for, so nothing runs twice. A job that BigQuery itself gave up on did nothing
(a job commits whole or not at all) and is run anew under another id. The client's own retries are off: they would hide
which of the two it was, and wait for ten minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from uuid import uuid4

import requests
from google.api_core import exceptions
from google.auth import exceptions as auth_exceptions
from google.cloud import bigquery

from retention_ops.clock import Clock, system_clock
from retention_ops.errors import WarehouseError
from retention_ops.settings import Settings

Client = Callable[[], AbstractContextManager[bigquery.Client]]
T = TypeVar("T")

PAUSES = (2, 4, 8)
"""seconds before the second, third and fourth attempt"""
REQUEST_SECONDS = 120.0
GB = 10**9
LABELS = {"app": "retention-ops"}
MONTH_READ_AGAIN = timedelta(minutes=10)
TRANSIENT_REASONS = {
    "backendError", "internalError", "rateLimitExceeded", "badGateway", "timeout",
    "jobBackendError", "jobInternalError", "jobRateLimitExceeded",
}
UNREACHABLE = (
    ConnectionError, TimeoutError, requests.exceptions.ConnectionError, requests.exceptions.Timeout,
    requests.exceptions.ChunkedEncodingError, auth_exceptions.TransportError,
)


class JobFailed(Exception):
    """A job ended with an error; BigQuery's `reason` and message."""

    def __init__(self, reason: str, message: str):
        super().__init__(f"{message} ({reason})")
        self.reason = reason


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed in a few seconds."""
    if isinstance(error, JobFailed):
        return error.reason in TRANSIENT_REASONS
    if isinstance(error, requests.exceptions.SSLError):
        return False
    if isinstance(error, exceptions.GoogleAPICallError):
        reasons = {item.get("reason") for item in error.errors or [] if isinstance(item, Mapping)}
        return bool(reasons & TRANSIENT_REASONS) or isinstance(error, (exceptions.ServerError, exceptions.TooManyRequests))
    return isinstance(error, UNREACHABLE)


def google_type(value: Any) -> str:
    """The GoogleSQL type of a parameter's value."""
    return {bool: "BOOL", int: "INT64", float: "FLOAT64", str: "STRING", date: "DATE", datetime: "TIMESTAMP"}[type(value)]


class Jobs:
    """Runs jobs for one installation and counts what they bill. A test passes its own `client`, `sleep` and patience."""

    def __init__(
        self, settings: Settings, client: Client | None = None, *, sleep: Callable[[float], None] = time.sleep,
        clock: Clock = system_clock, request_seconds: float = REQUEST_SECONDS,
    ):
        self.settings = settings
        self._factory = client or (lambda: nullcontext(
            bigquery.Client(project=settings.bigquery_project, location=settings.bigquery_location)))
        self._open = ExitStack()
        self._client: bigquery.Client | None = None
        self._sleep, self._clock, self._request_seconds = sleep, clock, request_seconds
        self.bytes_billed = 0
        self.last_job, self.last_billed = "", 0
        self.last_replacement = ""
        self._month: tuple[datetime, int] | None = None

    @property
    def client(self) -> bigquery.Client:
        """Made when it is first needed; credentials come from the environment (Application Default Credentials)."""
        if self._client is None:
            try:
                self._client = self._open.enter_context(self._factory())
            except auth_exceptions.GoogleAuthError as error:
                raise WarehouseError(
                    f"BigQuery cannot be used: {error}\nSet GOOGLE_APPLICATION_CREDENTIALS or run "
                    "`gcloud auth application-default login`.") from error
        return self._client

    # -- one request ------------------------------------------------------------------------------------------------

    def call(self, what: str, request: Callable[..., T]) -> T:
        """A request that may be repeated: `request(retry=None, timeout=...)`. Retries 2, 4, 8 s; NotFound and Conflict pass through."""
        for pause in (*PAUSES, None):
            try:
                return request(retry=None, timeout=self._request_seconds)
            except (exceptions.NotFound, exceptions.Conflict):
                raise
            except (exceptions.GoogleAPICallError, auth_exceptions.GoogleAuthError, *UNREACHABLE) as error:
                if pause is None or not is_transient(error):
                    raise WarehouseError(f"BigQuery: {what} failed: {_text(error)}") from error
                self._sleep(pause)
        raise AssertionError("unreachable")

    def table(self, name: str) -> bigquery.Table | None:
        """What BigQuery says of project.dataset.table; None where there is none."""
        try:
            return self.call(f"reading {name}", lambda **how: self.client.get_table(name, **how))
        except exceptions.NotFound:
            return None

    # -- one job ----------------------------------------------------------------------------------------------------

    def query(
        self, statement: str, values: Mapping[str, Any] | None = None, *, name: str, into: bigquery.QueryJobConfig | None = None,
    ) -> bigquery.QueryJob:
        """Runs a statement to its end. `into` holds the destination; a failed job leaves it as it was.

        Raises WarehouseError naming the job and the query where it failed for good, or would cost more than allowed.
        """
        config = self._config(values, into)
        if self.settings.bigquery_monthly_budget_gb:
            self._check_budget(statement, self.estimate(statement, values))

        def start(job_id: str) -> bigquery.QueryJob:
            return self.client.query(
                statement, job_config=config, job_id=job_id, location=self.settings.bigquery_location,
                retry=None, job_retry=None, timeout=self._request_seconds,
            )

        job = self._once(name, start, statement)
        billed = job.total_bytes_billed or 0
        self.bytes_billed, self.last_billed = self.bytes_billed + billed, billed
        if into and into.destination:
            self.last_replacement = job.job_id
        if self._month:
            self._month = (self._month[0], self._month[1] + billed)
        return job

    def rows(self, job: bigquery.QueryJob) -> list[tuple]:
        """The rows a query gave. Reading them again costs nothing, so a lost page is asked for again."""

        def read(retry: None, timeout: float) -> list[tuple]:
            return [row.values() for row in job.result(retry=retry, timeout=timeout, job_retry=None)]

        return self.call(f"reading the rows of job {job.job_id}", read)

    def rows_from(self, job: bigquery.QueryJob, start: int, count: int) -> list[tuple]:
        """One page, of at most `count`, of the rows a query gave, from number `start` (0 is the first); empty after the last."""

        def read(retry: None, timeout: float) -> list[tuple]:
            result = job.result(retry=retry, timeout=timeout, job_retry=None, start_index=start, max_results=count)
            return [row.values() for row in next(result.pages, ())]

        return self.call(f"reading the rows of job {job.job_id}", read)

    def row_count(self, job: bigquery.QueryJob) -> int:
        """How many rows a query wrote into its destination."""

        def read(retry: None, timeout: float) -> int:
            return job.result(retry=retry, timeout=timeout, job_retry=None, max_results=1).total_rows

        return self.call(f"counting the rows of job {job.job_id}", read)

    def load(self, file: Path, table: bigquery.TableReference, config: bigquery.LoadJobConfig, *, name: str) -> int:
        """Loads one Parquet file over a table, whole or not at all; returns its rows. Loading is free of charge."""
        config.labels = LABELS

        def start(job_id: str) -> bigquery.LoadJob:
            with open(file, "rb") as stream:
                return self.client.load_table_from_file(
                    stream, table, job_id=job_id, location=self.settings.bigquery_location, job_config=config,
                    size=file.stat().st_size, num_retries=0, timeout=self._request_seconds,
                )

        return self._once(name, start, f"load of {file.name} into {table}").output_rows

    def estimate(self, statement: str, values: Mapping[str, Any] | None = None) -> int:
        """Bytes a query would scan, by a dry run, which is free."""
        return self._dry_run(statement, values).total_bytes_processed or 0

    def schema(self, statement: str) -> dict[str, str]:
        """The columns a query would give, name -> GoogleSQL type, by a dry run. Raises WarehouseError where it is no valid query."""
        legacy = {"INTEGER": "INT64", "FLOAT": "FLOAT64", "BOOLEAN": "BOOL"}
        fields = self._dry_run(statement, None).schema or []
        return {field.name: legacy.get(field.field_type, field.field_type) for field in fields}

    def _dry_run(self, statement: str, values: Mapping[str, Any] | None) -> bigquery.QueryJob:
        config = self._config(values, None)
        config.dry_run, config.use_query_cache = True, False

        def ask(retry: None, timeout: float) -> bigquery.QueryJob:
            return self.client.query(
                statement, job_config=config, location=self.settings.bigquery_location, retry=retry, job_retry=None, timeout=timeout)

        try:
            return self.call(f"the dry run of\n{statement}\n", ask)
        except exceptions.NotFound as error:
            raise WarehouseError(f"BigQuery: {_text(error)}\nThe query was:\n{statement}") from error

    def _config(self, values: Mapping[str, Any] | None, into: bigquery.QueryJobConfig | None) -> bigquery.QueryJobConfig:
        config = into or bigquery.QueryJobConfig()
        config.labels = LABELS
        config.maximum_bytes_billed = self.settings.maximum_bytes_billed
        config.query_parameters = [
            bigquery.ScalarQueryParameter(name, google_type(value), value) for name, value in (values or {}).items()
        ]
        return config

    def _once(self, name: str, start: Callable[[str], T], what: str) -> T:
        token, attempt = uuid4().hex[:12], 1
        for pause in (*PAUSES, None):
            job_id = f"retention_ops-{name}-{token}-{attempt}"
            try:
                job = self._waited_for(self._started(job_id, start))
                self.last_job = job_id
                return job
            except (JobFailed, exceptions.GoogleAPICallError, auth_exceptions.GoogleAuthError, *UNREACHABLE) as error:
                if pause is None or not is_transient(error):
                    self._give_up(job_id, what, error)
                # a failed job keeps its id for ever; a lost reply is asked for under the same one
                attempt += isinstance(error, JobFailed)
                self._sleep(pause)
        raise AssertionError("unreachable")

    def _started(self, job_id: str, start: Callable[[str], T]) -> T:
        try:
            return start(job_id)
        except exceptions.Conflict:  # an earlier attempt of ours arrived, its reply did not
            try:
                return self._job(job_id)
            except exceptions.NotFound as error:  # known to happen for a moment after a conflict
                raise exceptions.ServiceUnavailable(f"job {job_id} exists but cannot be found yet") from error

    def _job(self, job_id: str) -> Any:
        return self.client.get_job(job_id, location=self.settings.bigquery_location, retry=None, timeout=self._request_seconds)

    def _waited_for(self, job: T) -> T:
        """The job when it is done. Raises JobFailed where it ended with an error."""
        pause = 0.1
        while not job.done(retry=None, timeout=self._request_seconds):
            time.sleep(pause)  # waiting for work, not for recovery
            pause = min(pause * 1.5, 5.0)
        if job.error_result:
            raise JobFailed(job.error_result.get("reason", ""), job.error_result.get("message", ""))
        return job

    def _give_up(self, job_id: str, what: str, error: Exception) -> NoReturn:
        where = f"project {self.settings.bigquery_project}, location {self.settings.bigquery_location}"
        raise WarehouseError(f"BigQuery job {job_id} ({where}) failed: {_text(error)}\nThe query was:\n{what}") from error

    # -- money ------------------------------------------------------------------------------------------------------

    def month_bytes(self) -> int:
        """Bytes billed to this account's jobs of ours since the month began (UTC), by BigQuery's own list of jobs.

        So a run that was killed, and another machine with the same account, count as well.
        """
        now = self._clock()
        if self._month is None or now - self._month[0] > MONTH_READ_AGAIN or now.month != self._month[0].month:
            begin = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)

            def billed(retry: None, timeout: float) -> int:
                jobs: Iterable[Any] = self.client.list_jobs(min_creation_time=begin, page_size=1000, retry=retry, timeout=timeout)
                return sum(
                    job.total_bytes_billed or 0 for job in jobs
                    if job.job_type == "query" and job.labels.get("app") == LABELS["app"]
                )

            self._month = (now, self.call("listing this month's jobs", billed))
        return self._month[1]

    def _check_budget(self, statement: str, estimate: int) -> None:
        budget, used = self.settings.bigquery_monthly_budget_gb, self.month_bytes()
        if used + estimate > budget * GB:
            raise WarehouseError(
                f"over the month's budget: {used / GB:,.3f} GB are billed since the 1st (UTC), this query would scan "
                f"{estimate / GB:,.3f} GB, RETENTION_OPS_BIGQUERY_MONTHLY_BUDGET_GB is {budget:g}. "
                f"Nothing was started; raise it or wait.\nThe query was:\n{statement}")


def _text(error: Exception) -> str:
    return str(getattr(error, "message", None) or error)
