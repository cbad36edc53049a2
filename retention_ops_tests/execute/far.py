"""The far sides of the fault matrix: each destination behind its loopback server, and what is really there afterwards.

A `Far` is one installation of one destination. Its steps are not written down here: they are read from its journal.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any, ClassVar

import requests

from retention_ops.clock import Clock
from retention_ops.execute import ledger
from retention_ops.execute.destinations.asana import Asana
from retention_ops.execute.destinations.dagster import KEY_TAG, Dagster
from retention_ops.execute.destinations.jira import Jira
from retention_ops.execute.destinations.local import EXPORTS, Local
from retention_ops.execute.destinations.mail import Mail
from retention_ops.execute.destinations.roundup import Roundup
from retention_ops.execute.destinations.seam import Destination, Table
from retention_ops.execute.destinations.sheets import Sheets
from retention_ops.execute.destinations.slack import Slack
from retention_ops.execute.destinations.tickets import mark
from retention_ops.execute.destinations.webhook import Webhook
from retention_ops.execute.door import Content
from retention_ops.execute.ledger import Row
from retention_ops.package.brief import CHART_FILE
from retention_ops.package.pack import OUTBOX, find_pack, verify
from retention_ops.settings import Secrets, Settings
from retention_ops_tests.execute.servers import asana as asana_server
from retention_ops_tests.execute.servers import jira as jira_server
from retention_ops_tests.execute.servers import roundup as roundup_server
from retention_ops_tests.execute.servers import slack as slack_server
from retention_ops_tests.execute.servers import webhook as webhook_server
from retention_ops_tests.execute.servers.asana import FakeAsana
from retention_ops_tests.execute.servers.dagster import DagsterServer
from retention_ops_tests.execute.servers.jira import FakeJira
from retention_ops_tests.execute.servers.loopback import FAULTS, Fault
from retention_ops_tests.execute.servers.mail import MailServer
from retention_ops_tests.execute.servers.roundup import RoundupServer
from retention_ops_tests.execute.servers.sheets import EMAIL, Sheet, SheetsServer
from retention_ops_tests.execute.servers.slack import SlackServer
from retention_ops_tests.execute.servers.webhook import WebhookServer

QUICK = 0.25
"""seconds of patience of a client in a case about patience; else PATIENT"""
SLOW = 0.4
"""seconds a slow server takes"""
PATIENT = 10.0
HISTORY_LAG, INDEX_LAG = 20.0, 400.0
"""seconds until the fake Slack's history and the fake Jira's search show what was accepted"""
TABLES = {
    "P1 list": Table(("customer_id", "revenue"), [("c-1", 1200.5), ("c-2", -3)]),
    "P2 list": Table(("customer_id", "revenue"), [("c-3", 40)]),
}

DAGSTER_HOME = "0" * 32

CONNECT: dict[str, Callable[..., Destination]] = {
    "slack": lambda settings, secrets, clock, patience: Slack.connect(settings, secrets, "live", timeout=patience),
    "jira": lambda settings, secrets, clock, patience: Jira.connect(settings, secrets, "live", (5, patience)),
    "asana": lambda settings, secrets, clock, patience: Asana.connect(settings, secrets, "live", (5, patience)),
    "roundup": lambda settings, secrets, clock, patience: Roundup.connect(settings, secrets, "live", (5, patience)),
    "sheets": lambda settings, secrets, clock, patience: Sheets.connect(settings, secrets, "live", (5, patience)),
    "webhook": lambda settings, secrets, clock, patience: Webhook.connect(settings, secrets, "live", clock, (5, patience)),
    "mail": lambda settings, secrets, clock, patience: Mail.connect(settings, secrets, "live", timeout=patience),
    "dagster": lambda settings, secrets, clock, patience: Dagster(settings.dagster_url, DAGSTER_HOME, (5, patience)),
    "local": lambda settings, secrets, clock, patience: Local(settings, "live"),
}


@dataclass
class Time:
    """A clock that only moves when it is told to."""

    now: datetime

    def __call__(self) -> datetime:
        return self.now


@dataclass
class Aim:
    """Faults by the number of the request they hit, counted from the moment of aiming."""

    faults: Mapping[int, str]
    seen: int = 0

    def next(self) -> str:
        self.seen += 1
        return self.faults.get(self.seen - 1, "")

    def missed(self) -> list[str]:
        """Faults whose request never came."""
        return [f"{name} at request {number}" for number, name in self.faults.items() if number >= self.seen]


@dataclass(kw_only=True)
class Far:
    """`start` brings the server up, `reset` empties it, `ids` names what is there for an action: [] none, two: a duplicate."""

    label: str
    slot: str
    destination: str
    settings: dict[str, Any] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    server: Any = None
    parents: ClassVar[dict[str, str]] = {}
    """kind -> the kind it builds on"""
    wire_faults: ClassVar[tuple[str, ...]] = FAULTS

    def start(self, stack: ExitStack, folder: Path, clock: Clock) -> None:
        """Runs the far side until the stack is closed."""

    def reset(self) -> None:
        """Forgets what earlier cases left."""

    def kinds(self, settings: Settings, clock: Clock) -> list[str]:
        """What the destination itself declares."""
        return list(CONNECT[self.destination](settings, Secrets(**self.secrets), clock, PATIENT).lookups)

    def payload(self, kind: str, case: str) -> dict[str, Any]:
        raise NotImplementedError

    def target(self, kind: str, settings: Settings) -> str:
        return ""

    def load(self, row: Row) -> Content:
        return Content()

    def ids(self, row: Row) -> list[str]:
        raise NotImplementedError

    def aim(self, faults: Mapping[int, str]) -> Aim:
        """The n-th request from now on meets its fault."""
        aim = Aim(faults)
        self.server.delay = SLOW
        self.server._http.handle_error = lambda *_: None  # a client that died is no news here

        def next_fault(line: str) -> Fault | None:
            name = aim.next()
            return Fault(name, line, 1, "1", None) if name else None

        self.server._next_fault = next_fault
        return aim

    def journal(self) -> list[str]:
        """What was asked since the last reset or look: method and path, numbers and ids left out."""
        lines = [f"{request.method} {_pattern(request.path)}" for request in self.server.requests]
        self.server.requests.clear()
        return lines


def _pattern(path: str) -> str:
    path = re.sub(r"(?<=/)(RET-\d+|\d{2,}|F\d{8})|(?<=/issue/)\d+", "{id}", path)
    return re.sub(r"external:\w+", "external:{key}", path).replace("/spreadsheets/book", "/spreadsheets/{id}")


class SlackFar(Far):
    parents: ClassVar = {"reply": "post", "chart": "post", "update": "post"}

    def start(self, stack: ExitStack, folder: Path, clock: Clock) -> None:
        self.server = stack.enter_context(SlackServer(clock=lambda: clock().timestamp()))
        self.server.history_lag_seconds = HISTORY_LAG
        self.settings = {"messages_to": "slack", "slack_channel": slack_server.CHANNEL, "slack_api_url": self.server.api_url}
        self.secrets = {"slack_token": slack_server.TOKEN}

    def reset(self) -> None:
        self.server.messages.clear()
        self.server.files.clear()
        self.server._last = 0  # its times follow the clock, which is set back for each case

    def target(self, kind: str, settings: Settings) -> str:
        return slack_server.CHANNEL

    def payload(self, kind: str, case: str) -> dict[str, Any]:
        text = f"{kind} of {case}"
        block = {"type": "section", "text": {"type": "mrkdwn", "text": text}}
        return {"title": "Trend"} if kind == "chart" else {"text": text, "blocks": [block], "broadcast": False}

    def load(self, row: Row) -> Content:
        return Content(files={CHART_FILE: b"\x89PNG not really"} if row["kind"] == "chart" else {})

    def ids(self, row: Row) -> list[str]:
        messages = self.server.messages
        if row["kind"] == "chart":
            return [file["id"] for message in messages for file in message["files"] if row["key"][:12] in file["title"]]
        if row["kind"] == "update":
            return [message["ts"] for message in messages if message["blocks"] == row["payload"]["blocks"]]
        marked = [message for message in messages if message["metadata"]]
        return [message["ts"] for message in marked if message["metadata"]["event_payload"]["key"] == row["key"]]


class TicketFar(Far):
    parents: ClassVar = {"comment": "create", "priority": "create", "resolve": "create"}
    priorities: ClassVar = ("High", "Highest")
    resolved: ClassVar = "Done"

    def payload(self, kind: str, case: str) -> dict[str, Any]:
        low, high = self.priorities
        return {
            "create": {"title": case, "priority": low, "severity": "WARNING", "labels": ["retention"], "description": f"# {case}\n\ntext"},
            "comment": {"text": f"a comment about {case}"}, "priority": {"priority": high}, "resolve": {"status": self.resolved},
        }[kind]


class JiraFar(TicketFar):
    def start(self, stack: ExitStack, folder: Path, clock: Clock) -> None:
        self.server = stack.enter_context(FakeJira(INDEX_LAG, lambda: clock().timestamp()))
        self.settings = {"tickets_to": "jira", "ticket_user": jira_server.USER, "ticket_project": "RET", "ticket_url": self.server.url}
        self.secrets = {"ticket_token": jira_server.TOKEN}

    def reset(self) -> None:
        self.server.issues.clear()

    def ids(self, row: Row) -> list[str]:
        issues, kind = self.server.issues, row["kind"]
        if kind == "create":
            return [name for name, issue in issues.items() if mark(row["key"]) in issue["fields"]["labels"]]
        if kind == "comment":
            comments = [comment for issue in issues.values() for comment in issue["comments"]]
            return [comment["id"] for comment in comments if mark(row["key"]) in json.dumps(comment["body"])]
        if kind == "priority":
            return [name for name, issue in issues.items() if issue["fields"]["priority"]["name"] == row["payload"]["priority"]]
        return [name for name, issue in issues.items() if issue["fields"]["status"] == row["payload"]["status"]]


class AsanaFar(TicketFar):
    """External ids and a priority field, or (by marker) neither."""

    def start(self, stack: ExitStack, folder: Path, clock: Clock) -> None:
        external = "marker" not in self.label
        self.server = stack.enter_context(FakeAsana(oauth=external))
        self.settings = {
            "tickets_to": "asana", "ticket_project": asana_server.PROJECT, "ticket_url": self.server.url, "ticket_external_ids": external,
            "ticket_priority_field": asana_server.FIELD if external else "",
        }
        self.secrets = {"ticket_token": asana_server.TOKEN}

    def reset(self) -> None:
        self.server.tasks.clear()
        self.server.stories.clear()

    def ids(self, row: Row) -> list[str]:
        tasks, kind = self.server.tasks, row["kind"]
        if kind == "create":
            return [gid for gid, task in tasks.items() if mark(row["key"]) in task["notes"]]
        if kind == "comment":
            stories = [story for told in self.server.stories.values() for story in told]
            return [story["gid"] for story in stories if mark(row["key"]) in story["text"]]
        if kind == "resolve":
            return [gid for gid, task in tasks.items() if task["completed"]]
        wanted = row["payload"]["priority"]
        option = {asana_server.FIELD: asana_server.OPTIONS[wanted]}
        return [gid for gid, task in tasks.items() if task.get("custom_fields") == option or task["name"].startswith(f"[{wanted}] ")]


class RoundupFar(TicketFar):
    priorities: ClassVar = ("urgent", "critical")
    resolved: ClassVar = "resolved"

    def start(self, stack: ExitStack, folder: Path, clock: Clock) -> None:
        self.server = stack.enter_context(RoundupServer(folder / "roundup"))
        self.settings = {
            "tickets_to": "roundup", "ticket_user": "admin", "ticket_priority_warning": "urgent", "ticket_priority_critical": "critical",
            "ticket_resolved_status": "resolved", "ticket_url": self.server.url,
        }
        self.secrets = {"ticket_token": roundup_server.PASSWORD}

    def ids(self, row: Row) -> list[str]:
        """Asked of the tracker itself, over its REST interface."""
        kind = row["kind"]
        if kind == "create":
            return [issue["id"] for issue in self._read("issue", extkey=row["key"])["collection"]]
        parent = row["parent_id"]
        if kind == "comment":
            told = self._read(f"issue/{parent}")["attributes"]["messages"]
            marked = {one["id"] for one in told if row["key"] in str(self._read(f"msg/{one['id']}")["attributes"]["messageid"])}
            return sorted(marked)
        name, wanted = ("priority", row["payload"].get("priority")) if kind == "priority" else ("status", row["payload"].get("status"))
        number = self._read(f"issue/{parent}")["attributes"][name]["id"]
        return [parent] if self._read(f"{name}/{number}")["attributes"]["name"] == wanted else []

    def _read(self, path: str, **params: str) -> Any:
        address = f"{self.server.url}/rest/data/{path}"
        answer = requests.get(address, params=params, auth=("admin", roundup_server.PASSWORD), timeout=30)
        return answer.json()["data"]


class SheetsFar(Far):
    def kinds(self, settings: Settings, clock: Clock) -> list[str]:
        return ["publish"]  # a withdraw creates nothing that could be there twice; test_sheets.py has its faults

    def start(self, stack: ExitStack, folder: Path, clock: Clock) -> None:
        self.server = stack.enter_context(SheetsServer())
        self.settings = {"lists_to": "sheets", "sheets_spreadsheet": "book", "sheets_api_url": self.server.url}
        self.secrets = {"google_credentials": self.server.credentials()}

    def reset(self) -> None:
        self.server.sheets = {"book": [Sheet(0, "Sheet1", 1000, 26)]}
        self.server.editors = {"book": {EMAIL}}

    def target(self, kind: str, settings: Settings) -> str:
        return "book"

    def payload(self, kind: str, case: str) -> dict[str, Any]:
        worksheets = [{"title": title, "tier": title[:2], "file": "", "rows": len(table.rows)} for title, table in TABLES.items()]
        return {"worksheets": worksheets, "audience_sha256": "0" * 64}

    def load(self, row: Row) -> Content:
        return Content(tables=TABLES)

    def ids(self, row: Row) -> list[str]:
        """A list counts when its worksheet bears its title and the action's mark; half a hand-over is a fault of its own."""
        wanted = {sheet["title"]: sheet["rows"] for sheet in row["payload"]["worksheets"]}
        there = {sheet.title: sheet for sheet in self.server.sheets["book"] if sheet.title in wanted}
        for title, sheet in there.items():
            assert len(sheet.values) == wanted[title] + 1, f"{title} is there with {len(sheet.values)} of {wanted[title] + 1} rows"
            assert [mark["metadataValue"] for mark in sheet.metadata if mark["metadataKey"] == "retention_ops_key"] == [row["key"]]
        assert not there or len(there) == len(wanted), f"only {sorted(there)} of {sorted(wanted)} are there"
        return [f"book#{','.join(str(there[title].gid) for title in wanted)}"] if there else []


