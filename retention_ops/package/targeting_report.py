"""`backtest targeting` in words and tables: what the terminal and report.md say of retention_ops.detect.targeting's result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from retention_ops.detect.targeting import CUSTOMER_PARTS
from retention_ops.package.backtest_chart import percent
from retention_ops.package.backtest_report import Table
from retention_ops.package.targeting_chart import decimals, points

NAMES = {"random": "random", "rule": "rules", "revenue": "revenue", "rate": "rate", "at_stake": "at stake", "hindsight": "hindsight"}
STATUS_NAMES = {"ACTIVE": "ACTIVE", "AT_RISK": "AT_RISK", "INACTIVE": "INACTIVE", "lapsed": "not ACTIVE"}


def coverage_table(result: dict[str, Any], intervals: bool = True) -> Table:
    """Share of lost spend covered by lists of each size."""
    rows = []
    for row in result["sizes"]:
        name = f"{row['customers']:,.0f}" if row["size"] else f"rules' own ({row['customers']:,.0f})"
        rows.append([name, *(_share(row["covered"][policy], intervals) for policy in NAMES)])
    return "Share of lost spend covered, by list size", ["customers", *NAMES.values()], rows


def queues_table(result: dict[str, Any], intervals: bool = True) -> Table:
    """What the settings' four queues cover, from the top."""
    now, advice = result["settings"], result["recommendation"]
    rows = []
    for row in result["queues"]:
        pair = row["membership"], row["rank_by"]
        marks = [word for word, of in (("now", now), ("advised", advice)) if pair == (of["membership"], of["rank_by"])]
        name = f"{pair[0]}, by {pair[1]}" + (f" ({' = '.join(marks)})" if marks else "")
        rows.append([name, *(_share(row[part], intervals) for part in ("whole", "half", "quarter"))])
    rows.append(["at_stake, AT_STAKE_SIZE cut", *(_share(result["cut"][part], intervals) for part in ("whole", "half", "quarter"))])
    return "Queues as long as the rules': share of lost spend covered", ["membership, rank_by", "whole", "first half", "quarter"], rows


def ranks_table(result: dict[str, Any], intervals: bool = True) -> Table:
    """How well each number ranks who stays away, and how true the chances are."""
    known = result["calibration"]
    rows = [[f"AUC of {name}", _auc(told, intervals)] for name, told in result["auc"].items()]
    for name, label in (("all", "all dates"), ("with_season", "season known"), ("without_season", "season unknown")):
        if known[name]:
            rows.append([f"ECE, {label} ({known[name]['dates']})", decimals(known[name]["ece"])])
    return "p_no_return_90d", ["", "value"], [*rows, ["ECE, mean of the dates' own", decimals(known["ece_per_date"])]]


def status_table(result: dict[str, Any]) -> Table:
    """The same by status: lists as long as the rules' list of that status."""
    rows = []
    for name, row in result["by_status"].items():
        rows.append([STATUS_NAMES[name], f"{row['candidates']:,.0f}", f"{row['rule_size']:,.0f}", f"{row['lost_spend']:,.0f}",
                     *(percent(row.get(policy)) for policy in ("random", "rule", "at_stake", "hindsight")),
                     decimals(row.get("auc_p")), decimals(row.get("auc_score"))])
    return ("By status: each with a list as long as the rules' list of it",
            ["status", "candidates", "rules list", "lost", "random", "rules", "at stake", "hindsight", "AUC", "score's"], rows)


def stability_table(result: dict[str, Any]) -> Table:
    rows = []
    for name, row in result["stability"].items():
        rows.append([f"from {name} to {name}", *(percent(row[policy][of]) for policy in ("rule", "at_stake") for of in ("all", "silent"))])
    return ("Stability: share of the earlier list that is on the later one",
            ["", "rules", "without an order", "at stake", "without an order"], rows)


