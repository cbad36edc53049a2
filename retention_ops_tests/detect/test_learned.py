"""`backtest targeting --model`: what the model may know, that its chances are true where the truth is known, and when it beats the table.

What needs scikit-learn (the extra `models`) is skipped without it; `make test-all` installs it.
"""

from __future__ import annotations

import json
import math
import sys
from datetime import date, timedelta
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retention_ops.cli import main
from retention_ops.detect import learned, targeting, verdict
from retention_ops.detect.compute import table_for, workspace
from retention_ops.detect.learned import FEATURES, ReturnModel, at_level, learning_days, platt
from retention_ops.detect.targeting import Candidates, Measured, Plan, planned, targeting_orders
from retention_ops.errors import RetentionOpsError, UsageError
from retention_ops.package.targeting_chart import coverage_chart
from retention_ops.package.targeting_report import markdown, model_verdict
from retention_ops.settings import Settings
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.detect.test_against_oracle import REAL_DATA
from retention_ops_tests.shops import lake_with, orders_frame

START, END = date(2024, 1, 1), date(2025, 8, 31)
D = date(2025, 5, 20)
COMES = {"often": 1 / 12, "sometimes": 1 / 90, "rarely": 1 / 400}
"""chance that a customer of a kind comes on a day, whatever happened before"""


@pytest.fixture(scope="module")
def orders() -> pd.DataFrame:
    """Customers without memory: the true chance to stay away for 90 days is that of their kind, on every day."""
    random, rows = Random(5), []
    for number in range(420):
        kind = list(COMES)[number % 3]
        day = START + timedelta(random.randrange(150))
        while day <= END:
            rows.append((f"{kind}{number}", day, random.randrange(500, 9000)))
            day += timedelta(1 + int(math.log(random.random()) / math.log(1 - COMES[kind])))
    return orders_frame(rows)


