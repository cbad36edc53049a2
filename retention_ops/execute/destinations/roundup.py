"""Roundup (2.6 or later), REST: an issue carries our key in the unique property `extkey`, so the tracker itself refuses a second one.

The tracker's schema needs `extkey=String()` in its issue class and `issue.setkey("extkey")`; `check` says when it is missing.
A description is a message of its own, written before the issue that names it: a message without an issue is seen by nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC
from typing import Any
from urllib.parse import quote

from retention_ops import clock
from retention_ops.execute.destinations.http import NOT_REACHED_SECONDS, Http, content
from retention_ops.execute.destinations.seam import Conflict, Finding, Lookup, Outgoing, Receipt, Rejected, Throttled
from retention_ops.execute.destinations.tickets import (
    COMMENT,
    REPEATABLE,
    Examination,
    TicketSystem,
    address,
    basic,
    given,
    marked,
    needed,
    oldest,
    one_line,
    parent,
    preparing,
    shortened,
)
from retention_ops.settings import Secrets, Settings

TITLE = 255
TEXT = 100_000


class Roundup(TicketSystem):
    name = "roundup"
    lookups: Mapping[str, Lookup] = {"create": Lookup(), "comment": COMMENT, "priority": REPEATABLE, "resolve": REPEATABLE}

    def __init__(self, http: Http, settings: Settings, user: str, now: clock.Clock = clock.system_clock):
        super().__init__(http, settings)
        self.user = user
        self.now = now

    @classmethod
    def connect(cls, settings: Settings, secrets: Secrets, mode: str, timeout: tuple[float, float] = (5, 20)) -> Roundup:
        url, user, token = needed(settings, secrets, mode, ("ticket_url", "ticket_user", "ticket_token"))
        parts, pair = address(url), basic(user, token)
        # Roundup takes writes only from where its own pages could come from
        origin = {"X-Requested-With": "rest", "Origin": f"{parts.scheme}://{parts.netloc}", "Referer": f"{url.rstrip('/')}/"}
        http = Http(
            url, headers={"Authorization": f"Basic {pair}", **origin}, timeout=timeout, secrets=[token, pair, *secrets.values()],
            name=cls.name,
        )
        return cls(http, settings, user)

    def check(self) -> list[Finding]:
        look = Examination()
        look.address("Roundup address", self.http.base_url)
        cure = "set RETENTION_OPS_TICKET_URL, RETENTION_OPS_TICKET_USER and RETENTION_OPS_TICKET_TOKEN"
        if look.step("Roundup login", cure, lambda: self._list("user", username=self.user)) is None:
            return look.findings
        look.note("Roundup login", True, "the credentials are accepted")
        look.step("Roundup key", 'add extkey=String() to the issue class and issue.setkey("extkey")', lambda: self._check_key(look))
        look.step("Roundup priority", "ask the tracker's administrator", lambda: self._check_names(look, "priority", {
            name: getattr(self.settings, name) for name in ("ticket_priority_warning", "ticket_priority_critical")
        }))
        look.step("Roundup status", "ask the tracker's administrator", lambda: self._check_names(look, "status", {
            "ticket_resolved_status": self._resolved_status,
        }))
        look.note("Roundup permissions", None, "whether the user may create and edit issues shows only when it does")
        return look.findings

    @property
    def _resolved_status(self) -> str:
        """Roundup's own last status is called resolved; the setting's default is Jira's."""
        given_by_user = "ticket_resolved_status" in self.settings.model_fields_set
        return self.settings.ticket_resolved_status if given_by_user else "resolved"

    def _create(self, action: Outgoing) -> Receipt:
        payload = action.payload
        with preparing():
            existing = self._issue_of(action.key)
        if existing:
            raise Conflict("roundup: already holds an issue with this key", existing)
        labels = " ".join(payload.get("labels", []))
        text = payload["description"] + (f"\n\nLabels: {labels}" if labels else "")
        issue = {
            "title": one_line(payload["title"], TITLE), "priority": payload["priority"], "extkey": action.key,
            "messages": [self._write(text, action.key)],
        }
        # 409 is also Roundup's answer to values of a wrong kind, so the key is looked up before it counts as a conflict
        answer = self.http.request("POST", "/rest/data/issue", json=issue, expect=(201, 409))
        if answer.status_code == 201:
            return self._issue(given(answer, self.name, "data", "id"))
        if existing := self._issue_of(action.key):
            raise Conflict("roundup: already holds an issue with this key", existing)
        raise Rejected("roundup: answered 409 to an issue whose key it does not hold")

    def _comment(self, action: Outgoing) -> Receipt:
        message = self._write(action.payload["text"], action.key)
        self._patch(parent(action), {"@op": "add", "messages": [message]})
        return self._message(message, parent(action))

    def _prioritise(self, action: Outgoing) -> Receipt:
        return self._change(action, {"priority": action.payload["priority"]})

    def _resolve(self, action: Outgoing) -> Receipt:
        return self._change(action, {"status": action.payload.get("status") or self._resolved_status})

    def _find_ticket(self, action: Outgoing) -> Receipt | None:
        return self._issue_of(action.key)

    def _write(self, text: str, key: str) -> str:
        """A message that nobody sees until an issue names it."""
        with preparing():
            answer = self.http.request("POST", "/rest/data/msg", json={
                "content": marked(shortened(text, TEXT), key), "messageid": _message_id(key), "author": self.user,
                "date": self.now().astimezone(UTC).strftime("%Y-%m-%d.%H:%M:%S"),
            })
            return str(given(answer, self.name, "data", "id"))

    def _change(self, action: Outgoing, values: dict[str, Any]) -> Receipt:
        self._patch(parent(action), values)
        return self._issue(parent(action))

    def _patch(self, issue: str, values: dict[str, Any]) -> None:
        """Changes an issue as it is now; one that changed between reading and writing is read once more."""
        path = f"/rest/data/issue/{quote(issue, safe='')}"
        for _ in range(2):
            tag = given(self.http.request("GET", path), self.name, "data", "@etag")
            if self.http.request("PATCH", path, json=values, headers={"If-Match": tag}, expect=(200, 412)).status_code != 412:
                return
        raise Throttled("roundup: the issue is being changed by someone else (412)", NOT_REACHED_SECONDS)

    def _issue_of(self, key: str) -> Receipt | None:
        found = self._list("issue", extkey=key)
        return oldest([self._issue(one["id"]) for one in found])

    def _find_comment(self, action: Outgoing) -> Receipt | None:
        """Only a message that the issue names counts: one that was written but never joined is as good as absent."""
        issue = parent(action)
        answer = self.http.request("GET", f"/rest/data/issue/{quote(issue, safe='')}", params={"@fields": "messages", "@verbose": 0})
        listed = given(answer, self.name, "data", "attributes", "messages")
        found = [one["id"] for one in self._list("msg", messageid=_message_id(action.key)) if one["id"] in listed]
        return oldest([self._message(one, issue) for one in found])

    def _list(self, kind: str, **match: str) -> list[dict[str, Any]]:
        answer = self.http.request("GET", f"/rest/data/{kind}", params={**match, "@sort": "id"})
        return given(answer, self.name, "data", "collection")

    def _issue(self, number: str) -> Receipt:
        return Receipt(str(number), f"{self.http.base_url}/issue{number}")

    def _message(self, number: str, issue: str) -> Receipt:
        return Receipt(str(number), f"{self.http.base_url}/msg{number}", {"issue": issue})

    def _check_key(self, look: Examination) -> None:
        """Asks for an issue by a key nobody has: Roundup names the key property in its answer."""
        answer = self.http.request("GET", "/rest/data/issue/extkey=none", expect=(200, 400, 404))
        unique = answer.status_code == 200 or "extkey)" in str(content(answer, self.name)["error"]["msg"])
        said = "issues have the unique key extkey" if unique else "issues have no unique key extkey"
        look.note("Roundup key", unique, said, 'add extkey=String() to the issue class and issue.setkey("extkey")')

    def _check_names(self, look: Examination, kind: str, wanted: dict[str, str]) -> None:
        there = [one["name"] for one in self._list(kind, **{"@fields": "name"})]
        look.names(f"Roundup {kind}", wanted, there)


def _message_id(key: str) -> str:
    """Also the Message-ID of the mail Roundup may send about it."""
    return f"<{key}@retention-ops>"
