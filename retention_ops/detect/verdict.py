"""Whether the learned model is used: only with return_model=learned, and only where a backtest of this home found it better than the table.

The verdict is a file of the home, so that every run, and every rebuild, decides alike until the next backtest.
"""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

from retention_ops.errors import RetentionOpsError
from retention_ops.settings import Settings
from retention_ops.warehouse.files import write_atomic

FILE = "return_model.json"
MODEL = 1
"""goes up when detect/learned.py would tell something else of the same orders"""


def record(settings: Settings, result: dict[str, Any]) -> None:
    """Keeps what `backtest targeting --model` found; `result` as detect.targeting.targeting gives it."""
    found = result["model"]
    write_atomic(settings.home / FILE, json.dumps({
        "model": MODEL, "beats_table": found["beats_table"], "enough_history": found["enough_history"], "points": found["against_table"],
        "dates": result["dates"], "orders_version": result["orders"]["version"],
        "complete_through": result["orders"]["complete_through"],
    }, indent=1, default=str))


def verdict(settings: Settings) -> dict[str, Any] | None:
    """What the last such backtest found; None where there was none. Raises RetentionOpsError where the file cannot be read."""
    file = settings.home / FILE
    try:
        found = json.loads(file.read_text()) if file.is_file() else None
        return found if found and found["model"] == MODEL and isinstance(found["beats_table"], bool) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RetentionOpsError(f"{file} cannot be read: run `retention-ops backtest targeting --model` again, or delete it") from error


def verdict_in_use(settings: Settings) -> dict[str, Any] | None:
    """The verdict by which the learned model is used; None where the table is."""
    found = verdict(settings) if settings.return_model == "learned" else None
    return found if found and found["beats_table"] else None


def learned_identity(settings: Settings) -> dict[str, Any]:
    """What of the model the rows depend on: part of rules_sha256. Empty where the table is used."""
    return {"learned": [MODEL, sklearn_version()]} if verdict_in_use(settings) else {}


def sklearn_version() -> str:
    """Another version may fit other trees; "" where there is none."""
    try:
        return metadata.version("scikit-learn")
    except metadata.PackageNotFoundError:
        return ""


def state(settings: Settings) -> tuple[bool | None, str]:
    """(fine, a sentence) for `doctor`: what p_no_return_90d comes from, and why."""
    if settings.return_model == "table":
        return True, "p_no_return_90d from the table return_rates"
    found = verdict(settings)
    if found is None:
        return None, "return_model=learned, but no backtest compared it: the table is used"
    when = f"the backtest of {found['dates']['count']} dates to {found['dates']['to']}"
    if not found["beats_table"]:
        short = "" if found["enough_history"] else ", on less than a year"
        return None, f"return_model=learned, but {when} did not find it better than the table{short}: the table is used"
    if not sklearn_version():
        return False, f"{when} found the learned model better, but scikit-learn is not installed here: the queue cannot be computed"
    return True, f"p_no_return_90d from the learned model: {100 * found['points']['mean']:.1f} points more of lost spend by {when}"
