"""A new release over an old home: what it finds, that nothing newer is touched, and that nobody hears of it."""

from __future__ import annotations

import json
from datetime import date, timedelta

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from retention_ops.errors import NewerSchema
from retention_ops.execute import hold, ledger
from retention_ops.log import settings_history
from retention_ops.log.database import HEAD, migrate, open_engine, ops_database, revision
from retention_ops.package.pack import find_pack
from retention_ops.settings import Settings
from retention_ops.upgrade import plan, upgrade
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.schema import LAKE_SCHEMA, lake_schema
from retention_ops_tests.execute.stage import DAY, WARNINGS, Stage, morning_after, stage, store_alerts, template  # noqa: F401

OTHER_SQL = "0" * 64
QUIET = DAY - timedelta(1)


def rewritten(lake: Lake, day: date, replace: str, **made_from: str | None) -> None:
    """The alert rows of a date as another release writes them: `replace` gives other values of columns."""
    provenance = {**lake.provenance("alert_logic", day), **made_from}
    with lake.connection() as connection:
        connection.execute(f"CREATE TEMP TABLE alert_logic AS SELECT * REPLACE ({replace}) FROM '{lake.path('alert_logic', day)}'")
        lake.write(connection, "alert_logic", day, {name: value for name, value in provenance.items() if value is not None})


def as_the_release_before_wrote_it(lake: Lake, table: str, day: date, without: tuple[str, ...]) -> None:
    """Without the newest columns, and without saying by which SQL it was made."""
    path = lake.path(table, day)
    stored = pq.read_table(path)
    old = {name: value for name, value in lake.provenance(table, day).items() if name not in ("sql_sha256", "settings_sha256")}
    kept = stored.select([name for name in stored.column_names if name not in without])
    pq.write_table(kept.replace_schema_metadata({name.encode(): value.encode() for name, value in old.items()}), path)


# -- what it finds -----------------------------------------------------------------------------------------------------


def test_a_home_of_this_release_has_nothing_to_upgrade(stage: Stage):  # noqa: F811
    stage.compute(DAY)
    found = plan(stage.settings)
    assert found.ops_schema == (HEAD, HEAD) and found.lake_schema == (LAKE_SCHEMA, LAKE_SCHEMA) and found.dates == []


def test_dates_and_packs_of_another_release_are_named_with_what_they_lack(stage: Stage):  # noqa: F811
    stage.compute(WARNINGS[0], WARNINGS[2])
    as_the_release_before_wrote_it(stage.lake, "alert_logic", WARNINGS[1], ("day_alone", "sentence"))
    rewritten(stage.lake, WARNINGS[2], "sentence || '!' AS sentence", sql_sha256=OTHER_SQL)
    manifest = find_pack(stage.settings, DAY).folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 1}))
    (stage.home / "lake" / "SCHEMA").unlink()
    found = plan(stage.settings)
    (table,) = found.tables
    assert table.table == "alert_logic" and table.lack_columns == {"day_alone, sentence": [WARNINGS[1]]}
    assert table.other_sql == WARNINGS[1:3]
    assert found.packs == [DAY] and found.dates == WARNINGS[:3] and found.lake_schema == (1, LAKE_SCHEMA)


def test_looking_changes_nothing(tmp_path):
    settings = Settings(_env_file=None, home=tmp_path / "home")
    engine = open_engine(settings)
    with engine.begin() as connection:
        migrate(connection, "0003")
    assert plan(settings).ops_schema == ("0003", HEAD)
    assert revision(engine) == "0003"
    engine.dispose()


def test_state_of_a_newer_release_is_refused_and_left_alone(stage: Stage):  # noqa: F811
    with stage.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(NewerSchema, match="9999"), ops_database(stage.settings):
        pass
    with stage.engine.begin() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == "9999"
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :head"), {"head": HEAD})
    manifest = find_pack(stage.settings, DAY).folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 99}))
    with pytest.raises(NewerSchema, match="schema 99"):
        find_pack(stage.settings, DAY)
    (stage.home / "lake" / "SCHEMA").write_text('{"schema": 99}')
    with pytest.raises(NewerSchema, match="schema 99"):
        Lake(stage.settings)


# -- what it does ------------------------------------------------------------------------------------------------------


def test_an_old_ops_database_is_migrated_with_its_rows(tmp_path):
    settings = Settings(_env_file=None, home=tmp_path / "home")
    engine = open_engine(settings)
    with engine.begin() as connection:
        migrate(connection, "0003")
        connection.execute(sa.text("INSERT INTO response_state (name, value, \"by\", why, at) VALUES "
                                   "('armed', '2024-02-01', 'x', 'y', '2024-02-01 00:00:00.000000')"))
    engine.dispose()
    upgrade(settings)
    with ops_database(settings) as engine:
        assert revision(engine) == HEAD and ledger.read_state(engine, "armed")["value"] == "2024-02-01"
        assert hold.why_held(engine) == ""
        assert settings_history.every(engine) == {settings.settings_sha256(): settings.recorded()}


