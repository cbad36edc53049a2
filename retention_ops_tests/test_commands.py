"""What operators do from the command line: look, decide, send, halt, judge, verify. Every decision leaves who and why."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from retention_ops.cli import app, main
from retention_ops.clock import system_clock
from retention_ops.commands.doctor import RIGHTS
from retention_ops.definitions import build_loop
from retention_ops.execute import incidents, ledger, story
from retention_ops.execute.door import HALTED
from retention_ops.execute.gate import ARMED
from retention_ops.launch import run_dates
from retention_ops.log.database import ops_database, ops_events
from retention_ops.settings import load_settings
from retention_ops.status import _last_answer
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.schema import LAKE_SCHEMA, lake_schema
from retention_ops_tests.shops import lake_with, small_shop
from retention_ops_tests.test_upgrade import OTHER_SQL, rewritten

CRITICAL_DAY = date(2024, 3, 30)
"""the small shop's first CRITICAL date; the one before is its first WARNING"""
SETTINGS = {"mode": "live", "min_sample": "10", "approval_above": "0", "owner": "Ada"}
COMMANDS = [
    "actions list", "actions show", "actions retry", "actions cancel", "actions resolve", "actions approve", "actions refuse",
    "actions work", "actions halt", "actions resume", "actions preview", "incidents list", "incidents show", "incidents ack",
    "incidents snooze", "incidents close", "audit verify", "audit show", "doctor", "closures",
    "actions reconcile", "backup", "restore", "upgrade",
]
SECRETS = ("RETENTION_OPS_SLACK_TOKEN", "RETENTION_OPS_TICKET_TOKEN", "RETENTION_OPS_GOOGLE_CREDENTIALS", "RETENTION_OPS_WEBHOOK_URL",
           "RETENTION_OPS_WEBHOOK_SECRET")


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A home in live with local destinations: a WARNING the day before yesterday, risen to CRITICAL yesterday; its list waits."""
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    orders = small_shop()
    orders = orders[orders["order_date"] <= CRITICAL_DAY]
    orders = orders.assign(order_date=[day + (yesterday - CRITICAL_DAY) for day in orders["order_date"]])
    home = tmp_path_factory.mktemp("commands") / "home"
    lake = lake_with(orders, home, yesterday, mode="live", min_sample=10, approval_above=0, owner="Ada")
    for day, clock in ((yesterday - timedelta(days=1), lambda: system_clock() - timedelta(days=1)), (yesterday, system_clock)):
        outcome = run_dates(build_loop(lake.settings, clock), day, day)
        assert outcome.success, outcome.errors
    return lake.settings.home, yesterday


@pytest.fixture
def shop(answered, tmp_path, monkeypatch, capsys):
    """A copy of that home with `run(*words)` -> (exit code, what was printed), `engine` and helpers on its database."""
    home = tmp_path / "home"
    shutil.copytree(answered[0], home, symlinks=True)
    for name, value in SETTINGS.items():
        monkeypatch.setenv(f"RETENTION_OPS_{name.upper()}", value)
    monkeypatch.setattr("retention_ops.commands.shared.out.width", 200, raising=False)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["retention-ops", "--home", str(home), *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out + printed.err

    with ops_database(load_settings(home=home)) as engine:
        yield SimpleNamespace(home=home, day=answered[1], run=run, engine=engine)


def waiting(shop):
    """The hand-over that waits for approval."""
    return ledger.find(shop.engine, state=ledger.AWAITING)[0]


def events_of(shop, key):
    return [(event["event"], event["actor"], event["detail"]) for event in story.action_events(shop.engine, key)]


def force(shop, state, **values):
    """Puts one sent action of the newest day into another state, as a bad day would leave it."""
    row = next(row for row in ledger.find(shop.engine, alert_date=shop.day, state=ledger.SENT) if row["kind"] == "comment")
    values = {"last_error": "503 from the tracker", "external_id": None, "external_url": None} | values
    with shop.engine.begin() as connection:
        connection.execute(ledger.actions.update().where(ledger.actions.c.key == row["key"]).values(state=state, **values))
    return row["key"]


def state_of(shop, key):
    return ledger.find(shop.engine, key=key)[0]["state"]


def sql(shop, *statements):
    """Statements of somebody who owns the database file, triggers or not."""
    with sqlite3.connect(shop.home / "ops.sqlite") as connection:
        for name, in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
    connection.close()


# -- help and usage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples_that_name_existing_options(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"], terminal_width=200)
    assert result.exit_code == 0
    found = re.findall(r"^\s*(retention-ops .+?)\s*$", result.output, flags=re.M)
    assert found
    for example in found:
        assert example.startswith(f"retention-ops {command}")
        for option in re.findall(r"--[a-z-]+", example):
            assert option in result.output.replace(example, ""), option


@pytest.mark.parametrize("words", [
    ("actions", "retry", "abc"), ("actions", "cancel", "abc", "--by", "Ada"), ("actions", "approve", "abc", "--by", "Ada"),
    ("incidents", "ack", "1"), ("incidents", "snooze", "1", "--by", "Ada", "--why", "x"),
    ("incidents", "snooze", "1", "--hours", "2", "--until", "2999-01-01", "--by", "Ada", "--why", "x"),
    ("incidents", "snooze", "1", "--until", "soon", "--by", "Ada", "--why", "x"),
    ("incidents", "close", "1", "--verdict", "maybe", "--by", "Ada", "--why", "x"),
    ("actions", "resolve", "abc", "--by", "Ada", "--why", "x"), ("actions", "list", "--state", "lost"),
    ("actions", "preview", "--date", "2024-02-31"), ("audit", "show", "--last", "0"), ("audit", "show", "--last", "9" * 20),
    ("incidents", "show", "9" * 20), ("incidents", "ack", "0", "--by", "Ada"),
])
def test_wrong_usage_is_2(shop, words):
    assert shop.run(*words)[0] == 2


@pytest.mark.parametrize("words", [("actions", "list"), ("incidents", "list"), ("audit", "verify"), ("actions", "work")])
def test_a_home_where_nothing_ran_is_an_error_and_gets_no_database(shop, words):
    shutil.rmtree(shop.home)
    code, text = shop.run(*words)
    assert code == 1 and "--home" in text and not shop.home.exists()


@pytest.mark.parametrize("words", [
    ("actions", "show", "zz"), ("actions", "retry", "zz", "--by", "Ada", "--why", "x"), ("incidents", "show", "99"),
    ("incidents", "ack", "99", "--by", "Ada"), ("incidents", "ack", "1", "--by", " "), ("actions", "halt", "--by", "Ada", "--why", " "),
])
def test_what_cannot_be_done_is_one_clear_line(shop, words):
    code, text = shop.run(*words)
    assert code == 1 and text.startswith("error ") and text.count("\n") == 1


# -- actions -----------------------------------------------------------------------------------------------------------


def test_list_names_what_waits_first_then_the_newest_sent(shop):
    code, text = shop.run("actions", "list")
    assert code == 0
    lines = text.splitlines()
    assert lines[0].startswith(waiting(shop)["key"][:12]) and "awaiting approval" in lines[0]
    assert "slack post by local" in text and f"actions show {waiting(shop)['key'][:12]}" in lines[-1]
    rows = json.loads(shop.run("actions", "list", "--all", "--json")[1])
    assert len(rows) == 10 and all("payload" not in row for row in rows)
    rows = json.loads(shop.run("actions", "list", "--state", "sent", "--date", shop.day, "--json")[1])
    assert {(row["state"], row["alert_date"]) for row in rows} == {("sent", shop.day.isoformat())}


def test_show_gives_an_outline_its_events_and_on_request_the_whole_content(shop):
    post = next(row for row in ledger.find(shop.engine, slot="slack", kind="post"))
    text = shop.run("actions", "show", post["key"][:6])[1]
    assert post["key"] in text and "characters)" in text and "parts" in text and "sending" in text and "Who to contact first" not in text
    assert "Who to contact first" in shop.run("actions", "show", post["key"], "--payload")[1]
    facts = json.loads(shop.run("actions", "show", post["key"], "--json")[1])
    assert [event["event"] for event in facts["events"]] == ["planned", "sending", "sent"]


def test_retry_sends_a_failed_action_again_and_remembers_who_and_why(shop):
    key = force(shop, ledger.FAILED)
    code, text = shop.run("actions", "retry", key[:10], "--by", "Ada", "--why", "tracker is back")
    assert code == 0 and "planned" in text and "actions work" in text
    assert ("planned", "Ada", "by hand (retry): tracker is back") in events_of(shop, key)
    code, text = shop.run("actions", "work")
    assert code == 0 and "planned → sent" in text
    assert state_of(shop, key) == ledger.SENT
    assert "Nothing was due" in shop.run("actions", "work")[1]


def test_cancel_is_for_ever(shop):
    key = force(shop, ledger.NEEDS_HUMAN)
    assert shop.run("actions", "cancel", key, "--by", "Ada", "--why", "told by phone")[0] == 0
    assert state_of(shop, key) == ledger.CANCELLED
    assert shop.run("actions", "retry", key, "--by", "Ada", "--why", "x")[0] == 1


@pytest.mark.parametrize(("words", "state", "detail"), [
    (("--sent", "RET-12"), ledger.SENT, "by hand (sent): seen"), (("--absent",), ledger.PLANNED, "by hand (absent): seen"),
])
def test_resolve_settles_what_nobody_could_tell(shop, words, state, detail):
    key = force(shop, ledger.NEEDS_HUMAN)
    assert shop.run("actions", "resolve", key, *words, "--by", "Ada", "--why", "seen")[0] == 0
    row = ledger.find(shop.engine, key=key)[0]
    assert row["state"] == state and (row["external_id"] == "RET-12") == (state == ledger.SENT)
    assert (state, "Ada", detail) in events_of(shop, key)


def test_an_unknown_action_is_not_simply_retried(shop):
    key = force(shop, ledger.UNKNOWN)
    code, text = shop.run("actions", "retry", key, "--by", "Ada", "--why", "x")
    assert code == 1 and "nobody knows yet" in text and state_of(shop, key) == ledger.UNKNOWN


def test_a_list_leaves_after_its_approval_and_with_now_at_once(shop):
    row = waiting(shop)
    sha = story.action_approval(shop.engine, row["key"])["audience_sha256"]
    code, text = shop.run("actions", "approve", row["key"][:8], "--audience", sha[:10], "--by", "Grace", "--why", "checked", "--now")
    assert code == 0, text
    assert f"worksheet 'P3 {shop.day}'" in text and "left out" in text and "planned → sent" in text
    assert state_of(shop, row["key"]) == ledger.SENT
    approval = story.action_approval(shop.engine, row["key"])
    assert (approval["state"], approval["decided_by"], approval["why"]) == ("approved", "Grace", "checked")
    assert any(actor == "Grace" for _, actor, _ in events_of(shop, row["key"]))


def test_without_now_approval_says_who_delivers(shop):
    row = waiting(shop)
    code, text = shop.run("actions", "approve", row["key"], "--audience", row["payload"]["audience_sha256"], "--by", "Grace")
    assert code == 0 and "actions work" in text and "daemon" in text and state_of(shop, row["key"]) == ledger.PLANNED


@pytest.mark.parametrize("sha", ["0000000000", "c"])
def test_approving_another_list_is_refused(shop, sha):
    row = waiting(shop)
    code, text = shop.run("actions", "approve", row["key"], "--audience", sha, "--by", "Grace")
    assert code == 1 and "audience_sha256" in text and state_of(shop, row["key"]) == ledger.AWAITING


def test_a_refused_list_stays_here(shop):
    row = waiting(shop)
    sha = row["payload"]["audience_sha256"]
    assert shop.run("actions", "refuse", row["key"], "--audience", sha, "--by", "Grace", "--why", "too many")[0] == 0
    assert state_of(shop, row["key"]) == ledger.CANCELLED
    assert ("cancelled", "Grace") in [(event, actor) for event, actor, _ in events_of(shop, row["key"])]


def test_halted_nothing_leaves_until_somebody_resumes(shop):
    key = force(shop, ledger.PLANNED)
    assert shop.run("actions", "halt", "--by", "Ada", "--why", "wrong prices")[0] == 0
    code, text = shop.run("actions", "work")
    assert code == 0 and "Halted by Ada" in text and "wrong prices" in text and state_of(shop, key) == ledger.PLANNED
    assert "Halted by Ada" in shop.run("actions", "list")[1]
    assert shop.run("actions", "resume", "--by", "Bob", "--why", "fixed")[0] == 0
    assert ledger.read_state(shop.engine, HALTED)["by"] == "Bob"
    with shop.engine.begin() as connection:  # a minute later
        connection.execute(ledger.actions.update().where(ledger.actions.c.key == key).values(not_before=None))
        said = connection.execute(sa.select(ops_events.c.actor, ops_events.c.detail).where(ops_events.c.event == HALTED)).tuples().all()
    assert said == [("Ada", "yes: wrong prices"), ("Bob", "no: fixed")]
    assert "planned → sent" in shop.run("actions", "work")[1]


def test_work_fails_where_something_failed_and_says_what(shop):
    key = force(shop, ledger.PLANNED)
    with shop.engine.begin() as connection:
        connection.execute(ledger.actions.update().where(ledger.actions.c.key == key).values(destination="nowhere"))
    code, text = shop.run("actions", "work")
    assert code == 1 and "nowhere" in text and state_of(shop, key) == ledger.PLANNED, "another shell may have what is missing"


def test_what_was_planned_in_another_mode_stays_and_is_named(shop, monkeypatch):
    key = force(shop, ledger.PLANNED)
    monkeypatch.setenv("RETENTION_OPS_MODE", "shadow")
    code, text = shop.run("actions", "work")
    assert code == 0 and "another mode" in text and state_of(shop, key) == ledger.PLANNED


def test_a_preview_shows_what_would_go_where_and_writes_nothing(shop, monkeypatch):
    for name in ("ops.sqlite", "ops.sqlite-wal", "ops.sqlite-shm"):
        (shop.home / name).unlink(missing_ok=True)
    monkeypatch.setenv("RETENTION_OPS_MODE", "shadow")
    monkeypatch.setenv("RETENTION_OPS_MESSAGES_TO", "slack")
    monkeypatch.setenv("RETENTION_OPS_SLACK_CHANNEL", "C0123ABCD")
    with ops_database(load_settings(home=shop.home)) as engine:
        before = files(shop.home)
        code, text = shop.run("actions", "preview", "--date", shop.day)
        assert code == 0, text
        for shown in ("in mode live: open", "slack post by slack to C0123ABCD", "Who to contact first", "priority: Highest",
                      f"worksheet 'P3 {shop.day}'", "columns: run_date, customer_id", "would wait for the approval", '"event": "open"'):
            assert shown in text, shown
        facts = json.loads(shop.run("actions", "preview", "--date", shop.day, "--mode", "shadow", "--json")[1])
        assert {row["destination"] for row in facts["actions"]} == {"local"} and facts["decision"]["verdict"] == "open"
        assert ledger.find(engine) == [] and incidents.find(engine) == [] and ledger.read_state(engine, "armed") is None
        assert files(shop.home) == before


def files(home):
    return {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file() and not path.name.startswith("ops.sqlite")}


BROKEN = "Ad\udcff\x00a"
"""as Python decodes an argument that is no UTF-8"""


def test_the_kill_switch_engages_whatever_bytes_name_who_pulled_it(shop):
    assert shop.run("actions", "halt", "--by", BROKEN, "--why", BROKEN)[0] == 0
    switch = ledger.read_state(shop.engine, HALTED)
    assert (switch["value"], switch["by"], switch["why"]) == ("yes", "Ad?a", "Ad?a")
    assert shop.run("incidents", "ack", 1, "--by", BROKEN)[0] == 0


@pytest.mark.parametrize("words", [
    ("actions", "show", BROKEN), ("actions", "list", "--state", BROKEN),
    ("actions", "resolve", BROKEN, "--sent", BROKEN, "--by", "Ada", "--why", "x"),
    ("actions", "approve", "abc", "--audience", BROKEN, "--by", "Ada"),
    ("incidents", "snooze", "1", "--until", BROKEN, "--by", "Ada", "--why", "x"),
    ("incidents", "close", "1", "--verdict", BROKEN, "--by", "Ada", "--why", "x"), ("incidents", "show", "1", "--html", "/\udcff/x"),
])
def test_broken_bytes_elsewhere_are_a_clear_error(shop, words):
    assert shop.run(*words)[0] in (1, 2)


def test_next_steps_of_a_waiting_list_can_be_typed_as_shown(shop):
    row = waiting(shop)
    for words in (("actions", "show", row["key"]), ("actions", "retry", row["key"], "--by", "Ada", "--why", "x")):
        line = next(line for line in shop.run(*words)[1].splitlines() if "actions approve" in line)
        assert "--audience" in line and "--by" in line
    sql(shop, f"UPDATE actions SET state = 'unknown' WHERE key = '{row['key']}'")
    text = shop.run("actions", "resolve", row["key"], "--absent", "--by", "Ada", "--why", "x")[1]
    assert f"actions approve {row['key'][:12]} --audience {row['payload']['audience_sha256'][:12]} --by NAME" in text


def test_a_preview_of_an_answered_date_says_so(shop):
    code, text = shop.run("actions", "preview", "--date", shop.day)
    assert code == 0 and "already answered" in text
    assert shop.run("actions", "preview", "--date", "2001-01-01")[0] == 1


def test_a_preview_of_history_says_so_once(shop):
    for name in ("ops.sqlite", "ops.sqlite-wal", "ops.sqlite-shm"):
        (shop.home / name).unlink(missing_ok=True)
    with ops_database(load_settings(home=shop.home)) as engine:
        ledger.set_state(engine, ARMED, (shop.day + timedelta(days=1)).isoformat(), "Ada", "starts tomorrow", system_clock())
        code, text = shop.run("actions", "preview", "--date", shop.day)
    assert code == 0 and "in mode live: history, before the response was armed" in text and "history: " not in text


# -- incidents ---------------------------------------------------------------------------------------------------------


def test_an_incident_is_listed_acknowledged_snoozed_and_judged(shop):
    assert "acknowledge by" in shop.run("incidents", "list")[1] or "overdue" in shop.run("incidents", "list")[1]
    assert shop.run("incidents", "ack", 1, "--by", "Ada")[0] == 0
    assert "acknowledged by Ada" in shop.run("incidents", "list")[1]
    code, text = shop.run("incidents", "snooze", 1, "--hours", 5, "--by", "Ada", "--why", "known")
    assert code == 0 and "quiet until" in text
    assert shop.run("incidents", "close", 1, "--verdict", "real", "--by", "Ada", "--why", "promotion")[0] == 0
    assert "No open incident" in shop.run("incidents", "list")[1]
    row = json.loads(shop.run("incidents", "list", "--all", "--json")[1])[0]
    assert (row["state"], row["verdict"], row["closed_by"], row["acked_by"]) == ("closed", "real", "Ada", "Ada")
    told = [(event["event"], event["actor"]) for event in incidents.story(shop.engine, 1)["events"]]
    assert told[-3:] == [("acknowledged", "Ada"), ("snoozed", "Ada"), ("closed", "Ada")]
    assert shop.run("incidents", "close", 1, "--verdict", "false", "--by", "Bob", "--why", "x")[0] == 1


def test_a_snooze_ends_in_the_shops_time(shop, monkeypatch):
    monkeypatch.setenv("RETENTION_OPS_SHOP_TIMEZONE", "America/New_York")
    day = datetime.now(UTC).date() + timedelta(days=10)
    assert shop.run("incidents", "snooze", 1, "--until", f"{day} 09:00", "--by", "Ada", "--why", "x")[0] == 0
    assert incidents.find(shop.engine)[0]["snoozed_until"] == datetime(day.year, day.month, day.day, 9, tzinfo=ZoneInfo("America/New_York"))


@pytest.mark.parametrize("how", [
    ("--hours", "nan"), ("--hours", "inf"), ("--hours", "1e12"), ("--hours", "0"), ("--hours", "2161"),
    ("--until", "2999-07-01"), ("--until", "0001-01-01"), ("--until", "9999-12-31"), ("--until", ""),
])
def test_a_snooze_lasts_at_most_90_days(shop, how):
    assert shop.run("incidents", "snooze", 1, *how, "--by", "Ada", "--why", "x")[0] in (1, 2)
    assert incidents.find(shop.engine)[0]["snoozed_until"] is None
    assert shop.run("incidents", "snooze", 1, "--hours", 2160, "--by", "Ada", "--why", "x")[0] == 0


@pytest.mark.parametrize("flag", ["--html", "--markdown"])
def test_a_story_is_not_written_over_a_folder_or_into_a_missing_one(shop, tmp_path, flag):
    code, text = shop.run("incidents", "show", 1, flag, tmp_path)
    assert code == 2 and "is a folder" in text
    code, text = shop.run("incidents", "show", 1, flag, tmp_path / "missing" / "story")
    assert code == 2 and "there is no folder" in text and not (tmp_path / "missing").exists()


def test_the_story_tells_everything_and_names_no_customer(shop, tmp_path):
    row = waiting(shop)
    shop.run("actions", "approve", row["key"], "--audience", row["payload"]["audience_sha256"], "--by", "Grace", "--now")
    shop.run("incidents", "ack", 1, "--by", "Ada")
    text = shop.run("incidents", "show", 1)[1]
    for shown in ("WARNING", "CRITICAL", "escalate", "slack post", "approved 3 customers", "Grace", "holdout", "treated",
                  "Acknowledged by Ada", "success", "incidents close 1"):
        assert shown in text, shown
    code, _ = shop.run("incidents", "show", 1, "--markdown", tmp_path / "story.md", "--html", tmp_path / "story.html")
    assert code == 0
    page, document = (tmp_path / "story.html").read_text(), (tmp_path / "story.md").read_text()
    assert page.startswith("<!doctype html>") and "src=" not in page and "| date |" in document
    with shop.engine.connect() as connection:
        customers = connection.execute(sa.text("SELECT DISTINCT customer_id FROM exposures")).scalars().all()
    assert customers
    as_json = shop.run("incidents", "show", 1, "--json")[1]
    assert json.loads(as_json)["exposures"]
    for told in (text, page, document, as_json):
        assert [customer for customer in customers if re.search(rf"\b{customer}\b", told)] == []


def test_what_people_wrote_is_shown_literally(shop, tmp_path):
    shop.run("incidents", "close", 1, "--verdict", "real", "--by", "<b>Ada</b>", "--why", "<script>x</script> | [a](http://b) [red]")
    text = shop.run("incidents", "show", 1)[1]
    assert "[red]" in text and "<script>" in text
    shop.run("incidents", "show", 1, "--markdown", tmp_path / "story.md", "--html", tmp_path / "story.html")
    for file in ("story.md", "story.html"):
        assert "<script>" not in (tmp_path / file).read_text() and "<b>" not in (tmp_path / file).read_text()
    assert "](http://b)" not in (tmp_path / "story.md").read_text()


@pytest.mark.parametrize(("address", "linked"), [("https://shop.example/RET-1", True), ("javascript:alert(1)", False), (None, False)])
def test_only_web_addresses_become_links(shop, address, linked):
    key = force(shop, ledger.SENT, external_id="RET-1", external_url=address)
    told = story.tell(story.facts(shop.engine, 1))
    cell = next(row for section in told.sections for row in section.rows if section.heading == "Done about it" and row[-1] == key[:12])[-2]
    assert (cell == story.Link("RET-1", address)) if linked else cell == "RET-1"
    assert ("href=" in story.html(told)) == linked


# -- audit -------------------------------------------------------------------------------------------------------------


def test_a_whole_record_verifies(shop):
    code, text = shop.run("audit", "verify")
    assert code == 0 and "✗" not in text and "2 rows, each follows" in text
    assert json.loads(shop.run("audit", "verify", "--json")[1])["whole"] is True
    rows = json.loads(shop.run("audit", "show", "--last", 1, "--json")[1])
    assert [row["alert_date"] for row in rows] == [shop.day.isoformat()]
    assert str(shop.day) in shop.run("audit", "show")[1]


def test_a_changed_row_is_named(shop):
    sql(shop, "UPDATE ops_runs_log SET total_exported = 0 WHERE position = 1")
    code, text = shop.run("audit", "verify")
    assert code == 1 and f"broken at row 1, alert date {shop.day - timedelta(days=1)}" in text


def test_a_deleted_newest_row_is_missed_by_the_chain_and_found_by_its_copies(shop):
    sql(shop, "DELETE FROM ops_runs_log WHERE position = 2")
    code, text = shop.run("audit", "verify")
    assert code == 1 and "1 row, each follows" in text
    assert f"1 row of the exported table ops_runs_log missing in the database, the first of alert date {shop.day}" in text


@pytest.mark.parametrize(("statement", "name"), [
    ("DELETE FROM ops_events WHERE event = 'sent'", "sent actions have their event"),
    ("UPDATE actions SET payload = '{}'", "contents are as planned"),
    ("UPDATE actions SET answer_id = NULL", "answers have their actions"),
    ("UPDATE actions SET destination = 'jira', external_id = 'RET-1', kind = 'create' WHERE state = 'sent'", "external ids are unique"),
])
def test_a_ledger_that_contradicts_itself_is_named(shop, statement, name):
    sql(shop, statement)
    checks = json.loads(shop.run("audit", "verify", "--json")[1])["checks"]
    assert [check["name"] for check in checks if check["broken"]] == [name]


def test_an_action_that_exists_twice_is_a_finding(shop):
    key = force(shop, ledger.SENT, external_id="RET-1")
    with shop.engine.begin() as connection:
        ledger.note(connection, system_clock(), "duplicate", "worker", "also exists as RET-2", action_key=key)
    code, text = shop.run("audit", "verify")
    assert code == 1 and key in text and "is RET-1 and also exists as RET-2" in text
    text = shop.run("status")[1]
    assert f"action {key[:12]} exists twice: RET-1 and also exists as RET-2" in text
    assert [row["key"] for row in json.loads(shop.run("status", "--json")[1])["duplicates"]] == [key]


# -- doctor and status -------------------------------------------------------------------------------------------------


def test_doctor_lists_every_missing_variable_and_sends_nothing(shop, monkeypatch):
    for name, value in {"messages_to": "slack", "tickets_to": "jira", "lists_to": "sheets", "webhook_to": "make", "owner": ""}.items():
        monkeypatch.setenv(f"RETENTION_OPS_{name.upper()}", value)
    code, text = shop.run("doctor")
    assert code == 1
    for name in (*SECRETS, "RETENTION_OPS_SLACK_CHANNEL", "RETENTION_OPS_TICKET_URL", "RETENTION_OPS_TICKET_USER",
                 "RETENTION_OPS_TICKET_PROJECT", "RETENTION_OPS_SHEETS_SPREADSHEET"):
        assert f"{name} is not set" in text, name
    assert "RETENTION_OPS_OWNER" in text
    for name, value in {"tickets_to": "local", "messages_to": "local", "health_channel": "C0OWNERS1", "smtp_host": "mail.example",
                        "mail_to": "team@shop.example"}.items():
        monkeypatch.setenv(f"RETENTION_OPS_{name.upper()}", value)
    needed = {name: f"needs {RIGHTS[name]}" for name in ("slack", "sheets", "webhook", "mail")}
    assert least_rights(shop) == needed, "slack for health alone"
    for name in ("jira", "asana", "roundup"):
        monkeypatch.setenv("RETENTION_OPS_TICKETS_TO", name)
        assert least_rights(shop)[name] == f"needs {RIGHTS[name]}"
    monkeypatch.setenv("RETENTION_OPS_MESSAGES_TO", "slack")
    pilot = json.loads(shop.run("doctor", "--mode", "pilot", "--json")[1])
    assert pilot["ready"] is False and any("RETENTION_OPS_SLACK_TEST_CHANNEL" in finding["sentence"] for finding in pilot["findings"])


def least_rights(shop) -> dict[str, str]:
    found = json.loads(shop.run("doctor", "--json")[1])["findings"]
    return {row["subject"]: row["sentence"] for row in found if row["group"] == "least rights"}


def test_doctor_is_content_with_the_local_outbox_and_shows_the_halt_and_stray_secrets(shop, tmp_path):
    code, text = shop.run("doctor")
    assert code == 0 and "not pulled" in text and "approval" in text and "14 days" in text and "not seen on this machine" in text
    (tmp_path / ".env").write_text("RETENTION_OPS_SLACK_TOKEN=xoxb-secret-of-mine\n")
    shop.run("actions", "halt", "--by", "Ada", "--why", "stop")
    code, text = shop.run("doctor")
    assert code == 1 and "halted by Ada" in text
    assert "RETENTION_OPS_SLACK_TOKEN stands in" in text and "xoxb-secret-of-mine" not in text


def test_doctor_does_not_say_that_answers_go_out_where_all_stay_here(shop, monkeypatch):
    found = json.loads(shop.run("doctor", "--json")[1])["findings"]
    mode = next(finding for finding in found if finding["subject"] == "mode")
    assert mode["ok"] is None and mode["sentence"] == "live, but every destination is local: nothing leaves this machine"
    monkeypatch.setenv("RETENTION_OPS_MESSAGES_TO", "slack")
    assert "mode: live: answers go out" in shop.run("doctor")[1]


def test_a_destination_that_cannot_be_connected_is_a_finding(shop, monkeypatch):
    monkeypatch.setenv("RETENTION_OPS_WEBHOOK_TO", "make")
    monkeypatch.setenv("RETENTION_OPS_WEBHOOK_URL", "ftp://elsewhere")
    monkeypatch.setenv("RETENTION_OPS_WEBHOOK_SECRET", "whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0")
    code, text = shop.run("doctor")
    assert code == 1 and "RETENTION_OPS_WEBHOOK_URL" in text and "c2VjcmV0" not in text


def test_status_names_what_waits_and_proposes_it_first(shop):
    key = force(shop, ledger.NEEDS_HUMAN)
    facts = json.loads(shop.run("status", "--json")[1])
    assert facts["next"][0] == f"actions show {waiting(shop)['key'][:12]}"
    assert [row["key"] for row in facts["actions_in_trouble"]] == [key] and facts["armed"] and facts["failed_answers"] == []
    shop.run("actions", "halt", "--by", "Ada", "--why", "stop")
    with shop.engine.begin() as connection:
        connection.execute(incidents.incidents.update().values(ack_by=datetime(2020, 1, 1, tzinfo=UTC)))
    text = shop.run("status")[1]
    for shown in ("nothing leaves", "open incident", "overdue", "waits for approval", "1 needs human"):
        assert shown in text, shown
    shop.run("incidents", "close", 1, "--verdict", "false", "--by", "Ada", "--why", "x")
    assert "0 of 1 judged (0%)" in shop.run("status")[1]


def test_the_last_answer_is_that_of_the_newest_date_that_succeeded():
    rows = [{"n": n, "alert_date": date(2024, 3, day), "status": status} for n, (day, status) in enumerate(
        [(4, "success"), (6, "success"), (6, "skipped"), (7, "failed"), (5, "success")])]
    assert _last_answer(rows)["n"] == 1
    assert _last_answer([row for row in rows if row["status"] != "success"])["n"] == 3
    assert _last_answer([]) is None


# -- backup, restore and upgrade ---------------------------------------------------------------------------------------


def test_a_backup_is_written_and_restored_by_the_commands(shop, tmp_path, monkeypatch):
    (tmp_path / "mine.sql").write_text("SELECT mine")
    (tmp_path / "shut.csv").write_text("from,to,reason\n2024-12-24,2024-12-26,stock-taking\n")
    for name, value in {"source": "postgres", "source_sql": tmp_path / "mine.sql", "closures_file": tmp_path / "shut.csv"}.items():
        monkeypatch.setenv(f"RETENTION_OPS_{name.upper()}", str(value))
    code, text = shop.run("backup", "--to", tmp_path / "friday.tar", "--json")
    made = json.loads(text)
    assert code == 0 and Path(made["file"]).stat().st_size == made["bytes"] and Path(made["file"]).stat().st_mode & 0o777 == 0o600
    assert made["rows"]["ops_runs_log"] == 2
    code, text = shop.run("restore", made["file"])
    assert code == 1 and "is not empty" in text and "--force" in text
    monkeypatch.setenv("RETENTION_OPS_WARNING_PCT", "12")
    code, text = shop.run("restore", made["file"], "--into", tmp_path / "new")
    assert code == 0 and "setting warning_pct was 15.0, is 12.0" in text and "actions reconcile" in text
    own = tmp_path / "new" / "files_of_backup"
    assert {file.name: file.read_text() for file in own.iterdir()} == {
        "source_sql.sql": "SELECT mine", "closures_file.csv": (tmp_path / "shut.csv").read_text()}
    assert str(own / "source_sql.sql") in text.replace("\n", "")
    done = json.loads(shop.run("restore", made["file"], "--into", tmp_path / "other", "--json")[1])
    assert done["held"] is True and done["moved"] is None and done["created_at"] == made["created_at"]
    with ops_database(load_settings(home=tmp_path / "new")) as engine:
        assert [row["key"] for row in ledger.find(engine)] == [row["key"] for row in ledger.find(shop.engine)]


def test_an_upgrade_names_the_dates_of_another_release_and_changes_them_only_when_told(shop):
    settings = load_settings(home=shop.home)
    assert "Every date is this release's." in shop.run("upgrade", "--dry-run")[1]
    rewritten(Lake(settings), shop.day, "sentence || '!' AS sentence", sql_sha256=OTHER_SQL)
    (shop.home / "lake" / "SCHEMA").unlink()

    def content() -> dict[str, bytes]:
        return {str(path.relative_to(shop.home)): path.read_bytes() for path in sorted(shop.home.rglob("*")) if path.is_file()}

    before = content()
    code, text = shop.run("upgrade", "--dry-run", "--json")
    found = json.loads(text)
    assert code == 0 and (found["dates"], found["done"], found["rebuilt"]) == ([str(shop.day)], False, False)
    assert found["lake_schema"] == [1, LAKE_SCHEMA] and content() == before
    code, text = shop.run("upgrade", "--dry-run")
    assert code == 0 and f"alert_logic: {shop.day} computed by another release's rules" in text and content() == before
    code, text = shop.run("upgrade", "--json")
    assert code == 0 and (json.loads(text)["done"], json.loads(text)["dates"]) == (True, [str(shop.day)])
    assert lake_schema(shop.home / "lake") == LAKE_SCHEMA
    assert "can be computed again with --rebuild" in shop.run("upgrade")[1]
