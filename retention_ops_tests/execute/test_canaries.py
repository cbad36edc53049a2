"""No secret and no personal data where they do not belong: canaries are planted, everything goes wrong once, then all is searched.

A whole response runs as Dagster jobs on a persistent instance, through the real clients, with DEBUG logging. Every destination fails
first, with answers that repeat what was sent, credentials included; later it succeeds, or the mail takes its place.

What is allowed: a secret in the credential's own place of a request to its own destination (an Authorization header, the hook's path,
a login); attributes and suppressions in the lake, which is where they were ingested to; opaque customer ids in packs and lists.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

from retention_ops.definitions import build_defs, build_loop
from retention_ops.execute import ledger
from retention_ops.execute.job import FOLLOW_UP_JOB, RESPONSE_JOB
from retention_ops.execute.story import action_events
from retention_ops.launch import instance
from retention_ops.log import runs
from retention_ops.log.database import ops_database
from retention_ops.settings import load_settings
from retention_ops.sources.ingest import ingest
from retention_ops_tests.execute.far import Time
from retention_ops_tests.execute.servers import jira as jira_server
from retention_ops_tests.execute.servers.jira import FakeJira
from retention_ops_tests.execute.servers.loopback import LoopbackServer, Reply, Request
from retention_ops_tests.execute.servers.mail import MailServer
from retention_ops_tests.execute.servers.sheets import SheetsServer
from retention_ops_tests.execute.servers.slack import CHANNEL, SlackServer
from retention_ops_tests.execute.servers.webhook import SECRET as WEBHOOK_SECRET
from retention_ops_tests.execute.servers.webhook import WebhookServer
from retention_ops_tests.execute.whole import Shop, computed
from retention_ops_tests.shops import lake_with, small_shop

SLACK_TOKEN = "xoxb-canary-slack-token-1111"
TICKET_TOKEN = "canary-ticket-token-2222"
APIKEY = "canary-make-apikey-3333"
SMTP_PASSWORD = "canary-smtp-password-4444"
PERSONAL = {
    "country": "Canaryland", "segment": "canary-segment", "loyalty_tier": "canary-loyalty", "acquisition_channel": "canary-channel",
    "reason": "canary-reason", "email": "canary.person@private.example", "phone": "+49-170-CANARY",
}
ROUNDS = 30
SERVERS_OWN = ("mail.log", "mail.debug")
"""what the mail server, which is the far side, writes about a login"""
TALKATIVE = ("markdown_it", "matplotlib", "PIL", "fontTools", "alembic", "sqlalchemy")
"""thousands of lines about everything but the response"""


class World:
    """Every destination's server, each failing first and repeating in its refusals whatever it was sent."""

    def __init__(self, stack: ExitStack, clock: Time):
        self.slack = stack.enter_context(SlackServer(clock=lambda: clock().timestamp()))
        self.slack.token = SLACK_TOKEN
        self.jira = stack.enter_context(FakeJira(now=lambda: clock().timestamp()))
        self.sheets = stack.enter_context(SheetsServer())
        self.webhook = stack.enter_context(WebhookServer("make", apikey=APIKEY, clock=clock))
        self.mail = stack.enter_context(MailServer(user="robot", password=SMTP_PASSWORD))
        self.servers: dict[str, LoopbackServer] = {
            "slack": self.slack, "jira": self.jira, "sheets": self.sheets, "webhook": self.webhook,
        }

    def fail(self) -> None:
        """Lost answers and refusals by turns, then echoes; the webhook never recovers, so that the mail takes its place."""
        for number, fault in enumerate(("lost_after", "503", "429", "lost_before", "500_after")):
            for server in (self.slack, self.jira, self.sheets):
                server.fail(fault, times=1 + number % 2)
        echo(self.slack, 500, 3)
        echo(self.jira, 500, 2)
        echo(self.sheets, 503, 3)
        self.webhook.fail("429")
        echo(self.webhook, 410, 99)
        self.mail.replies["DATA"] = "451 4.7.1 later, said robot with the password " + SMTP_PASSWORD

    def recover(self) -> None:
        self.mail.replies.clear()

    def environment(self) -> dict[str, str]:
        return {
            "SLACK_TOKEN": SLACK_TOKEN, "TICKET_TOKEN": TICKET_TOKEN, "GOOGLE_CREDENTIALS": self.sheets.credentials(),
            "WEBHOOK_URL": self.webhook.hook, "WEBHOOK_SECRET": WEBHOOK_SECRET, "WEBHOOK_APIKEY": APIKEY, "SMTP_PASSWORD": SMTP_PASSWORD,
        }

    def settings(self, home: Path) -> dict[str, object]:
        return {
            "home": home, "mode": "live", "min_sample": 10, "shop_name": "Small shop", "messages_to": "slack", "slack_channel": CHANNEL,
            "slack_api_url": self.slack.api_url, "tickets_to": "jira", "ticket_url": self.jira.url, "ticket_user": jira_server.USER,
            "ticket_project": "RET", "lists_to": "sheets", "sheets_spreadsheet": "book", "sheets_api_url": self.sheets.url,
            "webhook_to": "make", "smtp_host": "127.0.0.1", "smtp_port": self.mail.port, "smtp_security": "none", "smtp_user": "robot",
            "mail_from": "retention@shop.example", "mail_to": "team@shop.example",
        }


