"""Audience files: the priority queue as lists that a person or a tool can work with, and who is left off them.

One CSV per tier (RFC 4180, UTF-8, CRLF): what customer_priority says, whether and when a customer was handed over before, and
what is at stake. A new column comes last, so that whoever reads by position goes on reading what they read. Text that a
spreadsheet would run as a formula is neutralised with a leading apostrophe; whoever re-imports such an id sees that apostrophe.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from typing import Any

import pandas as pd

from retention_ops.errors import PackError
from retention_ops.settings import Settings

TIERS = ("P1", "P2", "P3")
# written out, not taken from the catalog: a column that customer_priority gains one day must not leave the house by itself
COLUMNS = [
    "run_date", "customer_id", "retention_status", "churn_risk_level", "churn_risk_score", "priority_tier", "priority_score",
    "priority_reason", "days_since_last_order", "total_revenue", "total_orders", "avg_order_value", "recommended_action",
    "value_proxy", "created_at", "new_since_handover", "last_handed_over", "usual_spend_90d", "p_no_return_90d", "spend_at_stake",
    "at_stake_reason",
]
ALLOWED_COLUMNS: dict[str, tuple[str, ...]] = {
    "sheets": tuple(COLUMNS), "local": tuple(COLUMNS), "webhook": (), "slack": (), "ticket": (), "mail": (),
}
"""destination -> what it may be told about one customer; most get counts and links only"""
NO_CONSENT, SUPPRESSED, HOLDOUT = "no consent", "suppressed", "holdout"
HandedOver = Mapping[str, date]
"""customer_id -> newest alert date for which the customer was on a list that left"""
_DECIMALS = {
    "priority_score": 4, "total_revenue": 2, "avg_order_value": 2, "value_proxy": 2, "usual_spend_90d": 2, "p_no_return_90d": 4,
    "spend_at_stake": 2,
}
# OWASP's list of formula starters, with the full-width forms that spreadsheets also accept
_FORMULA_START = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


# --- who is left off -----------------------------------------------------------------------------------------------------


def in_holdout(customer_id: str, pct: float, salt: str) -> bool:
    """Whether a customer is in the holdout of `pct` %: by a keyed hash of the id alone, so always the same people for one salt.

    A larger `pct` keeps everybody who was in and adds others; another `salt` draws afresh.
    """
    draw = int.from_bytes(hmac.digest(salt.encode(), customer_id.encode(), "sha256")[:8], "big")
    return draw * 100 < pct * 2**64


def holdout_pct(settings: Settings) -> int:
    """The share held out in the mode in force, in %: nobody is kept from a rehearsal or a pilot."""
    return settings.holdout_pct if settings.mode == "live" else 0


def arm(customer_id: str, settings: Settings) -> str:
    """'holdout' or 'treated', under the settings in force."""
    return "holdout" if in_holdout(customer_id, holdout_pct(settings), settings.holdout_salt) else "treated"


def cooldown_reason(days: int) -> str:
    """How the cooldown is called where it is counted."""
    return f"handed over in the last {days} days" if days > 1 else "handed over the day before"


@dataclass(frozen=True)
class LeftOut:
    """Who is left off the lists of a date D. Reasons are asked in the order of the fields; the first one counts.

    `suppressed` are those under a suppression in force on D. `handed_over` may name dates from D on: those never count, so the
    lists of D stay as they are when D itself, or a later date, was handed over.
    """

    refused: Set[str] = frozenset()
    suppressed: Set[str] = frozenset()
    holdout_pct: float = 0
    holdout_salt: str = ""
    handed_over: HandedOver = field(default_factory=dict)
    cooldown_days: int = 0

    def last_handed_over(self, customer_id: str, day: date) -> date | None:
        """The newest alert date before `day` for which the customer was handed over."""
        last = self.handed_over.get(customer_id)
        return last if last is not None and last < day else None

    def reason(self, customer_id: str, day: date) -> str | None:
        """Why the customer is left off the lists of `day`; None: is on them."""
        if customer_id in self.refused:
            return NO_CONSENT
        if customer_id in self.suppressed:
            return SUPPRESSED
        if in_holdout(customer_id, self.holdout_pct, self.holdout_salt):
            return HOLDOUT
        last = self.last_handed_over(customer_id, day)
        if last is not None and last >= day - timedelta(days=self.cooldown_days):
            return cooldown_reason(self.cooldown_days)
        return None


# --- lists ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audience:
    """One tier's list as handed over. `listed` counts the tier, `excluded` who was left out, by reason in the order asked."""

    tier: str
    file: str
    rows: int
    listed: int
    excluded: dict[str, int]
    new: int
    """rows of customers who were never handed over before"""
    treated_ids: tuple[str, ...]
    """customers on the list, in its order"""
    holdout_ids: tuple[str, ...]
    """customers who would be on it (or cooling down) if they were not held out; for measuring, not for handing to anybody"""
    content_sha256: str
    """over the rows without created_at; the manifest's `files` has the hash of the file itself"""
    table: pd.DataFrame = field(compare=False, repr=False)
    """the rows, in COLUMNS"""
    queue: tuple[str, ...] = field(compare=False, repr=False, default=())
    """everybody of the tier, on the list or not, in its order"""

    def first(self, limit: int) -> Audience:
        """The list cut to its first `limit` rows; of those held out, the ones who would have stood among them."""
        if limit >= self.rows:
            return self
        table = self.table.head(limit)
        before = set(self.queue[: self.queue.index(table["customer_id"].iloc[-1]) + 1])
        return replace(
            self, rows=limit, table=table, treated_ids=self.treated_ids[:limit], new=int(table["new_since_handover"].sum()),
            holdout_ids=tuple(customer_id for customer_id in self.holdout_ids if customer_id in before),
            content_sha256=_fingerprint(table),
        )

    @property
    def csv(self) -> str:
        """The rows as the text of `file`; made when asked for, since many only want to know who is listed."""
        return to_csv(self.table, COLUMNS)


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
    if isinstance(value, bool):
        return "true" if value else "false"
    return safe_text(value) if isinstance(value, str) else str(value)


