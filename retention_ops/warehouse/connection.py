"""DuckDB in memory, limited as the settings say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

from retention_ops.settings import Settings


def connection_config(settings: Settings, spill_to: Path | None = None) -> dict[str, Any]:
    """DuckDB's own settings; what does not fit into memory goes to `spill_to`, by default home/tmp."""
    config: dict[str, Any] = {"temp_directory": str((spill_to or settings.home / "tmp").absolute())}
    if settings.duckdb_memory_limit:
        config["memory_limit"] = settings.duckdb_memory_limit
    if settings.duckdb_threads:
        config["threads"] = settings.duckdb_threads
    return config


@contextmanager
def connect_in_memory(settings: Settings, spill_to: Path | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """An in-memory connection, closed in the end."""
    connection = duckdb.connect(":memory:", config=connection_config(settings, spill_to))
    try:
        yield connection
    finally:
        connection.close()
