"""A report as one HTML file that needs nothing else: icicle, steps, table; no request ever leaves the page."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from .labels import Name
from .report import Report
from .tree import Node
from .views import VIEWS, Row

__all__ = ["render_html"]

# in this order: one scope, each builds on the ones before
_SCRIPTS = ("page_model.js", "page_table.js", "page_icicle.js", "page_steps.js", "page_app.js")
_REPLAYED, _ESTIMATE, _OPEN = 1, 2, 4
_COLUMNS = ("calls", "cpu", "cpu_self", "gpu", "gpu_self", "gap")


def render_html(
    report: Report,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    fold: bool = False,
    kernels: bool = False,
    split_fused: bool = False,
) -> str:
    """The page. `kernels`: device operations become boxes of their own under their range."""
    root = report.tree(include, exclude, fold, split_fused)
    views = {
        by: {"rows": [_view_row(row) for row in rows]}
        for by in VIEWS
        if by not in ("tree", "range")
        and (rows := report.rows(by, None, include, exclude, fold, False, split_fused))
        and not (by == "class" and not report.classes)
    }
    data = {
        "version": 1,
        "gpu": report.has_gpu,
        "sources": report.sources,
        "ranks": [part.title for part in report.parts],
        "notes": report.notes,
        "views": views,
        **_columns(root, kernels),
    }
    page = _read("page.html")
    for mark, text in (
        ("__TITLE__", html.escape(", ".join(report.sources))),
        ("__STYLE__", _read("page.css")),
        ("__SCRIPT__", "\n".join(_read(name) for name in _SCRIPTS)),
        # last, so that no range's name is taken for a mark
        ("__DATA__", _embedded(data)),
    ):
        page = page.replace(mark, text, 1)
    return page


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _embedded(data: dict[str, Any]) -> str:
    # "</script" and "<!--" would end or change the script element whatever the string around them
    return json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def _columns(root: Node, kernels: bool) -> dict[str, Any]:
    """The tree as arrays: a parent always stands before its children."""
    names: dict[str, int] = {}
    categories: dict[str, int] = {"": 0}
    tree: dict[str, list[int]] = {field: [] for field in ("parent", "name", "category", "kernels", "flags", *_COLUMNS)}

    def add(parent: int, name: Name, flags: int, kernels_below: int, values: Sequence[int]) -> int:
        tree["parent"].append(parent)
        tree["name"].append(names.setdefault(name.text, len(names)))
        tree["category"].append(categories.setdefault(name.category, len(categories)))
        tree["flags"].append(flags)
        tree["kernels"].append(kernels_below)
        for field, value in zip(_COLUMNS, values, strict=True):
            tree[field].append(value)
        return len(tree["parent"]) - 1

    todo: list[tuple[Node, int]] = [(root, 0)]
    while todo:
        node, parent = todo.pop()
        flags = (
            _REPLAYED * ("replayed" in node.flags) | _ESTIMATE * ("estimate" in node.flags) | _OPEN * bool(node.open)
        )
        below = node.below[1] + node.below[2]
        index = add(parent, node.name, flags, below, [getattr(node, field) for field in _COLUMNS])
        if kernels:
            for name, (count, _duration, credit) in sorted((node.ops or {}).items(), key=lambda item: -item[1][2]):
                add(index, Name(name, "kernel"), 0, count, (count, 0, 0, credit, credit, 0))
        todo.extend((kid, index) for kid in reversed(node.ordered()))
    return {"names": list(names), "categories": list(categories), "tree": tree}


def _view_row(row: Row) -> dict[str, Any]:
    each = row.each
    return {
        "name": row.name,
        "category": row.category,
        "kind": row.kind,
        "calls": row.calls,
        "cpu": row.cpu,
        "cpu_self": row.cpu_self,
        "gpu": row.gpu,
        "gpu_self": row.gpu_self,
        "kernels": row.kernels + row.copies,
        "gap": row.gap,
        "share": round(row.share, 6),
        "low": each.low if each else None,
        "middle": each.middle if each else None,
        "high": each.high if each else None,
        "skew": None if row.skew is None else round(row.skew, 6),
    }
