"""What reaches Slack, what every fault on the way means, and what is found again afterwards."""

from __future__ import annotations

import logging
import re
import socket
import ssl
import traceback
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from urllib.error import URLError

import pytest
from pydantic import SecretStr
from slack_sdk import WebClient

from retention_ops.errors import SettingsError
from retention_ops.execute.destinations.seam import Ambiguous, CannotTell, Destination, Outgoing, Rejected, Throttled
from retention_ops.execute.destinations.slack import EVENT_TYPE, Slack
from retention_ops.settings import Secrets
from retention_ops_tests.conftest import settings_for
from retention_ops_tests.execute.servers.loopback import Reply
from retention_ops_tests.execute.servers.slack import BOT, CHANNEL, MEMBER, TOKEN, SlackServer, channel

KEY = "0123456789abcdef0123456789abcdef"
OTHER_KEY = "f" * 32
PNG = b"\x89PNG not really"
BODY_WORD = "Nordlicht-9000"
"""stands in every payload: no error may repeat it"""
POST = "chat.postMessage"


@pytest.fixture
def server():
    with SlackServer() as running:
        running.delay = 0.7
        yield running


@pytest.fixture
def slack(server, tmp_path):
    return connect(server, tmp_path)


def connect(server, home, *, token=TOKEN, timeout=5, mode="live", **settings):
    settings = {"slack_channel": CHANNEL, "slack_api_url": server.api_url, **settings}
    return Slack.connect(settings_for(home, **settings), Secrets(slack_token=SecretStr(token)), mode, timeout=timeout)


def section(text):
    return {"type": "section", "text": {"type": "mrkdwn", "text": text, "verbatim": True}}


def action(kind="post", parent=None, key=KEY, target=CHANNEL, **payload):
    text = f"At-risk customers rose, {BODY_WORD}"
    payload = {"title": "Trend"} if kind == "chart" else {"text": text, "blocks": [section(text)], **payload}
    files = {"at_risk_trend.png": PNG} if kind == "chart" else {}
    return Outgoing(key, kind, target, payload, parent, datetime.now(UTC), files)


def assert_tells_nothing(error):
    """Neither the message nor the traceback of a failed call holds the token or what was sent."""
    shown = "".join(traceback.format_exception(error))
    assert TOKEN not in shown
    assert BODY_WORD not in shown


# what reaches Slack


def test_a_post_stands_in_the_channel_with_its_mark_and_its_address(slack, server):
    receipt = slack.send(action())
    message, = server.messages
    assert receipt.external_id == message["ts"]
    assert receipt.url == f"https://acme.slack.com/archives/{CHANNEL}/p{message['ts'].replace('.', '')}"
    assert receipt.detail == {"channel": CHANNEL}
    assert message["metadata"] == {"event_type": EVENT_TYPE, "event_payload": {"key": KEY}}
    assert message["sent"] == {"link_names": False, "parse": "none", "unfurl_links": False, "unfurl_media": False}


def test_an_action_without_a_target_goes_to_the_channel_of_the_settings(slack, server):
    slack.send(action(target=""))
    assert server.messages[0]["channel"] == CHANNEL


def test_pilot_posts_into_the_test_channel(server, tmp_path):
    server.channels["C0TEST"] = channel("retention-test")
    connect(server, tmp_path, mode="pilot", slack_test_channel="C0TEST").send(action(target=""))
    assert server.messages[0]["channel"] == "C0TEST"


def test_a_message_without_an_address_was_sent_all_the_same(slack, server):
    server.fail("500_before", "getPermalink")
    receipt = slack.send(action())
    assert (receipt.external_id, receipt.url) == (server.messages[0]["ts"], None)


def test_a_reply_stands_in_the_thread_and_in_the_channel_only_when_asked(slack, server):
    parent = slack.send(action()).external_id
    slack.send(action("reply", parent, key="a" * 32))
    slack.send(action("reply", parent, key="b" * 32, broadcast=True))
    assert [message["thread_ts"] for message in server.messages[1:]] == [parent, parent]
    assert [message["subtype"] for message in server.messages[1:]] == [None, "thread_broadcast"]