def dates_table(result: dict[str, Any]) -> Table:
    """Every date: what was told, what happened, and why the two differ."""
    rows = []
    for row in result["by_date"]:
        rows.append([
            str(row["date"]), f"{row['candidates']:,}", f"{row['rule_size']:,}", f"{row['lost_spend']:,.0f}",
            *(percent(row[f"covered_{policy}"]) for policy in ("rule", "at_stake", "hindsight")), decimals(row["auc_p"]),
            percent(row["mean_p"]), percent(row["stayed_away"]), decimals(row["ece"]),
            *("-" if row[name] is None else f"{row[name]:.2f}" for name in ("season_odds", "level_odds")), cause(row),
        ])
    return "Every date", ["D", "candidates", "rules list", "lost", "rules", "at stake", "hindsight", "AUC", "told", "stayed away", "ECE",
                          "season odds", "level odds", "why"], rows


def cause(row: dict[str, Any]) -> str:
    """Why what was told differs from what happened, as far as the numbers of the date tell."""
    off = row["stayed_away"] - row["mean_p"]
    if row["ece"] < 0.02:
        return "true"
    if abs(off) <= row["ece"] / 2:
        return "right on the whole, off in some bins"
    moved = f"{points(abs(off))} points {'more' if off > 0 else 'fewer'} stayed away than told"
    return moved + (": no year before it, season unknown" if row["season_odds"] is None or row["level_odds"] is None
                    else ": season and level moved on since")


def model_table(result: dict[str, Any], intervals: bool = True) -> Table:
    """A learned model beside the table of return_rates, on the same dates."""
    model = result["model"]
    rows = []
    for row in model["sizes"]:
        name = f"{row['customers']:,.0f} customers" if row["size"] else f"as long as the rules' ({row['customers']:,.0f})"
        rows.append([name, *(_share(row[of], intervals) for of in ("table", "model")), _gap(row["ahead"], points)])
    for name, label in (("auc", "AUC"), ("ece_per_date", "ECE, mean of the dates' own")):
        row = model[name]
        rows.append([label, *(_auc(row[of], intervals) for of in ("table", "model")), _gap(row["ahead"], signed)])
    known = model["calibration"]
    for name, label in (("all", "all dates"), ("with_season", "season known"), ("without_season", "season unknown")):
        if known["table"][name]:
            table, learned = (known[of][name]["ece"] for of in ("table", "model"))
            rows.append([f"ECE, {label} ({known['table'][name]['dates']})", decimals(table), decimals(learned), signed(learned - table)])
    return "A learned model beside the table: lists by spend at stake", ["", "table", "model", "model - table (points, AUC, ECE)"], rows


def model_dates_table(result: dict[str, Any]) -> Table:
    rows = []
    for row in result["model"]["by_date"]:
        rows.append([str(row["date"]), *(percent(row[f"covered_{of}"]) for of in ("table", "model")),
                     *(decimals(row[f"{name}_{of}"]) for name in ("auc", "ece") for of in ("table", "model"))])
    return "Table and model on every date", ["D", "table covers", "model covers", "AUC table", "AUC model", "ECE table", "ECE model"], rows


def model_verdict(model: dict[str, Any]) -> str:
    """Whether the model beats the table by more than its interval, in a sentence."""
    told = model["against_table"]
    gap = "as much"
    if told["mean"]:
        gap = f"{points(abs(told['mean']))} points of lost spend {'more' if told['mean'] > 0 else 'less'} than by the table"
    if told["low"] is not None:
        gap += f" ({points(told['low'])} to {points(told['high'])} over dates"
        if told["customers_low"] is not None:
            gap += f", {points(told['customers_low'])} to {points(told['customers_high'])} over customers"
        gap += ")"
    said = f"Lists by the learned model cover {gap}: "
    if not model["enough_history"]:
        return said + "too short to judge."
    if model["beats_table"]:
        return said + "it beats the table by more than both intervals, so return_model=learned is obeyed from now on."
    return said + ("the table is better by more than both intervals." if model["worse"] else "chance explains it; keep the table.")


def tables(result: dict[str, Any]) -> Iterator[Table]:
    yield coverage_table(result)
    yield queues_table(result)
    yield ranks_table(result)
    if "model" in result:
        yield model_table(result)
    yield status_table(result)
    yield stability_table(result)
    yield dates_table(result)
    if "model" in result:
        yield model_dates_table(result)


