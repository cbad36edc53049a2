"""The loop through Dagster: one date, a range, a range that broke half-way, a past date after new orders."""

from __future__ import annotations

import hashlib
import json
import subprocess
import uuid
from collections.abc import Callable
from datetime import date, timedelta
from functools import partial
from pathlib import Path

import dagster as dg
import pandas as pd
import pytest

from retention_ops.definitions import build_defs, build_loop
from retention_ops.detect import compute
from retention_ops.errors import UsageError
from retention_ops.launch import instance, mismatches, run_dates
from retention_ops.log import runs, settings_history
from retention_ops.log.database import ops_database
from retention_ops.orchestration import JOB, PROCESS_TAG, close_killed_runs, process_mark
from retention_ops.package.pack import find_pack, verify
from retention_ops.sources.ingest import ingest
from retention_ops.status import stale_packs
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.freshness import freshness
from retention_ops_tests.conftest import LAST_DAY, settings_for
from retention_ops_tests.shops import lake_with, orders_frame, small_shop

D = LAST_DAY
PER_DAY = [name for name, table in TABLES.items() if table.stored == "day"]


def make_loop(home: Path, **settings):
    """A loop on the small shop in `home`."""
    lake = lake_with(small_shop(), home, min_sample=10, **settings)
    return build_loop(lake.settings)


def content(loop, days):
    """Every stored row of the per-day tables (created_at apart) and both hashes of every pack."""
    tables = {table: loop.lake.read_range(table, days[0], days[-1]).drop(columns="created_at", errors="ignore") for table in PER_DAY}
    packs = {day: (find_pack(loop.settings, day).facts_sha256, find_pack(loop.settings, day).manifest["audience_sha256"]) for day in days}
    return tables, packs


def assert_same(one, other):
    for table in PER_DAY:
        pd.testing.assert_frame_equal(one[0][table], other[0][table], check_exact=True, obj=table)
    assert one[1] == other[1]


def check_evaluations(stored, run_id):
    """The results of all asset checks of a run."""
    events = [event.dagster_event for event in stored.all_logs(run_id) if event.is_dagster_event]
    return [event.event_specific_data for event in events if event.event_type_value == "ASSET_CHECK_EVALUATION"]


def span(count: int) -> list[date]:
    return [D - timedelta(offset) for offset in reversed(range(count))]


def flagged_day(loop) -> date:
    history = compute.alert_history(loop.lake, D - timedelta(100), D)
    return history.loc[history["alert_flag"], "alert_date"].dt.date.max()


def test_one_date_leaves_tables_a_pack_a_log_row_and_metadata(tmp_path):
    loop = make_loop(tmp_path / "home")
    with dg.DagsterInstance.ephemeral() as stored:
        outcome = run_dates(loop, D, D, stored)
        assert outcome.success, outcome.errors
        assert all(loop.lake.days(table) == [D] for table in PER_DAY)
        pack = find_pack(loop.settings, D)
        verify(pack)
        written = {"briefing_INFO.md", "briefing.slack.json", "briefing.html", "at_risk_trend.png", "ops_run_log.json"}
        assert written <= set(pack.manifest["files"])
        with ops_database(loop.settings) as engine:
            rows, sets = runs.rows(engine), settings_history.every(engine)
        assert [(row["alert_date"], row["status"], row["run_id"]) for row in rows] == [(D, "skipped", outcome.run_id)]
        assert sets == {loop.settings.settings_sha256(): json.loads(json.dumps(loop.settings.recorded()))}
        assert len(loop.lake.read("ops_runs_log")) == 1
        for table in PER_DAY:
            event = stored.get_latest_materialization_event(dg.AssetKey(table)).asset_materialization
            assert event.partition == D.isoformat()
            assert event.metadata["dagster/row_count"].value == len(loop.lake.read(table, D))
            assert event.metadata["settings_sha256"].value == loop.settings.settings_sha256(), "an auditor finds it in settings_history"
        checks = check_evaluations(stored, outcome.run_id)
        assert checks and all(check.passed for check in checks)


@pytest.mark.slow
def test_a_range_leaves_the_rows_and_packs_of_single_runs_10_dates(tmp_path):
    _a_range_leaves_what_single_runs_leave(tmp_path, span(10))


def test_a_range_leaves_the_rows_and_packs_of_single_runs_4_dates(tmp_path):
    _a_range_leaves_what_single_runs_leave(tmp_path, span(4))


