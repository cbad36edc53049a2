"""What the tests of orders in share: a shop in a temporary folder, and small files written on the spot."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest

import retention_ops
from retention_ops.settings import Settings
from retention_ops.sources.ingest import IngestReport, ingest
from retention_ops.warehouse.versions import OrdersVersion, current_orders

SHARED_DATA = Path(retention_ops.__file__).parents[1].parent / "shared" / "data"
NOW = datetime(2026, 1, 15, 12, 0, tzinfo=UTC)
ORDERS_HEADER = "order_id,customer_id,order_date,order_amount"


def shared(name: str) -> Path:
    """A file of ../shared/data; skips the test where the folder is absent."""
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"../shared/data/{name} is not there: it is not part of this repository")
    return path


class Shop:
    """One installation: its settings, and ingest with a fixed clock."""

    def __init__(self, folder: Path, **settings: Any):
        self.folder = folder
        self.settings = Settings(_env_file=None, home=folder / "home", **settings)
        self.progress: list[str] = []

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def orders_csv(self, *rows: Sequence[object], name: str = "orders.csv") -> Path:
        return self.write(name, "\n".join([ORDERS_HEADER, *(",".join(map(str, row)) for row in rows)]) + "\n")

    def ingest(self, *files: Path, preset: str = "orders", **options: Any) -> IngestReport:
        return ingest(files, preset, self.settings, clock=lambda: NOW, progress=self.progress.append, **options)

    def add(self, *rows: Sequence[object], **options: Any) -> IngestReport:
        """Ingest these orders from a csv file."""
        return self.ingest(self.orders_csv(*rows), **options)

    @property
    def current(self) -> OrdersVersion:
        version = current_orders(self.settings)
        assert version is not None
        return version

    def orders(self) -> list[tuple[str, str, date, int, str]]:
        return read(self.current.path)

    def lake(self) -> dict[str, str]:
        """Every file under lake with the hash of its bytes."""
        root = self.settings.home / "lake"
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in root.rglob("*") if path.is_file()
        }


def read(path: Path) -> list[tuple]:
    """Rows of a stored file in stored order."""
    return duckdb.execute("SELECT * FROM read_parquet(?, hive_partitioning = false)", [str(path)]).fetchall()
