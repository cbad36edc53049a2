"""Both engines over one shop, for tests: a BigQuery warehouse that talks to the loopback server with Google's real client."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery

from retention_ops.clock import system_clock
from retention_ops.settings import Settings
from retention_ops.warehouse.bigquery import BigQuery
from retention_ops.warehouse.bigquery_jobs import Jobs
from retention_ops_tests.shops import lake_with
from retention_ops_tests.warehouse.bigquery_server import BigQueryServer


def client_of(server: BigQueryServer) -> bigquery.Client:
    """The real client, without credentials, at the loopback server."""
    return bigquery.Client(
        project=server.project, credentials=AnonymousCredentials(), location=server.location,
        client_options=ClientOptions(api_endpoint=server.url),
    )


def addressed(server: BigQueryServer) -> dict[str, Any]:
    """The settings that name the server's dataset."""
    return {
        "warehouse": "bigquery", "bigquery_project": server.project, "bigquery_dataset": server.dataset,
        "bigquery_location": server.location,
    }


def on_bigquery(server: BigQueryServer, settings: Settings, *, clock=system_clock, request_seconds: float = 60.0) -> BigQuery:
    """A warehouse on the server; `warehouse.pauses` lists the seconds it would have slept between attempts."""
    pauses: list[float] = []
    client = client_of(server)
    jobs = Jobs(settings, lambda: nullcontext(client), sleep=pauses.append, clock=clock, request_seconds=request_seconds)
    warehouse = BigQuery(settings, jobs=jobs)
    warehouse.pauses = pauses
    return warehouse


def bigquery_with(server: BigQueryServer, orders: pd.DataFrame, home: Path, complete_through: date | None = None, **more: Any) -> BigQuery:
    """A warehouse whose home holds `orders`, loaded through the front door."""
    given = {name: more.pop(name) for name in ("clock", "request_seconds") if name in more}
    return on_bigquery(server, lake_with(orders, home, complete_through, **addressed(server), **more).settings, **given)
