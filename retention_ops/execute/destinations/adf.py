"""Markdown to the Atlassian Document Format, in which Jira Cloud takes descriptions and comments.

Only nodes and marks that Jira's own documentation lists are produced. Markdown that cannot be converted becomes a code block:
a ticket with plain text is better than none.
"""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any

Node = dict[str, Any]
LIMIT = 32_767
"""Jira's limit for a text field. It does not say what it counts, so the whole document's JSON is held below it."""
MARKS = {"strong": "strong", "em": "em", "s": "strike"}
LINKS = ("http://", "https://", "mailto:")


def document(markdown: str, closing: str = "", limit: int = LIMIT) -> Node:
    """An ADF document of at most `limit` characters of JSON; `closing` is its last paragraph even when blocks before are cut."""
    try:
        blocks = _blocks(_tree(markdown))
    except Exception:  # markdown-it-py is not ours and the text is not either
        blocks = _code_block(markdown)
    last = [_paragraph([_text(closing)])] if closing else []
    if _size(blocks + last) <= limit:
        return _doc((blocks + last) or [_paragraph([])])
    last = [_paragraph([_text("… cut here; the full text is in the pack.", ["em"])]), *last]
    room = limit - _size(last)
    kept = _first(blocks, room)
    if not kept and blocks:
        kept = _first(_code_block(markdown[: room // 12 - 10]), room)  # one character may be twelve of JSON: \ud83d\ude00
    return _doc(kept + last)


def plain(node: Node) -> str:
    """The words of a document, for finding a mark in it."""
    return "".join([node.get("text", ""), *(plain(child) for child in node.get("content", []))]) + "\n" * (node.get("type") != "text")


def _tree(markdown: str) -> Any:
    from markdown_it import MarkdownIt
    from markdown_it.tree import SyntaxTreeNode

    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    return SyntaxTreeNode(parser.parse(markdown))


def _blocks(parent: Any) -> list[Node]:
    return [block for child in parent.children for block in _block(child)]


def _block(node: Any) -> list[Node]:
    match node.type:
        case "paragraph":
            return [_paragraph(_inline(node))]
        case "heading":
            return [{"type": "heading", "attrs": {"level": int(node.tag[1])}, "content": _inline(node)}]
        case "bullet_list":
            return [{"type": "bulletList", "content": [_item(item) for item in node.children]}]
        case "ordered_list":
            start = {"attrs": {"order": int(node.attrs["start"])}} if "start" in node.attrs else {}
            return [{"type": "orderedList", **start, "content": [_item(item) for item in node.children]}]
        case "blockquote":
            return [{"type": "blockquote", "content": _only(_blocks(node), ("paragraph", "bulletList", "orderedList", "codeBlock"))}]
        case "fence" | "code_block":
            return _code_block(node.content, node.info.split()[0] if node.type == "fence" and node.info.strip() else "")
        case "hr":
            return [{"type": "rule"}]
        case "table":
            return [{"type": "table", "content": [_row(row) for part in node.children for row in part.children]}]
        case _:
            raise ValueError(f"no ADF for {node.type}")


def _item(node: Any) -> Node:
    content = _only(_blocks(node), ("paragraph", "bulletList", "orderedList", "codeBlock"))
    if content[0]["type"] in ("bulletList", "orderedList"):
        content.insert(0, _paragraph([]))  # a list item may not begin with a list
    return {"type": "listItem", "content": content}


def _row(node: Any) -> Node:
    return {"type": "tableRow", "content": [
        {"type": "tableHeader" if cell.type == "th" else "tableCell", "attrs": {}, "content": [_paragraph(_inline(cell))]}
        for cell in node.children
    ]}


def _only(blocks: list[Node], allowed: tuple[str, ...]) -> list[Node]:
    """What may not stand inside a list or quotation is reduced to its paragraphs."""
    kept: list[Node] = []
    for block in blocks:
        if block["type"] in allowed:
            kept.append(block)
        elif block["type"] == "heading":
            kept.append(_paragraph(block["content"]))
        elif text := plain(block).strip():
            kept.append(_paragraph([_text(text)]))
    return kept or [_paragraph([])]


def _inline(node: Any) -> list[Node]:
    """The words of a block. Neighbours with the same marks are joined, empty text (which ADF forbids) is left out."""
    words: list[Node] = []
    for child in node.children:
        _words(child, [], words)
    return words


def _words(node: Any, marks: list[Any], out: list[Node]) -> None:
    match node.type:
        case "inline" | "strong" | "em" | "s" | "link":
            for child in node.children:
                _words(child, marks + _mark(node), out)
        case "text" | "text_special":
            _append(out, _text(node.content, marks))
        case "code_inline":
            # ADF lets code stand only with a link
            _append(out, _text(node.content, ["code", *(mark for mark in marks if isinstance(mark, dict))]))
        case "softbreak":
            _append(out, _text(" ", marks))
        case "hardbreak":
            out.append({"type": "hardBreak"})
        case "image":
            _append(out, _text(node.content or "image", [*marks, *_link(node.attrs.get("src"))]))
        case _:
            raise ValueError(f"no ADF for {node.type}")


def _mark(node: Any) -> list[Any]:
    if node.type == "link":
        return _link(node.attrs.get("href"))
    return [MARKS[node.type]] if node.type in MARKS else []


def _link(address: Any) -> list[Any]:
    return [{"type": "link", "attrs": {"href": address}}] if str(address).lower().startswith(LINKS) else []


def _append(words: list[Node], word: Node) -> None:
    if not word["text"]:
        return
    if words and words[-1].get("marks") == word.get("marks") and words[-1]["type"] == "text":
        words[-1]["text"] += word["text"]
    else:
        words.append(word)


def _text(text: str, marks: list[Any] | None = None) -> Node:
    unique: dict[str, Node] = {}
    for mark in marks or []:
        node = mark if isinstance(mark, dict) else {"type": mark}
        unique[node["type"]] = node
    return {"type": "text", "text": text, **({"marks": list(unique.values())} if unique else {})}


def _paragraph(content: list[Node]) -> Node:
    return {"type": "paragraph", "content": content}


def _code_block(text: str, language: str = "") -> list[Node]:
    return [{
        "type": "codeBlock",
        **({"attrs": {"language": language}} if language else {}),
        "content": [_text(text.rstrip("\n"))] if text.strip() else [],
    }]


def _doc(blocks: list[Node]) -> Node:
    return {"type": "doc", "version": 1, "content": blocks}


def _first(blocks: list[Node], room: int) -> list[Node]:
    """As many whole blocks from the start as fit into `room` characters of JSON."""
    sizes = accumulate(len(json.dumps(block)) + 2 for block in blocks)
    return [block for block, size in zip(blocks, sizes, strict=True) if size <= room]


def _size(blocks: list[Node]) -> int:
    return len(json.dumps(_doc(blocks)))
