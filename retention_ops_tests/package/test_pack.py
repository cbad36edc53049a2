"""The Action Pack is whole, private, replaced at once, and its two hashes mean what they say."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from datetime import UTC, date, datetime, timedelta

import pandas as pd
import pytest

from retention_ops.detect.compute import priority_order, workspace
from retention_ops.errors import PackError
from retention_ops.package.audiences import COLUMNS, LeftOut, build_audience, safe_text
from retention_ops.package.brief import long_day
from retention_ops.package.pack import (
    add_files,
    audiences_of,
    brief_facts,
    build_pack,
    collect,
    expire_packs,
    facts_sha256,
    find_pack,
    verify,
)
from retention_ops.package.stakes import stake_of
from retention_ops_tests.conftest import LAST_DAY, settings_for
from retention_ops_tests.shops import FIRST_DAY, lake_with, small_shop

D = LAST_DAY
MORNING = datetime(2024, 5, 28, 6, 0, tzinfo=UTC)


def facts_of(lake, day=D, handed_over=None):
    with workspace(lake) as space:
        space.build_range("alert_logic", day - timedelta(lake.settings.trend_days - 1), day)
        history, daily = space.rows("alert_logic"), space.rows("retention_daily")
        space.use("customer_priority", day)
        return collect(space, day, history, daily, space.rows("customer_priority", priority_order(lake.settings)), handed_over or {})


def build(lake, day=D, *, settings=None, clock=lambda: MORNING, run_id="run-1", links=None, handed_over=None):
    return build_pack(facts_of(lake, day, handed_over), settings or lake.settings, run_id=run_id, links=links or {}, clock=clock)


def test_a_pack_names_every_file_with_its_hash_and_rows(small_lake):
    pack = build(small_lake)
    verify(pack)
    assert set(pack.manifest["files"]) == {
        "briefing_INFO.md", "briefing.slack.json", "briefing.html", "at_risk_trend.png", "returning_customers.png",
        *(f"audience_{tier}_{D}.csv" for tier in ("P1", "P2", "P3")),
    }
    for tier in ("P1", "P2", "P3"):
        rows = list(csv.reader(io.StringIO((pack.folder / f"audience_{tier}_{D}.csv").read_bytes().decode(), newline="")))
        assert rows[0] == COLUMNS
        assert len(rows) - 1 == pack.manifest["files"][f"audience_{tier}_{D}.csv"]["rows"] == pack.manifest["audiences"][tier]["rows"]
    alert = facts_of(small_lake).alert
    assert pack.is_of(alert) and set(pack.manifest["alert_versions"]) == {"retention_status_degradation", "returning_customers_shortfall"}
    assert not pack.is_of({**alert, "current_value": 1.0})


def test_only_its_owner_can_read_a_pack(small_lake):
    pack = build(small_lake)
    add_files(pack, {"outbox/slack.json": (b"{}", 1)})
    for folder, _, names in os.walk(pack.folder):
        assert os.stat(folder).st_mode & 0o077 == 0
        assert all(os.stat(os.path.join(folder, name)).st_mode & 0o777 == 0o600 for name in names)


def test_clock_run_and_links_are_outside_both_hashes(small_lake):
    one = build(small_lake)
    links = {"run": "http://127.0.0.1/runs/2", "ticket": "RET-1"}
    other = build(small_lake, clock=lambda: MORNING + timedelta(days=3), run_id="run-2", links=links)
    for name in ("facts_sha256", "audience_sha256"):
        assert one.manifest[name] == other.manifest[name]


def test_what_was_found_changes_facts_and_who_is_listed_changes_audience(tmp_path):
    shop = small_shop()
    one = build(lake_with(shop, tmp_path / "one", min_sample=10))
    tier = max(one.manifest["audiences"], key=lambda name: one.manifest["audiences"][name]["rows"])
    listed = pd.read_csv(one.folder / f"audience_{tier}_{D}.csv")["customer_id"].iloc[0]
    refusing = pd.DataFrame({"customer_id": [listed], "consent": ["no"]})
    other = build(lake_with(shop, tmp_path / "two", min_sample=10, customers=refusing))
    assert one.facts_sha256 == other.facts_sha256
    assert one.manifest["audience_sha256"] != other.manifest["audience_sha256"]
    assert other.manifest["audiences"][tier]["excluded"] == {"no consent": 1}
    assert other.manifest["audiences"][tier]["rows"] == other.manifest["audiences"][tier]["listed"] - 1
    assert listed in (one.folder / "briefing_INFO.md").read_text()
    assert listed not in (other.folder / f"audience_{tier}_{D}.csv").read_text()
    assert listed not in (other.folder / "briefing_INFO.md").read_text(), "nobody is told to contact who said no"


@pytest.mark.parametrize("change", [
    {"value_drop_pct": 61}, {"shop_name": "Another"}, {"membership": "at_stake"},
    *(pytest.param(change, marks=pytest.mark.slow) for change in (
        {"action_p2": "Call them"}, {"trend_days": 30}, {"rank_by": "spend_at_stake"})),
])
def test_settings_are_part_of_the_facts(tmp_path, change):
    shop = small_shop()
    one = build(lake_with(shop, tmp_path / "one", min_sample=10))
    other = build(lake_with(shop, tmp_path / "two", **{"min_sample": 10, **change}))
    assert one.facts_sha256 != other.facts_sha256


def test_templates_are_part_of_the_facts(small_lake, tmp_path):
    folder = tmp_path / "templates"
    folder.mkdir()
    (folder / "briefing.md.j2").write_text('{% extends "shipped/briefing.md.j2" %}')
    restyled = settings_for(small_lake.settings.home, min_sample=10, shop_name="Small shop", templates_dir=folder)
    assert build(small_lake).facts_sha256 != build(small_lake, settings=restyled).facts_sha256


def test_a_rebuilt_pack_keeps_outbox_and_log(small_lake):
    pack = add_files(build(small_lake), {"outbox/slack.json": (b"{}", 1), "ops_run_log.json": (b"[]", 0)})
    verify(pack)
    again = build(small_lake)
    assert (again.folder / "outbox" / "slack.json").read_bytes() == b"{}"
    assert (again.folder / "ops_run_log.json").is_file()
    verify(find_pack(small_lake.settings, D))


def test_files_added_after_another_run_rebuilt_the_pack_belong_to_the_build_in_place(small_lake, tmp_path):
    mine = build(small_lake)
    build(small_lake, run_id="run-2", links={"run": "http://127.0.0.1/2"})
    add_files(mine, {"outbox/slack.json": (b"{}", 1)})
    pack = find_pack(small_lake.settings, D)
    verify(pack)
    assert pack.manifest["run_id"] == "run-2" and "outbox/slack.json" in pack.manifest["files"]
    build(small_lake, settings=settings_for(small_lake.settings.home, min_sample=10, shop_name="Other facts"))
    with pytest.raises(PackError, match="other facts"):
        add_files(mine, {"outbox/slack.json": (b"{}", 1)})


def test_a_pack_that_another_worker_adds_to_is_whole_all_the_same(small_lake):
    first = add_files(build(small_lake), {"ops_run_log.json": (b"[]", 0)})
    add_files(first, {"ops_run_log.json": (b"[1]", 1)})
    verify(first)  # as read before the other one wrote
    build(small_lake, settings=settings_for(small_lake.settings.home, min_sample=10, shop_name="Other facts"))
    with pytest.raises(PackError):
        verify(first)


@pytest.mark.parametrize("harm", ["change", "remove"])
def test_a_touched_pack_is_found_out_and_the_file_named(small_lake, harm):
    pack = build(small_lake)
    target = pack.folder / f"audience_P2_{D}.csv"
    target.write_text("someone,else\r\n") if harm == "change" else target.unlink()
    with pytest.raises(PackError, match=f"audience_P2_{D}.csv"):
        verify(find_pack(small_lake.settings, D))


def test_an_unreadable_manifest_says_how_to_build_the_pack_again(small_lake):
    pack = build(small_lake)
    (pack.folder / "manifest.json").write_text("{")
    with pytest.raises(PackError, match=f"run --date {D}"):
        find_pack(small_lake.settings, D)


def test_counts_money_and_headlines_are_those_who_may_be_contacted(tmp_path):
    """The tier's whole size stays in the manifest (`listed`) beside what was handed over (`rows`)."""
    shop = small_shop()
    priority = facts_of(lake_with(shop, tmp_path / "one", min_sample=10)).priority
    tier = priority["priority_tier"].value_counts().idxmax()
    whole = priority[priority["priority_tier"] == tier]
    refusing = pd.DataFrame({"customer_id": whole["customer_id"].iloc[:2], "consent": "no"})
    lake = lake_with(shop, tmp_path / "two", min_sample=10, customers=refusing)
    facts, pack = facts_of(lake), build(lake)
    audiences = audiences_of(D, facts.priority, facts.no_contact, {}, lake.settings)
    brief = brief_facts(facts, audiences, lake.settings, {})
    assert (brief.counts[tier], brief.totals[tier]) == (len(whole) - 2, len(whole))
    listed = whole.iloc[2:]
    assert brief.next_orders[tier] == pytest.approx(listed["avg_order_value"].sum())
    columns = (listed[name] for name in ("usual_spend_90d", "p_no_return_90d", "spend_at_stake"))
    assert brief.stakes[tier] == stake_of(*columns, season_known=False)
    assert brief.stakes[tier].spend == pytest.approx(listed["spend_at_stake"].sum()) and brief.stakes[tier].spend > 0
    assert sum(count for _, count in brief.actions[tier]) == len(whole) - 2
    assert (pack.manifest["audiences"][tier]["rows"], pack.manifest["audiences"][tier]["listed"]) == (len(whole) - 2, len(whole))
    assert "2 left out: without consent" in (pack.folder / "briefing_INFO.md").read_text()


