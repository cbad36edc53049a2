"""Two real years of retail orders through the whole loop. Skipped where ../shared/data is absent."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import dagster as dg
import pytest

from retention_ops.definitions import build_loop
from retention_ops.detect.compute import alert_history, table_for
from retention_ops.launch import run_dates
from retention_ops.log import runs
from retention_ops.log.database import ops_database
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.conftest import settings_for
from retention_ops_tests.oracle import FIRST_RULE, of_rule

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
FILES = [DATA / "uci_online_retail_II_2009-2010.parquet", DATA / "uci_online_retail.parquet"]
FIRST, LAST = date(2009, 12, 1), date(2011, 12, 9)

pytestmark = pytest.mark.skipif(not all(file.exists() for file in FILES), reason="real orders (../shared/data) are not here")


@pytest.fixture
def both_years(tmp_path):
    settings = settings_for(tmp_path / "home")
    report = ingest(FILES, "uci-online-retail", settings)
    assert (report.rows, report.customers) == (36_969, 5_878)
    assert set(report.excluded) == {"cancellation", "no customer", "price not positive", "invoice already in an earlier file"}
    return Lake(settings)


def test_no_date_of_two_years_is_flagged_and_the_17_cold_start_alarms_are_gated(both_years):
    history = of_rule(FIRST_RULE, alert_history(both_years, FIRST, LAST))
    assert len(history) == 739 and not history["alert_flag"].any()
    silenced = history[history["delta_relative_pct"].round(9) >= 15]
    assert len(silenced) == 17
    assert set(silenced["gate"]) == {"history_warmup"} and silenced["alert_date"].dt.date.max() <= date(2010, 1, 18)
    assert (history["gate"] == "history_warmup").sum() == 97


def test_a_date_says_the_same_whether_or_not_later_orders_are_known(both_years, tmp_path):
    """The earlier file ends on 2010-12-09; its dates do not change when the next year arrives."""
    alone = Lake(settings_for(tmp_path / "alone"))
    ingest(FILES[:1], "uci-online-retail", alone.settings)
    for day in (date(2010, 5, 1), date(2010, 12, 8)):
        for table in ("base_customers", "churn_detection", "alert_logic", "customer_priority"):
            one, other = (table_for(lake, table, day).drop(columns="created_at", errors="ignore") for lake in (alone, both_years))
            assert one.equals(other), (table, day)


@pytest.mark.slow
def test_a_backfill_over_all_dates_is_one_run_without_an_alarm(both_years):
    loop = build_loop(both_years.settings)
    with dg.DagsterInstance.ephemeral() as stored:
        outcome = run_dates(loop, FIRST, LAST, stored)
        assert outcome.success, outcome.errors
        assert len(stored.get_run_records()) == 1
    for table in ("retention_daily", "alert_logic", "customer_priority"):
        assert len(both_years.days(table)) == 739
    assert len(both_years.days("base_customers")) == both_years.settings.snapshot_keep_days
    alerts = both_years.read_range("alert_logic", FIRST, LAST)
    assert not of_rule(FIRST_RULE, alerts)["alert_flag"].any()
    logged = sorted({*alerts.loc[alerts["alert_flag"], "alert_date"].dt.date, LAST})  # the second rule flags some, without a calendar
    with ops_database(both_years.settings) as engine:
        assert sorted((row["alert_date"], row["status"]) for row in runs.rows(engine)) == [(day, "skipped") for day in logged]
