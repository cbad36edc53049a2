"""Worksheets of ours that must go: because they are old, or because a customer on them was forgotten.

Each is an action of the ledger like any other, so the trail says what was deleted, when and why; deleting twice changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Engine

from retention_ops.execute import ledger
from retention_ops.execute.destinations.choice import EXPORT_SLOT, WITHDRAW, WITHDRAWAL_SLOT
from retention_ops.execute.ledger import Intent

EXPIRED, ERASED = "sheets_keep_days", "erased on request"


def published(engine: Engine) -> list[ledger.Row]:
    """Actions that put worksheets into a spreadsheet, or may have."""
    rows = ledger.find(engine, destination="sheets", slot=("sheets", EXPORT_SLOT), kind="publish")
    return [row for row in rows if row["attempts"] and row["state"] != ledger.CANCELLED]


def expired(engine: Engine, oldest: datetime) -> list[Intent]:
    """What withdraws every publish of before `oldest` that was not withdrawn yet."""
    gone = {row["payload"]["key"] for row in ledger.find(engine, slot=WITHDRAWAL_SLOT) if row["payload"]["why"] == EXPIRED}
    return [withdrawal(row, EXPIRED) for row in published(engine)
            if row["state"] == ledger.SENT and row["last_attempt_at"] < oldest and row["key"] not in gone]


def withdrawal(row: Mapping[str, Any], why: str, tiers: Collection[str] = ("P1", "P2", "P3")) -> Intent:
    """Deletes the worksheets of one publish that hold these tiers."""
    published = row["payload"]["worksheets"]
    sheets = [{"title": sheet["title"], "gid": _gid(row, sheet["title"])} for sheet in published if sheet["tier"] in tiers]
    return Intent(
        identity=f"withdraw:{row['key']}", slot=WITHDRAWAL_SLOT, destination=row["destination"], kind=WITHDRAW, target=row["target"],
        payload={"key": row["key"], "worksheets": sheets, "why": why}, alert_date=row["alert_date"], mode=row["mode"],
        part=f"{why}:{','.join(sheet['title'] for sheet in sheets)}", incident_id=row["incident_id"],
    )


def _gid(row: Mapping[str, Any], title: str) -> int | None:
    """The worksheet's number, from the link that the publish brought back."""
    found = re.search(r"#gid=(\d+)$", (row["detail"] or {}).get("links", {}).get(title, ""))
    return int(found[1]) if found else None
