"""A new release over an old home: what it finds, what it changes at once, what is worth computing again, and that nobody hears of it.

The ops database is migrated whenever it is opened, lake and packs of older releases are read as they are. What is left to do on
purpose: record that the lake is this release's, and compute again the dates whose columns or rules are another release's. While that
goes on the ledger is held at shadow (execute/hold.py), and what only the new release brings about is answered to nobody (gate.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from retention_ops.clock import Clock, shop_day, system_clock
from retention_ops.detect.alerts import alerts_by_day
from retention_ops.errors import PackError
from retention_ops.execute import hold, ledger
from retention_ops.execute.gate import UPGRADED
from retention_ops.installation import has_database
from retention_ops.log import settings_history
from retention_ops.log.database import HEAD, answers, check_known, open_engine, ops_database, response_state, revision
from retention_ops.package.pack import PACK_SCHEMA, alert_version, find_pack, pack_days, records, versions_of
from retention_ops.settings import REAL_MODES, Settings
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.choice import open_warehouse
from retention_ops.warehouse.dialect import file_list
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.render import sql_sha256
from retention_ops.warehouse.schema import LAKE_SCHEMA, lake_schema, stamp
from retention_ops.warehouse.seam import Warehouse

BEFORE = "upgrade:before"
"""what the dates in reach said when the upgrade began; kept until it has ended, so that a kill forgets nothing"""
Compute = Callable[[date, date], None]


@dataclass(frozen=True)
class Stale:
    """Stored dates of one table that this release would write otherwise."""

    table: str
    lack_columns: dict[str, list[date]] = field(default_factory=dict)
    """names of the columns their files lack, separated by commas -> dates"""
    other_sql: list[date] = field(default_factory=list)
    """dates whose rules in sql/ were another release's, or were not recorded"""


@dataclass(frozen=True)
class Plan:
    """What an upgrade finds: schemas as (there, this release's), tables, packs of an older schema."""

    ops_schema: tuple[str | None, str]
    lake_schema: tuple[int | None, int]
    tables: list[Stale]
    packs: list[date]

    @property
    def dates(self) -> list[date]:
        """Dates to compute again, oldest first."""
        found = {day for table in self.tables for days in (*table.lack_columns.values(), table.other_sql) for day in days}
        return sorted(found | set(self.packs))


def plan(settings: Settings) -> Plan:
    """Looks and changes nothing. Raises NewerSchema where a newer release wrote something."""
    lake = open_warehouse(settings)
    return Plan(
        (_ops_schema(settings), HEAD), (lake_schema(settings.home / "lake"), LAKE_SCHEMA),
        [found for name, table in TABLES.items() if table.stored == "day" and (found := _stale(lake, name))], _old_packs(settings),
    )


def _ops_schema(settings: Settings) -> str | None:
    if not has_database(settings):
        return None
    engine = open_engine(settings)
    try:
        check_known(found := revision(engine), f"the ops database {engine.url.render_as_string(hide_password=True)}")
        return found
    finally:
        engine.dispose()


def _stale(lake: Warehouse, table: str) -> Stale | None:
    """Reads what the files say of themselves, no rows."""
    other = sorted(day for day, made_from in lake.provenances([table]) if made_from.get("sql_sha256") != sql_sha256())
    lack: dict[str, list[date]] = {}
    days = lake.days(table) if isinstance(lake, Lake) else []  # BigQuery adds a column to a whole table when it is first opened
    if days:
        paths = {lake.path(table, day): day for day in days}
        with lake.connection() as connection:
            rows = connection.execute(f"SELECT file_name, name FROM parquet_schema({file_list(*paths)})").fetchall()
        there: dict[str, set[str]] = {}
        for file, column in rows:
            there.setdefault(file.rsplit("/", 2)[-2], set()).add(column)
        for path, day in paths.items():
            missing = [name for name in TABLES[table].column_names if name not in there.get(path.parent.name, set())]
            if missing:
                lack.setdefault(", ".join(missing), []).append(day)
    return Stale(table, lack, other) if lack or other else None


