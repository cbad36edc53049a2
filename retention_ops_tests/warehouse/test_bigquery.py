"""The second engine, with Google's own client and the real assets, against a loopback BigQuery.

The server analyzes every statement with GoogleSQL before DuckDB executes it and is stricter than the original. What this
cannot show is in the README: nothing here has run on BigQuery itself.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from types import SimpleNamespace

import dagster as dg
import pandas as pd
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.api_core import exceptions
from google.cloud import bigquery
from google.cloud.bigquery import client as client_module

from retention_ops.commands import shared
from retention_ops.commands.estimate import show_estimate
from retention_ops.detect import in_bigquery
from retention_ops.detect.alerts import DETAILS
from retention_ops.detect.compute import PRIORITY_ORDER, closures_between, table_for, workspace
from retention_ops.detect.in_bigquery import BETWEEN, estimates
from retention_ops.errors import SettingsError, UsageError, WarehouseError
from retention_ops.execute.forget import forget
from retention_ops.execute.gate import Gate
from retention_ops.execute.reconcile import _Search
from retention_ops.execute.respond import Responder
from retention_ops.execute.trail import publish_log
from retention_ops.launch import run_dates
from retention_ops.log import runs
from retention_ops.log.database import ops_database
from retention_ops.orchestration import Loop
from retention_ops.package.pack import find_pack
from retention_ops.settings import load_settings
from retention_ops.sources.identity import identity_of
from retention_ops.sources.ingest import ingest
from retention_ops.sources.morning import owed
from retention_ops.warehouse.bigquery import MOST_PARTITIONS, BigQuery
from retention_ops.warehouse.bigquery_jobs import GB
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.freshness import KEPT_FOR_EVER, freshness
from retention_ops_tests.conftest import LAST_DAY
from retention_ops_tests.log.test_runs_log import row
from retention_ops_tests.shops import lake_with, refunded_shop, small_shop
from retention_ops_tests.warehouse import test_bigquery_smoke
from retention_ops_tests.warehouse.bigquery_server import BigQueryServer
from retention_ops_tests.warehouse.engines import addressed, bigquery_with, on_bigquery

D = LAST_DAY
PER_DAY = [name for name, table in TABLES.items() if table.stored == "day"]


@pytest.fixture
def server():
    with BigQueryServer() as running:
        yield running


@pytest.fixture
def warehouse(server, tmp_path) -> BigQuery:
    """The small shop's orders in this home, nothing in BigQuery yet."""
    return bigquery_with(server, small_shop(), tmp_path / "home", min_sample=10)


def stored(warehouse, days):
    """Every row of the per-day tables, created_at apart, in one order for both engines."""
    return {
        table: warehouse.read_range(table, days[0], days[-1]).drop(columns="created_at", errors="ignore")
        .sort_values([TABLES[table].date_column, *TABLES[table].key], ignore_index=True)
        for table in PER_DAY
    }


def replace_one(warehouse: BigQuery, day: date = D) -> int:
    """Computes retention_daily of a day and replaces its partition, without Dagster."""
    with workspace(warehouse) as space:
        space.build("retention_daily", day)
        return warehouse.write(space.connection, "retention_daily", day, space.provenance)


# ---------------------------------------------------------------------------------------------------------- the daily loop

