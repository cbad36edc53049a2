"""The code location: gathers the four stages, the daily job and its schedules. Nothing is decided here."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import dagster as dg
from dagster_duckdb import DuckDBResource

from retention_ops.clock import Clock, system_clock
from retention_ops.detect.assets import cohort_retention_evolution
from retention_ops.detect.assets import day_assets as detect_assets
from retention_ops.execute.assets import execute_assets
from retention_ops.execute.job import export_audience_job, follow_up_job, incident_response_job, quiet_morning_job
from retention_ops.execute.sensors import alert_sensor, follow_up_sensor, quiet_sensor
from retention_ops.installation import METADATA, installation
from retention_ops.log.assets import log_assets
from retention_ops.orchestration import JOB, Loop, partitions
from retention_ops.package.assets import package_assets
from retention_ops.settings import Settings, load_settings
from retention_ops.sources.assets import customer_days, orders
from retention_ops.sources.sensors import PULL_JOB, morning_schedules
from retention_ops.warehouse.choice import open_warehouse
from retention_ops.warehouse.connection import connection_config

# said whenever a sensor is copied, though nothing of ours uses the parameter
warnings.filterwarnings("ignore", message="Parameter `owners` of initializer `SensorDefinition", category=dg.BetaWarning)


def build_loop(settings: Settings, clock: Clock = system_clock, mode: Callable[[], str] | None = None) -> Loop:
    """The warehouse on connections of Dagster's own resources, with a clock; `mode` reads the mode anew before each send."""
    duckdb = DuckDBResource(database=":memory:", connection_config=connection_config(settings))
    return Loop(open_warehouse(settings, duckdb.get_connection, lambda: _bigquery_client(settings)), clock, mode=mode)


def _bigquery_client(settings: Settings):
    """A client of dagster-gcp's resource; its import is paid only by those who use it."""
    from dagster_gcp import BigQueryResource

    return BigQueryResource(project=settings.bigquery_project, location=settings.bigquery_location).get_client()


def build_defs(settings: Settings, loop: Loop | None = None) -> dg.Definitions:
    """All definitions for one installation; a test passes a `loop` with its own lake, clock or progress."""
    loop = loop or build_loop(settings)
    daily = partitions(settings, loop.lake)
    with warnings.catch_warnings():
        # BackfillPolicy is marked beta; the pinned version was measured to do what we need, and a range test watches it
        warnings.simplefilter("ignore", dg.BetaWarning)
        day_assets = [*detect_assets(daily), *package_assets(daily), *execute_assets(daily), *log_assets(daily)]
    job = dg.define_asset_job(
        JOB, selection=dg.AssetSelection.all(), partitions_def=daily,
        description="Detect, package, respond and log for one date or a range.", metadata={METADATA: installation(settings)},
    )
    pull = dg.define_asset_job(PULL_JOB, selection=["orders"], description="Asks the source for orders; computes nothing.")
    return dg.Definitions(
        assets=[orders, customer_days, cohort_retention_evolution, *day_assets],
        jobs=[job, pull, incident_response_job, export_audience_job, follow_up_job, quiet_morning_job],
        sensors=[alert_sensor, follow_up_sensor, quiet_sensor],
        schedules=morning_schedules(settings),
        resources={"loop": loop},
        executor=dg.in_process_executor,
    )


@dg.definitions
def defs() -> dg.Definitions:
    """What `dagster dev` loads: the installation that environment and .env describe."""
    settings = load_settings()
    return build_defs(settings, build_loop(settings, mode=lambda: load_settings().mode))
