"""Markdown to Jira's document format: what the brief uses arrives as such, whatever else comes is still a document Jira takes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_ops.execute.destinations import adf
from retention_ops.execute.destinations.adf import document, plain
from retention_ops_tests.execute.servers.jira import unfit


def text(words: str, *marks: str, href: str = "") -> dict[str, Any]:
    given = [{"type": mark} for mark in marks] + ([{"type": "link", "attrs": {"href": href}}] if href else [])
    return {"type": "text", "text": words, **({"marks": given} if given else {})}


def block(kind: str, *content: dict[str, Any], **attrs: Any) -> dict[str, Any]:
    return {"type": kind, **({"attrs": attrs} if attrs else {}), "content": list(content)}


CASES = {
    "# KPI": [block("heading", text("KPI"), level=1)],
    "a **b** *c* `d` ~~e~~": [block(
        "paragraph", text("a "), text("b", "strong"), text(" "), text("c", "em"), text(" "), text("d", "code"), text(" "),
        text("e", "strike"),
    )],
    "one\ntwo": [block("paragraph", text("one two"))],
    "[pack](https://p.test/1)": [block("paragraph", text("pack", href="https://p.test/1"))],
    "**[`x`](https://p.test)**": [block("paragraph", text("x", "code", href="https://p.test"))],
    "[x](ftp://p.test)": [block("paragraph", text("x"))],
    "<b>x</b> \\*y": [block("paragraph", text("<b>x</b> *y"))],
    "- a\n- b\n  1. c": [block(
        "bulletList", block("listItem", block("paragraph", text("a"))),
        block("listItem", block("paragraph", text("b")), block("orderedList", block("listItem", block("paragraph", text("c"))))),
    )],
    "- - a": [block("bulletList", block(
        "listItem", block("paragraph"), block("bulletList", block("listItem", block("paragraph", text("a")))),
    ))],
    "> # q": [block("blockquote", block("paragraph", text("q")))],
    "```sql\nselect 1\n```": [block("codeBlock", text("select 1"), language="sql")],
    "---": [{"type": "rule"}],
}


@pytest.mark.parametrize("markdown", CASES)
def test_markdown_becomes_the_nodes_it_means(markdown: str) -> None:
    assert document(markdown)["content"] == CASES[markdown]
    assert unfit(document(markdown)) == ""


def test_a_table_keeps_its_head_and_cells() -> None:
    (table,) = document("| tier | n |\n|---|--:|\n| **P1** | 40 |\n")["content"]
    head, row = table["content"]
    assert [cell["type"] for cell in head["content"]] == ["tableHeader", "tableHeader"]
    assert [plain(cell).strip() for cell in row["content"]] == ["P1", "40"]
    assert unfit(document("| a |\n|---|\n|  |\n")) == ""


def test_the_shipped_example_brief_fits_whole() -> None:
    brief = Path(__file__).parents[2] / "docs" / "example_pack" / "briefing_CRITICAL.md"
    converted = document(brief.read_text())
    assert unfit(converted) == "" and "cut here" not in plain(converted)
    assert {"heading", "paragraph"} <= {node["type"] for node in converted["content"]}
    assert "**" not in plain(converted)


def test_what_is_too_long_is_cut_between_blocks_and_says_so() -> None:
    start = time.monotonic()
    cut = document("A paragraph with *words*.\n\n" * 10_000, closing="ref retops-0123456789abcdef")
    assert time.monotonic() - start < 10
    assert unfit(cut) == ""
    assert "cut here" in plain(cut["content"][-2]) and "retops-0123456789abcdef" in plain(cut["content"][-1])
    assert len(str(cut)) > 30_000


@pytest.mark.parametrize("huge", ["x" * 100_000, "😀" * 40_000, "| a |\n|---|\n" + "| cell |\n" * 5_000])
def test_one_block_that_is_too_long_is_cut_inside(huge: str) -> None:
    cut = document(huge, closing="the end")
    assert unfit(cut) == "" and len(plain(cut)) > 2_000


def test_markdown_that_cannot_be_converted_becomes_a_code_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adf, "_tree", lambda markdown: 1 / 0)
    assert document("# x")["content"] == [block("codeBlock", text("# x"))]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(
    st.text(max_size=30),
    st.sampled_from([
        "# ", "- ", "1. ", "> ", "```", "|", "|---|", "\n", "\n\n", "    ", "**", "*", "`", "![i](x)", "[l](https://a)", "\\", "<b>", "~~",
    ]),
), max_size=25).map("".join))
def test_every_text_becomes_a_document_jira_takes(markdown: str) -> None:
    assert unfit(document(markdown, closing="ref")) == ""
