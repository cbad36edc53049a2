"""Slack: one message per incident, its thread and chart, each carrying a mark by which it can be found again.

Payloads by kind: post {'text', 'blocks', 'broadcast'}, reply the same into the thread `parent`, chart {'title', 'alt_text'} with one
file for that thread, update {'text', 'blocks'} for the message `parent`. The brief's content is sent as it is: escaping and
limits are the brief's work. A mention of the whole channel is only ever added here, and only where the setting allows it.
"""

from __future__ import annotations

import http.client
import logging
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

from slack_sdk import WebClient
from slack_sdk.errors import SlackApiError, SlackRequestError
from slack_sdk.web import SlackResponse

from retention_ops.errors import SettingsError
from retention_ops.execute.destinations.http import Http, retry_after
from retention_ops.execute.destinations.seam import (
    MARKER,
    Ambiguous,
    CannotTell,
    DestinationError,
    Finding,
    Lookup,
    Outgoing,
    Receipt,
    Rejected,
    Throttled,
)
from retention_ops.settings import TEST_MODES, Secrets, Settings

EVENT_TYPE = "retention_ops_delivery"
MENTION = "<!channel>"
MOST_BLOCKS = 50
CLOCK_SLACK_SECONDS = 86_400
"""how far our clock may be ahead of Slack's before a search starts too late"""
PAGE_SIZE, MOST_PAGES = 200, 20
NOT_REACHED_SECONDS = 30.0
MIGRATION_SECONDS = 600.0

IT_MAY_HAVE_HAPPENED = {"fatal_error", "internal_error", "request_timeout", "service_unavailable"}
TOO_MANY = {"ratelimited", "rate_limited"}
LATER = {"org_login_required", "team_added_to_org"}
"""the workspace is being migrated: nothing is accepted until that is over"""
SCOPES = ("chat:write", "files:write")
HISTORY_SCOPES = ("channels:history", "groups:history")

_TOKEN_CURE = "set RETENTION_OPS_SLACK_TOKEN to the bot token shown under OAuth & Permissions"
_CHANNEL_CURE = "set {variable} to the channel's id (C...), and invite the bot if the channel is private"
_TEMPLATE_CURE = "shorten or correct the template briefing.slack.j2"
_MESSAGE_CURE = "the message it belongs to was deleted or is not this bot's"
_CURES = {
    **dict.fromkeys(("invalid_auth", "not_authed", "account_inactive", "token_revoked", "token_expired"), _TOKEN_CURE),
    **dict.fromkeys(("channel_not_found", "invalid_channel"), _CHANNEL_CURE),
    "not_in_channel": "invite the bot into the channel: /invite @ and its name",
    "is_archived": "unarchive the channel, or set {variable} to another",
    "missing_scope": "add the scope {needed} under OAuth & Permissions and reinstall the app",
    "restricted_action": "ask a workspace admin to let the app post there",
    **dict.fromkeys(("invalid_blocks", "invalid_blocks_format", "msg_too_long", "msg_blocks_too_long", "no_text"), _TEMPLATE_CURE),
    **dict.fromkeys(("message_not_found", "thread_not_found", "cant_update_message", "edit_window_closed"), _MESSAGE_CURE),
}
_LOCAL_HOSTS = {"127.0.0.1", "::1", "localhost"}

_silent = logging.getLogger("retention_ops.slack_sdk")
_silent.setLevel(logging.CRITICAL)  # at DEBUG the SDK logs whole bodies, at ERROR a header that could not be sent: the token


class Refused(Rejected):
    """Slack's own error code, and what helps."""

    def __init__(self, message: str, code: str, cure: str):
        super().__init__(f"{message}; {cure}" if cure else message)
        self.sentence = message
        self.code = code
        self.cure = cure


