"""A receiver of webhooks: verifies with the standardwebhooks library, answers as Make, Zapier or a receiver of one's own."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any
from unittest.mock import patch

from standardwebhooks import Webhook, WebhookVerificationError

from retention_ops.clock import Clock, system_clock
from retention_ops_tests.execute.servers.loopback import LoopbackServer, Reply, Request

SECRET = "whsec_" + "Y2FuYXJ5LXNlY3JldC1vZi0yNC1ieXRlcw=="


class WebhookServer(LoopbackServer):
    """`accepted` are the payloads it took, in order. `answer`, where set, is what it says instead of the vendor's usual words."""

    def __init__(self, vendor: str = "generic", *, dedupes: bool = False, apikey: str = "", clock: Clock = system_clock):
        super().__init__()
        self.vendor = vendor
        self.dedupes = dedupes
        self.apikey = apikey
        self.clock = clock
        self.accepted: list[Any] = []
        self.answer: Reply | None = None
        self._seen: dict[str, Reply] = {}
        self.hook = f"{self.url}/hook/canary-of-the-address/"

    def handle(self, request: Request) -> Reply:
        if request.path != "/hook/canary-of-the-address/":
            return Reply(404, b"no such hook")
        if self.apikey and request.headers.get("x-make-apikey") != self.apikey:
            return Reply(401, b"wrong key")
        try:
            self._verify(request)
        except WebhookVerificationError as error:
            return Reply(401, {"error": str(error)})
        key = request.headers["idempotency-key"]
        if self.dedupes and key in self._seen:
            return self._seen[key]
        reply = self.answer or self._usual(key)
        if reply.status < 300:
            self.accepted.append(request.json())
            self._seen[key] = reply
        return reply

    def _verify(self, request: Request) -> None:
        """By the library, whose own clock is replaced by ours."""
        clock = self.clock

        class Injected(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return clock().astimezone(tz)

        with patch("standardwebhooks.webhooks.datetime", Injected):
            Webhook(SECRET).verify(request.body, request.headers)

    def _usual(self, key: str) -> Reply:
        if self.vendor == "make":
            return Reply(200, b"Accepted", {"Content-Type": "text/plain"})
        if self.vendor == "zapier":
            return Reply(200, {"status": "success", "id": f"zap-{key[:8]}", "request_id": "r-1", "attempt": "a-1"})
        return Reply(202, {"id": f"receipt-{key[:8]}"})


def resend(server: WebhookServer, request: Request, **changes: Any) -> Reply:
    """Hands a recorded request in again, changed."""
    body = changes.pop("body", request.body)
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.handle(Request(request.method, request.path, request.query, {**request.headers, **changes}, body))