def test_a_chart_is_a_file_in_the_thread_with_the_mark_in_its_title(slack, server):
    parent = slack.send(action()).external_id
    receipt = slack.send(action("chart", parent))
    file, = server.messages[1]["files"]
    assert server.messages[1]["thread_ts"] == parent
    assert file["title"] == "Trend [retention-ops 0123456789ab]"
    assert server.files[file["id"]]["content"] == PNG
    assert (receipt.external_id, receipt.url) == (file["id"], file["permalink"])


@pytest.mark.parametrize("kind", ["reply", "chart", "update"])
def test_what_belongs_to_a_message_is_never_sent_without_it(slack, server, kind):
    """Without its parent a reply would be a second message in the channel."""
    with pytest.raises(Rejected, match="needs the message"):
        slack.update(action(kind)) if kind == "update" else slack.send(action(kind))
    assert not server.requests


def test_unknown_kinds_and_several_files_are_refused_unsent(slack, server):
    with pytest.raises(Rejected, match="cannot send 'delete'"):
        slack.send(action("delete"))
    with pytest.raises(Rejected, match="one file"):
        slack.send(replace(action("chart", "1.0"), files={"a.png": PNG, "b.png": PNG}))
    assert not server.requests


def test_the_same_update_twice_leaves_one_message_with_the_new_text(slack, server):
    parent = slack.send(action()).external_id
    changed = action("update", parent, key=OTHER_KEY, text="Acknowledged", blocks=[section("Acknowledged")])
    assert slack.update(changed) == slack.update(changed)
    message, = server.messages
    assert (message["ts"], message["text"], message["updates"]) == (parent, "Acknowledged", 2)
    assert slack.lookups["update"].repeatable


def test_a_changed_message_is_still_found_by_the_key_of_its_post(slack):
    parent = slack.send(action()).external_id
    slack.update(action("update", parent, key=OTHER_KEY))
    assert slack.find_by_key(action()).external_id == parent


def test_slack_is_a_destination(slack):
    destination: Destination = slack
    assert destination.name == "slack"
    assert set(destination.lookups) == {"post", "reply", "chart", "update"}


# who is notified


@pytest.mark.parametrize(("allowed", "wanted", "mentioned"), [(True, True, True), (True, False, False), (False, True, False)])
def test_the_channel_is_notified_only_when_setting_and_action_say_so(server, tmp_path, allowed, wanted, mentioned):
    connect(server, tmp_path, broadcast=allowed).send(action(broadcast=wanted))
    message, = server.messages
    assert message["text"].startswith("<!channel> ") is mentioned
    assert (message["blocks"][0]["text"]["text"] == "<!channel>") is mentioned
    assert len(message["blocks"]) == 1 + mentioned


def test_a_mention_never_makes_a_message_too_long(server, tmp_path):
    connect(server, tmp_path, broadcast=True).send(action(broadcast=True, blocks=[section(str(number)) for number in range(50)]))
    assert len(server.messages[0]["blocks"]) == 50


def test_data_goes_out_as_the_brief_escaped_it(server, tmp_path):
    """A customer called <!channel> was escaped by the brief; nothing here turns it back or adds a mention of its own."""
    hostile = "&lt;!channel&gt; wrote @here"
    for slack in (connect(server, tmp_path), connect(server, tmp_path, broadcast=True)):
        slack.send(action(text=hostile, blocks=[section(hostile)]))
        parent = server.messages[-1]["ts"]
        slack.send(action("reply", parent, text=hostile, blocks=[section(hostile)], broadcast=True))
        slack.update(action("update", parent, text=hostile, blocks=[section(hostile)], broadcast=True))
    assert {message["text"] for message in server.messages} == {hostile}
    assert all("<!" not in str(message["blocks"]) for message in server.messages)


