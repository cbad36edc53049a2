"""The local outbox: writes what would have been sent into the Action Pack, or into the home where it belongs to no pack; sends nothing."""

from __future__ import annotations

import json
from datetime import date
from typing import ClassVar

from retention_ops.errors import PackError
from retention_ops.execute.destinations.choice import QUIET_SLOTS, chosen, target_of
from retention_ops.execute.destinations.seam import Finding, Lookup, Outgoing, Receipt, Rejected
from retention_ops.package.pack import OUTBOX, add_files, find_pack
from retention_ops.settings import Settings
from retention_ops.warehouse.files import write_atomic

EXPORTS = "exports"
KINDS = ("post", "reply", "chart", "update", "create", "comment", "priority", "resolve", "publish", "mail", "export")


class Local:
    """The default for every destination, and the only one in shadow. `target` is '<date>/<name>' of the file to write: into that date's
    pack, or where it has none, expired or lost with its machine, into the home's outbox."""

    name = "local"
    lookups: ClassVar = {kind: Lookup(repeatable=True) for kind in KINDS}

    def __init__(self, settings: Settings, mode: str):
        self.settings = settings
        self.mode = mode

    def send(self, action: Outgoing) -> Receipt:
        day, _, name = action.target.partition("/")
        if action.kind == "export":
            return self._keep(action, day)
        file = f"{OUTBOX}/{name}.json"
        slot = name.partition("_")[0]
        body = {
            "slot": slot, "kind": action.kind, "mode": self.mode, "sent": False, "in_live": chosen(slot, self.settings, "live"),
            "in_live_target": target_of(slot, self.settings, "live"),
            "idempotency_key": action.key, "content": dict(action.payload),
        }
        data = json.dumps(body, indent=1, ensure_ascii=False).encode()
        # said also on days without a pack: those without data most of all; and an incident may outlive the pack it was opened with
        if slot in QUIET_SLOTS or not self._has_pack(day):
            path = self.settings.outbox / f"{action.target}.json"
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(path, data, mode=0o600)
            return Receipt(external_id=f"local:{action.target}", detail={"file": path.as_posix()})
        self._write(day, file, data, 1)
        return Receipt(external_id=f"local:{action.target}", detail={"file": file})

    def _has_pack(self, day: str) -> bool:
        try:
            return find_pack(self.settings, date.fromisoformat(day)) is not None
        except PackError:
            return True  # one that cannot be read is somebody's to mend, not to pass by

    def _keep(self, action: Outgoing, day: str) -> Receipt:
        """A list somebody asked for as a file: it lies in the pack, and goes when the pack is built again or expires."""
        (sheet,) = action.payload["worksheets"]
        file = f"{EXPORTS}/{sheet['file']}"
        self._write(day, file, action.files[sheet["file"]], sheet["rows"])
        return Receipt(external_id=f"local:{day}/{file}", detail={"file": file})

    def _write(self, day: str, file: str, data: bytes, rows: int) -> None:
        try:
            pack = find_pack(self.settings, date.fromisoformat(day))
            if pack is None:
                raise Rejected(f"{day} has no Action Pack to write {file} into; `retention-ops run --date {day}` builds it")
            add_files(pack, {file: (data, rows)})
        except PackError as error:
            raise Rejected(str(error)) from error

    update = send

    def find_by_key(self, action: Outgoing) -> Receipt | None:
        return None  # never asked: writing the same file again changes nothing

    def check(self) -> list[Finding]:
        where = f"{self.settings.packs}/<date>/{OUTBOX} and {self.settings.outbox}"
        return [Finding("local outbox", True, f"writes into {where}; nothing is sent")]
