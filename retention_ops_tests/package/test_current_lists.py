"""Lists as they would be now: consent and suppressions are read again before a list leaves, and other tools see the newest one."""

from __future__ import annotations

import csv
from datetime import UTC, datetime, timedelta

import dagster as dg
import duckdb
import pytest

from retention_ops.detect.compute import PRIORITY_ORDER, workspace
from retention_ops.errors import QualityError
from retention_ops.launch import run_dates
from retention_ops.log.database import ops_database
from retention_ops.log.exposures import record
from retention_ops.orchestration import Loop
from retention_ops.package import pack as pack_module
from retention_ops.package.audiences import TIERS, allowed_table, audience_sha256, in_holdout
from retention_ops.package.pack import (
    build_pack,
    current_audiences,
    expire_packs,
    facts_sha256,
    find_pack,
    publish_lists,
    renew_pack,
    verify,
    withdraw_lists,
)
from retention_ops.sources.ingest import ingest
from retention_ops.status import packs_with_opted_out, status
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.conftest import LAST_DAY as D
from retention_ops_tests.package.test_pack import build, facts_of
from retention_ops_tests.shops import lake_with, small_shop


@pytest.fixture
def lake(tmp_path):
    """The small shop with queue and pack of D."""
    made = lake_with(small_shop(), tmp_path / "home", min_sample=10)
    with workspace(made) as space:
        space.build("customer_priority", D)
        made.write(space.connection, "customer_priority", D, space.provenance, order_by=PRIORITY_ORDER)
    renew_pack(made, D, {}, run_id="run-1")
    return made


def run(lake, day=D):
    with dg.DagsterInstance.ephemeral() as stored:
        outcome = run_dates(Loop(lake), day, day, stored)
    assert outcome.success, outcome.errors
    return find_pack(lake.settings, day)


def take_in(lake, preset, text, **options):
    path = lake.settings.home / f"{preset}.csv"
    path.write_text(text)
    return ingest([path], preset, lake.settings, **options)


def with_settings(lake, **changes) -> Lake:
    return Lake(lake.settings.model_copy(update=changes))


def listed(lake, day=D) -> dict[str, list[str]]:
    """tier -> customer ids in the pack's files."""
    pack = find_pack(lake.settings, day)
    return {tier: [row["customer_id"] for row in csv.DictReader(open(pack.folder / pack.manifest["audiences"][tier]["file"], newline=""))]
            for tier in TIERS}


def everybody(lake, day=D) -> list[str]:
    return [customer for tier in listed(lake, day).values() for customer in tier]


def test_lists_built_now_are_those_of_the_pack(lake):
    now = current_audiences(lake, D, {})
    assert audience_sha256(now) == find_pack(lake.settings, D).manifest["audience_sha256"]
    assert {tier: list(audience.treated_ids) for tier, audience in now.items()} == listed(lake)
    assert all(allowed_table(now[tier], "sheets")[1] for tier in TIERS if now[tier].rows)


@pytest.mark.parametrize("changes", [{}, {"mode": "live", "holdout_pct": 40}, {"handover_cooldown_days": 3}])
def test_lists_built_now_are_those_of_a_pack_built_now(lake, changes):
    everyone = everybody(lake)
    handed_over = {customer: D - timedelta(days=1 + place) for place, customer in enumerate(everyone[:5])}
    take_in(lake, "suppressions", f"customer_id\n{everyone[-1]}\n")
    changed = with_settings(lake, **changes)
    pack = build(changed, handed_over=handed_over)
    now = current_audiences(changed, D, handed_over)
    assert audience_sha256(now) == pack.manifest["audience_sha256"]
    assert everyone[-1] not in {customer for audience in now.values() for customer in audience.treated_ids}
    for tier, audience in now.items():
        entry = pack.manifest["audiences"][tier]
        assert (entry["rows"], entry["new"], entry["listed"], entry["excluded"]) == (
            audience.rows, audience.new, audience.listed, audience.excluded)


@pytest.mark.parametrize("harm", ["correct", "remove", "damage"])
def test_a_queue_that_is_gone_or_of_older_orders_is_computed(lake, harm):
    path, before = lake.path("customer_priority", D), current_audiences(lake, D, {})
    if harm == "correct":
        dearer = small_shop().assign(order_amount=lambda orders: orders["order_cents"] / 50).drop(columns="order_cents")
        take_in(lake, "orders", dearer.to_csv(index=False), replace=True)
    else:
        path.unlink() if harm == "remove" else path.write_bytes(b"PAR1")
    now = current_audiences(lake, D, {})
    assert audience_sha256(now) == renew_pack(lake, D, {}, run_id="run-2").manifest["audience_sha256"]
    assert (audience_sha256(now) == audience_sha256(before)) is (harm != "correct")


