"""Who is missing: the customers behind a shortfall, the most valuable first, and which part of the customers carries it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from retention_ops.detect.compute import Workspace

NAMED = 200
"""more than any brief shows: some of them may not be named"""
TELLING_SCORE = 2.0
"""a slice is named where its own shortfall stands out of its noise by so much, and more of its customers are missing than elsewhere"""


@dataclass(frozen=True)
class Missing:
    """`top` are due_customers rows of NAMED overdue customers, the highest value_due first; `slices` all rows of shortfall_slices."""

    overdue: int
    """customers who were due, did not come and are silent for longer than their usual gap"""
    value_due: float
    """what usual orders of all of them, times the chance of each, would have brought, currency units"""
    top: list[dict[str, Any]]
    slices: list[dict[str, Any]]

    def carried_by(self) -> dict[str, Any] | None:
        """The slice that explains the shortfall best: of those that fall short by more than the rest of their attribute, the one with
        the highest score. None where nothing stands out: everybody stays away alike."""
        telling = []
        for part in self.slices:
            rest = [other for other in self.slices if other["attribute"] == part["attribute"] and other is not part]
            expected, observed = sum(other["expected"] for other in rest), sum(other["observed"] for other in rest)
            short = part["missing"] / part["expected"] if part["expected"] else 0.0
            elsewhere = 1 - observed / expected if expected else None
            if elsewhere is not None and (part["score"] or 0) >= TELLING_SCORE and short > max(2 * elsewhere, elsewhere + 0.1):
                telling.append(part)
        return max(telling, key=lambda part: part["score"], default=None)


def who_is_missing(space: Workspace, day: date, row: Mapping[str, Any]) -> Missing | None:
    """What is behind the shortfall `row` of D; None where the rule expects nobody.

    alert_logic of a range with D in it has been built in `space`.
    """
    if row["expected"] is None:
        return None
    space.build_missing(day, int(row["window_days"]))
    count, value = space.connection.execute("SELECT COUNT(*), SUM(value_due) FROM due_customers WHERE is_overdue").fetchall()[0]
    top = _rows(space, ("customer_id", "chance", "days_since_last_order", "usual_gap_days", "total_orders", "avg_order_value", "value_due"),
                f"due_customers WHERE is_overdue ORDER BY value_due DESC, customer_id LIMIT {NAMED}")
    slices = _rows(space, ("attribute", "value", "customers", "expected", "observed", "missing", "score"),
                   "shortfall_slices ORDER BY missing DESC, attribute, value")
    return Missing(count, round(value or 0.0, 2), top, slices)


def _rows(space: Workspace, columns: Sequence[str], source: str) -> list[dict[str, Any]]:
    found = space.connection.execute(f"SELECT {', '.join(columns)} FROM {source}").fetchall()
    return [dict(zip(columns, row, strict=True)) for row in found]