class WebhookFar(Far):
    """The label says which vendor, and whether its receiver drops a repeated key."""

    def start(self, stack: ExitStack, folder: Path, clock: Clock) -> None:
        vendor, dedupes = self.label.split()[1], "dedupes" in self.label
        self.server = stack.enter_context(WebhookServer(vendor, dedupes=dedupes, apikey="apikey-canary", clock=clock))
        self.settings = {"webhook_to": vendor, "webhook_dedupes": dedupes}
        self.secrets = {"webhook_url": self.server.hook, "webhook_secret": webhook_server.SECRET, "webhook_apikey": "apikey-canary"}

    def reset(self) -> None:
        self.server.accepted.clear()
        self.server._seen.clear()

    def payload(self, kind: str, case: str) -> dict[str, Any]:
        return {"event": "open", "case": case, "metrics": {"current_value": 18.4}}

    def ids(self, row: Row) -> list[str]:
        receipt = {"make": row["key"], "zapier": f"zap-{row['key'][:8]}", "generic": f"receipt-{row['key'][:8]}"}[self.server.vendor]
        return [receipt for body in self.server.accepted if body == row["payload"]]


class MailFar(Far):
    wire_faults: ClassVar = tuple(fault for fault in FAULTS if fault != "500_after")
    """in SMTP a refusal of the text means that it was not taken; a server that takes it and refuses it cannot be told from one"""

    def start(self, stack: ExitStack, folder: Path, clock: Clock) -> None:
        self.mailbox = stack.enter_context(MailServer())
        self.server = stack.enter_context(SmtpProxy(self.mailbox.port))
        self.settings = {
            "smtp_host": "127.0.0.1", "smtp_port": self.server.port, "smtp_security": "none", "mail_from": "retention@shop.example",
            "mail_to": "team@shop.example, owner@shop.example",
        }

    def reset(self) -> None:
        self.mailbox.accepted.clear()

    def target(self, kind: str, settings: Settings) -> str:
        return settings.mail_to

    def payload(self, kind: str, case: str) -> dict[str, Any]:
        return {"subject": case, "text": "text", "html": "<p>text</p>"}

    def aim(self, faults: Mapping[int, str]) -> Aim:
        self.server.aimed = Aim(faults)
        return self.server.aimed

    def journal(self) -> list[str]:
        lines, self.server.said = self.server.said, []
        return lines

    def ids(self, row: Row) -> list[str]:
        sent = [mail.message["Message-ID"] for mail in self.mailbox.accepted]
        return [name for name in sent if row["key"] in name]


