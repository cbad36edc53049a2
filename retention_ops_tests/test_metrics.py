"""The health metrics as numbers and as a Prometheus text file, read back by a checker that is stricter than a scraper."""

from __future__ import annotations

import os
import re
from datetime import UTC, date, datetime, timedelta

import pytest

from retention_ops.execute import health, ledger
from retention_ops.execute.destinations.choice import WITHDRAWAL_SLOT
from retention_ops.log import runs
from retention_ops.log.database import incidents, ops_database, ops_runs_log
from retention_ops.metrics import Metric, as_numbers, exposition, metrics, metrics_path, write_metrics
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.conftest import settings_for
from retention_ops_tests.execute.stage import FakeClock, intent
from retention_ops_tests.shops import lake_with, orders_frame

COMPLETE = date(2026, 6, 28)
NOW = datetime(2026, 6, 30, 9, tzinfo=UTC)
NAME, LABEL = r"[a-zA-Z_:][a-zA-Z0-9_:]*", r"[a-zA-Z_][a-zA-Z0-9_]*"
VALUE = r'"((?:[^"\\\n]|\\["\\n])*)"'


def parsed(text: str) -> dict[str, tuple[str, dict[tuple[tuple[str, str], ...], float]]]:
    """name -> (type, labels -> value). Fails on whatever the text format 0.0.4 does not allow, and on what it only tolerates: a metric
    without HELP and TYPE before its samples, samples of one metric apart from each other, a sample twice, a counter not named *_total."""
    assert text.endswith("\n") and "\r" not in text
    found: dict[str, tuple[str, dict[tuple[tuple[str, str], ...], float]]] = {}
    helped = current = None
    for line in text[:-1].split("\n"):
        if match := re.fullmatch(rf"# HELP ({NAME}) (\S.*)", line):
            helped = match[1]
            assert helped not in found and not re.search(r"\\(?![\\n])", match[2])
        elif match := re.fullmatch(rf"# TYPE ({NAME}) (gauge|counter)", line):
            current = match[1]
            assert current == helped and current not in found
            assert (match[2] == "counter") == current.endswith("_total"), current
            found[current] = (match[2], {})
        else:
            match = re.fullmatch(rf"({NAME})(?:\{{((?:{LABEL}={VALUE},?)*)\}})? (\S+)", line)
            assert match and match[1] == current, line
            labels = tuple((name, value) for name, value in re.findall(rf"({LABEL})={VALUE}", match[2] or ""))
            assert labels not in found[current][1]
            found[current][1][labels] = float(match[4])
    assert all(samples for _, samples in found.values())
    return found


@pytest.fixture
def home(tmp_path):
    lake = lake_with(orders_frame([("a", COMPLETE - timedelta(days=200), 100), ("b", COMPLETE, 100)]), tmp_path / "home",
                     metrics_file="metrics.prom", mode="live", source="files", source_path="exports")
    with ops_database(lake.settings) as engine:
        yield lake, engine, FakeClock(NOW)


def test_every_metric_of_a_home_where_nothing_ever_ran(home):
    lake, engine, clock = home
    found = parsed(exposition(metrics(engine, lake, lake.settings, clock)))
    numbers = as_numbers(metrics(engine, lake, lake.settings, clock))
    assert numbers["data_age_days"] == 1 and numbers["last_run_success"] is None and numbers["alerts_30_days"] == 0
    assert numbers["runs_total"] == {"success": 0, "failure": 0, "canceled": 0} and numbers["mode"]["live"] == 1
    assert set(numbers["health_causes_open"]) == set(health.CAUSES) and numbers["looked_timestamp_seconds"] == NOW.timestamp()
    assert {f"retention_ops_{name}" for name, value in numbers.items() if value is not None} == set(found)


def test_an_empty_home_has_metrics_too(tmp_path):
    settings = settings_for(tmp_path / "home")
    with ops_database(settings) as engine:
        numbers = as_numbers(metrics(engine, Lake(settings), settings, FakeClock(NOW)))
    assert numbers["data_age_days"] is None and numbers["complete_through_timestamp_seconds"] is None


def test_what_happened_is_counted(home):
    lake, engine, clock = home
    ended = {"first_date": COMPLETE, "last_date": COMPLETE, "started_at": NOW - timedelta(seconds=90.5), "ended_at": NOW}
    for number, status in enumerate(("failure", "success", "failure")):
        health.record_runs(engine, [{**ended, "run_id": str(number), "status": status}], clock)
    with engine.begin() as connection:
        keys = ledger.plan(connection, [
            intent(slot=slot, mode=mode, part=str(number), hold="a look")
            for number, (slot, mode) in enumerate([
                ("webhook", "live"), ("webhook", "live"), ("sheets", "live"), ("webhook", "shadow"), (WITHDRAWAL_SLOT, "live")])
        ], NOW, "test", {})
    ledger.by_hand(engine, keys[0], "cancel", "Ada", "not wanted", NOW)
    health.record_source_check(engine, COMPLETE, False, [], clock)
    with engine.begin() as connection:
        health.settle(connection, lake, lake.settings, NOW, "test")
    numbers = as_numbers(metrics(engine, lake, lake.settings, clock))
    assert numbers["runs_total"] == {"success": 1, "failure": 2, "canceled": 0}
    assert (numbers["last_run_success"], numbers["last_run_duration_seconds"]) == (0, 90.5)
    assert numbers["action_failures_total"]["webhook"] == 2, "a counter does not go back when somebody decided"
    assert numbers["action_failures_total"]["sheets"] == 1
    assert numbers["action_failures_total"][WITHDRAWAL_SLOT] == 1, "a list that could not be deleted"
    assert numbers["actions"]["needs_human"] == 3, "one was cancelled, rehearsals do not count"
    assert [cause for cause, number in numbers["health_causes_open"].items() if number] == ["run_failed", "data_late", "source_check_off"]


