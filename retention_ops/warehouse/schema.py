"""The lake's schema version: which layout its files have. Checked whenever a lake is opened.

    lake/SCHEMA     {"schema": 3}

1, not recorded: as it was before versions were kept. 2: partitions say by which SQL and settings they were made. 3: a version of the
orders may have refunds beside it, which an older release would not subtract; the first of them record it. Readers of 3 read 1 and 2 as
well; `retention-ops upgrade` records that a lake is 3 and names the partitions worth computing again.
"""

from __future__ import annotations

import json
from pathlib import Path

from retention_ops.errors import NewerSchema, RetentionOpsError
from retention_ops.warehouse.files import write_atomic

LAKE_SCHEMA = 3
FILE = "SCHEMA"


def lake_schema(root: Path) -> int | None:
    """The recorded version; 1 for a lake from before it was recorded, None where there is no lake yet."""
    try:
        return int(json.loads((root / FILE).read_bytes())["schema"])
    except FileNotFoundError:
        return 1 if any((root / name).is_dir() for name in ("orders", "customers", "suppressions")) else None
    except (ValueError, KeyError, TypeError) as error:
        raise RetentionOpsError(f"{root / FILE} is damaged; it should say {{\"schema\": {LAKE_SCHEMA}}}") from error


def check_lake(root: Path) -> None:
    """Raises NewerSchema where a newer release wrote the lake."""
    found = lake_schema(root)
    if found and found > LAKE_SCHEMA:
        raise NewerSchema(f"the lake in {root} has schema {found}; this program knows schemas up to {LAKE_SCHEMA}. Install the release "
                          "that wrote it, or a newer one; nothing was changed")


def stamp(root: Path) -> None:
    """Records that the lake has this program's schema."""
    write_atomic(root / FILE, json.dumps({"schema": LAKE_SCHEMA}) + "\n")
