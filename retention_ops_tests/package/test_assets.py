"""The packs of a Dagster run: what its metadata says, which links it gives, and how a mistake in a template surfaces."""

from __future__ import annotations

from datetime import timedelta

import dagster as dg
import pandas as pd
import pytest

from retention_ops.launch import run_dates
from retention_ops.orchestration import Loop
from retention_ops.package.pack import find_pack
from retention_ops_tests.conftest import LAST_DAY as D
from retention_ops_tests.shops import lake_with, small_shop


def run(lake, asset="action_pack", day=D):
    """(outcome, metadata of the asset or None) of one day's run."""
    with dg.DagsterInstance.ephemeral() as stored:
        outcome = run_dates(Loop(lake), day, day, stored)
        event = stored.get_latest_materialization_event(dg.AssetKey(asset))
    return outcome, event.asset_materialization.metadata if event else None


@pytest.mark.slow
def test_metadata_counts_the_tiers_and_the_rows_handed_over(tmp_path):
    shop = small_shop()
    refusing = pd.DataFrame({"customer_id": sorted(set(shop["customer_id"])), "consent": "no"})
    outcome, metadata = run(lake_with(shop, tmp_path / "home", min_sample=10, customers=refusing))
    assert outcome.success
    tiers = ("p1", "p2", "p3")
    assert sum(metadata[f"{tier}_count"].value for tier in tiers) > 0
    assert [metadata[f"{tier}_handed_over"].value for tier in tiers] == [0, 0, 0]


def test_the_queues_metadata_sums_what_is_at_stake_and_names_nobody(tmp_path):
    lake = lake_with(small_shop(), tmp_path / "home", min_sample=10)
    outcome, metadata = run(lake, "customer_priority")
    queue = lake.read("customer_priority", D)
    sums = queue.groupby("priority_tier")["spend_at_stake"].sum()
    assert outcome.success and len(sums) and metadata["spend_at_stake"].value == pytest.approx(queue["spend_at_stake"].sum())
    assert {name: entry.value for name, entry in metadata.items() if name.endswith("_spend_at_stake")} == pytest.approx(
        {f"{tier.lower()}_spend_at_stake": total for tier, total in sums.items()})
    assert metadata["next_orders"].value == pytest.approx(queue["avg_order_value"].sum())
    told = " ".join(str(entry.value) for entry in metadata.values())
    assert not [name for name in queue["customer_id"] if f" {name} " in told] and "stayed away" not in told
    early, metadata = run(lake, "customer_priority", D - timedelta(120))
    assert early.success and not [name for name in metadata if "spend_at_stake" in name]


@pytest.mark.parametrize(("settings", "links"), [
    pytest.param({}, [], marks=pytest.mark.slow),
    pytest.param({"dashboard_url": "https://bi.example/retention"}, ["https://bi.example/retention"], marks=pytest.mark.slow),
    ({"dagster_url": "https://dagster.example"}, ["https://dagster.example/runs/{run}"]),
])
def test_the_brief_links_the_run_only_where_people_can_reach_it(tmp_path, settings, links):
    lake = lake_with(small_shop(), tmp_path / "home", min_sample=10, **settings)
    outcome, _ = run(lake)
    text = (find_pack(lake.settings, D).folder / "briefing_INFO.md").read_text()
    assert "127.0.0.1" not in text and ("## Links" in text) == bool(links)
    assert all(link.format(run=outcome.run_id) in text for link in links)


@pytest.mark.parametrize(("source", "says"), [
    ("a\n\n{{ nosuch.thing }}", "line 3: 'nosuch' is undefined"),
    ("a\n{% if %}", "line 2: "),
    ('{% extends "shipped/briefing.md.j2" %}{% block heading_typo %}{% endblock %}', "line 1: there is no block 'heading_typo'"),
    (None, "which is not a folder"),
])
def test_a_run_reports_a_template_mistake_with_its_place_and_builds_no_pack(tmp_path, source, says):
    own = tmp_path / "templates"
    if source is not None:
        own.mkdir()
        (own / "briefing.md.j2").write_text(source)
    lake = lake_with(small_shop(), tmp_path / "home", min_sample=10, templates_dir=own)
    outcome, metadata = run(lake)
    assert not outcome.success and metadata is None and find_pack(lake.settings, D) is None
    message = next(error for error in outcome.errors if error.startswith("action_pack: "))
    assert says in message and str(own) in message
    assert source is None or message.startswith("action_pack: template briefing.md.j2 (in ")