def test_alerts_incidents_and_the_newest_answer_are_counted(home):
    """Three flagged dates begin two alerts; one flagged before the newest 30 dates, and what was rehearsed or is closed, count nowhere."""
    lake, engine, clock = home
    row = {column.name: None if column.nullable else 0 for column in ops_runs_log.columns if column.name != "position"}
    for number, (ago, flag) in enumerate([(30, True), (20, True), (19, True), (5, True), (1, False), (0, False)]):
        runs.append(engine, {
            **row, "run_id": str(number), "run_timestamp": NOW, "alert_date": COMPLETE - timedelta(days=ago), "alert_flag": flag,
            "alert_type": "retention_status_degradation", "severity": "WARNING" if flag else "INFO", "status": "success", "mode": "live",
            "execution_time_ms": 1250 + number})
    opened = {"alert_type": "retention_status_degradation", "opened_on": COMPLETE, "last_flagged_on": COMPLETE, "frozen_baseline": 1.0,
              "frozen_warning_pct": 15.0, "owner": "", "backup_owner": "", "ack_by": NOW, "created_at": NOW, "updated_at": NOW}
    with engine.begin() as connection:
        connection.execute(incidents.insert(), [
            {**opened, "scope": str(number), "mode": mode, "severity": severity, "state": state}
            for number, (mode, severity, state) in enumerate([
                ("live", "CRITICAL", "open"), ("pilot", "CRITICAL", "open"), ("live", "WARNING", "open"),
                ("live", "WARNING", "resolved"), ("shadow", "WARNING", "open")])
        ])
    found = metrics(engine, lake, lake.settings, clock)
    numbers = as_numbers(found)
    assert (numbers["flagged_dates_30_days"], numbers["alerts_30_days"]) == (3, 2)
    assert numbers["open_incidents"] == {"WARNING": 1, "CRITICAL": 2} and numbers["last_response_duration_seconds"] == 1.255
    samples = {name: values for name, (_, values) in parsed(exposition(found)).items()}
    assert samples["retention_ops_flagged_dates_30_days"] == {(): 3} and samples["retention_ops_alerts_30_days"] == {(): 2}
    assert samples["retention_ops_open_incidents"] == {(("severity", "WARNING"),): 1, (("severity", "CRITICAL"),): 2}
    assert samples["retention_ops_last_response_duration_seconds"] == {(): 1.255}


def test_the_file_is_replaced_whole_and_says_the_same(home):
    lake, engine, clock = home
    assert metrics_path(lake.settings) == lake.settings.home / "metrics.prom"
    path = write_metrics(engine, lake, lake.settings, clock)
    before = os.stat(path).st_ino
    assert write_metrics(engine, lake, lake.settings, clock) == path and os.stat(path).st_ino != before
    assert path.stat().st_mode & 0o777 == 0o644 and not list(path.parent.glob(".metrics*"))
    assert path.read_text() == exposition(metrics(engine, lake, lake.settings, clock)) and parsed(path.read_text())


def test_none_is_written_where_none_is_wanted(home):
    lake, engine, clock = home
    settings = lake.settings.model_copy(update={"metrics_file": None})
    assert write_metrics(engine, lake, settings, clock) is None


def test_a_label_may_hold_anything():
    odd = 'a"b\\c\nd'
    text = exposition([Metric("odd", "gauge", "Odd", (({"label": odd}, 0.1),))])
    ((_, samples),) = parsed(text).values()
    assert samples == {(("label", 'a\\"b\\\\c\\nd'),): 0.1}


@pytest.mark.parametrize("wrong", [
    "x 1\n", "# TYPE x gauge\nx 1\n", "# HELP x X\n# TYPE x gauge\nx 1", "# HELP x X\n# TYPE x gauge\nx 1\nx 2\n",
    "# HELP x X\n# TYPE x counter\nx 1\n", '# HELP x X\n# TYPE x gauge\nx{a="b} 1\n', "# HELP x X\n# TYPE x gauge\nx one\n",
    "# HELP x X\n# TYPE x gauge\n",
])
def test_the_checker_itself_refuses(wrong):
    with pytest.raises((AssertionError, ValueError)):
        parsed(wrong)