def to_csv(rows: pd.DataFrame, columns: list[str]) -> str:
    """The rows as CSV text with a header."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(columns)
    cells = [[_cell(name, value) for value in rows[name].tolist()] for name in columns]
    writer.writerows(zip(*cells, strict=True))
    return buffer.getvalue()


def build_audience(tier: str, day: date, priority: pd.DataFrame, left_out: LeftOut) -> Audience:
    """The list of one tier for `day`, from rows of customer_priority in the queue's order."""
    listed = priority[priority["priority_tier"] == tier]
    ids = listed["customer_id"].tolist()
    reasons = [left_out.reason(customer_id, day) for customer_id in ids]
    kept = listed[pd.Series([reason is None for reason in reasons], index=listed.index, dtype=bool)]
    before = [left_out.last_handed_over(customer_id, day) for customer_id in kept["customer_id"]]
    table = kept.assign(
        new_since_handover=pd.Series([last is None for last in before], index=kept.index, dtype=bool),
        last_handed_over=pd.Series(before, index=kept.index, dtype=object),  # None stays None, not NaT
    )[COLUMNS]
    counts = Counter(reasons)
    order = (NO_CONSENT, SUPPRESSED, HOLDOUT, cooldown_reason(left_out.cooldown_days))
    return Audience(
        tier=tier,
        file=f"audience_{tier}_{day:%Y-%m-%d}.csv",
        rows=len(table),
        listed=len(listed),
        excluded={reason: counts[reason] for reason in order if counts[reason]},
        new=before.count(None),
        treated_ids=tuple(table["customer_id"]),
        holdout_ids=tuple(customer_id for customer_id, reason in zip(ids, reasons, strict=True) if reason == HOLDOUT),
        content_sha256=_fingerprint(table),
        table=table,
        queue=tuple(ids),
    )


def _fingerprint(table: pd.DataFrame) -> str:
    # created_at differs between two builds of the same list, so it is outside the hash
    return hashlib.sha256(to_csv(table, [name for name in COLUMNS if name != "created_at"]).encode()).hexdigest()


def build_audiences(day: date, priority: pd.DataFrame, left_out: LeftOut) -> dict[str, Audience]:
    """The lists of all tiers for `day`."""
    return {tier: build_audience(tier, day, priority, left_out) for tier in TIERS}


def allowed_table(audience: Audience, destination: str) -> tuple[list[str], list[list[str | int | float]]]:
    """(header, rows) of what `destination` may be told about single customers; both empty where that is nothing.

    Cells are numbers, or text as in the CSV: neutralised, dates as YYYY-MM-DD, missing values empty. Raises PackError for a
    destination without a column list: what nobody allowed does not leave.
    """
    if destination not in ALLOWED_COLUMNS:
        raise PackError(f"destination {destination!r} has no list of allowed columns (ALLOWED_COLUMNS); nothing is handed to it")
    names = list(ALLOWED_COLUMNS[destination])
    if not names:
        return [], []
    columns = [[_typed_cell(name, value) for value in audience.table[name].tolist()] for name in names]
    return names, [list(row) for row in zip(*columns, strict=True)]


def _typed_cell(name: str, value: Any) -> str | int | float:
    """A cell for a tool that knows numbers; the same number as in the CSV."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return round(value, _DECIMALS[name]) if name in _DECIMALS else value
    return _cell(name, value)


def audience_sha256(audiences: dict[str, Audience]) -> str:
    """One hash over all lists as handed over; what an approval binds."""
    text = "\n".join(f"{tier}:{audiences[tier].content_sha256}" for tier in TIERS)
    return hashlib.sha256(text.encode()).hexdigest()