def verdict(result: dict[str, Any]) -> list[str]:
    """What to set, and how sure that is, in sentences."""
    advice, own, known, dates = result["recommendation"], result["sizes"][0], result["calibration"], result["dates"]
    covered = own["covered"]
    said = [
        f"Lists as long as the rules' ({own['customers']:,.0f} on average) would have covered, of the spend lost in the next "
        f"{result['followed_days']} days: spend at stake {_between(covered['at_stake'])}, the rules {_between(covered['rule'])}, a random "
        f"list {percent(covered['random']['mean'])}, hindsight {percent(covered['hindsight']['mean'])}."
    ]
    if not advice["enough_history"]:
        said.append(f"Too short to judge: {dates['count']} dates over {advice['days']} days. Keep the settings in force until dates span a "
                    "year, so that every season was seen.")
    else:
        by_stake, ranked = advice["membership_at_stake"], advice["rank_by_spend_at_stake"]
        said += [_advice("membership", advice["membership"], advice["membership_is_sure"], by_stake, "at_stake", result, "the whole list"),
                 _advice("rank_by", advice["rank_by"], advice["rank_by_is_sure"], ranked, "spend_at_stake", result, "its first half")]
        if advice["blocks"] < 5:
            said.append(f"The dates are only {advice['blocks']:.1f} blocks of {result['followed_days']} days: the intervals are rough.")
    if advice["membership"] == "at_stake":
        half = next(row["half"]["mean"] for row in result["queues"] if all(row[name] == advice[name] for name in ("membership", "rank_by")))
        said.append(f"A queue goes tier by tier. If you can contact half as many, set AT_STAKE_SIZE to that number rather than stop "
                    f"halfway: {percent(result['cut']['half']['mean'])} instead of {percent(half)}.")
    auc = result["auc"]
    said.append(f"p_no_return_90d ranks who stays away with AUC {decimals(auc['p_no_return_90d']['mean'])}, churn_risk_score with "
                f"{decimals(auc['churn_risk_score']['mean'])} (a coin: .500).")
    if known["with_season"]:
        said.append(f"On the {known['with_season']['dates']} dates whose season was known it is off by "
                    f"{points(known['with_season']['ece'])} points (ECE)"
                    + (f", on the {known['without_season']['dates']} without a year before them by "
                       f"{points(known['without_season']['ece'])}." if known["without_season"] else "."))
    else:
        said.append(f"It is off by {points(known['all']['ece'])} points (ECE); no date has the year before it that tells the season.")
    if "model" in result:
        said.append(model_verdict(result["model"]))
    if day := result["stability"].get("day"):
        said.append(f"From day to day {percent(day['at_stake']['all'])} of the at_stake list stay on it, of the rules' "
                    f"{percent(day['rule']['all'])}.")
    said.append("Covering is no lift: whether contact helps, and whom, only a holdout tells.")
    return said


def _advice(
    setting: str, chosen: str, sure: bool, told: dict[str, Any], subject: str, result: dict[str, Any], part: str,
) -> str:
    gap = f"{points(told['mean'])} points of lost spend in {part} ({points(told['low'])} to {points(told['high'])} over dates"
    if told["customers_low"] is not None:
        gap += f", {points(told['customers_low'])} to {points(told['customers_high'])} over customers"
    gap += ")"
    if not sure:
        return f"{setting}={chosen}, as it is: {subject} differs by {gap}, which chance explains."
    share = told["better"] if chosen == subject else 1 - told["better"]
    return (f"{setting}={chosen}: {subject} changes what is covered by {gap}; {chosen} is ahead in {_almost(share)} of "
            f"{result['resamples']:,} resamples.")


def env_lines(result: dict[str, Any]) -> list[str]:
    """The lines for .env; none where the history is too short or nothing changes."""
    advice, now = result["recommendation"], result["settings"]
    if not advice["enough_history"]:
        return []
    if "model" in result:
        advice = {**advice, "return_model": "learned" if result["model"]["beats_table"] else "table"}
    names = ("membership", "rank_by", "return_model")
    return [f"RETENTION_OPS_{name.upper()}={advice[name]}" for name in names if name in advice and advice[name] != now[name]]