def test_before_anything_could_be_learned_the_brief_shows_next_orders(small_lake):
    """Labels take 90 days and the shop's first 30 are not looked at: 120 days after the first order there is nothing yet."""
    first = small_shop()["order_date"].min()
    early, later = (facts_of(small_lake, first + timedelta(days)) for days in (119, 120))
    assert len(early.priority) and early.priority["spend_at_stake"].isna().all() and later.priority["spend_at_stake"].notna().all()
    for facts, stakes in ((early, False), (later, True)):
        audiences = audiences_of(facts.day, facts.priority, facts.no_contact, {}, small_lake.settings)
        assert (brief_facts(facts, audiences, small_lake.settings, {}).stakes is not None) == stakes
        text = (build(small_lake, facts.day).folder / f"briefing_{facts.alert['severity']}.md").read_text()
        assert ("| Spend at stake |" in text, "| Next orders at stake |" in text) == (stakes, not stakes)


@pytest.mark.parametrize("rules", [{}, {"rank_by": "spend_at_stake"}, {"membership": "at_stake"},
                                   {"rank_by": "spend_at_stake", "membership": "at_stake"}], ids=str)
def test_a_past_date_built_again_after_more_orders_says_the_same(tmp_path, rules):
    shop, day = small_shop(), D - timedelta(40)
    known = shop[[each <= day for each in shop["order_date"]]].reset_index(drop=True)
    lakes = (lake_with(orders, tmp_path / name, min_sample=10, **rules) for name, orders in (("then", known), ("now", shop)))
    then, now = (build(lake, day) for lake in lakes)
    assert then.facts_sha256 == now.facts_sha256 and then.manifest["audience_sha256"] == now.manifest["audience_sha256"]
    texts = [(pack.folder / f"briefing_{then.severity}.md").read_text() for pack in (then, now)]
    assert all("| Spend at stake |" in text for text in texts)
    before, after = (re.sub("(complete|in) through [^.]+", "", text) for text in texts)
    assert before == after, "but for the day through which orders are complete"


