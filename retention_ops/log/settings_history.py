"""Which settings were in force when: each set by its hash, with the moment it was first seen. Append-only, without secrets."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from retention_ops.log.database import settings_history
from retention_ops.log.exposures import insert_once
from retention_ops.settings import Settings


def record(engine: Engine, settings: Settings, now: datetime) -> str:
    """Keeps the settings in force where they are new; returns their hash."""
    sha = settings.settings_sha256()
    with engine.connect() as connection:
        if connection.execute(sa.select(settings_history.c.first_seen).filter_by(settings_sha256=sha)).first():
            return sha
    with engine.begin() as connection:
        connection.execute(insert_once(connection, settings_history).values(
            settings_sha256=sha, first_seen=now, values=settings.recorded()))
    return sha


def every(engine: Engine) -> dict[str, dict[str, Any]]:
    """hash -> name -> value of all recorded settings, oldest first."""
    query = sa.select(settings_history.c.settings_sha256, settings_history.c["values"]).order_by(settings_history.c.first_seen)
    with engine.connect() as connection:
        return dict(connection.execute(query).tuples().all())
