"""The charts of a pack, as PNGs that explain themselves: AT_RISK % against its baseline, and returning customers against what
was due, each with its two lines.

Drawn with matplotlib's object API on its own Agg canvas: no pyplot, no global state, so threads do not meet. A backfill draws
hundreds, hence a fixed layout, few artists and one draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from retention_ops.package.brief import as_date, rise_digits, side_digits

WIDTH, HEIGHT = 1280, 720
"""Pixels; shown at half that size, so that it is sharp on a 2x screen."""
_DPI = 200

# Okabe-Ito colours: told apart with every common colour vision; marks differ in shape as well
_LINE, _MEAN, _WARNING, _CRITICAL = "#0072B2", "#6B7480", "#B87800", "#C44E00"
_WARNING_BAND, _CRITICAL_BAND, _GATED_BAND = "#FBF0DA", "#F8DFD0", "#EEF0F2"
_GATED = "#9AA3AD"
_INK, _SOFT, _GRID = "#1B2430", "#5B6470", "#E6EAEE"
_FONT = "DejaVu Sans"  # ships with matplotlib: the picture is the same on every machine

_SUBTITLE = 84
"""characters that fit into the line below the title"""

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def trend_chart(
    history: list[dict[str, Any]], *, warning_pct: float, critical_pct: float, shop_name: str, currency: str | None = None
) -> bytes:
    """PNG (WIDTH x HEIGHT) of alert_logic rows, oldest first.

    `warning_pct` and `critical_pct` are % above the baseline and place the two lines, baseline * (1 + pct/100), day by day.
    Missing values and missing days are gaps. `currency` is accepted for the caller's sake; the chart shows no money.
    """
    series = _Series(history, warning_pct, critical_pct)

    def draw(axes: Axes, figure: Figure) -> None:
        _frame(axes, figure, series)
        _draw(axes, series)
        _name_lines(axes, series)

    return _picture(series.sentence((warning_pct, critical_pct)), _subtitle(shop_name), draw if series.known else None)


def returning_chart(shortfalls: list[dict[str, Any]], shop_name: str) -> bytes:
    """PNG (WIDTH x HEIGHT) of the second rule's alert_logic rows, oldest first: % above or below what was due, day by day.

    The two lines are the day's own. Missing values and missing days are gaps; nothing can be more than 100 % below.
    """
    returns = _Returns(shortfalls)

    def draw(axes: Axes, figure: Figure) -> None:
        _frame_returns(axes, figure, returns)
        _draw_returns(axes, returns)
        _name_returns(axes, returns)

    return _picture(returns.sentence(), returns.subtitle(shop_name), draw if returns.known else None)


def _picture(title: str, subtitle: str, draw: Callable[[Axes, Figure], None] | None) -> bytes:
    """The sheet that both charts stand on; without `draw` there is nothing to show yet."""
    figure = Figure(figsize=(WIDTH / _DPI, HEIGHT / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.086, 0.17, 0.672, 0.625))
    _text(figure, 0.02, 0.922, title, size=11, weight="bold", color=_INK)
    _text(figure, 0.02, 0.855, subtitle, size=8.4, color=_SOFT)
    if draw:
        draw(axes, figure)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "Nothing to draw yet", ha="center", va="center", size=8, color=_SOFT, family=_FONT)
    target = BytesIO()
    canvas.print_png(target, pil_kwargs={"compress_level": 4})
    return target.getvalue()


class _Series:
    """The rows as arrays over consecutive days; NaN where there is no row or no value."""

    def __init__(self, rows: Sequence[dict[str, Any]], warning_pct: float, critical_pct: float) -> None:
        rows = sorted(rows, key=lambda row: as_date(row["alert_date"]))
        self.first = as_date(rows[0]["alert_date"]) if rows else date(2000, 1, 1)
        self.days = (as_date(rows[-1]["alert_date"]) - self.first).days + 1 if rows else 0
        self.current, self.mean = (np.full(self.days, np.nan) for _ in range(2))
        self.severity, self.gated = ["INFO"] * self.days, np.zeros(self.days, dtype=bool)
        for row in rows:
            place = (as_date(row["alert_date"]) - self.first).days
            self.current[place] = _value(row["current_value"])
            self.mean[place] = _value(row["baseline_value"])
            self.severity[place] = row["severity"] if row["alert_flag"] else "INFO"
            self.gated[place] = bool(row["gate"])
        drawn = np.where(self.mean > 0, self.mean, np.nan)  # a baseline of 0 has no lines
        self.warning, self.critical = drawn * (1 + warning_pct / 100), drawn * (1 + critical_pct / 100)
        self.last = rows[-1] if rows else None
        self.known = bool(np.isfinite(self.current).any())
        self.all_gated = bool(rows) and all(row["gate"] for row in rows)

    def places(self, severity: str) -> list[int]:
        return [place for place, value in enumerate(self.severity) if value == severity]

    def sentence(self, thresholds: tuple[float, float]) -> str:
        """The title: what the last day says, in one line."""
        current = _value(self.last["current_value"]) if self.last else math.nan
        if not self.last or math.isnan(current):
            return "AT_RISK has no value yet"
        if self.last["gate"]:
            return f"Not judged: AT_RISK is {current:.1f} %, held back by a safeguard"
        verdict = self.last["severity"] if self.last["alert_flag"] else "No alert"
        mean, relative = _value(self.last["baseline_value"]), _value(self.last["delta_relative_pct"])
        return f"{verdict}: AT_RISK is {current:.1f} %{_against(current, mean, relative, thresholds)}"


def _against(current: float, mean: float, relative: float, thresholds: tuple[float, float]) -> str:
    if math.isnan(relative):
        return ""
    digits = rise_digits(current, mean, relative, thresholds)
    if digits is None:
        return ", level with its 7-day mean"
    return f", {abs(relative):,.{digits}f} % {'above' if relative > 0 else 'below'} its 7-day mean"


def _frame(axes: Axes, figure: Figure, series: _Series) -> None:
    """Axis range, grid and labels. The range always holds the lines of the last day, so that noise looks as small as it is
    against them; where it does not start at 0 it says so."""
    values = np.concatenate([series.current, series.mean, series.warning, series.critical])
    values = values[np.isfinite(values)]
    low, high, step = axis_range(float(values.min()), float(values.max()))
    ticks = np.arange(low, high + step / 2, step)
    _scale(axes, (low, high), ticks, [f"{tick:g} %" for tick in ticks], series.first, series.days)
    axes.spines["bottom"].set_color(_GRID if low else _SOFT)
    _text(figure, 0.02, 0.03, _footnote(low, series), size=7.6, color=_SOFT)


def _scale(
    axes: Axes, limits: tuple[float, float], ticks: np.ndarray, names: Sequence[str], first: date, days: int
) -> None:
    """Limits, grid and labels of both axes."""
    axes.set_xlim(-0.6, days - 0.4)
    axes.set_ylim(*limits)
    axes.set_yticks(ticks, names, size=8.5, color=_SOFT, family=_FONT)
    places = _tick_places(first, days)
    labels = [_short_day(first + timedelta(days=place)) for place in places]
    axes.set_xticks(places, labels, size=8.5, color=_SOFT, family=_FONT)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_linewidth(0.6)


def _footnote(low: float, series: _Series) -> str:
    """What a reader could otherwise take wrongly: where the axis starts and what the marks are."""
    notes = [f"Axis starts at {low:g} %, not at 0."] if low else []
    notes += ["Triangle: WARNING day."] if series.places("WARNING") else []
    notes += ["Square: CRITICAL day."] if series.places("CRITICAL") else []
    if series.gated.any():
        notes.append("Every day shown is held back by a safeguard." if series.all_gated else "Grey: held back by a safeguard.")
    return "  ".join(notes)


def axis_range(low: float, high: float) -> tuple[float, float, float]:
    """(bottom, top, step) of the y axis in %. From 0 where that costs less than half the height, else just below the data."""
    if high <= 0:
        return 0.0, 1.0, 0.5
    bottom = 0.0 if low < 0.5 * high else low - 0.25 * (high - low) - 0.02 * high
    span = max(high - bottom, 0.5)
    step = next((size for size in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 25, 50, 100, 250) if span / size <= 6), span / 4)
    bottom = max(0.0, math.floor(bottom / step + 1e-9) * step)
    top = math.ceil((high + 0.04 * span) / step - 1e-9) * step
    return bottom, max(top, bottom + 2 * step), step


def _draw(axes: Axes, series: _Series) -> None:
    """Bands, lines and marks, back to front."""
    x = np.arange(series.days)
    top = axes.get_ylim()[1]
    axes.fill_between(x, series.warning, series.critical, color=_WARNING_BAND, linewidth=0, zorder=1)
    axes.fill_between(x, series.critical, top, color=_CRITICAL_BAND, linewidth=0, zorder=1)
    # grey all over with no line to hold back would only look like an empty box
    for start, end in _runs(series.gated) if not series.all_gated or np.isfinite(series.warning).any() else []:
        axes.axvspan(start - 0.5, end + 0.5, color=_GATED_BAND, linewidth=0, zorder=1.5)
    axes.plot(x, series.warning, color=_WARNING, linewidth=0.9, zorder=2)
    axes.plot(x, series.critical, color=_CRITICAL, linewidth=0.9, zorder=2)
    axes.plot(x, series.mean, color=_MEAN, linewidth=1.1, dashes=(3, 1.6), zorder=3)
    # a gated day still has a value, in grey: the number is real, the judgement is missing
    judged = np.where(series.gated, np.nan, series.current)
    for values, colour, width in ((series.current, _GATED, 1.6), (judged, _LINE, 2.1)):
        axes.plot(x, values, color=colour, linewidth=width, zorder=5, solid_capstyle="round", marker="o", markersize=2.6,
                  markevery=_lonely(values))
    for severity, mark, colour, size in (("WARNING", "^", _WARNING, 6.4), ("CRITICAL", "s", _CRITICAL, 5.6)):
        places = series.places(severity)
        axes.plot(places, series.current[places], mark, color=colour, markersize=size, markeredgecolor="white",
                  markeredgewidth=0.6, linestyle="none", zorder=6)


def _lonely(values: np.ndarray) -> list[int]:
    """Places whose neighbours are both missing: a line would not show them."""
    known = np.isfinite(values)
    around = np.concatenate([[False], known, [False]])
    return [int(place) for place in np.flatnonzero(known & ~around[:-2] & ~around[2:])]


def _name_lines(axes: Axes, series: _Series) -> None:
    """Each line's name and last value at its right end instead of a legend, moved apart where they would touch."""
    _name_ends(axes, [(value, f"{name} {value:.1f} %", colour, weight) for values, name, colour, weight in (
        (series.current, "AT_RISK", _INK if series.gated[-1] else _LINE, "bold"), (series.critical, "CRITICAL", _CRITICAL, "normal"),
        (series.warning, "WARNING", _WARNING, "normal"), (series.mean, "7-day mean", _MEAN, "normal"),
    ) if np.isfinite(value := values[-1])])