def echo(server: LoopbackServer, status: int, times: int) -> None:
    """The next answers that are no fault repeat the request, headers and body, as a careless service or proxy does."""
    handle, left = server.handle, [times]

    def careless(request: Request) -> Reply:
        if left[0] <= 0 or request.path == "/token":
            return handle(request)
        left[0] -= 1
        words = f"{request.method} {request.path} {json.dumps(request.headers)} {request.body.decode(errors='replace')}"
        return Reply(status, {"error": {"message": words, "status": "UNAVAILABLE"}, "errorMessages": [words], "message": words})

    server.handle = careless


class RunningTime(Time):
    """A clock that can be set forward, and goes on by itself: the jobs wait in earnest."""

    def __call__(self) -> datetime:
        return self.now + timedelta(seconds=time.monotonic())


@pytest.fixture
def clock():
    return RunningTime(datetime(2026, 7, 1, 10, tzinfo=UTC))


@pytest.fixture
def world(clock, monkeypatch):
    monkeypatch.setattr(jira_server, "TOKEN", TICKET_TOKEN)
    with ExitStack() as stack:
        world = World(stack, clock)
        for name, value in world.environment().items():
            monkeypatch.setenv(f"RETENTION_OPS_{name}", value)
        yield world


@pytest.fixture
def shop(tmp_path):
    """The small shop with attributes, suppressions and order files that hold what is nobody's business."""
    home = tmp_path / "home"
    orders = small_shop()
    customers = sorted(set(orders["customer_id"]))
    attributes = {name: PERSONAL[name] for name in ("country", "segment", "loyalty_tier", "acquisition_channel")}
    lake = lake_with(orders, home, min_sample=10, shop_name="Small shop",
                     customers=pd.DataFrame({"customer_id": customers} | attributes | {"email": PERSONAL["email"], "consent": "yes"}))
    source = tmp_path / "source"
    source.mkdir()
    (source / "do_not_contact.csv").write_text(f"customer_id,reason,phone\n{customers[0]},{PERSONAL['reason']},{PERSONAL['phone']}\n")
    ingest([source / "do_not_contact.csv"], "suppressions", lake.settings)
    more = pd.DataFrame({"order_id": ["extra1"], "customer_id": [customers[0]], "order_date": [orders["order_date"].max()],
                         "order_amount": ["10.00"], "customer_email": [PERSONAL["email"]]})
    more.to_csv(source / "more.csv", index=False)
    ingest([source / "more.csv"], "orders", lake.settings)
    for path in (home / "orders.csv", home / "customers.csv"):
        path.unlink()  # the shop's own exports, which the test put there
    return computed(lake)


def secrets_of(world: World) -> dict[str, str]:
    """Every form in which a secret could show."""
    pair = base64.b64encode(f"{jira_server.USER}:{TICKET_TOKEN}".encode()).decode()
    key = world.sheets.private_key
    return {
        "slack token": SLACK_TOKEN, "ticket token": TICKET_TOKEN, "ticket login": pair, "google key": key.splitlines()[3],
        "webhook address": "canary-of-the-address", "webhook secret": WEBHOOK_SECRET.removeprefix("whsec_"), "make apikey": APIKEY,
        "smtp password": SMTP_PASSWORD, "smtp login": base64.b64encode(SMTP_PASSWORD.encode()).decode().rstrip("="),
        "smtp login, plain": base64.b64encode(f"\0robot\0{SMTP_PASSWORD}".encode()).decode().rstrip("="), "google token": "ya29.token-",
    }


def answer(world: World, shop: Shop, clock: Time) -> list[str]:
    """The response job and its follow-ups on the home's own Dagster instance, until nothing is open; the texts of what they raised."""
    settings = load_settings(**world.settings(shop.home))
    loop = build_loop(settings, clock)
    defs, raised = build_defs(settings, loop), []
    with instance(settings) as stored:
        days = {"ops": {"gate": {"config": {"alert_dates": [shop.day.isoformat()]}}}}
        for number in range(ROUNDS):
            name, config = (RESPONSE_JOB, days) if number == 0 else (FOLLOW_UP_JOB, {})
            result = defs.resolve_job_def(name).execute_in_process(instance=stored, run_config=config, raise_on_error=False)
            raised += [str(event) for event in result.all_events]
            with ops_database(settings) as engine:
                if number and not ledger.find(engine, state=ledger.OPEN_STATES):
                    return raised
            clock.now += timedelta(minutes=11)
            if number == 3:
                world.recover()
    raise AssertionError("the response never ended")


