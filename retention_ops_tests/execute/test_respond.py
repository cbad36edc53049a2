"""What is answered, passed over and logged, in each mode."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta

import pytest

from retention_ops.execute.respond import decide, respond
from retention_ops.log import runs
from retention_ops.log.database import ops_database
from retention_ops.package.pack import OUTBOX, find_pack
from retention_ops_tests.conftest import LAST_DAY, settings_for
from retention_ops_tests.package.test_pack import build, facts_of

NOON = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)
DAY = date(2026, 6, 30)


def alert(severity="CRITICAL", gate=None, day=DAY):
    return {"alert_date": day.isoformat(), "alert_flag": severity != "INFO", "severity": severity, "gate": gate}


@pytest.mark.parametrize(("mode", "row", "complete_through", "verdict", "says"), [
    ("shadow", alert(), DAY, "act", "nothing sent"),
    ("shadow", alert(), DAY + timedelta(1), "skip", "history"),
    ("shadow", alert("INFO"), DAY, "skip", "no alert"),
    ("shadow", alert("INFO", "min_sample"), DAY, "skip", "min_sample"),
    ("off", alert(), DAY, "skip", "mode off"),
    ("live", alert(), DAY, "act", "outbox"),
    ("live", alert(day=DAY - timedelta(7)), DAY, "skip", "max_alert_age_days"),
    ("live", alert(day=DAY - timedelta(6)), DAY, "act", "outbox"),
    ("pilot", alert("WARNING"), DAY, "act", "outbox"),
    ("pilot", alert("CRITICAL"), DAY, "skip", "WARNING only"),
])
def test_who_is_answered(tmp_path, mode, row, complete_through, verdict, says):
    decision = decide(row, complete_through, settings_for(tmp_path, mode=mode), lambda: NOON)
    assert decision.verdict == verdict
    assert says in decision.reason


def test_the_age_of_an_alert_is_counted_in_the_shops_days(tmp_path):
    """22:00 UTC on the 7th is already the 8th in Auckland: the alert of June 30th is 8 days old there."""
    late = datetime(2026, 7, 7, 22, 0, tzinfo=UTC)
    assert decide(alert(), DAY, settings_for(tmp_path, mode="live"), lambda: late).verdict == "act"
    assert decide(alert(), DAY, settings_for(tmp_path, mode="live", shop_timezone="Pacific/Auckland"), lambda: late).verdict == "skip"


def answer(lake, severity="CRITICAL", run_id="run-1", spoil=None):
    """Responds to a day of the small shop whose alert row is given another severity, pack included."""
    facts = facts_of(lake)
    facts.alert.update(severity=severity, alert_flag=True)
    from retention_ops.package.pack import build_pack

    pack = build_pack(facts, lake.settings, run_id=run_id, links={})
    if spoil:
        spoil(pack)
    with ops_database(lake.settings) as engine:
        return respond(pack, facts.alert, LAST_DAY, engine, lake.settings, run_id=run_id, counts={"P1": 1, "P2": 2, "P3": 3})


@pytest.mark.parametrize(("severity", "tiers", "priority"), [
    ("WARNING", {"P1", "P2"}, "High"), ("CRITICAL", {"P1", "P2", "P3"}, "Highest"),
])
def test_the_outbox_holds_what_would_have_been_sent(small_lake, severity, tiers, priority):
    row = answer(small_lake, severity)
    pack = find_pack(small_lake.settings, LAST_DAY)
    sent = {path.stem: json.loads(path.read_text()) for path in (pack.folder / OUTBOX).iterdir()}
    assert {name: message["sent"] for name, message in sent.items()} == dict.fromkeys(("slack", "ticket", "sheets", "webhook"), False)
    assert len({message["idempotency_key"] for message in sent.values()}) == 4
    assert sent["ticket"]["content"]["priority"] == priority
    assert set(sent["webhook"]["content"]["export_urls"]) == tiers
    assert set(sent["webhook"]["content"]) == {
        "date", "severity", "alert_flag", "brief_markdown", "metrics", "priority_counts", "export_urls"}
    assert sent["slack"]["content"]["blocks"]
    assert row["status"] == "success" and row["slack_posted"] is False and row["ticket_id"] is None
    assert row["total_exported"] == sum(pack.manifest["audiences"][tier]["rows"] for tier in tiers)
    assert (row["export_p3_link"] is None) == (severity == "WARNING")


def test_the_same_result_is_answered_once(small_lake):
    assert answer(small_lake)["status"] == "success"
    again = answer(small_lake, run_id="run-2")
    assert again["status"] == "skipped" and "already answered by run run-1" in again["error_message"]


def test_a_failed_answer_is_logged_and_writes_no_outbox(small_lake):
    def spoil(pack):
        (pack.folder / "briefing.html").write_text("someone else's brief")

    row = answer(small_lake, spoil=spoil)
    assert row["status"] == "failed" and "briefing.html differs from its manifest" in row["error_message"]
    assert not (find_pack(small_lake.settings, LAST_DAY).folder / OUTBOX).exists()
    with ops_database(small_lake.settings) as engine:
        assert [entry["status"] for entry in runs.rows(engine)] == ["failed"]
    assert answer(small_lake, run_id="run-2")["status"] == "success", "a failed answer does not count as answered"


def test_a_pack_of_another_result_is_not_answered(small_lake):
    pack = build(small_lake)
    facts = facts_of(small_lake)
    changed = {**facts.alert, "severity": "CRITICAL", "alert_flag": True}
    with ops_database(small_lake.settings) as engine:
        row = respond(pack, changed, LAST_DAY, engine, small_lake.settings, run_id="run-1", counts={"P1": 0, "P2": 0, "P3": 0})
    assert row["status"] == "failed" and "another result" in row["error_message"]
