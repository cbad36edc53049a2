"""The embedded warehouse: one Parquet file per partition, replaced by rename; DuckDB in memory reads and writes it.

No process ever holds a shared database file, so a user, an assistant and ten runs read while a run writes.
`warehouse.duckdb` holds only views over the files, is itself replaced by rename and is opened read-only.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import pandas as pd

from retention_ops.errors import QualityError
from retention_ops.warehouse.catalog import DUCKDB_TYPES, TABLES, Table
from retention_ops.warehouse.dialect import declared_scan, file_list, literal, no_glob, no_rows, parquet_scan
from retention_ops.warehouse.files import locked, replacing, write_atomic
from retention_ops.warehouse.seam import PER_CUSTOMER, Part, Warehouse
from retention_ops.warehouse.versions import REFUNDS_FILE

DAY_FOLDERS = "day=" + "-".join("[0-9]" * digits for digits in (4, 2, 2))
"""the folders of a per-day table, as a pattern: a folder of that kind that is not ours is left alone"""


class Lake(Warehouse):
    """Tables as Parquet files under home/lake."""

    engine = "lake"

    # -- where things are ------------------------------------------------------------------------------------------

    @property
    def views_path(self) -> Path:
        return self.settings.home / "warehouse.duckdb"

    def path(self, table: str, part: date | str | None = None) -> Path:
        """The file of one partition (`part` a day), of one orders version (`part` its id) or of a whole table."""
        folder = self.root / table
        match TABLES[table].stored:
            case "day":
                return folder / f"day={part:%Y-%m-%d}" / "part-0.parquet"
            case "version" if table == "refunds":
                return self.root / "orders" / f"version={part}" / REFUNDS_FILE
            case "version":
                return folder / f"version={part}" / "part-0.parquet"
            case _:
                return folder / "part-0.parquet"

    def days(self, table: str) -> list[date]:
        """Stored partitions, oldest first."""
        return sorted(self._stored_days(table))

    def _stored_days(self, table: str) -> Iterator[date]:
        """The same in no order, found one by one: the first one costs the same whether there are two or a thousand."""
        try:
            with os.scandir(self.root / table) as folders:
                for folder in folders:
                    if folder.name.startswith("day=") and os.path.isfile(os.path.join(folder.path, "part-0.parquet")):
                        with suppress(ValueError):  # a folder that is not ours
                            yield date.fromisoformat(folder.name.removeprefix("day="))
        except FileNotFoundError:
            return

    def exists(self, table: str, part: date | str | None = None) -> bool:
        return self.path(table, part).is_file()

    def computed_at(self, table: str, day: date) -> datetime:
        return datetime.fromtimestamp(self.path(table, day).stat().st_mtime, UTC)

    # -- writing ---------------------------------------------------------------------------------------------------

    def write(
        self, connection: duckdb.DuckDBPyConnection, table: str, part: date | str | None, provenance: Mapping[str, str],
        *, order_by: str | None = None, where: str = "true",
    ) -> int:
        """Replaces one file of `table` by the rows (`where`) of the connection's temp table of that name; returns how many.

        The file is written under a name no reader matches, read back, fsynced and renamed, so a kill at any moment
        leaves the old one whole. `provenance` goes into the file's own metadata.
        """
        declared = TABLES[table]
        target = self.path(table, part)
        columns = ", ".join(f"CAST({c.name} AS {DUCKDB_TYPES[c.type]}) AS {c.name}" for c in declared.columns)
        metadata = ", ".join(f"{key}: {literal(value)}" for key, value in provenance.items())
        order = order_by or ", ".join(declared.key)
        with replacing(target) as partial:
            expected = connection.execute(
                f"COPY (SELECT {columns} FROM {table} WHERE {where} ORDER BY {order}) TO {literal(partial)} "
                f"(FORMAT parquet, COMPRESSION zstd, KV_METADATA {{{metadata}}})"
            ).fetchall()[0][0]
            written = connection.execute(f"SELECT COUNT(*) FROM {parquet_scan(partial)}").fetchall()[0][0]
            if written != expected:
                raise QualityError(f"{table} {part or ''}: {written} of {expected} rows reached the file; it was not replaced")
        return written

    def remove(self, table: str) -> None:
        self.path(table).unlink(missing_ok=True)

    def prune_snapshots(self, table: str, newest: date) -> list[date]:
        """Drops partitions of a snapshot table older than the newest snapshot_keep_days; returns their days."""
        oldest_kept = newest - timedelta(days=self.settings.snapshot_keep_days - 1)
        dropped = [day for day in self.days(table) if day < oldest_kept] if TABLES[table].snapshot else []
        for day in dropped:
            shutil.rmtree(self.path(table, day).parent, ignore_errors=True)
        return dropped

    # -- reading ---------------------------------------------------------------------------------------------------

    def provenance(self, table: str, part: date | str | None = None) -> dict[str, str]:
        """What the file says it was made from; empty where there is no file."""
        path = self.path(table, part)
        if not path.is_file():
            return {}
        with self.connection() as connection:
            return read_provenance(connection, path)

    def provenances(self, tables: Sequence[str], first: date = date.min, last: date = date.max) -> list[tuple[date, dict[str, str]]]:
        """What each file of `tables` was made from, in one query over their metadata."""
        paths = {self.path(table, day): day for table in tables for day in self.days(table) if first <= day <= last}
        if not paths:
            return []
        # DuckDB may write the folder before these three names in another way ('..' is resolved)
        found: dict[tuple[str, ...], dict[str, str]] = {path.parts[-3:]: {} for path in paths}
        with self.connection() as connection:
            metadata = connection.execute(f"SELECT file_name, key, value FROM parquet_kv_metadata({file_list(*paths)})").fetchall()
        for name, key, value in metadata:
            found[Path(name).parts[-3:]][bytes(key).decode()] = bytes(value).decode()
        return [(day, found[path.parts[-3:]]) for path, day in paths.items()]

    def read(
        self, table: str, part: date | str | None = None, order_by: str | None = None, columns: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """The rows of one file, by its exact path (never through a view over all of them); empty where there is none.

        Without `order_by` they come as they were written.
        """
        order = f" ORDER BY {order_by}" if order_by else ""
        names = ", ".join(columns) if columns else "*"
        stored = self.exists(table, part)
        source = declared_scan(TABLES[table], self.path(table, part)) if stored else f"({no_rows(TABLES[table])})"
        with self.connection() as connection:
            return connection.sql(f"SELECT {names} FROM {source}{order}").df()

    def read_range(self, table: str, first: date, last: date) -> pd.DataFrame:
        """The rows of all stored partitions from `first` to `last`."""
        paths = [self.path(table, day) for day in self.days(table) if first <= day <= last]
        with self.connection() as connection:
            if not paths:
                return connection.sql(no_rows(TABLES[table])).df()
            order = ", ".join(dict.fromkeys([TABLES[table].date_column, *TABLES[table].key]))
            return connection.sql(f"SELECT * FROM {declared_scan(TABLES[table], *paths)} ORDER BY {order}").df()

    # -- one person ---------------------------------------------------------------------------------------------------

    def rows_of(self, table: str, customer_ids: Sequence[str]) -> pd.DataFrame:
        declared = TABLES[table]
        parts = self.days(table) if declared.stored == "day" else [None]
        paths = [self.path(table, part) for part in parts if self.exists(table, part)]
        with self.connection() as connection:
            if not paths:
                return connection.sql(no_rows(declared)).df()
            order = ", ".join(dict.fromkeys([declared.date_column or declared.key[0], *declared.key]))
            return connection.execute(
                f"SELECT * FROM {declared_scan(declared, *paths)} WHERE customer_id IN (SELECT unnest(?)) ORDER BY {order}",
                [list(customer_ids)]).df()

    def parts_holding(self, customer_ids: Sequence[str]) -> list[tuple[str, Part, int]]:
        parts: list[tuple[str, Part]] = [("customer_days", path.parent.name.removeprefix("version="))
                                         for path in sorted((self.root / "customer_days").glob("version=*/part-0.parquet"))]
        for table in PER_CUSTOMER:
            parts += [(table.name, day) for day in self.days(table.name)] if table.stored == "day" else [(table.name, None)]
        found = []
        with self.connection() as connection:
            for table, part in parts:
                if self.path(table, part).is_file() and (rows := self._rows_of(connection, table, part, customer_ids)):
                    found.append((table, part, rows))
        return found

    def _rows_of(self, connection: duckdb.DuckDBPyConnection, table: str, part: Part, customer_ids: Sequence[str]) -> int:
        """Rows of these customers; 1 where the file is damaged: whom it holds nobody knows."""
        try:
            return connection.execute(
                f"SELECT COUNT(*) FROM {parquet_scan(self.path(table, part))} WHERE customer_id IN (SELECT unnest(?))",
                [list(customer_ids)]).fetchall()[0][0]
        except duckdb.Error:
            return 1

    def erase_part(self, table: str, part: Part, customer_ids: Sequence[str]) -> None:
        path = self.path(table, part)
        if TABLES[table].stored == "version":
            path.unlink(missing_ok=True)
            return
        computed = path.stat().st_mtime_ns
        with self.connection() as connection:
            try:
                made_from = read_provenance(connection, path)
                rows = declared_scan(TABLES[table], path, options=", file_row_number = true")
                connection.execute(f"CREATE TEMP TABLE {table} AS SELECT * FROM {rows} WHERE customer_id NOT IN (SELECT unnest(?))",
                                   [list(customer_ids)])
            except duckdb.Error:  # damaged: no reader can use it, and the next run of its date makes it again
                path.unlink()
                return
            erased = int(made_from.get("erased", 0)) + len(customer_ids)
            self.write(connection, table, part, {**made_from, "erased": str(erased)}, order_by="file_row_number")
        os.utime(path, ns=(computed, computed))  # when it was computed stays as it was

    # -- the views a user opens ------------------------------------------------------------------------------------

    def refresh_views(self) -> None:
        """Rebuilds warehouse.duckdb when a table came into being or the orders version changed; cheap otherwise."""
        with locked(self.root / ".views.lock"):
            views = {name: self._view(table) for name, table in TABLES.items()}
            marker = self.root / ".views.json"
            if self.views_path.is_file() and _read_marker(marker) == views:
                return
            with replacing(self.views_path) as partial:
                connection = duckdb.connect(str(partial))
                whole = True
                try:
                    for name, select in views.items():
                        try:
                            connection.execute(f"CREATE VIEW {name} AS {select}")
                        except duckdb.Error:  # a damaged partition must not stop the run that heals it
                            whole = False
                            connection.execute(f"CREATE VIEW {name} AS {self._view_of_readable(TABLES[name])}")
                        connection.execute(f"COMMENT ON VIEW {name} IS {literal(TABLES[name].description)}")
                    connection.execute("CHECKPOINT")
                finally:
                    connection.close()
            write_atomic(marker, json.dumps(views if whole else None))  # None: made again next time

    def _view(self, table: Table) -> str:
        columns = ", ".join(table.column_names)
        match table.stored:
            case "day" if any(self._stored_days(table.name)):
                pattern = f"{no_glob(self.root / table.name)}/{DAY_FOLDERS}/part-0.parquet"
                # what only older files lack is null by union_by_name; what the newest lacks, all do. (A union with no_rows would do
                # both, but then no date is pruned.)
                try:
                    known = self._columns_in(self.path(table.name, max(self._stored_days(table.name))))
                except duckdb.Error:  # damaged: refresh_views finds out
                    known = set(table.column_names)
                return _view_of_days(_columns_of_days(table, known), literal(pattern))
            case "day":
                return _view_without_days(table)
            case "version":
                version = {"customers": self.customers, "suppressions": self.suppressions}.get(table.name, self.orders)()
                path = version and self.path(table.name, version.version)
            case _:
                path = self.path(table.name)
        if not path or not path.is_file():
            return no_rows(table)
        return f"SELECT {columns} FROM {declared_scan(table, path)}"


    def _view_of_readable(self, table: Table) -> str:
        """The view of a table some of whose files cannot be read, without those."""
        readable, known = [], set()
        if table.stored == "day":
            for path in (self.path(table.name, day) for day in self.days(table.name)):
                with suppress(duckdb.Error):
                    known |= self._columns_in(path)
                    readable.append(path)
        if readable:
            return _view_of_days(_columns_of_days(table, known), file_list(*readable))
        return _view_without_days(table) if table.stored == "day" else no_rows(table)

    def _columns_in(self, path: Path) -> set[str]:
        """The names in a file. Raises duckdb.Error where it cannot be read."""
        with self.connection() as connection:
            return {row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM {parquet_scan(path)}").fetchall()}


def _columns_of_days(table: Table, known: set[str]) -> str:
    """The declared columns as the view of a per-day table names them: null what is not in `known`."""
    missing = {column.name: f"CAST(NULL AS {DUCKDB_TYPES[column.type]}) AS " for column in table.columns if column.name not in known}
    return ", ".join(f"{missing.get(name, '')}{name}" for name in table.column_names)


def _view_of_days(columns: str, files: str) -> str:
    # day is cut from the file's name, which prunes files as hive_partitioning does; that one takes any 'name=value' folder on the
    # way for a column too
    return (f"SELECT {columns}, CAST(right(parse_dirpath(filename), 10) AS DATE) AS day "
            f"FROM read_parquet({files}, hive_partitioning = false, filename = true, union_by_name = true)")


def _view_without_days(table: Table) -> str:
    return f"SELECT *, NULL::DATE AS day FROM ({no_rows(table)})"


def _read_marker(path: Path) -> object:
    """What the views were made from; None where that is not known, so that they are made again."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_provenance(connection: duckdb.DuckDBPyConnection, path: Path) -> dict[str, str]:
    """The key-value metadata of one Parquet file."""
    rows = connection.execute(f"SELECT key, value FROM parquet_kv_metadata({file_list(path)})").fetchall()
    return {bytes(key).decode(): bytes(value).decode() for key, value in rows}
