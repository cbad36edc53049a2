"""The digest: what it counts against a naive recount, when it is due, and that a period is told once."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta

import pandas as pd
import pytest
from markdown_it import MarkdownIt

from retention_ops.detect.compute import workspace
from retention_ops.errors import PackError
from retention_ops.execute import digest, health, ledger, quiet
from retention_ops.package.digest import at_other_lines, render_markdown, render_slack, view
from retention_ops.package.pack import records
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.conftest import LAST_DAY, settings_for
from retention_ops_tests.execute.stage import DAY, RISE, Killed, staged, store_alerts
from retention_ops_tests.shops import lake_with, small_shop

FIRST = date(2024, 2, 1)
COLUMNS = ("active", "at_risk", "inactive")
ENDS = (date(2024, 2, 22), date(2024, 3, 31), date(2024, 4, 10), LAST_DAY)
BUILT = {end - timedelta(days=back) for end in (*ENDS, date(2024, 5, 20)) for back in (0, 1, 7)}
"""days with counts and queues; alerts are there for all"""


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> Lake:
    """The small shop with the alerts of every day from FIRST on, and with counts and queues of the days that the tests look at."""
    lake = lake_with(small_shop(), tmp_path_factory.mktemp("digest") / "home", min_sample=10, shop_name="Small shop")
    with workspace(lake) as space:
        for table in ("alert_logic", "retention_daily", "customer_priority"):
            day_column = {"alert_logic": "alert_date", "retention_daily": "as_of_date", "customer_priority": "run_date"}[table]
            space.build_range(table, FIRST, LAST_DAY)
            for offset in range((LAST_DAY - FIRST).days + 1):
                day = FIRST + timedelta(days=offset)
                if table == "alert_logic" or day in BUILT:
                    lake.write(space.connection, table, day, space.provenance, where=f"{day_column} = DATE '{day}'")
    return lake


def naive_bars(orders: pd.DataFrame, last: date, days: int) -> str:
    """The share at risk of each day as a bar, from the lowest day to the line that would be CRITICAL on the last one."""
    def share(ago: int) -> float:
        counts = naive_statuses(orders, last - timedelta(days=ago))
        return 100 * counts["at_risk"] / sum(counts.values())

    shares = [share(ago) for ago in range(days - 1, -1, -1)]
    line = sum(share(ago) for ago in range(1, 8)) / 7 * 1.25
    low, high = min(shares), max(*shares, line)
    return "".join("▁▂▃▄▅▆▇█"[int((each - low) / (high - low) * 7 + 0.5)] for each in shares)


def shown(lake: Lake, last: date, name: str = "weekly", **settings) -> dict:
    found = lake.settings.model_copy(update=settings)
    return view(digest.collect(None, lake, found, digest.period_ending(name, last)))


# -- what it counts ------------------------------------------------------------------------------------------------------


def naive_statuses(orders: pd.DataFrame, day: date) -> dict[str, int]:
    """Customers by status on a day, from the orders alone."""
    last = orders[orders["order_date"] <= day].groupby("customer_id")["order_date"].max()
    silence = [(day - each).days for each in last]
    return {"active": sum(days <= 30 for days in silence), "at_risk": sum(30 < days <= 90 for days in silence),
            "inactive": sum(days > 90 for days in silence)}


@pytest.mark.parametrize("last", ENDS)
@pytest.mark.parametrize(("name", "span"), [("weekly", 7), ("daily", 1)])
def test_every_number_is_that_of_a_naive_recount(computed, last, name, span):
    found, orders = shown(computed, last, name), small_shop()
    now, before = naive_statuses(orders, last), naive_statuses(orders, last - timedelta(days=span))
    assert [row["people"] for row in found["mix"]] == [now[column] for column in COLUMNS]
    for row, column in zip(found["mix"], COLUMNS, strict=True):
        share, earlier = (round(100 * counts[column] / sum(counts.values()), 1) for counts in (now, before))
        assert round(row["share"], 1) == share and row["points"] == round(share - earlier, 1)
    queues = [computed.read("customer_priority", day) for day in (last, last - timedelta(days=span))]
    for tier in found["queue"]:
        new, old = (set(queue["customer_id"][queue["priority_tier"] == tier["tier"]]) for queue in queues)
        assert (tier["customers"], tier["new"], tier["gone"]) == (len(new), len(new - old), len(old - new))
    rows = computed.read_range("alert_logic", last - timedelta(days=span - 1), last)
    assert [each["date"] for each in found["flagged"]] == sorted(set(pd.to_datetime(rows["alert_date"][rows["alert_flag"]]).dt.date))
    assert (found["first"], found["last"], found["looked"], found["days"]) == (last - timedelta(days=span - 1), last, span, span)
    assert found["spark_days"] == 21 and found["spark"] == naive_bars(orders, last, 21)


@pytest.mark.parametrize("factor", [2 / 3, 1, 4 / 3])
def test_other_thresholds_say_what_the_rules_would_have_said(computed, factor):
    """Against the rules themselves, computed anew with that threshold."""
    rows = records(computed.read_range("alert_logic", FIRST, LAST_DAY))
    told = {row["rule"]: row for row in at_other_lines(rows, computed.settings) if row["line"] in (15 * factor, 3 * factor)}
    with workspace(Lake(computed.settings.model_copy(update={"warning_pct": 15 * factor, "shortfall_warning": 3 * factor}))) as space:
        space.build_range("alert_logic", FIRST, LAST_DAY)
        flags = dict(space.connection.execute(
            "SELECT alert_type, COUNT(*) FILTER (WHERE alert_flag) FROM alert_logic GROUP BY alert_type").fetchall())
    assert told["at_risk"]["days"] == flags["retention_status_degradation"]
    # the eve of the first day is not among the rows; no shortfall of this shop stands there alone
    assert told["returning"]["days"] == flags["returning_customers_shortfall"]
    assert [row["in_force"] for row in told.values()] == [factor == 1] * 2


def test_a_shortfall_that_falls_out_alone_counts_from_its_second_day_at_any_threshold(computed):
    rows = [row for row in records(computed.read_range("alert_logic", FIRST, FIRST + timedelta(days=3)))
            if row["alert_type"] == "returning_customers_shortfall"]
    day = {"gate": None, "expected": 50.0, "lasting_score": None, "day_alone": True}
    made = [{**rows[0], **day, "score": 0.1, "day_alone": False}, {**rows[1], **day, "score": 3.5, "gate": "partial_day"},
            {**rows[2], **day, "score": 3.5}, {**rows[3], **day, "score": 2.5}]
    assert [row["days"] for row in at_other_lines(made, computed.settings) if row["rule"] == "returning"] == [2, 1, 0]


def test_a_calm_week_says_so_in_its_first_sentence(computed):
    calm = date(2024, 5, 20)
    found = shown(computed, calm)
    assert found["fine"], found
    text = render_markdown(digest.collect(None, computed, computed.settings, digest.period_ending("weekly", calm)), computed.settings)
    assert text.split("\n\n")[1] == (
        "**We looked at each of the 7 days to Mon 20 May 2024, the data was whole, and nothing was wrong.**")
    assert "Orders are complete through Mon 27 May 2024." in text.split("\n\n")[2]
    day = render_markdown(digest.collect(None, computed, computed.settings, digest.period_ending("daily", calm)), computed.settings)
    assert "**We looked at Mon 20 May 2024, the data was whole, and nothing was wrong.**" in day


def headline(lake: Lake, last: date, engine=None, **settings) -> str:
    found = lake.settings.model_copy(update=settings)
    return render_markdown(digest.collect(engine, lake, found, digest.period_ending("weekly", last)), found).split("**")[1]


def test_whatever_was_not_so_takes_the_place_of_nothing_was_wrong(computed, tmp_path):
    assert headline(computed, date(2024, 2, 23)) == (
        "We looked at each of the 7 days to Fri 23 February 2024, the data was whole, and 4 days were flagged, up to WARNING.")
    assert headline(computed, FIRST + timedelta(days=2)).startswith("We looked at 3 of 7 days to Sat 3 February 2024, the data was whole")
    assert headline(computed, LAST_DAY + timedelta(days=2)).startswith(
        "We looked at 5 of 7 days to Wed 29 May 2024, the data was not whole (complete through Mon 27 May 2024), and ")
    assert headline(computed, LAST_DAY + timedelta(days=30)) == (
        "Nothing was looked at: none of the 7 days to Wed 26 June 2024 was computed, and orders are complete through Mon 27 May 2024.")
    assert headline(computed, FIRST - timedelta(days=9)).startswith("Nothing was looked at")


def test_an_alarm_that_does_not_judge_yet_is_no_all_clear(tmp_path):
    lake = lake_with(small_shop(), tmp_path / "home")
    day = date(2023, 12, 1)
    with workspace(lake) as space:
        space.build_range("alert_logic", day, day)
        lake.write(space.connection, "alert_logic", day, space.provenance)
    found = shown(lake, day, "daily")
    text = render_markdown(digest.collect(None, lake, lake.settings, digest.period_ending("daily", day)), lake.settings)
    assert not found["fine"] and "the alarm did not judge 1 day (the order history is still too short)" in text


def test_an_empty_shop_has_a_digest_too(tmp_path):
    settings = settings_for(tmp_path / "home")
    facts = digest.collect(None, Lake(settings), settings, digest.period_ending("weekly", DAY))
    assert "**We looked, and there is nothing to judge yet: no orders are in.**" in render_markdown(facts, settings)
    assert render_slack(facts, settings)["text"].endswith("We looked, and there is nothing to judge yet: no orders are in.")


def test_open_matters_are_named(template, tmp_path):
    with staged(template, tmp_path, source="files", source_path="exports") as stage:
        stage.answer(DAY)
        health.record_source_check(stage.engine, DAY, False, [{"date": str(DAY)}], stage.clock)
        quiet.tell(stage.responder())
        text = headline(stage.lake, DAY, stage.engine, mode="live")
        assert "1 day was flagged, up to WARNING; 1 incident is open; 1 matter needs the data owner" in text
        found = view(digest.collect(stage.engine, stage.lake, stage.settings, digest.period_ending("weekly", DAY)))
        assert [row["title"] for row in found["health"]] == ["The source check is off"] and found["incidents"][0]["id"] == 1


# -- how it looks --------------------------------------------------------------------------------------------------------


def test_no_customer_is_named_and_nothing_a_shop_is_called_breaks_it(computed):
    hostile = "<!channel> *Shop* | [x](http://evil.example) `&"
    settings = computed.settings.model_copy(update={"shop_name": hostile})
    facts = digest.collect(None, computed, settings, digest.period_ending("weekly", date(2024, 3, 31)))
    text, message = render_markdown(facts, settings), json.dumps(render_slack(facts, settings))
    assert "<!channel>" not in message and "&lt;!channel&gt;" in message
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert "<a " not in html and "&lt;!channel&gt;" in html and html.count("<table>") == 1
    customers = set(small_shop()["customer_id"])
    words = set(text.replace("|", " ").split()) | set(message.replace('"', " ").split())
    assert not customers & words


def test_the_whole_digest_as_it_is_read(computed):
    """Every part once; its numbers are recounted above."""
    facts = digest.collect(None, computed, computed.settings, digest.period_ending("weekly", date(2024, 3, 31)))
    text = render_markdown(facts, computed.settings)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# Retention week to Sun 31 March 2024", "## Flagged days", f"## Customers on Sun 31 March 2024: {facts.daily['customers']}",
        "## The queue", "## What other thresholds would have flagged in the 30 days to Sun 31 March 2024"]
    assert "- AT_RISK share above its mean from +15 % (in force):" in text and "from +10 %:" in text and "from +20 %:" in text
    blocks = render_slack(facts, computed.settings)["blocks"]
    assert [block["type"] for block in blocks][:2] == ["header", "section"] and "AT_RISK share, last 21 days" in json.dumps(blocks)


def test_a_company_may_word_it_its_own_way(computed, tmp_path):
    folder = tmp_path / "templates" / "digest"
    folder.mkdir(parents=True)
    (folder / "digest.md.j2").write_text(
        '{% extends "shipped/digest/digest.md.j2" %}{% block title %}# Mahlzeit, {{ digest.shop }}{% endblock %}')
    settings = computed.settings.model_copy(update={"templates_dir": tmp_path / "templates"})
    facts = digest.collect(None, computed, settings, digest.period_ending("weekly", DAY))
    assert render_markdown(facts, settings).startswith("# Mahlzeit, Small shop")
    (folder / "digest.md.j2").write_text('{% extends "shipped/digest/digest.md.j2" %}{% block nowhere %}x{% endblock %}')
    with pytest.raises(PackError, match="there is no block 'nowhere'"):
        render_markdown(facts, settings)


# -- when it is due, and once --------------------------------------------------------------------------------------------


MONDAY = datetime(2024, 5, 20, 9, tzinfo=UTC)


@pytest.fixture
def stage(template, tmp_path):
    with staged(template, tmp_path, shortfall_response=False) as made:
        made.clock.now = MONDAY
        yield made


def digests(stage) -> list[str]:
    return [row["target"] + " " + row["payload"]["last_day"] for row in stage.actions(slot="digest", state=ledger.SENT)]


def test_a_week_is_told_once_by_whatever_asks_again(stage):
    for hours in (0, 1, 24, 100):
        stage.clock.now = MONDAY + timedelta(hours=hours)
        quiet.tell(stage.responder())
    (message,) = stage.world.slack.arrived
    assert message["target"] == "C0LIVE001" and "Retention week to Sun 19 May 2024" in json.dumps(message["payload"]["blocks"])
    stage.clock.now = MONDAY + timedelta(days=7)
    quiet.tell(stage.responder())
    assert len(stage.world.slack.arrived) == 2


def test_what_was_told_stands_though_the_numbers_changed(stage):
    stage.world.slack.orders["post"] = ["throttle"]
    quiet.tell(stage.responder(patience=0))
    first = stage.actions(slot="digest")[0]["payload"]
    stage.compute(date(2024, 5, 13), date(2024, 5, 19))
    stage.clock.forward(hours=1)
    quiet.tell(stage.responder())
    assert stage.world.slack.arrived[0]["payload"] == first and len(stage.actions(slot="digest")) == 1


def test_it_waits_for_the_day_to_be_done_but_not_past_the_deadline(stage):
    stage.clock.now = MONDAY.replace(hour=6, minute=30)
    assert quiet.pending(stage.responder()) == []
    store_alerts(stage.lake, date(2024, 5, 19), date(2024, 5, 19))
    health.record_runs(stage.engine, [{"run_id": "r", "first_date": date(2024, 5, 19), "last_date": date(2024, 5, 19), "status": "success",
                                       "started_at": None, "ended_at": stage.clock()}], stage.clock)
    assert quiet.pending(stage.responder()) == ["digest:weekly:2024-05-19"]
    stage.clock.now = (MONDAY + timedelta(days=7)).replace(hour=7, minute=59)
    assert quiet.pending(stage.responder()) == []
    stage.clock.forward(minutes=1)
    assert quiet.pending(stage.responder()) == ["digest:weekly:2024-05-26"]


@pytest.mark.parametrize(("setting", "day", "now", "last"), [
    ("weekly", "mon", "2024-05-22", "2024-05-19"), ("weekly", "wed", "2024-05-22", "2024-05-21"),
    ("weekly", "thu", "2024-05-22", "2024-05-15"), ("daily", "mon", "2024-05-22", "2024-05-21"), ("off", "mon", "2024-05-22", None),
])
def test_a_machine_that_slept_tells_the_newest_one(computed, setting, day, now, last):
    period = digest.current_period(computed.settings.model_copy(update={"digest": setting, "digest_day": day}), date.fromisoformat(now))
    assert (period and str(period.last)) == last


def test_one_that_could_not_leave_gives_way_to_the_next(stage):
    stage.world.slack.orders["post"] = ["throttle"]
    stage.world.slack.retry_after = 3600
    quiet.tell(stage.responder(patience=0))
    stage.clock.forward(days=7)
    quiet.tell(stage.responder())
    stage.responder().work()
    assert [row["state"] for row in stage.actions(slot="digest")] == [ledger.CANCELLED, ledger.SENT]
    (message,) = stage.world.slack.arrived
    assert "26 May 2024" in json.dumps(message["payload"])


@pytest.mark.parametrize("step", ["settled", "planned", "claimed", "after_send", "recorded"])
def test_killed_anywhere_it_leaves_once(stage, step):
    def kill(reached, row):
        if reached == step:
            raise Killed

    with pytest.raises(Killed):
        quiet.tell(stage.responder(checkpoint=kill))
    for _ in range(3):
        stage.clock.forward(minutes=10)
        stage.responder().work()
        quiet.tell(stage.responder())
    assert stage.world.tally() == {"slack": {"post": 1}} and stage.world.twice() == []


@pytest.mark.parametrize(("mode", "target"), [("off", None), ("shadow", None), ("pilot", "C0TEST001")])
def test_modes(stage, mode, target):
    other = stage.with_settings(mode=mode)
    quiet.tell(other.responder())
    assert [entry["target"] for entry in other.world.slack.arrived] == ([target] if target else [])
    assert bool(list(other.settings.outbox.rglob("digest_weekly.json"))) is (mode == "shadow")
    if mode == "shadow":  # a rehearsal uses up nothing
        quiet.tell(stage.responder())
        assert len(stage.world.slack.arrived) == 1
    other.close()


@pytest.mark.slow
def test_the_demo_shop(tmp_path):
    """The demo's week as its README promises: flagged days, one incident, people new on the lists."""
    from retention_ops_tests.test_cli import cli

    home = tmp_path / "home"
    assert cli("demo", "--customers", "3000", "--days", "10", home=home).returncode == 0
    result = cli("digest", "--date", "2026-06-30", "--json", home=home / "demo")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["digest"]
    assert found["looked"] == 7 and found["whole"] and not found["fine"] and found["worst"] == "CRITICAL" and len(found["incidents"]) == 1
    assert RISE and sum(tier["new"] for tier in found["queue"]) > 0
