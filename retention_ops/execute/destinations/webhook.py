"""One signed POST to Make, Zapier or a receiver of your own.

Signed as Standard Webhooks asks: webhook-id is the action's key, so a receiver that remembers ids does the work once. The address
is itself a credential: no error, receipt or finding holds it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from datetime import UTC
from typing import Any
from urllib.parse import urlsplit

import requests
import standardwebhooks

from retention_ops.clock import Clock, system_clock
from retention_ops.errors import SettingsError
from retention_ops.execute.destinations.http import Http, fault_of_address
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
from retention_ops.settings import Secrets, Settings

MAX_BYTES = {"make": 5_000_000, "zapier": 10_000_000}
QUEUE_FULL_SECONDS = 60.0
SECRET_BYTES = 24
"""Standard Webhooks asks for a secret of at least so many"""
ANSWERED = frozenset({*range(200, 300), 302, *range(400, 600)}) - {429}
"""statuses classified here; the rest is the same for every service"""
ANSWER_KEYS = {
    "receipt": ("id",),
    "slack_ts": ("slack_message_ts", "slack_ts", "ts"),
    "ticket_id": ("ticket_id", "ticket", "ticket_key"),
}
"""detail -> where an answer may hold it; the first that is usable counts"""


class Webhook:
    """Kind "post": the payload as canonical JSON. `vendor` is make, zapier or generic."""

    name = "webhook"

    def __init__(
        self, url: str, secret: str, *, vendor: str = "generic", apikey: str = "", dedupes: bool = False, clock: Clock = system_clock,
        timeout: tuple[float, float] = (5, 10),
    ):
        parts = urlsplit(url)
        self._path = url[len(f"{parts.scheme}://{parts.netloc}"):]  # as given: catch hooks end in a slash that matters
        self._http = Http(
            f"{parts.scheme}://{parts.netloc}", timeout=timeout, secrets=[url, self._path, secret, apikey], name=f"the {vendor} webhook"
        )
        self._signer = standardwebhooks.Webhook(secret)
        self._secret_bytes = len(_decoded(secret) or b"")
        self._apikey = apikey
        self._clock = clock
        self.vendor = vendor
        self.lookups: Mapping[str, Lookup] = {"post": Lookup(repeatable=True) if dedupes else Lookup(absent="hold")}

    @classmethod
    def connect(
        cls, settings: Settings, secrets: Secrets, mode: str, clock: Clock = system_clock, timeout: tuple[float, float] = (5, 10)
    ) -> Webhook:
        """Nothing is sent yet. There is one address for every mode. Raises SettingsError naming what is missing."""
        if secrets.webhook_url is None:
            raise SettingsError("RETENTION_OPS_WEBHOOK_URL is not set: the address your Make, Zapier or own receiver shows")
        if secrets.webhook_secret is None:
            raise SettingsError("RETENTION_OPS_WEBHOOK_SECRET is not set: whsec_ followed by 24 to 64 random bytes in base64")
        url, secret = secrets.webhook_url.get_secret_value().strip(), secrets.webhook_secret.get_secret_value().strip()
        if fault := fault_of_address(url):
            raise SettingsError(f"RETENTION_OPS_WEBHOOK_URL: {fault}")
        if not _decoded(secret):
            raise SettingsError("RETENTION_OPS_WEBHOOK_SECRET: what follows whsec_ is not base64")
        return cls(
            url, secret, vendor=settings.webhook_to, apikey=secrets.webhook_apikey.get_secret_value() if secrets.webhook_apikey else "",
            dedupes=settings.webhook_dedupes, clock=clock, timeout=timeout,
        )

    def send(self, action: Outgoing) -> Receipt:
        """Posts `action.payload`. The bytes are the same on every attempt; the signature's time is not."""
        if action.kind != "post":
            raise Rejected(f"the webhook cannot do {action.kind!r}, only post")
        body = self._body(action.payload)
        response = self._http.request("POST", self._path, data=body.encode(), headers=self._headers(action.key, body), expect=ANSWERED)
        self._raise_unless_delivered(response)
        answer = _answer(response)
        detail = {name: found for name, keys in ANSWER_KEYS.items() if (found := _first_usable(answer, keys))}
        return Receipt(detail.get("receipt", action.key), None, detail)

    def update(self, action: Outgoing) -> Receipt:
        raise Rejected("the webhook cannot change what it has posted")

    def find_by_key(self, action: Outgoing) -> Receipt | None:
        raise CannotTell("the webhook's receiver cannot be asked; look into its own history for the key, then say what you found")

    def check(self) -> list[Finding]:
        """Whether address and secret have the right form; sends nothing."""
        enough = self._secret_bytes >= SECRET_BYTES
        again = self.lookups["post"].repeatable
        return [
            Finding("webhook address", True, f"has the form of an address for {self.vendor}"),
            Finding(
                "webhook secret", enough, f"decodes to {self._secret_bytes} bytes",
                "" if enough else f"use at least {SECRET_BYTES} random bytes, and give them to the receiver too",
            ),
            Finding("webhook receiver", None, "reachable only by sending; pilot uses the same address as live"),
            Finding(
                "webhook repeats", None,
                "after a lost answer the same id is sent again: the receiver must drop it" if again else
                "after a lost answer a human decides, since the receiver cannot be asked",
                "" if again else "let the receiver drop a repeated Idempotency-Key, then set RETENTION_OPS_WEBHOOK_DEDUPES=true",
            ),
        ]

    def _body(self, payload: Mapping[str, Any]) -> str:
        try:
            body = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
            size = len(body.encode())
        except (TypeError, ValueError) as error:
            raise Rejected(f"the webhook's payload cannot be written as JSON ({type(error).__name__})") from None
        limit = MAX_BYTES.get(self.vendor)
        if limit and size > limit:
            raise Rejected(f"the webhook's payload has {size:,} bytes; {self.vendor} takes {limit:,}")
        return body

    def _headers(self, key: str, body: str) -> dict[str, str]:
        now = self._clock().astimezone(UTC)  # the library takes the digits of any other zone for UTC
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "webhook-id": key,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._signer.sign(msg_id=key, timestamp=now, data=body),
            "Idempotency-Key": key,
        }
        return {**headers, "x-make-apikey": self._apikey} if self._apikey else headers

    def _raise_unless_delivered(self, response: requests.Response) -> None:
        """The receiver's words are not quoted: they may repeat the payload."""
        status, said = response.status_code, f"the {self.vendor} webhook answered {response.status_code}"
        if status == 302:
            raise Ambiguous(f"{said}: a redirect, which some receivers send when the work is done")
        if response.ok:
            self._raise_unless_vendor_took_it(response, said)
        elif status >= 500 or status in (408, 409):
            raise Ambiguous(said)
        elif status == 425 or (self.vendor == "make" and status == 400 and b"queue is full" in response.content.lower()):
            raise Throttled(f"{said}: its queue is full", QUEUE_FULL_SECONDS)
        else:
            raise self._refused(status, said)

    def _raise_unless_vendor_took_it(self, response: requests.Response, said: str) -> None:
        if self.vendor == "make" and response.status_code != 200:
            raise Ambiguous(f"{said}; Make says 200 when it has queued something")
        if self.vendor == "zapier" and (response.status_code != 200 or _answer(response).get("status") != "success"):
            raise Ambiguous(f"{said} without the status success")

    def _refused(self, status: int, said: str) -> DestinationError:
        cures = {
            401: "check RETENTION_OPS_WEBHOOK_APIKEY, or the secret on the receiver's side",
            403: "check RETENTION_OPS_WEBHOOK_APIKEY, or the secret on the receiver's side",
            404: "the address is unknown there; set RETENTION_OPS_WEBHOOK_URL again",
            410: "the hook is gone (Make switches off one that no scenario has used for 5 days); attach it to a scenario and switch it on, "
                 "or set RETENTION_OPS_WEBHOOK_URL to a new one",
            413: "the payload is too large for it",
        }
        return Rejected(f"{said}: {cures.get(status, 'it refuses this payload')}")


def _decoded(secret: str) -> bytes | None:
    """The library itself skips characters that are not base64, so a mistyped secret would sign without a word."""
    text = secret.removeprefix("whsec_").rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def _answer(response: requests.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        return {}  # Make's plain "Accepted"
    return answer if isinstance(answer, dict) else {}


def _first_usable(answer: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """A short plain word; anything else the receiver says is not kept."""
    for key in keys:
        value = answer.get(key)
        if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", value):
            return value
    return ""
