"""`retention-ops mcp`: the same tables, packs and response for an assistant, over stdio or HTTP; `mcp-demo` plays a whole morning."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from rich.markup import escape

from retention_ops.commands import shared
from retention_ops.commands.shared import examples, say, say_next
from retention_ops.errors import SettingsError, UsageError

app = typer.Typer()
TOOLSETS = ("read", "actions")


@app.command(epilog=examples(
    "mcp", "mcp --read-only", "--home .retention_ops/demo mcp --toolsets read", "mcp --http 8765",
    "mcp --http 8765 --host 0.0.0.0 --allow-host retention.example.com") + (
    "\n\nOver HTTP every caller needs a token, from the environment only:"
    "\n\n  RETENTION_OPS_MCP_TOKENS=ada:read+actions:TOKEN,dashboard:read:TOKEN"))
def mcp(
    http: Annotated[
        int | None, typer.Option("--http", min=1, max=65535, metavar="PORT", help="Serve over HTTP at /mcp; default: stdio.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; anything but loopback wants a TLS proxy in front.")
    ] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", metavar="NAME", help="A name callers may address it by; may be repeated.")
    ] = None,
    toolsets: Annotated[
        str | None, typer.Option("--toolsets", metavar="LIST", help="read, actions or read,actions; default: setting mcp_toolsets.")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Only tools that change nothing; wins over everything else.")] = False,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="HTTP on loopback without tokens: whoever reaches the port may call, as anonymous.")
    ] = False,
) -> None:
    """MCP server for an assistant: what happened, who to contact first, and the playbook, with a person confirming what matters."""
    from retention_ops.serve.caller import Tokens, parse_tokens
    from retention_ops.serve.http import is_loopback, serve
    from retention_ops.serve.server import build_server, offered, open_desk
    from retention_ops.settings import Secrets

    _log_to_stderr()
    settings = shared.settings()
    if toolsets and not set(toolsets.split(",")) <= set(TOOLSETS):
        raise UsageError(f"--toolsets is read, actions or read,actions, not {toolsets!r}")
    if http is None and (no_auth or allow_host or host != "127.0.0.1"):
        raise UsageError("--host, --allow-host and --no-auth belong to --http PORT")
    if no_auth and not is_loopback(host):
        raise UsageError("--no-auth is for loopback only; set RETENTION_OPS_MCP_TOKENS to listen elsewhere")
    names = [*(allow_host or []), *filter(None, (name.strip() for name in settings.mcp_allowed_hosts.split(",")))]
    if not is_loopback(host) and not names:
        raise UsageError("say by which name callers address this server: --allow-host NAME (any other Host is refused)")
    tokens = None
    if http is not None and not no_auth:
        secret = Secrets().mcp_tokens
        if secret is None:
            raise SettingsError("HTTP needs RETENTION_OPS_MCP_TOKENS (name:scope+scope:token, ...) in the environment; see --help")
        tokens = Tokens(parse_tokens(secret.get_secret_value()))
    with open_desk(shared.settings) as desk:
        server = build_server(desk, offered(settings, read_only, toolsets), tokens=tokens, url=f"http://{host}:{http}")
        if http is None:
            server.run("stdio")
            return
        shared.err.print(f"MCP server on http://{host}:{http}/mcp for {escape(str(settings.home))}. Stop with Ctrl-C.", soft_wrap=True)
        serve(server, host, http, names)


def _log_to_stderr() -> None:
    """stdout belongs to the protocol. Plain lines: a traceback in colours would be of no use in a client's log file."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


@app.command("mcp-demo", epilog=examples("mcp-demo", "mcp-demo --customers 2000"))
def mcp_demo(
    customers: Annotated[int, typer.Option(min=500, max=5_000_000, help="Size of the synthetic shop.")] = 6000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another shop.")] = 7,
) -> None:
    """A whole conversation on the demo shop, from "did anything happen?" to the triggered playbook: timed, every answer checked."""
    from retention_ops.serve.demo import play

    settings = shared.settings()
    report = play(settings.home / "mcp-demo", customers, seed, say=lambda text: say(escape(text)))
    if not report.consistent:
        raise typer.Exit(1)
    say_next(f"open {report.pack / 'briefing.html'}", shared.command(settings.model_copy(update={"home": report.home}), "actions list"))