def _old_packs(settings: Settings) -> list[date]:
    """Packs of an older schema; one that cannot be read is told by `status`."""
    found = []
    for day in pack_days(settings):
        try:
            pack = find_pack(settings, day)
        except PackError:
            continue
        if pack and pack.manifest.get("schema", 1) < PACK_SCHEMA:
            found.append(day)
    return found


def upgrade(
    settings: Settings, *, compute: Compute | None = None, clock: Clock = system_clock, say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Migrates, records the lake's schema and, with `compute` (first, last), computes stale dates again; returns what it found.

    Sends nothing, and leaves nothing to be sent that the upgrade alone brought about. Killed, it goes on when it is run again; until
    then the ledger is held.
    """
    found = plan(settings)
    with ops_database(settings) as engine:
        with engine.begin() as connection:
            hold.set_upgrading(connection, True, f"from schema {found.ops_schema[0]} to {HEAD}", clock())
        lake = open_warehouse(settings)
        settings_history.record(engine, settings, clock())
        _remember(lake, engine, settings, clock)
        if found.lake_schema[0] is not None:
            stamp(settings.home / "lake")
        if compute:
            for first, last in _spans(found.dates):
                say(f"computing {first} to {last}")
                compute(first, last)
        _quiet(lake, engine, settings, clock)
        lake.refresh_views()
        with engine.begin() as connection:
            hold.set_upgrading(connection, False, "ended", clock())
    return found


def _spans(days: Sequence[date]) -> Iterator[tuple[date, date]]:
    """Runs of consecutive dates."""
    first = None
    for place, day in enumerate(days):
        first = first or day
        if place + 1 == len(days) or days[place + 1] != day + timedelta(days=1):
            yield first, day
            first = None


# -- nobody hears of it ------------------------------------------------------------------------------------------------


def _in_reach(lake: Warehouse, settings: Settings, clock: Clock) -> dict[date, dict[str, Any]]:
    """Stored alerts that pilot and live still answer, by all rules."""
    today = shop_day(clock(), settings.shop_timezone)
    first = today - timedelta(days=settings.max_alert_age_days + 1)
    return alerts_by_day(records(lake.read_range("alert_logic", first, today)))


def _remember(lake: Warehouse, engine: Engine, settings: Settings, clock: Clock) -> None:
    """Keeps what the dates in reach say before anything is computed again, and what their answers were made from."""
    alerts = _in_reach(lake, settings, clock)
    if ledger.read_state(engine, BEFORE) is None:
        before = {day.isoformat(): [_flagged(alert), ledger.digest(versions_of(alert))] for day, alert in alerts.items()}
        ledger.set_state(engine, BEFORE, json.dumps(before), "retention-ops upgrade", f"{len(before)} dates in reach", clock())
    with engine.begin() as connection:
        for row in connection.execute(sa.select(answers).where(answers.c.alert_date.in_(list(alerts)))).mappings().all():
            alert = alerts[row["alert_date"]]
            if not row["made_from"] and row["version"] == alert_version(alert):
                made_from = {**lake.provenance("alert_logic", row["alert_date"]), "rows": versions_of(alert)}
                connection.execute(answers.update().where(answers.c.id == row["id"]).values(made_from=made_from))


def _flagged(alert: dict[str, Any]) -> bool:
    return any(row["alert_flag"] for row in (alert, *alert["others"]))


def _quiet(lake: Warehouse, engine: Engine, settings: Settings, clock: Clock) -> None:
    """A date in reach that was quiet before and was never answered stays quiet, as long as nothing but the release has changed it."""
    before = json.loads(ledger.read_state(engine, BEFORE)["value"])
    with engine.connect() as connection:
        told = set(connection.execute(sa.select(answers.c.alert_date).where(answers.c.mode.in_(REAL_MODES))).scalars())
    for day, alert in _in_reach(lake, settings, clock).items():
        flagged, was = before.get(day.isoformat(), (True, ""))
        now = ledger.digest(versions_of(alert))
        if not flagged and was != now and day not in told:
            ledger.set_state(engine, f"{UPGRADED}{day}", now, "retention-ops upgrade", "quiet before the upgrade", clock())
    with engine.begin() as connection:
        connection.execute(response_state.delete().where(response_state.c.name == BEFORE))
