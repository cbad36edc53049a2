"""What clients see of the server: names, schemas, annotations, instructions, resources, prompts. Every caller depends on it.

RETENTION_OPS_UPDATE_SNAPSHOT=1 (or `make snapshot`) writes the snapshot anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mcp_types import ResourceTemplateReference

from retention_ops.cli import main
from retention_ops.warehouse.catalog import TABLES
from retention_ops_tests.serve.house import DAY

SNAPSHOT = Path(__file__).with_name("contract.json")
# read before any test, because each test starts without our variables
UPDATE = os.environ.get("RETENTION_OPS_UPDATE_SNAPSHOT")
WORDS = ["read_only_hint", "destructive_hint", "idempotent_hint", "open_world_hint"]


async def _contract(client):
    def plain(items):
        return {item.name: item.model_dump(by_alias=True, mode="json", exclude_none=True) for item in items}

    return {
        "instructions": client.instructions, "tools": plain((await client.list_tools()).tools),
        "resources": plain((await client.list_resources()).resources),
        "templates": plain((await client.list_resource_templates()).resource_templates),
        "prompts": plain((await client.list_prompts()).prompts),
    }


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_the_contract_is_the_snapshot(house, mode):
    found = house.session(_contract, mode)
    if UPDATE:
        SNAPSHOT.write_text(json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    assert found == json.loads(SNAPSHOT.read_text()), "a change for every caller; if it is meant, `make snapshot`"


def test_every_tool_has_a_title_a_description_schemas_and_honest_annotations(house):
    async def tools(client):
        return (await client.list_tools()).tools

    changes = {"build_priority_queue": (False, False, True, False), "export_audience": (False, True, True, True),
               "trigger_playbook": (False, True, True, True)}
    for tool in house.session(tools):
        assert tool.title and len(tool.description) > 80 and tool.output_schema["properties"], tool.name
        assert all("description" in schema or "enum" in schema for schema in tool.input_schema["properties"].values()), tool.name
        told = tuple(getattr(tool.annotations, word) for word in WORDS)
        assert told == changes.get(tool.name, (True, False, True, False)), tool.name
    limit = next(tool for tool in house.session(tools) if tool.name == "export_audience").input_schema
    assert "limit" in limit["required"] and limit["properties"]["limit"]["maximum"] == 1000


def test_the_whole_list_costs_few_tokens(house):
    assert len(json.dumps(house.session(_contract)["tools"])) < 30_000


def test_resources_hold_what_the_home_holds(house):
    async def reads(client):
        async def text(uri):
            return (await client.read_resource(f"retention-ops://{uri}")).contents[0].text

        return json.loads(await text("tables")), json.loads(await text("tables/alert_logic")), await text(f"briefs/{DAY}"), \
            json.loads(await text(f"packs/{DAY}"))

    tables, columns, brief, pack = house.session(reads)
    assert set(tables["tables"]) == set(TABLES) and [each["name"] for each in columns["columns"]] == TABLES["alert_logic"].column_names
    folder = house.settings().packs / str(DAY)
    assert brief == (folder / "briefing_CRITICAL.md").read_text()
    assert pack["audience_sha256"] == json.loads((folder / "manifest.json").read_text())["audience_sha256"]


def test_prompts_name_the_date_and_the_tools(house):
    async def prompts(client):
        return [(await client.get_prompt(name, arguments)).messages[0].content.text for name, arguments in (
            ("morning_check", {}), ("incident_review", {"date": str(DAY)}))]

    morning, review = house.session(prompts)
    assert f"morning check for {DAY}" in morning and "get_alert_decision" in morning and "unless I say so" in morning
    assert f"incident of {DAY}" in review and "compare_dates from 2024-03-23 to 2024-03-30" in review


def test_dates_and_tables_are_completed(house):
    async def completes(client):
        brief, table = (ResourceTemplateReference(uri=f"retention-ops://{path}") for path in ("briefs/{date}", "tables/{table}"))
        dates = await client.complete(brief, {"name": "date", "value": "2024-03-2"})
        tables = await client.complete(table, {"name": "table", "value": "c"})
        return dates.completion.values, tables.completion.values

    dates, tables = house.session(completes)
    assert dates[0] == "2024-03-29" and len(dates) == 10 and "churn_detection" in tables and "orders" not in tables


@pytest.mark.parametrize(("words", "code", "said"), [
    (["mcp", "--http", "8765"], 1, "RETENTION_OPS_MCP_TOKENS"),
    (["mcp", "--http", "8765", "--no-auth", "--host", "0.0.0.0"], 2, "loopback only"),
    (["mcp", "--http", "8765", "--host", "0.0.0.0"], 2, "--allow-host NAME"),
    (["mcp", "--host", "0.0.0.0"], 2, "belong to --http"),
    (["mcp", "--toolsets", "write"], 2, "read, actions or read,actions"),
])
def test_the_command_refuses_what_would_be_unsafe(house, monkeypatch, capsys, words, code, said):
    monkeypatch.setattr(sys, "argv", ["retention-ops", "--home", str(house.home), *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code and said in capsys.readouterr().err


def test_a_warehouse_it_cannot_read_is_said(house, monkeypatch, capsys):
    address = {"WAREHOUSE": "bigquery", "BIGQUERY_PROJECT": "p", "BIGQUERY_DATASET": "d", "BIGQUERY_LOCATION": "EU"}
    for name, value in address.items():
        monkeypatch.setenv(f"RETENTION_OPS_{name}", value)
    monkeypatch.setattr(sys, "argv", ["retention-ops", "--home", str(house.home), "mcp"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and "reads the lake" in capsys.readouterr().err


def test_importing_the_server_does_not_import_dagster():
    code = "import sys, retention_ops.serve.server, retention_ops.serve.http; sys.exit('dagster' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