class DagsterFar(Far):
    """Our own Dagster: a run is there when one bears the key."""

    def start(self, stack: ExitStack, folder: Path, clock: Clock) -> None:
        self.server = stack.enter_context(DagsterServer(DAGSTER_HOME))
        self.settings = {"dagster_url": self.server.url}

    def reset(self) -> None:
        self.server.runs.clear()

    def payload(self, kind: str, case: str) -> dict[str, Any]:
        return {"job": "a_job", "tags": {"case": case}}

    def ids(self, row: Row) -> list[str]:
        tag = {"key": KEY_TAG, "value": row["key"]}
        return [run["runId"] for run in self.server.runs if tag in run["tags"]]


class LocalFar(Far):
    """The outbox of a pack: no wire, so only kills and a full ledger can hit it."""

    wire_faults: ClassVar = ()
    slots: ClassVar = {"post": "slack", "reply": "slack", "chart": "slack", "update": "slack", "publish": "sheets", "mail": "mail"}
    home: Path
    day: date

    def payload(self, kind: str, case: str) -> dict[str, Any]:
        sheet = {"title": "P1 list", "tier": "P1", "file": f"{ledger.digest(case)[:12]}.csv", "rows": 2, "excluded": {}}
        return {"text": case} | ({"worksheets": [sheet]} if kind == "export" else {})

    def load(self, row: Row) -> Content:
        return Content(files={row["payload"]["worksheets"][0]["file"]: row["key"].encode()} if row["kind"] == "export" else {})

    def target(self, kind: str, settings: Settings) -> str:
        return f"{self.day}/{self.slots.get(kind, 'ticket')}_{kind}"

    def aim(self, faults: Mapping[int, str]) -> Aim:
        return Aim({})

    def journal(self) -> list[str]:
        return ["write the file"]

    def ids(self, row: Row) -> list[str]:
        pack = find_pack(Settings(_env_file=None, home=self.home), self.day)
        verify(pack)
        if row["kind"] == "export":
            file = f"{EXPORTS}/{row['payload']['worksheets'][0]['file']}"
            path = pack.folder / file
            return [f"local:{self.day}/{file}"] if path.is_file() and path.read_text() == row["key"] else []
        path = pack.folder / OUTBOX / f"{row['target'].partition('/')[2]}.json"
        found = json.loads(path.read_text())["idempotency_key"] if path.is_file() else ""
        return [f"local:{row['target']}"] if found == row["key"] else []


