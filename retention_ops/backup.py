"""Backup and restore: the ops database, the orders, customers and suppressions in force, every alert row, and the settings.

One tar file, readable by its owner only, whole or absent:

    manifest.json                       what is in it: sha256, bytes and, of tables, rows
    ops/<table>.jsonl                   the ops database as of one moment, whichever database it is
    lake/orders/version=…/…             the version in force with its refunds, and what the older ones were (their rows are not needed)
    lake/alert_logic/day=…/…            the alert rows as they were seen
    settings.json                       without secrets
    home/return_model.json              where a backtest judged the learned model: rebuilt dates must decide as they did
    own/source_sql.sql, closures_file.csv   what people wrote and the settings name, as it was; templates belong in version control

Not in it, because it can be computed again from the orders: the other partitions (`backfill`), Action Packs with their outbox, and
Dagster's history of runs. The ops database is read first: answers never name orders that the lake's copy does not have.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import sqlite3
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from retention_ops.clock import Clock, system_clock
from retention_ops.detect.verdict import FILE as VERDICT
from retention_ops.errors import NewerSchema, RetentionOpsError
from retention_ops.execute import hold
from retention_ops.installation import ui_runs
from retention_ops.log.database import check_known, metadata, migrate, open_engine
from retention_ops.log.database import revision as ops_revision
from retention_ops.settings import Settings
from retention_ops.warehouse.files import fsync_file, fsync_folder, replacing, scratch_folder
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.schema import FILE as LAKE_FILE
from retention_ops.warehouse.schema import LAKE_SCHEMA, lake_schema
from retention_ops.warehouse.versions import OrdersVersion, Store, customers_store, orders_store, suppressions_store

FORMAT = 1
MANIFEST, SETTINGS_FILE = "manifest.json", "settings.json"
NEEDED = {"created_at", "ops_schema", "lake_schema", SETTINGS_FILE}
"""what a restore reads of a manifest and its files"""
STATE = ("lake", "ops.sqlite", "action_packs")
"""what makes a home one that holds something"""
KEPT_TABLE = "alert_logic"
OWN_FILES = ("source_sql", "closures_file")
"""settings that name a file of the operator's; a restore puts them beside the settings of then and changes none in force"""
FILES_OF_BACKUP = "files_of_backup"
INSERT_ROWS = 5000
TRIES = 5
Say = Callable[[str], None]


@dataclass(frozen=True)
class Saved:
    """A backup that was written."""

    file: Path
    bytes: int
    sha256: str
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Restored:
    """What a restore put in place. `moved` is where the home before it lies now; `differs` names settings: then, now."""

    home: Path
    manifest: dict[str, Any]
    moved: Path | None
    differs: dict[str, tuple[Any, Any]]


# -- backup ------------------------------------------------------------------------------------------------------------


def back_up(settings: Settings, to: Path, clock: Clock = system_clock, say: Say = lambda text: None) -> Saved:
    """Writes a backup into the folder or to the file `to`, while runs may write. Raises RetentionOpsError where nothing is there yet."""
    Lake(settings)  # refuses a lake of a newer release
    now = clock()
    if not occupied(settings) and not settings.ops_database_url:
        raise RetentionOpsError(f"{settings.home} holds nothing to back up; name another home with --home")
    target = to / f"retention-ops-backup-{now:%Y%m%dT%H%M%SZ}.tar" if to.is_dir() or not to.suffix else to
    settings.home.mkdir(parents=True, exist_ok=True)
    with scratch_folder(settings.home.absolute(), ".backup-") as scratch:
        os.chmod(scratch, 0o700)
        say("reading the ops database")
        schema, counts = _read_database(settings, scratch)
        (scratch / SETTINGS_FILE).write_text(json.dumps(settings.recorded(), indent=1), encoding="utf-8")
        say("reading the lake")
        files = {path.relative_to(scratch).as_posix(): path for path in scratch.rglob("*") if path.is_file()}
        files |= _lake_files(settings, scratch)
        with suppress(FileNotFoundError):
            files[f"home/{VERDICT}"] = _hold(settings.home / VERDICT, scratch / "home" / VERDICT)
        files |= _own_files(settings, scratch)
        manifest = {
            "format": FORMAT, "created_at": now.isoformat(), "program": importlib.metadata.version("retention-ops"),
            "ops_schema": schema, "lake_schema": lake_schema(settings.home / "lake") or LAKE_SCHEMA, "rows": counts,
            "settings_sha256": settings.settings_sha256(),
            "files": {name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for name, path in sorted(files.items())},
        }
        say(f"writing {target}")
        with replacing(target, mode=0o600) as partial:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle, \
                    tarfile.open(fileobj=handle, mode="w", format=tarfile.PAX_FORMAT) as tar:
                _add(tar, MANIFEST, io.BytesIO(_manifest_bytes(manifest)), len(_manifest_bytes(manifest)), now)
                for name in manifest["files"]:
                    with open(files[name], "rb") as content:
                        _add(tar, name, content, manifest["files"][name]["bytes"], now)
            _prove_whole(partial)
    return Saved(target, target.stat().st_size, _sha256(target), manifest)


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def _add(tar: tarfile.TarFile, name: str, content: Any, size: int, now: datetime) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o600, int(now.timestamp())
    tar.addfile(entry, content)


