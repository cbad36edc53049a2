"""A backtest in words and tables: what the terminal and report.md say of retention_ops.detect.backtest's result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from retention_ops.package.backtest_chart import percent, threshold_row

Table = tuple[str, list[str], list[list[str]]]
"""(title, names of the columns, rows)"""


NAMES = {"at_risk": "AT_RISK %", "returning": "returning", "ewma": "EWMA orders", "cusum": "CUSUM orders"}


@dataclass(frozen=True)
class Shown:
    """A threshold of a rule that is compared; `main` ones are in the terminal's tables too."""

    name: str
    row: dict[str, Any]
    main: bool


def shown(result: dict[str, Any], main_only: bool = False) -> list[Shown]:
    """What is compared: our rules as set and as recommended, of the others the lowest threshold within the budget."""
    settings, recommended = result["settings"], result["recommendation"]
    wanted: dict[tuple[str, float], list[str]] = {}
    for rule, threshold, words in (
        ("at_risk", settings["warning_pct"], "now"),
        ("returning", settings["shortfall_warning"], "now"), ("returning", recommended["warning"], "advised"),
        ("returning", settings["shortfall_critical"], "CRITICAL now"), ("returning", recommended["critical"], "CRITICAL advised"),
        *((each["rule"], each["chosen"], "in budget") for each in result["rules"] if each["rule"] != "returning"),
    ):
        if threshold is not None:
            wanted.setdefault((rule, threshold), []).append(words)
    order = list(NAMES)
    return [
        Shown(f"{NAMES[rule]} {threshold:g}, {' = '.join(words).replace('= CRITICAL', '=')}", threshold_row(result, rule, threshold), main)
        for (rule, threshold), words in sorted(wanted.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
        if (main := rule in ("ewma", "cusum") or "now" in words or "advised" in words) or not main_only
    ]


def alarms_table(result: dict[str, Any]) -> Table:
    rows = []
    for each in shown(result):
        cells = [f"{_episodes(each.row[period])}, {each.row[period]['days_rung']}" for period in ("tune", "report")]
        rows.append([each.name, *cells, yearly(each.row["report"]).replace(" to ", "-")])
    return ("False alarms: episodes (+ at holidays), days rung",
            ["rule", "tuned", "reported", "a year (90 %)"], rows)


def noticed_table(result: dict[str, Any], kind: str, main_only: bool = False) -> Table:
    """What each rule noticed of one kind of loss; the last column says how many losses were asked (and left out).

    `main_only` is for the terminal: fewer rules, and no intervals.
    """
    rows = [[each.name, *_noticed(each.row["kinds"][kind], not main_only)] for each in shown(result, main_only)]
    if ideal := result["ideal"].get(kind, {}).get("at_budget"):
        rows.append(["ideal observer", *_noticed(ideal, not main_only)])
    return f"Noticed: {result['kinds'][kind]}", ["rule", "6 days", "10 days", "14 days", "median", "of"], rows


def thresholds_table(result: dict[str, Any]) -> Table:
    """What each threshold of the returning customers costs and buys."""
    rows = []
    for row in next(each["thresholds"] for each in result["rules"] if each["rule"] == "returning"):
        kinds = row["kinds"]
        mark = "> " if row["threshold"] == result["recommendation"]["warning"] else ""
        rows.append([f"{mark}{row['threshold']:g}", _episodes(row["tune"]), _episodes(row["report"]), str(row["report"]["days_rung"]),
                     percent(kinds["outage_50"]["within_6"]["share"]), percent(kinds["outage_30"]["within_10"]["share"]),
                     percent(kinds["outage_30"]["within_14"]["share"]), percent(kinds["segment"]["within_14"]["share"])])
    return ("Returning customers: episodes (+ at holidays), days rung, share noticed",
            ["from", "tuned", "reported", "rung", "50 %: 6 d", "30 %: 10 d", "30 %: 14 d", "segment: 14 d"], rows)


LOADING = {
    "late_load": "3 days late, known", "missing_1": "1 day late", "missing_2": "2 days late", "missing_3": "3 days late",
    "partial_day": "half a day late",
}
"""orders that are not in yet; complete_through knows it, or claims that they are in"""


def loading_table(result: dict[str, Any]) -> Table:
    """Losses that are none: orders that are not loaded yet, in % of the starts. Fewer pages are better."""
    rows = [[each.name, *(percent(each.row["loading"][kind]["share"]) for kind in LOADING)] for each in shown(result)]
    return "Late data: pages that should not be", ["rule", *LOADING.values()], rows


def loading_sentence(result: dict[str, Any]) -> str:
    """The same of the setting recommended, or the one in force, in a line."""
    threshold = result["recommendation"]["warning"] or result["settings"]["shortfall_warning"]
    loading = threshold_row(result, "returning", threshold)["loading"]
    held = loading["late_load"]
    told = ", ".join(f"{label} {percent(loading[kind]['share'])}" for kind, label in LOADING.items() if kind != "late_load")
    return (f"Late data: {held['pages']} pages in {held['losses']} loads that are 3 days late while complete_through says so; "
            f"where it claims the orders are in, a page comes for {told}.")


def tables(result: dict[str, Any]) -> Iterator[Table]:
    yield alarms_table(result)
    yield thresholds_table(result)
    for kind in result["by_day"]:
        yield noticed_table(result, kind)
    yield loading_table(result)


def verdict(result: dict[str, Any]) -> list[str]:
    """What to set, and how sure that is, in sentences."""
    advice, tune, report = result["recommendation"], result["tune"], result["report"]
    said = []
    if advice["warning"] is None:
        said.append(f"No threshold keeps to {result['budget']:g} false episodes a year on the days tuned on "
                    f"({tune['from']} to {tune['to']}): name a higher --budget, or give the shop's closed days.")
        return said
    at = advice["at_warning"]
    said.append(
        f"WARNING from {advice['warning']:g}: the lowest threshold within {result['budget']:g} false episodes a year on the days tuned on "
        f"({tune['from']} to {tune['to']}: {at['tune']['episodes']} in {tune['days']} days outside holidays)."
    )
    if advice["within_budget"]:
        kept = "within the budget."
    else:
        kept = "more than the budget; " + ("so few may be chance." if advice["holds"] else "chance alone does not explain it.")
    said.append(
        f"On the days reported ({report['from']} to {report['to']}) it rang {_times(at['report']['episodes'])} outside holidays: "
        f"{yearly(at['report'])} a year, {kept}"
    )
    if not advice["within_budget"] and advice["in_both"]:
        said.append(f"From {advice['in_both']:g} on it keeps to the budget in both periods; chosen so, its figures flatter it.")
    if advice["episodes"]:
        days = ", ".join(f"{each['from']}{' (holidays)' if each['at_holidays'] else ''}" for each in advice["episodes"][:12])
        more = " and later" if len(advice["episodes"]) > 12 else ""
        said.append(f"Its episodes began on {days}{more}: `explain --date` says what happened; one that was real is not false.")
    if not advice["holds"]:
        said.append("So it is not advised: keep the settings in force, name a higher --budget, or look into these episodes first.")
    kinds = threshold_row(result, "returning", advice["warning"])["kinds"]
    said.append(
        f"It notices {percent(kinds['outage_50']['within_6']['share'])} of 50 % outages within 6 days, "
        f"{percent(kinds['outage_30']['within_14']['share'])} of 30 % outages within 14; where nothing is lost it rings within 14 days of "
        f"{percent(kinds['nothing']['within_14']['share'])} of the starts."
    )
    said.append(
        f"CRITICAL from {advice['critical']:g}: " + (
            "the lowest threshold with a quarter of that budget." if advice["critical_by_budget"]
            else "half as much again; no threshold keeps to a quarter of that budget.")
    )
    if not advice["enough_history"]:
        said.append(f"Too short to judge: {tune['days'] + report['days']} days in all. Keep the settings in force until there is a year "
                    "after the warm-up.")
    elif advice["tune_is_short"]:
        said.append(f"Tuned on {tune['days']} days, less than a year: a season was never seen, and the count is rough.")
    said.append(loading_sentence(result))
    if not result["closed_days"]:
        said.append("No closed days are known: every alarm counts as false, also those at holidays.")
    return said


def env_lines(result: dict[str, Any]) -> list[str]:
    """The lines for .env; none where nothing is recommended, the recommendation does not hold, or nothing changes."""
    advice = result["recommendation"]
    if advice["warning"] is None or not advice["enough_history"] or not advice["holds"] or not advice["changes"]:
        return []
    return [f"RETENTION_OPS_SHORTFALL_WARNING={advice['warning']:g}", f"RETENTION_OPS_SHORTFALL_CRITICAL={advice['critical']:g}"]


def markdown(result: dict[str, Any], command: str) -> str:
    """report.md."""
    orders, report, tune = result["orders"], result["report"], result["tune"]
    lines = [
        "# Backtest of the alert rules", "",
        f"`{command}` on {orders['orders']:,} orders of {orders['customers']:,} customers, {orders['first_date']} to "
        f"{orders['complete_through']}, version {orders['version']}.", "",
        *(f"- {sentence}" for sentence in verdict(result)), "",
    ]
    if env := env_lines(result):
        lines += ["```", *env, "```", ""]
    lines += [
        "![What false alarms buy](tradeoff.png)", "", "![How soon a loss is noticed](delays.png)", "",
        "## How it was measured", "",
        f"- {result['losses_of_each_kind']} losses of each kind are injected into the real orders from {report['from']} to {report['to']}",
        f"  (seed {result['seed']}), each followed for {result['followed_days']} days; its first day is day 1. Each order is lost on its",
        f"  own; a segment is {result['segment']}. Every rule of sql/ is asked as production asks it.",
        f"- Thresholds are chosen on {tune['from']} to {tune['to']} alone, by their false alarms.",
        "- A loss at whose start the rule rang already is left out (in brackets in the last column). An episode ends after 7 calm days.",
        "- *At holidays*: a closed day, or one of the two days around it, lies in the 14 days up to its first day;",
        f"  {result['closed_days']} closed days are known; {report['days_at_holidays']} of the {report['days']} days reported are such.",
        "- Shares with Wilson's 95 % interval in brackets; yearly rates with the exact 90 % interval of a Poisson count.",
        "- Late data is no loss: complete_through knows that orders are missing, or (all other columns) claims that they are in.",
        "- *Advised* is what this backtest recommends; *in budget* the lowest threshold within the budget, chosen alike.",
        "- EWMA (weight 0.3) and CUSUM (slack 0.5): daily orders against the same weekday's last 4 open days.",
        "- Ideal observer of the returning customers, at the same budget: knows the true mean of every day (from both sides of it)",
        "  and how large an outage to listen for; what is left is gamma-Poisson noise. Nobody can reach it.", "",
    ]
    for title, columns, rows in tables(result):
        lines += [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns),
                  *("| " + " | ".join(row) + " |" for row in rows), ""]
    return "\n".join(lines)


def yearly(alarms: dict[str, Any]) -> str:
    return f"{alarms['a_year']:.1f} ({alarms['a_year_low']:.1f} to {alarms['a_year_high']:.1f})"


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _episodes(alarms: dict[str, Any]) -> str:
    return f"{alarms['episodes']} (+{alarms['at_holidays']})"


def _noticed(told: dict[str, Any], intervals: bool) -> list[str]:
    cells = []
    for within in ("within_6", "within_10", "within_14"):
        share = told[within]
        between = f" ({100 * share['low']:.0f}-{100 * share['high']:.0f})" if intervals and share["share"] is not None else ""
        cells.append(percent(share["share"]) + between)
    median = told["median_delay"]
    return [*cells, "-" if median is None else f"{median:g}", f"{told['losses']} ({told['left_out']})"]
