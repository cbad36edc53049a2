"""The seam every destination stands behind: what goes out, what comes back, and the four ways a call can go wrong.

A destination does one call per method and never repeats it by itself: repeating is decided in one place (execute/door.py),
which knows what was recorded. Library retries are switched off wherever they would post twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

from retention_ops.errors import RetentionOpsError

MARKER = "retention-ops"
"""names our mark wherever a destination lets us leave one"""


class DestinationError(RetentionOpsError):
    """A call to a destination did not succeed. The message never holds a secret or a customer's data."""


class Rejected(DestinationError):
    """Refused for good: nothing happened there, and the same call would be refused again."""


class Throttled(DestinationError):
    """Not accepted now: nothing happened there, the same call may be made after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Unreachable(Throttled):
    """Nobody is there to be asked, so this was no attempt: whoever passes next tries again."""


class Ambiguous(DestinationError):
    """No answer, or one that does not say: it may have happened there or not."""


class Conflict(DestinationError):
    """The destination already holds this key; `existing` is what it holds."""

    def __init__(self, message: str, existing: Receipt):
        super().__init__(message)
        self.existing = existing


class CannotTell(DestinationError):
    """A look-up is impossible: a missing scope, no look-up at all, or a window that has passed."""


@dataclass(frozen=True)
class Table:
    """One list as it leaves: only allowed columns, every cell text or number."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Outgoing:
    """One action as its destination sees it."""

    key: str
    """32 hex digits, the same for every attempt: the idempotency key"""
    kind: str
    """what to do there; each destination's `lookups` names its kinds"""
    target: str
    """channel, project, spreadsheet or addresses; empty where the destination has only one"""
    payload: Mapping[str, Any]
    parent: str | None = None
    """external_id of what this one updates, answers or comments on"""
    first_attempt_at: datetime | None = None
    """when the first attempt was claimed; bounds a search"""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """attachments by name, read just before the call"""
    tables: Mapping[str, Table] = field(default_factory=dict)
    """lists by worksheet title, read just before the call"""


@dataclass(frozen=True)
class Receipt:
    """Proof that an action exists there. `detail` holds what else the answer said (strings and numbers only)."""

    external_id: str
    url: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lookup:
    """How to find out, after an ambiguous call, whether it happened."""

    wait_seconds: float = 0
    """how long the destination may take to show what it accepted"""
    times: int = 1
    """look-ups in a row, `wait_seconds` apart, that must find nothing before it counts as absent"""
    repeatable: bool = False
    """the same call again changes nothing: no look-up is needed"""
    absent: Literal["resend", "hold"] = "resend"
    """what absence allows: sending again, or only a human's decision"""


@dataclass(frozen=True)
class Finding:
    """One line of `retention-ops doctor`."""

    subject: str
    ok: bool | None
    """None: could not be found out without sending"""
    sentence: str
    cure: str = ""


class Destination(Protocol):
    """Slack, a ticket system, Sheets, a webhook, mail, or the local outbox."""

    name: str
    lookups: Mapping[str, Lookup]
    """kind -> how to find it again; its keys are the kinds this destination understands"""

    def send(self, action: Outgoing) -> Receipt:
        """Creates something there. Raises Rejected, Throttled, Ambiguous or Conflict."""
        ...

    def update(self, action: Outgoing) -> Receipt:
        """Changes what `action.parent` names; the same call twice is as good as once. Raises as `send`."""
        ...

    def find_by_key(self, action: Outgoing) -> Receipt | None:
        """What an earlier attempt left there, or None. Raises CannotTell, or Throttled/Ambiguous to be asked again later."""
        ...

    def check(self) -> list[Finding]:
        """Credentials, scopes, target and quota, without sending anything; never raises."""
        ...