# every fault on the way, for every kind that leaves something behind


def sent(slack, kind):
    """The action of a kind, with what it needs already there, and how to send it."""
    parent = None if kind == "post" else slack.send(action(key=OTHER_KEY)).external_id
    return action(kind, parent)


def left_behind(server):
    return [
        message for message in server.messages
        if message["files"] or (message["metadata"] or {}).get("event_payload", {}).get("key") == KEY
    ]


@contextmanager
def impatient(slack, fault):
    """Waits only briefly for a slow answer, and only for that one: a busy machine is slow, too."""
    patience = slack.client.timeout
    slack.client.timeout = 0.3 if fault.startswith("slow") else patience
    try:
        yield
    finally:
        slack.client.timeout = patience


METHODS = {"post": "chat.postMessage", "reply": "chat.postMessage", "chart": "files.completeUploadExternal"}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(("fault", "happened"), [
    ("lost_after", True), ("500_after", True), ("slow_after", True),
    ("lost_before", False), ("500_before", False), ("503", False), ("slow_before", False),
])
def test_an_unclear_answer_is_cleared_up_by_the_look_up(slack, server, kind, fault, happened):
    outgoing = sent(slack, kind)
    before = server.calls(METHODS[kind])
    server.fail(fault, METHODS[kind])
    with pytest.raises(Ambiguous) as caught, impatient(slack, fault):
        slack.send(outgoing)
    assert server.calls(METHODS[kind]) == before + 1
    assert len(left_behind(server)) == happened
    found = slack.find_by_key(outgoing)
    assert (found is not None) is happened
    if happened:
        message, = left_behind(server)
        assert found.external_id == (message["files"][0]["id"] if kind == "chart" else message["ts"])
        assert found.url
    assert_tells_nothing(caught.value)


@pytest.mark.parametrize("code", ["fatal_error", "internal_error", "request_timeout", "service_unavailable"])
@pytest.mark.parametrize("after", [True, False])
def test_errors_of_slack_that_may_have_posted_are_unclear(slack, server, code, after):
    server.answer(code, POST, after=after)
    with pytest.raises(Ambiguous, match=code):
        slack.send(action())
    assert (slack.find_by_key(action()) is not None) is after


@pytest.mark.parametrize("method", ["files.getUploadURLExternal", "/upload/v1/"])
@pytest.mark.parametrize("fault", ["lost_before", "lost_after", "slow_after", "500_after"])
def test_a_chart_that_failed_before_it_was_shared_did_not_happen(slack, server, method, fault):
    outgoing = sent(slack, "chart")
    server.fail(fault, method)
    with pytest.raises(Throttled, match="nothing was shared"), impatient(slack, fault):
        slack.send(outgoing)
    assert not left_behind(server)
    slack.send(outgoing)
    assert len(left_behind(server)) == 1


@pytest.mark.parametrize(("header", "seconds"), [
    ("7", 7), ("0", 1), ("-5", 1), ("999999", 3600), ("soon", 30), ("", 30), ("nan", 30), ("1.5", 1.5),
])
def test_too_many_requests_are_repeated_later_and_never_at_once(slack, server, header, seconds):
    server.fail("429", POST, retry_after=header)
    with pytest.raises(Throttled) as caught:
        slack.send(action())
    assert caught.value.retry_after == seconds
    assert not server.messages
    assert server.calls(POST) == 1


@pytest.mark.parametrize(("code", "seconds"), [("ratelimited", 30), ("rate_limited", 30), ("org_login_required", 600)])
def test_a_delay_told_without_a_header_has_a_default(slack, server, code, seconds):
    server.answer(code, POST)
    with pytest.raises(Throttled) as caught:
        slack.send(action())
    assert caught.value.retry_after == seconds


