"""What a person types: init, source check, source pull, doctor; and the asset that pulls each morning."""

from __future__ import annotations

import json
import re
import shlex
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
import sqlalchemy as sa
import sqlglot
from typer.testing import CliRunner

from retention_ops.cli import app
from retention_ops.commands.doctor import RIGHTS
from retention_ops.definitions import build_loop
from retention_ops.log.database import ingestions, ops_database, source_checks
from retention_ops.settings import Secrets, load_settings
from retention_ops.sources.assets import orders
from retention_ops.sources.check import check_once
from retention_ops.sources.select import NEEDED, check_columns, read_select
from retention_ops.warehouse.render import sql_folder
from retention_ops_tests.sources.shop_database import open_shop
from retention_ops_tests.test_cli import cli

NOW = datetime.now(UTC)


def test_the_examples_give_the_columns_of_an_order():
    for kind, dialect in (("shopify", "duckdb"), ("postgres", "postgres"), ("bigquery", "bigquery")):
        select = read_select(sql_folder() / "sources" / f"{kind}.sql", dialect)
        assert set(NEEDED) <= set(check_columns(select, sqlglot.parse_one(select.text, read=dialect).named_selects))
        assert len(select.tables()) == 1


@pytest.mark.parametrize("command", ["init", "source pull", "source check"])
def test_help_has_examples_that_name_existing_options(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"], terminal_width=200)
    examples = re.findall(r"^\s*(retention-ops .+?)\s*$", result.output, flags=re.M)
    assert result.exit_code == 0 and examples
    for example in examples:
        for option in (word for word in shlex.split(example) if word.startswith("--")):
            assert option in result.output.replace(example, "")


@pytest.mark.parametrize("kind", ["shopify", "postgres", "bigquery"])
def test_init_writes_an_example_that_settings_accept_and_touches_nothing_that_is_there(tmp_path, monkeypatch, kind):
    (tmp_path / ".env").write_text("# ours\nRETENTION_OPS_SHOP_TIMEZONE=Europe/Berlin\n")
    first = cli("init", "--source", kind, home=tmp_path / "home")
    assert first.returncode == 0 and "retention-ops source check" in first.stdout
    select = tmp_path / "sql" / "sources" / "orders.sql"
    assert select.read_text() == (sql_folder() / "sources" / f"{kind}.sql").read_text()
    settings = load_settings()
    assert (settings.source, settings.shop_timezone) == ({"shopify": "files"}.get(kind, kind), "Europe/Berlin")
    names = {f"RETENTION_OPS_{name.upper()}" for name in Secrets.model_fields}
    assert not names & set(re.findall(r"\w+", (tmp_path / ".env").read_text())), "no secret's name, let alone a secret"
    select.write_text("SELECT mine")
    before = (tmp_path / ".env").read_text()
    assert cli("init", "--source", kind, home=tmp_path / "home").returncode == 0
    assert (select.read_text(), (tmp_path / ".env").read_text()) == ("SELECT mine", before)
    other = "postgres" if kind != "postgres" else "shopify"
    refused = cli("init", "--source", other, home=tmp_path / "home")
    assert refused.returncode == 2 and "--force" in refused.stderr and select.read_text() == "SELECT mine"
    assert cli("init", "--source", other, "--force", home=tmp_path / "home").returncode == 0
    assert load_settings().source in ("postgres", "files") and load_settings().shop_timezone == "Europe/Berlin"
    assert (tmp_path / ".env").read_text().startswith("# ours\n")


@pytest.fixture
def shop(request, tmp_path, monkeypatch):
    """A Postgres shop whose settings are in the environment, as a person has them."""
    shop = open_shop("postgres", tmp_path / "shop", request)
    shop.now = NOW
    for name in ("home", "shop_timezone", "lookback_days", "source", "source_sql"):
        monkeypatch.setenv(f"RETENTION_OPS_{name.upper()}", str(getattr(shop.settings, name)))
    for number in range(60):
        shop.put(f"o{number}", f"c{number % 7}", ago=number // 3, hour=0 if number < 3 else 12)
    shop.save()
    yield shop
    shop.close()


def run(shop, *words: str):
    return cli(*words, home=shop.settings.home)


def test_check_then_pull_then_check_again(shop):
    first = run(shop, "source", "check")
    assert first.returncode == 0 and "Nothing was pulled yet" in first.stdout and "retention-ops" in first.stdout
    assert not (shop.settings.home / "lake" / "orders").exists()
    pulled = run(shop, "source", "pull")
    assert pulled.returncode == 0 and "run --date" in pulled.stdout
    with ops_database(shop.settings) as engine, engine.connect() as connection:
        assert connection.execute(ingestions.select()).mappings().one()["preset"] == "source"
    agreed = run(shop, "source", "check")
    assert agreed.returncode == 0 and "agree" in agreed.stdout

    shop.change("o9", total="11.00")
    shop.change("o12", customer="c6")  # neither count nor sum of its day differs
    shop.save()
    assert "source_check_off" not in causes(shop)
    off = json.loads(run(shop, "source", "check", "--json").stdout)
    assert causes(shop)["source_check_off"] == f"The orders here differ from the source on 2 dates up to {shop.day(1)}."
    assert [(row["day"], row["our_cents"], row["source_cents"], row["differing"]) for row in off["off"]] == [
        (str(shop.day(4)), 3000, 3000, 1), (str(shop.day(3)), 3000, 3100, 1)]
    shown = run(shop, "source", "check", "--week", str(shop.day(10)))
    assert shown.returncode == 1 and "2 days" in shown.stdout and "source pull" in shown.stdout
    monday = shop.day(10) - timedelta(days=shop.day(10).weekday())
    assert str(monday) in shown.stdout and str(monday + timedelta(days=6)) in shown.stdout

    again = json.loads(run(shop, "source", "pull", "--json").stdout)
    assert (again["amount_changed"], again["re_owned"], again["complete"]) == (1, 1, True)
    assert "source_check_off" in causes(shop), "a pull alone proves nothing"
    assert run(shop, "source", "check").returncode == 0
    assert "source_check_off" not in causes(shop)
    with ops_database(shop.settings) as engine, engine.connect() as connection:
        checks = connection.execute(source_checks.select().order_by(source_checks.c.id)).mappings().all()
    assert [row["ok"] for row in checks] == [True, False, False, True], "a check before the first pull compares nothing"
    assert checks[1]["differences"] == [
        {"date": str(shop.day(4)), "orders_here": 3, "orders_there": 3, "cents_here": 3000, "cents_there": 3000, "differing": 1},
        {"date": str(shop.day(3)), "orders_here": 3, "orders_there": 3, "cents_here": 3000, "cents_there": 3100, "differing": 1}]


def causes(shop) -> dict[str, str]:
    return {row["cause"]: row["detail"] for row in json.loads(run(shop, "health", "--json").stdout)["causes"]}


def test_doctor_says_whether_the_source_answers_and_what_it_needs(shop, monkeypatch):
    found = json.loads(run(shop, "doctor", "--json").stdout)["findings"]
    told = {item["subject"]: item for item in found if item["group"] == "source of orders"}
    assert told["source"]["ok"] and "order_id" in told["select"]["sentence"]
    assert told["rights"]["ok"] is None and "superuser" in told["rights"]["sentence"]
    assert "GRANT SELECT ON shop_orders" in told["rights"]["cure"]
    monkeypatch.setenv("RETENTION_OPS_SOURCE_URL", "postgresql://ada:canary-password@127.0.0.1:1/shop")
    down = run(shop, "doctor")
    assert down.returncode == 1 and "Connection refused" in down.stdout and "canary" not in down.stdout + down.stderr


def test_doctor_says_of_a_postgres_role_when_it_has_more_than_it_needs(shop, monkeypatch, postgres_url):
    """Of the source's user and of the ops database's: a superuser, one who may write, a reader, and an owner of one database."""
    server = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    url = sa.make_url(postgres_url)

    def told(source: str, ops: str = "") -> tuple[dict, dict]:
        """The source's own finding and the group of least rights, with these roles."""
        monkeypatch.setenv("RETENTION_OPS_SOURCE_URL", _address(url.set(username=source or url.username)))
        monkeypatch.setenv("RETENTION_OPS_OPS_DATABASE_URL", _address(url.set(username=ops or url.username, database="t_ops")))
        found = json.loads(run(shop, "doctor", "--json").stdout)["findings"]
        rights = {row["subject"]: row for row in found if row["group"] == "least rights"}
        return next(row for row in found if row["subject"] == "rights"), rights

    with server.connect() as admin:
        try:
            for statement in (
                "CREATE ROLE t_writer LOGIN", "CREATE ROLE t_reader LOGIN", "CREATE ROLE t_owner LOGIN",
                "CREATE DATABASE t_ops OWNER t_owner",
                "GRANT USAGE ON SCHEMA public TO t_writer, t_reader", "GRANT SELECT ON shop_orders TO t_writer, t_reader",
                "GRANT UPDATE ON shop_orders TO t_writer",
            ):
                admin.execute(sa.text(statement))
            source, rights = told("")
            assert source["ok"] is None and "is a superuser" in source["sentence"] and "default_transaction_read_only" in source["cure"]
            assert rights["ops database"]["ok"] is None and "is superuser, CREATEDB, CREATEROLE" in rights["ops database"]["sentence"]
            assert rights["postgres source"]["sentence"] == f"needs {RIGHTS['postgres source']}" and "files" not in rights
            source, rights = told("t_writer", "t_owner")
            assert source["ok"] is None and "t_writer may write to shop_orders" in source["sentence"]
            assert rights["ops database"]["ok"] is True and "t_owner has no more than it needs" in rights["ops database"]["sentence"]
            source, _ = told("t_reader", "t_owner")
            assert source["ok"] is None and source["cure"] == "ALTER ROLE t_reader SET default_transaction_read_only = on"
            admin.execute(sa.text(source["cure"]))
            source, _ = told("t_reader", "t_owner")
            assert source["ok"] is True and "t_reader may read and not write" in source["sentence"]
        finally:
            admin.execute(sa.text("DROP DATABASE IF EXISTS t_ops WITH (FORCE)"))
            for role in ("t_writer", "t_reader", "t_owner"):
                admin.execute(sa.text(f"DROP OWNED BY {role}"))
                admin.execute(sa.text(f"DROP ROLE {role}"))
    server.dispose()


def _address(url: sa.URL) -> str:
    return url.render_as_string(hide_password=False)


def test_a_source_that_is_down_fails_with_a_clear_message(shop, monkeypatch):
    monkeypatch.setenv("RETENTION_OPS_SOURCE_URL", "postgresql://ada:canary-password@127.0.0.1:1/shop")
    for words in (("source", "pull"), ("source", "check"), ("run", "--date", str(shop.day(1)))):
        failed = run(shop, *words)
        assert failed.returncode == 1 and "Connection refused" in failed.stderr
        assert "Traceback" not in failed.stderr and "canary" not in failed.stdout + failed.stderr


def test_the_asset_pulls_for_dates_that_are_not_complete_yet_and_only_for_these(request, tmp_path):
    shop = open_shop("csv", tmp_path / "shop", request)
    for number in range(30):
        shop.put(f"o{number}", f"c{number % 7}", ago=number // 3, hour=2)
    shop.pull()
    shop.now += timedelta(days=1)
    shop.put("this morning", ago=0, hour=1)
    shop.put("late", ago=5)
    shop.save()
    loop = build_loop(shop.settings, clock=lambda: shop.now)

    def materialized(ago: int) -> dict[str, dg.MetadataValue]:
        result = dg.materialize([orders], resources={"loop": loop}, tags={"dagster/partition": str(shop.day(ago))})
        return result.asset_materializations_for_node("orders")[0].metadata

    assert [materialized(ago)["dagster/row_count"].value for ago in (2, 1)] == [30, 32]
    shop.put("later", ago=1)
    shop.save()
    assert "corrections" not in materialized(1), "what is complete is computed as it is"
    with ops_database(shop.settings) as engine, engine.connect() as connection:
        (checked,) = connection.execute(source_checks.select()).mappings().all()
    assert (checked["day"], checked["ok"]) == (shop.day(1), True), "one check for each newest complete date, without anybody asking"
    shop.now += timedelta(days=1)
    pulled = materialized(1)
    assert pulled["corrections"].value == {"late": 1} and pulled["stale_from"].value == str(shop.day(2))
    for file in (tmp_path / "shop" / "exports").iterdir():
        file.unlink()
    materialized(2)  # a past date needs no source


def test_past_the_deadline_a_date_is_computed_although_the_source_cannot_be_read(request, tmp_path):
    shop = open_shop("csv", tmp_path / "shop", request, data_deadline="07:00")
    for number in range(30):
        shop.put(f"o{number}", f"c{number % 7}", ago=number // 3, hour=2)
    shop.pull()
    shop.now += timedelta(days=1)
    shop.sql.write_text("SELECT nonsense")
    loop = build_loop(shop.settings, clock=lambda: shop.now)

    def runs(**tags: str) -> bool:
        return dg.materialize([orders], resources={"loop": loop}, tags=tags, raise_on_error=False).success

    date = {"dagster/partition": str(shop.day(1))}
    assert not runs(**date), "before it, the run fails: it is tried again"
    shop.now += timedelta(hours=1)
    assert runs(**date) and shop.lake.orders().complete_through == shop.day(2)
    assert not runs(), "a run that does nothing but pull says that it could not"


def test_the_check_nobody_asks_for_is_done_once_a_day_and_again_while_it_is_off(request, tmp_path):
    shop = open_shop("csv", tmp_path / "shop", request)
    for number in range(30):
        shop.put(f"o{number}", f"c{number % 7}", ago=number // 3, hour=2)
    with ops_database(shop.settings) as engine:

        def check():
            shop.save()
            report = check_once(shop.lake, engine, lambda: shop.now, said.append)
            return report and not report.off

        said: list[str] = []
        assert check() is None, "nothing was pulled yet"
        shop.pull()
        assert [check(), check()] == [True, None]
        shop.now += timedelta(days=1)
        shop.put("today", ago=0, hour=2)
        shop.pull()
        shop.change("o9", total="11.00")
        shop.save()
        assert check() is True and shop.ours() == shop.meaning(), "what changed between the pull and the check is no difference"
        shop.now += timedelta(days=1)
        shop.put("today too", ago=0, hour=2)
        shop.pull()
        gone = {id_: shop.rows.pop(id_) for id_ in list(shop.rows)[:20]}
        assert [check(), check()] == [False, False], "a pull is refused that takes so much away"
        shop.rows |= gone
        assert [check(), check()] == [True, None]
        shop.now += timedelta(days=1)
        shop.put("tomorrow", ago=0, hour=2)
        shop.pull()
        shop.sql.write_text("SELECT nonsense")
        assert check() is None and "could not be compared" in said[-1], "the source went away in between: no fault of the orders"
