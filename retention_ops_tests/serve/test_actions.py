"""The write tools: one request, one run, one answer, whatever is down, asked twice or not confirmed."""

from __future__ import annotations

import csv
import re
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from mcp import Client

from retention_ops.execute import ledger
from retention_ops.log import runs
from retention_ops.log.database import exposures
from retention_ops.package.audiences import in_holdout
from retention_ops.serve.arguments import business_date
from retention_ops.serve.server import build_server
from retention_ops.sources.ingest import ingest
from retention_ops_tests.execute.servers.dagster import DagsterServer
from retention_ops_tests.serve.house import CALM, DAY, RISE, Refusal, opened, says
from retention_ops_tests.test_ui import free_port

MODES = pytest.mark.parametrize("mode", ["auto", "legacy"])
DOWN = {"dagster_url": f"http://127.0.0.1:{free_port()}"}


def launches(house):
    return [run["jobName"] for run in house.dagster.runs]


def tags(run):
    return {tag["key"]: tag["value"] for tag in run["tags"]}


@pytest.fixture
def live(served, tmp_path):
    """A house in live on local destinations."""
    with opened(served, tmp_path, mode="live", holdout_pct=30) as made:
        yield made


def trigger(house, mode="auto", severity="CRITICAL", day=DAY, person=says(True), **more):
    return house.call("trigger_playbook", mode, person=person, date=str(day), severity=severity, **more)


def export(house, destination="csv", limit=3, tier="P2", **more):
    return house.call("export_audience", date=str(DAY), tier=tier, destination=destination, limit=limit, **more)


# -- build_priority_queue ----------------------------------------------------------------------------------------------


@MODES
def test_a_queue_is_built_by_one_run_that_is_found_again(house, mode):
    first = house.call("build_priority_queue", mode, date=str(DAY))
    again = house.call("build_priority_queue", mode, date=str(DAY))
    queue = house.lake.read("customer_priority", DAY)["priority_tier"].value_counts()
    for told in (first, again):
        assert [told[f"p{number}_count"] for number in (1, 2, 3)] == [int(queue.get(f"P{number}", 0)) for number in (1, 2, 3)]
        assert told["total"] == int(queue.sum()) and told["table_updated"] is True and told["status"] == "done"
    assert (first["found_again"], again["found_again"]) == (False, True) and first["run_id"] == again["run_id"]
    (run,) = house.dagster.runs
    assert run["jobName"] == "__ASSET_JOB" and tags(run)["dagster/partition"] == str(DAY)
    assert tags(run)["retention_ops/idempotency_key"] == first["request"]
    assert tags(run)["retention_ops/requested_by"].startswith("mcp:stdio:")
    (launch,) = [request for request in house.dagster.requests if b"launchPipelineExecution" in request.body]
    assert "alert_logic" not in str(launch.json()["variables"]["p"]["selector"]), "the sensor would answer it"


def test_other_orders_are_another_request(house, tmp_path):
    house.call("build_priority_queue", date=str(DAY))
    (tmp_path / "late.csv").write_text(f"order_id,customer_id,order_date,order_amount\nlate,c0,{DAY - timedelta(days=3)},5.00\n")
    ingest([tmp_path / "late.csv"], "orders", house.settings(), complete_through=DAY)
    assert house.call("build_priority_queue", date=str(DAY))["found_again"] is False and len(house.dagster.runs) == 2


def test_a_run_that_failed_is_asked_for_anew(house):
    house.dagster.status = "FAILURE"
    failed = house.call("build_priority_queue", date=str(DAY))
    assert failed["status"] == "failed" and failed["table_updated"] is False and failed["total"] is None
    house.dagster.status = "SUCCESS"
    assert house.call("build_priority_queue", date=str(DAY))["status"] == "done" and len(house.dagster.runs) == 2


