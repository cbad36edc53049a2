"""Dagster's event log on SQLite, with a range's events written together.

The library does that for Postgres only; on SQLite each of a backfill's thousands of events would be two transactions. What
is stored is the same, event for event (test_dagster_events.py). Named in dagster.yaml; works on existing instances, and
any other process may open the same files with the library's own class.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.events import DagsterEventType
from dagster._core.storage.event_log import SqliteEventLogStorage
from dagster._core.storage.event_log.schema import SqlEventLogStorageTable
from dagster._serdes import ConfigurableClassData

BATCH_VARIABLE, BATCH_SIZE = "DAGSTER_EVENT_BATCH_SIZE", "500"
"""Dagster hands events over in batches where this is set; 7 columns each stay far below SQLite's 32,766 values a statement"""
TOGETHER = {DagsterEventType.ASSET_MATERIALIZATION, DagsterEventType.ASSET_MATERIALIZATION_PLANNED}


class BatchedSqliteEventLogStorage(SqliteEventLogStorage):
    """SqliteEventLogStorage whose `store_event_batch` needs one transaction for the run's file and one for the index."""

    @classmethod
    def config_type(cls) -> Mapping[str, Any]:
        return {"base_dir": dg.Field(dg.StringSource, is_required=False)}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]) -> BatchedSqliteEventLogStorage:
        """`base_dir` defaults to where Dagster keeps it: history/runs under DAGSTER_HOME."""
        base_dir = config_value.get("base_dir") or str(Path(os.environ["DAGSTER_HOME"]) / "history" / "runs")
        return cls(base_dir=base_dir, inst_data=inst_data)

    def store_event_batch(self, events: Sequence[dg.EventLogEntry]) -> None:
        """Stores the events in their order. Should it fail, Dagster stores them one by one."""
        for (run_id, kind), several in groupby(events, lambda event: (event.run_id, event.get_dagster_event().event_type)):
            if kind in TOGETHER:
                self._store_together(run_id, list(several))
            else:
                super().store_event_batch(list(several))

    def _store_together(self, run_id: str, events: Sequence[dg.EventLogEntry]) -> None:
        """Stores events of one run and kind."""
        insert = self.prepare_insert_event_batch(events)
        with self.run_connection(run_id) as connection:
            connection.execute(insert)
        with self.index_transaction() as connection:
            # rows of one statement get ascending ids in their order, but RETURNING promises none
            ids = sorted(row[0] for row in connection.execute(insert.returning(SqlEventLogStorageTable.c.id)))
            self._store_asset_event_tags(connection, events, ids)
            # an asset shows its latest event only
            latest = {event.get_dagster_event().asset_key: (event, id_) for event, id_ in zip(events, ids, strict=True)}
            for event, id_ in latest.values():
                self._store_asset_event(connection, event, id_)
