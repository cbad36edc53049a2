"""Jira Cloud, REST v3: one issue per incident, found again by a label that the create call itself sets.

Jira's search shows a new issue only after seconds to minutes, so absence counts after two looks five minutes apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from retention_ops.execute.destinations import adf
from retention_ops.execute.destinations.http import NOT_REACHED_SECONDS, Http, content
from retention_ops.execute.destinations.seam import MARKER, Finding, Lookup, Outgoing, Receipt, Rejected, Throttled
from retention_ops.execute.destinations.tickets import (
    COMMENT,
    REPEATABLE,
    Examination,
    TicketSystem,
    address,
    basic,
    given,
    holds_mark,
    mark,
    needed,
    oldest,
    one_line,
    parent,
)
from retention_ops.settings import Secrets, Settings

SUMMARY = 255
PAGE = 100
PERMISSIONS = ("BROWSE_PROJECTS", "CREATE_ISSUES", "EDIT_ISSUES", "ADD_COMMENTS", "TRANSITION_ISSUES")
FILLED = ("project", "issuetype", "summary", "description", "labels", "priority", "reporter")
"""fields an issue gets from us or from Jira itself"""


class Jira(TicketSystem):
    name = "jira"
    lookups: Mapping[str, Lookup] = {
        "create": Lookup(wait_seconds=300, times=2),
        "comment": COMMENT,
        "priority": REPEATABLE,
        "resolve": REPEATABLE,
    }

    def __init__(self, http: Http, settings: Settings, project: str):
        super().__init__(http, settings)
        self.project = project

    @classmethod
    def connect(cls, settings: Settings, secrets: Secrets, mode: str, timeout: tuple[float, float] = (5, 20)) -> Jira:
        names = ("ticket_url", "ticket_user", "ticket_project", "ticket_token")
        url, user, project, token = needed(settings, secrets, mode, names)
        address(url)
        pair = basic(user, token)
        http = Http(
            url, headers={"Authorization": f"Basic {pair}", "Accept": "application/json"}, timeout=timeout,
            secrets=[token, pair, *secrets.values()], name=cls.name,
        )
        return cls(http, settings, project)

    def check(self) -> list[Finding]:
        look = Examination()
        look.address("Jira address", self.http.base_url)
        me = look.step("Jira login", "set RETENTION_OPS_TICKET_USER and RETENTION_OPS_TICKET_TOKEN", self._myself)
        if me is None:
            return look.findings
        look.note("Jira login", True, "the credentials are accepted")
        if me != "":
            look.note("Jira rate limit", None, f"{me} requests left in this period")
        cure = "set RETENTION_OPS_TICKET_PROJECT (pilot: RETENTION_OPS_TICKET_TEST_PROJECT), or ask for access"
        project = f"/rest/api/3/project/{quote(self.project, safe='')}"
        if look.step("Jira project", cure, lambda: content(self.http.request("GET", project))["key"]) is None:
            return look.findings
        look.note("Jira project", True, f"{self.project} can be seen")
        look.step("Jira permissions", "ask a Jira administrator", lambda: self._check_permissions(look))
        look.step("Jira issue type", "ask a Jira administrator", lambda: self._check_fields(look))
        look.step("Jira status", "ask a Jira administrator", lambda: self._check_status(look, project))
        return look.findings

    def _create(self, action: Outgoing) -> Receipt:
        payload = action.payload
        labels = [mark(action.key), *("-".join(label.split()) for label in payload.get("labels", []))]
        fields = {
            "project": {"key": action.target or self.project},
            "issuetype": {"name": self.settings.ticket_issue_type},
            "summary": one_line(payload["title"], SUMMARY),
            "description": adf.document(payload["description"]),
            "labels": list(dict.fromkeys(labels)),
            "priority": {"name": payload["priority"]},
        }
        answer = self.http.request("POST", "/rest/api/3/issue", json={
            "fields": fields, "properties": [{"key": MARKER, "value": {"key": action.key}}],
        })
        return self._issue(given(answer, self.name, "key"))

    def _comment(self, action: Outgoing) -> Receipt:
        issue = parent(action)
        body = adf.document(action.payload["text"], closing=f"ref {mark(action.key)}")
        answer = self.http.request("POST", f"{_path(issue)}/comment", json={"body": body})
        return self._comment_of(issue, given(answer, self.name, "id"))

    def _prioritise(self, action: Outgoing) -> Receipt:
        issue = parent(action)
        self.http.request("PUT", _path(issue), json={"fields": {"priority": {"name": action.payload["priority"]}}})
        return self._issue(issue)

    def _resolve(self, action: Outgoing) -> Receipt:
        issue = parent(action)
        wanted = action.payload.get("status") or self.settings.ticket_resolved_status
        now = given(self.http.request("GET", _path(issue), params={"fields": "status"}), self.name, "fields", "status", "name")
        if now == wanted:
            return self._issue(issue, status=wanted)
        ways = given(self.http.request("GET", f"{_path(issue)}/transitions"), self.name, "transitions")
        chosen = next((way["id"] for way in ways if way["to"]["name"] == wanted), None)
        if chosen is None:
            there = ", ".join(way["to"]["name"] for way in ways) or "nowhere"
            raise Rejected(f"jira: no transition leads from {now} to {wanted}, only to: {there}")
        answer = self.http.request("POST", f"{_path(issue)}/transitions", json={"transition": {"id": chosen}}, expect=(200, 204, 409))
        if answer.status_code == 409:  # someone else moved it at the same moment: the next attempt sees where it is
            raise Throttled("jira: the issue is being changed by someone else (409)", NOT_REACHED_SECONDS)
        return self._issue(issue, status=wanted)

    def _find_ticket(self, action: Outgoing) -> Receipt | None:
        project = (action.target or self.project).replace("\\", "\\\\").replace('"', '\\"')
        answer = self.http.request("POST", "/rest/api/3/search/jql", json={
            "jql": f'project = "{project}" AND labels = "{mark(action.key)}" ORDER BY created ASC, key ASC',
            "fields": ["created"], "maxResults": PAGE,
        })
        return oldest([self._issue(issue["key"]) for issue in given(answer, self.name, "issues")])

    def _find_comment(self, action: Outgoing) -> Receipt | None:
        issue, found, start = parent(action), [], 0
        while True:
            answer = self.http.request(
                "GET", f"{_path(issue)}/comment", params={"startAt": start, "maxResults": PAGE, "orderBy": "created"},
            )
            comments, total = given(answer, self.name, "comments"), given(answer, self.name, "total")
            found += [self._comment_of(issue, one["id"]) for one in comments if holds_mark(adf.plain(one["body"]), action.key)]
            start += len(comments)
            if not comments or start >= total:
                return oldest(found)

    def _issue(self, key: str, **detail: Any) -> Receipt:
        return Receipt(key, f"{self.http.base_url}/browse/{key}", detail)

    def _comment_of(self, issue: str, number: str) -> Receipt:
        return Receipt(str(number), f"{self.http.base_url}/browse/{issue}?focusedCommentId={number}", {"issue": issue})

    def _myself(self) -> str:
        answer = self.http.request("GET", "/rest/api/3/myself")
        content(answer, self.name)["accountId"]
        return answer.headers.get("X-RateLimit-Remaining", "")

    def _check_permissions(self, look: Examination) -> None:
        answer = content(self.http.request(
            "GET", "/rest/api/3/mypermissions", params={"projectKey": self.project, "permissions": ",".join(PERMISSIONS)},
        ))["permissions"]
        missing = [name for name in PERMISSIONS if not answer.get(name, {}).get("havePermission")]
        said = f"missing: {', '.join(missing)}" if missing else "may create, edit, comment and move issues"
        look.note("Jira permissions", not missing, said, "grant them in the project's permission scheme")

    def _check_fields(self, look: Examination) -> None:
        base = f"/rest/api/3/issue/createmeta/{quote(self.project, safe='')}/issuetypes"
        types = content(self.http.request("GET", base, params={"maxResults": 200}))["issueTypes"]
        name = self.settings.ticket_issue_type
        look.names("Jira issue type", {"ticket_issue_type": name}, [kind["name"] for kind in types])
        number = next((kind["id"] for kind in types if kind["name"] == name), None)
        if number is None:
            return
        answer = content(self.http.request("GET", f"{base}/{number}", params={"maxResults": 200}))
        fields = {field.get("fieldId") or field["key"]: field for field in answer.get("fields") or answer["results"]}
        hidden = [field for field in ("description", "labels", "priority") if field not in fields]
        look.note("Jira fields", not hidden, f"not on the create screen: {', '.join(hidden)}" if hidden else "all can be set",
                  "add them to the issue type's create screen")
        asked = [key for key, field in fields.items() if field.get("required") and not field.get("hasDefaultValue") and key not in FILLED]
        if asked:
            cure = "make them optional or give them a default"
            look.note("Jira fields", False, f"required, but never filled by us: {', '.join(asked)}", cure)
        priorities = [value["name"] for value in fields.get("priority", {}).get("allowedValues", [])]
        wanted = {name: getattr(self.settings, name) for name in ("ticket_priority_warning", "ticket_priority_critical")}
        look.names("Jira priority", wanted, priorities)

    def _check_status(self, look: Examination, project: str) -> None:
        answer = content(self.http.request("GET", f"{project}/statuses"))
        there = [status["name"] for kind in answer if kind["name"] == self.settings.ticket_issue_type for status in kind["statuses"]]
        if there:  # none: the issue type is wrong, which is said already
            look.names("Jira status", {"ticket_resolved_status": self.settings.ticket_resolved_status}, there)


def _path(issue: str) -> str:
    return f"/rest/api/3/issue/{quote(issue, safe='')}"