def _a_range_leaves_what_single_runs_leave(tmp_path, days):
    one_run, single = make_loop(tmp_path / "range"), make_loop(tmp_path / "single")
    with dg.DagsterInstance.ephemeral() as stored:
        outcome = run_dates(one_run, days[0], days[-1], stored)
        assert outcome.success, outcome.errors
        assert len(stored.get_run_records()) == 1
        for table in PER_DAY:
            events = stored.fetch_materializations(dg.AssetKey(table), limit=100).records
            assert sorted(record.partition_key for record in events) == [day.isoformat() for day in days]
            rows = {record.partition_key: record.asset_materialization.metadata["dagster/row_count"].value for record in events}
            assert rows == {day.isoformat(): len(one_run.lake.read(table, day)) for day in days}
        for day in days:
            assert run_dates(single, day, day, stored).success
    assert_same(content(one_run, days), content(single, days))


@pytest.mark.slow
def test_a_range_leaves_the_rows_of_single_runs_365_dates(tmp_path):
    shop = small_shop()
    earlier = shop.assign(order_id="e" + shop["order_id"], order_date=[day - timedelta(300) for day in shop["order_date"]])
    orders = pd.concat([earlier, shop], ignore_index=True)
    days = span(365)
    loops = [build_loop(lake_with(orders, tmp_path / name, min_sample=10, snapshot_keep_days=365, pack_keep_days=365).settings)
             for name in ("range", "single")]
    with dg.DagsterInstance.ephemeral() as stored:
        assert run_dates(loops[0], days[0], days[-1], stored).success
        for day in days:
            assert run_dates(loops[1], day, day, stored).success
    assert_same(content(loops[0], days), content(loops[1], days))
    flagged = loops[0].lake.read_range("alert_logic", days[0], days[-1])["severity"].value_counts()
    assert flagged["WARNING"] and flagged["CRITICAL"]


@pytest.mark.slow
def test_a_range_that_failed_half_way_heals_by_running_it_again(tmp_path, monkeypatch):
    days = span(4)
    broken, whole = make_loop(tmp_path / "broken"), make_loop(tmp_path / "whole")
    build = compute.Workspace.build

    def fails_on_the_third_day(self, table, day):
        if table == "churn_detection" and day == days[2]:
            raise OSError("No space left on device")
        build(self, table, day)

    with dg.DagsterInstance.ephemeral() as stored:
        monkeypatch.setattr(compute.Workspace, "build", fails_on_the_third_day)
        outcome = run_dates(broken, days[0], days[-1], stored)
        assert not outcome.success
        assert "No space left on device" in outcome.errors[0]
        assert broken.lake.days("churn_detection") == days[:2]
        assert broken.lake.days("customer_priority") == []
        monkeypatch.setattr(compute.Workspace, "build", build)
        assert run_dates(broken, days[0], days[-1], stored).success
        assert run_dates(whole, days[0], days[-1], stored).success
    assert_same(content(broken, days), content(whole, days))


def test_a_past_date_rebuilt_after_newer_orders_gives_the_same_rows_and_facts(tmp_path):
    loop = make_loop(tmp_path / "home")
    day = flagged_day(loop)
    with dg.DagsterInstance.ephemeral() as stored:
        assert run_dates(loop, day, day, stored).success
        before = content(loop, [day])
        newer = orders_frame([("c1", D + timedelta(3), 5000, "n1"), ("newcomer", D + timedelta(4), 900, "n2")])
        path = tmp_path / "newer.csv"
        newer.assign(order_amount=newer["order_cents"] / 100).drop(columns="order_cents").to_csv(path, index=False)
        report = ingest([path], "orders", loop.settings)
        assert report.changed and loop.lake.orders().last_date == D + timedelta(4)
        assert freshness(loop.lake).stale == []
        assert run_dates(loop, day, day, stored).success
    assert_same(before, content(loop, [day]))