class Slack:
    """One workspace as one bot. `channel` is where actions without a target go and what `check` looks at."""

    name = "slack"
    lookups: Mapping[str, Lookup] = {
        # an accepted message may be missing from the history for some seconds: a minute, then one look
        "post": Lookup(wait_seconds=60),
        "reply": Lookup(wait_seconds=60),
        "chart": Lookup(wait_seconds=60),
        "update": Lookup(repeatable=True),
    }

    def __init__(self, client: WebClient, channel: str, *, broadcast: bool = False, variable: str = "RETENTION_OPS_SLACK_CHANNEL"):
        self.client = client
        self.channel = channel
        self.broadcast = broadcast
        self.variable = variable
        """the setting that named the channel"""
        self._author: tuple[str | None, str | None] | None = None

    @classmethod
    def connect(cls, settings: Settings, secrets: Secrets, mode: str, timeout: float = 10) -> Slack:
        """Slack as the settings name it, for `mode`; calls nothing yet. Raises SettingsError naming the variable.

        The client repeats nothing: slack_sdk's default handlers post a second time when the answer to the first is lost.
        """
        variable = "RETENTION_OPS_SLACK_TEST_CHANNEL" if mode in TEST_MODES else "RETENTION_OPS_SLACK_CHANNEL"
        # whoever has only a data owner to tell needs no channel for alerts; each action names its own
        channel = (settings.target("slack_channel", mode) or settings.health_channel).strip()
        if not channel:
            raise SettingsError(f"{variable} is not set: the id of the channel, such as C0123ABCD")
        client = WebClient(_token(secrets), base_url=_api_url(settings), timeout=timeout, retry_handlers=[], logger=_silent)
        return cls(client, channel, broadcast=settings.broadcast, variable=variable)

    def send(self, action: Outgoing) -> Receipt:
        """Posts a message, a reply or a chart. Raises Rejected, Throttled or Ambiguous."""
        if action.kind not in ("post", "reply", "chart"):
            raise Rejected(f"slack: cannot send {action.kind!r}, only post, reply and chart")
        if action.kind != "post" and not action.parent:
            raise Rejected(f"slack: a {action.kind} needs the message it belongs to; nothing was sent")
        return self._share(action) if action.kind == "chart" else self._post(action)

    def update(self, action: Outgoing) -> Receipt:
        """Replaces text and blocks of our message `action.parent`; never mentions anybody anew."""
        if not action.parent:
            raise Rejected("slack: an update needs the message it changes; nothing was sent")
        answer = self._call(
            "chat.update", self.client.chat_update, channel=self._target(action), ts=action.parent,
            text=action.payload["text"], blocks=action.payload.get("blocks"), link_names=False, parse="none",
        )
        channel = str(answer.get("channel") or self._target(action))
        return Receipt(action.parent, self._permalink(channel, action.parent), {"channel": channel})

    def find_by_key(self, action: Outgoing) -> Receipt | None:
        """The message or file of this bot that carries the action's key, from its first attempt until now.

        Metadata alone proves nothing, as every app of the workspace may write it: only what this bot posted counts.
        """
        if action.kind not in ("post", "reply", "chart"):
            raise CannotTell(f"slack: a {action.kind} leaves no mark to look for")
        try:
            return self._find(action)
        except Rejected as refused:
            raise CannotTell(str(refused)) from None

    def check(self) -> list[Finding]:
        """Token, scopes, channel and whether its history can be read. Sends nothing, never raises."""
        try:
            answer = self._call("auth.test", self.client.auth_test)
        except DestinationError as error:
            return [_finding("Slack token", error)]
        bot, team = answer.get("user"), answer.get("team")
        channel = self._check_channel()
        findings = [Finding("Slack token", True, f"signed in as {bot} to the workspace {team}"), _check_scopes(answer.headers), channel]
        return findings if channel.ok is False else [*findings, self._check_history()]

    def _target(self, action: Outgoing) -> str:
        return action.target or self.channel

    def _post(self, action: Outgoing) -> Receipt:
        text, blocks = action.payload["text"], list(action.payload.get("blocks") or [])
        wanted = bool(action.payload.get("broadcast"))
        in_thread: dict[str, Any] = {}
        if action.kind == "reply":
            in_thread = {"thread_ts": action.parent, "reply_broadcast": wanted}
        elif wanted and self.broadcast:
            text, blocks = _mentioning(text, blocks)
        answer = self._call(
            "chat.postMessage", self.client.chat_postMessage, channel=self._target(action), text=text, blocks=blocks or None,
            metadata={"event_type": EVENT_TYPE, "event_payload": {"key": action.key}},
            link_names=False, parse="none", unfurl_links=False, unfurl_media=False, **in_thread,
        )
        return self._receipt(answer.get("ts"), answer.get("channel") or self._target(action))

    def _share(self, action: Outgoing) -> Receipt:
        """Uploads the file, then shares it. Until the last call nobody sees anything, so what fails before it did not happen.

        The SDK's files_upload_v2 does the same three calls but cannot say which one failed.
        """
        if len(action.files) != 1:
            raise Rejected(f"slack: a chart is one file, not {len(action.files)}; nothing was sent")
        (name, content), = action.files.items()
        channel = self._target(action)
        try:
            file_id = self._upload(name, content, action.payload.get("alt_text"))
        except Ambiguous as error:
            raise Throttled(f"{error}; nothing was shared yet", NOT_REACHED_SECONDS) from None
        answer = self._call(
            "files.completeUploadExternal", self.client.files_completeUploadExternal, channel_id=channel, thread_ts=action.parent,
            files=[{"id": file_id, "title": f"{action.payload.get('title') or name} {_mark(action.key)}"}],
        )
        shared = next((file for file in answer.get("files") or [] if file.get("id") == file_id), {})
        return Receipt(file_id, shared.get("permalink"), {"channel": channel})

    def _upload(self, name: str, content: bytes, alt_text: str | None) -> str:
        place = self._call(
            "files.getUploadURLExternal", self.client.files_getUploadURLExternal, filename=name, length=len(content), alt_txt=alt_text,
        )
        file_id, url = place.get("file_id"), place.get("upload_url")
        if not file_id or not url:
            raise Ambiguous("slack: files.getUploadURLExternal answered without a place for the file")
        Http(url, timeout=(self.client.timeout, self.client.timeout), name="Slack's file upload").request(
            "POST", "", data=content, headers={"Content-Type": "application/octet-stream"}, expect=(200,),
        )
        return str(file_id)

    def _find(self, action: Outgoing) -> Receipt | None:
        for message in self._messages(action):
            if not self._is_ours(message):
                continue
            if action.kind == "chart":
                file = _marked_file(message, action.key)
                if file:
                    return Receipt(str(file["id"]), file.get("permalink"), {"channel": self._target(action)})
            elif _key(message) == action.key:
                return self._receipt(message.get("ts"), self._target(action))
        return None

    def _messages(self, action: Outgoing) -> Iterator[dict[str, Any]]:
        """The channel's messages, or the thread's, since shortly before the first attempt.

        Without an upper bound: a second attempt may be days after the first, and missing it would mean posting a third time.
        """
        method, call, place = "conversations.history", self.client.conversations_history, {}
        if action.kind != "post":
            if not action.parent:
                raise CannotTell(f"slack: a {action.kind} without the message it belongs to cannot be looked for")
            method, call, place = "conversations.replies", self.client.conversations_replies, {"ts": action.parent}
        oldest = action.first_attempt_at and f"{action.first_attempt_at.timestamp() - CLOCK_SLACK_SECONDS:.6f}"
        cursor = None
        for _ in range(MOST_PAGES):
            page = self._call(
                method, call, channel=self._target(action), oldest=oldest, inclusive=True, include_all_metadata=True,
                limit=PAGE_SIZE, cursor=cursor, **place,
            )
            yield from page.get("messages") or []
            cursor = (page.get("response_metadata") or {}).get("next_cursor")
            if not cursor:
                if page.get("has_more"):  # more without a way to get it is no proof of absence
                    break
                return
        raise CannotTell(f"slack: more was posted in {self._target(action)} since the first attempt than can be read ({MOST_PAGES} pages)")

    def _is_ours(self, message: Mapping[str, Any]) -> bool:
        if self._author is None:
            answer = self._call("auth.test", self.client.auth_test)
            self._author = (answer.get("user_id"), answer.get("bot_id"))
        user_id, bot_id = self._author
        return bool((user_id and message.get("user") == user_id) or (bot_id and message.get("bot_id") == bot_id))

    def _receipt(self, ts: Any, channel: Any) -> Receipt:
        if not ts:
            raise Ambiguous("slack: answered without the message's ts")
        return Receipt(str(ts), self._permalink(str(channel), str(ts)), {"channel": str(channel)})

    def _permalink(self, channel: str, ts: str) -> str | None:
        """The message's address, or None: the message is there, and failing now would say it is not."""
        try:
            return self._call("chat.getPermalink", self.client.chat_getPermalink, channel=channel, message_ts=ts).get("permalink")
        except DestinationError:
            return None

    def _check_channel(self) -> Finding:
        subject = f"Slack channel {self.channel}"
        try:
            channel = self._call("conversations.info", self.client.conversations_info, channel=self.channel).get("channel") or {}
        except DestinationError as error:
            if getattr(error, "code", "") == "missing_scope":
                return Finding(subject, None, "without the scope channels:read nobody can tell whether it is archived", "")
            return _finding(subject, error)
        name = channel.get("name") or self.channel
        if channel.get("is_archived"):
            return Finding(subject, False, f"#{name} is archived", self._cure("is_archived"))
        if not channel.get("is_member"):
            return Finding(subject, False, f"the bot is not a member of #{name}", self._cure("not_in_channel"))
        return Finding(subject, True, f"the bot is a member of #{name}")

    def _check_history(self) -> Finding:
        subject = f"Slack look-up in {self.channel}"
        try:
            self._call("conversations.history", self.client.conversations_history, channel=self.channel, limit=1)
        except DestinationError as error:
            return _finding(subject, error)
        return Finding(subject, True, "the bot can find its own messages again")

    def _call(self, method: str, call: Callable[..., SlackResponse], **arguments: Any) -> SlackResponse:
        """One call, made once. `from None`: the SDK's own errors hold addresses and what Slack repeats of our words."""
        try:
            return call(**arguments)
        except SlackApiError as error:
            raise self._refusal(method, error.response, arguments.get("channel") or arguments.get("channel_id")) from None
        except Exception as error:  # whatever broke once the call was under way, it may have happened
            raise _unanswered(method, error) from None

    def _refusal(self, method: str, response: Any, channel: str | None) -> DestinationError:
        status = int(response.status_code)
        content = response.data if isinstance(response.data, dict) else {}
        code = _code(content.get("error"))
        said = f"slack: {method} answered {code or f'HTTP {status}'}" + (f" (channel {channel})" if channel else "")
        if status == 429 or code in TOO_MANY:
            return Throttled(said, retry_after(_header(response.headers, "retry-after")))
        if code in LATER:
            return Throttled(said, MIGRATION_SECONDS)
        if status >= 500 or status == 408 or code in IT_MAY_HAVE_HAPPENED:
            return Ambiguous(said)
        if code:
            needed = _code(content.get("needed")) or "it names"
            return Refused(said, code, self._cure(code, needed) or f"see https://docs.slack.dev/reference/methods/{method}")
        if status >= 300:
            return Refused(said, "", "something between here and Slack answered: check RETENTION_OPS_SLACK_API_URL and the proxy")
        return Ambiguous(f"{said} with something that is not Slack's")

    def _cure(self, code: str, needed: str = "") -> str:
        return _CURES.get(code, "").format(variable=self.variable, needed=needed)


