"""Dagster with nothing to do: as many assets and days as a backfill has, on SQLite as it comes, or with events stored in batches.

Its time is what the audit trail costs: a planned event and a materialization with metadata for every asset and day.
Prints JSON like tasks.py.
"""

import json
import logging
import sys
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path

import dagster as dg

from retention_ops import launch
from retention_ops.orchestration import RANGE_END, RANGE_START
from retention_ops.settings import Settings
from retention_ops_tests.bench.rivals import peak_mb


def empty_asset(name: str, after: list[str], days: dg.DailyPartitionsDefinition) -> dg.AssetsDefinition:
    @dg.asset(name=name, deps=after, partitions_def=days, backfill_policy=dg.BackfillPolicy.single_run())
    def _asset(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        said = {"dagster/row_count": 0, "distribution": dg.MetadataValue.md("| a | b |\n|---|---|")}
        for day in context.partition_keys:
            context.add_asset_metadata(said, partition_key=day)
        return dg.MaterializeResult()

    return _asset


def main() -> None:
    assets, days, batches = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].endswith("in_batches")
    last = date(2025, 12, 31)
    first = last - timedelta(days - 1)
    partitions = dg.DailyPartitionsDefinition(first.isoformat())
    graph = [empty_asset(f"a{n}", [f"a{n - 1}"] if n else [], partitions) for n in range(assets)]
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(_env_file=None, home=Path(home))
        if not batches:
            (Path(home) / "dagster").mkdir()
            (Path(home) / "dagster" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        with launch.instance(settings) as instance:
            wall, cpu = time.perf_counter(), time.process_time()
            result = dg.materialize(graph, instance=instance, tags={RANGE_START: first.isoformat(), RANGE_END: last.isoformat()})
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"wall_s": wall, "cpu_s": cpu, "peak_mb": peak_mb(), "found": {"success": result.success}}))


if __name__ == "__main__":
    main()