def test_orders_that_come_in_during_a_run_wait_for_the_next_one(tmp_path, monkeypatch):
    """A run is made of one version of the orders; what changed meanwhile is stale and named as such."""
    loop = make_loop(tmp_path / "home")
    before = loop.lake.orders().version
    path = tmp_path / "late.csv"
    path.write_text(f"order_id,customer_id,order_date,order_amount\nlate1,late,{D},12.00\n")
    build = compute.Workspace.build

    def meanwhile_orders_come_in(self, table, day):
        if table == "churn_detection" and loop.lake.orders().version == before:
            ingest([path], "orders", loop.settings)
        build(self, table, day)

    monkeypatch.setattr(compute.Workspace, "build", meanwhile_orders_come_in)
    with dg.DagsterInstance.ephemeral() as stored:
        outcome = run_dates(loop, D, D, stored)
        assert outcome.success, outcome.errors
        assert loop.lake.orders().version != before
        assert {loop.lake.provenance(table, D)["orders_version"] for table in PER_DAY} == {before}
        assert find_pack(loop.settings, D).manifest["orders_version"] == before
        assert freshness(loop.lake).stale == [D]
        assert run_dates(loop, D, D, stored).success
    assert {loop.lake.provenance(table, D)["orders_version"] for table in PER_DAY} == {loop.lake.orders().version}


@pytest.mark.slow
def test_a_correction_marks_dates_stale_until_they_are_rebuilt(tmp_path):
    loop = make_loop(tmp_path / "home")
    days = span(5)
    orders = small_shop()
    corrected = orders[orders["order_date"] == days[2]].head(1).assign(order_cents=123456)
    assert len(corrected) == 1, "the small shop sells on this day"
    path = tmp_path / "correction.csv"
    corrected.assign(order_amount=corrected["order_cents"] / 100).drop(columns="order_cents").to_csv(path, index=False)
    with dg.DagsterInstance.ephemeral() as stored:
        assert run_dates(loop, days[0], days[-1], stored).success
        ingest([path], "orders", loop.settings, replace=True)
        assert freshness(loop.lake).stale == stale_packs(loop.lake) == days[2:]
        assert run_dates(loop, days[2], days[-1], stored).success
    assert freshness(loop.lake).stale == stale_packs(loop.lake) == []


def test_a_broken_quality_rule_blocks_and_keeps_the_old_partition(tmp_path, monkeypatch):
    loop = make_loop(tmp_path / "home")
    with dg.DagsterInstance.ephemeral() as stored:
        assert run_dates(loop, D, D, stored).success
        before = loop.lake.read("retention_snapshot", D)
        build = compute.Workspace.build

        def doubles_a_customer(self, table, day):
            build(self, table, day)
            if table == "retention_snapshot":
                self.connection.execute("INSERT INTO retention_snapshot SELECT * FROM retention_snapshot LIMIT 1")

        monkeypatch.setattr(compute.Workspace, "build", doubles_a_customer)
        outcome = run_dates(loop, D, D, stored)
        assert not outcome.success
        assert "key_is_unique" in outcome.errors[0] and "not replaced" in outcome.errors[0]
        failed = [check for check in check_evaluations(stored, outcome.run_id) if not check.passed]
        assert [(check.asset_key.to_user_string(), check.check_name) for check in failed] == [("retention_snapshot", "key_is_unique")]
        assert loop.lake.read("retention_snapshot", D).equals(before)
        churn = stored.fetch_materializations(dg.AssetKey("churn_detection"), limit=5).records
        assert outcome.run_id not in {record.run_id for record in churn}, "downstream must not run on a broken table"


@pytest.mark.slow
def test_a_day_of_a_range_that_breaks_a_rule_is_named_and_not_replaced(tmp_path, monkeypatch):
    """The checks of a range run in one pass, and still every day is judged by its own rows."""
    loop = make_loop(tmp_path / "home")
    days, (second, third) = span(5), span(4)[:2]
    with dg.DagsterInstance.ephemeral() as stored:
        assert run_dates(loop, days[0], days[-1], stored).success
        before = {day: loop.lake.read("customer_priority", day) for day in days}
        build_range = compute.Workspace.build_range

        def breaks_two_days(self, table, first, last):
            build_range(self, table, first, last)
            if table == "customer_priority":
                self.connection.execute(f"INSERT INTO {table} SELECT * FROM {table} WHERE run_date = DATE '{second}' LIMIT 1")
                self.connection.execute(f"UPDATE {table} SET priority_reason = '' WHERE run_date = DATE '{third}'")

        monkeypatch.setattr(compute.Workspace, "build_range", breaks_two_days)
        outcome = run_dates(loop, days[0], days[-1], stored)
        assert not outcome.success
        assert f"key_is_unique in {second}; every_row_has_a_reason in {third}" in outcome.errors[0]
    for day in days:
        kept = loop.lake.read("customer_priority", day)
        assert kept.equals(before[day]) == (day in (second, third)), "the others are replaced: created_at is newer"


