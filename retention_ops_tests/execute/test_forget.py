"""A person is forgotten: no trace in any file or database but the keyed mark, nothing sent, nothing stale, the log's chain whole.

A live shop whose ids are addresses: the loop ran in the home's own Dagster with Slack and Sheets behind loopback servers, an assistant
asked about the person, and an older version of everything is still on disk.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import duckdb
import pandas as pd
import pytest
import sqlalchemy as sa
from mcp import Client
from typer.testing import CliRunner

from retention_ops.cli import app
from retention_ops.definitions import build_loop
from retention_ops.detect.compute import alert_history
from retention_ops.errors import RetentionOpsError, SettingsError
from retention_ops.execute import ledger
from retention_ops.execute.destinations.choice import WITHDRAWAL_SLOT
from retention_ops.execute.forget import forget, preview
from retention_ops.execute.respond import Responder
from retention_ops.launch import run_dates
from retention_ops.log import forgotten, runs
from retention_ops.log.database import exposures, incidents, ops_database, ops_events, pending_handovers
from retention_ops.log.exposures import record
from retention_ops.log.traces import Traces
from retention_ops.package.audiences import audience_sha256
from retention_ops.package.pack import find_pack, verify
from retention_ops.person import _others
from retention_ops.serve.server import build_server, open_desk
from retention_ops.settings import Settings, load_settings
from retention_ops.sources.identity import held_as, identity_of
from retention_ops.sources.ingest import ERASED, ingest
from retention_ops.sources.shop import write_shop
from retention_ops.status import status
from retention_ops.warehouse.freshness import freshness
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.conftest import LAST_DAY
from retention_ops_tests.execute.servers.sheets import SheetsServer
from retention_ops_tests.execute.servers.slack import CHANNEL, TOKEN, SlackServer
from retention_ops_tests.execute.stage import FakeClock, intent
from retention_ops_tests.shops import lake_with, small_shop

KEY = "a-key-that-nobody-guesses-0123456789"


def address(customer: str) -> str:
    return f"{customer}.person@mail.example"


class World:
    """The two services, and a home in which the whole loop ran for the days up to the newest alert."""

    def __init__(self, stack: ExitStack, folder: Path):
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.chdir(folder)
        self.sheets, self.slack = stack.enter_context(SheetsServer()), None
        self.clock = FakeClock(datetime(2024, 6, 1, 8, tzinfo=UTC))
        self.slack = stack.enter_context(SlackServer(clock=lambda: self.clock().timestamp()))
        self.environment = {
            "RETENTION_OPS_ID_KEY": KEY, "RETENTION_OPS_SLACK_TOKEN": TOKEN, "RETENTION_OPS_GOOGLE_CREDENTIALS": self.sheets.credentials(),
            "RETENTION_OPS_MODE": "live", "RETENTION_OPS_MIN_SAMPLE": "10", "RETENTION_OPS_MESSAGES_TO": "slack",
            "RETENTION_OPS_SLACK_CHANNEL": CHANNEL, "RETENTION_OPS_SLACK_API_URL": self.slack.api_url, "RETENTION_OPS_LISTS_TO": "sheets",
            "RETENTION_OPS_SHEETS_SPREADSHEET": "book", "RETENTION_OPS_SHEETS_API_URL": self.sheets.url,
            "RETENTION_OPS_HOLDOUT_PCT": "0", "RETENTION_OPS_HANDOVER_COOLDOWN_DAYS": "0",
        }
        for name, value in self.environment.items():
            patch.setenv(name, value)
        self.home = folder / "home"
        self._prepare()

    def _prepare(self) -> None:
        orders = small_shop()
        orders["customer_id"] = orders["customer_id"].map(address)
        people = sorted(set(orders["customer_id"]))
        # two versions of the orders: the first one stays on disk
        lake_with(orders.iloc[:-20], self.home, min_sample=10)
        lake = lake_with(orders, self.home, min_sample=10, customers=pd.DataFrame({"customer_id": people, "country": "DE"}))
        for path in (self.home / "orders.csv", self.home / "customers.csv"):
            path.unlink()  # the shop's own exports
        history = alert_history(lake, LAST_DAY - timedelta(100), LAST_DAY)
        self.day = history.loc[history["alert_flag"], "alert_date"].dt.date.max()
        self.clock.now = datetime.combine(self.day + timedelta(days=1), datetime.min.time(), UTC) + timedelta(hours=8)
        loop = build_loop(load_settings(home=self.home), self.clock)
        outcome = run_dates(loop, self.day - timedelta(days=1), self.day)
        assert outcome.success, outcome.errors


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with ExitStack() as stack:
        yield World(stack, tmp_path_factory.mktemp("forget"))


@dataclass
class Shop:
    """A copy of the world's home for one test."""

    world: World
    home: Path

    def __post_init__(self) -> None:
        self.settings = load_settings(home=self.home)
        self.lake = Lake(self.settings)
        self.day, self.clock = self.world.day, self.world.clock
        pack = find_pack(self.settings, self.day)
        brief = (pack.folder / f"briefing_{pack.severity}.md").read_text()
        lists = [pd.read_csv(pack.folder / pack.manifest["audiences"][tier]["file"])["customer_id"].tolist() for tier in ("P1", "P2")]
        self.held = next(each for each in [*lists[0], *lists[1]] if each.replace("_", "\\_") in brief or each in brief)
        people = map(address, sorted(set(small_shop()["customer_id"])))
        self.given = next(each for each in people if held_as(self.settings, each) == self.held)

    def responder(self, engine, **changes) -> Responder:
        return Responder(self.lake, engine, self.settings, "a-person", clock=self.clock, sleep=self.clock.sleep, **changes)

    def forget(self, **changes):
        with ops_database(self.settings) as engine:
            return forget(self.responder(engine, **changes), [self.held], identity_of(self.settings), [self.given])

    def unreached(self) -> list[str]:
        with ops_database(self.settings) as engine:
            return preview(self.responder(engine), [self.held]).unreached

    def asked_by_an_assistant(self) -> None:
        with ops_database(self.settings) as engine, engine.begin() as connection:
            detail = {"method": "tools/call", "what": "explain_customer", "arguments": {"customer_id": self.held, "date": str(self.day)}}
            ledger.note(connection, self.clock(), "mcp_call", "ada", json.dumps(detail))

    def spilled(self) -> None:
        """What killed processes leave: half a partition, a scratch folder, deleted rows in the database's free pages."""
        (self.home / "lake" / "churn_detection" / f"day={self.day}" / ".part-0.parquet.999999-abcd.partial").write_text(self.held)
        (self.home / "tmp" / "ingest-killed").mkdir(parents=True, exist_ok=True)
        (self.home / "tmp" / "ingest-killed" / "rows.csv").write_text(self.given)
        (self.home / "action_packs" / ".builds" / "2024-01-01.abandoned").mkdir()
        (self.home / "action_packs" / ".builds" / "2024-01-01.abandoned" / "audience_P1.csv").write_text(self.held)
        lost = self.home / "outbox" / "2024-01-01"  # the comment on an incident whose pack has expired
        lost.mkdir(parents=True)
        (lost / "ticket_comment.json").write_text(json.dumps({"content": {"text": f"over\n{self.held} came back"}}))
        with ops_database(self.settings) as engine, engine.begin() as connection:
            key = connection.execute(sa.select(ledger.actions.c.key).limit(1)).scalar_one()
            connection.execute(pending_handovers.insert().values(action_key=key, arms={"P1": {"treated": [self.held] * 200}}))
        with ops_database(self.settings) as engine, engine.begin() as connection:
            connection.execute(pending_handovers.update().values(arms={"P1": {"treated": [self.held, "other"]}}))
        storage = self.home / "dagster" / "storage"
        (storage / "accident").mkdir(parents=True)
        (storage / "accident" / "compute.err").write_text(f"Traceback: no such customer {self.held}, said a library\nkept\n")


