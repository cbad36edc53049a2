"""Every call is in the audit log with the caller's identity, and nothing in it that should not be kept."""

from __future__ import annotations

import json

import anyio
import pytest
import sqlalchemy as sa
from mcp.shared.exceptions import MCPError

from retention_ops.errors import SettingsError
from retention_ops.serve.caller import parse_tokens
from retention_ops.settings import Secrets
from retention_ops_tests.serve.house import DAY, Refusal

TOKEN = "canary-token-0123456789-0123456789-abcdef"


def test_every_call_is_logged_with_its_caller_and_outcome(house):
    house.call("get_alert_decision", date=str(DAY))
    house.call("get_alert_decision", date="2031-01-01")
    house.call("get_alert_decision", dat=str(DAY))
    house.call("no_such_tool")
    logged = house.events("mcp_call")
    assert [(event["what"], event["outcome"]) for event in logged] == [
        ("get_alert_decision", "ok"), ("get_alert_decision", "failed"), ("get_alert_decision", "refused"), ("no_such_tool", "refused")]
    assert {event["actor"] for event in logged} == {logged[0]["actor"]} and logged[0]["actor"].startswith("mcp:stdio:")
    assert logged[0]["arguments"] == {"date": str(DAY)} and logged[0]["protocol"] == "2026-07-28" and logged[2]["arguments"] == {}


def test_a_write_tool_is_logged_before_it_acts_and_after(house):
    house.call("build_priority_queue", date=str(DAY))
    names = [event["event"] for event in house.events("mcp_asked", "planned", "sending", "sent", "mcp_call")]
    assert names == ["mcp_asked", "planned", "sending", "sent", "mcp_call"]


def test_resources_and_prompts_are_logged_too(house):
    async def reads(client):
        await client.read_resource(f"retention-ops://briefs/{DAY}")
        await client.get_prompt("morning_check", {})
        with pytest.raises(MCPError):
            await client.read_resource("retention-ops://briefs/2031-01-01")
        with pytest.raises(MCPError, match="YYYY-MM-DD"):
            await client.get_prompt("incident_review", {"date": "soon"})
        with pytest.raises(MCPError, match="Unknown prompt"):
            await client.get_prompt("poem", {})

    house.session(reads)
    assert [(event["method"], event["outcome"]) for event in house.events("mcp_call")] == [
        ("resources/read", "ok"), ("prompts/get", "ok"), ("resources/read", "error"), ("prompts/get", "error"), ("prompts/get", "error")]


def test_no_secret_and_no_free_text_is_kept(house, monkeypatch):
    monkeypatch.setenv("RETENTION_OPS_SLACK_TOKEN", "xoxb-canary-of-slack")
    house.call("explain_customer", customer_id="Jane Doe jane.doe@example.com " + "x" * 150, date=str(DAY))
    house.call("get_alert_decision", date=str(DAY), note="the customer Jane Doe called")
    house.call("explain_customer", customer_id="xoxb-canary-of-slack", date=str(DAY))
    house.call("x" * 500)
    kept = json.dumps([dict(event) for event in house.events("mcp_call")], default=str)
    assert "jane.doe@example.com" not in kept and "called" not in kept and "canary" not in kept
    assert max(len(event["detail"]) for event in house.events("mcp_call")) < 600


def test_a_cancelled_call_is_logged_and_what_it_asked_for_stands(house):
    house.changes["mcp_wait_seconds"] = 60
    house.dagster.status = "STARTED"

    async def leaves(client):
        with anyio.move_on_after(1.5):
            await client.call_tool("build_priority_queue", {"date": str(DAY)})
        await client.call_tool("get_alert_decision", {"date": str(DAY)})  # the connection is still good

    house.session(leaves)
    assert [event["outcome"] for event in house.events("mcp_call")] == ["cancelled", "ok"]
    assert [row["state"] for row in house.rows()] == ["sent"] and len(house.dagster.runs) == 1


def test_where_the_log_cannot_be_written_nothing_is_done(house):
    with house.engine.begin() as connection:
        connection.execute(sa.text(
            "CREATE TRIGGER full BEFORE INSERT ON ops_events WHEN NEW.event LIKE 'mcp_%' BEGIN SELECT RAISE(ABORT, 'disk full'); END"))
    refused = house.call("build_priority_queue", date=str(DAY))
    assert isinstance(refused, Refusal) and "audit log cannot be written" in refused and house.rows() == [] and house.dagster.runs == []
    assert "audit log cannot be written" in house.call("get_alert_decision", date=str(DAY))


def test_tokens_are_read_from_the_environment_and_never_repeated():
    tokens = parse_tokens(f"ada:read+actions:{TOKEN}, board:read:{TOKEN[::-1]}")
    assert [(token.name, token.scopes) for token in tokens] == [("ada", ("read", "actions")), ("board", ("read",))]
    for wrong in ("ada", f"ada:write:{TOKEN}", "ada:read:short", f"a b:read:{TOKEN}", f"ada:actions:{TOKEN}",
                  f"ada:read:{TOKEN},ada:read:{TOKEN}", ""):
        with pytest.raises(SettingsError) as refused:
            parse_tokens(wrong)
        assert TOKEN not in str(refused.value)
    secrets = Secrets(mcp_tokens=f"ada:read:{TOKEN}")
    assert TOKEN in secrets.values() and TOKEN not in repr(secrets)
