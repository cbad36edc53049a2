"""The pictures of `backtest targeting`: what lists of each size cover, and whether the chances told came true."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num

from retention_ops.package.backtest_chart import _page, _png, _shares, percent
from retention_ops.package.chart import _FONT, _GRID, _INK, _SOFT, _text, spread

STYLES = {
    "hindsight": ("#1B2430", "d", 1.2), "at_stake": ("#0072B2", "o", 2.4), "rate": ("#A0528C", "s", 1.4),
    "revenue": ("#B87800", "^", 1.4), "rule": ("#C44E00", "v", 1.8), "random": ("#6B7480", None, 1.2), "model": ("#2E7D4F", "P", 1.6),
}
"""colour, mark and width"""
MODEL = "learned model"
WITH, WITHOUT = "#0072B2", "#B87800"
"""dates whose season was known, and dates whose was not"""


def coverage_chart(result: dict[str, Any]) -> bytes:
    """PNG: share of lost spend covered by list size, a line with its 95 % band for each order of the candidates."""
    figure, canvas = _page()
    dates, own = result["dates"], result["sizes"][0]
    _text(figure, 0.02, 0.938, f"A list as long as the rules': spend at stake covers {percent(own['covered']['at_stake']['mean'])} of lost "
          f"spend, the rules {percent(own['covered']['rule']['mean'])}", size=11, weight="bold", color=_INK)
    _text(figure, 0.02, 0.888, f"Usual spend of customers who then stayed away for {result['followed_days']} days; mean of "
          f"{dates['count']} dates, {dates['from']} to {dates['to']}", size=8.4, color=_SOFT)
    axes = figure.add_axes((0.055, 0.15, 0.70, 0.65))
    _shares(axes)
    axes.set_xscale("log")
    rows = result["sizes"][1:]
    sizes = [row["size"] for row in rows]
    x = np.array(sizes)
    axes.set_xlim(min(x[0], own["customers"]) / 1.08, max(x[-1], own["customers"]) * 1.08)
    axes.axvline(own["customers"], color=_SOFT, linewidth=0.8, dashes=(2, 2), zorder=1)
    axes.text(own["customers"] / 1.02, 101, f"rules' list, {own['customers']:,.0f} on average", ha="right", va="top", size=7.8, color=_SOFT,
              family=_FONT)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], family=_FONT)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("customers on the list (logarithmic)", size=8.2, color=_SOFT, family=_FONT, labelpad=4)
    ends = []
    names, drawn = dict(result["policies"]), {policy: [row["covered"][policy] for row in result["sizes"]] for policy in result["policies"]}
    if "model" in result:
        names["model"], drawn["model"] = MODEL, [row["model"] for row in result["model"]["sizes"]]
    for policy, (colour, mark, width) in STYLES.items():
        if policy not in drawn:
            continue
        as_rules, *told = drawn[policy]
        mean = 100 * np.array([each["mean"] for each in told])
        # the rules' list ends; whoever has time for more has nobody to call
        upto = x < own["customers"] if policy == "rule" else np.ones(len(x), dtype=bool)
        axes.plot(x[upto], mean[upto], color=colour, marker=mark, markersize=4, markeredgewidth=0, linewidth=width, zorder=4,
                  dashes=(3, 1.6) if policy in ("hindsight", "random") else (None, None))
        if policy == "rule":
            axes.plot(x, mean, color=colour, linewidth=1, dashes=(1, 1.6), zorder=3)
        axes.plot([own["customers"]], [100 * as_rules["mean"]], marker="o", markersize=7, color="none",
                  markeredgecolor=colour, markeredgewidth=1.3, zorder=5)
        if told[0]["low"] is not None:
            low, high = (100 * np.array([each[side] for each in told]) for side in ("low", "high"))
            axes.fill_between(x[upto], low[upto], high[upto], color=colour, alpha=0.13, linewidth=0, zorder=2)
        ends.append(((mean[-1] + 2) / 106, f"{names[policy]}: {mean[-1]:.0f} %", colour))
    _names(axes, ends)
    note = f"Bands: 95 %, dates resampled in blocks of {dates['block']}." if result["resamples"] else "Too few dates for intervals."
    _text(figure, 0.02, 0.025, f"{note}  Rings: as long as the rules' lists.  Covering is no lift: whether contact helps only a holdout "
          "tells.", size=7.6, color=_SOFT)
    return _png(canvas)


def calibration_chart(result: dict[str, Any]) -> bytes:
    """PNG: reliability of p_no_return_90d, and for each date its calibration error and what was told against what happened."""
    figure, canvas = _page()
    known, everybody = result["calibration"], result["calibration"]["all"]
    title = f"Of customers told the same chance, so many stayed away: off by {points(everybody['ece'])} points on average"
    if known["with_season"] and known["without_season"]:
        title = (f"Chances told are off by {points(known['with_season']['ece'])} points where the season was known, "
                 f"by {points(known['without_season']['ece'])} where it was not")
    _text(figure, 0.02, 0.938, title, size=11, weight="bold", color=_INK)
    _text(figure, 0.02, 0.888, f"p_no_return_90d of {everybody['customers']:,} candidates on {everybody['dates']} dates; "
          f"mean AUC {decimals(result['auc']['p_no_return_90d']['mean'])}", size=8.4, color=_SOFT)
    axes = figure.add_axes((0.058, 0.15, 0.40, 0.65))
    _shares(axes)
    axes.set_xlim(-2, 104)
    axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)], family=_FONT)
    axes.set_title("stayed away for 90 days, by the chance told", loc="left", size=9, color=_INK, family=_FONT, pad=7)
    axes.set_xlabel("p_no_return_90d", size=8.2, color=_SOFT, family=_FONT, labelpad=4)
    axes.plot([0, 100], [0, 100], color=_SOFT, linewidth=0.8, dashes=(2, 2), zorder=1)
    for name, colour, mark, label in (
        ("without_season", WITHOUT, "s", "no year before: season unknown"), ("with_season", WITH, "o", "season known"),
    ):
        if known[name]:
            _reliability(axes, known[name]["bins"], colour, mark, f"{label}, {known[name]['dates']} dates")
    axes.legend(loc="upper left", fontsize=7.8, frameon=False, labelcolor=_SOFT, prop={"family": _FONT, "size": 7.8})
    _by_date(figure, result["by_date"])
    block = result["dates"]["block"]
    note = f"Bars: 95 %, dates resampled in blocks of {block}." if result["resamples"] else "Too few dates for intervals."
    _text(figure, 0.02, 0.025, f"{note}  Points: bins of as many customers each.", size=7.6, color=_SOFT)
    return _png(canvas)


def _reliability(axes: Axes, bins: list[dict[str, Any]], colour: str, mark: str, label: str) -> None:
    x, y = (100 * np.array([each[name] for each in bins]) for name in ("mean_p", "stayed_away"))
    for place, each in enumerate(bins):
        if each["low"] is not None:
            axes.plot([x[place]] * 2, [100 * each["low"], 100 * each["high"]], color=colour, linewidth=1, alpha=0.55, zorder=3)
    axes.plot(x, y, color=colour, marker=mark, markersize=4.6, markeredgewidth=0, linewidth=1.2, zorder=4, label=label)


def _by_date(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Two axes over the dates: the calibration error, and the two shares whose distance is most of it."""
    days = date2num([row["date"] for row in rows])
    known = np.array([row["season_odds"] is not None and row["level_odds"] is not None for row in rows])
    error = 100 * np.array([row["ece"] for row in rows])
    above, below = figure.add_axes((0.535, 0.52, 0.44, 0.28)), figure.add_axes((0.535, 0.15, 0.44, 0.24))
    for axes, title in ((above, "calibration error (ECE) of each date, points"), (below, "told (line) and stayed away (marks)")):
        _shares(axes)
        axes.set_title(title, loc="left", size=9, color=_INK, family=_FONT, pad=7)
        locator = AutoDateLocator(minticks=3, maxticks=8)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))
        axes.set_xlim(days[0] - 10, days[-1] + 10)
    top = max(10.0, float(np.ceil(error.max() / 10) * 10))
    above.set_ylim(0, top * 1.05)
    ticks = np.arange(0, top + 1, 10 if top > 10 else 5)
    above.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    above.vlines(days, 0, error, color=np.where(known, WITH, WITHOUT), linewidth=2.6, zorder=3)
    shares = {name: 100 * np.array([row[name] for row in rows]) for name in ("mean_p", "stayed_away")}
    below.plot(days, shares["mean_p"], color=_SOFT, linewidth=1.2, zorder=3)
    for each, colour, mark in ((known, WITH, "o"), (~known, WITHOUT, "s")):
        below.plot(days[each], shares["stayed_away"][each], color=colour, marker=mark, markersize=3.4, markeredgewidth=0, linestyle="none",
                   zorder=4)
    below.set_ylim(0, 100)
    below.set_yticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
    for axes in (above, below):
        for label in (*axes.get_yticklabels(), *axes.get_xticklabels()):
            label.set_family(_FONT)
        axes.grid(axis="y", color=_GRID, linewidth=0.6)


def _names(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """The name of each line beside its end."""
    heights = spread([height for height, *_ in ends], gap=0.06, floor=0.02)
    style = {"transform": axes.transAxes, "clip_on": False}
    for (end, label, colour), height in zip(ends, heights, strict=True):
        axes.plot([1.004, 1.02, 1.03], [end, height, height], color=colour, linewidth=0.7, **style)
        axes.text(1.036, height, label, va="center", size=8, color=colour, family=_FONT, **style)


def points(share: float) -> str:
    """A share as points, with a decimal where it is small."""
    return f"{100 * share:.1f}" if abs(share) < 0.0995 else f"{100 * share:.0f}"


def decimals(share: float | None) -> str:
    """An AUC as tables have it."""
    return "-" if share is None else f"{share:.3f}".lstrip("0") if share < 1 else "1.000"
