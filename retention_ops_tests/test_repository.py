"""What a newcomer finds in the checkout is in step with the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from retention_ops.settings import Settings, env_example, load_settings
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.render import FAST_FILES, FILES, fast_query, query

ROOT = Path(__file__).resolve().parent.parent


def test_env_example_lists_every_setting_with_its_default():
    assert (ROOT / ".env.example").read_text() == env_example()


def test_every_setting_says_what_it_is():
    assert [name for name, field in Settings.model_fields.items() if not field.description and name not in ("home",)] == []


def test_constraints_pin_every_dependency_and_name_no_index():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^\s;@]+", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", item).group()).lower() for item in wanted}
    assert names - pinned == set()


def test_the_instance_file_at_the_top_is_the_packaged_one():
    assert (ROOT / "dagster.yaml").read_text() == (ROOT / "retention_ops" / "dagster.yaml").read_text()


def test_every_rule_uses_only_parameters_that_exist():
    known = {*load_settings().rule_parameters(), "reference_date", "from_date", "to_date", "complete_through"}
    for rule in [*(query(table) for table in FILES), *(fast_query(table) for table in FAST_FILES)]:
        assert rule.parameters <= known, rule.table
    used = set().union(*(query(table).parameters for table in FILES))
    assert set(load_settings().rule_parameters()) - used == set(), "a threshold that no rule reads is a lie"


def test_every_table_has_a_rule_or_is_an_input_or_the_log():
    assert set(TABLES) - set(FILES) == {
        "orders", "refunds", "customers", "suppressions", "audience_current", "ops_runs_log"}


def test_plain_modules_do_not_import_dagster():
    """assets.py, the code location and what starts runs may; rules, packs, log and ingestion stay free of it."""
    allowed = {"definitions.py", "orchestration.py", "launch.py", "assets.py", "job.py", "sensors.py", "dagster_events.py"}
    for path in (ROOT / "retention_ops").rglob("*.py"):
        if path.name not in allowed:
            assert not re.search(r"^\s*(import dagster|from dagster)", path.read_text(), flags=re.M), path


def test_only_destinations_import_what_talks_to_the_outside():
    """One door: a path that passes by it is a path without ledger, kill switch and guardrails."""
    clients = r"^\s*(?:import|from)\s+(slack_sdk|gspread|requests|smtplib|urllib\.request|http\.client|httpx2?|socket|google)\b"
    for path in (ROOT / "retention_ops").rglob("*.py"):
        found = set(re.findall(clients, path.read_text(), flags=re.M))
        if path.parent.name == "destinations":
            continue
        # the brief checks its blocks with the SDK's models; commands and claims need the machine's name or a free port, no connection;
        # the warehouse's own dataset is storage, like the lake's folder: nothing leaves for a person by it
        allowed = {"brief.py": {"slack_sdk"}, "cli.py": {"socket"}, "orchestration.py": {"socket"}, "door.py": {"socket"},
                   "demo.py": {"socket"}, "bigquery.py": {"google"}, "bigquery_jobs.py": {"google", "requests"}}
        assert found <= allowed.get(path.name, set()), path


def test_only_the_door_calls_a_destination():
    for path in (ROOT / "retention_ops").rglob("*.py"):
        if path.parent.name != "destinations" and path.name != "door.py":
            assert not re.search(r"destination\w*\.(send|update|find_by_key)\(", path.read_text()), path


def test_a_plain_command_does_not_pay_for_dagster():
    code = "import sys, retention_ops.cli, retention_ops.detect.explain; sys.exit('dagster' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_example_pack_is_whole():
    import hashlib

    folder = ROOT / "docs" / "example_pack"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"], name


def test_relative_links_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert targets
    assert [target for target in targets if not target.startswith("http") and not (ROOT / target).exists()] == []


@pytest.mark.slow
def test_a_plain_install_from_the_wheel_has_rules_templates_and_instance_file(tmp_path):
    """Not editable, no checkout: the wheel alone must run."""
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)], check=True)
    wheel = next(tmp_path.glob("*.whl"))
    target = tmp_path / "installed"
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)], check=True)
    code = (
        f"import sys; sys.path = [p for p in sys.path if p != {str(ROOT)!r}]; sys.path.insert(0, {str(target)!r})\n"
        "import retention_ops; assert retention_ops.__file__.startswith(sys.path[0]), retention_ops.__file__\n"
        "sys.argv = ['retention-ops', '--home', 'home', 'demo', '--customers', '2000', '--days', '2']\n"
        "from retention_ops.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "CRITICAL" in result.stdout
