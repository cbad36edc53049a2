"""Working examples of sql/sources/orders.sql and of the settings that go with it, for `retention-ops init`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from retention_ops.errors import UsageError
from retention_ops.settings import Settings
from retention_ops.warehouse.files import write_atomic
from retention_ops.warehouse.render import sql_folder

THE_SHOP = {"SHOP_TIMEZONE": "UTC", "CURRENCY": "EUR", "OWNER": ""}
"""whatever the source is, so never replaced"""
SETTINGS: dict[str, dict[str, str]] = {
    "shopify": {
        "SOURCE": "files", "SOURCE_PATH": "exports", "COMPLETED_STATUSES": "paid,partially_paid,partially_refunded,refunded",
        **THE_SHOP,
    },
    "postgres": {"SOURCE": "postgres", **THE_SHOP},
    "bigquery": {
        "SOURCE": "bigquery", "BIGQUERY_PROJECT": "my-project", "BIGQUERY_LOCATION": "EU", **THE_SHOP,
    },
}
"""what .env says for each example; a credential never stands there"""
FOLDERS = {"shopify": "exports"}


@dataclass(frozen=True)
class Written:
    """One file: its path and what happened to it: written, replaced, kept (as it was there) or extended."""

    path: Path
    what: str


def write_example(kind: str, folder: Path, force: bool = False) -> list[Written]:
    """Writes the SELECT and the settings of one example into `folder`. Raises UsageError where a SELECT of another kind is there.

    What exists is kept: a SELECT stays as it is and .env gets only the names it lacks; `force` replaces both.
    """
    if kind not in SETTINGS:
        raise UsageError(f"there is no example {kind!r}; use one of {', '.join(SETTINGS)}")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    target = folder / Settings.model_fields["source_sql"].default
    there = target.exists()
    env = _env(kind, folder / ".env", force)  # first: it refuses before anything is written
    if not there or force:
        write_atomic(target, (sql_folder() / "sources" / f"{kind}.sql").read_text(encoding="utf-8"))
    found = [Written(target, "replaced" if there and force else "kept" if there else "written"), env]
    if kind in FOLDERS:
        path = folder / FOLDERS[kind]
        found.append(Written(path, "kept" if path.is_dir() else "written"))
        path.mkdir(exist_ok=True)
    return found


def _env(kind: str, path: Path, force: bool) -> Written:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    wanted = {f"RETENTION_OPS_{name}": value for name, value in SETTINGS[kind].items()}
    given = {name.upper(): value.strip() for name, value in re.findall(r"^[ \t]*(?:export[ \t]+)?(\w+)[ \t]*=(.*)$", text, flags=re.M)}
    source = given.get("RETENTION_OPS_SOURCE", "")
    if source and source != wanted["RETENTION_OPS_SOURCE"] and not force:
        raise UsageError(f"{path} already says RETENTION_OPS_SOURCE={source}; --force puts {wanted['RETENTION_OPS_SOURCE']} in its place")
    replaced = {name for name in wanted if name in given and name.removeprefix("RETENTION_OPS_") not in THE_SHOP} if force else set()
    missing = [name for name in wanted if name not in given or name in replaced]
    if not missing:
        return Written(path, "kept")
    lines = [line for line in text.splitlines() if not any(re.match(rf"\s*(export\s+)?{name}\s*=", line, re.I) for name in replaced)]
    gap = [""] if lines and lines[-1].strip() else []
    lines += [*gap, f"# orders of {kind}; secrets stay out of here", *(f"{name}={wanted[name]}" for name in missing)]
    write_atomic(path, "\n".join(lines) + "\n")
    return Written(path, "extended" if text else "written")
