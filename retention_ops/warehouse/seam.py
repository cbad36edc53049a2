"""What a warehouse must do, whichever engine is behind it; the embedded lake and BigQuery are the two there are.

Ingested orders, customers and suppressions are versions on this machine's disk for both: an ingest is checked and kept
here, and an engine that computes elsewhere takes its copy from here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import date, datetime
from typing import Any, Literal, Protocol

import duckdb
import pandas as pd

from retention_ops.settings import Settings
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.connection import Connect, Instance, connect_in_memory
from retention_ops.warehouse.schema import check_lake
from retention_ops.warehouse.versions import (
    CustomersVersion,
    OrdersVersion,
    SuppressionsVersion,
    current_customers,
    current_orders,
    current_suppressions,
    orders_versions,
)

PER_CUSTOMER = tuple(table for table in TABLES.values() if "customer_id" in table.column_names and table.stored != "version")
"""computed tables with a row per customer"""
Part = date | str | None
"""one partition: a day, a version's id, or None for a whole table"""


class Rows(Protocol):
    """What running a statement gives."""

    def fetchall(self) -> list[tuple]: ...


class Connection(Protocol):
    """Runs a SELECT over the tables just computed. Text both engines read is written once: no FILTER, no ORDER BY ALL."""

    def execute(self, statement: str) -> Rows: ...


class Warehouse(ABC):
    """Where tables live. `connect` supplies local DuckDB connections (Dagster passes its DuckDBResource)."""

    engine: Literal["lake", "bigquery"]

    def __init__(self, settings: Settings, connect: Connect | None = None):
        self.settings = settings
        self.root = (settings.home / "lake").absolute()
        check_lake(self.root)
        self._instance = Instance(connect or (lambda: connect_in_memory(settings)))

    def connection(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """A local in-memory connection of its own, for temp tables and views; its time stamps are UTC, whatever the machine says."""
        return self._instance.connection()

    def close(self) -> None:
        """Gives the memory of local connections back; the next one takes it again."""
        self._instance.close()

    def orders(self) -> OrdersVersion | None:
        """The orders in force, None before the first ingest."""
        return current_orders(self.settings)

    def orders_versions(self) -> list[OrdersVersion]:
        """Every orders version, oldest first."""
        return orders_versions(self.settings)

    def customers(self) -> CustomersVersion | None:
        """The customer attributes in force."""
        return current_customers(self.settings)

    def suppressions(self) -> SuppressionsVersion | None:
        """The suppressions in force."""
        return current_suppressions(self.settings)

    @abstractmethod
    def path(self, table: str, part: Part = None) -> Any:
        """Where one partition is, for people: a file, or a table's full name."""

    @abstractmethod
    def days(self, table: str) -> list[date]:
        """Stored partitions, oldest first."""

    @abstractmethod
    def exists(self, table: str, part: Part = None) -> bool:
        """Whether that partition is stored."""

    @abstractmethod
    def computed_at(self, table: str, day: date) -> datetime:
        """When a stored partition was last replaced."""

    @abstractmethod
    def provenance(self, table: str, part: Part = None) -> dict[str, str]:
        """What a partition was made from; empty where that is not known."""

    @abstractmethod
    def provenances(self, tables: Sequence[str], first: date = date.min, last: date = date.max) -> list[tuple[date, dict[str, str]]]:
        """The same for every stored day of `tables` from `first` to `last`; each table is asked once, however many days there are."""

    @abstractmethod
    def read(
        self, table: str, part: Part = None, order_by: str | None = None, columns: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """The rows of one partition, or these `columns` of them; empty where there is none."""

    @abstractmethod
    def read_range(self, table: str, first: date, last: date) -> pd.DataFrame:
        """The rows of all stored partitions from `first` to `last`, oldest first."""

    @abstractmethod
    def write(
        self, connection: Connection, table: str, part: Part, provenance: Mapping[str, str],
        *, order_by: str | None = None, where: str = "true",
    ) -> int:
        """Replaces one partition, whole or not at all, by the rows (`where`) of the connection's table of that name; returns how many."""

    @abstractmethod
    def remove(self, table: str) -> None:
        """Drops a whole table."""

    @abstractmethod
    def prune_snapshots(self, table: str, newest: date) -> list[date]:
        """Drops partitions of a snapshot table older than the newest snapshot_keep_days; returns their days."""

    @abstractmethod
    def rows_of(self, table: str, customer_ids: Sequence[str]) -> pd.DataFrame:
        """What every stored partition of a table in PER_CUSTOMER says of these customers, by date."""

    @abstractmethod
    def parts_holding(self, customer_ids: Sequence[str]) -> list[tuple[str, Part, int]]:
        """(table, part, rows) of every computed partition, whole table and superseded version that holds one of these customers."""

    @abstractmethod
    def erase_part(self, table: str, part: Part, customer_ids: Sequence[str]) -> None:
        """Replaces one of those without the customers, whole or not at all; a version of an input is dropped: it is derived again."""

    @abstractmethod
    def refresh_views(self) -> None:
        """Brings the views a user opens up to date."""