def found_in(text: str, canaries: dict[str, str]) -> list[str]:
    return [name for name, canary in canaries.items() if canary in text]


def files_of(home: Path) -> Iterator[tuple[str, str]]:
    """Every file of the home as text, the lake's tables apart; Dagster's event storage and the ops database among them."""
    for path in sorted(home.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield str(path.relative_to(home)), path.read_bytes().decode("utf-8", "replace")


def test_no_canary_sings(world, shop, clock, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    for name in (*SERVERS_OWN, *TALKATIVE):
        caplog.set_level(logging.CRITICAL if name in SERVERS_OWN else logging.INFO, logger=name)
    clock.now = shop.next_morning - timedelta(seconds=time.monotonic())
    world.fail()
    raised = answer(world, shop, clock)
    said = capfd.readouterr()
    secrets, everything = secrets_of(world), secrets_of(world) | PERSONAL

    assert_the_story_was_worth_it(world, shop)
    places = {"log": caplog.text, "stdout": said.out, "stderr": said.err, "events": "\n".join(raised)}
    for record in caplog.records:
        name = f"log of {record.name}"
        places[name] = f"{places.get(name, '')}{record.getMessage()} {record.exc_text or ''}\n"
    songs = {place: found for place, text in places.items() if (found := found_in(text, everything))}
    assert songs == {}
    assert "RUN_SUCCESS" in said.err, "Dagster's own log was not searched"
    assert_files_are_silent(shop.home, secrets)
    assert_requests_are_silent(world, secrets)


def assert_the_story_was_worth_it(world, shop):
    """Everything failed and then happened: otherwise silence proves nothing."""
    with ops_database(load_settings(**world.settings(shop.home))) as engine:
        rows = {(row["slot"], row["kind"]): row for row in ledger.find(engine)}
        assert {state: [name for name, row in rows.items() if row["state"] == state] for state in {row["state"] for row in rows.values()}} \
            == {ledger.SENT: [name for name in rows if name != ("webhook", "post")], ledger.FAILED: [("webhook", "post")]}
        for name in (("slack", "post"), ("ticket", "create"), ("sheets", "publish"), ("mail", "mail")):
            events = len(action_events(engine, rows[name]["key"]))
            assert rows[name]["attempts"] > 1 or events > 4, f"{name} met no fault"
        log = runs.rows(engine)
        assert log[-1]["status"] in ("success", "failed") and any(row["error_message"] for row in log)
    assert len(world.mail.accepted) == 1 and len(world.jira.issues) == 1
    assert len([message for message in world.slack.messages if message["metadata"]]) == 1


def assert_files_are_silent(home, secrets):
    """Secrets nowhere; personal data only in the lake, which holds what was ingested."""
    songs = {}
    for name, text in files_of(home):
        canaries = secrets if name.startswith("lake/") else secrets | PERSONAL
        if found := found_in(text, canaries):
            songs[name] = found
    assert songs == {}
    assert any(name.startswith("dagster/") for name, _ in files_of(home)), "Dagster's storage was not searched"


def assert_requests_are_silent(world, secrets):
    """A credential travels where it belongs and nowhere else: no body holds one, no header of another destination."""
    own = {
        "slack": {"slack token"}, "jira": {"ticket token", "ticket login"}, "sheets": {"google token"},
        "webhook": {"webhook address", "make apikey"},
    }
    for name, server in world.servers.items():
        assert server.requests, name
        for request in server.requests:
            body = request.body.decode("utf-8", "replace")
            assert found_in(body, secrets | PERSONAL) == [], f"the body of {name} {request.path}"
            outside = json.dumps(request.headers) + request.path + json.dumps(request.query)
            assert set(found_in(outside, secrets | PERSONAL)) <= own[name], f"headers or address of {name} {request.path}"
    for accepted in world.mail.accepted:
        text = accepted.message.as_string() + "".join(
            part.get_content() for part in accepted.message.walk() if part.get_content_type() in ("text/plain", "text/html"))
        assert found_in(text, secrets | PERSONAL) == []


def test_the_search_finds_what_is_planted(tmp_path, world):
    """The search itself: a secret in a file, and one in an error that redact never saw, are found."""
    (tmp_path / "ops.sqlite").write_bytes(b"\x00\xff" + SLACK_TOKEN.encode() + b"\x00")
    with pytest.raises(AssertionError, match="slack token"):
        assert_files_are_silent(tmp_path, secrets_of(world))
