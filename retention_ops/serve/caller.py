"""Who is calling and what they may do: the user of this machine over stdio, the bearer of a token over HTTP."""

from __future__ import annotations

import getpass
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mcp.server.auth.provider import AccessToken, TokenVerifier

from retention_ops.errors import SettingsError

SCOPES = ("read", "actions")
MIN_TOKEN = 32
"""characters; `python -c "import secrets; print(secrets.token_urlsafe(32))"` makes 43"""


@dataclass(frozen=True)
class Caller:
    """`name` is what the audit log and the ledger call them."""

    name: str
    scopes: tuple[str, ...]

    def may(self, scope: str) -> bool:
        return scope in self.scopes


@dataclass(frozen=True)
class Token:
    """One caller over HTTP; the token itself is not kept."""

    name: str
    scopes: tuple[str, ...]
    sha256: bytes


def parse_tokens(text: str) -> list[Token]:
    """Tokens from 'name:scope+scope:token, ...'. Raises SettingsError that never repeats a token."""
    found: list[Token] = []
    for number, part in enumerate(filter(None, (part.strip() for part in text.split(","))), start=1):
        name, _, rest = part.partition(":")
        scopes, _, token = rest.partition(":")
        wanted = tuple(dict.fromkeys(scopes.split("+")))
        where = f"RETENTION_OPS_MCP_TOKENS, entry {number}"
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", name) or not scopes or not token:
            raise SettingsError(f"{where}: must be name:scope+scope:token, with a name of letters, digits, _ . -")
        if not set(wanted) <= set(SCOPES) or "read" not in wanted:
            raise SettingsError(f"{where} ({name}): scopes are read, or read+actions")
        if len(token) < MIN_TOKEN or not token.isascii():
            raise SettingsError(f"{where} ({name}): a token has at least {MIN_TOKEN} characters")
        if name in {known.name for known in found}:
            raise SettingsError(f"{where}: the name {name} is there twice")
        found.append(Token(name, wanted, _digest(token)))
    if not found:
        raise SettingsError("RETENTION_OPS_MCP_TOKENS is not set: name:scope+scope:token, separated by commas; scopes read, actions")
    return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class Tokens(TokenVerifier):
    """Looks a bearer token up in constant time."""

    def __init__(self, tokens: Sequence[Token]):
        self._tokens = tuple(tokens)

    async def verify_token(self, token: str) -> AccessToken | None:
        given, found = _digest(token), None
        for known in self._tokens:
            if hmac.compare_digest(known.sha256, given):
                found = known
        return AccessToken(token="", client_id=found.name, scopes=list(found.scopes)) if found else None


def caller_of(context: Any) -> Caller:
    """The caller of one request (mcp's ServerRequestContext)."""
    request = context.request
    if request is None:
        return Caller(f"mcp:stdio:{_user()}", SCOPES)
    user = request.scope.get("user")
    token = getattr(user, "access_token", None)
    if token is None:  # only a loopback server that was started without tokens lets this through
        return Caller("mcp:http:anonymous", SCOPES)
    return Caller(f"mcp:{token.client_id}", tuple(token.scopes))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
