"""The trend chart: one PNG of a known size for every history the alert table can hold, and words and scales that do not mislead.

Pixels are not compared: what matters is that it draws, fast and without a warning, and that what it says is true.
"""

from __future__ import annotations

import struct
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_ops.package import chart
from retention_ops.package.chart import axis_range, returning_chart, shortfall_range, spread, trend_chart

D = date(2026, 6, 30)


def row(
    days_before: int, current: float | None, baseline: float | None = None, severity: str = "INFO", gate: str | None = None
) -> dict[str, Any]:
    relative = 100 * (current - baseline) / baseline if current is not None and baseline else None
    return {"alert_date": D - timedelta(days=days_before), "current_value": current, "baseline_value": baseline,
            "delta_relative_pct": relative, "severity": severity, "alert_flag": severity != "INFO", "gate": gate}


def draw(history: list[dict[str, Any]], shop: str = "Shop") -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return trend_chart(history, warning_pct=15.0, critical_pct=25.0, shop_name=shop)


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


ODD_HISTORIES = {
    "no rows": [],
    "one row without a value": [row(0, None)],
    "one row": [row(0, 19.0, 18.0)],
    "values all missing": [row(back, None, gate="history_warmup") for back in range(9, -1, -1)],
    "all zero": [row(back, 0.0, 0.0, gate="baseline_warmup") for back in range(9, -1, -1)],
    "everyone AT_RISK": [row(back, 100.0, 100.0) for back in range(9, -1, -1)],
    "last value missing": [row(2, 19.0, 18.0), row(1, 19.0, 18.0), row(0, None, 18.0)],
    "days missing in between": [row(50, 19.0, 18.0), row(10, 19.0, 18.0), row(0, 30.0, 18.0, "CRITICAL")],
    "every second value missing": [row(back, None if back % 2 else 19.0, 18.0) for back in range(29, -1, -1)],
    "baseline missing at first": [row(back, 19.0, None if back > 20 else 18.0) for back in range(29, -1, -1)],
    "a year": [row(back, 19.0 + back % 5, 20.0, "WARNING" if back % 50 == 0 else "INFO") for back in range(364, -1, -1)],
    "newest first": [row(back, 19.0, 18.0) for back in range(10)],
}


@pytest.mark.parametrize("story", ODD_HISTORIES)
def test_every_history_is_a_png_of_the_same_size(story):
    assert size(draw(ODD_HISTORIES[story])) == (chart.WIDTH, chart.HEIGHT)


@pytest.mark.parametrize("shop", ["", "  \n ", "$\\frac{1}{0}$ & $", "日本の店 🛍", "x" * 500, "\x00\x07"])
def test_no_shop_name_can_break_the_picture(shop):
    assert size(draw([row(1, 19.0, 18.0), row(0, 19.0, 18.0)], shop)) == (chart.WIDTH, chart.HEIGHT)


def test_a_name_the_font_cannot_write_is_left_out_rather_than_drawn_as_boxes():
    assert chart._subtitle("日本の店") == "Share of customers with status AT_RISK, in %"
    assert chart._subtitle("Café Ångström").startswith("Café Ångström: ")


@pytest.mark.parametrize(("last", "says"), [
    (row(0, 24.1, 19.0, "CRITICAL"), "CRITICAL: AT_RISK is 24.1 %, 26.8 % above its 7-day mean"),
    (row(0, 22.0, 19.0, "WARNING"), "WARNING: AT_RISK is 22.0 %, 15.8 % above its 7-day mean"),
    (row(0, 18.0, 20.0), "No alert: AT_RISK is 18.0 %, 10.0 % below its 7-day mean"),
    (row(0, 20.0, 20.0), "No alert: AT_RISK is 20.0 %, level with its 7-day mean"),
    (row(0, 22.992, 20.0), "No alert: AT_RISK is 23.0 %, 14.96 % above its 7-day mean"),
    (row(0, 24.1, 19.0, gate="data_incomplete"), "Not judged: AT_RISK is 24.1 %, held back by a safeguard"),
    (row(0, 3.0, 0.0, gate="baseline_warmup"), "Not judged: AT_RISK is 3.0 %, held back by a safeguard"),
    (row(0, 24.1, None), "No alert: AT_RISK is 24.1 %"),
    (row(0, None, 19.0), "AT_RISK has no value yet"),
])
def test_the_title_says_what_the_last_day_says(last, says):
    assert chart._Series([row(1, 19.0, 19.0), last], 15.0, 25.0).sentence((15.0, 25.0)) == says


def test_the_lines_follow_the_baseline_and_a_zero_baseline_has_none():
    series = chart._Series([row(1, 5.0, 0.0), row(0, 24.0, 20.0)], 15.0, 25.0)
    assert (series.warning[1], series.critical[1]) == (pytest.approx(23.0), pytest.approx(25.0))
    assert series.warning[0] != series.warning[0]  # NaN


@given(st.floats(0, 100), st.floats(0, 700))
def test_the_axis_holds_the_data_with_few_round_steps(low, rise):
    bottom, top, step = axis_range(low, low + rise)
    assert 0 <= bottom <= low + 1e-6 and low + rise <= top + 1e-6
    assert 2 <= round((top - bottom) / step) <= 9


