"""Files that are either whole or absent: temp name, fsync, rename; and locks between processes, which end with the process."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync_file(path: Path) -> None:
    """Makes the content of a file that was closed survive a power cut."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def fsync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yields a temp path beside `path`; on success it is fsynced and takes the name `path`, else it is removed.

    The temp name starts with .NAME. and ends in .partial, which no reader's pattern matches.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        yield partial
        os.chmod(partial, mode)
        fsync_file(partial)
        os.replace(partial, path)
        fsync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str, mode: int = 0o644) -> None:
    """Replaces `path` by `content`; at any moment a reader sees the old file or the new one."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path, mode) as partial:
        partial.write_bytes(data)


@contextmanager
def locked(path: Path, before_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`; calls `before_waiting` once where another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        if not _lock_now(handle.fileno()):
            before_waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder under `parent`, removed in the end, and with it the folders of that prefix whose process was killed.

    The folder itself is locked while it is in use, so that one left behind can be told from one that is busy.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{prefix}*"):
        with _locked_if_free(leftover) as free:
            if free:
                shutil.rmtree(leftover, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with _locked_if_free(folder) as ours:
            # another process may have taken it for a leftover between the two calls
            if ours and folder.is_dir():
                try:
                    yield folder
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                return


@contextmanager
def _locked_if_free(folder: Path) -> Iterator[bool]:
    """Holds a folder's own lock without waiting for it; false when another process has it or the folder is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield _lock_now(handle)
    finally:
        os.close(handle)


def _lock_now(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def clear_abandoned(home: Path) -> int:
    """Removes what killed processes left under `home`: half-written files, scratch folders, what DuckDB spilled; returns how many.

    What a living process of this machine writes stays. A spilled file that is still open lives on without its name.
    """
    left = [path for path in home.rglob(".*.partial") if not _writer_lives(path.name)]
    for path in left:
        path.unlink(missing_ok=True)
    removed = len(left)
    for path in (home / "tmp").glob("*"):
        if path.is_dir():
            with _locked_if_free(path) as free:
                if free:
                    shutil.rmtree(path, ignore_errors=True)
                    removed += 1
        elif path.name.startswith("duckdb_temp"):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _writer_lives(name: str) -> bool:
    """Whether the process that a half-written file names is there: .NAME.PROCESS-TOKEN.partial, as `replacing` has it."""
    process = name.removesuffix(".partial").rpartition(".")[2].partition("-")[0]
    if not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return int(process) != os.getpid()
