"""Package: the priority queue and the Action Pack of each date."""

import base64
from datetime import date, timedelta

import dagster as dg

from retention_ops.detect.alerts import answered_rules
from retention_ops.detect.compute import Workspace, priority_order
from retention_ops.log.database import ops_database
from retention_ops.log.exposures import last_handed_over
from retention_ops.orchestration import (
    OWNERS,
    Loop,
    by_day,
    check_specs,
    counts_tables,
    days_of,
    described,
    in_batches,
    store_days,
)
from retention_ops.package.audiences import TIERS
from retention_ops.package.brief import check_templates
from retention_ops.package.pack import (
    Pack,
    brief_links,
    build_pack,
    collect,
    expire_packs,
    publish_lists,
    withdraw_lists,
)


def _tiers(space: Workspace) -> dict:
    tables = counts_tables(space, "customer_priority", ["priority_tier"])
    # sums for the metadata's curves; of a day on which nothing was known yet there is none
    stakes = by_day(
        space, "customer_priority", next_orders="round(SUM(avg_order_value), 2)", spend_at_stake="round(SUM(spend_at_stake), 2)",
        **{f"{tier.lower()}_spend_at_stake": f"round(SUM(CASE WHEN priority_tier = '{tier}' THEN spend_at_stake END), 2)"
           for tier in TIERS},
    )
    return {day: {"distribution": table, **stakes[day]} for day, table in tables.items()}


def _pack_metadata(pack: Pack, embed_chart: bool) -> dict:
    manifest = pack.manifest
    metadata = {
        "severity": manifest["severity"],
        "facts_sha256": manifest["facts_sha256"],
        "audience_sha256": manifest["audience_sha256"],
        **{f"{tier.lower()}_count": audience["listed"] for tier, audience in manifest["audiences"].items()},
        **{f"{tier.lower()}_handed_over": audience["rows"] for tier, audience in manifest["audiences"].items()},
        "left_out": dg.MetadataValue.json({tier: audience["excluded"] for tier, audience in manifest["audiences"].items()}),
        "files": dg.MetadataValue.json({name: entry["rows"] for name, entry in manifest["files"].items()}),
        "pack": dg.MetadataValue.path(str(pack.folder)),
    }
    if embed_chart:  # some 50 kB each: only where somebody will look
        chart = base64.b64encode((pack.folder / "at_risk_trend.png").read_bytes()).decode()
        metadata["at_risk_trend"] = dg.MetadataValue.md(f"![AT_RISK % against its baseline](data:image/png;base64,{chart})")
    return metadata


def package_assets(partitions_def: dg.DailyPartitionsDefinition) -> list[dg.AssetsDefinition]:
    """customer_priority and action_pack."""

    @dg.asset(
        **described("customer_priority", "package", "duckdb", "sql"), deps=["churn_detection", "customer_days"],  # these teach its rates
        partitions_def=partitions_def, backfill_policy=dg.BackfillPolicy.single_run(), check_specs=check_specs("customer_priority"),
        code_version="2",
    )
    def customer_priority(context: dg.AssetExecutionContext, loop: dg.ResourceParam[Loop]):
        yield from store_days(context, loop, "customer_priority", in_batches, _tiers)

    @dg.asset(
        name="action_pack", group_name="package", kinds={"jinja2", "matplotlib"}, owners=OWNERS,
        description="The day's brief (Markdown, Slack, mail), trend chart, audience files and manifest.",
        deps=["alert_logic", "customer_priority"], partitions_def=partitions_def,
        backfill_policy=dg.BackfillPolicy.single_run(), code_version="1",
    )
    def action_pack(context: dg.AssetExecutionContext, loop: dg.ResourceParam[Loop]) -> dg.MaterializeResult:
        days = days_of(context)
        keep_from = days[-1] - timedelta(days=loop.settings.pack_keep_days - 1)
        return _build(context, loop, days, keep_from)

    return [customer_priority, action_pack]


def _build(context: dg.AssetExecutionContext, loop: Loop, days: list[date], keep_from: date) -> dg.MaterializeResult:
    """Packs for the newest pack_keep_days of the run and for every flagged date; the rest is history nobody acts on."""
    check_templates(loop.settings)
    links = brief_links(loop.settings, context.run.run_id)
    newest = None
    with loop.workspace(context.run_id) as space, ops_database(loop.settings) as engine:
        space.build_range("alert_logic", days[0] - timedelta(days=loop.settings.trend_days - 1), days[-1])
        history, daily = space.rows("alert_logic"), space.rows("retention_daily")
        answered = history["alert_type"].isin(answered_rules(loop.settings))
        flagged = set(history.loc[history["alert_flag"] & answered, "alert_date"].dt.date)
        for done, day in enumerate(days, start=1):
            if day < keep_from and day not in flagged:
                metadata = {"pack": f"not built: a quiet day before the newest {loop.settings.pack_keep_days} of this range; "
                                    f"`retention-ops run --date {day}` builds it"}
            else:
                space.use("customer_priority", day)
                queue = space.rows("customer_priority", priority_order(loop.settings))
                newest = collect(space, day, history, daily, queue, last_handed_over(engine, before=day))
                pack = build_pack(newest, loop.settings, run_id=context.run.run_id, links=links, clock=loop.clock)
                metadata = _pack_metadata(pack, embed_chart=day in flagged or day == days[-1])
            context.add_asset_metadata({**metadata, **space.cost()}, partition_key=day.isoformat())
            loop.progress("action_pack", done, len(days))
    if newest:
        publish_lists(loop.lake, newest)
    expire_packs(loop.settings, loop.clock)
    withdraw_lists(loop.lake)
    return dg.MaterializeResult()