@pytest.mark.slow
def test_with_the_median_rule_a_range_is_computed_day_by_day(tmp_path):
    loop = make_loop(tmp_path / "home", p1_min_revenue="median", pack_keep_days=1)
    days = span(3)
    with dg.DagsterInstance.ephemeral() as stored:
        assert run_dates(loop, days[0], days[-1], stored).success
    for day in days:
        expected = compute.table_for(loop.lake, "customer_priority", day).drop(columns="created_at")
        assert loop.lake.read("customer_priority", day).drop(columns="created_at").equals(expected)


def test_an_old_range_counts_old_snapshots_without_computing_them_and_says_so(tmp_path, monkeypatch):
    days = span(8)
    loop = make_loop(tmp_path / "home", snapshot_keep_days=3, pack_keep_days=3)
    snapshot_days, run = set(), compute.Workspace.run

    def remembers_snapshots(self, rule, **dates):
        run(self, rule, **dates)
        if rule.table in TABLES and TABLES[rule.table].snapshot:
            snapshot_days.add(dates["reference_date"])

    monkeypatch.setattr(compute.Workspace, "run", remembers_snapshots)
    with dg.DagsterInstance.ephemeral() as stored:
        assert run_dates(loop, days[0], days[-1], stored).success
        assert snapshot_days == set(days[-3:])
        assert loop.lake.days("base_customers") == days[-3:]
        assert loop.lake.days("customer_priority") == days
        for table in ("base_customers", "retention_snapshot", "churn_detection"):
            oldest = stored.fetch_materializations(
                dg.AssetRecordsFilter(dg.AssetKey(table), asset_partitions=[days[0].isoformat()]), limit=1
            ).records[0].asset_materialization
            assert "not stored" in oldest.metadata["path"].value
            expected = compute.table_for(loop.lake, "retention_snapshot", days[0])
            assert oldest.metadata["dagster/row_count"].value == len(expected)
            assert oldest.metadata["at_risk"].value == (expected["retention_status"] == "AT_RISK").sum()
    assert [day for day in days if find_pack(loop.settings, day)] == days[-3:]


def test_a_flagged_newest_day_is_rehearsed_and_older_flagged_days_are_history(tmp_path):
    probe = make_loop(tmp_path / "probe")
    day = flagged_day(probe)
    lake = lake_with(small_shop()[lambda orders: orders["order_date"] <= day], tmp_path / "home", complete_through=day, min_sample=10)
    loop = build_loop(lake.settings)
    with dg.DagsterInstance.ephemeral() as stored:
        assert run_dates(loop, day - timedelta(5), day, stored).success
        again = run_dates(loop, day, day, stored)
        assert again.success
    with ops_database(loop.settings) as engine:
        rows = runs.rows(engine)
        assert runs.first_broken_row(engine) is None
    first_run, second_run = [row for row in rows if row["run_id"] != again.run_id], [row for row in rows if row["run_id"] == again.run_id]
    assert {row["alert_date"]: row["status"] for row in first_run}[day] == "success"
    older = [row for row in first_run if row["alert_date"] < day]
    assert older and all(row["status"] == "skipped" and row["error_message"].startswith("history") for row in older)
    assert [(row["status"], row["error_message"].startswith("already answered")) for row in second_run] == [("skipped", True)]
    pack = find_pack(loop.settings, day)
    verify(pack)
    outbox = {path.stem: json.loads(path.read_text()) for path in (pack.folder / "outbox").iterdir()}
    assert set(outbox) == {"slack", "slack_chart", "ticket", "sheets", "webhook"}
    assert all(message["sent"] is False and message["mode"] == "shadow" for message in outbox.values())


@pytest.mark.slow
def test_mode_off_changes_no_table_no_brief_and_no_list(tmp_path):
    on, off = make_loop(tmp_path / "on"), make_loop(tmp_path / "off", mode="off")
    day = flagged_day(on)
    with dg.DagsterInstance.ephemeral() as stored:
        assert run_dates(on, day, day, stored).success and run_dates(off, day, day, stored).success
    assert_same(content(on, [day]), content(off, [day]))
    with ops_database(off.settings) as engine:
        (row,) = runs.rows(engine)
        assert (row["status"], row["error_message"]) == ("skipped", "the response is switched off (mode off)")
    assert not (find_pack(off.settings, day).folder / "outbox").exists()


