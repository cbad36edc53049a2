"""Opt-in: a real project. Dry-runs every rule, rewrites one tiny partition and compares it with the lake; bills a few times 10 MB.

    RETENTION_OPS_BIGQUERY_SMOKE=project.scratch_dataset RETENTION_OPS_BIGQUERY_SMOKE_LOCATION=EU \\
        python -m pytest -rs retention_ops_tests/warehouse/test_bigquery_smoke.py

Credentials are Application Default Credentials. The dataset is created where it is missing and must be one to play with.
"""

from __future__ import annotations

import os
from datetime import timedelta

import pandas as pd
import pytest

from retention_ops.detect.compute import PRIORITY_ORDER, workspace
from retention_ops.detect.in_bigquery import BETWEEN, DAILY, estimates
from retention_ops.errors import WarehouseError
from retention_ops.warehouse.choice import open_warehouse
from retention_ops_tests.conftest import LAST_DAY
from retention_ops_tests.shops import lake_with, small_shop

ADDRESS = os.environ.get("RETENTION_OPS_BIGQUERY_SMOKE", "")  # read here: no test sees the machine's own settings
LOCATION = os.environ.get("RETENTION_OPS_BIGQUERY_SMOKE_LOCATION", "EU")
D = LAST_DAY

pytestmark = pytest.mark.skipif(
    not ADDRESS, reason="no BigQuery project here: set RETENTION_OPS_BIGQUERY_SMOKE=project.scratch_dataset to try a real one",
)


@pytest.fixture
def warehouse(tmp_path):
    project, _, dataset = ADDRESS.partition(".")
    settings = lake_with(
        small_shop(), tmp_path / "home", min_sample=10, warehouse="bigquery", bigquery_project=project, bigquery_dataset=dataset,
        bigquery_location=LOCATION, maximum_bytes_billed=100_000_000,
    ).settings
    with workspace(open_warehouse(settings)) as space:
        yield space.lake


def test_every_rule_passes_a_dry_run_and_dates_prune(warehouse):
    late, early = estimates(warehouse, D), estimates(warehouse, D - timedelta(150))
    assert set(late) == {*DAILY, *BETWEEN, "cohort_retention_evolution"}
    assert 0 < early["base_customers"] < late["base_customers"], "later months are not read"


def test_a_tiny_partition_is_rewritten_twice_and_equals_the_lake(warehouse, tmp_path):
    lake = lake_with(small_shop(), tmp_path / "lake", min_sample=10)
    for _ in range(2):
        with workspace(warehouse) as space:
            space.build("alert_logic", D)
            for table in ("retention_daily", "alert_logic"):
                where = f"{'as_of_date' if table == 'retention_daily' else 'alert_date'} = DATE '{D}'"
                assert warehouse.write(space.connection, table, D, space.provenance, where=where) == (2 if table == "alert_logic" else 1)
    with workspace(lake) as space:
        space.build("alert_logic", D)
        expected = space.rows("alert_logic")
    pd.testing.assert_frame_equal(warehouse.read("alert_logic", D), expected, check_exact=True, check_dtype=False)
    assert D in warehouse.days("alert_logic") and warehouse.provenance("alert_logic", D)["orders_version"]


def test_the_queue_of_a_range_equals_the_lakes(warehouse, tmp_path):
    """Intervals, staging by day and LN."""
    days = [D - timedelta(1), D]
    with workspace(warehouse) as space:
        assert list(space.queue_batches(days)) == [days]
        space.build_range("customer_priority", *days)
        found = space.rows("customer_priority", f"run_date, {PRIORITY_ORDER}").drop(columns="created_at")
    with workspace(lake_with(small_shop(), tmp_path / "lake", min_sample=10)) as space:
        space.build_range("customer_priority", *days)
        expected = space.rows("customer_priority", f"run_date, {PRIORITY_ORDER}").drop(columns="created_at")
    pd.testing.assert_frame_equal(found, expected, check_exact=True, check_dtype=False)


def test_rows_of_another_date_are_refused_by_bigquery_itself(warehouse):
    with workspace(warehouse) as space:
        space.build("retention_daily", D)
        with pytest.raises(WarehouseError):
            warehouse.write(space.connection, "retention_daily", D - timedelta(1), space.provenance)
