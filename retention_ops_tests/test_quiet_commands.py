"""`health` and `digest` as people and scripts call them, and the runbooks that health alerts lead to."""

from __future__ import annotations

import json
import re
import shlex
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
import typer

from retention_ops.cli import app
from retention_ops.execute.health import CAUSES
from retention_ops.execute.wording import HEALTH, health_lines, health_title, slack_health
from retention_ops.log.database import ops_database
from retention_ops_tests.conftest import settings_for
from retention_ops_tests.shops import lake_with, orders_frame
from retention_ops_tests.test_cli import cli

RUNBOOKS = Path(__file__).resolve().parent.parent / "docs" / "runbooks"
YESTERDAY = datetime.now(UTC).date() - timedelta(days=1)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A shop whose data stopped three days ago."""
    monkeypatch.setenv("RETENTION_OPS_METRICS_FILE", "metrics.prom")
    last = YESTERDAY - timedelta(days=3)
    lake = lake_with(orders_frame([("a", last - timedelta(days=9), 100), ("b", last, 100)]), tmp_path / "home")
    with ops_database(lake.settings):
        pass
    return lake.settings.home


def test_health_looks_and_tells_only_when_asked(home):
    looked = cli("health", home=home)
    assert looked.returncode == 1 and "Data is late (data_late)" in looked.stdout and "health --runbook data_late" in looked.stdout
    assert not (home / "outbox").exists() and not (home / "metrics.prom").exists()
    told = cli("health", "--tell", home=home)
    assert told.returncode == 1 and "health post by local: sent" in told.stdout and "digest post by local: sent" in told.stdout
    assert len(list((home / "outbox").rglob("*.json"))) == 2 and "retention_ops_data_age_days 3" in (home / "metrics.prom").read_text()
    again = json.loads(cli("health", "--tell", "--json", home=home).stdout)
    assert again["told"] == [] and not again["well"] and again["causes"][0]["opened_at"]
    facts = json.loads(cli("status", "--json", home=home).stdout)
    assert [row["cause"] for row in facts["health"]] == ["data_late"] and facts["metrics"]["data_age_days"] == 3
    shown = cli("status", home=home)
    assert "Orders are complete through" in shown.stdout


def test_when_all_is_well_it_says_so(tmp_path):
    lake = lake_with(orders_frame([("a", YESTERDAY - timedelta(days=9), 100), ("b", YESTERDAY, 100)]), tmp_path / "home")
    with ops_database(lake.settings):
        pass
    result = cli("health", home=lake.settings.home)
    assert result.returncode == 0 and "Well." in result.stdout and "status" in result.stdout


def test_a_digest_is_previewed_and_not_sent(home):
    result = cli("digest", "--date", YESTERDAY, home=home)
    assert result.returncode == 0 and "Nothing was looked at" in result.stdout and "nothing was sent" in result.stdout
    data = json.loads(cli("digest", "--date", YESTERDAY, "--period", "daily", "--json", home=home).stdout)
    assert data["digest"]["days"] == 1 and data["slack"]["blocks"] and data["markdown"].startswith("# Retention day")
    assert not (home / "outbox").exists()


@pytest.mark.parametrize(("words", "code", "says"), [
    (("digest", "--date", YESTERDAY + timedelta(days=1)), 2, "is not over yet"), (("digest", "--date", "soon"), 2, "is not a date"),
    (("digest", "--period", "yearly"), 2, "weekly"), (("health", "--runbook", "weather"), 2, "--runbook is one of run_failed"),
])
def test_what_cannot_be_meant_is_refused(home, words, code, says):
    result = cli(*words, home=home)
    assert result.returncode == code and says in result.stdout + result.stderr


def test_where_nothing_ever_was_they_say_so(tmp_path):
    for words in ("health", "digest"):
        result = cli(words, home=tmp_path / "mistyped")
        assert result.returncode == 1 and "nothing" in result.stderr


# -- runbooks ------------------------------------------------------------------------------------------------------------


def test_every_cause_has_a_name_and_a_page_that_says_the_four_things():
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == set(CAUSES) == set(HEALTH)
    for path in RUNBOOKS.glob("*.md"):
        text = path.read_text()
        assert re.findall(r"^\*\*(.+?)\*\*", text, flags=re.M) == [
            "What it means.", "How to look.", "How to fix.", "How it closes."], path.name
        assert text.startswith(f"# {HEALTH[path.stem]}\n") and len(text.splitlines()) < 50


@pytest.mark.parametrize("cause", CAUSES)
def test_an_alert_links_its_page_or_names_the_command_that_prints_it(tmp_path, cause):
    row = {"cause": cause, "subject": "", "detail": "something", "opened_at": datetime.now(UTC), "closed_at": None}

    def said(**changes):
        lines = health_lines(row, settings_for(tmp_path, **changes))
        return json.dumps(slack_health(health_title(row), lines)["blocks"])

    linked = said(runbooks_url="https://git.example/docs/runbooks/")
    assert f"What to do: https://git.example/docs/runbooks/{cause}.md" in linked and "--runbook" not in linked
    named = re.search(r"What to do: retention-ops ([a-z_ -]+)", said())[1]
    result = cli(*named.split(), home=tmp_path)
    assert result.returncode == 0 and result.stdout.strip() == (RUNBOOKS / f"{cause}.md").read_text().strip()


def commands() -> list[str]:
    lines = (line for path in sorted(RUNBOOKS.glob("*.md")) for line in path.read_text().splitlines())
    return sorted({line.partition("  #")[0].strip() for line in lines if line.startswith("    retention-ops ")})


def test_every_command_of_a_runbook_exists_with_its_options():
    """Parsed by the command line itself, and not run."""
    whole = typer.main.get_command(app)
    for line in commands():
        group, words = whole, shlex.split(line)[1:]
        context = click.Context(group, info_name="retention-ops")
        while hasattr(group, "commands") and words:
            group = group.commands[words.pop(0)]
        assert group.make_context(line, words, parent=context)
