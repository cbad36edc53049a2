"""An alert as it was seen then and as it is computed now: the numbers that differ, and which orders, settings or rules changed."""

from __future__ import annotations

import pytest

from retention_ops.detect.explain import explain_date
from retention_ops.detect.since import Records
from retention_ops.log import settings_history
from retention_ops.log.database import ops_database
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.conftest import LAST_DAY
from retention_ops_tests.execute.stage import store_alerts
from retention_ops_tests.sources import NOW

FIRST = LAST_DAY


@pytest.fixture
def seen(small_lake: Lake) -> Lake:
    """A date whose alert was stored, and its settings recorded."""
    store_alerts(small_lake, FIRST, FIRST)
    with ops_database(small_lake.settings) as engine:
        settings_history.record(engine, small_lake.settings, NOW)
    return small_lake


def told(lake: Lake, **changes: object) -> tuple[dict, str]:
    """What explain says, under other settings."""
    now = Lake(lake.settings.model_copy(update=changes))
    with ops_database(lake.settings) as engine:
        facts, sentences = explain_date(now, FIRST, Records(settings_history.every(engine).get))
    return facts["then"], " ".join(sentences)


def test_nothing_changed(seen):
    then, text = told(seen)
    assert then["differs"] == {} and then["settings"] == {} and then["orders"] == [] and not then["sql_changed"]
    assert "Orders, settings and rules are those of then." in text
    assert then["made_from"]["settings_sha256"] == seen.settings.settings_sha256()


def test_a_changed_setting_is_named_with_its_old_and_new_value(seen):
    then, text = told(seen, warning_pct=0.5, slack_channel="C0OTHER01")
    assert then["settings"] == {"slack_channel": ("", "C0OTHER01"), "warning_pct": (15.0, 0.5)}
    assert then["differs"]["retention_status_degradation"]["threshold_warning"] == (15.0, 0.5)
    assert "warning_pct 15 -> 0.5" in text and "threshold_warning was 15, is 0.5" in text


def test_settings_nobody_recorded_are_said_to_be_unknown(seen):
    then, sentences = explain_date(Lake(seen.settings.model_copy(update={"min_sample": 11})), FIRST, Records())
    assert then["then"]["settings"] is None and "a setting of a rule differs" in " ".join(sentences)


def test_corrected_orders_are_named_with_their_version(seen, tmp_path):
    from retention_ops.sources.ingest import ingest

    path = tmp_path / "late.csv"
    lines = [f"late-{number},promo{number},{FIRST},25.00" for number in range(9)]
    path.write_text("\n".join(["order_id,customer_id,order_date,order_amount", *lines]) + "\n")
    ingest([path], "orders", seen.settings, replace=True, complete_through=seen.orders().complete_through)
    then, text = told(seen)
    assert len(then["orders"]) == 1 and "Orders changed since: version 000002-" in text and "9 added" in text
    assert "current_value" in then["differs"]["retention_status_degradation"]


def test_other_rules_are_told(seen, monkeypatch):
    monkeypatch.setattr("retention_ops.detect.since.sql_sha256", lambda: "another release")
    then, text = told(seen)
    assert then["sql_changed"] and "rules in sql/ are of another release" in text


def test_a_date_that_was_never_stored_is_said_so(small_lake):
    facts, sentences = explain_date(small_lake, FIRST, Records())
    assert facts["then"] is None and "is stored" in sentences[-1]


def test_recorded_settings_can_be_added_to_only(seen):
    import sqlalchemy as sa

    with ops_database(seen.settings) as engine:
        for statement in ("UPDATE settings_history SET first_seen = first_seen", "DELETE FROM settings_history"):
            with pytest.raises(sa.exc.DatabaseError, match="append-only"), engine.begin() as connection:
                connection.execute(sa.text(statement))
