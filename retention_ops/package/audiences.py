"""Audience files: the priority queue as lists that a person or a tool can work with.

One CSV per tier (RFC 4180, UTF-8, CRLF) in the column order of customer_priority. Text that a spreadsheet would run as
a formula is neutralised with a leading apostrophe; whoever re-imports such an id sees that apostrophe.
"""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from datetime import date
from typing import Any

import pandas as pd

from retention_ops.warehouse.catalog import TABLES

TIERS = ("P1", "P2", "P3")
COLUMNS = TABLES["customer_priority"].column_names
_DECIMALS = {"priority_score": 4, "total_revenue": 2, "avg_order_value": 2, "value_proxy": 2}
# OWASP's list of formula starters, with the full-width forms that spreadsheets also accept
_FORMULA_START = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


@dataclass(frozen=True)
class Audience:
    """One tier's list as handed over. `listed` counts the tier, `excluded` who was left out and why."""

    tier: str
    file: str
    csv: str
    rows: int
    listed: int
    excluded: dict[str, int]
    content_sha256: str
    """over the rows without created_at; the manifest's `files` has the hash of the file itself"""


def safe_text(value: str) -> str:
    """Text that no spreadsheet runs: NULs removed, formula starters prefixed by an apostrophe."""
    cleaned = value.replace("\x00", "")
    return f"'{cleaned}" if cleaned.startswith(_FORMULA_START) else cleaned


def _cell(name: str, value: Any) -> str:
    if value is None or value is pd.NaT or (isinstance(value, float) and value != value):
        return ""
    if name in _DECIMALS:
        return f"{value:.{_DECIMALS[name]}f}"
    if isinstance(value, pd.Timestamp):
        return value.strftime("%Y-%m-%d") if name == "run_date" else value.strftime("%Y-%m-%dT%H:%M:%SZ")
    return safe_text(value) if isinstance(value, str) else str(value)


def to_csv(rows: pd.DataFrame, columns: list[str]) -> str:
    """The rows as CSV text with a header."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(columns)
    cells = [[_cell(name, value) for value in rows[name].tolist()] for name in columns]
    writer.writerows(zip(*cells, strict=True))
    return buffer.getvalue()


def build_audience(tier: str, day: date, priority: pd.DataFrame, refused: set[str]) -> Audience:
    """The list of one tier, without customers in `refused` (ids known to have no consent)."""
    listed = priority[priority["priority_tier"] == tier]
    handed_over = listed[~listed["customer_id"].isin(refused)] if refused else listed
    left_out = len(listed) - len(handed_over)
    # created_at differs between two builds of the same list, so it is outside the hash
    fingerprint = to_csv(handed_over, [name for name in COLUMNS if name != "created_at"])
    return Audience(
        tier=tier,
        file=f"audience_{tier}_{day:%Y-%m-%d}.csv",
        csv=to_csv(handed_over, COLUMNS),
        rows=len(handed_over),
        listed=len(listed),
        excluded={"no consent": left_out} if left_out else {},
        content_sha256=hashlib.sha256(fingerprint.encode()).hexdigest(),
    )


def audience_sha256(audiences: dict[str, Audience]) -> str:
    """One hash over all lists as handed over; what an approval binds."""
    text = "\n".join(f"{tier}:{audiences[tier].content_sha256}" for tier in TIERS)
    return hashlib.sha256(text.encode()).hexdigest()