@pytest.mark.parametrize("column", ["usual_spend_90d", "p_no_return_90d", "spend_at_stake", "at_stake_reason"])
def test_what_is_at_stake_is_part_of_the_facts(small_lake, column):
    facts = facts_of(small_lake)
    other = facts.priority.assign(**{column: "another" if column == "at_stake_reason" else 0.25})
    assert facts_sha256(dataclasses.replace(facts, priority=other), small_lake.settings) != facts_sha256(facts, small_lake.settings)


def test_who_has_ordered_once_and_is_on_p2_for_the_stake_is_counted_once(tmp_path):
    """The two groups, and whoever is in neither, add up to the newly AT_RISK customers."""
    lake = lake_with(small_shop(), tmp_path / "home", min_sample=10, membership="at_stake", at_stake_size=1000)
    day = D - timedelta(55)  # the planted cohort, which ordered once, became AT_RISK
    facts = facts_of(lake, day)
    newly = facts.newly_at_risk
    assert newly["customers"] == newly["on_p2"] > 0 and newly["one_order"] == 0, "everybody is listed"
    listed = facts.priority[facts.priority["days_since_last_order"].between(31, 37)]
    assert (listed["total_orders"] == 1).any() and set(listed["priority_tier"]) == {"P2"}


@pytest.mark.parametrize("day", [D, date(2024, 4, 5), date(2024, 3, 20)])
def test_newly_at_risk_counts_those_whose_last_order_crossed_the_line_in_seven_days(small_lake, day):
    shop = small_shop()
    shop = shop[shop["order_date"] <= day]
    visits = shop.groupby("customer_id")["order_date"].agg(["max", "size"])
    newly = visits[[31 <= (day - last).days <= 37 for last in visits["max"]]]
    facts = facts_of(small_lake, day)
    in_p2 = set(facts.priority.loc[facts.priority["priority_tier"] == "P2", "customer_id"])
    assert facts.newly_at_risk == {
        "customers": len(newly), "on_p2": len(in_p2 & set(newly.index)), "one_order": int((newly["size"] == 1).sum())}
    assert not in_p2 & set(newly.index[newly["size"] == 1]), "one order gives no rhythm"


