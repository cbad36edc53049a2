"""A fake Jira Cloud (REST v3): refuses what Jira refuses, and its search shows a new issue only after `index_delay_seconds`.

From Atlassian's documentation: status codes, error objects, required fields, ADF, labels without spaces, transitions, permissions.
Not imitated: screens and workflows beyond one, rate limits by cost, wiki markup.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable
from typing import Any

from retention_ops_tests.execute.servers.loopback import LoopbackServer, Reply, Request

USER, TOKEN = "robot@example.test", "jira-token-canary"
BLOCKS = {
    "doc": ("paragraph", "heading", "bulletList", "orderedList", "blockquote", "codeBlock", "rule", "table"),
    "blockquote": ("paragraph", "bulletList", "orderedList", "codeBlock"),
    "bulletList": ("listItem",), "orderedList": ("listItem",), "listItem": ("paragraph", "bulletList", "orderedList", "codeBlock"),
    "table": ("tableRow",), "tableRow": ("tableHeader", "tableCell"),
    "tableHeader": ("paragraph", "bulletList", "orderedList", "codeBlock", "heading", "rule", "blockquote"),
    "tableCell": ("paragraph", "bulletList", "orderedList", "codeBlock", "heading", "rule", "blockquote"),
    "paragraph": ("text", "hardBreak"), "heading": ("text", "hardBreak"), "codeBlock": ("text",),
    "text": (), "hardBreak": (), "rule": (),
}
FILLED_BLOCKS = ("blockquote", "bulletList", "orderedList", "listItem", "table", "tableRow", "tableHeader", "tableCell")
MARKS = ("strong", "em", "code", "link", "strike", "underline")


class FakeJira(LoopbackServer):
    """One project RET with issue types Task and Bug; statuses To Do, In Progress, Done."""

    def __init__(self, index_delay_seconds: float = 0, now: Callable[[], float] = time.monotonic):
        super().__init__()
        self.index_delay_seconds = index_delay_seconds
        self.now = now
        self.projects = ["RET"]
        self.priorities = ["Highest", "High", "Medium"]
        self.statuses = ["To Do", "In Progress", "Done"]
        self.denied: set[str] = set()
        self.required: list[str] = []
        self.issues: dict[str, dict[str, Any]] = {}
        """key -> fields, properties, comments and the moment it was made"""

    def handle(self, request: Request) -> Reply:
        pair = base64.b64encode(f"{USER}:{TOKEN}".encode()).decode()
        if request.headers.get("authorization") != f"Basic {pair}":
            return Reply(401, {"message": "Client must be authenticated to access this resource.", "status-code": 401})
        routes = {
            r"GET /rest/api/3/myself": lambda: Reply(200, {"accountId": "robot"}, {"X-RateLimit-Remaining": "99"}),
            r"GET /rest/api/3/mypermissions": lambda: self._permissions(request),
            r"GET /rest/api/3/project/([^/]+)": lambda key: self._project(key, {"key": key}),
            r"GET /rest/api/3/project/([^/]+)/statuses": lambda key: self._project(key, self._statuses()),
            r"GET /rest/api/3/issue/createmeta/([^/]+)/issuetypes": lambda key: self._project(key, {"issueTypes": self._types()}),
            r"GET /rest/api/3/issue/createmeta/([^/]+)/issuetypes/\d+": lambda key: self._project(key, {"fields": self._fields()}),
            r"POST /rest/api/3/search/jql": lambda: self._search(request.json()),
            r"POST /rest/api/3/issue": lambda: self._create(request.json()),
            r"GET /rest/api/3/issue/([^/]+)": lambda key: self._read(key),
            r"PUT /rest/api/3/issue/([^/]+)": lambda key: self._edit(key, request.json()),
            r"POST /rest/api/3/issue/([^/]+)/comment": lambda key: self._comment(key, request.json()),
            r"GET /rest/api/3/issue/([^/]+)/comment": lambda key: self._comments(key, request),
            r"GET /rest/api/3/issue/([^/]+)/transitions": lambda key: self._transitions(key),
            r"POST /rest/api/3/issue/([^/]+)/transitions": lambda key: self._move(key, request.json()),
        }
        for pattern, answer in routes.items():
            if found := re.fullmatch(pattern, f"{request.method} {request.path}"):
                return answer(*found.groups())
        return Reply(404, {"errorMessages": ["null for uri"]})

    def _create(self, body: dict[str, Any]) -> Reply:
        errors = self._wrong(body["fields"])
        if errors:
            return Reply(400, {"errorMessages": [], "errors": errors})
        key = f"RET-{len(self.issues) + 1}"
        self.issues[key] = {"fields": body["fields"] | {"status": "To Do"}, "properties": body.get("properties", []), "comments": [],
                            "made": self.now()}
        return Reply(201, {"id": str(10_000 + len(self.issues)), "key": key, "self": f"{self.url}/rest/api/3/issue/{key}"})

    def _wrong(self, fields: dict[str, Any]) -> dict[str, str]:
        errors = {}
        if fields.get("project", {}).get("key") not in self.projects:
            errors["project"] = "valid project is required"
        if fields.get("issuetype", {}).get("name") not in [kind["name"] for kind in self._types()]:
            errors["issuetype"] = "Specify a valid issue type"
        summary = fields.get("summary", "")
        if not summary.strip():
            errors["summary"] = "You must specify a summary of the issue."
        elif len(summary) > 255:
            errors["summary"] = "Summary can't exceed 255 characters."
        elif "\n" in summary:
            errors["summary"] = "The summary is invalid because it contains newline characters."
        if fields.get("priority", {}).get("name") not in self.priorities:
            errors["priority"] = "Specify the Priority (name) in the string format"
        if bad := next((label for label in fields.get("labels", []) if " " in label or len(label) > 255), None):
            errors["labels"] = f"The label '{bad}' contains spaces which is invalid."
        if said := unfit(fields.get("description")):
            errors["description"] = said
        return errors

    def _search(self, body: dict[str, Any]) -> Reply:
        found = re.fullmatch(r'project = "(.*)" AND labels = "([^" ]+)" ORDER BY created ASC, key ASC', body["jql"])
        if not found:
            return Reply(400, {"errorMessages": ["Error in the JQL Query"], "errors": {}})
        if found[1] not in self.projects:
            return Reply(400, {"errorMessages": [f"The value '{found[1]}' does not exist for the field 'project'."], "errors": {}})
        seen = [
            key for key, issue in self.issues.items()
            if found[2] in issue["fields"]["labels"] and self.now() - issue["made"] >= self.index_delay_seconds
        ]
        return Reply(200, {"issues": [{"id": key, "key": key} for key in seen], "isLast": True})

    def _read(self, key: str) -> Reply:
        if key not in self.issues:
            return _no_issue()
        return Reply(200, {"key": key, "fields": {"status": {"name": self.issues[key]["fields"]["status"]}}})

    def _edit(self, key: str, body: dict[str, Any]) -> Reply:
        if key not in self.issues:
            return _no_issue()
        if body["fields"]["priority"]["name"] not in self.priorities:
            return Reply(400, {"errorMessages": [], "errors": {"priority": "The priority selected is invalid."}})
        self.issues[key]["fields"] |= body["fields"]
        return Reply(204, b"")

    def _comment(self, key: str, body: dict[str, Any]) -> Reply:
        if key not in self.issues:
            return _no_issue()
        if said := unfit(body.get("body")):
            return Reply(400, {"errorMessages": [], "errors": {"comment": said}})
        comments = self.issues[key]["comments"]
        comments.append({"id": str(20_000 + len(comments)), "body": body["body"]})
        return Reply(201, comments[-1])

    def _comments(self, key: str, request: Request) -> Reply:
        if key not in self.issues:
            return _no_issue()
        comments, start = self.issues[key]["comments"], int(request.query["startAt"][0])
        page = comments[start : start + min(int(request.query["maxResults"][0]), 5)]  # small pages, so that paging is exercised
        return Reply(200, {"startAt": start, "total": len(comments), "comments": page})

    def _transitions(self, key: str) -> Reply:
        if key not in self.issues:
            return _no_issue()
        ways = [name for name in self.statuses if name != self.issues[key]["fields"]["status"]]
        return Reply(200, {"transitions": [
            {"id": str(self.statuses.index(name)), "name": f"Go {name}", "to": {"name": name}} for name in ways
        ]})

    def _move(self, key: str, body: dict[str, Any]) -> Reply:
        wanted = self.statuses[int(body["transition"]["id"])]
        if wanted == self.issues[key]["fields"]["status"]:
            return Reply(400, {"errorMessages": ["It seems that you have tried to perform an illegal workflow operation."], "errors": {}})
        self.issues[key]["fields"]["status"] = wanted
        return Reply(204, b"")

    def _permissions(self, request: Request) -> Reply:
        names = request.query["permissions"][0].split(",")
        return Reply(200, {"permissions": {name: {"key": name, "havePermission": name not in self.denied} for name in names}})

    def _project(self, key: str, answer: Any) -> Reply:
        if key not in self.projects:
            return Reply(404, {"errorMessages": [f"No project could be found with key '{key}'."], "errors": {}})
        return Reply(200, answer)

    def _types(self) -> list[dict[str, str]]:
        return [{"id": "1", "name": "Task"}, {"id": "2", "name": "Bug"}]

    def _statuses(self) -> list[dict[str, Any]]:
        return [{"name": kind["name"], "statuses": [{"name": name} for name in self.statuses]} for kind in self._types()]

    def _fields(self) -> list[dict[str, Any]]:
        plain = [{"fieldId": name, "required": name in ("summary", "project", "issuetype")} for name in
                 ("summary", "project", "issuetype", "description", "labels")]
        required = [{"fieldId": name, "required": True, "hasDefaultValue": False} for name in self.required]
        priority = {"fieldId": "priority", "required": False, "allowedValues": [{"name": name} for name in self.priorities]}
        return [*plain, *required, priority]


def _no_issue() -> Reply:
    return Reply(404, {"errorMessages": ["Issue does not exist or you do not have permission to see it."], "errors": {}})


def unfit(document: Any) -> str:
    """Why Jira would refuse this as a rich text, or nothing."""
    if not isinstance(document, dict) or document.get("type") != "doc" or document.get("version") != 1:
        return "Operation value must be an Atlassian Document (see the Atlassian Document Format)"
    if len(json.dumps(document)) > 32_767:
        return "The entered text is too long. It exceeds the allowed limit of 32,767 characters."
    return "" if _fits(document) else "INVALID_INPUT"


def _fits(node: dict[str, Any]) -> bool:
    kind = node["type"]
    if set(node) - {"type", "version", "content", "attrs", "text", "marks"}:
        return False
    if kind == "text":
        marks = [mark["type"] for mark in node.get("marks", [])]
        alone = "code" not in marks or set(marks) <= {"code", "link"}
        return bool(node["text"]) and all(mark in MARKS for mark in marks) and len(set(marks)) == len(marks) and alone
    content = node.get("content", [])
    if kind in FILLED_BLOCKS and not content:
        return False
    if kind == "listItem" and content[0]["type"] in ("bulletList", "orderedList"):
        return False
    if kind == "heading" and node.get("attrs", {}).get("level") not in range(1, 7):
        return False
    if kind == "codeBlock" and any(child.get("marks") for child in content):
        return False
    return all(child["type"] in BLOCKS.get(kind, ()) and _fits(child) for child in content)
