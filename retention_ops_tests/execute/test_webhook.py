"""The signed POST: what it carries, which answers count as delivered, and that its address never leaks."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from retention_ops.errors import SettingsError
from retention_ops.execute.destinations.seam import Ambiguous, CannotTell, Outgoing, Rejected, Throttled
from retention_ops.execute.destinations.webhook import MAX_BYTES, Webhook
from retention_ops.settings import Secrets, load_settings
from retention_ops_tests.execute.servers.loopback import Reply, patient
from retention_ops_tests.execute.servers.webhook import SECRET, WebhookServer, resend

KEY = "0123456789abcdef" * 2
POST = Outgoing(KEY, "post", "", {"schema": 1, "title": "Zoë", "counts": {"p1": 3, "p2": 5}})
NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
CANARIES = ("canary-of-the-address", SECRET, SECRET[6:20], "canary-apikey")


@pytest.fixture
def server():
    with WebhookServer(clock=lambda: NOW) as running:
        running.delay = 3
        yield running


def connect(server, vendor="generic", url=None, clock=lambda: NOW, apikey="", **changes):
    server.vendor = vendor
    settings = load_settings(webhook_to=vendor, **changes)
    secrets = Secrets(webhook_url=url or server.hook, webhook_secret=SECRET, webhook_apikey=apikey or None)
    webhook = Webhook.connect(settings, secrets, "live", clock)
    patient(webhook._http, server)
    return webhook


def test_a_post_is_signed_canonical_and_carries_the_key_as_id(server):
    receipt = connect(server).send(POST)
    (request,) = server.requests
    assert server.accepted == [POST.payload]
    assert request.body == '{"counts":{"p1":3,"p2":5},"schema":1,"title":"Zoë"}'.encode()
    assert request.headers["webhook-id"] == request.headers["idempotency-key"] == KEY
    assert request.headers["webhook-timestamp"] == str(int(NOW.timestamp()))
    assert receipt.external_id == f"receipt-{KEY[:8]}" and receipt.url is None


def test_the_clock_may_be_in_any_zone(server):
    there = NOW.astimezone(timezone(timedelta(hours=5, minutes=30)))
    connect(server, clock=lambda: there).send(POST)
    assert len(server.accepted) == 1


@pytest.mark.parametrize("changes", [
    {"body": {"schema": 2}}, {"webhook-id": "another"}, {"webhook-timestamp": str(int(NOW.timestamp()) + 1)},
    {"webhook-signature": "v1,AAAA"},
], ids=["body", "id", "time", "signature"])
def test_a_tampered_request_is_refused_by_the_library(server, changes):
    connect(server).send(POST)
    assert resend(server, server.requests[0], **changes).status == 401
    assert resend(server, server.requests[0]).status == 202


@pytest.mark.parametrize("minutes", [-6, 6])
def test_a_signature_of_another_time_is_refused(server, minutes):
    with pytest.raises(Rejected, match="401"):
        connect(server, clock=lambda: NOW + timedelta(minutes=minutes)).send(POST)
    assert server.accepted == []


@pytest.mark.parametrize("vendor, answer, error", [
    ("make", Reply(200, b"Accepted"), None),
    ("make", Reply(202, b"Accepted"), Ambiguous),
    ("make", Reply(400, b"Queue is full."), Throttled),
    ("make", Reply(400, b"Bad request"), Rejected),
    ("make", Reply(410, b"There is no scenario listening for this webhook."), Rejected),
    ("make", Reply(429, b"Too many requests"), Throttled),
    ("make", Reply(500, b"Scenario failed to complete."), Ambiguous),
    ("zapier", Reply(200, {"status": "success", "id": "z-1"}), None),
    ("zapier", Reply(200, {"status": "error"}), Ambiguous),
    ("zapier", Reply(200, b"<html>"), Ambiguous),
    ("zapier", Reply(429, {}), Throttled),
    ("zapier", Reply(404, {}), Rejected),
    ("generic", Reply(200, b""), None),
    ("generic", Reply(204, b""), None),
    ("generic", Reply(400, b"queue is full"), Rejected),
    ("generic", Reply(401, {}), Rejected),
    ("generic", Reply(408, {}), Ambiguous),
    ("generic", Reply(409, {}), Ambiguous),
    ("generic", Reply(425, {}), Throttled),
    ("generic", Reply(302, b"", {"Location": "/done"}), Ambiguous),
    ("generic", Reply(301, b"", {"Location": "/elsewhere"}), Rejected),
    ("generic", Reply(503, {}), Ambiguous),
])
def test_every_answer_has_one_meaning(server, vendor, answer, error):
    server.answer = answer
    webhook = connect(server, vendor)
    if error is None:
        webhook.send(POST)
    else:
        with pytest.raises(error):
            webhook.send(POST)
    assert len(server.requests) == 1


def test_a_gone_hook_and_a_full_queue_say_what_to_do(server):
    server.answer = Reply(410, b"")
    with pytest.raises(Rejected, match="attach it to a scenario"):
        connect(server, "make").send(POST)
    server.answer = Reply(400, b"Queue is full")
    with pytest.raises(Throttled) as caught:
        connect(server, "make").send(POST)
    assert caught.value.retry_after == 60


def test_make_gets_its_key(server):
    server.apikey = "canary-apikey"
    with pytest.raises(Rejected, match="RETENTION_OPS_WEBHOOK_APIKEY"):
        connect(server, "make").send(POST)
    assert connect(server, "make", apikey="canary-apikey").send(POST).external_id == KEY


def test_a_receipt_takes_short_plain_words_and_nothing_else(server):
    server.answer = Reply(200, {"id": "run-7", "slack_message_ts": "1700000000.123456", "ticket": "OPS-12", "email": "ann@example.com"})
    receipt = connect(server).send(POST)
    assert receipt.external_id == "run-7"
    assert receipt.detail == {"receipt": "run-7", "slack_ts": "1700000000.123456", "ticket_id": "OPS-12"}
    server.answer = Reply(200, {"id": "x" * 65, "ts": 17, "slack_ts": "a\nb", "ticket_id": "<b>", "ticket_key": "OPS-13"})
    receipt = connect(server).send(POST)
    assert (receipt.external_id, receipt.detail) == (KEY, {"ticket_id": "OPS-13"})
    server.answer = Reply(200, ["id"])
    assert connect(server).send(POST).detail == {}


@pytest.mark.parametrize("fault", ["lost_after", "slow_after", "500_after"])
def test_a_lost_answer_is_sent_again_to_a_receiver_that_drops_repeats(server, fault):
    server.dedupes = True
    webhook = connect(server, webhook_dedupes=True)
    assert webhook.lookups["post"].repeatable
    server.fail(fault)
    with pytest.raises(Ambiguous):
        webhook.send(POST)
    assert webhook.send(POST).external_id == f"receipt-{KEY[:8]}"
    assert len(server.requests) == 2 and server.accepted == [POST.payload]


@pytest.mark.parametrize("fault", ["lost_before", "lost_after", "slow_before", "slow_after", "500_before", "500_after", "503"])
def test_without_that_a_lost_answer_waits_for_a_human(server, fault):
    webhook = connect(server)
    server.fail(fault)
    with pytest.raises(Ambiguous):
        webhook.send(POST)
    assert len(server.requests) == 1
    lookup = webhook.lookups["post"]
    assert (lookup.repeatable, lookup.absent) == (False, "hold")
    with pytest.raises(CannotTell, match="cannot be asked"):
        webhook.find_by_key(POST)


def test_a_crowded_or_absent_receiver_was_not_given_anything(server):
    server.fail("429", retry_after="17")
    with pytest.raises(Throttled) as caught:
        connect(server).send(POST)
    assert caught.value.retry_after == 17
    with pytest.raises(Throttled):
        connect(server, url="http://127.0.0.1:9/hook").send(POST)
    assert server.accepted == []


@pytest.mark.parametrize("vendor", MAX_BYTES)
def test_a_payload_above_the_vendors_limit_is_not_sent(server, vendor):
    with pytest.raises(Rejected, match="takes"):
        connect(server, vendor).send(replace(POST, payload={"x": "y" * MAX_BYTES[vendor]}))
    assert server.requests == []


@pytest.mark.parametrize("payload", [{"x": float("nan")}, {"x": object()}, {"x": "\ud800"}])
def test_what_is_not_json_is_not_sent(server, payload):
    with pytest.raises(Rejected):
        connect(server).send(replace(POST, payload=payload))
    assert server.requests == []


@pytest.mark.parametrize("url", [
    "http://hooks.example/canary-of-the-address", "canary-of-the-address", "ftp://127.0.0.1/canary-of-the-address",
    "https://a:canary-of-the-address@hooks.example/", "https://hooks.example:canary-of-the-address/", "https://hooks.example/#canary",
])
def test_an_unsafe_address_is_refused_without_quoting_it(server, url):
    with pytest.raises(SettingsError, match="RETENTION_OPS_WEBHOOK_URL") as caught:
        connect(server, url=url)
    assert "canary" not in str(caught.value)


def test_missing_or_mistyped_secrets_are_named(server):
    settings = load_settings(webhook_to="make")
    for secrets, name in (
        (Secrets(), "RETENTION_OPS_WEBHOOK_URL"),
        (Secrets(webhook_url=server.hook), "RETENTION_OPS_WEBHOOK_SECRET"),
        (Secrets(webhook_url=server.hook, webhook_secret="whsec_not base64!"), "RETENTION_OPS_WEBHOOK_SECRET"),
        (Secrets(webhook_url=server.hook, webhook_secret="whsec_Y2Fu!!!!YXJ5"), "RETENTION_OPS_WEBHOOK_SECRET"),
        (Secrets(webhook_url=server.hook, webhook_secret="whsec_"), "RETENTION_OPS_WEBHOOK_SECRET"),
    ):
        with pytest.raises(SettingsError, match=name):
            Webhook.connect(settings, secrets, "live")


def test_check_sends_nothing_and_names_a_weak_secret(server):
    findings = {finding.subject: finding for finding in connect(server).check()}
    assert findings["webhook address"].ok and findings["webhook secret"].ok
    assert findings["webhook receiver"].ok is None
    weak = Webhook(server.hook, "whsec_c2hvcnQ=")
    assert {finding.subject: finding.ok for finding in weak.check()}["webhook secret"] is False
    assert server.requests == []


def test_no_error_finding_or_receipt_holds_address_secret_or_key(server):
    webhook = connect(server, apikey="canary-apikey")
    kept = [repr(webhook.check()), repr(webhook.send(POST))]
    for fault in ("lost_before", "slow_before", "500_before", "429"):
        server.fail(fault)
        with pytest.raises((Ambiguous, Throttled)) as caught:
            webhook.send(POST)
        kept += [str(caught.value), repr(caught.value.__cause__)]
    echo = f"no hook at {server.hook} for {SECRET} with canary-apikey".encode()
    for status in (400, 404, 500, 301):
        server.answer = Reply(status, echo)
        with pytest.raises((Rejected, Ambiguous)) as caught:
            webhook.send(POST)
        kept.append(str(caught.value))
    with pytest.raises(Throttled) as caught:
        connect(server, url="http://127.0.0.1:9/canary-of-the-address").send(POST)
    kept.append(str(caught.value))
    assert not [text for text in kept if any(canary in text for canary in CANARIES)]


def test_only_post_is_understood(server):
    webhook = connect(server)
    for call in (webhook.update, lambda action: webhook.send(replace(action, kind="mail"))):
        with pytest.raises(Rejected):
            call(POST)
