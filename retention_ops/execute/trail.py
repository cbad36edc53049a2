"""How answers are shown outside the database: as tables, as a digest of history, as files in lake and packs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any

from sqlalchemy.engine import Engine

from retention_ops.log import runs
from retention_ops.package.pack import LOG_FILE, add_files, find_pack, plain
from retention_ops.warehouse.seam import Warehouse

SHOWN = ("alert_date", "severity", "status", "mode", "p1_count", "p2_count", "p3_count", "total_exported", "error_message")


def markdown(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = SHOWN) -> str:
    """Rows as a Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = ("" if row[name] is None else str(row[name]).replace("|", "\\|").replace("\n", " ") for name in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def digest_of(skipped: Sequence[Mapping[str, Any]]) -> str:
    """One message for any number of dates passed over."""
    days = [row["alert_date"] for row in skipped]
    span = f"{days[0]}" if len(days) == 1 else f"{len(days)} dates, {min(days)} to {max(days)}"
    table = markdown(skipped, ("alert_date", "severity", "status", "error_message"))
    return f"Not answered: {span}. Nothing was sent for them.\n\n{table}"


def publish_log(lake: Warehouse, engine: Engine, days: Sequence[date]) -> int:
    """Exports ops_runs_log to the lake and into the packs of `days`; returns its rows."""
    total = runs.export(engine, lake)
    by_day = runs.by_date(engine, min(days), max(days)) if days else {}
    for day in days:
        pack = find_pack(lake.settings, day)
        if pack and by_day.get(day):
            content = json.dumps([{name: plain(value) for name, value in row.items()} for row in by_day[day]], indent=1)
            add_files(pack, {LOG_FILE: (content.encode(), len(by_day[day]))})
    lake.refresh_views()
    return total