@pytest.mark.parametrize("code", [
    "invalid_auth", "account_inactive", "channel_not_found", "is_archived", "not_in_channel", "missing_scope", "invalid_blocks",
    "msg_too_long", "msg_blocks_too_long", "restricted_action", "some_new_code",
])
def test_a_refusal_names_error_channel_and_cure(slack, server, code):
    server.answer(code, POST)
    with pytest.raises(Rejected, match=f"{POST} answered {code} \\(channel {CHANNEL}\\); .+") as caught:
        slack.send(action())
    assert not server.messages
    assert_tells_nothing(caught.value)


@pytest.mark.parametrize(("spoil", "code"), [
    (lambda server: server.scopes.remove("chat:write"), "missing_scope.*add the scope chat:write"),
    (lambda server: server.channels[CHANNEL].update(is_archived=True), "is_archived.*RETENTION_OPS_SLACK_CHANNEL"),
    (lambda server: server.channels[CHANNEL].update(is_member=False), "not_in_channel.*invite the bot"),
    (lambda server: server.channels.clear(), "channel_not_found.*RETENTION_OPS_SLACK_CHANNEL"),
    (lambda server: setattr(server, "token", "xoxb-another"), "invalid_auth.*RETENTION_OPS_SLACK_TOKEN"),
])
def test_the_cure_fits_what_is_wrong_with_the_workspace(slack, server, spoil, code):
    spoil(server)
    with pytest.raises(Rejected, match=code) as caught:
        slack.send(action())
    assert_tells_nothing(caught.value)


@pytest.mark.parametrize(("blocks", "code"), [
    ([section("x" * 3001)], "invalid_blocks"),
    ([section("x")] * 51, "invalid_blocks"),
    ([section("x" * 2900)] * 5, "msg_blocks_too_long"),
])
def test_content_beyond_slacks_limits_is_refused_for_good(slack, blocks, code):
    with pytest.raises(Rejected, match=code):
        slack.send(action(blocks=blocks))


def test_the_update_of_a_message_that_is_gone_is_refused(slack):
    with pytest.raises(Rejected, match=r"message_not_found.*deleted"):
        slack.update(action("update", "1.000001"))


@pytest.mark.parametrize("fault", ["lost_before", "lost_after", "503", "429"])
def test_an_update_reports_faults_like_a_post(slack, server, fault):
    parent = slack.send(action()).external_id
    server.fail(fault, "chat.update")
    with pytest.raises(Throttled if fault == "429" else Ambiguous):
        slack.update(action("update", parent))
    slack.update(action("update", parent))
    assert len(server.messages) == 1


def test_a_closed_port_means_nothing_was_sent(tmp_path):
    with SlackServer() as gone:
        slack = connect(gone, tmp_path)
    with pytest.raises(Throttled) as caught:
        slack.send(action())
    assert caught.value.retry_after == 30
    assert_tells_nothing(caught.value)


@pytest.mark.parametrize(("reason", "means"), [
    (socket.gaierror(-2, "Name or service not known"), Throttled),
    (ssl.SSLCertVerificationError(1, "self-signed"), Rejected),
    (ConnectionResetError(104, "reset"), Ambiguous),
    (TimeoutError("timed out"), Ambiguous),
])
def test_only_what_failed_before_anything_left_did_not_happen(slack, monkeypatch, reason, means):
    def refuse(*_, **__):
        raise URLError(reason)

    monkeypatch.setattr("slack_sdk.web.base_client.urlopen", refuse)
    with pytest.raises(means):
        slack.send(action())


@pytest.mark.parametrize("body", [
    b"<html>Sign in to the hotel's network</html>", b"[]", b"null", b"", b'{"ok": false, "error": "Nordlicht-9000"}', b'{"ok": true}',
])
def test_an_answer_that_is_not_slacks_is_unclear_and_not_quoted(slack, server, monkeypatch, body):
    monkeypatch.setattr(server, "handle", lambda request: Reply(200, body))
    with pytest.raises(Ambiguous) as caught:
        slack.send(action())
    assert_tells_nothing(caught.value)
    assert "hotel" not in str(caught.value)