@pytest.mark.slow
def test_a_backfill_twice_over_leaves_the_lakes_rows_once(server, warehouse, tmp_path):
    days = [D - timedelta(1), D]
    lake = lake_with(small_shop(), tmp_path / "lake", min_sample=10)
    with dg.DagsterInstance.ephemeral() as instance:
        for _ in range(2):
            outcome = run_dates(Loop(warehouse), days[0], days[-1], instance)
            assert outcome.success, outcome.errors
        metadata = {
            (table, event.partition_key): event.asset_materialization.metadata
            for table in (*PER_DAY, "action_pack", "orders", "customer_days", "cohort_retention_evolution")
            for event in reversed(instance.fetch_materializations(dg.AssetKey(table), limit=4).records)
        }
        assert run_dates(Loop(lake), days[0], days[-1], instance).success
    here, there = stored(warehouse, days), stored(lake, days)
    for table in PER_DAY:
        pd.testing.assert_frame_equal(here[table], there[table], check_exact=True, obj=table)
        keys = here[table][[TABLES[table].date_column, *TABLES[table].key]]
        assert not keys.duplicated().any(), table
        assert warehouse.days(table) == lake.days(table) == days
    pd.testing.assert_frame_equal(
        warehouse.read("cohort_retention_evolution"), lake.read("cohort_retention_evolution"), check_exact=True)
    pd.testing.assert_frame_equal(
        warehouse.read("audience_current", None, "customer_id"), lake.read("audience_current", None, "customer_id"), check_exact=True)
    for day in days:
        packs = find_pack(warehouse.settings, day).manifest, find_pack(lake.settings, day).manifest
        assert packs[0]["facts_sha256"] == packs[1]["facts_sha256"] and packs[0]["audience_sha256"] == packs[1]["audience_sha256"]
    with ops_database(warehouse.settings) as engine:
        written = [row["row_hash"] for row in runs.rows(engine)]
    assert warehouse.read("ops_runs_log", None, "run_timestamp, alert_date")["row_hash"].tolist() == written
    billed = {name: entry["bytes_billed"].value for name, entry in metadata.items()}
    for table in PER_DAY:
        for day in days:
            replaced = metadata[table, str(day)]
            assert billed[table, str(day)] > 0
            assert replaced["bigquery_job"].value.startswith(f"retention_ops-replace-{table}-{day:%Y%m%d}-")
            assert replaced["path"].value == f"shop-project.retention.{table}${day:%Y%m%d}"
    assert billed["cohort_retention_evolution", None] > 0 and billed["customer_days", None] > 0
    assert "bigquery_job" not in metadata["orders", None], "it replaced nothing"
    assert not [name for _, name in server.tables if name.startswith("staging_")]
    assert warehouse.pauses == []
    changed = [request.path for request in server.requests
               if request.method in ("PATCH", "PUT", "DELETE") or request.path.endswith("/tables")]
    assert changed and all("/datasets/retention/" in path for path in changed)
    assert {job.resource["configuration"].get("labels", {}).get("app") for job in server.jobs.values()} == {"retention-ops"}


def test_a_range_is_one_pass_and_each_day_reads_back_its_own_rows(server, warehouse):
    """What the lake does for a range, BigQuery does as well: the orders are read once, and only those that can still matter."""
    days = [D - timedelta(back) for back in (3, 2, 1, 0)]
    with workspace(warehouse) as space:
        assert list(space.queue_batches(days)) == [days]
        space.build_range("customer_priority", days[0], days[-1])
        for day in days:
            warehouse.write(space.connection, "customer_priority", day, space.provenance, where=f"run_date = DATE '{day}'")
        space.build_range("retention_daily", days[0], days[-1])
    scans = {name: server.done(f"stage-{name}")[0].scans for name in ("priority_intervals", "customer_priority", "retention_daily")}
    known = {row[1] for row in server.rows(f"customer_days__{warehouse.orders().version.replace('-', '_')}")}
    within = {back: len({day for day in known if days[0] - timedelta(back) <= day <= D}) for back in (180, 90)}
    assert [scan.partitions for scan in scans["priority_intervals"]] == [within[180]] and within[180] < len(known)
    assert sorted(scan.partitions for scan in scans["retention_daily"]) == [within[90], len(known)], "the latter for first orders"
    read = {scan.table.rpartition("_")[0] for scan in scans["customer_priority"]}
    assert read == {"staging_priority_intervals", "staging_return_rates"}
    assert [[scan.partitions for scan in job.scans] for job in server.done("replace-customer_priority")] == [[1]] * len(days)


def test_no_job_writes_more_partitions_than_bigquery_allows(server, warehouse):
    days = [date(2000, 1, 1) + timedelta(number) for number in range(2 * MOST_PARTITIONS + 1)]
    with workspace(warehouse) as space:
        batches = list(space.queue_batches(days))
    assert [len(batch) for batch in batches] == [MOST_PARTITIONS, MOST_PARTITIONS, 1]
    assert [day for batch in batches for day in batch] == days


@pytest.mark.slow
def test_a_queue_by_what_is_at_stake_is_the_lakes(server, tmp_path):
    chosen = {"membership": "at_stake", "rank_by": "spend_at_stake", "at_stake_size": 40, "min_sample": 10}
    found = []
    for home in (bigquery_with(server, small_shop(), tmp_path / "there", **chosen), lake_with(small_shop(), tmp_path / "here", **chosen)):
        rows = table_for(home, "customer_priority", D).drop(columns="created_at")
        assert set(rows["priority_tier"]) == {"P1", "P2", "P3"} and rows["spend_at_stake"].gt(0).any()
        found.append(rows)
    pd.testing.assert_frame_equal(*found, check_exact=True, check_dtype=False)


