"""`retention-ops morning`, for a home whose clock is cron: what it says, and its exit code."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from retention_ops.commands import morning
from retention_ops.sources.morning import ASKED_AGAIN
from retention_ops.sources.pull import pull
from retention_ops_tests.execute.stage import store_alerts
from retention_ops_tests.sources.test_morning import Export
from retention_ops_tests.test_cli import cli


class Noon(Export):
    """A shop in whose time zone it is about noon, whatever the time is here: commands have a clock that runs. Its environment is set."""

    def __init__(self, home, environment):
        zone = f"Etc/GMT{datetime.now(UTC).hour - 12:+d}"  # as POSIX has it, west is plus
        super().__init__(home, shop_timezone=zone, data_deadline="18:00")
        self.environment, self.now = environment, datetime.now(ZoneInfo(zone))
        self.yesterday = self.now.date() - timedelta(1)
        for name in ("source", "source_path", "source_sql", "shop_timezone", "data_deadline"):
            environment.setenv(f"RETENTION_OPS_{name.upper()}", str(getattr(self.settings, name)))

    def sell_until(self, ago: int) -> None:
        self.sell(self.yesterday - timedelta(40), self.now.date() - timedelta(ago))

    def deadline(self, hour: str) -> None:
        self.environment.setenv("RETENTION_OPS_DATA_DEADLINE", hour)

    def computed(self, ago: int) -> None:
        """Orders until then came, and their date is answered."""
        self.sell_until(ago)
        pull(self.lake)
        day = self.now.date() - timedelta(ago)
        store_alerts(self.lake, day, day)

    def gone(self) -> None:
        self.file.rename(self.file.with_name("away"))

    def back(self) -> None:
        self.file.with_name("away").rename(self.file)

    def morning(self, *words: str):
        return cli("morning", *words, home=self.settings.home)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    return Noon(tmp_path / "home", monkeypatch)


def test_a_morning_that_owes_nothing(shop):
    shop.computed(1)
    shop.gone()
    done = shop.morning()
    assert done.returncode == 0 and f"{shop.yesterday} is computed, and nothing before it was missed." in done.stdout
    assert f"explain --date {shop.yesterday}" in done.stdout and not done.stderr, "and nobody asked the source"
    facts = json.loads(shop.morning("--json").stdout)
    assert (facts["newest"], facts["due"], facts["waits"]) == (str(shop.yesterday), [], "")
    assert facts["run"] is None and facts["source_problem"] is None


def test_a_source_that_is_down_exits_with_one_and_says_so_until_it_is_back(shop):
    shop.computed(2)
    shop.gone()
    down = shop.morning()
    assert down.returncode == 1 and "error" in down.stderr and "has no csv or parquet file" in down.stderr
    assert f"not {shop.yesterday}: looked for again until 18:00" in down.stdout and "Traceback" not in down.stderr
    data = shop.morning("--json")
    assert data.returncode == 1 and "has no csv or parquet file" in json.loads(data.stdout)["source_problem"]
    shop.back()
    waits = shop.morning()
    assert waits.returncode == 0 and "looked for again until 18:00" in waits.stdout and not waits.stderr, "it answers, and has nothing new"
    facts = json.loads(shop.morning("--json").stdout)
    assert facts["source_problem"] is None and facts["run"] is None and not facts["late"]


def test_a_home_without_any_orders_asks_its_source(shop):
    down = shop.morning()
    assert down.returncode == 1 and "has no csv or parquet file" in down.stderr and "No orders came yet" in down.stdout


def test_waiting_looks_again_each_quarter_of_an_hour_until_the_deadline(shop, monkeypatch):
    shop.computed(2)
    pauses = []

    def sleep(seconds: float) -> None:
        """Time passes here by the deadline coming nearer."""
        pauses.append(seconds)
        if len(pauses) == 1:
            shop.gone()
        if len(pauses) == 2:
            shop.back()
            shop.computed(1)

    monkeypatch.setattr(morning.time, "sleep", sleep)
    done = shop.morning("--wait")
    assert pauses == [ASKED_AGAIN.total_seconds()] * 2
    assert done.returncode == 0 and "has no csv or parquet file" in done.stderr, "what was wrong on the way is no failure in the end"
    assert f"{shop.yesterday} is computed" in done.stdout


@pytest.mark.slow
def test_past_the_deadline_nobody_waits_the_date_is_computed_without_its_orders_and_again_when_they_come(shop):
    shop.computed(2)
    shop.gone()
    shop.deadline("08:00")
    late = shop.morning("--wait", "--json")
    facts = json.loads(late.stdout)
    assert late.returncode == 1 and facts["late"] and "has no csv or parquet file" in facts["source_problem"]
    assert (facts["due"], facts["run"]["alert"]["gate"]) == ([str(shop.yesterday)], "data_incomplete")
    shop.back()
    shop.sell_until(1)
    came = shop.morning()
    assert came.returncode == 0 and f"Due: {shop.yesterday} (0 not computed yet, 1 corrected since)" in came.stdout
    done = shop.morning()
    assert done.returncode == 0 and "nothing before it was missed" in done.stdout