def test_a_new_consent_computes_no_queue_again(lake, monkeypatch):
    take_in(lake, "customers", f"customer_id,consent\n{everybody(lake)[0]},no\n")
    monkeypatch.setattr(pack_module, "workspace", None)
    assert current_audiences(lake, D, {})


@pytest.mark.parametrize(("preset", "text", "reason"), [
    ("suppressions", "customer_id,reason\n{who},complaint\n", "suppressed"), ("customers", "customer_id,consent\n{who},no\n", "no consent"),
])
def test_who_opts_out_after_the_run_is_off_the_lists_before_they_leave(lake, preset, text, reason):
    before = find_pack(lake.settings, D)
    who = everybody(lake)[0]
    take_in(lake, preset, text.format(who=who))
    now = current_audiences(lake, D, {})
    assert audience_sha256(now) != before.manifest["audience_sha256"]
    assert all(who not in audience.treated_ids for audience in now.values())
    assert packs_with_opted_out(lake) == [D] and status(lake.settings)["packs_with_opted_out"] == [D]
    renewed = renew_pack(lake, D, {}, run_id="run-2")
    verify(find_pack(lake.settings, D))
    assert renewed.manifest["audience_sha256"] == audience_sha256(now) and renewed.facts_sha256 == before.facts_sha256
    assert sum(entry["excluded"].get(reason, 0) for entry in renewed.manifest["audiences"].values()) == 1
    assert who not in everybody(lake) and who not in {row[2] for row in current_rows(lake)}
    assert who not in (renewed.folder / "briefing_INFO.md").read_text()
    assert packs_with_opted_out(lake) == []


@pytest.mark.slow
def test_ingested_suppressions_are_left_off_by_the_next_run_and_counted(lake):
    first = everybody(lake)[:3]
    before = find_pack(lake.settings, D)
    take_in(lake, "suppressions", "customer_id\n" + "\n".join(first) + "\n")
    pack = run(lake)
    assert not set(first) & set(everybody(lake))
    assert sum(entry["excluded"].get("suppressed", 0) for entry in pack.manifest["audiences"].values()) == 3
    assert pack.manifest["suppressions_version"] == lake.suppressions().version and before.manifest["suppressions_version"] == ""
    assert pack.facts_sha256 == before.facts_sha256 and pack.manifest["audience_sha256"] != before.manifest["audience_sha256"]


@pytest.mark.parametrize(("until", "holds"), [(D + timedelta(1), True), (D, False), (D - timedelta(1), False), ("", True)])
def test_a_suppression_holds_while_the_list_of_the_date_is_worked(lake, until, holds):
    who = everybody(lake)[0]
    take_in(lake, "suppressions", f"customer_id,until\n{who},{until}\n")
    assert (who not in {customer for audience in current_audiences(lake, D, {}).values() for customer in audience.treated_ids}) is holds
    assert packs_with_opted_out(lake) == ([D] if holds else [])


@pytest.mark.slow
def test_a_status_finds_ids_that_the_files_show_neutralised(tmp_path):
    shop = small_shop()
    shop["customer_id"] = "=" + shop["customer_id"]
    lake = lake_with(shop, tmp_path / "home", min_sample=10)
    run(lake)
    take_in(lake, "suppressions", f"customer_id\n{everybody(lake)[0].removeprefix(chr(39))}\n")
    assert packs_with_opted_out(lake) == [D]


def test_live_keeps_the_holdout_off_the_lists_and_out_of_the_brief(lake):
    everyone = everybody(lake)
    live = with_settings(lake, mode="live", holdout_pct=40)
    facts = facts_of(live)
    pack = build_pack(facts, live.settings, run_id="r", links={})
    held_out = {customer for customer in everyone if in_holdout(customer, 40, "holdout-1")}
    assert held_out and set(everybody(live)) == set(everyone) - held_out
    assert sum(entry["excluded"].get("holdout", 0) for entry in pack.manifest["audiences"].values()) == len(held_out)
    now = current_audiences(live, D, {})
    assert {customer for audience in now.values() for customer in audience.holdout_ids} == held_out
    shown = [path for path in pack.folder.iterdir() if path.suffix in (".md", ".json", ".html", ".csv")]
    text = "\n".join(path.read_text() for path in shown)
    words = set(text.replace("|", " ").replace('"', " ").replace("`", " ").replace("<", " ").replace(">", " ").split())
    assert not held_out & words
    assert "in the holdout" in (pack.folder / "briefing_INFO.md").read_text()
    assert facts_sha256(facts, live.settings) == find_pack(lake.settings, D).facts_sha256 != ""