@pytest.mark.slow
def test_refunds_are_subtracted_as_in_the_lake_and_are_gone_when_taken_back(server, tmp_path):
    orders = refunded_shop(small_shop(), D, seed=7)
    there, here = bigquery_with(server, orders, tmp_path / "there", min_sample=10), lake_with(orders, tmp_path / "here", min_sample=10)
    for day in (D - timedelta(40), D):
        for table in ("base_customers", "churn_detection", "customer_priority"):
            found, expected = (table_for(home, table, day).drop(columns="created_at", errors="ignore") for home in (there, here))
            pd.testing.assert_frame_equal(found, expected, check_exact=True, check_dtype=False, obj=f"{table} of {day}")
    there.refresh_views()
    assert ("retention", "refunds") in server.tables
    known = there.read("refunds", there.orders().version)
    file = tmp_path / "none.csv"
    known.assign(refund_amount=0)[["order_id", "refund_date", "refund_amount"]].to_csv(file, index=False)
    ingest([file], "refunds", there.settings, replace=True)
    table_for(there, "base_customers", D)
    there.refresh_views()
    assert there.orders().refunds == 0 and ("retention", "refunds") not in server.tables


@pytest.mark.slow
def test_replies_lost_all_the_way_lose_and_double_nothing(server, warehouse, tmp_path):
    """Every fifth request that starts a job is carried out and its reply is lost."""
    server.lost_every(5, "POST .*/jobs$")
    with dg.DagsterInstance.ephemeral() as instance:
        outcome = run_dates(Loop(warehouse), D, D, instance)
        assert outcome.success, outcome.errors
    assert len(warehouse.pauses) > 5 and set(warehouse.pauses) == {2}
    lake = lake_with(small_shop(), tmp_path / "lake", min_sample=10)
    for table in PER_DAY:
        expected = table_for(lake, table, D).drop(columns="created_at", errors="ignore")
        order = PRIORITY_ORDER if table == "customer_priority" else None
        found = warehouse.read(table, D, order).drop(columns="created_at", errors="ignore")
        # computed, not stored: DuckDB's narrower integers
        pd.testing.assert_frame_equal(found, expected, check_exact=True, check_dtype=False, obj=table)
    assert len(server.rows("partition_log")) == len({row[5] for row in server.rows("partition_log")}), "each replacement stands once"


def test_a_past_date_after_new_orders_is_stale_until_it_is_rebuilt(server, tmp_path):
    shop = small_shop()
    late = shop["order_date"] > D - timedelta(3)
    warehouse = bigquery_with(server, shop[~late], tmp_path / "home", D - timedelta(1))
    day = D - timedelta(1)
    replace_one(warehouse, day)
    assert freshness(warehouse).stale == []
    path, rows = tmp_path / "more.csv", shop[late]
    rows[["order_id", "customer_id", "order_date"]].assign(order_amount=[f"{c / 100:.2f}" for c in rows["order_cents"]]).to_csv(path)
    ingest([path], "orders", warehouse.settings)
    assert freshness(warehouse).stale == [day]
    replace_one(warehouse, day)
    warehouse.refresh_views()
    assert freshness(warehouse).stale == []
    names = sorted(name for _, name in server.tables if name.startswith("orders__"))
    assert [name[8:14] for name in names] == ["000001", "000002"]
    assert server.tables["retention", "orders"]["view"]["query"].endswith(f"`shop-project.retention.{names[1]}`")


def test_a_table_that_breaks_its_rules_does_not_replace_its_partition(server, warehouse, monkeypatch):
    with workspace(warehouse) as space:
        space.build("base_customers", D)
        warehouse.write(space.connection, "base_customers", D, space.provenance)
    before = server.rows("base_customers")
    run = in_bigquery.BigQueryWorkspace.run

    def doubles_a_customer(self, rule, **dates):
        run(self, rule, **dates)
        staged = self.connection._relations[rule.table]
        self.connection.show(rule.table, f"SELECT * FROM ({staged} UNION ALL ({staged} LIMIT 1))")

    monkeypatch.setattr(in_bigquery.BigQueryWorkspace, "run", doubles_a_customer)
    with dg.DagsterInstance.ephemeral() as instance:
        outcome = run_dates(Loop(warehouse), D, D, instance)
    assert not outcome.success and any("key_is_unique" in text and "not replaced" in text for text in outcome.errors)
    assert server.rows("base_customers") == before


def test_the_log_is_exported_whole_after_a_fault(server, warehouse):
    with ops_database(warehouse.settings) as engine:
        runs.append(engine, row(0))
        server.fail("503", r"POST /upload/.*", times=9)
        with pytest.raises(WarehouseError, match=r"job retention_ops-load-ops_runs_log-\w+-1 .*try again"):
            publish_log(warehouse, engine, [])
        server.faults.clear()
        assert server.rows("ops_runs_log") == [] and warehouse.pauses == [2, 4, 8]
        runs.append(engine, row(1))
        assert publish_log(warehouse, engine, []) == 2
        exported = [entry[-1] for entry in server.rows("ops_runs_log", "run_timestamp, alert_date")]
        assert exported == [entry["row_hash"] for entry in runs.rows(engine)]