def _token(secrets: Secrets) -> str:
    token = secrets.slack_token.get_secret_value().strip() if secrets.slack_token else ""
    if not token:
        raise SettingsError("RETENTION_OPS_SLACK_TOKEN is not set: the bot token (xoxb-...) of the Slack app")
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # as a header it would be refused with an error that quotes it
        raise SettingsError("RETENTION_OPS_SLACK_TOKEN holds a space, a line break or a letter no token has: copy it again")
    return token


def _api_url(settings: Settings) -> str:
    url = settings.slack_api_url.strip().rstrip("/") + "/"
    parts = urlsplit(url)
    if not parts.hostname or (parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOCAL_HOSTS)):
        raise SettingsError("RETENTION_OPS_SLACK_API_URL must begin with https:// (http only on this machine): the token goes there")
    return url


def _mentioning(text: str, blocks: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Text and blocks that notify the whole channel. A 51st block would be refused: the mention is worth more than the last."""
    if blocks:
        mention = {"type": "section", "text": {"type": "mrkdwn", "text": MENTION, "verbatim": True}}
        blocks = [mention, *blocks][:MOST_BLOCKS]
    return f"{MENTION} {text}", blocks


def _mark(key: str) -> str:
    return f"[{MARKER} {key[:12]}]"


def _key(message: Mapping[str, Any]) -> str | None:
    metadata = message.get("metadata") or {}
    return (metadata.get("event_payload") or {}).get("key") if metadata.get("event_type") == EVENT_TYPE else None


def _marked_file(message: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """The file with the key's mark. CannotTell when Slack shows one of ours without its title: it may be the one."""
    files = [file for file in message.get("files") or [] if file.get("mode") != "tombstone"]
    for file in files:
        if _mark(key) in str(file.get("title") or ""):
            return file
    if any(not file.get("title") for file in files):
        raise CannotTell("slack: shows a file of this bot without its title; add the scope files:read")
    return None


def _code(value: Any) -> str:
    """Slack's error code or scope list, or nothing where free text stands: that may repeat what was sent."""
    return value if isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_:.,-]{0,79}", value) else ""


