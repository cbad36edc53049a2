"""How a caller hears no: what is wrong, what is allowed, and which tool to call next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from retention_ops.errors import RetentionOpsError


class Refused(RetentionOpsError):
    """Three lines for the caller; nothing was done."""

    def __init__(self, wrong: str, allowed: str = "", next_call: str = ""):
        lines = [wrong, f"Allowed: {allowed}" if allowed else "", f"Next: {next_call}" if next_call else ""]
        super().__init__("\n".join(line for line in lines if line))


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean limit?' where one is near, else nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def quoted(text: str, most: int = 60) -> str:
    """A caller's own words on one line, cut, with nothing that could pass for ours."""
    plain = "".join(character if character.isprintable() else " " for character in text)
    return f"'{plain if len(plain) <= most else plain[:most] + '…'}'"