def _prove_whole(file: Path) -> None:
    """A backup nobody can read is found out when it is made."""
    with opened(file) as (tar, manifest):
        for name in manifest["files"]:
            _checked(tar, name, manifest, None)


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _read_database(settings: Settings, scratch: Path) -> tuple[str | None, dict[str, int]]:
    """The tables as of one moment under scratch/ops; the schema they have and their rows."""
    folder = scratch / "ops"
    folder.mkdir()
    url = sa.make_url(settings.database_url)
    if url.get_backend_name() == "sqlite":
        if not url.database or not Path(url.database).exists():
            return None, {}
        # sqlite's own copy: a writer is neither waited for nor held up
        with closing(sqlite3.connect(url.database, timeout=60)) as source, closing(sqlite3.connect(scratch / "ops.copy")) as copy:
            source.backup(copy)
        engine = sa.create_engine(f"sqlite:///{scratch / 'ops.copy'}")
    else:
        engine = sa.create_engine(url, isolation_level="REPEATABLE READ")
    try:
        check_known(found := ops_revision(engine), f"the ops database {engine.url.render_as_string(hide_password=True)}")
        with engine.connect() as connection, connection.begin():
            counts = {table.name: _write_rows(connection, table, folder) for table in _tables(connection)}
        return found, counts
    finally:
        engine.dispose()
        (scratch / "ops.copy").unlink(missing_ok=True)


def _tables(connection: Connection) -> list[sa.Table]:
    """Our tables as this database has them, those that others refer to first."""
    there = set(sa.inspect(connection).get_table_names()) & set(metadata.tables)
    found = sa.MetaData()
    found.reflect(connection, only=sorted(there))
    for column in (column for table in found.tables.values() for column in table.columns):
        if isinstance(column.type, sa.JSON):
            column.type = sa.JSON(none_as_null=True)
    return [table for table in found.sorted_tables if table.name in there]


def _write_rows(connection: Connection, table: sa.Table, folder: Path) -> int:
    order = list(table.primary_key.columns) or list(table.columns)
    count = 0
    with open(folder / f"{table.name}.jsonl", "w", encoding="utf-8") as lines:
        rows = connection.execution_options(yield_per=INSERT_ROWS).execute(sa.select(table).order_by(*order))
        for row in rows.mappings():
            values = {name: value.isoformat() if isinstance(value, date) else value for name, value in row.items()}
            lines.write(json.dumps(values, ensure_ascii=False) + "\n")
            count += 1
    return count


def _lake_files(settings: Settings, scratch: Path) -> dict[str, Path]:
    """name in the backup -> file: the versions in force, what older ones were, and the alert rows.

    Files of the lake are replaced whole; each is copied by a second name for the same content, so that what is read twice is the same.
    """
    found: dict[str, Path] = {}
    root = settings.home / "lake"
    for store in (orders_store(settings), customers_store(settings), suppressions_store(settings)):
        found |= _pinned(root, scratch, lambda store=store: _files_of(store), scratch / "lake" / store.name / "CURRENT")
    for day in Lake(settings).days(KEPT_TABLE) if root.is_dir() else ():
        found |= _pinned(root, scratch, lambda day=day: ("", [root / KEPT_TABLE / f"day={day}" / "part-0.parquet"]), None)
    return found