def _header(headers: Mapping[str, Any], name: str) -> str | None:
    return next((str(value) for key, value in (headers or {}).items() if key.lower() == name), None)


def _unanswered(method: str, error: Exception) -> DestinationError:
    """What an exception below the SDK means: only what failed before the first byte left is known not to have happened."""
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(error, URLError) and isinstance(reason, ConnectionRefusedError | socket.gaierror):
        return Throttled(f"slack: {method} could not be sent, Slack was not reached ({type(reason).__name__})", NOT_REACHED_SECONDS)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return Rejected(f"slack: {method} was not sent, the certificate there is not trusted")
    if isinstance(error, SlackRequestError | http.client.InvalidURL | UnicodeEncodeError):
        return Rejected(f"slack: {method} could not be sent ({type(error).__name__}); check RETENTION_OPS_SLACK_API_URL")
    return Ambiguous(f"slack: {method} was not answered ({type(reason).__name__})")


def _finding(subject: str, error: DestinationError) -> Finding:
    if isinstance(error, Refused):
        return Finding(subject, False, error.sentence, error.cure)
    return Finding(subject, False if isinstance(error, Rejected) else None, str(error))


def _check_scopes(headers: Mapping[str, Any]) -> Finding:
    header = _header(headers, "x-oauth-scopes")
    if header is None:
        return Finding("Slack scopes", None, "Slack did not say which scopes the token has")
    granted = {scope.strip() for scope in header.split(",")}
    missing = [scope for scope in SCOPES if scope not in granted]
    if not granted.intersection(HISTORY_SCOPES):
        missing.append("channels:history (groups:history for a private channel)")
    if missing:
        return Finding("Slack scopes", False, f"missing: {', '.join(missing)}", "add them under OAuth & Permissions and reinstall the app")
    return Finding("Slack scopes", True, "the token may post, upload and read back")