def test_while_it_computes_the_ledger_is_held_and_a_kill_leaves_it_held(stage: Stage):  # noqa: F811
    stage.compute(DAY)
    as_the_release_before_wrote_it(stage.lake, "alert_logic", DAY, ("sentence",))
    (stage.home / "lake" / "SCHEMA").unlink()
    modes = []

    class Killed(BaseException):
        pass

    def die(first, last):
        modes.append(stage.responder().settings.mode)
        raise Killed

    with pytest.raises(Killed):
        upgrade(stage.settings, compute=die, clock=stage.clock)
    assert modes == ["shadow"] and "upgrade" in hold.why_held(stage.engine)
    assert stage.responder().answer(DAY)["mode"] == "shadow" and stage.world.tally() == {}
    computed = []
    upgrade(stage.settings, compute=lambda first, last: (computed.append((first, last)), stage.compute(first, last)), clock=stage.clock)
    assert computed == [(DAY, DAY)] and hold.why_held(stage.engine) == "" and plan(stage.settings).dates == []
    assert lake_schema(stage.home / "lake") == LAKE_SCHEMA


def test_a_date_answered_by_the_release_before_is_not_answered_again(stage: Stage):  # noqa: F811
    """Its answer does not say what it was made from; the upgrade writes that down before it computes the date anew."""
    stage.answer(DAY)
    with stage.engine.begin() as connection:
        connection.execute(sa.text("UPDATE answers SET made_from = NULL"))
    as_the_release_before_wrote_it(stage.lake, "alert_logic", DAY, ())
    before = stage.world.tally()

    def compute(first, last):
        stage.compute(first, last)
        rewritten(stage.lake, DAY, "current_value + 1 AS current_value, 'CRITICAL' AS severity")

    upgrade(stage.settings, compute=compute, clock=stage.clock)
    decision = stage.responder().gate(DAY)
    assert decision.verdict == "resume" and "new release" in decision.reason
    stage.responder().answer(DAY)
    assert stage.world.tally() == before


def test_a_quiet_date_that_only_the_new_rules_flag_is_told_to_nobody(stage: Stage):  # noqa: F811
    stage.clock.now = morning_after(DAY)
    stage.compute(QUIET)
    as_the_release_before_wrote_it(stage.lake, "alert_logic", QUIET, ())
    stage.responder().gatekeeper.horizon()
    flagged = "true AS alert_flag, 'WARNING' AS severity, NULL AS gate"

    def compute(first, last):
        stage.compute(first, last)
        rewritten(stage.lake, QUIET, flagged)

    upgrade(stage.settings, compute=compute, clock=stage.clock)
    decision = stage.responder().gate(QUIET)
    assert decision.verdict == "skip" and "upgrade" in decision.reason
    rewritten(stage.lake, QUIET, "current_value + 1 AS current_value", orders_version="000009-another")
    assert stage.verdict(QUIET) != "skip", "what the orders say later is answered"


def test_a_flagged_date_that_waits_for_its_answer_gets_it_after_the_upgrade(stage: Stage):  # noqa: F811
    stage.clock.now = morning_after(DAY)
    stage.compute(DAY)
    as_the_release_before_wrote_it(stage.lake, "alert_logic", DAY, ())
    upgrade(stage.settings, compute=stage.compute, clock=stage.clock)
    assert stage.verdict(DAY) == "open"


# -- without the command: the gate -------------------------------------------------------------------------------------


def test_other_words_or_another_column_are_no_other_result(stage: Stage):  # noqa: F811
    stage.answer(DAY)
    rewritten(stage.lake, DAY, "'said otherwise' AS sentence, 3 AS window_days", sql_sha256=OTHER_SQL)
    assert stage.verdict(DAY) == "resume"


def test_a_retraction_that_only_new_rules_bring_about_is_not_sent(stage: Stage):  # noqa: F811
    stage.answer(DAY)
    rewritten(stage.lake, DAY, "false AS alert_flag, 'INFO' AS severity", sql_sha256=OTHER_SQL)
    assert stage.verdict(DAY) == "resume"


def test_a_changed_setting_or_changed_orders_are_answered_as_before(stage: Stage):  # noqa: F811
    stage.answer(DAY)
    stricter = stage.with_settings(critical_pct=16.0)
    stricter.compute(DAY)
    assert stricter.verdict(DAY) in ("escalate", "update")
    stricter.close()
    stage.orders_found(DAY - timedelta(10), stage.quiet_customers(DAY)[:3])
    stage.compute(DAY)
    assert stage.verdict(DAY) in ("update", "escalate", "retract")
