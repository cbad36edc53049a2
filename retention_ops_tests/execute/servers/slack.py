"""A Slack that checks what Slack checks and keeps what was posted.

`messages` holds everything really posted. Errors come as Slack sends them: HTTP 200 with {"ok": false, "error": code}; orders for
such an error are given with `answer`, faults on the wire with `fail`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

from retention_ops_tests.execute.servers.loopback import LoopbackServer, Reply, Request

TOKEN = "xoxb-1111111111-abcdefghijklmnop"
CHANNEL = "C0123ABCD"
BOT = {"user": "U0BOT", "bot_id": "B0BOT"}
MEMBER = {"user": "U0MEMBER"}
SCOPES = ("chat:write", "files:write", "channels:history", "channels:read")

BLOCKS, SECTION, FIELDS, FIELD, HEADER, CONTEXT = 50, 3_000, 10, 2_000, 150, 10
PAYLOAD = 13_200
"""characters of all blocks; not documented, measured in slackapi/bolt-js#2509"""
BLOCK_TYPES = {"section", "header", "context", "divider", "actions", "image"}

NEEDED = {
    "chat.postMessage": "chat:write", "chat.update": "chat:write",
    "files.getUploadURLExternal": "files:write", "files.completeUploadExternal": "files:write",
    "conversations.history": "history", "conversations.replies": "history", "conversations.info": "read",
}
"""method -> scope; history and read are prefixed by the kind of channel"""


class Refusal(Exception):
    def __init__(self, code: str, **more: str):
        self.answer = {"ok": False, "error": code, **more}


