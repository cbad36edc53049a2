"""A fake Asana (REST 1.0): data envelopes, its error objects, external ids that are unique and refused to personal tokens.

Asana documents that external ids need OAuth, not what it answers otherwise nor to a second use: 403 and 400 here are assumptions.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from retention_ops_tests.execute.servers.loopback import LoopbackServer, Reply, Request

TOKEN = "asana-token-canary"
PROJECT, FIELD = "1200000000000001", "1200000000000009"
OPTIONS = {"High": "31", "Highest": "32"}


class FakeAsana(LoopbackServer):
    """One project, one enum custom field. `oauth=False` makes the token a personal one."""

    def __init__(self, oauth: bool = True):
        super().__init__()
        self.oauth = oauth
        self.tasks: dict[str, dict[str, Any]] = {}
        self.stories: dict[str, list[dict[str, Any]]] = {}

    def handle(self, request: Request) -> Reply:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return _error(401, "Not Authorized")
        routes = {
            r"GET /users/me": lambda: _data({"gid": "7"}),
            r"GET /projects/(.+)": lambda gid: _data({"gid": gid, "archived": False}) if gid == PROJECT else _unknown("project", gid),
            r"GET /custom_fields/(.+)": self._field,
            r"POST /tasks": lambda: self._create(request),
            r"GET /tasks": lambda: self._list(request),
            r"GET /tasks/([^/]+)": self._read,
            r"PUT /tasks/([^/]+)": lambda gid: self._edit(gid, request),
            r"POST /tasks/([^/]+)/stories": lambda gid: self._comment(gid, request),
            r"GET /tasks/([^/]+)/stories": lambda gid: self._stories(gid, request),
        }
        for pattern, answer in routes.items():
            if found := re.fullmatch(pattern, f"{request.method} {request.path}"):
                return answer(*found.groups())
        return _error(404, "No matching route for request")

    def _create(self, request: Request) -> Reply:
        task = (request.json() or {}).get("data")
        if task is None:
            return _error(400, "Could not parse request data, invalid JSON")
        if task.get("projects") != [PROJECT]:
            return _error(400, "projects: Unknown object")
        if refused := self._external(task) or self._custom(task):
            return refused
        gid = str(1300000000000001 + len(self.tasks))
        self.tasks[gid] = {"completed": False, "created_at": datetime.now(UTC).isoformat(), **task, "gid": gid}
        self.stories[gid] = []
        return _data(self._shown(gid), 201)

    def _external(self, task: dict[str, Any]) -> Reply | None:
        if "external" not in task:
            return None
        if not self.oauth:
            return _error(403, "Forbidden: external data needs OAuth")
        taken = any(other.get("external") == task["external"] for other in self.tasks.values())
        return _error(400, "external: gid: already in use") if taken else None

    def _custom(self, task: dict[str, Any]) -> Reply | None:
        wrong = [gid for gid, value in task.get("custom_fields", {}).items() if gid != FIELD or value not in OPTIONS.values()]
        return _error(400, "custom_fields: Not a recognized ID") if wrong else None

    def _resolve(self, gid: str) -> str | None:
        if gid.startswith("external:"):
            wanted = gid.removeprefix("external:")
            return next((own for own, task in self.tasks.items() if task.get("external", {}).get("gid") == wanted), None)
        return gid if gid in self.tasks else None

    def _read(self, gid: str) -> Reply:
        if gid.startswith("external:") and not self.oauth:
            return _error(403, "Forbidden: external data needs OAuth")
        own = self._resolve(gid)
        return _data(self._shown(own)) if own else _unknown("task", gid)

    def _shown(self, gid: str) -> dict[str, Any]:
        return {**self.tasks[gid], "permalink_url": f"https://app.asana.com/1/1/project/{PROJECT}/task/{gid}"}

    def _edit(self, gid: str, request: Request) -> Reply:
        if gid not in self.tasks:
            return _unknown("task", gid)
        if refused := self._custom(request.json()["data"]):
            return refused
        self.tasks[gid] |= request.json()["data"]
        return _data(self._shown(gid))

    def _list(self, request: Request) -> Reply:
        if request.query.get("project") != [PROJECT]:
            return _unknown("project", str(request.query.get("project")))
        since = datetime.fromisoformat(request.query.get("modified_since", ["2000-01-01T00:00:00+00:00"])[0])
        return _page([self._shown(gid) for gid, task in self.tasks.items() if datetime.fromisoformat(task["created_at"]) >= since], request)

    def _comment(self, gid: str, request: Request) -> Reply:
        if gid not in self.tasks:
            return _unknown("task", gid)
        self.stories[gid].append({"gid": str(1400000000000001 + len(self.stories[gid])), "text": request.json()["data"]["text"]})
        return _data(self.stories[gid][-1], 201)

    def _stories(self, gid: str, request: Request) -> Reply:
        return _page(self.stories[gid], request) if gid in self.tasks else _unknown("task", gid)

    def _field(self, gid: str) -> Reply:
        if gid != FIELD:
            return _unknown("custom_field", gid)
        return _data({"gid": gid, "enum_options": [{"gid": value, "name": name, "enabled": True} for name, value in OPTIONS.items()]})


def _page(rows: list[dict[str, Any]], request: Request) -> Reply:
    start, size = int(request.query.get("offset", ["0"])[0]), min(int(request.query["limit"][0]), 5)  # small, so that paging is exercised
    more = {"offset": str(start + size)} if start + size < len(rows) else None
    return Reply(200, {"data": rows[start : start + size], "next_page": more})


def _data(value: Any, status: int = 200) -> Reply:
    return Reply(status, {"data": value})


def _unknown(kind: str, gid: str) -> Reply:
    return _error(404, f"{kind}: Unknown object: {gid}")


def _error(status: int, message: str) -> Reply:
    return Reply(status, {"errors": [{"message": message, "help": "For more information on API status codes and how to handle them"}]})