def test_a_response_that_failed_is_in_the_exported_log(server, warehouse, monkeypatch):
    def breaks(self, day):
        raise WarehouseError("BigQuery job x failed")

    monkeypatch.setattr(Gate, "decide", breaks)
    with dg.DagsterInstance.ephemeral() as instance:
        outcome = run_dates(Loop(warehouse), D, D, instance)
    assert not outcome.success and "the response failed and is logged" in outcome.errors[0]
    exported = warehouse.read("ops_runs_log")
    assert exported[["status", "error_message"]].values.tolist() == [["failed", "BigQuery job x failed"]]


# ------------------------------------------------------------------------------------------------------------------ faults

REPLACE = r"replace-retention_daily"


@pytest.mark.parametrize("fault", ["lost_after", "lost_before", "503", "429", "500_before", "500_after", "slow_after"])
def test_a_request_that_failed_is_repeated_and_runs_once(server, warehouse, tmp_path, fault):
    warehouse = on_bigquery(server, warehouse.settings, request_seconds=3) if fault == "slow_after" else warehouse
    replace_one(warehouse)
    expected = server.rows("retention_daily")
    server.delay = 5.0
    warehouse.pauses.clear()
    before = len(server.done(REPLACE))
    server.fail(fault, r"POST .*/jobs$")
    server.only_faults_for(REPLACE)
    assert replace_one(warehouse) == 1
    assert warehouse.pauses == [2]
    assert len(server.done(REPLACE)) == before + 1, "the job ran once"
    assert server.rows("retention_daily") == expected


@pytest.mark.parametrize("reason", ["backendError", "internalError", "rateLimitExceeded", "jobBackendError"])
def test_a_job_that_was_given_up_is_run_anew_under_another_id(server, warehouse, reason):
    server.fail_job(reason, REPLACE, times=2)
    assert replace_one(warehouse) == 1
    assert warehouse.pauses == [2, 4]
    ids = [job_id for job_id in server.jobs if re.search(REPLACE, job_id)]
    assert [job_id[-2:] for job_id in ids] == ["-1", "-2", "-3"] and len(server.rows("retention_daily")) == 1


def test_after_four_attempts_the_query_and_the_job_are_named_and_the_old_partition_stays(server, warehouse):
    replace_one(warehouse)
    before = server.rows("retention_daily")
    server.fail_job("backendError", REPLACE, times=9)
    with pytest.raises(WarehouseError) as caught:
        replace_one(warehouse)
    assert warehouse.pauses == [2, 4, 8]
    text = str(caught.value)
    assert re.search(r"job retention_ops-replace-retention_daily-\d{8}-\w+-4 \(project shop-project, location EU\)", text)
    assert "FROM retention_daily" in text and "the job was given up" in text
    assert server.rows("retention_daily") == before


def test_a_mistake_fails_at_once_and_names_the_query_and_the_job(server, warehouse):
    warehouse.make_ready()
    with pytest.raises(WarehouseError, match=r"(?s)job retention_ops-ask-\w+-1 .*Unrecognized name: no_such.*SELECT no_such"):
        warehouse.jobs.query("SELECT no_such FROM UNNEST([1])", name="ask")
    assert warehouse.pauses == []


def test_a_reply_lost_while_reading_rows_is_asked_for_again(server, warehouse):
    server.fail("lost_after", r"GET .*/queries/.*", times=2)
    assert replace_one(warehouse) == 1
    assert warehouse.pauses == [2, 4]


def test_a_job_that_takes_its_time_is_waited_for(server, warehouse):
    server.polls = 2
    assert replace_one(warehouse) == 1
    assert len(server.rows("retention_daily")) == 1


def test_more_rows_than_a_page_arrive_whole(server, warehouse):
    with workspace(warehouse):
        pass
    version = warehouse.orders().version
    assert len(warehouse.read("orders", version)) == len(small_shop()) > 500


def test_closed_days_are_those_of_the_lake(server, tmp_path):
    """The calendar reaches BigQuery as part of the statement; a reason may hold anything."""
    path = tmp_path / "closures.csv"
    path.write_text("from,to,reason\n2024-03-20,2024-03-21,\"O'Neill's \"\"stock\\taking\"\", ünïted\"\n", encoding="utf-8")
    more = {"holiday_country": "GB-ENG", "closures_file": path}
    local, remote = lake_with(small_shop(), tmp_path / "lake", **more), bigquery_with(server, small_shop(), tmp_path / "home", **more)
    first, last = D - timedelta(200), D
    found = []
    for lake in (local, remote):
        with workspace(lake) as space:
            space.build_closed_days(first, last)
            found.append([tuple(row) for row in space.rows("closed_days").itertuples(index=False)])
            space.build_closed_days(date(2023, 11, 6), date(2023, 11, 7))  # a range without a day of the calendar
            assert space.rows("closed_days").empty
    assert found[0] == found[1] and (pd.Timestamp(2024, 3, 20), "O'Neill's \"stock\\taking\", ünïted") in found[0]
    assert closures_between(local, first, last) == closures_between(remote, first, last)