def test_a_long_run_is_followed_by_its_id(house):
    house.changes["mcp_wait_seconds"] = 0
    house.dagster.status = "STARTED"
    told = house.call("build_priority_queue", date=str(DAY))
    assert told["status"] == "running" and told["total"] is None and told["next"] == f'get_run_status(run_id="{told["run_id"]}")'
    assert house.call("get_run_status", run_id=told["run_id"])["finished"] is False
    house.dagster.runs[0]["status"] = "SUCCESS"
    done = house.call("get_run_status", run_id=told["run_id"])
    assert done["finished"] is True and done["status"] == "SUCCESS" and done["date"] == str(DAY)


def test_while_dagster_is_down_the_request_is_kept_and_delivered_by_the_next_call(house):
    house.changes |= DOWN
    told = house.call("build_priority_queue", date=str(DAY))
    assert told["status"] == "pending" and told["run_id"] is None and "could not be reached" in told["message"]
    assert "retention-ops actions work" in told["message"]
    assert house.call("build_priority_queue", date=str(DAY))["status"] == "pending"
    (row,) = house.rows()
    assert (row["state"], row["attempts"], row["key"]) == ("planned", 0, told["request"])
    waiting = house.call("get_run_status", run_id=told["request"])
    assert waiting["status"] == "planned" and not waiting["finished"]
    del house.changes["dagster_url"]
    house.call("build_priority_queue", date=str(RISE))
    assert sorted(tags(run)["dagster/partition"] for run in house.dagster.runs) == [str(RISE), str(DAY)]
    assert house.call("build_priority_queue", date=str(DAY))["status"] == "done" and len(house.dagster.runs) == 2


def test_actions_work_delivers_what_found_dagster_down(house):
    house.changes |= DOWN
    house.call("build_priority_queue", date=str(DAY))
    del house.changes["dagster_url"]
    assert house.responder("work").work() == [] and len(house.dagster.runs) == 1, "a run asked for is no answer to an alert"
    house.responder("work").work()
    assert len(house.dagster.runs) == 1 and runs.rows(house.engine) == []


@pytest.mark.parametrize("fault", ["lost_after", "500_after"])
def test_a_lost_answer_is_found_by_its_tag_and_nothing_is_doubled(house, fault):
    house.dagster.fail(fault)
    told = house.call("build_priority_queue", date=str(DAY))
    assert told["status"] == "pending" and len(house.dagster.runs) == 1
    for _ in range(2):
        house.clock.forward(seconds=60)
        done = house.call("build_priority_queue", date=str(DAY))
    assert done["status"] == "done" and len(house.dagster.runs) == 1 and [row["state"] for row in house.rows()] == ["sent"]


def test_the_dagster_of_another_home_is_not_asked(house):
    with DagsterServer("0" * 32) as other:
        house.changes["dagster_url"] = other.url
        told = house.call("build_priority_queue", date=str(DAY))
        assert told["status"] == "pending" and "serves another home" in told["message"] and other.runs == []