@pytest.fixture
def shop(world, tmp_path, monkeypatch):
    for name, value in world.environment.items():
        monkeypatch.setenv(name, value)
    shutil.copytree(world.home, tmp_path / "home", symlinks=True)
    sheets, messages = copy.deepcopy(world.sheets.sheets), list(world.slack.messages)
    yield Shop(world, tmp_path / "home")
    world.sheets.sheets = sheets
    world.slack.messages[:] = messages


def traces(home: Path, *names: str) -> dict[str, list[str]]:
    """Everywhere a name stands: every file as it lies there, and every Parquet file and DuckDB file opened."""
    found: dict[str, list[str]] = {}
    for path in sorted(home.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        data = path.read_bytes()
        if path.suffix == ".parquet":
            with duckdb.connect() as con:
                data += con.sql(f"SELECT * FROM read_parquet('{path}', hive_partitioning = false)").df().to_csv().encode()
                data += con.sql(f"SELECT * FROM parquet_metadata('{path}')").df().to_csv().encode()
                data += con.sql(f"SELECT * FROM parquet_kv_metadata('{path}')").df().to_csv().encode()
        for name in names:
            if name.encode() in data:
                found.setdefault(str(path.relative_to(home)), []).append(name)
    return found


def sent(shop: Shop) -> int:
    return len([request for request in shop.world.slack.requests if "postMessage" in request.path or "update" in request.path])


class Killed(BaseException):
    pass


def killed_at(step: str):
    def strike(name: str, row: dict[str, Any]) -> None:
        if name == "forget" and row["step"] == step:
            raise Killed

    return strike


@dataclass
class Erased:
    """One person forgotten, by a command that was killed half-way and given again; and how things were before."""

    shop: Shop
    before: dict[str, list[str]]
    tables: dict[str, pd.DataFrame]
    stale: Any
    manifest: dict[str, Any]
    log: list[dict[str, Any]]
    messages: int
    lists: list[str]
    outcome: Any
    worksheets: list[str]


@pytest.fixture(scope="module")
def forgotten_once(world, tmp_path_factory):
    home = tmp_path_factory.mktemp("erased") / "home"
    shutil.copytree(world.home, home, symlinks=True)
    sheets = copy.deepcopy(world.sheets.sheets)
    shop = Shop(world, home)
    shop.asked_by_an_assistant()
    shop.spilled()
    with ops_database(shop.settings) as engine:
        log = runs.rows(engine)
    before = {
        "before": traces(home, shop.held, shop.given), "stale": freshness(shop.lake), "log": log, "messages": sent(shop),
        "tables": {table: shop.lake.read(table, shop.day) for table in ("retention_daily", "alert_logic", "customer_priority")},
        "manifest": find_pack(shop.settings, shop.day).manifest,
        "lists": [sheet.title for sheet in world.sheets.sheets["book"] if any(shop.held in row for row in sheet.values)],
    }
    with pytest.raises(Killed):
        shop.forget(checkpoint=killed_at("tables"))
    outcome = shop.forget()
    worksheets = world.sheets.titles()
    world.sheets.sheets = sheets
    return Erased(shop, **before, outcome=outcome, worksheets=worksheets)


@pytest.fixture
def erased(forgotten_once, monkeypatch):
    for name, value in forgotten_once.shop.world.environment.items():
        monkeypatch.setenv(name, value)
    return forgotten_once


def test_no_trace_is_left_but_the_keyed_mark(erased):
    shop, outcome = erased.shop, erased.outcome
    places = {place.split("/")[0] for place in erased.before}
    assert places >= {"lake", "action_packs", "outbox", "dagster", "ops.sqlite", "tmp"}, f"the search itself: {sorted(erased.before)}"
    assert traces(shop.home, shop.held, shop.given) == {}
    assert sent(shop) == erased.messages, "a forget sends nothing"
    assert any("slack post" in text and "http" in text for text in outcome.unreached), outcome.unreached
    with ops_database(shop.settings) as engine:
        (request,) = forgotten.find(engine)
        assert request["mark"] == identity_of(shop.settings).mark(shop.held) and request["finished_at"] is not None
        assert runs.first_broken_row(engine) is None
    verified = CliRunner().invoke(app, ["--home", str(shop.home), "audit", "verify"])
    assert verified.exit_code == 0, verified.output


def test_worksheets_that_may_hold_the_person_go_and_the_trail_says_so(erased):
    assert erased.lists and set(erased.lists).isdisjoint(erased.worksheets) and "Sheet1" in erased.worksheets
    with ops_database(erased.shop.settings) as engine:
        rows = ledger.find(engine, slot=WITHDRAWAL_SLOT)
        assert rows and {row["state"] for row in rows} == {ledger.SENT} and {row["payload"]["why"] for row in rows} == {ERASED}


def test_totals_stay_and_nothing_becomes_stale_or_is_answered_anew(erased):
    shop = erased.shop
    for table in ("retention_daily", "alert_logic"):
        pd.testing.assert_frame_equal(erased.tables[table], shop.lake.read(table, shop.day))
    assert freshness(shop.lake) == erased.stale
    before = erased.tables["customer_priority"]
    left = before[before["customer_id"] != shop.held].reset_index(drop=True)
    pd.testing.assert_frame_equal(shop.lake.read("customer_priority", shop.day), left)
    pack = find_pack(shop.settings, shop.day)
    verify(pack)
    assert pack.facts_sha256 == erased.manifest["facts_sha256"] and pack.manifest["alert_versions"] == erased.manifest["alert_versions"]
    assert pack.manifest["erased"][0]["before"] == {"audience_sha256": erased.manifest["audience_sha256"]}
    with ops_database(shop.settings) as engine:
        assert runs.rows(engine) == erased.log
        responder = shop.responder(engine)
        assert pack.manifest["audience_sha256"] == audience_sha256(responder.lists(shop.day)), "nothing counts as a changed list"
        assert not responder.gate(shop.day).acts
    facts = status(shop.settings, shop.clock)
    assert (facts["stale_dates"], facts["stale_packs"], facts["mismatches"]) == ([], [], [])


def test_a_forgotten_customer_does_not_come_in_again(erased, monkeypatch):
    shop = erased.shop
    file = shop.home.parent / "again.csv"
    file.write_text(f"order_id,customer_id,order_date,order_amount\nz1,{shop.given},{shop.day},9.00\nz2,{address('new')},{shop.day},9.00\n"
                    f"z3,{shop.held},{shop.day},9.00\n")
    report = ingest([file], "orders", shop.settings, complete_through=shop.day)
    assert report.excluded == {ERASED: 2} and report.added == 1
    file.write_text(f"customer_id,country\n{shop.given},DE\nC1,FR\n")
    report = ingest([file], "customers", shop.settings)
    assert report.excluded == {ERASED: 1} and report.added == 1
    assert traces(shop.home, shop.held, shop.given) == {}
    monkeypatch.delenv("RETENTION_OPS_ID_KEY")
    with pytest.raises(SettingsError, match="1 customers were forgotten here, and RETENTION_OPS_ID_KEY is not set"):
        ingest([file], "customers", shop.settings)


STEPS = ("worksheets", "orders", "customers", "packs", "ops database", "Dagster's storage")


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_the_same_request_ends_it(shop, step):
    with pytest.raises(Killed):
        shop.forget(checkpoint=killed_at(step))
    with ops_database(shop.settings) as engine:
        (request,) = forgotten.find(engine)
        assert request["finished_at"] is None and shop.held not in json.dumps([request["progress"], request["unreached"]])
    outcome = shop.forget()
    assert traces(shop.home, shop.held, shop.given) == {}
    assert any("slack post" in text for text in outcome.unreached), "what it could not reach is known from the first time"
    verify(find_pack(shop.settings, shop.day))


@pytest.mark.slow
def test_forgetting_twice_says_when_it_was_asked_for_first(shop):
    shop.forget()
    again = shop.forget()
    assert again.erased == {} and again.before[0]["finished_at"] is not None


@pytest.mark.slow
def test_the_demo_shop_forgets_whom_an_assistant_asked_about(tmp_path, monkeypatch):
    """The shop of the demo, the loop in its own Dagster in live mode, a brief told by Slack, lists in Sheets, and an MCP session."""
    monkeypatch.setenv("RETENTION_OPS_ID_KEY", KEY)
    shown = write_shop(tmp_path / "shop", customers=1500)
    clock = FakeClock(datetime.combine(shown.last_date + timedelta(days=1), datetime.min.time(), UTC) + timedelta(hours=8))
    with SlackServer(clock=lambda: clock().timestamp()) as slack, SheetsServer() as sheets:
        for name, value in {
            "MODE": "live", "MESSAGES_TO": "slack", "SLACK_CHANNEL": CHANNEL, "SLACK_API_URL": slack.api_url, "SLACK_TOKEN": TOKEN,
            "LISTS_TO": "sheets", "SHEETS_SPREADSHEET": "book", "SHEETS_API_URL": sheets.url,
            "GOOGLE_CREDENTIALS": sheets.credentials(), "HOLDOUT_PCT": "0",
        }.items():
            monkeypatch.setenv(f"RETENTION_OPS_{name}", value)
        settings = load_settings(home=tmp_path / "home")
        for file, preset in ((shown.orders, "orders"), (shown.customers, "customers")):
            ingest([file], preset, settings)
        loop = build_loop(settings, clock)
        assert run_dates(loop, shown.last_date - timedelta(days=2), shown.last_date).success
        pack = find_pack(settings, shown.last_date)
        brief = (pack.folder / "briefing.slack.json").read_text()
        held = re.search(r"`(C\d{6})`", brief)[1]
        with open_desk(lambda: settings, clock) as desk:
            anyio.run(_asks, build_server(desk), held, str(shown.last_date))
        places = {place.split("/")[0] for place in traces(settings.home, held)}
        assert places >= {"lake", "action_packs", "ops.sqlite"}, places
        assert any(held in str(sheet.values) for sheet in sheets.sheets["book"])
        posts = len([request for request in slack.requests if "chat." in request.path])
        done = CliRunner().invoke(app, ["--home", str(settings.home), "forget", held, "--yes"])
        assert done.exit_code == 0, done.output
        assert traces(settings.home, held) == {}
        assert not any(held in str(sheet.values) for sheet in sheets.sheets["book"])
        assert len([request for request in slack.requests if "chat." in request.path]) == posts
        assert "slack post" in done.output and "Out of reach" in done.output
        assert CliRunner().invoke(app, ["--home", str(settings.home), "audit", "verify"]).exit_code == 0
        rebuilt = run_dates(loop, shown.last_date, shown.last_date)
        assert rebuilt.success, rebuilt.errors
        assert traces(settings.home, held) == {}, "what is built anew does not know them"


async def _asks(server: Any, customer: str, day: str) -> None:
    async with Client(server) as session:
        answer = await session.call_tool("explain_customer", {"customer_id": customer, "date": day})
        assert not answer.is_error, answer


def test_nobody_is_blocked_who_is_not_known(shop):
    with ops_database(shop.settings) as engine:
        with pytest.raises(RetentionOpsError, match="nothing is held"):
            forget(shop.responder(engine), ["C999999"], identity_of(shop.settings))
        assert forgotten.find(engine) == []


def test_records_are_append_only_unless_an_erasure_is_under_way(shop):
    with ops_database(shop.settings) as engine:
        for statement in (exposures.delete(), ops_events.update().values(detail="x"), ops_events.delete()):
            with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
                connection.execute(statement)
        forgotten.begin(engine, ["0" * 64], "f", shop.clock(), [])
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
            connection.execute(ops_events.delete())
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
            connection.execute(exposures.update().values(tier="P9"))


def test_rows_are_gone_on_either_database(engine):
    now, traces_of = datetime(2026, 7, 1, tzinfo=UTC), Traces(["C002392"])
    with engine.begin() as connection:
        ledger.plan(connection, [intent(payload={"text": "1. `C002392` P1\n2. `C004585` P1"})], now, "test", {})
        (key,) = connection.execute(sa.select(ledger.actions.c.key)).scalars()
        (number,) = connection.execute(incidents.insert().values(
            alert_type="a", scope="global", mode="live", state="open", severity="WARNING", opened_on=now.date(), last_flagged_on=now.date(),
            frozen_baseline=1, frozen_warning_pct=15, owner="", backup_owner="", ack_by=now, created_at=now, updated_at=now,
        )).inserted_primary_key
        record(connection, number, now.date(), key, {"C002392": ("P1", "treated"), "C004585": ("P1", "treated")}, now)
        connection.execute(pending_handovers.insert().values(action_key=key, arms={"P1": {"treated": ["C002392", "C004585"]}}))
        ledger.note(connection, now, "mcp_call", "ada", json.dumps({"arguments": {"customer_id": "C002392"}}))
    forgotten.begin(engine, ["0" * 64], "f" * 16, now, ["a message"])
    with engine.begin() as connection:
        assert [len(forgotten.told(connection, traces_of)), len(forgotten.exposed(connection, ["C002392"]))] == [1, 1]
        left, rewritten = forgotten.pending(connection, ["C002392"]), forgotten.events(connection, traces_of)
        forgotten.erase_rows(connection, ["C002392"], left, rewritten)
    forgotten.compact(engine)
    forgotten.finish(engine, ["0" * 64], now)
    with engine.connect() as connection:
        text = str([connection.execute(sa.select(table)).all() for table in (exposures, pending_handovers, ops_events)])
        assert "C002392" not in text and "C004585" in text
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
        connection.execute(exposures.delete())


# -- the commands -------------------------------------------------------------------------------------------------------


def command(shop: Shop, *words: str, **options: Any):
    return CliRunner().invoke(app, ["--home", str(shop.home), *words], **options)


def test_where_dagster_keeps_its_events_on_a_server_that_is_named_as_not_reached(shop):
    assert "event_logs" not in " ".join(shop.unreached())
    shutil.copy(Path(__file__).parents[2] / "deploy" / "dagster.yaml", shop.home / "dagster" / "dagster.yaml")
    assert "Dagster's own storage in Postgres" in " ".join(shop.unreached())


def test_the_command_looks_without_touching_anything(shop):
    before = traces(shop.home, shop.held)
    looked = command(shop, "forget", shop.given, "--dry-run", "--json")
    assert looked.exit_code == 0, looked.output
    told = json.loads(looked.stdout)["would_erase"]
    assert traces(shop.home, shop.held) == before
    assert {"orders", "customers", "customer_priority", "churn_detection", "packs", "exposures", "actions", "worksheets"} <= set(told)


@pytest.mark.slow
def test_the_command_asks_and_reads_standard_input(shop):
    refused = command(shop, "forget", shop.given, input="n\n")
    assert refused.exit_code == 1 and traces(shop.home, shop.held) != {}
    done = command(shop, "forget", "-", "--yes", "--json", input=f"{shop.given}\n")
    assert done.exit_code == 0, done.output
    assert traces(shop.home, shop.held, shop.given) == {}


def test_everything_held_about_a_person_is_exported_for_their_eyes(shop):
    shop.asked_by_an_assistant()
    out = shop.home.parent / "anna.json"
    done = command(shop, "export-person", shop.given, "--json", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert out.stat().st_mode & 0o777 == 0o600
    told = json.loads(out.read_text())
    assert told["customer_id"] == shop.held and told["attributes"]["country"] == "DE" and told["asked_about"] == 1
    assert told["risk"]["customer_id"] == shop.held and told["priority_over_time"][-1]["to"] == str(shop.day)
    assert {row["destination"] for row in told["hand_overs"]} == {"sheets"} and str(shop.day) in told["packs"]
    assert any(row["by"] == "slack" for row in told["named_in"])
    page = command(shop, "export-person", shop.given)
    assert page.exit_code == 0 and "## Orders" in page.stdout and str(len(told["orders"])) and "P" in page.stdout
    missing = command(shop, "export-person", "nobody")
    assert missing.exit_code == 1


def test_a_brief_leads_back_to_the_person_through_the_shops_own_list(shop):
    crm = shop.home.parent / "crm.csv"
    crm.write_text(f"name,email\nAnna,{shop.given}\nNobody,\n")
    out = shop.home.parent / "crm_with_ids.csv"
    done = command(shop, "ids", "--file", str(crm), "--out", str(out))
    assert done.exit_code == 0, done.output
    assert out.read_text().splitlines()[1:] == [f"{shop.held},Anna,{shop.given}", ",Nobody,"]
    assert out.stat().st_mode & 0o777 == 0o600
    assert command(shop, "ids", shop.given).stdout.strip() == shop.held
    explained = command(shop, "explain", "--customer", shop.given, "--date", str(shop.day))
    assert shop.held in explained.stdout and shop.given not in explained.stdout


def test_worksheets_expire(shop):
    with ops_database(shop.settings) as engine:
        assert shop.responder(engine).expire_lists() == []
        titles = shop.world.sheets.titles()
        shop.clock.now += timedelta(days=shop.settings.sheets_keep_days + 1)
        try:
            rows = shop.responder(engine, mode=lambda: "shadow").expire_lists()
            assert rows and {row["state"] for row in rows} == {ledger.SENT}, "also where nothing else would leave"
            assert shop.world.sheets.titles() == ["Sheet1"] and len(titles) > 1
            assert shop.responder(engine).expire_lists() == [], "once"
        finally:
            shop.clock.now -= timedelta(days=shop.settings.sheets_keep_days + 1)


@pytest.mark.slow
def test_the_daily_run_lets_old_packs_and_worksheets_go(shop):
    """Nobody has to think of it: a run 91 days later removes both, and the ledger has the deletion."""
    assert find_pack(shop.settings, shop.day) and len(shop.world.sheets.titles()) > 1
    now = shop.clock.now
    shop.clock.now += timedelta(days=91)
    try:
        # the newest date whose orders are in: what is due by the clock, not by the date that is run
        outcome = run_dates(build_loop(shop.settings, shop.clock), LAST_DAY, LAST_DAY)
        assert outcome.success, outcome.errors
    finally:
        shop.clock.now = now
    assert find_pack(shop.settings, shop.day) is None and find_pack(shop.settings, LAST_DAY)
    assert shop.world.sheets.titles() == ["Sheet1"]
    with ops_database(shop.settings) as engine:
        gone = ledger.find(engine, slot=WITHDRAWAL_SLOT)
    assert gone and {(row["state"], row["payload"]["why"]) for row in gone} == {(ledger.SENT, "sheets_keep_days")}


def test_state_of_our_own_is_no_file_that_somebody_put_there(tmp_path):
    settings = Settings(_env_file=None, home=tmp_path, metrics_file="metrics.prom")
    for name in (".installation", "return_model.json", str(settings.metrics_file), "export.csv"):
        (tmp_path / name).write_text("customer-77\n")
    assert [path.name for path in _others(settings, Traces(["customer-77"]))] == ["export.csv"]