def test_a_large_file_is_uploaded_in_a_resumable_way(server, warehouse, monkeypatch):
    monkeypatch.setattr(client_module, "_MAX_MULTIPART_SIZE", 10)
    server.fail("lost_after", r"PUT .*")
    with workspace(warehouse):
        pass
    assert warehouse.pauses == [2] and len(server.done("load-orders")) == 1
    assert len(server.rows(f"orders__{warehouse.orders().version.replace('-', '_')}")) == len(small_shop())


def test_a_kill_between_two_makes_leaves_no_partition_that_claims_the_older_one(server, warehouse, tmp_path):
    """Rules A, then B, killed before B is recorded, then A again: the partition must not pass for A's."""
    replace_one(warehouse)
    made_from_a = warehouse.provenance("retention_daily", D)
    other = on_bigquery(server, warehouse.settings.model_copy(update={"active_days": 20}))
    server.fail("503", r"POST .*/jobs$", times=9)
    server.only_faults_for(r"record-retention_daily", skip=1)
    with pytest.raises(WarehouseError):
        replace_one(other)
    server.faults.clear()
    again = on_bigquery(server, warehouse.settings)
    assert again.provenance("retention_daily", D) == {} != made_from_a
    assert again.days("retention_daily") == [D] and freshness(again).other_rules == [D]


# ------------------------------------------------------------------------------------------------- what is there, who may

def test_tables_are_created_partitioned_clustered_and_described(server, warehouse):
    with workspace(warehouse):
        pass
    warehouse.refresh_views()
    for table in PER_DAY:
        made = server.tables["retention", table]
        assert made["timePartitioning"] == {"type": "DAY", "field": TABLES[table].date_column}
        assert made["requirePartitionFilter"] is True
        assert made["description"] == TABLES[table].description
        assert {item["name"]: item["description"] for item in made["schema"]["fields"]} == {
            column.name: column.description for column in TABLES[table].columns}
    assert server.tables["retention", "churn_detection"]["clustering"] == {"fields": ["customer_id"]}
    version = warehouse.orders().version.replace("-", "_")
    for table in ("orders", "customer_days"):
        made = server.tables["retention", f"{table}__{version}"]
        assert made["timePartitioning"] == {"type": "MONTH", "field": "order_date"} and made["clustering"] == {"fields": ["customer_id"]}
        assert made["description"] == TABLES[table].description
        assert [item["description"] for item in made["schema"]["fields"]] == [column.description for column in TABLES[table].columns]
        assert "view" in server.tables["retention", table]


def test_a_look_at_what_is_owed_or_was_lost_asks_as_much_however_many_dates_are_stored(server, warehouse, monkeypatch):
    def jobs(look) -> int:
        before = len(server.jobs)
        look()
        return len(server.jobs) - before

    def clock() -> datetime:
        return datetime.combine(D + timedelta(1), datetime.min.time(), UTC) + timedelta(hours=12)

    warehouse.make_ready()
    search = _Search(SimpleNamespace(lake=warehouse), None)
    monkeypatch.setattr(search, "_looking", lambda: SimpleNamespace(horizon=lambda: D - timedelta(9)), raising=False)
    made_from = {"orders_version": warehouse.orders().version}
    asked = []
    for stored in (range(2), range(2, 9)):
        for ago in stored:
            for table in KEPT_FOR_EVER:
                warehouse._record(table, D - timedelta(ago), "stored", made_from, 1)
        asked.append((jobs(lambda: owed(warehouse, clock)), jobs(lambda: search._not_computed(D))))
    assert asked[0] == asked[1] == (1 + len(KEPT_FOR_EVER), 1)
    assert search._not_computed(D) == [D - timedelta(9)], "the oldest of those in reach is not stored"
    assert warehouse.provenances(["alert_logic"], D - timedelta(3), D - timedelta(2)) == [
        (D - timedelta(3), made_from), (D - timedelta(2), made_from)]


def test_a_read_of_some_columns_scans_no_others(server, warehouse):
    replace_one(warehouse)
    whole, narrow = warehouse.read("retention_daily", D), warehouse.read("retention_daily", D, columns=("customers", "as_of_date"))
    assert list(narrow) == ["customers", "as_of_date"]
    pd.testing.assert_frame_equal(narrow, whole[["customers", "as_of_date"]])
    assert "SELECT customers, as_of_date FROM" in server.done("read-retention_daily")[-1].resource["configuration"]["query"]["query"]