def _name_ends(axes: Axes, labels: Sequence[tuple[float, str, str, str]]) -> None:
    """Labels (value, text, colour, weight) beside the right end of the axes, each led to its value."""
    low, high = axes.get_ylim()
    heights = spread([(value - low) / (high - low) for value, *_ in labels], gap=0.082, floor=0.035)
    style = {"transform": axes.transAxes, "clip_on": False}
    for (value, text, colour, weight), height in zip(labels, heights, strict=True):
        axes.plot([1.004, 1.022, 1.032], [(value - low) / (high - low), height, height], color=colour, linewidth=0.7, **style)
        axes.text(1.04, height, text, va="center", size=8.9, weight=weight, color=colour, family=_FONT, **style)


# --- returning customers -------------------------------------------------------------------------------------------------

NOBODY = -100.0
"""% below what was due when nobody came"""
_HIGHEST = 200.0
"""% at which the axis ends: where a handful is due, one customer more is a mountain beside which every shortfall looks flat"""


class _Returns:
    """The rows as arrays over consecutive days; NaN where there is no row or no value."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        rows = sorted(rows, key=lambda row: as_date(row["alert_date"]))
        self.first = as_date(rows[0]["alert_date"]) if rows else date(2000, 1, 1)
        self.days = (as_date(rows[-1]["alert_date"]) - self.first).days + 1 if rows else 0
        self.values, self.warning, self.critical = (np.full(self.days, np.nan) for _ in range(3))
        self.severity, self.gated = ["INFO"] * self.days, np.zeros(self.days, dtype=bool)
        for row in rows:
            place = (as_date(row["alert_date"]) - self.first).days
            self.values[place] = _value(row["delta_relative_pct"])
            self.warning[place], self.critical[place] = _value(row["threshold_warning"]), _value(row["threshold_critical"])
            self.severity[place] = row["severity"] if row["alert_flag"] else "INFO"
            self.gated[place] = bool(row["gate"])
        self.last = rows[-1] if rows else None
        self.known = bool(np.isfinite(self.values).any())
        self.all_gated = bool(rows) and all(row["gate"] for row in rows)

    def places(self, severity: str) -> list[int]:
        return [place for place, value in enumerate(self.severity) if value == severity]

    def digits(self) -> int:
        """Decimals that keep the last value on its side of both lines."""
        lines = [float(-line[-1]) for line in (self.warning, self.critical) if np.isfinite(line[-1])]
        return side_digits(-float(self.values[-1]), lines)

    def sentence(self) -> str:
        """The title: what the last day says, in one line."""
        value = float(self.values[-1]) if self.days else math.nan
        if not self.last or math.isnan(value):
            return "Nobody can be said to be due back yet"
        verdict = self.last["severity"] if self.last["alert_flag"] else "Not judged" if self.last["gate"] else "No alert"
        share = _percent(abs(value), self.digits())
        if not share.strip("0."):
            return f"{verdict}: as many customers came back as were due"
        return f"{verdict}: {share} % {'more' if value > 0 else 'fewer'} customers came back than were due"

    def subtitle(self, shop_name: str) -> str:
        """Shop and measure, with the last day's counts where there is room for them."""
        text = _subtitle(shop_name, "returning customers against what was due, in %")
        if not self.last or self.last.get("expected") is None:
            return text
        counts = f" (last {self.last['window_days']} days: {self.last['observed']:,} of {round(self.last['expected']):,} due)"
        return text + counts if len(text + counts) <= _SUBTITLE else text


