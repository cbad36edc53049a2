"""Which installation this is: a name kept in its home, so that nobody asks another home's Dagster by mistake."""

from __future__ import annotations

import os
from contextlib import suppress
from uuid import uuid4

from retention_ops.settings import Settings

FILE = ".installation"
METADATA = "retention_ops/installation"
"""under which the code location shows it"""


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
