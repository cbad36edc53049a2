"""The pictures of a backtest: what each rule's false alarms buy, and how soon a loss is noticed. In the style of package/chart.py."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from retention_ops.detect.backtest import MOST_RUNG
from retention_ops.package.chart import _DPI, _FONT, _GRID, _INK, _SOFT, _text, spread

WIDTH, HEIGHT = 1680, 920
"""Pixels, shown at half that size"""
MOST_A_YEAR = 8
"""false episodes a year shown; whoever rings more often is not an alarm any more"""
STYLES = {
    "returning": ("#0072B2", "o", 2.2), "ewma": ("#B87800", "^", 1.3), "cusum": ("#A0528C", "s", 1.3), "at_risk": ("#6B7480", "v", 1.3),
}
IDEAL = "#1B2430"
SHARES = {"outage_10": "#BFD9EA", "outage_20": "#8DBBDA", "outage_30": "#4F97C6", "outage_50": "#0072B2", "outage_70": "#004F7C",
          "outage_100": "#1B2430"}
OTHERS = {"decline": ("#B87800", (3, 1.2)), "segment": ("#A0528C", (3, 1.2)), "nothing": ("#6B7480", (1, 1.4))}
"""colour and dashes"""


def trade_off_chart(result: dict[str, Any]) -> bytes:
    """PNG: share of 30 % outages noticed within 14 days, and of 50 % within 6, against false episodes a year, a line for each rule."""
    figure, canvas = _page()
    report = result["report"]
    _text(figure, 0.02, 0.938, _finding(result), size=10.5, weight="bold", color=_INK)
    _text(figure, 0.02, 0.888, f"{result['losses_of_each_kind']} outages of each size between {report['from']} and {report['to']}; "
          "each point is one threshold of a rule", size=8.4, color=_SOFT)
    handles: dict[str, Any] = {}
    for left, kind, within in ((0.058, "outage_30", 14), (0.552, "outage_50", 6)):
        axes = figure.add_axes((left, 0.235, 0.43, 0.545))
        _shares(axes)
        axes.set_title(f"{result['kinds'][kind]}: noticed within {within} days", loc="left", size=9, color=_INK, family=_FONT, pad=7)
        _curves(axes, result, kind, f"within_{within}", handles)
        axes.set_xlim(-0.25, MOST_A_YEAR)
        axes.set_xticks(range(0, MOST_A_YEAR + 1, 2))
        axes.set_xlabel("false episodes a year outside holidays", size=8.2, color=_SOFT, family=_FONT, labelpad=4)
        axes.axvline(result["budget"], color=_SOFT, linewidth=0.8, dashes=(2, 2), zorder=1)
        axes.text(result["budget"] + 0.08, 2.5, "budget", size=7.6, color=_SOFT, family=_FONT)
    figure.legend(handles.values(), handles.keys(), loc="lower left", bbox_to_anchor=(0.012, 0.06), ncols=len(handles), frameon=False,
                  prop={"family": _FONT, "size": 7.8}, labelcolor=_INK, handlelength=2.0, columnspacing=1.5, borderpad=0)
    _text(figure, 0.02, 0.02, f"Left out: thresholds that ring on more than {100 * MOST_RUNG:.0f} % of the days. The ideal observer knows "
          "the true mean of every day, and the size of the outage.", size=7.2, color=_SOFT)
    return _png(canvas)


def _finding(result: dict[str, Any]) -> str:
    recommended = result["recommendation"]
    row = threshold_row(result, "returning", recommended["warning"] or result["settings"]["shortfall_warning"])
    share = row["kinds"]["outage_30"]["within_14"]["share"]
    episodes = row["report"]["episodes"]
    return (f"WARNING from {row['threshold']:g}: {percent(share)} of 30 % outages noticed in 14 days, "
            f"{episodes} false episode{'' if episodes == 1 else 's'} in {result['report']['days']} days")


def _curves(axes: Axes, result: dict[str, Any], kind: str, within: str, handles: dict[str, Any]) -> None:
    if kind in result["ideal"]:
        points = [(point["a_year"], 100 * point[within]["share"]) for point in result["ideal"][kind]["curve"]]
        handles["ideal observer"], = axes.plot(*zip(*points, strict=True), color=IDEAL, linewidth=1.1, dashes=(3, 1.6), zorder=2)
    chosen = None
    for rule in result["rules"]:
        colour, mark, width = STYLES[rule["rule"]]
        kept = [row for row in rule["thresholds"] if row["report"]["days_rung"] <= MOST_RUNG * result["report"]["days"]]
        points = [(row["report"]["a_year"], 100 * row["kinds"][kind][within]["share"]) for row in kept
                  if row["kinds"][kind][within]["share"] is not None]
        if points:
            handles[rule["label"]], = axes.plot(
                *zip(*points, strict=True), color=colour, marker=mark, markersize=3.4, markeredgewidth=0, linewidth=width, zorder=4,
                solid_joinstyle="round", clip_on=True)
        if rule["rule"] == "returning" and rule["chosen"]:
            row = next(row for row in rule["thresholds"] if row["threshold"] == rule["chosen"])
            chosen = row["report"]["a_year"], 100 * row["kinds"][kind][within]["share"], rule["chosen"]
    if chosen:
        x, y, threshold = chosen
        axes.plot([x], [y], marker="o", markersize=10, color="none", markeredgecolor=STYLES["returning"][0], markeredgewidth=1.6, zorder=6)
        axes.text(
            x + 0.28, y - 6.5 if y > 12 else y + 4, f"chosen: {threshold:g}", size=8.4, weight="bold", color=STYLES["returning"][0],
            family=_FONT, zorder=7, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85})


def delay_chart(result: dict[str, Any]) -> bytes:
    """PNG: share of losses of each kind noticed by the end of each day, at the chosen setting."""
    figure, canvas = _page()
    threshold = result["recommendation"]["warning"] or result["settings"]["shortfall_warning"]
    title = f"How soon a loss is noticed with RETENTION_OPS_SHORTFALL_WARNING={threshold:g}"
    _text(figure, 0.02, 0.938, title, size=11, weight="bold", color=_INK)
    report = result["report"]
    _text(figure, 0.02, 0.888, f"Share of {result['losses_of_each_kind']} losses of each kind between {report['from']} and {report['to']}, "
          "by days since the loss began", size=8.4, color=_SOFT)
    axes = figure.add_axes((0.055, 0.15, 0.655, 0.65))
    _shares(axes)
    days = result["followed_days"]
    axes.set_xlim(0.5, days + 0.5)
    axes.set_xticks([1, *range(7, days + 1, 7)])
    axes.set_xlabel("day of the loss", size=8.2, color=_SOFT, family=_FONT, labelpad=4)
    ends = []
    for kind, values in result["by_day"].items():
        colour, dashes = OTHERS[kind] if kind in OTHERS else (SHARES[kind], (None, None))
        axes.plot(np.arange(1, days + 1), 100 * np.array(values), color=colour, linewidth=1.9, drawstyle="steps-post",
                  dashes=dashes, zorder=3)
        legible = "#4C86AE" if kind in ("outage_10", "outage_20") else colour
        ends.append((100 * values[-1], result["kinds"][kind], legible))
    heights = spread([(value + 2) / 106 for value, *_ in ends], gap=0.06, floor=0.02)
    lowered = max(0.0, max(heights) - 1.0)  # where many end at 100 % their names stand below, not in the title
    heights = spread([min(height, 1.0) - lowered if height > 0.6 else height for height in heights], gap=0.06, floor=0.02)
    style = {"transform": axes.transAxes, "clip_on": False}
    for (value, label, colour), height in zip(ends, heights, strict=True):
        axes.plot([1.004, 1.02, 1.03], [(value + 2) / 106, height, height], color=colour, linewidth=0.7, **style)
        axes.text(1.036, height, f"{label}: {value:.0f} %", va="center", size=8, color=colour, family=_FONT, **style)
    note = "Left out: starts at which the alarm rang already. Grey: the same days with nothing lost."
    _text(figure, 0.02, 0.025, note, size=7.6, color=_SOFT)
    return _png(canvas)


# -- small things ------------------------------------------------------------------------------------------------------


def threshold_row(result: dict[str, Any], rule: str, threshold: float) -> dict[str, Any]:
    """The entry of one threshold of a rule."""
    found = next(each for each in result["rules"] if each["rule"] == rule)
    return next(row for row in found["thresholds"] if row["threshold"] == threshold)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _page() -> tuple[Figure, FigureCanvasAgg]:
    figure = Figure(figsize=(WIDTH / _DPI, HEIGHT / _DPI), dpi=_DPI, facecolor="white")
    return figure, FigureCanvasAgg(figure)


def _png(canvas: FigureCanvasAgg) -> bytes:
    target = BytesIO()
    canvas.print_png(target, pil_kwargs={"compress_level": 4})
    return target.getvalue()


def _shares(axes: Axes) -> None:
    """A y axis of shares, and the frame all charts here have."""
    axes.set_ylim(-2, 104)
    axes.set_yticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
    for label in (*axes.get_yticklabels(), *axes.get_xticklabels()):
        label.set_family(_FONT)
    axes.tick_params(length=0, pad=4, labelsize=8.2, labelcolor=_SOFT)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_SOFT)
    axes.spines["bottom"].set_linewidth(0.6)