@pytest.mark.parametrize("status", [307, 403, 404, 407])
def test_an_answer_of_another_machine_points_at_the_address_and_the_proxy(slack, server, monkeypatch, status):
    monkeypatch.setattr(server, "handle", lambda request: Reply(status, b"<html>no</html>"))
    with pytest.raises(Rejected, match=f"HTTP {status}.*RETENTION_OPS_SLACK_API_URL"):
        slack.send(action())


def test_nothing_of_a_call_is_logged(slack, server, caplog):
    """The SDK's own logger writes whole bodies at DEBUG and, when a header cannot be sent, the token at ERROR."""
    caplog.set_level(logging.DEBUG)
    server.fail("lost_before", POST)
    with pytest.raises(Ambiguous):
        slack.send(action())
    slack.send(action())
    assert BODY_WORD not in caplog.text
    assert TOKEN not in caplog.text


def test_the_sdks_default_client_would_post_twice(server):
    """Why `connect` switches its retries off; if this fails, the SDK has changed."""
    server.fail("lost_after", POST)
    WebClient(TOKEN, base_url=server.api_url).chat_postMessage(channel=CHANNEL, text="Hello")
    assert len(server.messages) == 2


# what is found again


def test_nothing_is_found_where_nothing_was_posted(slack, server):
    server.post_as(MEMBER, "Good morning")
    assert slack.find_by_key(action()) is None


@pytest.mark.parametrize("author", [MEMBER, {"user": "U0OTHERBOT", "bot_id": "B0OTHER"}])
@pytest.mark.parametrize("kind", ["post", "reply", "chart"])
def test_a_mark_forged_by_somebody_else_is_no_proof(slack, server, author, kind):
    parent = None if kind == "post" else slack.send(action(key=OTHER_KEY)).external_id
    server.post_as(
        author, "Forged", thread_ts=parent, metadata={"event_type": EVENT_TYPE, "event_payload": {"key": KEY}},
        files=[{"id": "F1", "title": "Trend [retention-ops 0123456789ab]"}],
    )
    assert slack.find_by_key(action(kind, parent)) is None


def test_another_key_or_another_apps_metadata_is_not_ours(slack, server):
    slack.send(action(key=OTHER_KEY))
    server.post_as(BOT, "No mark")
    server.post_as(BOT, "Other type", metadata={"event_type": "other", "event_payload": {"key": KEY}})
    assert slack.find_by_key(action()) is None


def test_a_message_is_found_on_a_later_page(slack, server):
    receipt = slack.send(action())
    for number in range(10):
        server.post_as(MEMBER, str(number))
    server.page_size = 3
    assert slack.find_by_key(action()).external_id == receipt.external_id
    assert server.calls("conversations.history") == 4


def test_a_reply_is_found_on_a_later_page_of_its_thread(slack, server):
    parent = slack.send(action(key=OTHER_KEY)).external_id
    for number in range(5):
        server.post_as(MEMBER, str(number), thread_ts=parent)
    receipt = slack.send(action("reply", parent))
    server.page_size = 2
    assert slack.find_by_key(action("reply", parent)) == receipt


def test_a_channel_too_busy_to_read_to_its_end_is_left_to_a_human(slack, server):
    slack.send(action())
    for number in range(21):
        server.post_as(MEMBER, str(number))
    server.page_size = 1
    with pytest.raises(CannotTell, match="20 pages"):
        slack.find_by_key(action())
    assert server.calls("conversations.history") == 20


def test_a_page_that_ends_early_without_saying_where_to_go_on_tells_nothing(slack, server, monkeypatch):
    server.post_as(MEMBER, "Good morning")
    page = {"ok": True, "messages": [], "has_more": True, "response_metadata": {"next_cursor": ""}}
    monkeypatch.setattr(server, "handle", lambda request: Reply(200, page))
    with pytest.raises(CannotTell):
        slack.find_by_key(action())


