"""An alert as it was seen then and as it is computed now: what differs, and why. Reads what is stored; the caller brings the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import pandas as pd

from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.freshness import Changes
from retention_ops.warehouse.render import sql_sha256
from retention_ops.warehouse.seam import Warehouse

WORDS = ("sentence",)
"""columns that say what others measure"""
NAMED = {"retention_status_degradation": "AT_RISK %", "returning_customers_shortfall": "returning customers"}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Records:
    """What the ops database knows of a date. `settings_of` gives the settings by their hash, None where not recorded; `answers` are
    the date's rows of ops_runs_log, oldest first."""

    settings_of: Callable[[str], Mapping[str, Any] | None] = lambda sha: None
    answers: Sequence[Row] = field(default_factory=tuple)


def then_and_now(lake: Warehouse, day: date, now: pd.DataFrame, known: Records) -> tuple[dict[str, Any] | None, list[str]]:
    """What D's stored alert rows say beside the rows computed `now`, and what changed in between; None where nothing is stored.

    The facts have made_from, computed_at, differs {rule: {column: (then, now)}}, orders (later versions that reach back to D),
    settings {name: (then, now)} or None where not recorded, sql_changed.
    """
    answered = [_answer(row) for row in known.answers if row["status"] == "success"][:1]
    if not lake.exists("alert_logic", day):
        return None, [*answered, f"No alert of {day} is stored; this is how it is computed now."]
    made_from = lake.provenance("alert_logic", day)
    differs = differences(rows_of(lake.read("alert_logic", day)), rows_of(now))
    facts = {
        "computed_at": lake.computed_at("alert_logic", day), "made_from": made_from, "differs": differs,
        "orders": [version.version for version in later_orders(lake, made_from.get("orders_version", ""), day)],
        "settings": _settings(lake, made_from.get("settings_sha256"), known),
        "sql_changed": made_from.get("sql_sha256") != sql_sha256(),
    }
    return facts, [*answered, *_sentences(lake, day, facts)]


def rows_of(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """alert_type -> row, empty values as None."""
    return {row["alert_type"]: {name: None if pd.isna(value) else value for name, value in row.items()} for row in frame.to_dict("records")}


def differences(then: Mapping[str, Row], now: Mapping[str, Row]) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Rule -> column -> (then, now) of what is measured; words do not count."""
    columns = [name for name in TABLES["alert_logic"].column_names if name not in WORDS]
    found = {}
    for rule in sorted({*then, *now}):
        one, other = then.get(rule, {}), now.get(rule, {})
        changed = {name: (one.get(name), other.get(name)) for name in columns if not _same(one.get(name), other.get(name))}
        if changed:
            found[rule] = changed
    return found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return round(one, 9) == round(other, 9)
    return one == other


def later_orders(lake: Warehouse, version: str, day: date) -> list[Any]:
    """Versions after `version` that changed something on or before D."""
    return Changes(lake).after(version, day)


def _settings(lake: Warehouse, sha: str | None, known: Records) -> dict[str, tuple[Any, Any]] | None:
    """What differs from the settings then; {} where they are the same, None where nobody recorded them."""
    if sha == lake.settings.settings_sha256():
        return {}
    then = known.settings_of(sha) if sha else None
    if then is None:
        return None
    now = lake.settings.recorded()
    return {name: (then.get(name), now.get(name)) for name in sorted({*then, *now}) if then.get(name) != now.get(name)}


def _answer(row: Row) -> str:
    value = f", {row['current_value']:.2f} against {row['baseline_value']:.2f}" if row["current_value"] is not None else ""
    return (f"Answered {row['run_timestamp']:%Y-%m-%d %H:%M} UTC in mode {row['mode']}: {row['severity']} by "
            f"{NAMED.get(row['alert_type'], row['alert_type'])}{value}.")


def _sentences(lake: Warehouse, day: date, facts: Mapping[str, Any]) -> list[str]:
    seen = f"As seen then (computed {facts['computed_at']:%Y-%m-%d %H:%M} UTC from orders {facts['made_from'].get('orders_version', '?')})"
    if not facts["differs"]:
        said = [f"{seen} and as computed now the alert is the same."]
    else:
        said = [f"{seen} {NAMED.get(rule, rule)} differs: " + "; ".join(f"{name} was {_text(one)}, is {_text(other)}"
                for name, (one, other) in columns.items()) + "." for rule, columns in facts["differs"].items()]
    said += [
        f"Orders changed since: version {version.version} ({version.created_at:%Y-%m-%d}) reaches back to {version.stale_from}, "
        f"{version.added:,} added, {version.replaced:,} replaced, {version.removed:,} removed."
        for version in later_orders(lake, facts["made_from"].get("orders_version", ""), day)
    ]
    if facts["settings"]:
        said.append("Settings changed since: " + "; ".join(f"{name} {_text(one)} -> {_text(other)}"
                                                           for name, (one, other) in facts["settings"].items()) + ".")
    elif facts["settings"] is None:
        same = facts["made_from"].get("rules_sha256") == lake.settings.rules_sha256()
        said.append("The settings of then were not recorded; "
                    f"{'those of the rules are the same' if same else 'a setting of a rule differs'}.")
    if facts["sql_changed"]:
        said.append("The rules in sql/ are of another release than then.")
    if not facts["differs"] and len(said) == 1:
        said.append("Orders, settings and rules are those of then.")
    return said


def _text(value: Any) -> str:
    if value is None or value == "":
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