@pytest.mark.parametrize("change", [{"newly_at_risk": {"customers": 99, "on_p2": 9, "one_order": 9}}, {"first_order_date": None}])
def test_who_is_behind_the_rise_is_part_of_the_facts(small_lake, change):
    facts = facts_of(small_lake)
    assert facts_sha256(dataclasses.replace(facts, **change), small_lake.settings) != facts_sha256(facts, small_lake.settings)


def test_the_window_shown_starts_with_the_first_customers(small_lake):
    early = facts_of(small_lake, FIRST_DAY + timedelta(9))
    first = small_shop()["order_date"].min()
    assert early.history[0]["alert_date"] == first.isoformat() and early.first_order_date == first
    assert early.alert["gate"] == "history_warmup"
    assert len(facts_of(small_lake).history) == small_lake.settings.trend_days
    text = (build(small_lake, FIRST_DAY + timedelta(9)).folder / "briefing_INFO.md").read_text()
    assert f"The alarm judges from {long_day(first + timedelta(97))} on." in text


def test_the_manifest_names_what_the_lists_were_made_from(tmp_path):
    plain = build(lake_with(small_shop(), tmp_path / "one", min_sample=10))
    assert plain.manifest["customers_version"] == ""
    refusing = pd.DataFrame({"customer_id": ["c1"], "consent": ["no"]})
    lake = lake_with(small_shop(), tmp_path / "two", min_sample=10, customers=refusing)
    assert build(lake).manifest["customers_version"] == lake.customers().version