def _files_of(store: Store) -> tuple[str, list[Path]]:
    """The content of CURRENT, and the files of the version it names and of those before."""
    current = store.current()
    if current is None:
        return "", []
    folders = sorted(path for path in store.folder.glob("version=*/version.json") if path.parent.name <= f"version={current.version}")
    refunds = [current.refunds_path] if isinstance(current, OrdersVersion) and current.refunds else []
    return json.dumps({"version": current.version}) + "\n", [*folders, current.path, *refunds]


def _own_files(settings: Settings, scratch: Path) -> dict[str, Path]:
    """Copies, not links: somebody may be editing them."""
    found: dict[str, Path] = {}
    for name in OWN_FILES if settings.source else OWN_FILES[1:]:
        file = getattr(settings, name)
        if file and file.is_file():
            copy = scratch / "own" / f"{name}{file.suffix}"
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
            found[f"own/{copy.name}"] = copy
    return found


def _pinned(root: Path, scratch: Path, look: Callable[[], tuple[str, list[Path]]], pointer: Path | None) -> dict[str, Path]:
    """Looks, and holds on to what was seen; looks again where an ingest removed a file in between."""
    for left in reversed(range(TRIES)):
        content, files = look()
        try:
            held = {f"lake/{path.relative_to(root).as_posix()}": _hold(path, scratch / "lake" / path.relative_to(root)) for path in files}
            break
        except FileNotFoundError:
            if not left:
                raise
    if pointer and content:
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.write_text(content)
        held[pointer.relative_to(scratch).as_posix()] = pointer
    return held


def _hold(path: Path, under: Path) -> Path:
    under.parent.mkdir(parents=True, exist_ok=True)
    under.unlink(missing_ok=True)
    try:
        os.link(path, under)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(path, under)
    return under


# -- reading a backup --------------------------------------------------------------------------------------------------


@contextmanager
def opened(file: Path) -> Iterator[tuple[tarfile.TarFile, dict[str, Any]]]:
    """A backup and its manifest. Raises RetentionOpsError where it is none, NewerSchema where this program does not know it."""
    with ExitStack() as open_files:
        with _whole(file):
            tar = open_files.enter_context(tarfile.open(file, "r:"))
            manifest = _manifest(tar)
            if manifest["format"] > FORMAT:
                raise NewerSchema(f"{file} has format {manifest['format']}; this program knows formats up to {FORMAT}")
            if absent := NEEDED - {*manifest, *manifest["files"]}:
                raise ValueError(f"its manifest lacks {', '.join(sorted(absent))}")
            for name in manifest["files"]:
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise ValueError(f"it names {name}")
        yield tar, manifest


@contextmanager
def _whole(file: Path | str) -> Iterator[None]:
    """Around reading a backup, and around nothing else: what goes wrong later is no fault of the file."""
    try:
        yield
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise RetentionOpsError(f"{file} is no backup of retention-ops, or not a whole one ({error}); nothing was changed") from error


def _manifest(tar: tarfile.TarFile) -> dict[str, Any]:
    first = tar.next()
    content = tar.extractfile(first) if first is not None and first.name == MANIFEST else None
    if content is None:
        raise ValueError("it does not begin with its manifest")
    return json.loads(content.read())


def _checked(tar: tarfile.TarFile, name: str, manifest: Mapping[str, Any], into: Path | None) -> None:
    """Copies one file out, proving its sha256; with `into` None it only proves."""
    with _whole(tar.name):
        entry, digest = manifest["files"][name], hashlib.sha256()
        content = tar.extractfile(tar.getmember(name))
        with open(into, "wb") if into else open(os.devnull, "wb") as copy:
            while content and (piece := content.read(1 << 20)):
                digest.update(piece)
                copy.write(piece)
        if digest.hexdigest() != entry["sha256"]:
            raise ValueError(f"{name} differs from its manifest")


