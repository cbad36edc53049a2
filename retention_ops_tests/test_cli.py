"""The command line: exit codes, messages, JSON, and the demo as a newcomer runs it."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from retention_ops.cli import app, main
from retention_ops.definitions import build_loop
from retention_ops.detect.compute import table_for
from retention_ops.launch import run_dates
from retention_ops.log.database import ingestions, ops_database
from retention_ops.status import status
from retention_ops.warehouse.lake import Lake
from retention_ops_tests.conftest import LAST_DAY, settings_for
from retention_ops_tests.shops import lake_with, small_shop

COMMANDS = ["demo", "ingest", "run", "backfill", "alerts", "explain", "status", "ui"]
DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def process(*words: object, home: Path) -> subprocess.CompletedProcess:
    """The installed command in a process of its own: seconds of imports, for what only a process can show."""
    line = [sys.executable, "-m", "retention_ops.cli", "--home", str(home), *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


def cli(*words: object, home: Path) -> subprocess.CompletedProcess:
    """The command's entry point in this process."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["retention-ops", "--home", str(home), *map(str, words)])
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def shop_home(tmp_path_factory):
    """A home with the small shop and its last three dates built; who changes it takes a copy."""
    home = tmp_path_factory.mktemp("cli") / "home"
    lake = lake_with(small_shop(), home)
    outcome = run_dates(build_loop(lake.settings), LAST_DAY - timedelta(2), LAST_DAY)
    assert outcome.success, outcome.errors
    return home


@pytest.fixture
def copied(shop_home, tmp_path):
    """A lake of its own in the same state; the views name files by their whole path, so a move makes them anew."""
    shutil.copytree(shop_home, tmp_path / "home", symlinks=True)
    lake = Lake(settings_for(tmp_path / "home"))
    lake.refresh_views()
    return lake


def test_help_lists_the_contracts_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert [command for command in COMMANDS if command not in result.output] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_that_names_existing_options(command):
    result = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
    assert result.exit_code == 0
    examples = re.findall(r"^\s*(retention-ops .+?)\s*$", result.output, flags=re.M)
    assert examples
    for example in examples:
        for option in (word for word in shlex.split(example) if word.startswith("--") and word != "--home"):
            assert option in result.output.replace(example, ""), f"{option} of: {example}"


@pytest.mark.parametrize(("words", "code", "says"), [
    (["run"], 2, "--date"),
    (["run", "--date", "2024-13-01"], 2, "not a date like"),
    (["run", "--date", "20240101"], 2, "not a date like"),
    (["nonsense"], 2, "No such command"),
    (["ingest"], 2, "FILE"),
    (["run", "--date", "2024-01-01"], 1, "no orders yet"),
    (["backfill", "--from", "2024-01-01", "--to", "2024-01-02"], 1, "no orders yet"),
    (["explain", "--date", "2024-01-01"], 1, "retention-ops ingest"),
])
def test_wrong_usage_is_2_and_failure_is_1_with_a_clear_message(tmp_path, words, code, says):
    result = (process if words[0] == "run" else cli)(*words, home=tmp_path / "home")
    assert result.returncode == code
    assert says in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert not (tmp_path / "home" / "lake" / "orders").exists()


def test_a_setting_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RETENTION_OPS_SHOP_TIMEZONE", "Mars/Olympus")
    result = cli("status", home=tmp_path / "home")
    assert result.returncode == 1 and "RETENTION_OPS_SHOP_TIMEZONE" in result.stderr


def test_status_of_an_empty_home_points_to_the_first_step(tmp_path):
    result = cli("status", home=tmp_path / "home")
    assert result.returncode == 0
    assert "none yet" in result.stdout and "demo" in result.stdout


def test_status_as_json(shop_home):
    facts = json.loads(cli("status", "--json", home=shop_home).stdout)
    assert facts["mode"] == "shadow" and facts["dates_built"] == 3 and facts["stale_dates"] == [] and facts["mismatches"] == []
    assert facts["complete_through"] == LAST_DAY.isoformat() == facts["newest_date"]
    assert facts["audit"].endswith("hash chain whole") and facts["unfinished_dates"] == [] and facts["last_run"]["status"] == "success"