def test_an_axis_that_does_not_start_at_zero_says_so():
    assert axis_range(2.0, 20.0)[0] == 0
    assert axis_range(18.5, 25.0)[0] == 16
    series = chart._Series([row(0, 19.0, 18.0)], 15.0, 25.0)
    assert "Axis starts at 16 %, not at 0." in chart._footnote(16.0, series)
    assert "Axis" not in chart._footnote(0.0, series)


@given(st.lists(st.floats(0, 1), max_size=4))
def test_line_names_never_overlap_and_stay_in_order(heights):
    placed = spread(heights, gap=0.08)
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    assert all(placed[b] - placed[a] >= 0.08 - 1e-9 for a, b in pairwise(order))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.none() | st.floats(0, 100), st.none() | st.floats(0, 100),
                          st.sampled_from(["INFO", "WARNING", "CRITICAL"]), st.none() | st.just("min_sample")), max_size=40))
def test_any_history_draws(rows):
    assert size(draw([row(len(rows) - place, *values) for place, values in enumerate(rows)])) == (chart.WIDTH, chart.HEIGHT)


def test_line_names_keep_clear_of_the_dates_below():
    placed = spread([0.0, 0.0, 0.01], gap=0.08, floor=0.035)
    assert min(placed) >= 0.035 and sorted(placed) == placed
    assert all(b - a >= 0.08 - 1e-9 for a, b in pairwise(placed))
    assert spread([0.0], gap=0.08, floor=0.035) == [0.035]


def test_an_axis_of_zeros_is_a_whole_percent_high():
    assert axis_range(0.0, 0.0) == (0.0, 1.0, 0.5)


def test_a_window_held_back_throughout_is_said_in_words_not_as_a_grey_box():
    early = chart._Series([row(back, 0.0, 0.0, gate="history_warmup") for back in range(9, -1, -1)], 15.0, 25.0)
    mixed = chart._Series([row(1, 5.0, 5.0, gate="min_sample"), row(0, 5.0, 5.0)], 15.0, 25.0)
    assert chart._footnote(0.0, early) == "Every day shown is held back by a safeguard."
    assert chart._footnote(0.0, mixed) == "Grey: held back by a safeguard."


def test_threads_draw_the_same_picture_side_by_side():
    history = ODD_HISTORIES["days missing in between"]
    with ThreadPoolExecutor(4) as pool:
        pictures = set(pool.map(lambda _: draw(history), range(6)))
    assert len(pictures) == 1


def test_a_chart_takes_a_fraction_of_a_second():
    """A year of backfill draws 365 of them. About 65 ms here; the limit leaves room for a busy machine."""
    history = [row(back, 19.0 + back % 3, 19.0) for back in range(59, -1, -1)]
    draw(history)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        draw(history)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.4


# --- returning customers -------------------------------------------------------------------------------------------------


def due(days_before: int, value: float | None, severity: str = "INFO", gate: str | None = None, *, lines=(-10.0, -20.0)) -> dict[str, Any]:
    return {"alert_date": D - timedelta(days=days_before), "delta_relative_pct": value, "threshold_warning": lines[0],
            "threshold_critical": lines[1], "severity": severity, "alert_flag": severity != "INFO", "gate": gate,
            "window_days": 14, "observed": 26, "expected": 35.4}


ODD_RETURNS = {
    "no rows": [],
    "one row": [due(0, -3.0)],
    "nothing known": [due(back, None, gate="baseline_warmup", lines=(None, None)) for back in range(5, -1, -1)],
    "all held back": [due(back, -90.0, gate="min_sample") for back in range(9, -1, -1)],
    "days missing": [due(50, 5.0), due(10, None), due(0, -30.0, "CRITICAL")],
    "nobody came": [due(1, -100.0, "CRITICAL"), due(0, -100.0, "CRITICAL")],
    "huge": [due(2, 1e12), due(1, 3.0, lines=(-1e9, -1e12)), due(0, 1e15)],
}


@pytest.mark.parametrize("story", ODD_RETURNS)
def test_every_window_of_returns_is_a_png_of_the_same_size_and_the_same_bytes(story):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (returning_chart(ODD_RETURNS[story], "Shop") for _ in range(2))
    assert size(first) == (chart.WIDTH, chart.HEIGHT) and first == second


@pytest.mark.parametrize(("last", "says"), [
    (due(0, -26.64, "CRITICAL"), "CRITICAL: 26.6 % fewer customers came back than were due"),
    (due(0, -9.98), "No alert: 9.98 % fewer customers came back than were due"),
    (due(0, 4.0), "No alert: 4.0 % more customers came back than were due"),
    (due(0, 0.0), "No alert: as many customers came back as were due"),
    (due(0, -40.0, gate="min_sample"), "Not judged: 40.0 % fewer customers came back than were due"),
    (due(0, None), "Nobody can be said to be due back yet"),
])
def test_the_title_of_returns_says_what_the_last_day_says(last, says):
    assert chart._Returns([due(1, 1.0), last]).sentence() == says


@given(st.floats(-1e9, 0), st.floats(0, 1e9))
def test_the_axis_of_returns_holds_zero_and_what_can_be_shown(low, high):
    bottom, top, step = shortfall_range(low, high)
    assert max(low, -100) >= bottom >= -100 and min(high, 200) <= top <= 200 and 1 <= (top - bottom) / step <= 9