def test_a_read_of_one_day_scans_one_partition(server, warehouse):
    for day in (D - timedelta(2), D - timedelta(1), D):
        replace_one(warehouse, day)
    warehouse.read("retention_daily", D)
    warehouse.read_range("retention_daily", D - timedelta(1), D)
    one, two = server.done("read-retention_daily")
    assert [scan.partitions for scan in (*one.scans, *two.scans)] == [1, 2]
    with workspace(warehouse) as space:
        space.use("base_customers", D)
        warehouse.write(space.connection, "base_customers", D, space.provenance)
    with workspace(warehouse) as space:
        space.build("retention_snapshot", D)
    staged = server.done("stage-retention_snapshot")[-1]
    assert [(scan.table, scan.partitions) for scan in staged.scans] == [("base_customers", 1)]
    with pytest.raises(WarehouseError, match="without a filter over column"):
        warehouse.jobs.query(f"SELECT customers FROM {warehouse.sql('retention_daily')}", name="ask")


def test_orders_after_the_date_are_not_even_read(server, warehouse):
    early = D - timedelta(100)
    with workspace(warehouse) as space:
        space.build("base_customers", early)
    (scan,) = [scan for scan in server.done("stage-base_customers")[-1].scans if scan.table.startswith("customer_days")]
    assert scan.filtered and scan.rows < len(TABLES["customer_days"].columns) * len(server.rows(scan.table))


def test_rows_of_another_date_are_refused_whole(server, warehouse):
    replace_one(warehouse)
    before = server.rows("retention_daily")
    with workspace(warehouse) as space:
        space.build("retention_daily", D)
        with pytest.raises(WarehouseError, match="Some rows belong to different partitions"):
            warehouse.write(space.connection, "retention_daily", D - timedelta(1), space.provenance)
    assert server.rows("retention_daily") == before and warehouse.pauses == []


def test_nothing_is_written_outside_our_dataset(server, warehouse):
    server.add_table("finance", "orders", {"order_id": "STRING"}, [("o1",)])
    warehouse.make_ready()
    with pytest.raises(WarehouseError, match=r"(?s)job retention_ops-ask-\w+-1 .*permission to write denied.*CREATE OR REPLACE TABLE"):
        warehouse.jobs.query("CREATE OR REPLACE TABLE `shop-project.finance.orders` AS SELECT 'x' AS order_id", name="ask")
    assert warehouse.pauses == []


def test_a_dataset_in_another_location_is_refused(server, warehouse):
    warehouse.make_ready()
    server.datasets["retention"]["location"] = "US"
    with pytest.raises(SettingsError, match="is in US, RETENTION_OPS_BIGQUERY_LOCATION says EU"):
        on_bigquery(server, warehouse.settings).make_ready()


def test_a_preview_replaces_nothing(server, warehouse):
    replace_one(warehouse)
    before = server.rows("retention_daily")
    looking = on_bigquery(server, warehouse.settings)
    looking.writes = False
    assert replace_one(looking) == 1
    looking.remove("audience_current")
    assert server.rows("retention_daily") == before and len(server.done(REPLACE)) == 1
    assert ("retention", "audience_current") in server.tables


def test_old_snapshots_are_dropped_and_forgotten(server, tmp_path):
    warehouse = bigquery_with(server, small_shop(), tmp_path / "home", snapshot_keep_days=2)
    for day in (D - timedelta(2), D - timedelta(1), D):
        with workspace(warehouse) as space:
            space.build("base_customers", day)
            warehouse.write(space.connection, "base_customers", day, space.provenance)
    assert warehouse.prune_snapshots("base_customers", D) == [D - timedelta(2)]
    assert warehouse.days("base_customers") == [D - timedelta(1), D]
    assert {row[0] for row in server.rows("base_customers")} == {D - timedelta(1), D}


# ------------------------------------------------------------------------------------------------------------------- money

def test_a_query_over_the_limit_fails_at_once(server, warehouse):
    with workspace(warehouse):
        pass
    tight = on_bigquery(server, warehouse.settings.model_copy(update={"maximum_bytes_billed": 10_485_759}))
    with pytest.raises(WarehouseError, match="Query exceeded limit for bytes billed"):
        replace_one(tight)
    assert tight.pauses == []