def test_nothing_about_who_is_left_off_is_part_of_the_facts(lake):
    everyone = everybody(lake)
    plain = facts_sha256(facts_of(lake), lake.settings)
    take_in(lake, "suppressions", f"customer_id\n{everyone[0]}\n")
    take_in(lake, "customers", f"customer_id,consent\n{everyone[1]},no\n")
    changed = with_settings(lake, mode="live", handover_cooldown_days=5)
    assert facts_sha256(facts_of(changed, handed_over={everyone[2]: D - timedelta(1)}), changed.settings) == plain


def test_who_was_handed_over_before_cools_down_in_the_next_run(lake):
    """The run asks the ops database who was on a list that left."""
    first, second, third = everybody(lake)[:3]
    rows = [(first, D - timedelta(3), "treated"), (second, D, "treated"), (third, D - timedelta(3), "holdout")]
    with ops_database(lake.settings) as engine, engine.begin() as connection:
        for customer, day, which in rows:
            record(connection, 1, day, "export:P1", {customer: ("P1", which)}, datetime(2024, 5, 27, 6, tzinfo=UTC))
    pack = run(lake)
    assert [first in everybody(lake), second in everybody(lake), third in everybody(lake)] == [False, True, True]
    counts = [entry["excluded"] for entry in pack.manifest["audiences"].values() if entry["excluded"]]
    assert counts == [{"handed over in the last 14 days": 1}]
    assert "1 left out: handed over in the last 14 days" in (pack.folder / "briefing_INFO.md").read_text()


# --- audience_current ---


def current_rows(lake) -> list[tuple]:
    with duckdb.connect(str(lake.views_path), read_only=True) as connection:
        return connection.execute("SELECT * FROM audience_current").fetchall()


def test_the_view_is_typed_and_empty_before_the_first_pack(tmp_path):
    lake = lake_with(small_shop(), tmp_path / "home", min_sample=10)
    lake.refresh_views()
    with duckdb.connect(str(lake.views_path), read_only=True) as connection:
        described = connection.execute("DESCRIBE audience_current").fetchall()
    assert [row[0] for row in described] == TABLES["audience_current"].column_names
    assert current_rows(lake) == []


def test_the_view_shows_the_lists_of_the_newest_pack_in_their_order(lake):
    rows = current_rows(lake)
    manifest = find_pack(lake.settings, D).manifest
    assert [row[2] for row in rows] == everybody(lake)
    assert {(row[0], row[8]) for row in rows} == {(D, manifest["audience_sha256"])}
    assert [row[6] for row in rows] == [True] * len(rows) and {row[7] for row in rows} == {None}
    run(lake, D - timedelta(5))
    assert current_rows(lake) == rows, "an older date changes nothing"
    older = find_pack(lake.settings, D - timedelta(5))
    assert older is not None and not publish_lists(lake, facts_of(lake, D - timedelta(5)))


def test_the_view_moves_on_with_the_newest_pack(tmp_path):
    lake = lake_with(small_shop(), tmp_path / "home", min_sample=10)
    run(lake, D - timedelta(1))
    assert {row[0] for row in current_rows(lake)} == {D - timedelta(1)}
    run(lake)
    assert {row[0] for row in current_rows(lake)} == {D}


def test_the_view_says_when_somebody_was_handed_over_last(lake):
    who, last = everybody(lake)[0], D - timedelta(40)
    renew_pack(lake, D, {who: last}, run_id="run-2")
    assert [(row[6], row[7]) for row in current_rows(lake) if row[2] == who] == [(False, last)]
    assert sum(row[6] for row in current_rows(lake)) == len(everybody(lake)) - 1


def test_lists_that_are_not_the_packs_are_not_published(lake):
    before = current_rows(lake)
    assert not publish_lists(lake, facts_of(lake, handed_over={everybody(lake)[0]: D - timedelta(1)}))
    assert current_rows(lake) == before


def test_lists_that_break_their_rules_leave_the_old_table(lake, monkeypatch):
    before = current_rows(lake)
    wrong = [type("Check", (), {"name": "key_is_unique", "passed": False})]
    monkeypatch.setattr(pack_module.quality, "check", lambda *args: wrong)
    with pytest.raises(QualityError, match=r"audience_current of .* key_is_unique"):
        publish_lists(lake, facts_of(lake))
    assert current_rows(lake) == before


def test_the_view_expires_with_its_pack(lake):
    withdraw_lists(lake)
    assert current_rows(lake)
    expire_packs(lake.settings, lambda: datetime.now(UTC) + timedelta(days=lake.settings.pack_keep_days + 1))
    withdraw_lists(lake)
    assert current_rows(lake) == []