# -- restore -----------------------------------------------------------------------------------------------------------


def occupied(settings: Settings) -> list[str]:
    """What a home holds that a restore would replace."""
    return [name for name in STATE if (path := settings.home / name).is_file() or (path.is_dir() and any(path.iterdir()))]


def restore(
    file: Path, settings: Settings, *, force: bool = False, clock: Clock = system_clock, say: Say = lambda text: None,
) -> Restored:
    """Puts a backup in place as `settings.home` and its ops database; every hash is proven first.

    All is built beside the home and put in place by rename; another ops database by URL changes in one transaction before that. Killed at
    any moment, the home is the old one, the new one, or, between two renames, absent with the old one beside it; the same command goes
    on. `force` moves what is there aside, it deletes nothing. The ledger is held at shadow until it is reconciled.
    """
    home = settings.home.absolute()
    if not force and (there := occupied(settings)):
        raise RetentionOpsError(f"{settings.home} is not empty ({', '.join(there)}); choose another home with --into, or say --force: "
                                "what is there is moved aside, nothing is deleted")
    if ui_runs(settings):
        raise RetentionOpsError(f"`retention-ops ui` runs on {settings.home}; stop it first")
    backup_sha = _sha256(file)
    with scratch_folder(home.parent, f".{home.name}.restoring-") as scratch, opened(file) as (tar, manifest):
        os.chmod(scratch, 0o700)
        check_known(manifest["ops_schema"], f"the ops database in {file}")
        if manifest["lake_schema"] > LAKE_SCHEMA:
            raise NewerSchema(f"the lake in {file} has schema {manifest['lake_schema']}; this program knows schemas up to {LAKE_SCHEMA}")
        say("proving every file")
        for name in manifest["files"]:
            (scratch / "files" / name).parent.mkdir(parents=True, exist_ok=True)
            _checked(tar, name, manifest, scratch / "files" / name)
        state = hold.Restored(datetime.fromisoformat(manifest["created_at"]), clock(), backup_sha)
        fresh = _new_home(scratch, home, manifest)
        say("restoring the ops database")
        if settings.ops_database_url:  # it lies outside the home
            _into_database(settings, scratch / "files" / "ops", manifest, state, force)
        else:
            _into_database(settings.model_copy(update={"home": fresh}), scratch / "files" / "ops", manifest, state, False)
        _fsync_all(fresh)
        moved = _swap(fresh, home, state.restored_at)
        then = json.loads((scratch / "files" / SETTINGS_FILE).read_text(encoding="utf-8"))
    Lake(settings).refresh_views()
    now = settings.recorded()
    differs = {name: (then.get(name), now.get(name)) for name in sorted({*then, *now}) if then.get(name) != now.get(name)}
    return Restored(settings.home, manifest, moved, differs)


def _new_home(scratch: Path, home: Path, manifest: Mapping[str, Any]) -> Path:
    """The home to be: lake, settings as they were, and Dagster's configuration as it is here."""
    fresh = scratch / "home"
    fresh.mkdir()
    files = scratch / "files"
    if (files / "lake").is_dir():
        shutil.move(files / "lake", fresh / "lake")
        if manifest["lake_schema"] > 1:
            (fresh / "lake" / LAKE_FILE).write_text(json.dumps({"schema": manifest["lake_schema"]}) + "\n")
    shutil.copyfile(files / SETTINGS_FILE, fresh / "settings_of_backup.json")
    if (files / "own").is_dir():
        shutil.move(files / "own", fresh / FILES_OF_BACKUP)
    if (files / "home" / VERDICT).is_file():
        shutil.copyfile(files / "home" / VERDICT, fresh / VERDICT)
    for name in ("dagster.yaml", ".dagster.yaml.sha256"):
        if (home / "dagster" / name).is_file():
            (fresh / "dagster").mkdir(exist_ok=True)
            shutil.copyfile(home / "dagster" / name, fresh / "dagster" / name)
    return fresh


