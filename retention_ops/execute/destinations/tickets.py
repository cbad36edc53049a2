"""What Jira, Asana and Roundup share: the shape of a ticket system, the mark that finds a ticket again, text cut to a limit, settings."""

from __future__ import annotations

import base64
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import SplitResult, urlsplit

import requests

from retention_ops.errors import SettingsError
from retention_ops.execute.destinations.http import NOT_REACHED_SECONDS, Http, content
from retention_ops.execute.destinations.seam import (
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

REPEATABLE = Lookup(repeatable=True)
COMMENT = Lookup(wait_seconds=5)
"""no system here refuses a second comment, so one that was still being written when our patience ended gets time to show"""
CUT = "\n\n… cut here; the full text is in the pack."


def mark(key: str) -> str:
    """How a ticket or comment names the action that made it: one word, fit for a Jira label."""
    return f"retops-{key[:16]}"


def marked(text: str, key: str) -> str:
    return f"{text.rstrip()}\n\nref {mark(key)}"


def holds_mark(text: str, key: str) -> bool:
    return re.search(rf"\b{re.escape(mark(key))}\b", text) is not None


def one_line(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - len(CUT)].rstrip() + CUT


def needed(settings: Settings, secrets: Secrets, mode: str, names: Sequence[str]) -> list[str]:
    """The named settings and secrets, without blanks at their ends. Raises SettingsError naming every missing variable."""
    values, missing = [], []
    for name in names:
        if name in Secrets.model_fields:
            secret = getattr(secrets, name)
            value = secret.get_secret_value().strip() if secret else ""
        elif name == "ticket_project":
            value = settings.target(name, mode).strip()
            name = "ticket_test_project" if mode in TEST_MODES else name
        else:
            value = getattr(settings, name).strip()
        values.append(value)
        if not value:
            missing.append(f"RETENTION_OPS_{name.upper()}")
    if missing:
        raise SettingsError(f"tickets go to {settings.tickets_to}, but {', '.join(missing)} is not set")
    return values


def basic(user: str, token: str) -> str:
    """The second half of a Basic Authorization header; as secret as the token."""
    return base64.b64encode(f"{user}:{token}".encode()).decode()


def address(url: str) -> SplitResult:
    """The parts of ticket_url. Raises SettingsError when nobody could be called there."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts
    except ValueError:
        pass
    raise SettingsError("RETENTION_OPS_TICKET_URL is not an address such as https://tickets.example.com")


def given(response: requests.Response, name: str, *path: str) -> Any:
    """What an answer holds under `path`. Ambiguous when it is not there, because the call itself was accepted."""
    answer = content(response, name)
    for step in path:
        if not isinstance(answer, dict) or answer.get(step) is None:
            raise Ambiguous(f"{name}: answered {response.status_code} without {'.'.join(path)}")
        answer = answer[step]
    return answer


@contextmanager
def looking_up() -> Iterator[None]:
    """A look-up that is refused says nothing about what happened."""
    try:
        yield
    except Rejected as error:
        raise CannotTell(str(error)) from None


@contextmanager
def preparing() -> Iterator[None]:
    """A step before the one that makes something visible: when its answer is lost, nothing has happened yet."""
    try:
        yield
    except Ambiguous as error:
        raise Throttled(f"{error}; nothing was made yet", NOT_REACHED_SECONDS) from None


def oldest(found: Sequence[Receipt]) -> Receipt | None:
    """The first of `found` (oldest first); more than one is said in its detail."""
    if len(found) < 2:
        return found[0] if found else None
    first = found[0]
    return Receipt(first.external_id, first.url, {**first.detail, "duplicates": len(found)})


def parent(action: Outgoing) -> str:
    if not action.parent:
        raise Rejected(f"a ticket's {action.kind} needs the ticket it belongs to")
    return action.parent


class TicketSystem(ABC):
    """A ticket system: which of its methods does what. One ticket per incident, created once, then commented and changed."""

    name: str

    def __init__(self, http: Http, settings: Settings):
        self.http = http
        self.settings = settings

    def send(self, action: Outgoing) -> Receipt:
        return self._doing(action, {"create": self._create, "comment": self._comment})(action)

    def update(self, action: Outgoing) -> Receipt:
        return self._doing(action, {"priority": self._prioritise, "resolve": self._resolve})(action)

    def find_by_key(self, action: Outgoing) -> Receipt | None:
        ways = {"create": self._find_ticket, "comment": self._find_comment}
        if action.kind not in ways:
            raise CannotTell(f"a {action.kind} leaves nothing to find; it can be repeated")
        with looking_up():
            return ways[action.kind](action)

    def _doing(self, action: Outgoing, ways: Mapping[str, Callable[[Outgoing], Receipt]]) -> Callable[[Outgoing], Receipt]:
        if action.kind not in ways:
            raise Rejected(f"{self.name} does not know how to do {action.kind!r}")
        return ways[action.kind]

    @abstractmethod
    def _create(self, action: Outgoing) -> Receipt:
        """Makes the ticket, with the mark or key that finds it again."""

    @abstractmethod
    def _comment(self, action: Outgoing) -> Receipt:
        """Adds text to the ticket that is the action's parent."""

    @abstractmethod
    def _prioritise(self, action: Outgoing) -> Receipt:
        """Sets that ticket's priority."""

    @abstractmethod
    def _resolve(self, action: Outgoing) -> Receipt:
        """Moves that ticket to its last status."""

    @abstractmethod
    def _find_ticket(self, action: Outgoing) -> Receipt | None:
        """The ticket an earlier attempt made."""

    @abstractmethod
    def _find_comment(self, action: Outgoing) -> Receipt | None:
        """The comment an earlier attempt made."""


class Examination:
    """Collects findings; what goes wrong inside a step becomes a finding too, so `check` never raises."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def note(self, subject: str, ok: bool | None, sentence: str, cure: str = "") -> None:
        self.findings.append(Finding(subject, ok, sentence, "" if ok else cure))

    def step(self, subject: str, cure: str, look: Callable[[], Any]) -> Any:
        """The answer of `look`, or None after noting why there is none."""
        try:
            return look()
        except Rejected as error:
            self.note(subject, False, str(error), cure)
        except DestinationError as error:
            self.note(subject, None, str(error), cure)
        except Exception as error:  # an answer of an unexpected shape: doctor reports, it does not break
            self.note(subject, None, f"the answer was not understood ({type(error).__name__})", cure)
        return None

    def address(self, subject: str, url: str) -> None:
        """A warning when the credential would travel in the clear."""
        parts = address(url)
        if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            self.note(subject, None, "the credential travels unencrypted", "use an https:// address in RETENTION_OPS_TICKET_URL")

    def names(self, subject: str, wanted: dict[str, str], there: Sequence[str]) -> None:
        """One finding per wanted name: setting -> name."""
        for setting, name in wanted.items():
            ok = name in there
            said = f"{name} exists" if ok else f"{name} does not exist; there are: {', '.join(there) or 'none'}"
            self.note(subject, ok, said, f"set RETENTION_OPS_{setting.upper()}")
