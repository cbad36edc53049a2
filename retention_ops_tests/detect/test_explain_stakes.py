"""`explain --customer` says what is at stake with the numbers it is made of, for who is listed and for who is not."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pandas as pd
import pytest

from retention_ops.detect.compute import priority_order, workspace
from retention_ops.detect.explain import cell_of, explain_customer
from retention_ops.settings import Settings
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.detect.test_returns import LAST
from retention_ops_tests.shops import lake_with, seasonal_shop

EVERYBODY = {"membership": "at_stake", "at_stake_size": 1000}
EARLY = LAST - timedelta(522)  # nothing to learn from yet


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lake_with(seasonal_shop(), tmp_path_factory.mktemp("seasonal")).settings.home


def under(home: Path, **rules) -> Lake:
    """Rules so strict that they list some of these few customers."""
    return Lake(Settings(_env_file=None, home=home, high_risk_score=30, medium_risk_score=20, **rules))


def queue_of(lake: Lake, day=LAST) -> pd.DataFrame:
    with workspace(lake) as space:
        space.build("customer_priority", day)
        return space.rows("customer_priority", priority_order(lake.settings))


def test_everybodys_cell_is_the_one_the_rule_took(home):
    lake = under(home, **EVERYBODY)
    for day in (LAST, LAST - timedelta(100), LAST - timedelta(300)):
        with workspace(lake) as space:
            space.build("customer_priority", day)
            rates, people = space.rows("return_rates"), space.rows("churn_detection")
            queue = space.rows("customer_priority").set_index("customer_id")
        for row in people.to_dict("records"):
            if row["customer_id"] in queue.index:
                cell = cell_of(row, rates)
                assert cell["p_no_return_90d"] == queue.loc[row["customer_id"], "p_no_return_90d"], row["customer_id"]
                assert cell["visits"] <= row["order_days"] < (cell["visits_below"] or 10**9)
                assert cell["recency"] <= row["days_since_last_order"] < (cell["recency_below"] or 10**9)
                if row["order_days"] > 1:
                    assert cell["lateness"] <= 100 * row["days_since_last_order"] / row["usual_gap_days"] + 1e-9
                    assert 100 * row["days_since_last_order"] / row["usual_gap_days"] < (cell["lateness_below"] or 10**9)


def test_who_is_not_listed_is_told_the_same_amount_as_if_listed(home):
    rules, everybody = under(home), queue_of(under(home, **EVERYBODY)).set_index("customer_id")
    listed = set(queue_of(rules)["customer_id"])
    others = [name for name in everybody.index if name not in listed]
    assert others and listed
    for name in (*others[:6], *sorted(listed)[:4]):
        amount = f": {everybody.loc[name, 'spend_at_stake']:,.2f}."
        _, sentences = explain_customer(rules, name, LAST)
        assert sum(line.startswith("At stake: ") and line.endswith(amount) for line in sentences) == 1, name


def test_the_numbers_behind_an_amount_can_be_looked_up(home):
    lake = under(home)
    first = queue_of(lake).iloc[0]
    facts, sentences = explain_customer(lake, first["customer_id"], LAST)
    with workspace(lake) as space:
        space.build("return_rates", LAST)
        rates = space.rows("return_rates")
    cell = facts["return_rate"]
    own = rates.set_index(["visits", "recency", "lateness"]).loc[cell["visits"], cell["recency"], cell["lateness"]]
    text = " ".join(sentences)
    assert f"At stake: {first['at_stake_reason']}. Usually {first['usual_spend_90d']:,.2f} EUR in 90 days" in text
    assert f"{own['customers']:,} were counted" in text and f"{own['returned_90']:,} of them came back within 90 days" in text
    assert f"around this time a year ago times {own['season_odds']:.3f}" in text
    assert f"in the last weeks against a year before times {own['level_odds']:.3f}" in text
    assert f"times {first['p_no_return_90d']:.6f} who stay away" in text and f"{100 * first['p_no_return_90d']:.1f} % stay away" in text


def test_a_season_nobody_knows_yet_is_not_made_up(home):
    day = LAST - timedelta(300)
    _, sentences = explain_customer(under(home), queue_of(under(home), day)["customer_id"].iloc[0], day)
    told = next(line for line in sentences if line.startswith("Season"))
    assert "around this time a year ago not known (changes nothing)" in told and "together" not in told


def test_before_anything_was_learned_it_says_so(home):
    for rules in ({}, EVERYBODY):
        lake = under(home, **rules)
        facts, sentences = explain_customer(lake, queue_of(lake, EARLY)["customer_id"].iloc[0], EARLY)
        assert facts["return_rate"] is None and not facts["by_stake"]
        assert "At stake: not known yet. Nothing could be learned as of this date, so the rules alone decide." in sentences


def test_who_is_listed_by_stake_is_explained_by_it(home):
    lake = under(home, membership="at_stake", at_stake_size=5, rank_by="spend_at_stake")
    queue = queue_of(lake)
    everybody = queue_of(under(home, **EVERYBODY))
    _, sentences = explain_customer(lake, queue["customer_id"].iloc[1], LAST)
    assert any("place 2 of 5 (tier by tier, most at stake first), score" in line for line in sentences)
    missed = next(name for name in everybody["customer_id"] if name not in set(queue["customer_id"]))
    assert explain_customer(lake, missed, LAST)[1][-1] == "Not in the queue: the spend at stake is not among the 5 highest."
    with workspace(lake) as space:
        space.build("churn_detection", LAST)
        people = space.rows("churn_detection")
    gone = people.loc[people["days_since_last_order"] > 180, "customer_id"].iloc[0]
    facts, sentences = explain_customer(lake, gone, LAST)
    assert sentences[-1] == "Not in the queue: silent for more than 180 days, and nobody is listed who is."
    assert facts["return_rate"] is None and not any(line.startswith("At stake") for line in sentences)


def test_a_reason_that_is_the_stake_is_said_once(home):
    lake = under(home, **EVERYBODY)
    queue = queue_of(lake)
    same = queue[queue["priority_reason"] == queue["at_stake_reason"]].iloc[0]
    _, sentences = explain_customer(lake, same["customer_id"], LAST)
    assert " ".join(sentences).count(same["at_stake_reason"]) == 1