def shortfall_range(low: float, high: float) -> tuple[float, float, float]:
    """(bottom, top, step) of an axis in % that holds 0 and `low` to `high`, as far as they can be shown."""
    low, high = max(min(low, 0.0), NOBODY), min(max(high, 0.0), _HIGHEST)
    span = max(high - low, 10.0)
    step = next(size for size in (2, 5, 10, 20, 25, 50, 100) if span / size <= 6)
    bottom, top = (math.floor((low - 0.04 * span) / step + 1e-9) * step, math.ceil((high + 0.04 * span) / step - 1e-9) * step)
    return max(bottom, NOBODY), min(top, _HIGHEST), step


def _frame_returns(axes: Axes, figure: Figure, returns: _Returns) -> None:
    """Axis range, grid and labels. The lines of days that nobody judges do not widen it: a handful of customers due puts them
    where no shop ever gets."""
    counting = ~returns.gated
    counting[-1] = True
    shown = np.concatenate([returns.values, returns.warning[counting], returns.critical[counting]])
    shown = shown[np.isfinite(shown)]
    low, high, step = shortfall_range(float(shown.min()), float(shown.max()))
    ticks = np.arange(math.ceil(low / step) * step, high + step / 2, step)
    room = 0.03 * (high - low)  # a mark at the very bottom is not cut in half
    _scale(axes, (low - room if low == NOBODY else low, high), ticks, [f"{tick:+g} %" if tick else "0 %" for tick in ticks],
           returns.first, returns.days)
    axes.spines["bottom"].set_color(_GRID)
    _text(figure, 0.02, 0.03, _footnote_returns(high, returns), size=7.6, color=_SOFT)