@pytest.mark.parametrize(("first_attempt", "found"), [
    (timedelta(seconds=100), True),  # our clock is fast
    (timedelta(days=-3), True),  # the attempt that posted was a later one
    (timedelta(hours=23), True),  # very fast
    (timedelta(hours=25), False),
])
def test_the_search_begins_shortly_before_the_first_attempt_and_has_no_end(slack, first_attempt, found):
    slack.send(action())
    claimed = replace(action(), first_attempt_at=datetime.now(UTC) + first_attempt)
    assert (slack.find_by_key(claimed) is not None) is found


def test_without_a_first_attempt_the_whole_history_is_searched(slack):
    receipt = slack.send(action())
    assert slack.find_by_key(replace(action(), first_attempt_at=None)) == receipt


def test_a_message_is_found_once_the_history_shows_it(tmp_path):
    """The wait of `lookups` covers the lag that this server has."""
    now = [1_800_000_000.0]
    with SlackServer(clock=lambda: now[0]) as server:
        server.history_lag_seconds = 20
        slack = connect(server, tmp_path)
        outgoing = replace(action(), first_attempt_at=datetime.fromtimestamp(now[0], UTC))
        slack.send(outgoing)
        assert slack.find_by_key(outgoing) is None
        now[0] += slack.lookups["post"].wait_seconds
        assert slack.find_by_key(outgoing) is not None


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda server: server.scopes.remove("channels:history"), "missing_scope.*channels:history"),
    (lambda server: server.channels[CHANNEL].update(is_member=False), "not_in_channel"),
    (lambda server: server.channels.clear(), "channel_not_found"),
    (lambda server: setattr(server, "token", "xoxb-another"), "invalid_auth"),
])
def test_a_look_up_slack_refuses_tells_nothing(slack, server, spoil, says):
    server.post_as(MEMBER, "Good morning")
    slack.find_by_key(action())  # the bot's own id is known from here on
    spoil(server)
    with pytest.raises(CannotTell, match=says):
        slack.find_by_key(action())


@pytest.mark.parametrize("kind", ["reply", "chart"])
def test_a_thread_whose_message_is_gone_tells_nothing(slack, kind):
    with pytest.raises(CannotTell, match="thread_not_found"):
        slack.find_by_key(action(kind, "1.000001"))


def test_a_file_of_ours_without_its_title_tells_nothing(slack, server):
    parent = slack.send(action(key=OTHER_KEY)).external_id
    server.post_as(BOT, "", thread_ts=parent, files=[{"id": "F1", "file_access": "check_file_info"}])
    with pytest.raises(CannotTell, match="files:read"):
        slack.find_by_key(action("chart", parent))


def test_an_update_cannot_be_looked_up(slack):
    with pytest.raises(CannotTell):
        slack.find_by_key(action("update", "1.000001"))


@pytest.mark.parametrize("method", ["auth.test", "conversations.history"])
@pytest.mark.parametrize(("fault", "means"), [("lost_before", Ambiguous), ("503", Ambiguous), ("429", Throttled)])
def test_a_look_up_that_was_not_answered_is_asked_again_later(slack, server, method, fault, means):
    slack.send(action())
    server.fail(fault, method)
    with pytest.raises(means):
        slack.find_by_key(action())
    assert slack.find_by_key(action()) is not None


# settings


