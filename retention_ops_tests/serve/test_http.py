"""The server over HTTP, on a real socket: tokens, scopes, Host, Origin, body size, and whole sessions in both eras."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import anyio
import httpx2
import pytest
import uvicorn
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from retention_ops.serve.caller import Tokens, parse_tokens
from retention_ops.serve.http import MAX_BODY_BYTES, build_app
from retention_ops.serve.server import build_server
from retention_ops_tests.serve.house import DAY, answer, opened, says
from retention_ops_tests.test_ui import free_port

ADA, BOARD = "ada-0123456789-0123456789-0123456789", "board-0123456789-0123456789-01234567"
PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
JSON = {"accept": "application/json, text/event-stream", "content-type": "application/json"}


@pytest.fixture(scope="module")
def site(served, tmp_path_factory):
    """A site for everything that changes nothing."""
    with listening(served, tmp_path_factory.mktemp("http")) as made:
        yield made


@contextmanager
def listening(served, folder):
    """(house, address) of a server on a free port, with two tokens."""
    with opened(served, folder) as house:
        port = free_port()
        tokens = Tokens(parse_tokens(f"ada:read+actions:{ADA},board:read:{BOARD}"))
        app = build_app(build_server(house.desk, tokens=tokens), "127.0.0.1", port, ["retention.example.com"])
        running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
        thread = threading.Thread(target=running.run, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.05)
        yield house, f"http://127.0.0.1:{port}/mcp"
        running.should_exit = True
        thread.join(10)


def session(url, token, script, mode, **client):
    """Runs `script` on a client that bears `token`."""

    async def run():
        async with (
            httpx2.AsyncClient(headers={"Authorization": f"Bearer {token}"}, timeout=30) as http,
            Client(streamable_http_client(url, http_client=http), mode=mode, **client) as connected,
        ):
            return await script(connected)

    return anyio.run(run)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_a_whole_session_with_a_token(served, tmp_path, mode):
    asked: list[str] = []

    async def morning(client):
        names = [tool.name for tool in (await client.list_tools()).tools]
        alert = answer(await client.call_tool("get_alert_decision", {"date": str(DAY)}))
        queue = answer(await client.call_tool("build_priority_queue", {"date": str(DAY)}))
        playbook = answer(await client.call_tool("trigger_playbook", {"date": str(DAY), "severity": alert["severity"]}))
        return names, alert, queue, playbook

    with listening(served, tmp_path) as (house, url):
        names, alert, queue, playbook = session(url, ADA, morning, mode, elicitation_callback=says(True, asked))
        assert len(names) == 9 and alert["severity"] == "CRITICAL" and queue["status"] == "done"
        assert playbook["status"] == "triggered" and playbook["incident"] == 1 and len(asked) == 1
        assert {event["actor"] for event in house.events("mcp_call", "mcp_asked")} == {"mcp:ada"}
        requested = {tag["value"] for run in house.dagster.runs for tag in run["tags"] if tag["key"] == "retention_ops/requested_by"}
        assert requested == {"mcp:ada"} and len(house.dagster.runs) == 2


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_a_token_without_the_scope_neither_sees_nor_calls_actions(site, mode):
    house, url = site

    async def tries(client):
        names = [tool.name for tool in (await client.list_tools()).tools]
        return names, answer(await client.call_tool("build_priority_queue", {"date": str(DAY)}))

    before = len(house.rows())
    names, refused = session(url, BOARD, tries, mode)
    assert "build_priority_queue" not in names and "get_alert_decision" in names
    assert "mcp:board may not call build_priority_queue: the token has no scope actions" in refused
    assert len(house.rows()) == before and house.events("mcp_call")[-1]["outcome"] == "refused"


def _post(url, body=PING, **headers):
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    return httpx2.post(url, headers={**JSON, "authorization": f"Bearer {ADA}", **headers}, timeout=10, **content)


def test_without_a_token_nothing_is_answered(site):
    _, url = site
    for headers in ({"authorization": ""}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {ADA}"}):
        refused = _post(url, **headers)
        assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Bearer") and ADA not in refused.text


def test_the_host_and_the_origin_are_checked(site):
    _, url = site
    assert _post(url, host="evil.example.com").status_code == 421
    assert _post(url, host="127.0.0.1:1").status_code == 421
    assert _post(url, origin="http://evil.example.com").status_code == 403
    for host in ("retention.example.com", "retention.example.com:8443"):
        assert _post(url, host=host).status_code not in (401, 403, 421)


def test_a_body_has_a_limit(site):
    _, url = site
    assert _post(url, b" " * (MAX_BODY_BYTES + 1)).status_code == 413
    assert _post(url, b"{not json").status_code == 400


def test_nothing_else_is_served(site):
    _, url = site
    for path in ("/", "/docs", "/sse", "/.well-known/oauth-authorization-server"):
        assert httpx2.get(url.removesuffix("/mcp") + path, timeout=10).status_code == 404