def test_a_list_has_one_hash_of_its_content_and_one_of_its_file(small_lake):
    pack = build(small_lake)
    later = build(small_lake, clock=lambda: MORNING + timedelta(days=1))
    for tier, entry in pack.manifest["audiences"].items():
        assert "sha256" not in entry and entry["content_sha256"] == later.manifest["audiences"][tier]["content_sha256"]
        content = (later.folder / entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == later.manifest["files"][entry["file"]]["sha256"]


def test_a_templates_folder_that_is_not_there_leaves_no_pack(small_lake, tmp_path):
    lost = settings_for(small_lake.settings.home, min_sample=10, templates_dir=tmp_path / "nowhere")
    with pytest.raises(PackError, match="nowhere, which is not a folder"):
        build(small_lake, settings=lost)
    assert not small_lake.settings.packs.exists()


def test_old_packs_expire_by_the_day_they_were_built(small_lake):
    build(small_lake)
    build(small_lake, D - timedelta(1), clock=lambda: MORNING + timedelta(days=60))
    assert expire_packs(small_lake.settings, lambda: MORNING + timedelta(days=89)) == []
    assert expire_packs(small_lake.settings, lambda: MORNING + timedelta(days=91)) == [D]
    assert find_pack(small_lake.settings, D) is None
    assert find_pack(small_lake.settings, D - timedelta(1))
    assert len(list((small_lake.settings.packs / ".builds").iterdir())) == 1


BUILDER = textwrap.dedent("""
    import sys
    from datetime import date
    from pathlib import Path
    from retention_ops.warehouse.lake import Lake
    from retention_ops_tests.conftest import settings_for
    from retention_ops_tests.package.test_pack import build
    lake = Lake(settings_for(Path(sys.argv[1]), min_sample=10, shop_name="Small shop"))
    print("ready", flush=True)
    while True:
        build(lake)
""")


@pytest.mark.parametrize("delay", [0.15, *(pytest.param(delay, marks=pytest.mark.slow) for delay in (0.0, 0.31, 0.47))])
def test_kill_9_while_building_leaves_a_whole_pack(small_lake, request, delay):
    expected = build(small_lake).facts_sha256
    builder = subprocess.Popen([sys.executable, "-c", BUILDER, str(small_lake.settings.home)], cwd=str(request.config.rootpath),
                               stdout=subprocess.PIPE, text=True)
    assert builder.stdout.readline() == "ready\n"
    time.sleep(0.6 + delay)
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    pack = find_pack(small_lake.settings, D)
    verify(pack)
    assert pack.facts_sha256 == expected
    rebuilt = build(small_lake, clock=lambda: datetime.now(UTC))
    verify(rebuilt)
    expire_packs(small_lake.settings, lambda: datetime.now(UTC) + timedelta(hours=2))
    assert [path.name for path in (small_lake.settings.packs / ".builds").iterdir()] == [rebuilt.folder.resolve().name]


@pytest.mark.parametrize(("text", "safe"), [
    ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
    ("+1", "'+1"), ("-1", "'-1"), ("@SUM(A1)", "'@SUM(A1)"), ("\tx", "'\tx"), ("\rx", "'\rx"),
    ("\nx", "'\nx"), ("＝1", "'＝1"), ("a=1", "a=1"), ("", ""), ("a\x00b", "ab"), ("\x00=1", "'=1"),
])
def test_a_formula_is_neutralised(text, safe):
    assert safe_text(text) == safe


def test_the_csv_survives_every_text_a_customer_id_can_hold():
    nasty = ['=HYPERLINK("http://evil")', 'a"b', "a,b", "a\r\nb", "ünïcødé", " leading", "'quoted"]
    frame = pd.DataFrame([{
        "run_date": pd.Timestamp(D), "customer_id": text, "retention_status": "ACTIVE", "churn_risk_level": "HIGH", "churn_risk_score": 70,
        "priority_tier": "P1", "priority_score": 94.5106, "priority_reason": "Late", "days_since_last_order": 24, "total_revenue": 3847.0,
        "total_orders": 2, "avg_order_value": 1923.5, "recommended_action": "-10 % offer", "value_proxy": 1154.1,
        "created_at": pd.Timestamp("2026-06-30T06:00:00Z"), "usual_spend_90d": 412.3, "p_no_return_90d": 0.7, "spend_at_stake": 288.61,
        "at_stake_reason": text,
    } for text in nasty])
    audience = build_audience("P1", date(2026, 6, 30), frame, LeftOut())
    rows = list(csv.DictReader(io.StringIO(audience.csv, newline="")))
    assert [row["customer_id"] for row in rows] == [row["at_stake_reason"] for row in rows] == [safe_text(text) for text in nasty]
    assert rows[0]["customer_id"].startswith("'=") and rows[0]["recommended_action"] == "'-10 % offer"
    assert rows[0]["total_revenue"] == "3847.00" and rows[0]["priority_score"] == "94.5106" and rows[0]["avg_order_value"] == "1923.50"
    assert audience.csv.count("\r\n") >= len(nasty) + 1


def test_a_pack_holds_no_customer_attribute(tmp_path):
    """Opaque ids and numbers only: attributes such as country or segment never enter brief, Slack or manifest."""
    shop = small_shop()
    people = pd.DataFrame({"customer_id": sorted(set(shop["customer_id"])), "country": "Canaryland", "segment": "canary-segment",
                           "loyalty_tier": "canary-tier", "acquisition_channel": "canary-channel"})
    pack = build(lake_with(shop, tmp_path / "home", min_sample=10, customers=people))
    for name in pack.manifest["files"]:
        assert b"canary" not in (pack.folder / name).read_bytes().lower(), name
    assert "canary" not in json.dumps(pack.manifest).lower()
