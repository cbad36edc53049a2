"""Orders as Dagster sees them: pulled from their source, which version is CURRENT, and the shopping days derived from it."""

from datetime import date

import dagster as dg

from retention_ops.errors import RetentionOpsError
from retention_ops.orchestration import PROCESS_TAG, RANGE_END, CheckTally, Loop, check_specs, described, process_mark
from retention_ops.sources.check import pull_and_check
from retention_ops.sources.morning import owed
from retention_ops.sources.pull import PullReport


@dg.asset(**described("orders", "detect", "parquet"), code_version="1")
def orders(context: dg.AssetExecutionContext, loop: dg.ResourceParam[Loop]) -> dg.MaterializeResult:
    context.instance.add_run_tags(context.run_id, {PROCESS_TAG: process_mark(context.run_id)})  # a schedule cannot know the process
    pulled = _pulled(context, loop)
    with loop.workspace(context.run_id) as space:
        version = space.orders
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": version.orders,
                "customers": version.customers,
                "first_date": str(version.first_date),
                "last_date": str(version.last_date),
                "complete_through": str(version.complete_through),
                "currency": version.currency,
                "version": version.version,
                "excluded_records": dg.MetadataValue.json(dict(version.excluded)),
                "path": dg.MetadataValue.path(str(loop.lake.path("orders", version.version))),
                **_told(pulled),
                **space.cost(),
            },
            data_version=dg.DataVersion(version.content_sha256),
        )


def _pulled(context: dg.AssetExecutionContext, loop: Loop) -> PullReport | None:
    """Brings the orders up to date where a source is set, unless the run is about dates whose orders are all in already.

    After data_deadline a date of a source that cannot be read is computed all the same, and held back: health says that data is late,
    and the record has no hole.
    """
    tags, version = context.run.tags, loop.lake.orders()
    newest = tags.get(RANGE_END) or tags.get("dagster/partition")
    if not loop.settings.source or (version and newest and date.fromisoformat(newest) <= version.complete_through):
        return None
    try:
        return pull_and_check(loop.lake, clock=loop.clock, progress=context.log.info)
    except RetentionOpsError as error:
        if not (newest and version and owed(loop.lake, loop.clock).late):
            raise
        context.log.warning(f"computed without new orders, as data_deadline has passed: {error}")
        return None


def _told(report: PullReport | None) -> dict[str, object]:
    """A pull as metadata: counts only."""
    if report is None:
        return {}
    return {
        "source": report.kind, "rows_read": report.rows_read, "new_orders": report.new, "refunded_orders": report.refunded,
        "complete_note": report.complete_note,
        "corrections": dg.MetadataValue.json(report.corrections), "stale_from": str(report.stale_from or "nothing"),
    }


@dg.asset(
    **described("customer_days", "detect", "duckdb", "sql"), deps=["orders"], check_specs=check_specs("customer_days"), code_version="1"
)
def customer_days(context: dg.AssetExecutionContext, loop: dg.ResourceParam[Loop]):
    tally = CheckTally("customer_days")
    with loop.workspace(context.run_id) as space:  # derives the table where this orders version has none yet
        rows = space.connection.execute("SELECT COUNT(*) FROM customer_days").fetchall()[0][0]
        tally.passes(space, space.orders.version)
        path = loop.lake.path("customer_days", space.orders.version)
        context.add_asset_metadata({
            "dagster/row_count": rows,
            "orders_version": space.orders.version,
            "path": dg.MetadataValue.path(str(path)),
            **space.cost(),
        })
    loop.lake.refresh_views()
    loop.progress("customer_days", 1, 1)
    yield from tally.finish()