def test_dates_outside_the_partitions_are_refused_with_the_reason(tmp_path):
    loop = make_loop(tmp_path / "home")
    with pytest.raises(UsageError, match="before the first date"):
        run_dates(loop, date(2001, 1, 1), D)
    with pytest.raises(UsageError, match="not over yet"):
        run_dates(loop, D, date(2999, 1, 1))
    with pytest.raises(UsageError, match="is after"):
        run_dates(loop, D, D - timedelta(1))


def test_a_killed_command_does_not_leave_a_run_started_for_ever(tmp_path):
    loop = make_loop(tmp_path / "home")
    with instance(loop.settings) as stored, subprocess.Popen(["sleep", "60"]) as child:
        job = build_defs(loop.settings, loop).resolve_job_def(JOB)

        def begun(mark: Callable[[str], str], status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTED) -> str:
            run_id = str(uuid.uuid4())
            return stored.create_run_for_job(job, run_id=run_id, status=status, tags={PROCESS_TAG: mark(run_id)}).run_id

        def reused(run_id: str) -> str:
            host, process, began, of_run = process_mark(run_id).split(":")
            return f"{host}:{process}:{int(began) - 1}:{of_run}"

        killed = partial(process_mark, process=child.pid)
        dead, canceled = begun(killed), begun(killed, dg.DagsterRunStatus.CANCELING)
        assert close_killed_runs(stored) == [], "it lives"
        child.kill()
        child.wait()
        alive = [begun(process_mark), begun(lambda run_id: "another-host:1:1:" + run_id), begun(lambda run_id: killed("its parent's"))]
        number_taken = begun(reused)
        assert set(close_killed_runs(stored)) == {dead, canceled, number_taken}
        ended = {run_id: stored.get_run_by_id(run_id).status for run_id in (dead, canceled, number_taken, *alive)}
        failed, started = dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.STARTED
        assert list(ended.values()) == [failed, dg.DagsterRunStatus.CANCELED, failed, started, started, started]


@pytest.mark.slow
def test_lake_and_events_are_compared(tmp_path):
    loop = make_loop(tmp_path / "home")
    assert run_dates(loop, D, D).success
    assert mismatches(loop.settings, loop.lake) == []
    loop.lake.path("alert_logic", D).unlink()
    assert mismatches(loop.settings, loop.lake) == [f"alert_logic: {D} recorded, but the file is gone"]


def test_definitions_are_complete_and_grouped_after_the_stages(tmp_path):
    loop = make_loop(tmp_path / "home")
    defs = build_defs(loop.settings, loop)
    dg.Definitions.validate_loadable(defs)
    graph = defs.resolve_asset_graph()
    groups = {key.to_user_string(): graph.get(key).group_name for key in graph.get_all_asset_keys()}
    assert set(groups.values()) == {"detect", "package", "execute", "log"}
    assert set(groups) == {
        "orders", "customer_days", *PER_DAY, "cohort_retention_evolution", "action_pack", "incident_response", "ops_runs_log"}
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.owners == ["team:retention"] and node.kinds and node.description
        if node.partitions_def:
            assert node.backfill_policy == dg.BackfillPolicy.single_run()
        if key.to_user_string() in TABLES:
            schema = node.metadata["dagster/column_schema"]
            assert [column.name for column in schema.columns] == TABLES[key.to_user_string()].column_names
    assert all(graph.get(key).blocking for key in graph.asset_check_keys if hasattr(graph.get(key), "blocking"))
    schedule = defs.resolve_schedule_def(f"{JOB}_schedule")
    assert schedule.cron_schedule == ["0 6 * * *", "*/5 * * * *"]
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING


def test_a_newer_dagster_yaml_reaches_homes_that_did_not_change_theirs(tmp_path):
    """The shipped file gains what killed runs need; an installation's own changes are never overwritten."""
    from retention_ops.launch import dagster_home

    file = dagster_home(settings_for(tmp_path)) / "dagster.yaml"
    shipped = file.read_text()
    older = "# an older one\n" + shipped
    file.write_text(older)
    file.with_name(".dagster.yaml.sha256").write_text(hashlib.sha256(older.encode()).hexdigest())
    dagster_home(settings_for(tmp_path))
    assert file.read_text() == shipped
    file.write_text("# mine\n")
    dagster_home(settings_for(tmp_path))
    assert file.read_text() == "# mine\n"