@pytest.fixture(scope="module")
def lake(orders: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return lake_with(orders, tmp_path_factory.mktemp("shop"), END, duckdb_threads=1)


@pytest.fixture
def boosting() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'retention-ops[models]', or `make test-all`")


# -- what it may know ------------------------------------------------------------------------------------------------------


def test_it_learns_only_from_days_whose_90_days_are_over():
    first = date(2023, 1, 1)
    for after in (0, 119, 120, 147, 148, 400, 900):
        day = first + timedelta(after)
        found = learning_days(first, day)
        assert all(each + timedelta(90) <= day and each >= first + timedelta(30) for each in found)
        assert len(found) == max(0, min(13, (after - 120) // 28 + 1)) and found == sorted(found, reverse=True)
    assert learning_days(first, first + timedelta(900))[0] == first + timedelta(810)


def naive(orders: pd.DataFrame, day: date) -> list[tuple[str, bool, dict[str, float]]]:
    """(customer, stayed away, features) of everybody silent for at most 180 days, customer by customer."""
    found = []
    for customer, theirs in sorted(orders.groupby("customer_id")):
        so_far = theirs[theirs["order_date"] <= day]
        visits = sorted(set(so_far["order_date"]))
        if not visits or (day - visits[-1]).days > 180:
            continue
        gaps = [(later - earlier).days for earlier, later in pairwise(visits)]
        silence, span, tenure = (day - visits[-1]).days, (visits[-1] - visits[0]).days, (day - visits[0]).days
        revenue, none = int(so_far["order_cents"].sum()), math.nan
        last = int(so_far.sort_values(["order_date", "order_id"])["order_cents"].iloc[-1])
        three = sum(gaps[-3:]) / 3 if len(gaps) > 2 else none
        found.append((customer, not any(0 < (each - day).days <= 90 for each in theirs["order_date"]), {
            "silence": silence, "visits": len(visits), "usual_gap": span / len(gaps) if gaps else none,
            "lateness": silence / (span / len(gaps)) if gaps else none, "tenure": tenure, "orders": len(so_far), "revenue": revenue,
            "order_value": revenue / len(so_far), "last_order": last / (revenue / len(so_far)), "spending": revenue / max(30, tenure),
            "visit_rate": len(visits) / max(30, tenure), "last_gap": gaps[-1] if gaps else none,
            "gap_before": gaps[-2] if len(gaps) > 1 else none, "three_gaps": three, "longest_gap": max(gaps) if gaps else none,
            "late_for_longest": silence / max(gaps) if gaps else none, "late_for_three": silence / three,
        }))
    return found


def test_a_plain_reading_of_the_orders_gives_the_same_features_and_labels(lake, orders):
    days = [START + timedelta(40), date(2024, 9, 9), D]
    with targeting_orders(lake) as space:
        rows, stayed, number = ReturnModel(space).learned_from(days)
    expected = [(place, *row) for place, day in enumerate(days) for row in naive(orders, day)]
    assert number.tolist() == [row[0] for row in expected] and stayed.tolist() == [row[2] for row in expected]
    np.testing.assert_allclose(rows, [[row[3][name] for name in FEATURES] for row in expected], rtol=1e-12)
    assert 0 < stayed.mean() < 1 and np.isnan(rows).any(axis=0).tolist() == [name in (
        "usual_gap", "lateness", "last_gap", "gap_before", "three_gaps", "longest_gap", "late_for_longest", "late_for_three")
        for name in FEATURES]


def changed_after(orders: pd.DataFrame, day: date) -> pd.DataFrame:
    """Other later orders: of those there were every other one is gone, and customers who had left come back."""
    kept = (orders["order_date"] <= day) | (np.arange(len(orders)) % 2 == 0)
    back = [(customer, day + timedelta(1 + number % 60), 777, f"x{number}")
            for number, customer in enumerate(sorted(set(orders["customer_id"])))]
    return pd.concat([orders[kept], orders_frame(back)], ignore_index=True)


def test_orders_after_a_date_change_nothing_that_is_learned_for_it(lake, orders, tmp_path):
    other = lake_with(changed_after(orders, D), tmp_path, END, duckdb_threads=1)
    seen = []
    for each in (lake, other):
        with targeting_orders(each) as space:
            model = ReturnModel(space)
            learnt = model.learned_from(learning_days(START, D))
            open_day = model.learned_from([D - timedelta(30)])
            seen.append((*learnt, *open_day[:1], model.features([D])[0], open_day[1]))
    *same, labels = zip(*seen, strict=True)
    for one, another in same:
        np.testing.assert_array_equal(one, another)
    assert not np.array_equal(*labels), "a day whose 90 days are not over would have leaked"


def test_orders_after_a_date_change_no_chance_told_on_it(lake, orders, tmp_path, boosting):
    other, told = lake_with(changed_after(orders, D), tmp_path, END, duckdb_threads=1), []
    for each in (lake, other):
        with targeting_orders(each) as space:
            found = space.candidates(D, ids=True)
            told.append((found, ReturnModel(space)(found)))
    (_, one), (_, another) = told
    np.testing.assert_array_equal(one.p, another.p)
    np.testing.assert_array_equal(one.stake, another.stake)
    assert not np.array_equal(one.stayed_away, another.stayed_away) and not np.array_equal(one.p, told[0][0].p)


# -- how true it is --------------------------------------------------------------------------------------------------------


def test_where_the_true_chance_is_known_it_tells_it(lake, boosting):
    with targeting_orders(lake) as space:
        table = space.candidates(D, ids=True)
        found = ReturnModel(space)(table)
    truth = np.array([(1 - COMES[customer.rstrip("0123456789")]) ** 90 for customer in table.customer_id])
    for same in np.array_split(np.argsort(found.p), 4):
        # of one who came twice nobody can know the kind: it is the truth of those who were told the same
        assert found.p[same].mean() == pytest.approx(truth[same].mean(), abs=0.08)
    assert np.abs(found.p - truth).mean() < 0.6 * np.abs(table.p.mean() - truth).mean(), "nearer than one chance for everybody"
    assert found.p.mean() == pytest.approx(table.p.mean(), abs=1e-5), "how many stay away on the whole is the table's"
    assert found.p.min() >= 0 and found.p.max() <= 1
    assert found.stake.tolist() == [(int(usual) * round(1e6 * p) + 500_000) // 1_000_000
                                    for usual, p in zip(found.usual, found.p, strict=True)]


def test_the_slope_is_told_of_newer_days_than_the_model_learned_from(boosting):
    """Older days follow the feature; whether newer ones do decides the slope."""
    random = np.random.default_rng(2)
    rows, day = np.zeros((8000, len(FEATURES))), np.repeat(np.arange(8), 1000)
    rows[:, 0] = random.uniform(-2, 2, 8000)
    follows = random.random(8000) < 1 / (1 + np.exp(-2 * rows[:, 0]))
    assert learned.slope_of(rows, follows, day) == pytest.approx(1, abs=0.2)
    at_random = np.where(day < 2, random.random(8000) < 0.5, follows)
    assert learned.slope_of(rows, at_random, day) < 0.15
    turned = np.where(day < 2, ~follows, follows)
    assert learned.slope_of(rows, turned, day) == 0, "what turned around tells nothing; it is not turned around"
    assert learned.slope_of(rows[day == 0], follows[day == 0], day[day == 0]) == 1, "no older day"


def test_slope_and_level():
    random = np.random.default_rng(3)
    ranks = random.normal(0, 2, 40_000)
    slope, level = platt(ranks, random.random(40_000) < 1 / (1 + np.exp(-(0.7 * ranks - 0.4))))
    assert (slope, level) == pytest.approx((0.7, -0.4), abs=0.05)
    assert all(map(math.isfinite, platt(np.arange(10.0), np.arange(10) > 4))), "without error the slope would have no end"
    for mean in (0.02, 0.5, 0.97):
        told = at_level(ranks, mean)
        assert told.mean() == pytest.approx(mean, abs=1e-9) and (np.diff(told[np.argsort(ranks)]) >= 0).all()


def test_the_same_orders_give_the_same_chances_whatever_the_threads(lake, boosting):
    from threadpoolctl import threadpool_limits

    told = []
    for threads in (1, 2, 2):
        with threadpool_limits(threads), targeting_orders(lake) as space:
            told.append(ReturnModel(space)(space.candidates(D)).p)
    assert np.array_equal(told[0], told[1]) and np.array_equal(told[1], told[2]) and len(set(told[0].tolist())) > 20


def test_of_a_large_shop_a_part_of_the_customers_is_learned_from(lake, monkeypatch):
    days = learning_days(START, D)
    with targeting_orders(lake) as space:
        model = ReturnModel(space)
        whole = model.learned_from(days)[0]
        monkeypatch.setattr(learned, "MAX_ROWS", len(whole) // 3)
        part = model.learned_from(days)[0]
        assert np.array_equal(part, model.learned_from(days)[0], equal_nan=True)
        everybody = {row.tobytes() for row in whole}
        assert 0.2 * len(whole) < len(part) < 0.45 * len(whole) and all(row.tobytes() in everybody for row in part)
        assert len(model.features([D])[0]) == len(space.candidates(D).p), "everybody is still told a chance"


def test_days_that_teach_nothing_leave_the_table(tmp_path):
    """Nobody ever stayed away: there is nothing to part the customers by."""
    rows = [(f"c{number}", START + timedelta(day), 1000) for number in range(6) for day in range(number, 300, 10)]
    with targeting_orders(lake_with(orders_frame(rows), tmp_path, duckdb_threads=1)) as space:
        found = space.candidates(START + timedelta(200))
        assert ReturnModel(space)(found) is found


# -- whether it beats the table --------------------------------------------------------------------------------------------


def beside(gap: float, noise: float = 0.0, of_one_part: bool = False, days: int = 400) -> dict[str, Any]:
    """The comparison of a model that covers `gap` more on 30 dates, give or take `noise` on each; of everybody's spend, or one part's."""
    random, number = np.random.default_rng(1), 30
    plan = Plan(tuple(date(2025, 1, 1) + timedelta(round(days * each / (number - 1))) for each in range(number)), "14", None, 1)
    table, model = [], []
    for day in plan.dates:
        lost = np.ones(50)
        covered, more = 0.4 * lost, np.eye(50)[7] if of_one_part else np.full(50, 1 / 50)
        of_model = covered + 50 * (gap + random.normal(0, noise)) * more
        for found, by_part in ((table, covered), (model, of_model)):
            row = {"date": day, "rule_size": 10, "auc_p": 0.7, "ece": 0.03, "mean_p": 0.4, "covered_at_stake": by_part.sum() / 50,
                   "season_odds": None, "level_odds": None}
            found.append(Measured(row, targeting.told(np.array([0.2, 0.4]), np.array([0, 1])), {"at_stake": np.array([by_part.sum() / 50])},
                                  {}, (), {}, {None: lost, ("at_stake", "score", "whole"): by_part}))
    return targeting.against_table(plan, table, model, ())


def test_the_model_beats_the_table_only_by_more_than_both_intervals():
    cases = {"ahead": beside(0.02, 0.001), "behind": beside(-0.02, 0.001), "same": beside(0.0), "chance": beside(0.002, 0.1),
             "one customer": beside(0.02, 0.001, of_one_part=True), "short": beside(0.02, 0.001, days=200)}
    assert {name: (told["beats_table"], told["worse"]) for name, told in cases.items()} == {
        "ahead": (True, False), "behind": (False, True), "same": (False, False), "chance": (False, False),
        "one customer": (False, False), "short": (False, False)}
    assert cases["one customer"]["against_table"]["low"] > 0, "over dates it is ahead, over customers it is not"
    said = {name: model_verdict(told) for name, told in cases.items()}
    assert "2.0 points of lost spend more" in said["ahead"] and "beats the table by more than both" in said["ahead"]
    assert "less than by the table" in said["behind"] and "the table is better" in said["behind"]
    assert all("chance explains it; keep the table" in said[name] for name in ("same", "chance", "one customer"))
    assert "too short to judge" in said["short"]


def measured_with(lake: Lake, model: Any) -> dict:
    with targeting_orders(lake) as space, pytest.MonkeyPatch.context() as patch:
        patch.setattr(targeting, "STABILITY_DATES", 1)
        return targeting.targeting(space, planned(space.orders, every="70", sizes=[5, 20], seed=5), model=model)


def test_any_model_is_measured_beside_the_table(lake):
    """One that tells what the table tells, and one that knows the future."""
    def knowing(found: Candidates) -> Candidates:
        p = found.stayed_away.astype(float)
        return targeting.replace(found, p=p, stake=(found.usual * p).astype(np.int64))

    same, best = measured_with(lake, lambda found: found)["model"], measured_with(lake, knowing)
    assert all(row["table"] == row["model"] and row["ahead"]["mean"] == 0 for row in (*same["sizes"], same["auc"], same["ece_per_date"]))
    assert same["calibration"]["table"] == same["calibration"]["model"] and not same["beats_table"]
    model = best["model"]
    for row, plain in zip(model["sizes"], best["sizes"], strict=True):
        assert row["size"] == plain["size"] and row["table"] == plain["covered"]["at_stake"]
        assert row["model"]["mean"] == pytest.approx(plain["covered"]["hindsight"]["mean"])
        assert row["ahead"]["mean"] == pytest.approx(row["model"]["mean"] - row["table"]["mean"])
    assert model["auc"]["model"]["mean"] == 1 and model["ece_per_date"]["model"]["mean"] == 0
    assert [row["covered_table"] for row in model["by_date"]] == [row["covered_at_stake"] for row in best["by_date"]]
    text = markdown(best, "x")
    assert "## A learned model beside the table" in text and "## Table and model on every date" in text and model_verdict(model) in text
    plain = {name: value for name, value in best.items() if name != "model"}
    assert "learned model" not in markdown(plain, "x") and coverage_chart(plain) != coverage_chart(best)


# -- the command -----------------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["retention-ops", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out + printed.err


def test_the_plain_install_says_what_is_missing(lake, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    code, said = run(monkeypatch, capsys, "--home", lake.settings.home, "backtest", "targeting", "--model")
    assert code == 2 and "pip install 'retention-ops[models]'" in " ".join(said.split())
    assert not (lake.settings.home / "backtests").exists(), "said before anything is measured"
    with targeting_orders(lake) as space, pytest.raises(UsageError, match="plain install leaves out"):
        ReturnModel(space)(space.candidates(D))


def test_the_command(lake, tmp_path, monkeypatch, capsys, boosting):
    words = "backtest", "targeting", "--from", date(2025, 1, 5), "--every", 90, "--sizes", "5,20", "--model", "--out", tmp_path
    code, said = run(monkeypatch, capsys, "--home", lake.settings.home, *words)
    assert code == 0 and "A learned model beside the table" in said and "Lists by the learned model" in " ".join(said.split())
    told = json.loads((tmp_path / "report.json").read_text())
    assert [row["size"] for row in told["model"]["sizes"]] == [None, 5, 20]
    command = (tmp_path / "report.md").read_text().split("`")[1].split()[1:]
    assert command[-1] == "--model"
    kept = json.loads((lake.settings.home / verdict.FILE).read_text())
    assert (kept["beats_table"], kept["orders_version"]) == (told["model"]["beats_table"], told["orders"]["version"])
    code, said = run(monkeypatch, capsys, "--home", lake.settings.home, *command, "--json")
    assert code == 0 and {**json.loads(said), "seconds": 0} == {**told, "seconds": 0}, "the command in the report makes the report"


# -- the queue -------------------------------------------------------------------------------------------------------------


def judged(home: Path, beats: bool, enough: bool = True) -> None:
    verdict.record(Settings(_env_file=None, home=home), {
        "model": {"beats_table": beats, "enough_history": enough, "against_table": {"mean": 0.009, "low": 0.007, "high": 0.012}},
        "dates": {"count": 24, "from": "2024-06-01", "to": "2025-04-01"},
        "orders": {"version": "000001", "complete_through": "2025-06-30"},
    })


@pytest.fixture
def shops(orders: pd.DataFrame, tmp_path: Path) -> tuple[Lake, Lake]:
    """The same orders with the table and with return_model=learned; no backtest yet."""
    return (lake_with(orders, tmp_path / "table", END, duckdb_threads=1),
            lake_with(orders, tmp_path / "learned", END, duckdb_threads=1, return_model="learned"))


def queue(lake: Lake, first: date, last: date) -> pd.DataFrame:
    with workspace(lake) as space:
        space.build_range("customer_priority", first, last)
        return space.rows("customer_priority", "run_date, customer_id").drop(columns="created_at")


def test_without_a_verdict_for_it_the_queue_is_the_tables(shops):
    table, learned = shops
    plain = table_for(table, "customer_priority", D).drop(columns="created_at")
    for judge in (lambda: None, lambda: judged(learned.settings.home, False), lambda: judged(learned.settings.home, False, False)):
        judge()
        assert table_for(learned, "customer_priority", D).drop(columns="created_at").equals(plain)
        assert learned.settings.rules_sha256() == table.settings.rules_sha256(), "no stored date is of other rules"
        assert verdict.state(learned.settings)[0] is None
    judged(table.settings.home, True)
    assert table_for(table, "customer_priority", D).drop(columns="created_at").equals(plain), "nobody asked for it"


def test_the_queue_uses_it_where_a_backtest_found_it_better(shops, boosting):
    table, learned = shops
    judged(learned.settings.home, True)
    assert learned.settings.rules_sha256() != table.settings.rules_sha256()
    days = [D - timedelta(1), D]
    by_table, by_model = queue(table, *days), queue(learned, *days)
    assert list(by_model["customer_id"]) == list(by_table["customer_id"]), "who is listed is for the rules to say"
    with targeting_orders(table) as space:
        model, expected = ReturnModel(space), {}
        for day in days:
            found = space.candidates(day, ids=True)
            expected |= {(day, who): p for who, p in zip(found.customer_id, model.chances(day), strict=True)}
    for row in by_model.itertuples():
        p = expected[row.run_date.date(), row.customer_id]
        stake = (Fraction(str(row.usual_spend_90d)) * Fraction(f"{p:.6f}")).limit_denominator(10**12)
        assert row.p_no_return_90d == p and row.spend_at_stake == float(Fraction(int(stake * 100 + Fraction(1, 2)), 100))
        assert " of 10 like this one will stay away, says the learned model; usually spends " in row.at_stake_reason
    assert (by_model["p_no_return_90d"] != by_table["p_no_return_90d"]).mean() > 0.9
    single = table_for(learned, "customer_priority", D).drop(columns="created_at").sort_values("customer_id", ignore_index=True)
    assert single.equals(by_model[by_model["run_date"] == pd.Timestamp(D)].reset_index(drop=True)), "a range is its days"


def test_a_past_date_rebuilt_after_newer_orders_has_the_same_chances(orders, tmp_path, boosting):
    known = orders[[day <= D for day in orders["order_date"]]].reset_index(drop=True)
    then, now = (lake_with(frame, tmp_path / name, duckdb_threads=1, return_model="learned")
                 for name, frame in (("then", known), ("now", orders)))
    for lake in (then, now):
        judged(lake.settings.home, True)
    one, other = (table_for(lake, "customer_priority", D).drop(columns="created_at") for lake in (then, now))
    assert one.equals(other) and one["at_stake_reason"].str.contains("learned model").all()


def test_doctor_says_what_the_chances_come_from(shops, monkeypatch, boosting):
    table, learned = shops[0].settings, shops[1].settings
    assert verdict.state(table) == (True, "p_no_return_90d from the table return_rates")
    assert verdict.state(learned) == (None, "return_model=learned, but no backtest compared it: the table is used")
    judged(learned.home, False, False)
    assert verdict.state(learned)[1].endswith("did not find it better than the table, on less than a year: the table is used")
    judged(learned.home, True)
    assert verdict.state(learned) == (
        True, "p_no_return_90d from the learned model: 0.9 points more of lost spend by the backtest of 24 dates to 2025-04-01")
    monkeypatch.setattr(verdict, "sklearn_version", lambda: "")
    assert verdict.state(learned)[0] is False
    (learned.home / verdict.FILE).write_text("{")
    with pytest.raises(RetentionOpsError, match="cannot be read: run `retention-ops backtest targeting --model` again"):
        learned.rules_sha256()


def test_bigquery_cannot_use_it():
    with pytest.raises(ValueError, match="return_model=learned needs warehouse=lake"):
        Settings(_env_file=None, warehouse="bigquery", bigquery_project="p", bigquery_dataset="d", bigquery_location="EU",
                 return_model="learned")


@pytest.mark.slow
@pytest.mark.parametrize("files, preset, beats", [
    (["uci_online_retail_II_2009-2010.parquet", "uci_online_retail.parquet"], "uci-online-retail", False),
    (["CDNOW_master.txt"], "cdnow", True),
], ids=["Online Retail", "CDNOW"])
def test_what_it_is_worth_on_real_orders(files, preset, beats, tmp_path, boosting):
    """docs/targeting.md has the figures: it ranks better on both, and its lists cover more than chance explains on one of them."""
    paths = [REAL_DATA / name for name in files]
    if not all(path.is_file() for path in paths):
        pytest.skip("the real orders are not here: put them into ../shared/data beside the repository")
    settings = Settings(_env_file=None, home=tmp_path)
    ingest(paths, preset, settings)
    with targeting_orders(Lake(settings)) as space:
        told = targeting.targeting(space, planned(space.orders), model=ReturnModel(space))["model"]
    assert told["auc"]["ahead"]["low"] > 0 and not told["worse"]
    assert told["beats_table"] is beats