def test_the_months_budget_counts_what_bigquery_billed_and_refuses_before_it_starts(server, warehouse):
    replace_one(warehouse)
    billed = sum(int(job.resource["statistics"].get("query", {}).get("totalBytesBilled", 0)) for job in server.jobs.values())
    assert billed == warehouse.jobs.bytes_billed == on_bigquery(server, warehouse.settings).jobs.month_bytes() > 0
    roomy = on_bigquery(server, warehouse.settings.model_copy(update={"bigquery_monthly_budget_gb": 10 * billed / GB}))
    replace_one(roomy)
    assert roomy.jobs.month_bytes() == billed + roomy.jobs.bytes_billed
    started = len(server.jobs)
    spent = on_bigquery(server, warehouse.settings.model_copy(update={"bigquery_monthly_budget_gb": billed / GB}))
    with pytest.raises(WarehouseError, match=r"(?s)over the month's budget: .*Nothing was started.*The query was:"):
        replace_one(spent)
    assert len(server.jobs) == started and spent.pauses == []


def test_a_new_month_starts_at_nothing(server, warehouse):
    replace_one(warehouse)
    next_month = (datetime.now(UTC).replace(day=1) + timedelta(days=40)).replace(day=2)
    assert on_bigquery(server, warehouse.settings, clock=lambda: next_month).jobs.month_bytes() == 0


@pytest.mark.slow
def test_a_dry_run_names_the_bytes_of_every_rule_and_computes_nothing(server, warehouse):
    with pytest.raises(UsageError, match=r"is not in shop-project\.retention\.customer_days yet"):
        estimates(warehouse, D)
    with workspace(warehouse):
        pass
    jobs, billed = len(server.jobs), warehouse.jobs.bytes_billed
    scanned = estimates(warehouse, D)
    assert set(scanned) == {*PER_DAY, *BETWEEN, "cohort_retention_evolution"} and all(count > 0 for count in scanned.values())
    assert scanned["base_customers"] > estimates(warehouse, D - timedelta(150))["base_customers"]
    assert (len(server.jobs), warehouse.jobs.bytes_billed) == (jobs, billed), "dry runs are no jobs"


@pytest.mark.slow
def test_a_dry_run_is_printed_with_its_sum_and_what_the_month_was_billed(server, warehouse, monkeypatch, capsys):
    with workspace(warehouse):
        pass
    warehouse = on_bigquery(server, warehouse.settings.model_copy(update={"bigquery_monthly_budget_gb": 5.0}))
    monkeypatch.setattr(shared, "lake", lambda settings: warehouse)
    show_estimate(warehouse.settings, D, as_json=True)
    known = json.loads(capsys.readouterr().out)
    assert known["total"] == sum(known["bytes"].values()) > 0 and known["billed_this_month"] == warehouse.jobs.month_bytes() > 0
    show_estimate(warehouse.settings, D, as_json=False)
    printed = capsys.readouterr().out
    assert all(re.search(rf"{known['bytes'][table]:,} bytes  {table}\n", printed) for table in known["bytes"])
    assert f"{known['total']:,} bytes in all for {D}" in printed
    assert f"{known['billed_this_month']:,} bytes billed this month, of a budget of 5 GB" in printed


# -------------------------------------------------------------------------------------------------------- as a user has it

@pytest.mark.slow
def test_a_user_sets_project_dataset_and_location_and_nothing_else(server, tmp_path):
    """The command line, dagster-gcp's resource and Application Default Credentials, all as they are."""
    lake_with(small_shop(), tmp_path / "home")
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
    account = {"type": "service_account", "project_id": server.project, "private_key_id": "1", "private_key": key, "client_id": "1",
               "client_email": "retention@shop-project.iam.gserviceaccount.com", "token_uri": f"{server.url}/token"}
    (tmp_path / "account.json").write_text(json.dumps(account))
    environment = {
        **os.environ, "RETENTION_OPS_WAREHOUSE": "bigquery", "RETENTION_OPS_BIGQUERY_PROJECT": server.project,
        "RETENTION_OPS_BIGQUERY_DATASET": server.dataset, "RETENTION_OPS_BIGQUERY_LOCATION": server.location,
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "account.json"), "BIGQUERY_EMULATOR_HOST": server.url,
        "RETENTION_OPS_HOME": str(tmp_path / "home"), "RETENTION_OPS_MIN_SAMPLE": "10", "PYTHONPATH": os.pathsep.join(sys.path),
    }

    def command(*words: str) -> str:
        line = [sys.executable, "-m", "retention_ops.cli", *words]
        done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    ran = json.loads(command("run", "--date", str(D), "--json"))
    assert ran["success"] and ran["alert"]["alert_date"] == str(D)
    assert {row[0] for row in server.rows("customer_priority")} == {D}
    dry = json.loads(command("run", "--date", str(D), "--dry-run", "--json"))
    assert dry["total"] == sum(dry["bytes"].values()) > 0
    assert json.loads(command("status", "--json"))["newest_date"] == str(D)


