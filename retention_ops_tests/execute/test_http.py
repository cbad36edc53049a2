"""One call, made once: every way it can go wrong and the error it becomes."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from retention_ops.execute.destinations.http import Http, content, retry_after
from retention_ops.execute.destinations.seam import Ambiguous, Rejected, Throttled
from retention_ops_tests.execute.servers.loopback import LoopbackServer, Reply, Request

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


class Scripted(LoopbackServer):
    """Answers what the test put into `reply`."""

    reply = Reply(200, {"ok": True})

    def handle(self, request: Request) -> Reply:
        return self.reply


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as running:
        yield running


@pytest.mark.parametrize(("fault", "error"), [
    ("lost_before", Ambiguous), ("lost_after", Ambiguous), ("500_before", Ambiguous), ("500_after", Ambiguous), ("503", Ambiguous),
    ("429", Throttled), ("slow_after", Ambiguous),
])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_fault_is_one_request_and_one_error(server: Scripted, method: str, fault: str, error: type[Exception]) -> None:
    server.fail(fault)
    with pytest.raises(error):
        Http(server.url, timeout=(5, server.patience(method, "/x"))).request(method, "/x")
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "error"), [
    (400, Rejected), (401, Rejected), (404, Rejected), (409, Rejected), (410, Rejected), (422, Rejected),
    (408, Ambiguous), (502, Ambiguous), (202, Ambiguous), (301, Rejected), (302, Rejected), (307, Rejected), (303, Ambiguous),
])
def test_a_status_nobody_expected(server: Scripted, status: int, error: type[Exception]) -> None:
    server.reply = Reply(status, {"message": "the reason"}, {"Location": f"{server.url}/elsewhere"})
    with pytest.raises(error, match=str(status)):
        Http(server.url).request("POST", "/x", json={})
    assert len(server.requests) == 1, "no redirect is followed"
    assert Http(server.url).request("POST", "/x", expect=(status,)).status_code == status


def test_nothing_listens_so_nothing_was_sent() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(Throttled, match="nothing was sent") as caught:
        Http(address).request("POST", "/secret-path")
    assert caught.value.retry_after == 30


def test_an_unknown_host_is_asked_again_later() -> None:
    with pytest.raises(Throttled, match="nothing was sent"):
        Http("http://no-such-host.invalid").request("POST", "/x")


@pytest.mark.parametrize("address", ["no-scheme.test/x", "ftp://host/x", "http://[bad", "http://"])
def test_an_address_that_cannot_be_called_is_refused_for_good(address: str) -> None:
    with pytest.raises(Rejected, match="cannot be sent"):
        Http(address).request("GET", "")


def test_a_credential_that_cannot_be_a_header_is_refused_without_naming_it() -> None:
    headers = {"Authorization": "Bearer tok\nen-canary"}
    with pytest.raises(Rejected) as caught:
        Http("http://127.0.0.1:1", headers=headers).request("GET", "/")
    assert "canary" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(("value", "seconds"), [
    ("17", 17), ("0", 1), ("-5", 1), ("1.5", 1.5), ("99999", 3600), ("inf", 3600), ("nan", 30), (None, 30), ("", 30), ("soon", 30),
    (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90), (format_datetime(NOW - timedelta(days=1), usegmt=True), 1),
    ("Sat, 99 Nov 2026 12:00:00 GMT", 30),
])
def test_retry_after_is_seconds_or_a_date_within_bounds(value: str | None, seconds: float) -> None:
    assert retry_after(value, lambda: NOW) == seconds


@pytest.mark.parametrize(("body", "quoted"), [
    ({"errorMessages": ["No project"], "errors": {"summary": "is required"}}, "No project; summary: is required"),
    ({"errors": [{"message": "project: Not a gid", "help": "see"}]}, "project: Not a gid"),
    ({"error": {"status": 400, "msg": "no such property"}}, "no such property"),
    (b"Queue is full", "Queue is full"),
    ({"message": "x" * 1000}, "x" * 299 + "…"),
    ({"message": "token s3cr3t-canary and ann@shop.test"}, "token [hidden] and [hidden]"),
    ({"message": f"{'y' * 290} s3cr3t-canary"}, f"{'y' * 290} [hidden]"),
])
def test_a_refusal_quotes_the_service_briefly_and_without_secrets(server: Scripted, body: object, quoted: str) -> None:
    server.reply = Reply(400, body)
    with pytest.raises(Rejected) as caught:
        Http(server.url, secrets=["s3cr3t-canary"], name="it").request("POST", "/x", json={"summary": "short"})
    assert str(caught.value) == f"it: answered 400: {quoted}"


@pytest.mark.parametrize("sent", [
    {"json": {"description": "Ann Smith has spent 4,000 with us"}}, {"data": b'{"d": "Ann Smith has spent 4,000 with us"}'},
    {"data": {"d": "Ann Smith has spent 4,000 with us"}},
])
def test_a_refusal_that_repeats_what_was_sent_is_not_quoted(server: Scripted, sent: dict[str, object]) -> None:
    server.reply = Reply(400, {"message": "cannot store: Ann Smith has spent 4,000 wi…"})
    with pytest.raises(Rejected) as caught:
        Http(server.url).request("POST", "/x", **sent)
    assert "Ann" not in str(caught.value) and "400" in str(caught.value)


def test_a_web_page_is_no_explanation(server: Scripted) -> None:
    server.reply = Reply(502, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
    with pytest.raises(Ambiguous) as caught:
        Http(server.url, name="it").request("POST", "/x")
    assert str(caught.value) == "it: answered 502"
    server.reply = Reply(200, b"<html>Sign in to the hotel's network</html>", {"Content-Type": "text/html"})
    with pytest.raises(Ambiguous, match="not JSON"):
        content(Http(server.url).request("GET", "/x"))


def test_a_netrc_file_does_not_replace_our_credential(server: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    Http(server.url, headers={"Authorization": "Bearer ours"}).request("GET", "/x")
    assert server.requests[0].headers["authorization"] == "Bearer ours"
