"""A real Roundup tracker (PyPI roundup, classic template, SQLite) behind the loopback server, so that the same faults can be ordered.

Nothing is imitated here: issues, messages, unique keys, ETags and permissions are Roundup's own. Starting takes about two seconds,
so one tracker serves a whole test session; each test uses keys of its own.
"""

from __future__ import annotations

import base64
import contextlib
import io
import re
import sys
from pathlib import Path
from urllib.parse import urlencode

from retention_ops_tests.execute.servers.loopback import LoopbackServer, Reply, Request

PASSWORD = "roundup-password-canary"


class RoundupServer(LoopbackServer):
    """`home` is an empty folder for the tracker. User admin, password PASSWORD; issues carry the unique key `extkey`."""

    def __init__(self, home: Path):
        super().__init__()
        # requests must meet inside Roundup, as they do behind a threading web server: a race is decided by its database
        self.lock = contextlib.nullcontext()
        self.home = home
        _admin(home, "install", "classic", "sqlite")
        _edit(home / "config.ini", {
            r"^#web = NO DEFAULT": f"web = {self.url}/",
            r"^#domain = NO DEFAULT": "domain = example.test",
            r"^#host = NO DEFAULT": "host = localhost",
            r"^api_failed_login_limit = .*": "api_failed_login_limit = 0",  # or a test with a wrong password locks out the next one
        })
        mail = home / "config.ini"
        before, section, after = mail.read_text().partition("\n[mail]\n")
        mail.write_text(before + section + re.sub(r"(?m)^debug = .*$", f"debug = {home / 'mail.txt'}", after, count=1))
        _edit(home / "schema.py", {
            r'(issue = IssueClass\(db, "issue",)': r"\1 extkey=String(),",
            r"\Z": '\nissue.setkey("extkey")\n',
        })
        _admin(home, "initialise", PASSWORD)
        from roundup.cgi.wsgi_handler import RequestDispatcher

        self.app = RequestDispatcher(str(home))
        # Roundup makes its session tables in the first request: eight first ones at once trip over each other ("table otks already exists")
        pair = base64.b64encode(f"admin:{PASSWORD}".encode()).decode()
        assert self.handle(Request("GET", "/rest/data/issue", {}, {"authorization": f"Basic {pair}"}, b"")).status == 200

    def handle(self, request: Request) -> Reply:
        status: list[str] = []
        headers: dict[str, str] = {}

        def start_response(line: str, given: list[tuple[str, str]], *_: object):
            status.append(line)
            headers.update(given)
            return body.write

        body = io.BytesIO()
        for part in self.app(self._environ(request), start_response):
            body.write(part)
        for name in ("Content-Length", "Content-Encoding"):
            headers.pop(name, None)
        return Reply(int(status[0].split()[0]), body.getvalue(), headers)

    def _environ(self, request: Request) -> dict:
        environ = {
            "REQUEST_METHOD": request.method, "SCRIPT_NAME": "", "PATH_INFO": request.path,
            "QUERY_STRING": urlencode(request.query, doseq=True), "CONTENT_TYPE": request.headers.get("content-type", ""),
            "CONTENT_LENGTH": str(len(request.body)), "SERVER_NAME": "127.0.0.1", "SERVER_PORT": self.url.rsplit(":", 1)[1],
            "SERVER_PROTOCOL": "HTTP/1.1", "REMOTE_ADDR": "127.0.0.1", "wsgi.version": (1, 0), "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(request.body), "wsgi.errors": sys.stderr, "wsgi.multithread": True,
            "wsgi.multiprocess": False, "wsgi.run_once": False,
        }
        skip = ("accept-encoding", "content-type", "content-length")
        return environ | {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in request.headers.items() if name not in skip}


def _admin(home: Path, *command: str) -> None:
    from roundup.admin import AdminTool

    argv, sys.argv = sys.argv, ["roundup-admin", "-i", str(home), *command]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            assert AdminTool().main() in (0, None), said.getvalue()
    finally:
        sys.argv = argv


def _edit(path: Path, changes: dict[str, str]) -> None:
    text = path.read_text()
    for pattern, replacement in changes.items():
        text, count = re.subn(pattern, replacement, text, count=1, flags=re.MULTILINE)
        assert count == 1, f"{path.name}: {pattern} not found"
    path.write_text(text)