@pytest.mark.slow
def test_status_names_what_an_interrupted_run_left_undone(tmp_path, monkeypatch):
    """Tables without packs and a failed run must not read as "everything agrees"."""
    lake = lake_with(small_shop(), tmp_path / "home")
    loop = build_loop(lake.settings)
    days = [LAST_DAY - timedelta(1), LAST_DAY]

    def dies(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("retention_ops.package.assets.build_pack", dies)
    outcome = run_dates(loop, days[0], days[-1])
    assert not outcome.success and outcome.interrupted
    monkeypatch.undo()
    facts = status(lake.settings)
    assert facts["unfinished_dates"] == days
    assert facts["last_run"]["status"] in ("failure", "canceled")
    assert facts["next"] == [f"backfill --from {days[0]} --to {days[-1]}"]
    assert run_dates(loop, days[0], days[-1]).success
    facts = status(lake.settings)
    assert facts["unfinished_dates"] == [] and facts["next"][0].startswith("explain")


@pytest.mark.slow
def test_a_withdrawn_consent_names_the_packs_that_still_list_the_customer(tmp_path):
    shop = small_shop()
    people = pd.DataFrame({"customer_id": sorted(set(shop["customer_id"])), "consent": "yes"})
    lake = lake_with(shop, tmp_path / "home", customers=people)
    loop = build_loop(lake.settings)
    assert run_dates(loop, LAST_DAY, LAST_DAY).success
    assert status(lake.settings)["packs_with_opted_out"] == []
    listed = table_for(lake, "customer_priority", LAST_DAY)["customer_id"].iloc[0]
    refusal = tmp_path / "refusal.csv"
    refusal.write_text(f"customer_id,consent\n{listed},no\n")
    result = cli("ingest", refusal, "--preset", "customers", home=lake.settings.home)
    assert result.returncode == 0 and f"--from {LAST_DAY} --to {LAST_DAY}" in result.stdout
    assert status(lake.settings)["packs_with_opted_out"] == [LAST_DAY]
    assert "Do not contact" in cli("explain", "--customer", listed, "--date", LAST_DAY, home=lake.settings.home).stdout
    assert run_dates(loop, LAST_DAY, LAST_DAY).success
    assert status(lake.settings)["packs_with_opted_out"] == []


def test_ingested_suppressions_name_the_packs_to_build_again_and_what_was_lifted(copied, tmp_path):
    lake = copied
    who = table_for(lake, "customer_priority", LAST_DAY)["customer_id"].iloc[0]
    listed = tmp_path / "do_not_contact.csv"
    listed.write_text(f"customer_id,reason\n{who},complaint\nsomebody,\n")
    result = cli("ingest", listed, "--preset", "suppressions", home=lake.settings.home)
    assert result.returncode == 0 and re.search(r"added / changed / lifted / known +2 / 0 / 0 / 0", result.stdout)
    assert "Stale: " in result.stdout and f"backfill --from {LAST_DAY - timedelta(2)} --to {LAST_DAY}" in result.stdout
    assert cli("run", "--date", LAST_DAY, home=lake.settings.home).stdout.count("left out: 1 suppressed") == 1
    listed.write_text("customer_id\nsomebody\n")
    report = json.loads(cli("ingest", listed, "--preset", "suppressions", "--replace", "--json", home=lake.settings.home).stdout)
    assert (report["rows"], report["removed"], report["stale_dates"]) == (1, 1, [])
    with ops_database(lake.settings) as engine, engine.connect() as connection:
        known = connection.execute(ingestions.select().filter_by(dataset="suppressions").order_by(ingestions.c.version)).all()
    assert [(row.preset, row.rows) for row in known] == [("suppressions", 2), ("suppressions", 1)]


def test_home_must_be_a_folder(tmp_path):
    file = tmp_path / "orders.csv"
    file.write_text("x")
    result = cli("status", home=file)
    assert result.returncode == 2 and "is not a folder" in result.stderr and "Traceback" not in result.stderr


def test_a_busy_port_is_named_before_anything_starts(shop_home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = process("ui", "--port", taken.getsockname()[1], home=shop_home)
    assert result.returncode == 2 and "choose another --port" in result.stderr


def test_alerts_as_json_and_as_a_table(shop_home):
    first, last = LAST_DAY - timedelta(2), LAST_DAY
    rows = json.loads(cli("alerts", "--from", first, "--to", last, "--json", home=shop_home).stdout)
    assert [row["alert_date"] for row in rows] == [(first + timedelta(offset // 2)).isoformat() for offset in range(6)]
    assert len({row["alert_type"] for row in rows}) == 2
    table = cli("alerts", "--from", LAST_DAY - timedelta(4), "--to", last, home=shop_home).stdout
    assert last.isoformat() in table and "2 of 5 dates not built" in table and "backfill --from" in table


def test_run_as_json_is_data_only(shop_home):
    result = process("run", "--date", LAST_DAY, "--json", home=shop_home)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["success"] and summary["alert"]["alert_date"] == LAST_DAY.isoformat()
    assert set(summary["counts"]) == {"P1", "P2", "P3"}
    assert summary["log"][0]["status"] == "skipped"


def test_explain_a_date_and_a_customer(shop_home, monkeypatch):
    text = " ".join(cli("explain", "--date", LAST_DAY, home=shop_home).stdout.split())
    assert "The rule:" in text and "min_sample" in text and "Verdict: INFO" in text and "Settings changed since" not in text
    with monkeypatch.context() as patch:
        patch.setenv("RETENTION_OPS_WARNING_PCT", "12")
        text = " ".join(cli("explain", "--date", LAST_DAY, home=shop_home).stdout.split())
    assert "Settings changed since: warning_pct 15 -> 12." in text
    text = cli("explain", "--customer", "promo0", "--date", LAST_DAY, home=shop_home).stdout
    assert "1 order on 1 day" in text and "no rhythm yet" in text and "Not in the queue" in text
    data = json.loads(cli("explain", "--customer", "promo0", "--date", LAST_DAY, "--json", home=shop_home).stdout)
    assert data["facts"]["total_orders"] == 1 and data["facts"]["priority"] is None
    unknown = cli("explain", "--customer", "nobody", "--date", LAST_DAY, home=shop_home)
    assert unknown.returncode == 1 and "'nobody' has no order by" in unknown.stderr


def test_a_date_beyond_the_partitions_is_bad_usage(shop_home):
    result = cli("run", "--date", "2999-01-01", home=shop_home)
    assert result.returncode == 2 and "not over yet" in result.stderr


def test_ingest_reports_what_it_left_out_and_what_is_stale(tmp_path):
    orders = tmp_path / "orders.csv"
    orders.write_text("order_id,customer_id,order_date,order_amount\n1,a,2024-01-01,10.00\n2,b,2024-01-02,0\n3,a,2024-01-05,7.50\n")
    home = tmp_path / "home"
    result = cli("ingest", orders, "--preset", "orders", home=home)
    assert result.returncode == 0, result.stderr
    assert "zero amount" in result.stdout and "2 of 1 customer " in result.stdout and "run --date 2024-01-05" in result.stdout
    assert cli("run", "--date", "2024-01-05", home=home).returncode == 0
    orders.write_text("order_id,customer_id,order_date,order_amount\n3,a,2024-01-05,99\n")
    refused = cli("ingest", orders, "--preset", "orders", home=home)
    assert refused.returncode == 1 and "--replace" in refused.stderr
    replaced = cli("ingest", orders, "--preset", "orders", "--replace", home=home)
    assert "Stale: 2024-01-05, built from older orders" in replaced.stdout
    assert "backfill --from 2024-01-05 --to 2024-01-05" in replaced.stdout
    assert "Nothing new" in cli("ingest", orders, "--preset", "orders", home=home).stdout
    report = json.loads(cli("ingest", orders, "--preset", "orders", "--json", home=home).stdout)
    assert report["changed"] is False and report["rows"] == 2


def test_orders_of_a_day_that_is_not_over_suggest_no_command_that_cannot_work(tmp_path):
    orders = tmp_path / "today.csv"
    orders.write_text(f"order_id,customer_id,order_date,order_amount\n1,a,{datetime.now(UTC).date()},10.00\n")
    result = cli("ingest", orders, "--preset", "orders", home=tmp_path / "home")
    assert result.returncode == 0 and "come back tomorrow" in result.stdout and "not over yet" in " ".join(result.stdout.split())
    assert "run --date" not in cli("status", home=tmp_path / "home").stdout


def test_the_demo_tells_its_story(tmp_path):
    """Warning, warning, critical; a brief, a chart, three lists; a rehearsed response; and running it again sends nothing new."""
    result = process("demo", "--customers", 2000, "--days", 4, home=tmp_path / "home")
    assert result.returncode == 0, result.stderr
    for word in ("promotion", "WARNING", "CRITICAL", "2026-06-30", "P1", "P2", "P3", "success in mode shadow", "briefing.html"):
        assert word in result.stdout
    pack = tmp_path / "home" / "demo" / "action_packs" / "2026-06-30"
    names = {path.name for path in pack.iterdir()}
    assert names == {
        "briefing_CRITICAL.md", "briefing.html", "briefing.slack.json", "at_risk_trend.png", "returning_customers.png", "manifest.json",
        "ops_run_log.json", "outbox", *(f"audience_{tier}_2026-06-30.csv" for tier in ("P1", "P2", "P3"))}
    again = cli("demo", "--customers", 2000, "--days", 4, home=tmp_path / "home")
    assert again.returncode == 0 and "already answered" in again.stdout


@pytest.mark.skipif(not (DATA / "uci_online_retail.parquet").exists(), reason="real orders (../shared/data) are not here")
def test_the_2010_2011_retail_orders_give_the_known_queue(tmp_path):
    home = tmp_path / "home"
    report = json.loads(cli("ingest", DATA / "uci_online_retail.parquet", "--preset", "uci-online-retail", "--json", home=home).stdout)
    assert (report["rows"], report["customers"]) == (18532, 4338)
    summary = json.loads(cli("run", "--date", "2011-09-30", "--json", home=home).stdout)
    assert summary["counts"] == {"P1": 13, "P2": 235, "P3": 62}


@pytest.mark.parametrize("damage", ["partition", *(pytest.param(one, marks=pytest.mark.slow) for one in (
    "views marker", "customer_days", "manifest of another date", "foreign folders"))])
def test_damage_heals_by_running_the_date_again(copied, damage):
    lake = copied
    before = LAST_DAY - timedelta(1)
    expected = lake.read("alert_logic", LAST_DAY)
    match damage:
        case "views marker":
            (lake.root / ".views.json").write_text("{")
        case "customer_days":
            lake.path("customer_days", lake.orders().version).write_bytes(b"PAR1")
        case "partition":
            for table in ("base_customers", "churn_detection", "alert_logic", "customer_priority"):
                lake.path(table, LAST_DAY).write_bytes(b"PAR1 cut off")
        case "manifest of another date":
            (lake.settings.packs / before.isoformat() / "manifest.json").write_text("{}")
        case _:
            (lake.settings.packs / "2026-06-xx").mkdir()
            (lake.root / "alert_logic" / "day=foo").mkdir()
            (lake.root / "alert_logic" / "day=foo" / "part-0.parquet").touch()
    first = cli("status", home=lake.settings.home)
    assert "Traceback" not in first.stderr
    result = cli("run", "--date", LAST_DAY, home=lake.settings.home)
    assert result.returncode == 0, result.stderr
    assert lake.read("alert_logic", LAST_DAY).equals(expected)


def test_a_database_that_is_none_is_an_error_not_a_traceback(tmp_path, monkeypatch):
    lake = lake_with(small_shop(), tmp_path / "home")
    (lake.settings.home / "ops.sqlite").write_text("not a database " * 100)
    result = cli("status", home=lake.settings.home)
    assert result.returncode == 1 and "ops.sqlite" in result.stderr and "Traceback" not in result.stderr
