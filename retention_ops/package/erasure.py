"""Takes a forgotten customer out of Action Packs: out of the lists by their column, out of briefs, outbox and log by their text; and
out of the home's own outbox, which holds what belongs to no pack.

Facts and alert versions stay as they were told, so a pack still proves which result it was built from. What changes is written into the
manifest: each changed file with its new hash, the lists' new audience_sha256 (as a pack built now would have it, so that nothing counts
as changed and is handed over anew) and, under `erased`, the hash before, which approvals and ops_runs_log name.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Iterable
from datetime import date, datetime
from pathlib import Path
from typing import Any

from retention_ops.errors import PackError
from retention_ops.log.traces import GONE, Traces
from retention_ops.package.audiences import COLUMNS, TIERS, safe_text
from retention_ops.package.pack import CURRENT_LISTS, LOCK, MANIFEST, file_entry, find_pack, pack_days
from retention_ops.settings import Settings
from retention_ops.warehouse.files import locked, write_atomic
from retention_ops.warehouse.seam import Warehouse

TEXTS = (".md", ".html", ".json", ".csv")


def packs_with(settings: Settings, traces: Traces) -> dict[str, list[str]]:
    """Folder's name -> files that name the person, of every build, also those no date points to."""
    found = {}
    for build in _builds(settings):
        files = [name for name, path in _texts(build) if _changed(path, traces) is not None]
        if files:
            found[build.name] = files
    return found


def erase_from_packs(settings: Settings, traces: Traces, now: datetime) -> int:
    """Rewrites every pack that names the person; returns how many. Builds that no date points to are removed.

    A kill half-way leaves a pack that does not agree with its manifest; run again, this ends what was begun.
    """
    with locked(settings.packs / LOCK):
        in_use = {(settings.packs / day.isoformat()).resolve() for day in pack_days(settings)}
        changed = 0
        for build in _builds(settings):
            if build.resolve() not in in_use:  # a build under way would hold the lock
                shutil.rmtree(build, ignore_errors=True)
            elif _erase_from(build, traces, now):
                changed += 1
    return changed


def outbox_with(settings: Settings, traces: Traces) -> list[str]:
    """Files of the home's outbox that name the person."""
    return [name for name, path in _texts(settings.outbox) if _changed(path, traces) is not None]


def erase_from_outbox(settings: Settings, traces: Traces) -> int:
    """Rewrites every file that names the person; returns how many."""
    found = [(path, changed[0]) for _, path in _texts(settings.outbox) if (changed := _changed(path, traces)) is not None]
    for path, data in found:
        write_atomic(path, data, mode=0o600)
    return len(found)


def relabel_lists(lake: Warehouse) -> None:
    """Gives audience_current, whose rows were erased already, the hash that the pack it came from has now."""
    made_from = lake.provenance(CURRENT_LISTS)
    day = date.fromisoformat(made_from["alert_date"]) if made_from.get("alert_date") else None
    try:
        pack = find_pack(lake.settings, day) if day else None
    except PackError:
        return  # the run that builds it again writes the table too
    if pack is None or pack.manifest["audience_sha256"] == made_from["audience_sha256"]:
        return
    sha = pack.manifest["audience_sha256"]
    with locked(lake.root / f".{CURRENT_LISTS}.lock"), lake.connection() as connection:
        connection.register("list_rows", lake.read(CURRENT_LISTS))
        connection.execute(
            f"CREATE TEMP TABLE {CURRENT_LISTS} AS "
            "SELECT * REPLACE (? AS audience_sha256), row_number() OVER () AS place FROM list_rows", [sha])
        lake.write(connection, CURRENT_LISTS, None, {**made_from, "audience_sha256": sha}, order_by="tier, place")


def _builds(settings: Settings) -> list[Path]:
    folder = settings.packs / ".builds"
    return sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []


def _texts(build: Path) -> Iterable[tuple[str, Path]]:
    for path in sorted(build.rglob("*")):
        if path.is_file() and path.suffix in TEXTS and path.name != MANIFEST:
            yield path.relative_to(build).as_posix(), path


def _changed(path: Path, traces: Traces) -> tuple[bytes, int] | None:
    """A file's content without the person and how many rows it lost; None where it does not name them."""
    text = path.read_bytes().decode("utf-8", "surrogateescape")  # line ends as they are
    if path.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(text, newline="")))
        position = rows[0].index("customer_id") if rows and "customer_id" in rows[0] else None
        gone = {safe_text(name) for name in traces.names} | traces.names
        kept = [row for number, row in enumerate(rows) if position is None or not number or row[position] not in gone]
        return (_csv(kept).encode("utf-8", "surrogateescape"), len(rows) - len(kept)) if len(kept) < len(rows) else None
    if path.suffix == ".json":
        try:
            value = json.loads(text)
        except ValueError:
            return None
        clean = traces.without_value(value)
        return (json.dumps(clean, indent=1, ensure_ascii=False).encode("utf-8", "surrogateescape"), 0) if clean != value else None
    clean = traces.without(text)
    return (clean.encode("utf-8", "surrogateescape"), 0) if clean != text else None


def _csv(rows: list[list[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="\r\n").writerows(rows)  # as audiences.to_csv writes it
    return buffer.getvalue()


def _erase_from(build: Path, traces: Traces, now: datetime) -> bool:
    contents = {name: changed for name, path in _texts(build) if (changed := _changed(path, traces)) is not None}
    if not contents and not _interrupted(build):
        return False
    # a kill between files and manifest leaves a pack that verify() refuses; run again, the manifest is made from what lies there
    write_atomic(build / ERASING, "", mode=0o600)
    for name, (data, _) in contents.items():
        write_atomic(build / name, data, mode=0o600)
    manifest = json.loads((build / MANIFEST).read_text(encoding="utf-8"))
    _bring_up_to_date(build, manifest, now)
    write_atomic(build / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False), mode=0o600)
    (build / ERASING).unlink()
    return True


ERASING = ".erasing"


def _interrupted(build: Path) -> bool:
    return (build / ERASING).exists()


def _bring_up_to_date(build: Path, manifest: dict[str, Any], now: datetime) -> None:
    """Hashes and rows of the files as they lie there, and a note that and when somebody was erased."""
    before = {"audience_sha256": manifest["audience_sha256"]}
    changed = []
    for name, entry in manifest["files"].items():
        data = (build / name).read_bytes()
        if hashlib.sha256(data).hexdigest() == entry["sha256"]:
            continue
        rows = len(list(csv.reader(io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")))) - 1 if name.endswith(".csv") \
            else entry["rows"]
        manifest["files"][name] = file_entry(data, rows)
        changed.append(name)
    for tier in TIERS:
        audience = manifest["audiences"][tier]
        if audience["file"] in changed:
            rows = manifest["files"][audience["file"]]["rows"]
            audience["excluded"] = {**audience["excluded"], GONE: audience["excluded"].get(GONE, 0) + audience["rows"] - rows}
            audience["rows"] = rows
            audience["content_sha256"] = _fingerprint((build / audience["file"]).read_bytes().decode())
    text = "\n".join(f"{tier}:{manifest['audiences'][tier]['content_sha256']}" for tier in TIERS)
    manifest["audience_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    manifest.setdefault("erased", []).append({"at": now.isoformat(timespec="seconds"), "files": changed, "before": before})


def _fingerprint(text: str) -> str:
    """A list's content_sha256, as audiences.py has it: the rows without created_at."""
    rows = list(csv.reader(io.StringIO(text, newline="")))
    position = COLUMNS.index("created_at")
    return hashlib.sha256(_csv([row[:position] + row[position + 1:] for row in rows]).encode()).hexdigest()
