"""One GET after a good day, to a monitor that calls when it stops coming (a dead man's switch such as Healthchecks or Cronitor).

At least once: after a lost answer the same call is made again, which says the same. The address is itself a credential: no error,
receipt or finding holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar
from urllib.parse import urlsplit

from retention_ops.errors import SettingsError
from retention_ops.execute.destinations.http import Http, fault_of_address
from retention_ops.execute.destinations.seam import Finding, Lookup, Outgoing, Receipt, Rejected
from retention_ops.settings import Secrets

NAME = "the heartbeat monitor"


class Heartbeat:
    """Kind "ping": nothing is sent but the request itself, so nothing of the shop leaves."""

    name = "heartbeat"
    lookups: ClassVar[Mapping[str, Lookup]] = {"ping": Lookup(repeatable=True)}

    def __init__(self, url: str, timeout: tuple[float, float] = (5, 10)):
        parts = urlsplit(url)
        self._path = url[len(f"{parts.scheme}://{parts.netloc}"):]
        self._http = Http(f"{parts.scheme}://{parts.netloc}", timeout=timeout, secrets=[url, self._path], name=NAME)

    @classmethod
    def connect(cls, secrets: Secrets, timeout: tuple[float, float] = (5, 10)) -> Heartbeat:
        """Nothing is called yet. Raises SettingsError naming what is missing."""
        if secrets.heartbeat_url is None:
            raise SettingsError("RETENTION_OPS_HEARTBEAT_URL is not set: the address your monitor shows")
        url = secrets.heartbeat_url.get_secret_value().strip()
        if fault := fault_of_address(url):
            raise SettingsError(f"RETENTION_OPS_HEARTBEAT_URL: {fault}")
        return cls(url, timeout)

    def send(self, action: Outgoing) -> Receipt:
        """One GET; any 2xx is a receipt. Raises Rejected, Throttled or Ambiguous."""
        if action.kind != "ping":
            raise Rejected(f"{NAME} cannot do {action.kind!r}, only ping")
        self._http.request("GET", self._path, expect=range(200, 300))
        return Receipt(external_id=f"heartbeat:{action.key}")

    update = send

    def find_by_key(self, action: Outgoing) -> Receipt | None:
        return None  # never asked: the same call again says the same

    def check(self) -> list[Finding]:
        """Whether the address has the right form; calls nothing."""
        return [Finding("heartbeat", None, f"{NAME} is reachable only by calling it; once after each good day")]
