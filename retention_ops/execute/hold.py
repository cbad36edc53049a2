"""Why answers are only rehearsed although the mode says more: a restored ledger nobody has reconciled, or an upgrade under way.

The state stands in the ops database, so every process on it obeys, also one that was started before. While it stands, responses
run in shadow and nothing leaves through the door; detection and packs go on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from retention_ops.log.database import ops_events, response_state

RESTORED, UPGRADING = "restored", "upgrading"
"""names in response_state"""
YES, NO = "yes", "no"


@dataclass(frozen=True)
class Restored:
    """Where the ledger comes from. What the lost installation did between the two moments is not in it."""

    backup_at: datetime
    restored_at: datetime
    backup_sha256: str
    reconciled_at: datetime | None = None
    through: date | None = None
    """the last alert date the lost installation can have answered, where a person said so"""

    def concerns(self, alert_date: date) -> bool:
        """Whether the lost installation may have acted on this date. A day more than the calendar says, whatever the time zone."""
        return alert_date <= self.restored_at.date() + timedelta(days=1)


def restored(connection: Connection) -> Restored | None:
    """What was restored last, or None for a ledger that never was."""
    text = connection.execute(sa.select(response_state.c.value).where(response_state.c.name == RESTORED)).scalar()
    if text is None:
        return None
    values = json.loads(text)
    names = ("backup_at", "restored_at", "reconciled_at")
    moments = {name: datetime.fromisoformat(values[name]) if values[name] else None for name in names}
    through = date.fromisoformat(values["through"]) if values["through"] else None
    return Restored(**{**values, **moments, "through": through})


def write_restored(connection: Connection, state: Restored, who: str, why: str, now: datetime) -> None:
    """Records a restore, or that it was reconciled, and tells it in the append-only story."""
    values = {name: value.isoformat() if isinstance(value, date) else value for name, value in asdict(state).items()}
    _put(connection, RESTORED, json.dumps(values), who, why, now)


def set_upgrading(connection: Connection, under_way: bool, why: str, now: datetime) -> None:
    _put(connection, UPGRADING, YES if under_way else NO, "retention-ops upgrade", why, now)


def _put(connection: Connection, name: str, value: str, who: str, why: str, now: datetime) -> None:
    connection.execute(response_state.delete().where(response_state.c.name == name))
    connection.execute(response_state.insert().values(name=name, value=value, by=who, why=why, at=now))
    connection.execute(ops_events.insert().values(at=now, event=name, actor=who, detail=why[:2000]))


def why_held(engine: Engine) -> str:
    """Why nothing may leave now, with the cure, or nothing."""
    with engine.connect() as connection:
        found = restored(connection)
        upgrading = connection.execute(sa.select(response_state).where(response_state.c.name == UPGRADING)).mappings().first()
    if found and not found.reconciled_at:
        return (f"held at shadow: restored at {found.restored_at:%Y-%m-%d %H:%M} UTC from a backup of {found.backup_at:%Y-%m-%d %H:%M} UTC "
                "and not reconciled; `retention-ops actions reconcile` looks what went out since")
    if upgrading and upgrading["value"] == YES:
        return (f"held at shadow: an upgrade began at {upgrading['at']:%Y-%m-%d %H:%M} UTC; where it died, "
                "`retention-ops upgrade` ends it")
    return ""
