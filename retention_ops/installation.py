"""Which installation this is, by a name kept in its home, so that nobody asks another home's Dagster by mistake; and what it has."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from uuid import uuid4

from retention_ops.settings import Settings

FILE = ".installation"
METADATA = "retention_ops/installation"
"""under which the code location shows it"""


def ui_runs(settings: Settings) -> bool:
    """Whether `retention-ops ui` runs on this home and this machine, by its lock."""
    with suppress(FileNotFoundError):
        held = os.open(settings.home / "dagster" / ".ui.lock", os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(held)
    return False


def has_database(settings: Settings) -> bool:
    """Whether there is an ops database to ask."""
    return bool(settings.ops_database_url) or (settings.home / "ops.sqlite").exists()


def installation(settings: Settings) -> str:
    """32 hex digits, drawn once per home; a copy of the home keeps the name."""
    path = settings.home / FILE
    with suppress(FileNotFoundError):
        return path.read_text()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{FILE}.{os.getpid()}.{uuid4().hex[:8]}")
    draft.write_text(uuid4().hex)
    with suppress(FileExistsError):  # somebody drew first: theirs counts
        os.link(draft, path)
    draft.unlink()
    return path.read_text()
