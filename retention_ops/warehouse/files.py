"""Files that are either whole or absent: temp name, fsync, rename, and locks between processes."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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

    The temp name ends in .partial, which no reader's pattern matches.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        yield partial
        os.chmod(partial, mode)
        with open(partial, "rb") as handle:
            os.fsync(handle.fileno())
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
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`; the system drops it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
