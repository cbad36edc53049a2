"""Which warehouse the settings ask for."""

from __future__ import annotations

from retention_ops.settings import Settings
from retention_ops.warehouse.connection import Connect
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.seam import Warehouse


def open_warehouse(settings: Settings, connect: Connect | None = None, bigquery_client=None, *, writes: bool = True) -> Warehouse:
    """The lake or BigQuery. `connect` and `bigquery_client` supply connections and clients (Dagster passes its resources').

    With `writes` off, BigQuery counts rows instead of replacing them: a preview must leave what others read alone.
    """
    if settings.warehouse == "lake":
        return Lake(settings, connect)
    from retention_ops.warehouse.bigquery import BigQuery  # importing its client takes a second

    return BigQuery(settings, connect, bigquery_client, writes=writes)