@pytest.mark.slow
@pytest.mark.parametrize("story", [story for name, story in vars(test_bigquery_smoke).items() if name.startswith("test_")])
def test_the_opt_in_test_of_a_real_project_is_sound(warehouse, tmp_path, story):
    """What it would do there, it does here; so that it fails there only for what this server cannot show."""
    with workspace(warehouse):
        pass
    given = {"warehouse": warehouse, "tmp_path": tmp_path}
    story(**{name: given[name] for name in inspect.signature(story).parameters})


def test_a_missing_address_is_named():
    with pytest.raises(SettingsError, match="warehouse=bigquery needs RETENTION_OPS_BIGQUERY_DATASET, RETENTION_OPS_BIGQUERY_LOCATION"):
        load_settings(warehouse="bigquery", bigquery_project="p")


def test_the_lake_needs_no_client_of_google(tmp_path):
    modules = "retention_ops.cli, retention_ops.status, retention_ops.detect.explain"
    code = f"import sys, {modules}; sys.exit('google.cloud.bigquery' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).returncode == 0


def test_settings_address_the_server(server):
    assert load_settings(**addressed(server)).warehouse == "bigquery"


def test_a_table_of_an_older_version_gets_the_columns_it_lacks(server, warehouse):
    """What was there stays readable, with nulls; the next write fills them."""
    def stored(lake):
        with workspace(lake) as space:
            space.build("alert_logic", D)
            lake.write(space.connection, "alert_logic", D, space.provenance, where=f"alert_date = DATE '{D}'")

    stored(warehouse)
    resource = server.tables[server.dataset, "alert_logic"]
    resource["schema"]["fields"] = [item for item in resource["schema"]["fields"] if item["name"] not in DETAILS]
    for name in DETAILS:
        server._duck.execute(f'ALTER TABLE "{server.dataset}"."alert_logic" DROP COLUMN "{name}"')
    again = on_bigquery(server, warehouse.settings)
    with workspace(again):
        old = again.read("alert_logic", D)
    assert len(old) == 2 and old["sentence"].isna().all() and list(old.columns) == TABLES["alert_logic"].column_names
    stored(again)
    assert again.read("alert_logic", D)["score"].notna().sum() == 1


@pytest.mark.parametrize(("change", "why"), [
    (lambda fields: fields[1:], "is missing in new schema"),
    (lambda fields: [*fields, bigquery.SchemaField("more", "STRING", mode="REQUIRED")], "Cannot add required fields"),
    (lambda fields: [bigquery.SchemaField(fields[0].name, "STRING"), *fields[1:]], "has changed type"),
])
def test_the_fake_refuses_schema_changes_that_bigquery_refuses(warehouse, change, why):
    with workspace(warehouse):
        table = warehouse.jobs.client.get_table(warehouse.reference("alert_logic"))
    table.schema = change(list(table.schema))
    with pytest.raises(exceptions.BadRequest, match=why):
        warehouse.jobs.client.update_table(table, ["schema"], retry=None)


# ------------------------------------------------------------------------------------------------------- one person


def test_a_forgotten_customer_is_in_no_table_and_no_other_row_is_touched(server, tmp_path, monkeypatch):
    monkeypatch.setenv("RETENTION_OPS_ID_KEY", "a-key-that-nobody-guesses-0123456789")
    everybody = sorted(set(small_shop()["customer_id"]))
    attributes = pd.DataFrame({"customer_id": everybody, "country": "DE"})
    warehouse = bigquery_with(server, refunded_shop(small_shop(), D, seed=7), tmp_path / "home", min_sample=10, customers=attributes)
    days = [D]
    with dg.DagsterInstance.ephemeral() as instance:
        assert run_dates(Loop(warehouse), days[0], D, instance).success
    before = stored(warehouse, days)
    gone = before["customer_priority"]["customer_id"].iloc[0]
    assert warehouse.rows_of("churn_detection", [gone])["as_of_date"].dt.date.tolist() == days
    with ops_database(warehouse.settings) as engine:
        responder = Responder(warehouse, engine, warehouse.settings, "a-person", mode=lambda: "shadow")
        forget(responder, [gone], identity_of(warehouse.settings))
    after = stored(warehouse, days)
    for table, rows in before.items():
        left = rows[rows["customer_id"] != gone].reset_index(drop=True) if "customer_id" in rows else rows
        pd.testing.assert_frame_equal(after[table], left)
    held = {name for name in server.tables if "customer_id" in server.columns(*name)}
    assert held and [name for name in held if any(gone in row for row in server.rows(name[1]))] == []
    assert freshness(warehouse).stale == []
    assert gone not in {word for job in server.done("find|replace") for word in re.findall(r"'([^']*)'", json.dumps(job.resource))}
