"""DuckDB in memory, limited as the settings say."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import duckdb

from retention_ops.settings import Settings

Connect = Callable[[], AbstractContextManager[duckdb.DuckDBPyConnection]]


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


class Instance:
    """One DuckDB in memory, opened when first asked for by what `connect` gives, and many connections to it.

    Starting an instance costs some 25 times what a connection to a running one does. Temp tables and views belong to one
    connection and go with it; nothing here may create any other.
    """

    def __init__(self, connect: Connect):
        self._connect = connect
        self._lock = Lock()
        self._open: tuple[int, ExitStack, duckdb.DuckDBPyConnection] | None = None
        self._of_parents: list[object] = []

    @contextmanager
    def connection(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection whose time stamps are UTC."""
        connection = self._cursor()
        try:
            connection.execute("SET TimeZone = 'UTC'")
            yield connection
        finally:
            connection.close()

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        with self._lock:
            # the threads of an instance do not survive a fork: the child starts its own, and closing its parent's would hang
            if self._open and self._open[0] != os.getpid():
                self._of_parents.append(self._open)
                self._open = None
            if self._open is None:
                stack = ExitStack()
                self._open = os.getpid(), stack, stack.enter_context(self._connect())
            return self._open[2].cursor()

    def close(self) -> None:
        with self._lock:
            if self._open and self._open[0] == os.getpid():
                self._open[1].close()
                self._open = None
