"""What texts and SQLite files say of a person is found where an id stands, and nothing else is touched."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from retention_ops.log.traces import GONE, Traces, files_with, scrub_files

MARKDOWN = "## First\n\n| Customer | Tier |\n|:--|:--|\n| C002392 | P1 |\n| C004585 | P1 |\n\nNo order for 31 days\n"
SLACK = {"blocks": [{"type": "section", "text": {"text": "*Two*\n1. `C002392` P1, EUR 4,711\n2. `C004585` P1"}}], "text": "P1 69"}
HTML = ("<html><table><tr><td><table><tr><td><code>C002392</code> late</td></tr>"
        "<tr><td><code>C004585</code></td></tr></table></td></tr></table>")


def test_a_line_goes_and_its_neighbours_stay():
    traces = Traces(["C002392"])
    assert traces.without(MARKDOWN) == MARKDOWN.replace("| C002392 | P1 |", f"| {GONE} | |")
    assert traces.without_value(SLACK)["blocks"][0]["text"]["text"] == f"*Two*\n1. {GONE}\n2. `C004585` P1"
    page = traces.without(HTML)
    assert "C002392" not in page and "late" not in page and "C004585" in page and page.count(GONE) == 1


@pytest.mark.parametrize("text", ["31 days", "EUR 31", "17381 customers", "| 5 | 31 |", "2026-01-31", "C0023921", "xC002392"])
def test_a_number_is_no_customer(text):
    assert Traces(["31", "17381", "C002392"]).without(text) == text


@pytest.mark.parametrize(("name", "text"), [
    ("31", "1. `31` P1, EUR 5 so far"), ("31", "| 31 | P1 | late |"), ("17381", "explain_customer('17381')"),
    ("a&b", "<code>a&amp;b</code>"), ("h_0123456789abcdef", r"| h\_0123456789abcdef | P2 |"), ("anna@example.com", "to anna@example.com."),
    ("x" * 100 + "1", "`" + "x" * 63 + "…`"), ('say "1"', '{"id": "say \\"1\\""}'),
])
def test_an_id_is_found_as_a_text_has_it(name, text):
    traces = Traces([name])
    assert traces.in_text(text) and not traces.in_text(traces.replaced(text))


def test_values_are_compared_whole():
    traces = Traces(["31"])
    assert traces.in_detail('{"arguments": {"customer_id": "31", "date": "2026-01-31"}}')
    assert traces.without_detail('{"customer_id": "31", "days": 31}') == f'{{"customer_id": "{GONE}", "days": 31}}'
    assert not traces.in_detail("run of 31 days")


def test_a_database_forgets_also_in_its_free_pages_and_its_journal(tmp_path):
    name, path = "C002392", tmp_path / "events.db"
    keeper = sqlite3.connect(path)
    keeper.execute("PRAGMA journal_mode = WAL")
    keeper.execute("CREATE TABLE logs (id INTEGER PRIMARY KEY, event TEXT, number INTEGER)")
    keeper.executemany("INSERT INTO logs (event, number) VALUES (?, 1)", [(f'{{"message": "no such customer {name}"}}',)] * 200)
    keeper.execute("DELETE FROM logs WHERE id > 100")
    keeper.commit()
    (tmp_path / "run.err").write_text(f"kept\n{name} said a library\n")
    traces = Traces([name])
    assert {each.name.partition("-")[0] for each in files_with(tmp_path, traces)} == {"events.db", "run.err"}
    keeper.close()
    scrub_files(tmp_path, traces)
    assert files_with(tmp_path, traces) == []
    assert (tmp_path / "run.err").read_text() == f"kept\n{GONE} said a library\n"
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT COUNT(*), min(event) FROM logs").fetchone() == (100, f'{{"message": "no such customer {GONE}"}}')