def _footnote_returns(high: float, returns: _Returns) -> str:
    """What the marks are, and what the axis leaves out."""
    notes = ["Triangle: WARNING day."] if returns.places("WARNING") else []
    notes += ["Square: CRITICAL day."] if returns.places("CRITICAL") else []
    if returns.gated.any():
        notes.append("Every day shown is held back by a safeguard." if returns.all_gated else "Grey: held back by a safeguard.")
    highest = float(np.nanmax(returns.values))
    if highest > high:
        notes.append(f"Cut off: up to +{_percent(highest, 0)} %.")
    elif not returns.all_gated and returns.critical[-1] < NOBODY:
        notes.append("Too few are due for CRITICAL." if returns.warning[-1] >= NOBODY else "Too few are due for an alert.")
    return "  ".join(notes)


def _draw_returns(axes: Axes, returns: _Returns) -> None:
    """Bands, lines and marks, back to front."""
    x = np.arange(returns.days)
    bottom, top = axes.get_ylim()
    # what lies beyond the axis is left out rather than handed to matplotlib, whose paths break at very large numbers
    warning, critical = (np.maximum(line, bottom - 1) for line in (returns.warning, returns.critical))
    axes.fill_between(x, critical, warning, color=_WARNING_BAND, linewidth=0, zorder=1)
    axes.fill_between(x, bottom - 1, critical, color=_CRITICAL_BAND, linewidth=0, zorder=1)
    for start, end in _runs(returns.gated) if not returns.all_gated or np.isfinite(returns.warning).any() else []:
        axes.axvspan(start - 0.5, end + 0.5, color=_GATED_BAND, linewidth=0, zorder=1.5)
    axes.plot(x, warning, color=_WARNING, linewidth=0.9, zorder=2)
    axes.plot(x, critical, color=_CRITICAL, linewidth=0.9, zorder=2)
    axes.axhline(0, color=_MEAN, linewidth=1.1, dashes=(3, 1.6), zorder=3)
    drawn = np.minimum(returns.values, 2 * top - bottom)
    judged = np.where(returns.gated, np.nan, drawn)
    for values, colour, width in ((drawn, _GATED, 1.6), (judged, _LINE, 2.1)):
        axes.plot(x, values, color=colour, linewidth=width, zorder=5, solid_capstyle="round", marker="o", markersize=2.6,
                  markevery=_lonely(values))
    for severity, mark, colour, size in (("WARNING", "^", _WARNING, 6.4), ("CRITICAL", "s", _CRITICAL, 5.6)):
        places = returns.places(severity)
        axes.plot(places, drawn[places], mark, color=colour, markersize=size, markeredgecolor="white", markeredgewidth=0.6,
                  linestyle="none", zorder=6)