def test_several_clients_at_once_start_one_run(house):
    server, told = house.server(), []

    def build():
        told.append(house.call("build_priority_queue", server=server, date=str(DAY)))

    threads = [threading.Thread(target=build) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 6 and len(house.dagster.runs) == 1 and len(house.rows()) == 1


def test_dates_without_complete_orders_are_refused(house):
    refused = house.call("build_priority_queue", date=str(DAY + timedelta(days=1)))
    assert "has no complete orders" in refused and f"to {DAY}" in refused and house.rows() == []


# -- trigger_playbook --------------------------------------------------------------------------------------------------


@MODES
def test_a_confirmed_playbook_is_answered_once(house, mode):
    asked: list[str] = []
    first = trigger(house, mode, person=says(True, asked))
    assert first["status"] == "triggered" and first["mode"] == "shadow" and first["incident"] == 1
    assert [action["state"] for action in first["actions"]] == ["sent"] * 5 and first["ticket_id"].startswith("local:")
    (question,) = asked
    assert f"Trigger the CRITICAL playbook for {DAY}?" in question and "Nothing leaves this machine" in question
    again = trigger(house, mode, person=says(True, asked))
    assert again["status"] == "already_triggered" and again["actions"] == first["actions"] and len(asked) == 1
    assert launches(house) == ["incident_response_job"] and [row["status"] for row in runs.rows(house.engine)] == ["success"]
    (event,) = [event for event in house.events("planned") if "approved" in event["detail"]]
    assert event["actor"].startswith("mcp:stdio:")


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_the_same_on_postgres(served, tmp_path, database_url):
    with opened(served, tmp_path, ops_database_url=database_url) as house:
        assert house.call("build_priority_queue", date=str(DAY))["status"] == "done"
        assert trigger(house, person=None)["status"] == "pending_approval" and trigger(house)["status"] == "triggered"
        assert export(house)["rows_exported"] == 3
        assert [event["outcome"] for event in house.events("mcp_call")] == ["ok", "ok", "asked back", "ok", "ok"]


@MODES
def test_what_a_person_declines_does_not_happen(house, mode):
    told = trigger(house, mode, person=says(False))
    assert told["status"] == "declined" and house.rows() == [] and house.dagster.runs == []


@MODES
def test_a_client_that_cannot_ask_leaves_an_approval_and_says_how(house, mode, monkeypatch, capsys):
    told = trigger(house, mode, person=None)
    assert told["status"] == "pending_approval" and house.dagster.runs == []
    (approval,) = ledger.pending_approvals(house.engine)
    assert approval["action_key"] == told["request"] and approval["audience_sha256"].startswith(told["how_to_approve"].split()[5])
    assert trigger(house, mode, person=None)["request"] == told["request"] and len(house.rows()) == 1
    words = told["how_to_approve"].replace("NAME", "Ada").split()[1:]
    _command(house, words, monkeypatch)
    assert launches(house) == ["incident_response_job"]
    assert "customers, audience" in capsys.readouterr().out
    done = trigger(house, mode, person=None)
    assert done["status"] == "already_triggered" and done["incident"] == 1 and len(house.dagster.runs) == 1


def test_a_refused_request_is_spent_and_the_next_one_asks_again(house):
    told = trigger(house, person=None)
    sha = ledger.pending_approvals(house.engine)[0]["audience_sha256"]
    ledger.decide_approval(house.engine, told["request"], False, sha, "Ada", "not today", house.clock())
    again = trigger(house, person=None)
    assert again["status"] == "pending_approval" and again["request"] != told["request"] and house.dagster.runs == []


def test_an_approval_is_void_when_the_lists_changed(house, tmp_path):
    told = trigger(house, person=None)
    sha = ledger.pending_approvals(house.engine)[0]["audience_sha256"]
    ledger.decide_approval(house.engine, told["request"], True, sha, "Ada", "", house.clock())
    customer = house.responder("look").lists(DAY)["P2"].treated_ids[0]
    (tmp_path / "no.csv").write_text(f"customer_id\n{customer}\n")
    ingest([tmp_path / "no.csv"], "suppressions", house.settings())
    house.responder("work").work()
    assert house.dagster.runs == [] and house.rows()[0]["state"] == "cancelled" and "changed" in house.rows()[0]["last_error"]


def test_the_severity_must_be_the_alerts(house):
    assert f"The alert of {DAY} is CRITICAL, not WARNING" in trigger(house, severity="WARNING")
    assert "no alert to answer" in trigger(house, day=CALM)
    assert "INFO" in house.call("trigger_playbook", date=str(DAY), severity="INFO") and house.rows() == []


def test_off_and_halted_say_so(house):
    house.changes["mode"] = "off"
    assert "switched off (mode off)" in trigger(house)
    house.changes["mode"] = "shadow"
    ledger.set_state(house.engine, "halted", "yes", "Ada", "wrong prices", house.clock())
    assert "halted by Ada: wrong prices" in trigger(house) and "halted by Ada" in export(house)
    assert house.rows() == []
    assert house.call("build_priority_queue", date=str(DAY))["status"] == "done", "detection and packs go on"


def test_history_is_told_and_not_triggered(house):
    told = trigger(house, severity="WARNING", day=RISE)
    assert told["status"] == "nothing_to_do" and "History" in told["message"] and house.dagster.runs == []


def test_a_request_of_another_mode_stays(house):
    house.changes |= DOWN
    assert trigger(house)["status"] == "pending"
    del house.changes["dagster_url"]
    house.changes["mode"] = "live"
    house.responder("work").work()
    assert house.dagster.runs == [] and house.rows()[0]["state"] == "planned"


def test_the_run_refuses_another_mode_or_another_result_than_was_approved(house):
    import dagster as dg

    from retention_ops.execute.job import AlertDates, _as_approved

    version = trigger(house) and house.rows(slot="run")[0]["payload"]["config"]["ops"]["gate"]["config"]["version"]
    responder = house.responder("run")
    _as_approved(responder, AlertDates(alert_dates=[str(DAY)], mode="shadow", version=version))
    for mode, seen, why in (("live", version, "in mode shadow"), ("shadow", "0" * 64, "changed since")):
        with pytest.raises(dg.Failure, match=why):
            _as_approved(responder, AlertDates(alert_dates=[str(DAY)], mode=mode, version=seen))


# -- export_audience ---------------------------------------------------------------------------------------------------


def _ids(path: str) -> list[str]:
    with open(path, encoding="utf-8", newline="") as lines:
        return [row["customer_id"] for row in csv.DictReader(lines)]


def test_an_export_is_the_head_of_the_list_and_says_where_it_is(house):
    told = export(house, limit=3)
    listed = house.responder("look").lists(DAY)["P2"]
    assert told["status"] == "done" and told["rows_exported"] == 3 and told["total"] == listed.rows and told["truncated"] is True
    (file,) = told["exports"]
    assert _ids(file["path"]) == list(listed.treated_ids[:3]) and Path(file["path"]).stat().st_mode & 0o777 == 0o600
    assert not any(f"'{customer}'" in str(told) for customer in listed.treated_ids), "the answer names no customer"
    assert export(house, limit=3)["exports"] == told["exports"] and launches(house) == ["export_audience_job"]
    assert export(house, limit=1000)["rows_exported"] == listed.rows


def test_who_said_no_is_left_off_and_counted(house, tmp_path):
    first = house.responder("look").lists(DAY)["P2"].treated_ids[0]
    (tmp_path / "no.csv").write_text(f"customer_id\n{first}\n")
    ingest([tmp_path / "no.csv"], "suppressions", house.settings())
    told = export(house, limit=1000)
    assert first not in _ids(told["exports"][0]["path"]) and told["left_out"] == {"suppressed": 1}


def test_a_sheet_is_rehearsed_in_shadow(house):
    told = export(house, "both")
    assert [(each["destination"], each["status"]) for each in told["exports"]] == [("csv", "done"), ("gsheet", "done")]
    assert "nothing left this machine" in told["exports"][1]["message"]
    assert (house.settings().packs / str(DAY) / "outbox" / f"sheets_P2_{DAY}_top3.json").is_file()


def test_in_live_lists_leave_only_for_an_incident_without_the_holdout_and_are_remembered(live):
    assert "lists leave only for an incident" in export(live)
    assert "No Google spreadsheet is configured" in export(live, "gsheet")
    assert trigger(live)["status"] == "triggered"
    handed_over = _exposed(live)
    told = export(live, limit=2)
    exported = _ids(told["exports"][0]["path"])
    assert told["left_out"]["holdout"] > 0 and not any(in_holdout(customer, 30, "holdout-1") for customer in exported)
    assert _exposed(live) == handed_over, "the playbook had handed the same list over"


def _exposed(house):
    with house.engine.connect() as connection:
        return sorted(connection.execute(sa.select(exposures.c.customer_id, exposures.c.arm)).all())


@pytest.mark.slow
def test_a_large_critical_list_waits_for_a_person(served, tmp_path, monkeypatch):
    with opened(served, tmp_path, mode="live", approval_above=2, max_alert_age_days=36500) as house:
        trigger(house)
        told = export(house, limit=3)
        assert told["status"] == "pending_approval" and told["rows_exported"] == 0 and "actions approve" in told["how_to_approve"]
        assert launches(house) == ["incident_response_job"] and export(house, limit=2)["status"] == "done"
        _command(house, told["how_to_approve"].replace("NAME", "Ada").split()[1:], monkeypatch)
        assert export(house, limit=3)["status"] == "done"


def test_the_holdout_of_a_cut_list_is_who_would_have_stood_on_it(live):
    whole = live.responder("look").lists(DAY)["P2"]
    cut = whole.first(2)
    last = whole.queue.index(cut.treated_ids[-1])
    assert cut.rows == len(cut.table) == 2 and set(cut.holdout_ids) == set(whole.holdout_ids) & set(whole.queue[: last + 1])
    assert whole.first(10**6) is whole and cut.content_sha256 != whole.content_sha256


def test_an_export_while_dagster_is_down_is_delivered_once_later(house):
    house.changes |= DOWN
    told = export(house)
    assert told["status"] == "pending" and told["rows_exported"] == 0
    del house.changes["dagster_url"]
    for _ in range(2):
        house.responder("work").work()
    done = export(house)
    assert done["status"] == "done" and done["rows_exported"] == 3
    assert [row["state"] for row in house.rows(slot="export")] == ["sent"] and runs.rows(house.engine) == []


def test_no_queue_no_export(house):
    assert f'Next: build_priority_queue(date="{CALM}")' in house.call(
        "export_audience", date=str(CALM), tier="P1", destination="csv", limit=1)


# -- what a server offers ----------------------------------------------------------------------------------------------


def test_read_only_wins_over_everything(house):
    async def names(client: Client):
        return [tool.name for tool in (await client.list_tools()).tools]

    reads = ["get_alert_decision", "get_operational_context", "generate_brief", "explain_customer", "compare_dates", "get_run_status"]
    writes = ["build_priority_queue", "export_audience", "trigger_playbook"]
    assert house.session(names) == reads + writes
    assert house.session(names, server=house.server(read_only=True, toolsets="read,actions")) == reads
    assert house.session(names, server=build_server(house.desk, ("actions",))) == writes
    house.changes |= {"mcp_read_only": True, "mcp_toolsets": "read,actions"}
    refused = house.call("build_priority_queue", date=str(DAY))
    assert isinstance(refused, Refusal) and "toolset actions, which this server does not offer" in refused and house.rows() == []


def test_dates_are_one_type_for_everything(house):
    async def schemas(client: Client):
        return [tool.input_schema["properties"] for tool in (await client.list_tools()).tools]

    found = [schema for properties in house.session(schemas) for name, schema in properties.items() if name in ("date", "a", "b")]
    assert len(found) == 9 and all(schema["pattern"] == "^[0-9]{4}-[0-9]{2}-[0-9]{2}$" for schema in found)
    assert business_date("2024-02-29").day == 29 and re.fullmatch(found[0]["pattern"], "2024-02-29")


def _command(house, words, monkeypatch):
    """One `retention-ops` command on the house."""
    import sys

    from retention_ops.cli import main

    for name, value in house.settings().model_dump(include=set(house.changes) | {"min_sample", "shop_name", "dagster_url"}).items():
        monkeypatch.setenv(f"RETENTION_OPS_{name.upper()}", str(value))
    monkeypatch.setattr(sys, "argv", ["retention-ops", "--home", str(house.home), *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code

