"""The MCP server over streamable HTTP: bearer tokens, Host and Origin checked, bodies limited, loopback unless told otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mcp.server.mcpserver import MCPServer
from mcp.server.transport_security import TransportSecuritySettings

PATH = "/mcp"
MAX_BODY_BYTES = 256 * 1024
MAX_SESSIONS = 200
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SHUTDOWN_SECONDS = 5


def is_loopback(host: str) -> bool:
    return host in ("127.0.0.1", "localhost", "::1")


def security(port: int, names: Sequence[str] = ()) -> TransportSecuritySettings:
    """Who may be named in Host and Origin: loopback on our port, and `names` with or without a port."""
    hosts = [f"{host}:{port}" for host in LOOPBACK]
    return TransportSecuritySettings(
        allowed_hosts=[*hosts, *names, *(f"{name}:*" for name in names)],
        allowed_origins=[*(f"http://{host}" for host in hosts), *(f"https://{name}" for name in names)],
    )


def build_app(server: MCPServer, host: str, port: int, names: Sequence[str] = ()) -> Any:
    """An ASGI application that serves `server` at /mcp."""
    return server.streamable_http_app(
        streamable_http_path=PATH, host=host, transport_security=security(port, names), max_request_body_size=MAX_BODY_BYTES,
        max_sessions=MAX_SESSIONS,
    )


def serve(server: MCPServer, host: str, port: int, names: Sequence[str] = ()) -> None:
    """Runs until SIGINT or SIGTERM; calls under way get a few seconds to end."""
    import uvicorn

    uvicorn.run(build_app(server, host, port, names), host=host, port=port, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS,
                server_header=False)