def _name_returns(axes: Axes, returns: _Returns) -> None:
    """Each line's name and last value at its right end; a line beyond the axis has none."""
    bottom, top = axes.get_ylim()
    labels = [(0.0, "as due", _MEAN, "normal")]
    if np.isfinite(value := returns.values[-1]):
        share = _percent(abs(value), returns.digits()).replace("over ", ">")
        text = f"came {'+' if value > 0 else '-' if share.strip('0.') else ''}{share} %"
        labels.append((min(float(value), top), text, _INK if returns.gated[-1] else _LINE, "bold"))
    for name, line, colour in (("WARNING", returns.warning, _WARNING), ("CRITICAL", returns.critical, _CRITICAL)):
        if np.isfinite(line[-1]) and line[-1] >= bottom:
            labels.append((float(line[-1]), f"{name} {line[-1]:.1f} %", colour, "normal"))
    _name_ends(axes, labels)


def _percent(value: float, digits: int) -> str:
    """A share as short as it can be said: above 1,000 % decimals say nothing, and above a million nor does the number."""
    return "over 999,999" if value > 999_999 else f"{value:,.{digits if value < 1000 else 0}f}"


# --- small things --------------------------------------------------------------------------------------------------------


def spread(heights: list[float], gap: float, floor: float = -math.inf) -> list[float]:
    """The heights (0..1), moved apart as little as needed so that neighbours are at least `gap` apart and none is below `floor`
    (where the labels of the x axis stand)."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    groups: list[list[int]] = []
    centres: list[float] = []
    for place in order:
        groups.append([place])
        centres.append(max(heights[place], floor))
        while len(groups) > 1 and centres[-1] - centres[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            merged = groups[-2] + groups[-1]
            groups[-2:] = [merged]
            middle = sum(heights[item] for item in merged) / len(merged)
            centres[-2:] = [max(middle, floor + gap * (len(merged) - 1) / 2)]
    result = list(heights)
    for group, centre in zip(groups, centres, strict=True):
        for step, place in enumerate(group):
            result[place] = centre + gap * (step - (len(group) - 1) / 2)
    return result


def _value(value: Any) -> float:
    return math.nan if value is None else float(value)


def _short_day(day: date) -> str:
    return f"{day.day} {_MONTHS[day.month - 1]}"


def _tick_places(first: date, days: int) -> list[int]:
    """At most 8 days to label, counted back from the last one; the first of each second or third month for long windows."""
    if days <= 100:
        step = next(size for size in (1, 2, 7, 14) if days / size <= 8)
        return list(range((days - 1) % step, days, step))
    starts = [place for place in range(days) if (first + timedelta(days=place)).day == 1]
    return starts[:: math.ceil(len(starts) / 8)]


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """(first, last) place of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(start), int(end) - 1) for start, end in edges.reshape(-1, 2)]


def _subtitle(shop_name: str, what: str = "share of customers with status AT_RISK, in %") -> str:
    shop = " ".join(shop_name.split())[:60]
    return f"{shop}: {what}" if shop and _drawable(shop) else what[0].upper() + what[1:]


def _drawable(text: str) -> bool:
    """Whether the font has every character: better no name than a row of boxes."""
    return all(ord(char) in _glyphs() for char in text)


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=_FONT))).get_charmap())


def _text(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Text on the figure, read literally: a $ in a shop name is no formula."""
    figure.text(x, y, text, family=_FONT, parse_math=False, **style)
