"""The brief: what a CRM manager reads at 8 am to decide in a minute, as Markdown, Slack message and mail.

This module computes every number that is shown (`_view`) and guards the three formats: escaping, Slack's limits, errors
that name template and line. The words are in templates/words.j2, the layout in one template per format; both can be
overridden from `settings.templates_dir` (how: first comment in templates/base.j2). Nothing here reads a clock or a table.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import (
    ChoiceLoader,
    Environment,
    FileSystemLoader,
    PrefixLoader,
    StrictUndefined,
    Template,
    TemplateNotFound,
    TemplateSyntaxError,
    nodes,
)
from markupsafe import Markup, escape

from retention_ops.detect.alerts import AT_RISK, SHORTFALL, row_of
from retention_ops.detect.missing import Missing
from retention_ops.errors import PackError
from retention_ops.package.audiences import HOLDOUT
from retention_ops.package.stakes import Stake, knows_season
from retention_ops.settings import TRIAL, Settings

SHIPPED_TEMPLATES = Path(__file__).parent / "templates"
CHART_FILE = "at_risk_trend.png"
RETURNING_FILE = "returning_customers.png"
CHART_FILES = (CHART_FILE, RETURNING_FILE)
TIERS = ("P1", "P2", "P3")


@dataclass(frozen=True)
class BriefFacts:
    """Everything a brief may show; whatever is not in here is not in the brief.

    Percentages are 0..100, money is in units of `currency`, counts are customers. `alert`, `daily`, `history` and `top` hold
    rows with the columns of warehouse/catalog.py, None where null.
    """

    alert: dict[str, Any]
    """the alert of the reference date D (detect/alerts.py): the alert_logic row that leads, the others under 'others'"""
    daily: dict[str, Any]
    """the retention_daily row of D"""
    history: list[dict[str, Any]]
    """the first rule's alert_logic rows of the trend window, oldest first, ending at D; may be short, its values None in warm-up"""
    shortfalls: list[dict[str, Any]]
    """the rows of the second rule likewise"""
    flagged: set[date]
    """days of the window that a rule in charge flags"""
    missing: Missing | None
    """who is behind a flagged shortfall (detect/missing.py); `top` holds only customers who may be contacted"""
    newly_at_risk: dict[str, int] | None
    """those who became AT_RISK in the 7 days up to D: {'customers': n, 'on_p2': in the tier P2, 'one_order': ordered once
    and not in P2}"""
    counts: dict[str, int]
    """customers per tier who are on its list, {'P1': n, 'P2': n, 'P3': n}"""
    totals: dict[str, int]
    """customers per tier, whether they are on its list or left off"""
    stakes: dict[str, Stake] | None
    """per tier: spend at stake of those in `counts`; None on a date that had nothing to learn from yet"""
    next_orders: dict[str, float]
    """per tier: sum of avg_order_value of those in `counts`; shown where `stakes` is None"""
    top: list[dict[str, Any]]
    """up to five customer_priority rows of customers on the lists, the first of the queue"""
    actions: dict[str, list[tuple[str, int]]]
    """per tier: (recommended_action, customers of `counts`)"""
    audiences: dict[str, dict[str, Any]]
    """tier -> {'file': name, 'rows': n, 'excluded': {reason: n}}, the reasons in the order in which they are asked"""
    complete_through: date
    """last date whose orders are all in"""
    first_order_date: date | None
    """the shop's first order by D"""
    currency: str
    shop_name: str
    mode: str
    """off, shadow, pilot or live"""
    links: dict[str, str]
    """any of 'run', 'dashboard', 'ticket', 'pack' -> URL or path"""
    safeguards: list[tuple[str, bool, str]]
    """what `safeguards` returned"""
    rules: dict[str, Any]
    """settings.rule_parameters() and rank_by"""


# --- the three formats ---------------------------------------------------------------------------------------------------


def render_markdown(facts: BriefFacts, settings: Settings) -> str:
    """The brief as Markdown (CommonMark with tables); shows the chart by its file name beside it. Raises PackError."""
    text = _render("markdown", facts, settings)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def render_slack(facts: BriefFacts, settings: Settings, *, chart_alt: str | None = None) -> dict[str, Any]:
    """The brief as content for chat.postMessage: {'text': notification, 'blocks': [...]}, within Slack's limits for any input.

    `chart_alt` describes the chart that goes into the thread; None takes the brief's own words, '' leaves the line out.
    Never holds a mention: `<!channel>` and the like are added by execute/, where the setting allows. Raises PackError.
    """
    return slack_message(_render("slack", facts, settings, chart_alt=None if chart_alt is None else _clean(chart_alt, 600)))


def render_html(
    facts: BriefFacts, settings: Settings, *, chart_png: bytes | None = None, chart_cid: str | None = None,
    returning_png: bytes | None = None,
) -> str:
    """The brief as a mail: one HTML document with inline styles.

    The chart is embedded as a data URI from `chart_png`; mail clients that block those get it with `chart_cid`, the
    Content-ID of an attached image. With neither there is no image. `returning_png`, the second rule's picture, is embedded
    only where that rule flags the day: a mail stays small. Raises PackError.
    """
    source = ""
    if chart_cid:
        source = "cid:" + quote(chart_cid, safe="@.-_")
    elif chart_png:
        source = _data_uri(chart_png)
    short = row_of(facts.alert, SHORTFALL)
    returning = _data_uri(returning_png) if returning_png and short and short["alert_flag"] else ""
    return _render("html", facts, settings, chart_source=source, returning_source=returning).strip() + "\n"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def with_cids(source: str, folder: Path) -> str:
    """The mail of the pack in `folder` with its embedded pictures as `cid:<file name>`: known by their bytes, for a company's own
    template may show them in another order, or only one. A picture that is none of the pack's is called the first chart's."""
    for name in CHART_FILES:
        if (folder / name).is_file():
            source = source.replace(_data_uri((folder / name).read_bytes()), f"cid:{name}")
    return _EMBEDDED.sub(f"cid:{CHART_FILE}", source)