@pytest.mark.parametrize(("settings", "token", "mode", "names"), [
    ({"slack_channel": ""}, TOKEN, "live", "RETENTION_OPS_SLACK_CHANNEL"),
    ({}, TOKEN, "pilot", "RETENTION_OPS_SLACK_TEST_CHANNEL"),
    ({}, " ", "live", "RETENTION_OPS_SLACK_TOKEN"),
    ({}, "xoxb-two\nlines", "live", "RETENTION_OPS_SLACK_TOKEN"),
    ({"slack_api_url": "http://slack.example/api/"}, TOKEN, "live", "RETENTION_OPS_SLACK_API_URL"),
    ({"slack_api_url": "slack"}, TOKEN, "live", "RETENTION_OPS_SLACK_API_URL"),
])
def test_a_setting_that_cannot_work_is_named(server, tmp_path, settings, token, mode, names):
    with pytest.raises(SettingsError, match=names) as caught:
        connect(server, tmp_path, token=token, mode=mode, **settings)
    assert "lines" not in str(caught.value)


def test_a_missing_token_is_named(tmp_path):
    with pytest.raises(SettingsError, match="RETENTION_OPS_SLACK_TOKEN"):
        Slack.connect(settings_for(tmp_path, slack_channel=CHANNEL), Secrets(), "live")


def test_the_address_may_lack_its_slash_and_the_token_end_in_a_line_break(server, tmp_path):
    connect(server, tmp_path, token=f"{TOKEN}\n", slack_api_url=server.api_url.rstrip("/")).send(action())
    assert len(server.messages) == 1


# doctor


def verdicts(slack):
    return {finding.subject: finding.ok for finding in slack.check()}


def sentences(slack):
    return " | ".join(f"{finding.sentence}; {finding.cure}" for finding in slack.check())


def test_doctor_finds_nothing_wrong_and_sends_nothing(slack, server):
    assert verdicts(slack) == {
        "Slack token": True, "Slack scopes": True, f"Slack channel {CHANNEL}": True, f"Slack look-up in {CHANNEL}": True,
    }
    assert "retention_bot to the workspace Acme" in sentences(slack)
    assert not server.messages


def test_doctor_says_that_the_token_is_wrong(server, tmp_path):
    slack = connect(server, tmp_path, token="xoxb-old")
    assert verdicts(slack) == {"Slack token": False}
    assert "invalid_auth; set RETENTION_OPS_SLACK_TOKEN" in sentences(slack)
    assert "xoxb-old" not in sentences(slack)


@pytest.mark.parametrize("scope", ["chat:write", "files:write", "channels:history"])
def test_doctor_names_the_missing_scope(slack, server, scope):
    server.scopes.remove(scope)
    assert verdicts(slack)["Slack scopes"] is False
    assert f"missing: {scope}" in sentences(slack)


def test_doctor_sees_that_a_private_channel_needs_its_own_scope(slack, server):
    server.channels[CHANNEL]["is_private"] = True
    server.scopes.add("groups:read")
    assert verdicts(slack)[f"Slack look-up in {CHANNEL}"] is False
    assert "add the scope groups:history" in sentences(slack)


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda server: server.channels[CHANNEL].update(is_archived=True), "is archived; unarchive"),
    (lambda server: server.channels[CHANNEL].update(is_member=False), "not a member of #retention; invite"),
    (lambda server: server.channels.clear(), "channel_not_found.*; set RETENTION_OPS_SLACK_CHANNEL"),
])
def test_doctor_says_what_is_wrong_with_the_channel(slack, server, spoil, says):
    spoil(server)
    assert verdicts(slack)[f"Slack channel {CHANNEL}"] is False
    finding = next(finding for finding in slack.check() if "channel" in finding.subject)
    assert re.search(says, f"{finding.sentence}; {finding.cure}")


def test_doctor_does_not_need_the_scope_that_only_it_would_use(slack, server):
    server.scopes.remove("channels:read")
    assert verdicts(slack)[f"Slack channel {CHANNEL}"] is None
    assert verdicts(slack)[f"Slack look-up in {CHANNEL}"] is True


@pytest.mark.parametrize("fault", ["lost_before", "503", "429"])
def test_doctor_does_not_fail_when_slack_does(slack, server, fault):
    server.fail(fault, times=9)
    assert verdicts(slack) == {"Slack token": None}
