"""Asana, REST 1.0: one task per incident, found again by its external id, or by a mark in its notes.

External ids are strong (looked up directly, unique) but belong to OAuth apps. With a personal token set ticket_external_ids to false:
the mark is then looked for in the project's tasks changed since the first attempt. The mark is written in either case.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import quote

from retention_ops.execute.destinations.http import Http
from retention_ops.execute.destinations.seam import (
    CannotTell,
    Conflict,
    DestinationError,
    Finding,
    Lookup,
    Outgoing,
    Receipt,
    Rejected,
)
from retention_ops.execute.destinations.tickets import (
    COMMENT,
    REPEATABLE,
    Examination,
    TicketSystem,
    address,
    given,
    holds_mark,
    marked,
    needed,
    oldest,
    one_line,
    parent,
    preparing,
    shortened,
)
from retention_ops.settings import Secrets, Settings

API = "https://app.asana.com/api/1.0"
NAME = 250
TEXT = 32_000
PAGE = 100
MOST_PAGES = 50
"""a look-up that would read more than this many pages cannot tell"""
CLOCKS = timedelta(hours=1)
"""how far Asana's clock may be from ours"""


class Asana(TicketSystem):
    name = "asana"

    def __init__(self, http: Http, settings: Settings, project: str):
        super().__init__(http, settings)
        self.project = project
        create = Lookup() if settings.ticket_external_ids else Lookup(wait_seconds=60, times=2)
        self.lookups: Mapping[str, Lookup] = {"create": create, "comment": COMMENT, "priority": REPEATABLE, "resolve": REPEATABLE}

    @classmethod
    def connect(cls, settings: Settings, secrets: Secrets, mode: str, timeout: tuple[float, float] = (5, 20)) -> Asana:
        project, token = needed(settings, secrets, mode, ("ticket_project", "ticket_token"))
        url = settings.ticket_url.strip() or API
        address(url)
        http = Http(
            url, headers={"Authorization": f"Bearer {token}", "Accept": "application/json"},
            timeout=timeout, secrets=[token, *secrets.values()], name=cls.name,
        )
        return cls(http, settings, project)

    def check(self) -> list[Finding]:
        look = Examination()
        look.address("Asana address", self.http.base_url)
        if look.step("Asana login", "set RETENTION_OPS_TICKET_TOKEN", self._me) is None:
            return look.findings
        look.note("Asana login", True, "the token is accepted")
        cure = "set RETENTION_OPS_TICKET_PROJECT (pilot: RETENTION_OPS_TICKET_TEST_PROJECT), or share the project with the token's user"
        look.step("Asana project", cure, lambda: self._check_project(look, cure))
        if self.settings.ticket_external_ids:
            cure = "use an OAuth app's token, or set RETENTION_OPS_TICKET_EXTERNAL_IDS=false"
            look.step("Asana external ids", cure, lambda: self._check_external_ids(look))
        if self.settings.ticket_priority_field:
            look.step("Asana priority", "set RETENTION_OPS_TICKET_PRIORITY_FIELD", lambda: self._check_priority(look))
        look.note("Asana permissions", None, "whether tasks may be created and edited shows only when they are")
        return look.findings

    def _create(self, action: Outgoing) -> Receipt:
        payload = action.payload
        labels = ", ".join(payload.get("labels", []))
        notes = shortened(payload["description"], TEXT) + (f"\n\nLabels: {labels}" if labels else "")
        task: dict[str, Any] = {"projects": [action.target or self.project], "notes": marked(notes, action.key)}
        if self.settings.ticket_priority_field:
            with preparing():
                task |= {"name": one_line(payload["title"], NAME), "custom_fields": self._priority_value(payload["priority"])}
        else:
            task["name"] = self._titled(payload["title"], payload["priority"])
        if self.settings.ticket_external_ids:
            task["external"] = {"gid": action.key}
        try:
            answer = self.http.request("POST", "/tasks", json={"data": task}, params={"opt_fields": "permalink_url"})
        except Rejected:
            # Asana does not say in a documented way that an external id is taken, so any refusal is followed by a look
            if existing := self._taken(action):
                raise Conflict("asana: already holds a task with this key", existing) from None
            raise
        given(answer, self.name, "data", "gid")
        return self._task(answer.json()["data"])

    def _taken(self, action: Outgoing) -> Receipt | None:
        if not self.settings.ticket_external_ids:
            return None
        try:
            return self._by_external_id(action.key)
        except DestinationError:
            return None

    def _comment(self, action: Outgoing) -> Receipt:
        text = marked(shortened(action.payload["text"], TEXT), action.key)
        answer = self.http.request("POST", f"{_path(parent(action))}/stories", json={"data": {"text": text}})
        return Receipt(str(given(answer, self.name, "data", "gid")), _page(parent(action)), {"task": parent(action)})

    def _prioritise(self, action: Outgoing) -> Receipt:
        return self._put(parent(action), self._with_priority(parent(action), action.payload["priority"]))

    def _resolve(self, action: Outgoing) -> Receipt:
        return self._put(parent(action), {"completed": True})

    def _find_ticket(self, action: Outgoing) -> Receipt | None:
        # the mark is looked for too: were an external id ever dropped in silence, absence would be believed wrongly
        return (self._by_external_id(action.key) if self.settings.ticket_external_ids else None) or self._by_mark(action)

    def _put(self, task: str, values: dict[str, Any]) -> Receipt:
        answer = self.http.request("PUT", _path(task), json={"data": values}, params={"opt_fields": "permalink_url"})
        given(answer, self.name, "data", "gid")
        return self._task(answer.json()["data"])

    def _with_priority(self, task: str, priority: str) -> dict[str, Any]:
        if self.settings.ticket_priority_field:
            return {"custom_fields": self._priority_value(priority)}
        name = given(self.http.request("GET", _path(task), params={"opt_fields": "name"}), self.name, "data", "name")
        return {"name": self._titled(name, priority)}

    def _titled(self, title: str, priority: str) -> str:
        """The title with its priority in front, in place of the one that stood there."""
        for known in (self.settings.ticket_priority_warning, self.settings.ticket_priority_critical):
            title = title.removeprefix(f"[{known}] ")
        return one_line(f"[{priority}] {title}", NAME)

    def _priority_value(self, priority: str) -> dict[str, str]:
        options = self._priority_options()
        if priority not in options:
            raise Rejected(f"asana: the priority field has no option {priority}; there are: {', '.join(options) or 'none'}")
        return {self.settings.ticket_priority_field: options[priority]}

    def _priority_options(self) -> dict[str, str]:
        path = f"/custom_fields/{quote(self.settings.ticket_priority_field, safe='')}"
        options = given(self.http.request("GET", path), self.name, "data", "enum_options")
        return {option["name"]: option["gid"] for option in options if option.get("enabled", True)}

    def _by_external_id(self, key: str) -> Receipt | None:
        path = f"/tasks/external:{quote(key, safe='')}"
        answer = self.http.request("GET", path, params={"opt_fields": "permalink_url"}, expect=(200, 404))
        return self._task(given(answer, self.name, "data")) if answer.status_code == 200 else None

    def _by_mark(self, action: Outgoing) -> Receipt | None:
        params = {"project": action.target or self.project, "opt_fields": "notes,created_at,permalink_url"}
        if action.first_attempt_at:
            params["modified_since"] = (action.first_attempt_at - CLOCKS).isoformat()
        found = [task for task in self._pages("/tasks", params) if holds_mark(task.get("notes") or "", action.key)]
        return oldest([self._task(task) for task in sorted(found, key=lambda task: (task.get("created_at") or "", task["gid"]))])

    def _find_comment(self, action: Outgoing) -> Receipt | None:
        task = parent(action)
        stories = self._pages(f"{_path(task)}/stories", {"opt_fields": "text,created_at"})
        found = [story["gid"] for story in stories if holds_mark(story.get("text") or "", action.key)]
        return oldest([Receipt(str(gid), _page(task), {"task": task}) for gid in found])

    def _pages(self, path: str, params: dict[str, Any]) -> Iterator[dict[str, Any]]:
        offset = {}
        for _ in range(MOST_PAGES):
            answer = self.http.request("GET", path, params={**params, "limit": PAGE, **offset})
            yield from given(answer, self.name, "data")
            following = answer.json().get("next_page")
            if not following:
                return
            offset = {"offset": following["offset"]}
        raise CannotTell(f"asana: more than {MOST_PAGES * PAGE} entries to look through")

    def _task(self, task: dict[str, Any]) -> Receipt:
        return Receipt(str(task["gid"]), task.get("permalink_url") or _page(task["gid"]))

    def _me(self) -> Any:
        return given(self.http.request("GET", "/users/me"), self.name, "data")

    def _check_project(self, look: Examination, cure: str) -> None:
        path = f"/projects/{quote(self.project, safe='')}"
        project = given(self.http.request("GET", path, params={"opt_fields": "name,archived"}), self.name, "data")
        look.note("Asana project", not project.get("archived"), "archived" if project.get("archived") else "can be seen", cure)

    def _check_external_ids(self, look: Examination) -> None:
        self._by_external_id("retention-ops-doctor")
        look.note("Asana external ids", True, "can be looked up with this token")

    def _check_priority(self, look: Examination) -> None:
        wanted = {name: getattr(self.settings, name) for name in ("ticket_priority_warning", "ticket_priority_critical")}
        look.names("Asana priority", wanted, list(self._priority_options()))


def _path(task: str) -> str:
    return f"/tasks/{quote(task, safe='')}"


def _page(task: str) -> str:
    """Where people see a task when Asana did not say."""
    return f"https://app.asana.com/0/0/{task}"