def markdown(result: dict[str, Any], command: str) -> str:
    """report.md."""
    orders, dates = result["orders"], result["dates"]
    block = f"{dates['block']} neighbouring dates"
    lines = [
        "# Who the queue would have reached", "",
        f"`{command}` on {orders['orders']:,} orders of {orders['customers']:,} customers, {orders['first_date']} to "
        f"{orders['complete_through']}, version {orders['version']}.", "",
        *(f"- {sentence}" for sentence in verdict(result)), "",
    ]
    if env := env_lines(result):
        lines += ["```", *env, "```", ""]
    lines += [
        "![What lists of each size cover](coverage.png)", "", "![Whether the chances came true](calibration.png)", "",
        "## How it was measured", "",
        f"- {dates['count']} dates D from {dates['from']} to {dates['to']}, every "
        + ("month" if dates["every"] == "month" else f"{dates['every']} days") + ". At each one the rules of sql/ are asked as",
        f"  production asks them, with the orders up to D; the {result['followed_days']} days after it are looked up then."
        + (f" {len(dates['left_out'])} dates are left out: the rules list nobody, or nothing was lost." if dates["left_out"] else ""),
        f"- Candidates: customers silent for at most {result['candidate_days']} days (2 x at_risk_days), "
        f"{result['candidates']:,.0f} on average.",
        "- Lost spend: usual_spend_90d of the candidates without an order in the "
        f"{result['followed_days']} days after D, {result['lost_spend']:,.0f} {orders['currency']} on average.",
        "- *rules*: P1, P2 and P3 by priority_score; a list longer than theirs covers no more. *revenue*: total_revenue. *rate*:",
        "  usual_spend_90d. *at stake*: spend_at_stake. *hindsight*: the customers who did stay away, by usual spend. *random*: the",
        "  expectation.",
        "- Shares are the mean over the dates.",
        f"- Brackets: 95 % percentile interval of {result['resamples']:,} resamples of the dates in circular blocks of {block} (seed"
        f" {result['seed']}),", "  because the days after neighbouring dates overlap. That the customers could be others is not in it:"
        f" *over customers* is a jackknife over {CUSTOMER_PARTS} parts of them."
        if result["resamples"] else f"- No intervals: there are fewer dates than two blocks of {block}, whose following days overlap.",
        "- ECE: bins of about as many customers each (10), |share that stayed away - mean p|, mean by customers. AUC: ties half.",
        "- *season known*: return_rates had the year before D that season_odds and level_odds need.",
        "- Stability: on days of every weekday; *without an order*: of those who ordered nothing in between.",
        *(["- *model*: gradient boosting learned anew for each date from days whose 90 days were over on it, calibrated on the newest",
           "  of them; how many stay away on the whole is the table's."] if "model" in result else []), "",
    ]
    for title, columns, rows in tables(result):
        lines += [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns),
                  *("| " + " | ".join(row) + " |" for row in rows), ""]
    return "\n".join(lines)


def _share(told: dict[str, Any], intervals: bool) -> str:
    between = f" ({100 * told['low']:.0f}-{100 * told['high']:.0f})" if intervals and told["low"] is not None else ""
    return percent(told["mean"]) + between


def _between(told: dict[str, Any]) -> str:
    between = f" ({100 * told['low']:.0f} to {100 * told['high']:.0f})" if told["low"] is not None else ""
    return percent(told["mean"]) + between


def _auc(told: dict[str, Any], intervals: bool) -> str:
    between = f" ({decimals(told['low'])}-{decimals(told['high'])})" if intervals and told["low"] is not None else ""
    return decimals(told["mean"]) + between


def signed(difference: float) -> str:
    """A difference of two AUC or ECE."""
    return f"{'-' if difference < 0 else '+'}{decimals(abs(difference))}"


def _gap(told: dict[str, Any], number: Callable[[float], str]) -> str:
    """A difference with its interval over dates."""
    between = f" ({number(told['low'])} to {number(told['high'])})" if told["low"] is not None else ""
    return number(told["mean"]) + between


def _almost(share: float) -> str:
    """A share of resamples; none are all of what could be."""
    return "all" if share == 1 else f"{100 * share:.1f} %"