class SlackServer(LoopbackServer):
    """One workspace with one app. Configure `token`, `scopes`, `channels`, `page_size`, `history_lag_seconds` and `clock`."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self.clock = clock
        self.token = TOKEN
        self.scopes = set(SCOPES)
        self.channels: dict[str, dict[str, Any]] = {CHANNEL: channel("retention")}
        self.messages: list[dict[str, Any]] = []
        self.files: dict[str, dict[str, Any]] = {}
        self.page_size = 200
        self.history_lag_seconds = 0.0
        self._answers: list[list[Any]] = []
        self._last = 0

    @property
    def api_url(self) -> str:
        return f"{self.url}/api/"

    def answer(self, code: str, method: str = ".*", times: int = 1, after: bool = False) -> None:
        """The next calls of `method` are answered with the error `code`; `after`: although they were carried out."""
        with self.lock:
            self._answers.append([code, method, times, after])

    def post_as(self, author: dict[str, str], text: str, **more: Any) -> dict[str, Any]:
        """Puts a message of somebody into the channel, as other people and apps do."""
        with self.lock:
            return self._keep(CHANNEL, author, text=text, **more)

    def calls(self, method: str) -> int:
        return sum(request.path == f"/api/{method}" for request in self.requests)

    def handle(self, request: Request) -> Reply:
        if request.path.startswith("/upload/v1/"):
            return self._take_bytes(request)
        method = request.path.removeprefix("/api/")
        headers = {"x-oauth-scopes": ",".join(sorted(self.scopes))}
        try:
            self._check_token(request)
            given = _arguments(request)
            self._check_scope(method, given)
            ordered = self._next_answer(method)
            if ordered and not ordered[3]:
                raise Refusal(ordered[0])
            answer = getattr(self, "_" + method.replace(".", "_"))(given)
            if ordered:
                raise Refusal(ordered[0])
        except Refusal as refusal:
            return Reply(200, refusal.answer, headers)
        return Reply(200, {"ok": True, **answer}, headers)

    def _next_answer(self, method: str) -> list[Any] | None:
        for ordered in self._answers:
            if ordered[2] > 0 and re.fullmatch(ordered[1], method):
                ordered[2] -= 1
                return ordered
        return None

    def _check_token(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not given.startswith("Bearer "):
            raise Refusal("not_authed")
        if given != f"Bearer {self.token}":
            raise Refusal("invalid_auth")

    def _check_scope(self, method: str, given: dict[str, Any]) -> None:
        needed = NEEDED.get(method, "")
        if needed in ("history", "read"):
            private = self.channels.get(given.get("channel", ""), {}).get("is_private")
            needed = f"{'groups' if private else 'channels'}:{needed}"
        if needed and needed not in self.scopes:
            raise Refusal("missing_scope", needed=needed, provided=",".join(sorted(self.scopes)))

    def _channel(self, name: str | None, member: bool = True) -> dict[str, Any]:
        found = self.channels.get(name or "")
        if not found or (found["is_private"] and not found["is_member"]):
            raise Refusal("channel_not_found")
        if member and not found["is_member"]:
            raise Refusal("not_in_channel")
        return found

    def _writable(self, name: str | None) -> None:
        self._channel(name, member="chat:write.public" not in self.scopes)
        if self.channels[name or ""]["is_archived"]:
            raise Refusal("is_archived")

    def _auth_test(self, given: dict[str, Any]) -> dict[str, Any]:
        return {
            "url": "https://acme.slack.com/", "team": "Acme", "team_id": "T0ACME", "user": "retention_bot",
            "user_id": BOT["user"], "bot_id": BOT["bot_id"],
        }

    def _chat_postMessage(self, given: dict[str, Any]) -> dict[str, Any]:
        self._writable(given.get("channel"))
        _check_content(given)
        _check_metadata(given.get("metadata"))
        thread = given.get("thread_ts")
        if thread and not self._message(given["channel"], thread):
            raise Refusal("thread_not_found")
        message = self._keep(
            given["channel"], BOT, text=given.get("text", ""), blocks=given.get("blocks"), metadata=given.get("metadata"), thread_ts=thread,
            subtype="thread_broadcast" if thread and given.get("reply_broadcast") else None,
            sent={name: given.get(name) for name in ("link_names", "parse", "unfurl_links", "unfurl_media")},
        )
        return {"channel": given["channel"], "ts": message["ts"], "message": _shown(message, True)}

    def _chat_update(self, given: dict[str, Any]) -> dict[str, Any]:
        self._writable(given.get("channel"))
        message = self._message(given["channel"], given.get("ts"))
        if not message:
            raise Refusal("message_not_found")
        if message.get("bot_id") != BOT["bot_id"]:
            raise Refusal("cant_update_message")
        _check_content(given)
        message.update(text=given.get("text", ""), blocks=given.get("blocks"), updates=message["updates"] + 1)
        return {"channel": given["channel"], "ts": message["ts"], "text": message["text"]}

    def _chat_getPermalink(self, given: dict[str, Any]) -> dict[str, Any]:
        self._channel(given.get("channel"))
        if not self._message(given["channel"], given.get("message_ts")):
            raise Refusal("message_not_found")
        return {"permalink": f"https://acme.slack.com/archives/{given['channel']}/p{given['message_ts'].replace('.', '')}"}

    def _conversations_info(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"channel": {"id": given["channel"], **self._channel(given.get("channel"), member=False)}}

    def _conversations_history(self, given: dict[str, Any]) -> dict[str, Any]:
        self._channel(given.get("channel"))
        found = [
            message for message in self._seen(given)
            if not message["thread_ts"] or message["thread_ts"] == message["ts"] or message["subtype"] == "thread_broadcast"
        ]
        return self._page(found[::-1], given)

    def _conversations_replies(self, given: dict[str, Any]) -> dict[str, Any]:
        self._channel(given.get("channel"))
        parent = self._message(given["channel"], given.get("ts"))
        if not parent:
            raise Refusal("thread_not_found")
        page = self._page([message for message in self._seen(given) if message["thread_ts"] == parent["ts"]], given)
        page["messages"].insert(0, _shown(parent, _true(given.get("include_all_metadata"))))
        return page

    def _files_getUploadURLExternal(self, given: dict[str, Any]) -> dict[str, Any]:
        if not given.get("filename") or int(given.get("length") or 0) <= 0:
            raise Refusal("invalid_arguments")
        file_id = f"F{len(self.files):08d}"
        self.files[file_id] = {
            "id": file_id, "name": given["filename"], "length": int(given["length"]), "alt_txt": given.get("alt_txt"), "content": None,
        }
        return {"file_id": file_id, "upload_url": f"{self.url}/upload/v1/{file_id}"}

    def _take_bytes(self, request: Request) -> Reply:
        file = self.files.get(request.path.removeprefix("/upload/v1/"))
        if "authorization" in request.headers:
            return Reply(400, b"the token does not belong here")
        if not file or len(request.body) != file["length"]:
            return Reply(400, b"unknown file or wrong length")
        file["content"] = request.body
        return Reply(200, f"OK - {file['length']}".encode())

    def _files_completeUploadExternal(self, given: dict[str, Any]) -> dict[str, Any]:
        self._writable(given.get("channel_id"))
        shared = []
        for item in given["files"]:
            file = self.files.get(item["id"])
            if not file or file["content"] is None:
                raise Refusal("file_not_found")
            shared.append({
                "id": file["id"], "name": file["name"], "title": item.get("title") or file["name"], "user": BOT["user"],
                "permalink": f"https://acme.slack.com/files/{BOT['user']}/{file['id']}/{file['name']}",
            })
        if given.get("thread_ts") and not self._message(given["channel_id"], given["thread_ts"]):
            raise Refusal("thread_not_found")
        self._keep(given["channel_id"], BOT, text="", thread_ts=given.get("thread_ts"), files=shared)
        return {"files": shared}

    def _keep(self, place: str, author: dict[str, str], **content: Any) -> dict[str, Any]:
        self._last = max(self._last + 1, int(self.clock() * 1_000_000))
        message = {
            "type": "message", "channel": place, "ts": f"{self._last // 1_000_000}.{self._last % 1_000_000:06d}", "thread_ts": None,
            "subtype": None, "text": "", "blocks": None, "metadata": None, "files": [], "updates": 0, **author, **content,
        }
        self.messages.append(message)
        parent = content.get("thread_ts") and self._message(place, content["thread_ts"])
        if parent:
            parent["thread_ts"] = parent["ts"]
        return message

    def _message(self, place: str, ts: str | None) -> dict[str, Any] | None:
        return next((message for message in self.messages if message["channel"] == place and message["ts"] == ts), None)

    def _seen(self, given: dict[str, Any]) -> list[dict[str, Any]]:
        """What the history shows by now, oldest first."""
        oldest, latest = float(given.get("oldest") or 0), float(given.get("latest") or "inf")
        inclusive, now = _true(given.get("inclusive")), self.clock()
        return [
            message for message in self.messages
            if message["channel"] == given["channel"] and float(message["ts"]) + self.history_lag_seconds <= now + 1e-6
            and (oldest < float(message["ts"]) < latest or (inclusive and float(message["ts"]) in (oldest, latest)))
        ]

    def _page(self, found: list[dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        start, size = int(given.get("cursor") or 0), min(int(given.get("limit") or 100), self.page_size)
        more = start + size < len(found)
        return {
            "messages": [_shown(message, _true(given.get("include_all_metadata"))) for message in found[start : start + size]],
            "has_more": more, "response_metadata": {"next_cursor": str(start + size) if more else ""},
        }


def channel(name: str, **more: bool) -> dict[str, Any]:
    return {"name": name, "is_archived": False, "is_member": True, "is_private": False, **more}


def _arguments(request: Request) -> dict[str, Any]:
    """Query, form or JSON; Slack reads JSON inside form fields."""
    given = {name: values[-1] for name, values in request.query.items()}
    if request.headers.get("content-type", "").startswith("application/json"):
        return {**given, **(request.json() or {})}  # the SDK names an empty body JSON, too
    for name, values in parse_qs(request.body.decode(), keep_blank_values=True).items():
        value = values[-1]
        given[name] = json.loads(value) if name in ("blocks", "metadata", "files") else value
    return given


def _true(value: Any) -> bool:
    return value in (True, 1, "1", "true")


def _shown(message: dict[str, Any], with_metadata: bool) -> dict[str, Any]:
    shown = {name: value for name, value in message.items() if value is not None and name not in ("channel", "updates", "sent")}
    if message["metadata"] and not with_metadata:
        shown["metadata"] = {"event_type": message["metadata"]["event_type"]}
    return shown


def _check_content(given: dict[str, Any]) -> None:
    blocks = given.get("blocks") or []
    if not given.get("text"):
        raise Refusal("no_text")
    if len(given["text"]) > 40_000:
        raise Refusal("msg_too_long")
    if len(blocks) > BLOCKS or not all(_is_block(block) for block in blocks):
        raise Refusal("invalid_blocks")
    if len(json.dumps(blocks)) > PAYLOAD:
        raise Refusal("msg_blocks_too_long")


def _is_block(block: Any) -> bool:
    if not isinstance(block, dict) or block.get("type") not in BLOCK_TYPES:
        return False
    if block["type"] == "header":
        return block.get("text", {}).get("type") == "plain_text" and _fits(block["text"], HEADER)
    if block["type"] == "context":
        return 1 <= len(block.get("elements", [])) <= CONTEXT
    if block["type"] == "section":
        fields = block.get("fields", [])
        if len(fields) > FIELDS or ("text" not in block and not fields):
            return False
        return ("text" not in block or _fits(block["text"], SECTION)) and all(_fits(item, FIELD) for item in fields)
    return True


def _fits(item: dict[str, Any], limit: int) -> bool:
    return 1 <= len(item.get("text", "")) <= limit


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    payload = metadata.get("event_payload") if isinstance(metadata, dict) else None
    if not isinstance(payload, dict) or not re.fullmatch(r"[A-Za-z][\w]{0,254}", str(metadata.get("event_type"))):
        raise Refusal("invalid_metadata_format")
    if not all(isinstance(value, str | int | float | bool) for value in payload.values()):
        raise Refusal("invalid_metadata_schema")
    if len(json.dumps(metadata)) > 8_000:
        raise Refusal("metadata_too_large")
