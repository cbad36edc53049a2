"""Around every call: refuse what is not known by name, hide what the caller may not do, and write down who called what.

A write tool is in the audit log before it acts and after; everything else once, with its outcome. Arguments are kept only where the
tool declares them, cut and redacted: dates, tiers, opaque ids.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import anyio
import sqlalchemy as sa
from mcp.server.context import CallNext, ServerRequestContext
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS, CallToolResult, TextContent
from pydantic import ValidationError
from sqlalchemy.engine import Engine

from retention_ops.clock import Clock, system_clock
from retention_ops.errors import LogError, RetentionOpsError
from retention_ops.execute import ledger
from retention_ops.execute.redact import clean, redact
from retention_ops.serve.caller import Caller, caller_of
from retention_ops.serve.refusal import Refused, nearest, quoted
from retention_ops.settings import Secrets

ASKED, CALLED = "mcp_asked", "mcp_call"
"""events of ops_events: before a write tool acts, and after any call"""
LOGGED = {"tools/call": "name", "resources/read": "uri", "prompts/get": "name"}
"""method -> the parameter that says what was called"""
ARGUMENT_CHARACTERS = 64
logger = logging.getLogger(__name__)


class Watch:
    """Middleware of one server. `tools` maps a tool's name to (toolset, mcp's Tool); `hidden` names those not offered here."""

    def __init__(self, engine: Engine, tools: Mapping[str, tuple[str, Any]], hidden: Mapping[str, str], clock: Clock = system_clock):
        self._engine = engine
        self._tools = tools
        self._hidden = hidden
        self._clock = clock
        self._secrets = Secrets().values()

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> Any:
        if ctx.request_id is None:
            return await call_next(ctx)
        caller = caller_of(ctx)
        if ctx.method == "tools/list":
            return self._visible(await call_next(ctx), caller)
        if ctx.method not in LOGGED:
            return await call_next(ctx)
        return await self._logged(ctx, call_next, caller)

    def _visible(self, result: Any, caller: Caller) -> Any:
        """Only what the caller may call. Inside the chain results are as they go over the wire."""
        return {**result, "tools": [tool for tool in result["tools"] if caller.may(self._toolset(tool["name"]))]}

    def _toolset(self, name: str) -> str:
        return self._tools[name][0] if name in self._tools else "read"

    async def _logged(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext, caller: Caller) -> Any:
        params = dict(ctx.params or {})
        what, arguments = str(params.get(LOGGED[ctx.method])), params.get("arguments")
        arguments = arguments if isinstance(arguments, dict) else {}
        is_tool = ctx.method == "tools/call"
        refusal = self._refusal(what, params.get("arguments"), caller) if is_tool else ""
        detail = {"method": ctx.method, "what": self._kept(what), "arguments": self._arguments(what, arguments, is_tool),
                  "protocol": ctx.protocol_version, "client": self._client(ctx), "request": str(ctx.request_id)}
        started, outcome, result = time.monotonic(), "cancelled", None
        try:
            if is_tool and not refusal and self._toolset(what) == "actions":
                await anyio.to_thread.run_sync(self._write, ASKED, caller, detail)
            result = _error(refusal) if refusal else await self._next(ctx, call_next)
            outcome = "refused" if refusal else _outcome(result)
        except LogError as error:
            outcome = "error"
            return _unlogged(ctx.method, error)
        except Exception:
            outcome = "error"
            raise
        finally:
            # a cancelled call is in the log as well, so writing it is not cancelled
            with anyio.CancelScope(shield=True):
                problem = await anyio.to_thread.run_sync(self._try_to_write, caller, {
                    **detail, "outcome": outcome, "ms": round((time.monotonic() - started) * 1000)})
        if problem:
            return _unlogged(ctx.method, problem)
        return _plain(result, what) if is_tool else result

    async def _next(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> Any:
        """A prompt that is unknown or wrongly asked for is the caller's mistake; the SDK would log it as a crash of ours."""
        try:
            return await call_next(ctx)
        except ValueError as error:
            if ctx.method != "prompts/get":
                raise
            raise MCPError(code=INVALID_PARAMS, message=" ".join(str(error).split())[:300]) from None

    # -- refusing ------------------------------------------------------------------------------------------------------

    def _refusal(self, name: str, arguments: Any, caller: Caller) -> str:
        """Why this call is not made, or nothing."""
        offered = sorted(tool for tool in self._tools if caller.may(self._toolset(tool)))
        if name not in self._tools:
            why = f" {self._hidden[name]}" if name in self._hidden else nearest(name, offered).replace("; d", " D")
            return str(Refused(f"There is no tool {quoted(name)} here.{why}", ", ".join(offered), "tools/list"))
        toolset, tool = self._tools[name]
        if not caller.may(toolset):
            return str(Refused(f"{caller.name} may not call {name}: the token has no scope {toolset}.", ", ".join(offered), "tools/list"))
        declared = tool.parameters.get("properties", {})
        if arguments is not None and not isinstance(arguments, dict):
            return str(Refused(f"The arguments of {name} must be an object.", _signature(declared), name))
        unknown = [argument for argument in arguments or {} if argument not in declared]
        if unknown:
            told = "; ".join(f"{quoted(argument)}{nearest(argument, declared).replace('; ', ', ')}" for argument in unknown[:5])
            return str(Refused(f"{name} has no argument {told}; nothing was done.", _signature(declared), f"{name} again, without it"))
        try:
            tool.fn_metadata.validate_arguments(arguments or {})
        except ValidationError as error:
            wrong = [_wrong(item) for item in error.errors(include_url=False)[:5]]
            return str(Refused(" ".join(wrong) + " Nothing was done.", _signature(declared), f"{name} again"))
        return ""

    # -- writing -------------------------------------------------------------------------------------------------------

    def _kept(self, value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        return redact(clean(text), self._secrets)[:ARGUMENT_CHARACTERS]

    def _arguments(self, what: str, arguments: dict[str, Any], is_tool: bool) -> dict[str, str]:
        declared = self._tools[what][1].parameters.get("properties", {}) if is_tool and what in self._tools else {}
        return {name: self._kept(value) for name, value in arguments.items() if name in declared}

    def _client(self, ctx: ServerRequestContext[Any, Any]) -> str:
        """What the caller's program calls itself; nobody checks that."""
        params = ctx.session.client_params
        return self._kept(f"{params.client_info.name} {params.client_info.version}") if params else ""

    def _write(self, event: str, caller: Caller, detail: dict[str, Any]) -> None:
        """Raises LogError where the audit log cannot be written."""
        try:
            with self._engine.begin() as connection:
                ledger.note(connection, self._clock(), event, caller.name, json.dumps(detail, ensure_ascii=False))
        except sa.exc.SQLAlchemyError as error:
            logger.error("the audit log cannot be written: %s", type(error).__name__)
            raise LogError("the audit log cannot be written, so nothing is answered; see `retention-ops doctor`") from error

    def _try_to_write(self, caller: Caller, detail: dict[str, Any]) -> LogError | None:
        try:
            self._write(CALLED, caller, detail)
        except LogError as error:
            return error
        return None


def _outcome(result: Any) -> str:
    if "inputRequests" in result:
        return "asked back"
    return "failed" if result.get("isError") else "ok"


def _error(text: str) -> dict[str, Any]:
    return CallToolResult(content=[TextContent(type="text", text=text)], is_error=True).model_dump(
        by_alias=True, mode="json", exclude_none=True)


def _unlogged(method: str, error: RetentionOpsError) -> Any:
    if method == "tools/call":
        return _error(str(error))
    raise error


def _plain(result: dict[str, Any], tool: str) -> dict[str, Any]:
    """An error without the SDK's preamble; a crash without anything of its own."""
    preamble = f"Error executing tool {tool}"
    text = result["content"][0].get("text", "") if result.get("isError") and result.get("content") else ""
    if not text.startswith(preamble):
        return result
    crash = Refused(f"{tool} failed in a way nobody expected; it is in the server's log.", "", "`retention-ops status`, by a person")
    return {**result, **_error(text.removeprefix(preamble).removeprefix(": ") or str(crash))}


def _wrong(item: Mapping[str, Any]) -> str:
    """One validation error as a sentence, with the caller's own value quoted."""
    name = ".".join(str(part) for part in item["loc"]) or "arguments"
    if item["type"] == "missing":
        return f"{name} is required."
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{name} {message if message.startswith(('must', 'is ')) else 'is wrong: ' + message} (got {quoted(str(item['input']))})."


def _signature(declared: Mapping[str, Any]) -> str:
    """The arguments a tool takes, with what each allows."""
    return "; ".join(f"{name}: {_allowed(schema)}" for name, schema in declared.items()) or "no arguments"


def _allowed(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "|".join(schema["enum"])
    if schema.get("format") == "date":
        return "YYYY-MM-DD"
    if schema.get("type") == "integer":
        return f"{schema['minimum']:,} to {schema['maximum']:,}"
    return str(schema.get("type", "text")).replace("string", "text")
