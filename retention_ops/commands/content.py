"""What an action would say, as lines a person can read: a Slack message, a ticket, worksheets, a webhook's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Payload = Mapping[str, Any]
SHORT = 100


def shortened(value: Any) -> Any:
    """A payload without its bulk: long texts are cut, lists are counted."""
    if isinstance(value, Mapping):
        return {name: shortened(item) for name, item in value.items()}
    if isinstance(value, str):
        text = " ".join(value.split())
        return text if len(text) <= SHORT else f"{text[:SHORT]}… ({len(value):,} characters)"
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        lists = all({"title", "rows"} <= set(item) for item in value)
        return [f"{item['title']}: {item['rows']:,} customers" for item in value] if lists else f"{len(value)} parts"
    return value


def full_lines(slot: str, destination: str, payload: Payload) -> Iterator[str]:
    """The whole content, as its destination shows it."""
    if "blocks" in payload:
        yield from _message(payload)
    elif slot == "ticket":
        yield from _ticket(payload)
    elif slot == "sheets":
        yield from _worksheets(destination, payload)
    else:
        yield from json.dumps(dict(payload), indent=2, ensure_ascii=False).splitlines()


def _message(payload: Payload) -> Iterator[str]:
    if payload.get("broadcast"):
        yield "(notifies the whole channel)"
    yield f"notification: {payload['text']}"
    for block in payload["blocks"]:
        if block["type"] == "divider":
            yield "─" * 20
        for part in [block.get("text"), *block.get("fields", []), *block.get("elements", [])]:
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                yield from part["text"].splitlines()


def _ticket(payload: Payload) -> Iterator[str]:
    for name in ("title", "priority", "status", "labels"):
        if name in payload:
            value = payload[name]
            yield f"{name}: {', '.join(value) if isinstance(value, list) else value}"
    yield from str(payload.get("description") or payload.get("text") or "").splitlines()


def _worksheets(destination: str, payload: Payload) -> Iterator[str]:
    from retention_ops.package.audiences import ALLOWED_COLUMNS

    yield f"audience {payload['audience_sha256'][:12]}"
    yield from worksheet_lines(payload)
    yield f"columns: {', '.join(ALLOWED_COLUMNS[destination])}"


def worksheet_lines(payload: Payload) -> Iterator[str]:
    """Each worksheet with its customers and who was left out."""
    for sheet in payload["worksheets"]:
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in sheet["excluded"].items() if number)
        yield f"worksheet {sheet['title']!r}: {sheet['rows']:,} customers" + (f"; left out: {left_out}" if left_out else "")