def _into_database(settings: Settings, folder: Path, manifest: Mapping[str, Any], state: hold.Restored, force: bool) -> None:
    """Fills an empty ops database in one transaction, brings it up to date and holds it."""
    engine = open_engine(settings)
    try:
        with engine.begin() as connection:
            known = _tables(connection)
            if known and _is_of(connection, state):
                return  # an earlier try was killed after this step
            if known and any(connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() for table in known):
                where = engine.url.render_as_string(hide_password=True)
                if not force:
                    raise RetentionOpsError(f"the ops database {where} is not empty; say --force: its tables are moved aside, nothing is "
                                            "deleted")
            if known:
                _move_aside(connection, known, state.restored_at)
            if manifest["ops_schema"]:
                migrate(connection, manifest["ops_schema"])
                for table in _tables(connection):
                    _insert(connection, table, folder / f"{table.name}.jsonl")
            migrate(connection)
            hold.write_restored(connection, state, "retention-ops restore", f"backup of {manifest['created_at']}", state.restored_at)
    finally:
        engine.dispose()


def _is_of(connection: Connection, state: hold.Restored) -> bool:
    """Whether this very backup was restored here already; until it is reconciled it is held."""
    if not sa.inspect(connection).has_table("response_state"):
        return False
    found = hold.restored(connection)
    return found is not None and found.backup_sha256 == state.backup_sha256 and found.reconciled_at is None


def _move_aside(connection: Connection, known: list[sa.Table], now: datetime) -> None:
    """Gives the tables of a database that is replaced other names."""
    aside = f"before_restore_{now:%Y%m%dt%H%M%S}"
    names = [*(table.name for table in known), "alembic_version"]
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text(f"CREATE SCHEMA {aside}"))
        for name in names:
            connection.execute(sa.text(f"ALTER TABLE {name} SET SCHEMA {aside}"))
        refusals = sa.text("SELECT p.proname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace "
                           "WHERE n.nspname = current_schema() AND p.proname = ANY(:names)")
        for name in connection.execute(refusals, {"names": [f"{table.name}_refuse" for table in known]}).scalars().all():
            connection.execute(sa.text(f"ALTER FUNCTION {name}() SET SCHEMA {aside}"))
        return
    raise RetentionOpsError("an SQLite ops database outside the home is not replaced: move the file away and restore again")


def _insert(connection: Connection, table: sa.Table, file: Path) -> None:
    if not file.is_file():
        return
    read = {column.name: _reader(column.type) for column in table.columns}
    batch: list[dict[str, Any]] = []
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            batch.append({name: read[name](value) if value is not None else None for name, value in json.loads(line).items()})
            if len(batch) == INSERT_ROWS:
                connection.execute(table.insert(), batch)
                batch = []
    if batch:
        connection.execute(table.insert(), batch)
    if connection.dialect.name == "postgresql":
        for column in table.primary_key.columns:
            if isinstance(column.type, sa.Integer):
                sequence = f"pg_get_serial_sequence('{table.name}', '{column.name}')"
                newest = f"SELECT MAX({column.name}) FROM {table.name}"
                connection.execute(sa.text(
                    f"SELECT setval({sequence}, ({newest})) WHERE {sequence} IS NOT NULL AND EXISTS (SELECT 1 FROM {table.name})"))


def _reader(kind: sa.types.TypeEngine) -> Callable[[Any], Any]:
    if isinstance(kind, sa.DateTime):
        return datetime.fromisoformat
    return date.fromisoformat if isinstance(kind, sa.Date) else lambda value: value


def _fsync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fsync_file(path)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        fsync_folder(path)


def _swap(fresh: Path, home: Path, now: datetime) -> Path | None:
    """Puts the new home in place; what was there is moved aside.

    Between the two renames there is no home (to exchange them at once is not to be had from Python, nor on every file system).
    """
    moved = None
    if home.is_dir() and any(home.iterdir()):
        moved = home.with_name(f"{home.name}.before-restore-{now:%Y%m%dT%H%M%S}")
        os.rename(home, moved)
    os.rename(fresh, home)  # onto nothing, or onto an empty folder
    fsync_folder(home.parent)
    return moved