_EMBEDDED = re.compile(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+")


def drawn_shortfalls(shortfalls: list[dict[str, Any]], history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The second rule's rows that its picture shows: over the same days as the first one's; empty where none has a value."""
    first = min((as_date(row["alert_date"]) for row in history), default=date.min)
    rows = [row for row in shortfalls if as_date(row["alert_date"]) >= first]
    return rows if any(_number(row["delta_relative_pct"]) is not None for row in rows) else []


# --- safeguards ----------------------------------------------------------------------------------------------------------


def safeguards(
    alert: dict[str, Any], complete_through: date, settings: Settings, first_order_date: date | None = None
) -> list[tuple[str, bool, str]]:
    """(name, passed, sentence) for each gate of alert_logic in its order, then for the mode.

    The list stops at the gate that held the alert back: the rule looks no further, so nothing is claimed about later ones.
    With `first_order_date` a history too short says from when the alarm judges.
    """
    gates = _gate_sentences(alert, as_date(complete_through), settings, first_order_date)
    rows: list[tuple[str, bool, str]] = []
    for gate, (name, passed, held) in gates.items():
        if gate == alert["gate"]:
            rows.append((name, False, held))
            break
        rows.append((name, True, passed))
    else:
        if alert["gate"]:
            rows.append((str(alert["gate"]), False, f"The safeguard {alert['gate']} held the alert back."))
    return [*rows, _mode_sentence(settings.mode)]


def _gate_sentences(
    alert: dict[str, Any], complete: date, settings: Settings, first_order: date | None
) -> dict[str, tuple[str, str, str]]:
    """gate -> (name, sentence when passed, sentence when it held), in the order the rule asks them."""
    day, needed = long_day(as_date(alert["alert_date"])), settings.at_risk_limit + 7
    sample, least = alert["sample_size"] or 0, settings.min_sample
    behind = "is" if sample == 1 else "are"
    due = alert["alert_type"] == SHORTFALL
    judged = ""
    if first_order is not None:
        judged = f" The first order was on {long_day(first_order)}; the alarm judges from {long_day(first_order + timedelta(needed))} on."
    return {
        "data_incomplete": (
            "data complete",
            f"Orders are all in through {long_day(complete)}.",
            f"Orders are all in only through {long_day(complete)}, so {day} cannot be judged yet; "
            "a load that stopped would look like customers leaving.",
        ),
        "history_warmup": (
            "history long enough",
            f"At least {needed} days of orders lie behind {day}.",
            f"Fewer than {needed} days of orders lie behind {day}; until then nobody can have moved through every status, "
            f"so the share is not settled.{judged}",
        ),
        "baseline_warmup": (
            "customers due",
            "Enough customers came back in the last weeks to say who is due.",
            "Nobody came back in the weeks before, so nobody can be said to be due.",
        ) if due else (
            "baseline above zero",
            "There is a mean of the 7 days before to compare with.",
            "In the 7 days before no customer was AT_RISK, so there is nothing to compare with.",
        ),
        "min_sample": (
            "enough customers due",
            f"{_counted(sample, 'customer')} {'was' if sample == 1 else 'were'} due; at least {settings.min_due:,} are needed.",
            f"Only {_counted(sample, 'customer')} {'was' if sample == 1 else 'were'} due; below {settings.min_due:,} chance decides.",
        ) if due else (
            "enough customers",
            f"{_counted(sample, 'customer')} {behind} behind the share; at least {least:,} are needed.",
            f"Only {_counted(sample, 'customer')} {behind} behind the share; below {least:,} a few people move it too much.",
        ),
        **({"partial_day": (
            "no day that falls out alone",
            "The shortfall does not hang on one day.",
            "The last day alone has less than a quarter of what was due, and the day before was in order: data may be incomplete. "
            "A second such day alerts.",
        )} if due else {}),
    }


def _mode_sentence(mode: str) -> tuple[str, bool, str]:
    """passed is True where the mode lets something leave the house."""
    return {
        "off": ("mode", False, "Off: the response is switched off; nothing is sent."),
        "shadow": ("mode", False, "Shadow: everything is rehearsed and recorded, nothing is sent."),
        TRIAL: ("mode", True, "A rule in its pilot period: WARNING days only, to the test channel and the test project."),
        "pilot": ("mode", True, "Pilot: WARNING days only, to the test channel and the test project."),
        "live": ("mode", True, "Live: the response goes to the channels and lists that are set up."),
    }[mode]


# --- the numbers a template may show -------------------------------------------------------------------------------------

_MARKERS = {"CRITICAL": "🔴", "WARNING": "🟠", "INFO": "🟢", "HELD": "⚪"}
_TIER_NAMES = {"P1": "prevention", "P2": "intervention", "P3": "win-back"}
_ACTION_RULES = ("action_p1_vip", "action_p1_personal", "action_p1_reminder", "action_p2", "action_p3")
_LINK_NAMES = {"pack": "Action Pack", "dashboard": "Dashboard", "run": "Dagster run", "ticket": "Ticket"}
_SPARK = "▁▂▃▄▅▆▇█"
_SPARK_DAYS = 21
_URL_LENGTH = 1_000


def _view(facts: BriefFacts) -> dict[str, Any]:
    """The `brief` that templates see: plain values, text from data cleaned to one line. templates/base.j2 lists them."""
    alert = facts.alert
    at_risk = row_of(alert, AT_RISK) or alert
    day = as_date(alert["alert_date"])
    gate = (_clean(alert["gate"], 60) or "unnamed") if alert["gate"] else None  # no name, however odd, makes a held day a judged one
    severity = alert["severity"] if alert["severity"] in _MARKERS else "INFO"
    state = "HELD" if gate else severity
    tiers = _tiers(facts, state)
    return {
        "state": state,
        "marker": _MARKERS[state],
        "severity": severity,
        "flagged": bool(alert["alert_flag"]),
        "gate": gate,
        "date": day,
        "complete_through": as_date(facts.complete_through),
        "shop": _clean(facts.shop_name, 60),
        "currency": _clean(facts.currency, 3),
        "mode": _clean(facts.mode, 20),
        "leads": "returning" if alert["alert_type"] == SHORTFALL else "at_risk",
        "rose": bool(at_risk["alert_flag"]),
        "returning": _returning(row_of(alert, SHORTFALL)),
        "missing": _missing(facts.missing),
        **_level(at_risk, facts.daily),
        **_trend(at_risk, facts.history, facts.flagged),
        "windows": _windows(facts.rules),
        "judged_from": _judged_from(facts) if gate == "history_warmup" else None,
        "by_stake": _by_stake(facts),
        "ranked_by_stake": facts.stakes is not None and facts.rules["rank_by"] == "spend_at_stake",
        "known_stakes": facts.stakes is not None,
        "season_known": knows_season(facts.first_order_date, day),
        **_behind_the_rise(facts),
        "crossed_from": day - timedelta(days=min(facts.rules["active_days"] + 7, facts.rules["at_risk_days"])),
        "crossed_to": day - timedelta(days=facts.rules["active_days"] + 1),
        "tiers": tiers,
        "steps": [{"tier": tier["tier"], **action} for tier in tiers if tier["due"] for action in tier["actions"]],
        "queue": sum(facts.counts.get(tier, 0) for tier in TIERS),
        "held_out": sum(audience["excluded"].get(HOLDOUT, 0) for audience in facts.audiences.values()),
        "top": [_customer(row, facts.rules) for row in facts.top[:5]],
        "links": _links(facts.links),
        "safeguards": [
            {"name": _clean(name, 60), "passed": bool(passed), "sentence": _clean(sentence, 400)}
            for name, passed, sentence in facts.safeguards
        ],
        "chart_file": CHART_FILE,
        "returning_chart": _returning_chart(drawn_shortfalls(facts.shortfalls, facts.history)),
    }


def _judged_from(facts: BriefFacts) -> date | None:
    """The first day that history_warmup lets through."""
    first = facts.first_order_date
    return None if first is None else as_date(first) + timedelta(days=facts.rules["at_risk_days"] + 7)


def _by_stake(facts: BriefFacts) -> bool:
    """Whether what is at stake decides who is on the lists: where nothing is known of it yet the rules do."""
    return facts.stakes is not None and facts.rules["membership"] == "at_stake"


def _behind_the_rise(facts: BriefFacts) -> dict[str, Any]:
    """Who became AT_RISK in the 7 days, and how many of all AT_RISK are in no tier: P2 is the only one they can be in."""
    newly = facts.newly_at_risk
    if newly is None:
        return {"newly": None, "no_tier": None}
    rest = newly["customers"] - newly["on_p2"] - newly["one_order"]
    return {"newly": {**newly, "others": rest}, "no_tier": (facts.daily["at_risk"] or 0) - facts.totals.get("P2", 0)}


def _level(alert: dict[str, Any], daily: dict[str, Any]) -> dict[str, Any]:
    """Where AT_RISK stands: against its baseline, in people, and against the two lines (all % of customers)."""
    current, baseline, relative = (_number(alert[key]) for key in ("current_value", "baseline_value", "delta_relative_pct"))
    thresholds = (alert["threshold_warning"], alert["threshold_critical"])
    customers, at_risk = alert["sample_size"] or 0, daily["at_risk"] or 0
    expected = None if baseline is None else round(customers * baseline / 100)
    digits = 1 if relative is None else rise_digits(current, baseline, relative, thresholds)
    return {
        "current": current,
        "baseline": baseline,
        "relative": relative,
        "digits": digits or 1,
        "is_level": digits is None,
        # of the shares as shown, since a reader subtracts those: 27.1 % against 20.4 % is 6.7 points, also where 6.65 is exact
        "points": None if current is None or baseline is None else round(round(current, 1) - round(baseline, 1), 1),
        "warning_pct": thresholds[0],
        "critical_pct": thresholds[1],
        "warning_line": None if not baseline else baseline * (1 + thresholds[0] / 100),
        "critical_line": None if not baseline else baseline * (1 + thresholds[1] / 100),
        "would_be": _would_be(relative, thresholds),
        "customers": customers,
        "at_risk": at_risk,
        "expected": expected,
        "extra": None if expected is None else at_risk - expected,
        "mix": [(name, daily[column], _number(daily[f"{column}_pct"])) for name, column in
                (("ACTIVE", "active"), ("AT_RISK", "at_risk"), ("INACTIVE", "inactive"))],
    }


def side_digits(relative: float, thresholds: tuple[float, float]) -> int:
    """Decimals that keep `relative` on its own side of both thresholds: 14.96 must not read "15.0 %, no alert"."""
    exact = round(relative, 9)
    for digits in range(1, 9):
        if all((round(exact, digits) >= limit) == (exact >= limit) for limit in thresholds):
            return digits
    return 9


def rise_digits(current: float, baseline: float, relative: float, thresholds: tuple[float, float]) -> int | None:
    """Decimals to show `relative` with, so that it agrees with both thresholds and with the shares beside it (one decimal each).

    None where today is level with the mean: "0.0 % above" says nothing, but "level" beside 20.1 % and 20.0 % would be wrong.
    """
    digits = side_digits(relative, thresholds)
    if round(relative, digits) == 0 and round(current, 1) == round(baseline, 1):
        return None
    while digits < 9 and round(relative, digits) == 0:
        digits += 1
    return digits


def _would_be(relative: float | None, thresholds: tuple[float, float]) -> str:
    """The severity of this rise with no safeguard in the way; compared like the rule does, on 9 decimals."""
    rise = -1.0 if relative is None else round(relative, 9)
    return "CRITICAL" if rise >= thresholds[1] else "WARNING" if rise >= thresholds[0] else "INFO"


def _returning(row: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returning customers against what was due; None where the rule has nothing to say of the day."""
    if row is None or row["expected"] is None:
        return None
    day = as_date(row["alert_date"])
    return {
        "sentence": _clean(row["sentence"], 200),
        "from": day - timedelta(days=row["window_days"] - 1),
        "days": row["window_days"],
        "observed": row["observed"],
        "expected": round(row["expected"]),
        "low": round(row["expected_low"]),
        "high": round(row["expected_high"]),
        "flagged": bool(row["alert_flag"]),
        "severity": row["severity"],
        "gate": _clean(row["gate"], 60) if row["gate"] else None,
    }


def _returning_chart(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The second picture: its file, its days and its last value (% above or below what was due)."""
    if not rows:
        return None
    return {"file": RETURNING_FILE, "from": as_date(rows[0]["alert_date"]), "to": as_date(rows[-1]["alert_date"]),
            "last": _number(rows[-1]["delta_relative_pct"])}


def _missing(missing: Missing | None) -> dict[str, Any] | None:
    """Who is behind a shortfall, and which part of the customers carries it."""
    if missing is None:
        return None
    part = missing.carried_by()
    return {
        "overdue": missing.overdue,
        "value": missing.value_due,
        "carried_by": part and {
            "attribute": _clean(part["attribute"], 40).replace("_", " "), "value": _clean(part["value"], 80),
            "expected": round(part["expected"]), "observed": part["observed"],
            "fall": round(100 * part["missing"] / part["expected"]),
        },
        "top": [
            {"id": _clean(row["customer_id"], 64) or "–", "days": row["days_since_last_order"], "gap": round(row["usual_gap_days"]),
             "average": row["avg_order_value"], "value": row["value_due"]}
            for row in missing.top
        ],
    }


def _trend(alert: dict[str, Any], history: list[dict[str, Any]], answered: set[date]) -> dict[str, Any]:
    """What the days before say: the run of flagged days, how many sit in the baseline, and the shape of the line."""
    day = as_date(alert["alert_date"])
    flagged = {as_date(row["alert_date"]) for row in history if row["alert_flag"]} | ({day} if alert["alert_flag"] else set())
    streak = 0
    while day - timedelta(days=streak) in answered:
        streak += 1
    values = [_number(row["current_value"]) for row in history]
    known = [value for value in values if value is not None]
    return {
        "streak": streak,
        "streak_since": day - timedelta(days=max(streak - 1, 0)),
        "raised_baseline_days": sum(day - timedelta(days=back) in flagged for back in range(1, 8)),
        "history_days": len(history),
        "history_from": as_date(history[0]["alert_date"]) if history else day,
        "mean_drawn": any(_number(row["baseline_value"]) is not None for row in history),
        "lines_drawn": any((_number(row["baseline_value"]) or 0) > 0 for row in history),
        "history_first": known[0] if known else None,
        "is_highest": len(known) >= 14 and known[-1] == values[-1] and known[-1] > max(known[:-1]),
        "spark_days": min(len(history), _SPARK_DAYS),
        "spark": sparkline(history[-_SPARK_DAYS:]),
    }


def sparkline(rows: list[dict[str, Any]]) -> str:
    """AT_RISK % as a row of bars, a dot where there is no value. The scale always spans from the lowest value to at least the
    last critical line, so that the noise of a quiet month does not look like a mountain."""
    values = [_number(row["current_value"]) for row in rows]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    baseline = _number(rows[-1]["baseline_value"]) or 0.0
    low, high = min(known), max(*known, baseline * (1 + rows[-1]["threshold_critical"] / 100), min(known) + 1e-9)
    step = (high - low) / (len(_SPARK) - 1)
    return "".join("·" if value is None else _SPARK[int((value - low) / step + 0.5)] for value in values)


def _windows(rules: dict[str, Any]) -> dict[str, int]:
    """Days since the last order that bound each status; P3 ends at twice at_risk_days."""
    active, at_risk = rules["active_days"], rules["at_risk_days"]
    return {"active_to": active, "at_risk_from": active + 1, "at_risk_to": at_risk, "inactive_from": at_risk + 1,
            "p3_to": 2 * at_risk}


def _tiers(facts: BriefFacts, state: str) -> list[dict[str, Any]]:
    """P1, P2, P3 with people to contact, money, list and steps; `total` is the whole tier. `due` on the days the response
    hands the tier's list over: WARNING P1 and P2, CRITICAL P3 as well."""
    due = {"CRITICAL": TIERS, "WARNING": ("P1", "P2")}.get(state, ())
    return [
        {
            "tier": tier,
            "name": _TIER_NAMES[tier],
            "customers": facts.counts.get(tier, 0),
            "total": facts.totals.get(tier, 0),
            "stake": _stake(facts.stakes.get(tier)) if facts.stakes is not None else None,
            "next_orders": facts.next_orders.get(tier, 0.0),
            "due": tier in due,
            "median_revenue": tier == "P1" and bool(facts.rules.get("p1_needs_median_revenue")) and not _by_stake(facts),
            "actions": _actions(facts, tier),
            "audience": _audience(facts.audiences.get(tier)),
        }
        for tier in TIERS
    ]


def _stake(stake: Stake | None) -> dict[str, float]:
    """As shown: the interval in three figures, so that nobody takes it for exact, rounded outwards so that it stays as wide."""
    if stake is None:
        return {"spend": 0.0, "low": 0, "high": 0}
    return {"spend": stake.spend, "low": _three_figures(stake.low, math.floor), "high": _three_figures(stake.high, math.ceil)}


def _three_figures(value: float, rounded: Callable[[float], int]) -> int:
    step = 10 ** max(0, len(str(int(value))) - 3)
    return rounded(value / step) * step


def _actions(facts: BriefFacts, tier: str) -> list[dict[str, Any]]:
    """The tier's actions in the order of the rules (VIP before reminder), unknown ones last, the larger group first."""
    rank = {facts.rules.get(rule): place for place, rule in enumerate(_ACTION_RULES)}
    rows = sorted(facts.actions.get(tier, []), key=lambda row: (rank.get(row[0], len(rank)), -row[1], row[0]))
    return [{"action": _clean(action, 200), "customers": count} for action, count in rows if count]


def _audience(audience: dict[str, Any] | None) -> dict[str, Any] | None:
    if audience is None:
        return None
    left_out = [(reason, count) for reason, count in audience["excluded"].items() if count]
    return {"file": _clean(audience["file"], 120), "rows": audience["rows"], "left_out": sum(count for _, count in left_out),
            "excluded": [{"reason": _clean(reason, 80), "customers": count} for reason, count in left_out]}


def _customer(row: dict[str, Any], rules: dict[str, Any]) -> dict[str, Any]:
    """A customer as shown: an opaque id, the rule's own words and numbers."""
    counts = rules["rank_by"] == "spend_at_stake" or rules["membership"] == "at_stake"
    at_stake = row["at_stake_reason"] if counts and row["at_stake_reason"] != row["priority_reason"] else None
    return {
        "id": _clean(row["customer_id"], 64) or "–",
        "tier": _clean(row["priority_tier"], 8),
        "reason": _clean(row["priority_reason"], 300),
        "at_stake": _clean(at_stake, 300) if at_stake else None,
        "action": _clean(row["recommended_action"], 200),
        "revenue": row["total_revenue"],
        "average": row["avg_order_value"],
        "score": row["priority_score"],
        "days": row["days_since_last_order"],
    }


def _links(links: dict[str, str]) -> list[dict[str, str]]:
    known = [(name, links[name]) for name in _LINK_NAMES if links.get(name)]
    other = [(name, target) for name, target in sorted(links.items()) if target and name not in _LINK_NAMES]
    return [{"label": _LINK_NAMES.get(name) or _clean(name, 40), "target": _clean(target, _URL_LENGTH)}
            for name, target in known + other]


# --- values as text ------------------------------------------------------------------------------------------------------

_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("January", "February", "March", "April", "May", "June",
           "July", "August", "September", "October", "November", "December")


def as_date(value: date | datetime | str) -> date:
    """A row's date, however the table layer hands it over."""
    if isinstance(value, str):
        return date.fromisoformat(value[:10])
    return value.date() if isinstance(value, datetime) else value


def long_day(day: date) -> str:
    """Tue 30 June 2026, in English whatever the machine's locale."""
    return f"{_WEEKDAYS[day.weekday()]} {day.day} {_MONTHS[day.month - 1]} {day.year}"


def _number(value: Any) -> float | None:
    """A float, or None for null (a NaN from pandas is null too)."""
    return None if value is None or value != value else float(value)


def _fixed(value: float, digits: int) -> str:
    return f"{round(float(value), digits) + 0.0:,.{digits}f}"  # + 0.0: never "-0.0"


def _points(value: float | None) -> str:
    """A difference of two percentages."""
    return "not known" if value is None else f"{'+' if round(value, 1) > 0 else ''}{_fixed(value, 1)} points"


def _counted(count: int, noun: str, plural: str | None = None) -> str:
    return f"{count:,} {noun if abs(count) == 1 else plural or noun + 's'}"


def _ordinal(count: int) -> str:
    ending = "th" if count % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count:,}{ending}"


_CONTROL = {"Cc", "Zl", "Zp", "Zs"}
_DROPPED = re.compile("[\u200b\u200e\u200f\u061c\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\U000e0000-\U000e007f]")


def _clean(value: Any, limit: int) -> str:
    """Text from data as one line of at most `limit` code points: no line breaks, control or direction characters, no half of a
    surrogate pair; so that a value can neither break a table nor turn the text around it."""
    text = _one_line(value).strip()
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _one_line(value: Any) -> str:
    text = str(value)
    if not (text.isascii() and text.isprintable()):
        text = _DROPPED.sub("", text)
        kinds = ((char, unicodedata.category(char)) for char in text)
        text = "".join(" " if kind in _CONTROL else "\ufffd" if kind == "Cs" else char for char, kind in kinds)
    return re.sub(r"\s+", " ", text)


def _web_url(target: str) -> str | None:
    """The target as a URL that can be linked, or None for anything but http(s)."""
    if not re.match(r"https?://[^\s/]", target, re.IGNORECASE) or target.endswith("…"):
        return None
    return quote(target, safe=":/?#@!$&'()*+,;=%~-._")


# --- escaping per format -------------------------------------------------------------------------------------------------

_MARKDOWN_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"})
# an underscore between two letters or digits does nothing in Markdown: ids like C_104 stay readable in the source
_MARKDOWN_SPECIAL = re.compile(r"[\\`*\[\]~$@]|(?<![^\W_])_|_(?![^\W_])|://|(?i:(?<=www)\.)|!(?=\[)")
_MARKDOWN_START = re.compile(r"^\s*(?:(?=[-+#=])|\d+(?=[.)](?:\s|$)))")


def escape_markdown(value: Any) -> Markup:
    """Data as literal text in Markdown, also in a table cell: no markup, HTML, link, image, bare URL or column break."""
    text = _MARKDOWN_SPECIAL.sub(r"\\\g<0>", _one_line(value)).translate(_MARKDOWN_ENTITIES)
    return Markup(_MARKDOWN_START.sub(r"\g<0>\\", text, count=1))


def escape_slack(value: Any) -> Markup:
    """Data as literal text in Slack's mrkdwn: exactly & < > as entities, which kills mentions and links; * _ ~ ` and :emoji:
    followed by a zero-width space, which stops formatting."""
    text = _slack_entities(_one_line(value))
    text = re.sub(r"([*_~`])", "\\1\u200b", text)
    text = re.sub(r":(?=[\w+'-]+:)", ":\u200b", text)
    return Markup("\u200b" + text if text.startswith("::") else text)  # a line that starts with :: opens a block


def _slack_entities(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _slack_code(value: Any) -> Markup:
    """An id in code style. Slack formats nothing in there, so it stays as it is for copying; only a backtick could end it."""
    return Markup(f"`{_slack_entities(_clean(value, 200)).replace('`', 'ˋ') or '–'}`")


def _markdown_code(value: Any) -> Markup:
    return escape_markdown(value)


def _html_code(value: Any) -> Markup:
    return Markup("<code style=\"font-family:Consolas,Menlo,monospace\">{}</code>").format(value)


def _markdown_link(target: str, label: Any) -> Markup:
    url = _web_url(target)
    if url is None:
        return escape_markdown(f"{label}: {target}")
    return Markup(f"[{escape_markdown(label)}](<{url.replace('&', '&amp;')}>)")


def _slack_link(target: str, label: Any) -> Markup:
    url = _web_url(target)
    if url is None:
        return Markup(f"{escape_slack(label)}: {_slack_code(target)}")
    return Markup(f"<{_slack_entities(url)}|{escape_slack(str(label).replace('|', '/'))}>")


def _html_link(target: str, label: Any) -> Markup:
    url = _web_url(target)
    if url is None:
        return Markup("{}: {}").format(label, target)
    return Markup('<a href="{}" class="link" style="color:#0b5cad">{}</a>').format(url, label)


def _markdown_file(name: str) -> Markup:
    """A file beside the brief, in the pack's folder."""
    return Markup(f"[{escape_markdown(name)}](<{quote(name, safe='-_.~')}>)")


# --- templates -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Format:
    """How one format turns values into text. `space` stands between a number and its unit."""

    template: str
    code: Callable[[Any], Markup]
    link: Callable[[str, Any], Markup]
    file: Callable[[str], Markup]
    escape: Callable[[Any], Markup]
    space: str = " "


_FORMATS = {
    "markdown": _Format("briefing.md.j2", _markdown_code, _markdown_link, _markdown_file, escape_markdown),
    "slack": _Format("briefing.slack.j2", _slack_code, _slack_link, _slack_code, escape_slack),
    "html": _Format("briefing.html.j2", _html_code, _html_link, _html_code, escape, "\u00a0"),
}


def template_fingerprint(settings: Settings) -> str:
    """sha256 (hex) over name and content of every template in use: the shipped ones and those in settings.templates_dir.

    Line endings do not count, so that a checkout on another system has the same print. Raises PackError.
    """
    digest = hashlib.sha256()
    for name, path in _template_files(settings.templates_dir):
        try:
            source = path.read_bytes().replace(b"\r\n", b"\n")
        except OSError as error:
            raise PackError(f"template {name} (in {path.parent}) cannot be read: {error.strerror}") from None
        digest.update(f"{name}\0{len(source)}\0".encode() + source)
    return digest.hexdigest()


def check_templates(settings: Settings) -> None:
    """Raises PackError, before anything is built, for a templates_dir that is not there and for what is wrong without any facts:
    syntax, and blocks that nothing shows."""
    fingerprint = template_fingerprint(settings)
    for kind, form in _FORMATS.items():
        _template(kind, form.template, settings.templates_dir, fingerprint)


def _template_files(templates_dir: Path | None) -> Iterator[tuple[str, Path]]:
    """(name, path) of the shipped templates as 'shipped/NAME', then of the company's own."""
    for path in sorted(SHIPPED_TEMPLATES.glob("*.j2")):
        yield f"shipped/{path.name}", path
    if templates_dir is not None:
        if not templates_dir.is_dir():
            raise PackError(f"RETENTION_OPS_TEMPLATES_DIR names {templates_dir}, which is not a folder; correct it or leave it empty")
        for path in sorted(templates_dir.rglob("*.j2")):
            yield path.relative_to(templates_dir).as_posix(), path


def _names_by_file(templates_dir: Path | None) -> dict[str, str]:
    """File as Jinja reports it -> name as in `_template_files`."""
    return {os.path.normpath(path): name for name, path in _template_files(templates_dir)}


@lru_cache(maxsize=8)
def _environment(kind: str, templates_dir: Path | None, fingerprint: str) -> Environment:
    """One environment per format and state of the templates; the fingerprint is in the key so that a template added or changed
    while the process lives is the one that renders, just as it is the one that is hashed."""
    form = _FORMATS[kind]
    shipped = FileSystemLoader(SHIPPED_TEMPLATES)
    own = [FileSystemLoader(templates_dir)] if templates_dir else []

    def literal(value: Any) -> Markup:
        # with autoescape on, blocks and macros come back as Markup and are not escaped twice; everything else is data
        return value if isinstance(value, Markup) else form.escape(value)

    environment = Environment(
        loader=ChoiceLoader([*own, shipped, PrefixLoader({"shipped": shipped})]),
        undefined=StrictUndefined, autoescape=True, finalize=literal, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, auto_reload=False,
    )
    environment.filters.update(_filters(form))
    if templates_dir:
        _refuse_unknown_blocks(environment, form.template, templates_dir)
    return environment


def _refuse_unknown_blocks(environment: Environment, name: str, templates_dir: Path) -> None:
    """Raises PackError for a block that no template above has: Jinja would leave it out of the brief without a word."""
    own = {file for file, name in _names_by_file(templates_dir).items() if not name.startswith("shipped/")}
    lineage = _lineage(environment, name)
    for place, (child, filename, tree) in enumerate(lineage[:-1]):
        above = [block.name for _, _, parent in reversed(lineage[place + 1:]) for block in parent.find_all(nodes.Block)]
        for block in _outer_blocks(tree) if os.path.normpath(filename or "") in own else ():
            if block.name not in above:
                raise PackError(
                    f"template {child} (in {templates_dir}), line {block.lineno}: there is no block {block.name!r} to fill, so it would "
                    f"not be shown; allowed are {', '.join(dict.fromkeys(above))}"
                )


def _lineage(environment: Environment, name: str) -> list[tuple[str, str | None, nodes.Template]]:
    """(name, file, tree) of a template and of those it extends, child first; empty where only rendering can tell them (a name
    that is computed, missing or in a circle)."""
    found: dict[str, tuple[str, str | None, nodes.Template]] = {}
    parent: Any = name
    while parent is not None:
        if not isinstance(parent, str) or parent in found:
            return []
        try:
            source, filename, _ = environment.loader.get_source(environment, parent)
        except TemplateNotFound:
            return []
        tree = environment.parse(source, parent, filename)
        found[parent] = (parent, filename, tree)
        extends = next((node for node in tree.body if isinstance(node, nodes.Extends)), None)
        parent = None if extends is None else getattr(extends.template, "value", extends)
    return list(found.values())


def _outer_blocks(node: nodes.Node) -> Iterator[nodes.Block]:
    """Blocks that stand in no other block; inner ones are shown with the one around them."""
    for child in node.iter_child_nodes():
        if isinstance(child, nodes.Block):
            yield child
        else:
            yield from _outer_blocks(child)


def _filters(form: _Format) -> dict[str, Callable[..., Any]]:
    """Filters of all templates; base.j2 documents them."""
    space = form.space
    return {
        "number": lambda value: Markup(f"{value:,}"),
        "percent": lambda value, digits=1: Markup("not known" if value is None else f"{_fixed(value, digits)}{space}%"),
        "points": lambda value: Markup(_points(value)),
        "limit": lambda value: Markup(f"{value:g}{space}%"),
        "money": lambda value, currency, digits=2: form.escape(currency) + Markup(f"{space}{_fixed(value, digits)}"),
        "amount": lambda value, digits=2: Markup(_fixed(value, digits)),
        "day": lambda value: Markup(long_day(value)),
        "counted": _counted,
        "ordinal": _ordinal,
        "code": form.code,
        "link": form.link,
        "file": form.file,
    }


def _render(kind: str, facts: BriefFacts, settings: Settings, **extra: Any) -> str:
    """One format's template over the facts. Raises PackError for whatever goes wrong inside a template."""
    values = {"brief": _view(facts), "chart_alt": None, "chart_source": "", "returning_source": "", **extra}
    return render_template(kind, _FORMATS[kind].template, settings, values)


def render_template(kind: str, name: str, settings: Settings, values: dict[str, Any]) -> str:
    """The template `name` in the format `kind` (markdown, slack, html): its escaping and filters, a company's own template first.

    Raises PackError, naming template and line, for whatever goes wrong inside a template.
    """
    template = _template(kind, name, settings.templates_dir, template_fingerprint(settings))
    try:
        return template.render(values)
    except Exception as error:
        # from None: the command line shows the innermost cause, and Jinja's own error has neither name nor line
        raise PackError(_template_message(error, name, settings.templates_dir)) from None


def _template(kind: str, name: str, templates_dir: Path | None, fingerprint: str) -> Template:
    """A format's template, compiled. Raises PackError."""
    try:
        environment = _environment(kind, templates_dir, fingerprint)
        if templates_dir and name != _FORMATS[kind].template:  # the environment looked at its own one when it was made
            _refuse_unknown_blocks(environment, name, templates_dir)
        return environment.get_template(name)
    except PackError:
        raise
    except Exception as error:
        raise PackError(_template_message(error, name, templates_dir)) from None


def _template_message(error: Exception, rendered: str, templates_dir: Path | None) -> str:
    """'template NAME (in FOLDER), line N: what; what to do'. Jinja rewrites tracebacks so that frames carry template lines."""
    names = _names_by_file(templates_dir)
    name, line = rendered, 0
    if isinstance(error, TemplateSyntaxError):
        name, line = names.get(os.path.normpath(error.filename or ""), error.name or rendered), error.lineno
    else:
        for frame in traceback.extract_tb(error.__traceback__):
            file = os.path.normpath(frame.filename)
            if file in names:
                name, line = names[file], frame.lineno or 0
    what = str(error) or type(error).__name__
    if isinstance(error, RecursionError):
        what = f"it extends or includes itself; extend the shipped one as 'shipped/{rendered}'"
    elif isinstance(error, TemplateNotFound):
        what = f"there is no template {error.name!r}"
    folder = f" (in {templates_dir})" if templates_dir and not name.startswith("shipped/") else ""
    where = f"template {name}{folder}" + (f", line {line}" if line else "")
    return f"{where}: {what}. Correct it, or remove it from RETENTION_OPS_TEMPLATES_DIR to use the shipped one."


# --- Slack's limits ------------------------------------------------------------------------------------------------------

SLACK_BLOCKS = 50
SLACK_HEADER = 150
SLACK_SECTION = 3_000
SLACK_FIELDS, SLACK_FIELD = 10, 2_000
SLACK_CONTEXT, SLACK_CONTEXT_TEXT = 10, 2_000
SLACK_PAYLOAD = 12_000
"""Characters of all blocks as ASCII JSON; undocumented, Slack answered msg_blocks_too_long at about 13,200."""
SLACK_TEXT = 4_000
_SHORTENED = "Shortened to fit into Slack; the full brief is in the Action Pack."
_KINDS = ("text", "header", "context", "section", "fields", "divider")


def slack_message(rendered: str) -> dict[str, Any]:
    """A rendered Slack template as {'text', 'blocks'} within Slack's limits. Raises PackError for what is no part of a message."""
    parts = _slack_parts(rendered)
    text = " ".join(content for kind, content in parts if kind == "text")
    return fit_slack(text, [block for kind, content in parts for block in _slack_blocks(kind, content)])


def _slack_parts(rendered: str) -> list[tuple[str, str]]:
    """The template's output as (kind, content): a line '::kind' opens a part. Raises PackError for anything else."""
    parts: list[tuple[str, list[str]]] = []
    for line in rendered.split("\n"):
        if line.startswith("::"):
            kind = line[2:].strip()
            if kind not in _KINDS:
                allowed = ", ".join(_KINDS)
                raise PackError(f"template briefing.slack.j2: '::{kind[:40]}' is no part of a Slack message; there are {allowed}")
            parts.append((kind, []))
        elif parts:
            parts[-1][1].append(line)
        elif line.strip():
            raise PackError(f"template briefing.slack.j2: text before the first '::' line: {line.strip()[:60]!r}")
    return [(kind, "\n".join(lines).strip()) for kind, lines in parts]


def _slack_blocks(kind: str, content: str) -> list[dict[str, Any]]:
    """A part as blocks; an empty part gives none. In fields and context a blank line separates the elements."""
    if kind == "divider":
        return [{"type": "divider"}]
    if kind == "text" or not content:
        return []
    if kind == "header":
        return [{"type": "header", "text": {"type": "plain_text", "text": " ".join(content.split()), "emoji": False}}]
    if kind == "section":
        return [{"type": "section", "text": _mrkdwn(content)}]
    pieces = [_mrkdwn(piece.strip()) for piece in re.split(r"\n\s*\n", content)]
    return [{"type": "section", "fields": pieces}] if kind == "fields" else [{"type": "context", "elements": pieces}]


def _mrkdwn(text: str) -> dict[str, Any]:
    """`verbatim`: Slack must not make links of URLs, channel or user names that stand in data."""
    return {"type": "mrkdwn", "text": text, "verbatim": True}


def fit_slack(text: str, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """{'text', 'blocks'} within Slack's limits, whatever came in; checked once more with slack_sdk's own models.

    Each text is cut to its own limit first. If the whole is still too long, the longest texts are cut, then blocks dropped
    from the end, and a last line says so. Raises PackError where the models refuse a block.
    """
    fitted = [_clip_block(block) for block in blocks]
    if len(fitted) > SLACK_BLOCKS or _size(fitted) >= SLACK_PAYLOAD:
        fitted = _shrink([*fitted[: SLACK_BLOCKS - 1], {"type": "context", "elements": [_mrkdwn(_SHORTENED)]}])
    _check_blocks(fitted)
    return {"text": _clip(text, SLACK_TEXT), "blocks": fitted}


def _clip_block(block: dict[str, Any]) -> dict[str, Any]:
    """A copy of the block in which every text and list keeps its limit."""
    if block["type"] == "header":
        return {**block, "text": _clip_object(block["text"], SLACK_HEADER)}
    if block["type"] == "context":
        return {**block, "elements": [_clip_object(item, SLACK_CONTEXT_TEXT) for item in block["elements"][:SLACK_CONTEXT]]}
    if "fields" in block:
        return {**block, "fields": [_clip_object(item, SLACK_FIELD) for item in block["fields"][:SLACK_FIELDS]]}
    return {**block, "text": _clip_object(block["text"], SLACK_SECTION)} if "text" in block else dict(block)


def _clip_object(item: dict[str, Any], limit: int) -> dict[str, Any]:
    return {**item, "text": _clip(item["text"], limit)}


def _clip(text: str, limit: int) -> str:
    """At most `limit` code points, ending in '…' where cut; never in the middle of an entity or of a <url|label>."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair cannot be sent
    if len(text) <= limit:
        return text
    cut = re.sub(r"&[a-z]*$", "", text[: limit - 1])
    if cut.rfind("<") > cut.rfind(">"):
        cut = cut[: cut.rfind("<")]
    return cut.rstrip() + "…"


def _size(blocks: list[dict[str, Any]]) -> int:
    return len(json.dumps(blocks))


def _shrink(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cut the longest text again and again, then drop the block before the closing note, until the whole fits."""
    while _size(blocks) >= SLACK_PAYLOAD and len(blocks) > 1:
        item = max(_texts(blocks), key=lambda text: len(json.dumps(text["text"])), default=None)
        if item and len(item["text"]) > 200:
            item["text"] = _clip(item["text"], max(200, len(item["text"]) * 2 // 3))
        else:
            del blocks[-2]
    return blocks


def _texts(blocks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for block in blocks:
        yield from [block["text"]] if "text" in block else block.get("fields") or block.get("elements") or []


def _check_blocks(blocks: list[dict[str, Any]]) -> None:
    from slack_sdk.errors import SlackObjectFormationError
    from slack_sdk.models.blocks import Block

    for place, block in enumerate(blocks, 1):
        try:
            parsed = Block.parse(block)
            if parsed is None:
                raise SlackObjectFormationError(f"unknown type {block['type']!r}")
            parsed.to_dict()
        except SlackObjectFormationError as error:
            raise PackError(f"block {place} of the Slack message is not valid: {error}") from None
