"""The server under every fake: HTTP on a free loopback port, a journal of requests, and faults on order.

A fault is ordered with `server.fail(name, match=regex, times=n)` and hits the next n requests whose "METHOD /path" matches:
- lost_before: the connection is cut, nothing is done;   lost_after: it is done, then the connection is cut
- slow_before / slow_after: as above, but the client's patience runs out (the answer waits `delay` seconds)
- 429: not done, Retry-After `retry_after`;   500_before / 500_after: not done / done, then 500;   503 likewise not done
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from retention_ops.execute.destinations.http import Http

FAULTS = ("lost_before", "lost_after", "slow_before", "slow_after", "429", "500_before", "500_after", "503")


@dataclass
class Request:
    method: str
    path: str
    """without the query"""
    query: dict[str, list[str]]
    headers: dict[str, str]
    """names in lower case"""
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body or b"null")


@dataclass
class Reply:
    status: int = 200
    body: Any = None
    """bytes go out as they are, anything else as JSON"""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    name: str
    match: str
    times: int
    retry_after: str
    before: Callable[[], None] | None


class LoopbackServer:
    """Subclasses implement `handle(request) -> Reply` under `self.lock` and keep what was accepted in plain lists and dicts."""

    delay = 3.0
    """seconds a slow answer waits; choose the client's timeout below it, for that one answer only (`patience`)"""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and body are two writes: 40 ms each way otherwise

            def _serve(self) -> None:
                server._serve(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(
        self, name: str, match: str = ".*", times: int = 1, retry_after: str = "1", then: Callable[[], None] | None = None
    ) -> None:
        """Orders a fault; `then` is called at the moment it hits (to kill a worker, for instance)."""
        assert name in FAULTS, name
        with self.lock:
            self.faults.append(Fault(name, match, times, retry_after, then))

    def handle(self, request: Request) -> Reply:
        raise NotImplementedError

    def may_fail(self, request: Request) -> bool:
        """Whether ordered faults may hit this request."""
        return True

    def fault_body(self, status: int) -> Any:
        """What an answer with a fault's status says."""
        return {429: {"ok": False, "error": "ratelimited"}, 500: {"error": "internal"}, 503: {"error": "unavailable"}}[status]

    def patience(self, method: str, path: str) -> float:
        """Seconds to wait for an answer: few where a slow fault waits for this request, many otherwise.

        One short timeout for all requests would hit whichever a busy machine happens to be late with.
        """
        with self.lock:
            fault = self._due_fault(f"{method} {unquote(urlsplit(path).path)}")
        return 0.25 if fault and fault.name.startswith("slow") else 30.0

    def _due_fault(self, line: str) -> Fault | None:
        return next((fault for fault in self.faults if fault.times > 0 and re.search(fault.match, line)), None)

    def _next_fault(self, line: str) -> Fault | None:
        fault = self._due_fault(line)
        if fault:
            fault.times -= 1
        return fault

    def _serve(self, http: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(http.path)
        body = http.rfile.read(int(http.headers.get("Content-Length") or 0))
        request = Request(
            http.command, unquote(parts.path), parse_qs(parts.query, keep_blank_values=True),
            {name.lower(): value for name, value in http.headers.items()}, body,
        )
        with self.lock:
            self.requests.append(request)
            fault = self._next_fault(f"{request.method} {request.path}") if self.may_fail(request) else None
            name = fault.name if fault else ""
            acts = not fault or name.endswith("_after")
            try:
                reply = self.handle(request) if acts else Reply(500, {"error": "fault"})
            except Exception as error:  # a bug in the fake must show up as itself, not as a lost connection
                reply = Reply(500, {"fake_server_bug": repr(error)})
        if fault and fault.before:
            fault.before()
        if name.startswith("lost"):
            http.close_connection = True
            return
        if name.startswith("slow"):
            time.sleep(self.delay)
        if name == "429":
            reply = Reply(429, self.fault_body(429), {"Retry-After": fault.retry_after})
        elif name.startswith("500"):
            reply = Reply(500, self.fault_body(500))
        elif name == "503":
            reply = Reply(503, self.fault_body(503))
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        try:
            http.send_response(reply.status)
            for header, value in {"Content-Type": "application/json", **reply.headers}.items():
                http.send_header(header, value)
            http.send_header("Content-Length", str(len(data)))
            http.end_headers()
            http.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client's patience ended first


def patient(http: Http, server: LoopbackServer) -> None:
    """`http` waits as long for each answer as `server.patience` says."""
    ask = http.request

    def request(method: str, path: str, **options: Any) -> Any:
        http.timeout = (5, server.patience(method, path))
        return ask(method, path, **options)

    http.request = request