class SmtpProxy:
    """Stands between client and mail server and lets one step of the conversation go wrong. Step 0 is the greeting."""

    def __init__(self, upstream: int):
        self.upstream = upstream
        self.said: list[str] = []
        self.aimed = Aim({})
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> SmtpProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._converse, args=(client,), daemon=True).start()

    def _converse(self, client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client, socket.create_connection(("127.0.0.1", self.upstream)) as server, suppress(OSError):
            ask, answer = client.makefile("rb"), server.makefile("rb")
            name, text = "connect", b""
            while name == "connect" or text:
                self.said.append(name)
                reply = self._step(client, server, answer, text, name)
                if not reply:
                    return
                name, text = _next_words(ask, reply)

    def _step(self, client: socket.socket, server: socket.socket, answer: Any, text: bytes, name: str) -> bytes:
        """One exchange; nothing where the connection ends here."""
        fault = self.aimed.next()
        if fault in ("429", "503", "500_before"):
            reply = {"429": b"451 4.7.1 later\r\n", "503": b"421 4.3.2 not available\r\n", "500_before": b"554 5.3.0 refused\r\n"}[fault]
            client.sendall(reply)
            return b"" if name in ("connect", "text") or fault == "503" else reply
        if fault.endswith("_before"):
            time.sleep(SLOW if fault.startswith("slow") else 0)
            return b""
        if text:
            server.sendall(text)
        reply = _reply(answer)
        if fault == "lost_after":
            return b""
        if fault == "slow_after":
            time.sleep(SLOW)
        client.sendall(reply)
        return reply


def _next_words(ask: Any, reply: bytes) -> tuple[str, bytes]:
    """The client's next command, or the whole text after the server asked for it."""
    if not reply.startswith(b"354"):
        line = ask.readline()
        return line.partition(b" ")[0].strip().decode().upper(), line
    lines = []
    while not lines or lines[-1] not in (b".\r\n", b""):
        lines.append(ask.readline())
    return "text", b"".join(lines) if lines[-1] else b""


def _reply(answer: Any) -> bytes:
    lines = [answer.readline()]
    while lines[-1][3:4] == b"-":
        lines.append(answer.readline())
    return b"".join(lines)


def fars() -> list[Far]:
    """One of every destination, in every variant that behaves differently."""
    webhooks = [f"webhook {vendor}{dedupes}" for vendor in ("make", "zapier", "generic") for dedupes in ("", " dedupes")]
    return [
        SlackFar(label="slack", slot="slack", destination="slack"),
        JiraFar(label="jira", slot="ticket", destination="jira"),
        AsanaFar(label="asana", slot="ticket", destination="asana"),
        AsanaFar(label="asana marker", slot="ticket", destination="asana"),
        RoundupFar(label="roundup", slot="ticket", destination="roundup"),
        SheetsFar(label="sheets", slot="sheets", destination="sheets"),
        *(WebhookFar(label=label, slot="webhook", destination="webhook") for label in webhooks),
        MailFar(label="mail", slot="mail", destination="mail"),
        DagsterFar(label="dagster", slot="run", destination="dagster"),
        LocalFar(label="local", slot="ticket", destination="local"),
    ]


LABELS = [far.label for far in fars()]
