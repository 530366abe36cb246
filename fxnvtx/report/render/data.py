"""A report's data: as JSON, documented and versioned; as CSV (RFC 4180), one line per row, times in nanoseconds, paths
joined by "/"; and in a page of one HTML file that needs nothing else (icicle, steps, table; no request ever leaves it).

    {"format": "fxnvtx-report", "version": 2, "unit": "ns", "by": the view, "gpu": was device work recorded,
     "peaks": {"flops": {type of number: per second}, "memory": bytes per second, "source"},
     "sources": [file], "ranks": [title of every process], "notes": [text], "rows": [row]}

A row of JSON: name, path (list of names from the outermost range), depth, kind (range, kernel, unknown, outside,
summary, side), category, calls, cpu, cpu_self, cpu_min, cpu_max, gpu, gpu_self, gpu_sum, kernels, copies, copied_bytes,
launches, gap, proj, proj_calls, resident, overlap, payload, queued, launching, waited, communication,
communication_hidden, copying, copying_hidden, allocated, released, peak (null: no allocation), open, share (0 to 1),
each (of single calls: null, or count, low, middle, most (the 99th percentile), high), ranks (title -> ns), skew (null,
or 0 to 1), fused (list of owners), flags ("replayed", "estimate"), flops, moved (bytes), rated and unrated (ns whose
work is known, is not), roof (ns that the work takes at the device's peaks), roof_compute, roofless; made of them, null
where not known: tflops, gbs, roof_share (1: as fast as the device can), bound (compute, memory, launch), headroom (ns),
suspect (above its roof). rows.Row and tree.Node define them.
With findings asked for: "findings" (rule, text, ns, evidence as pairs of name and ns) and "unsaid" (rule, why).
A change that takes a field away or changes its meaning raises `version`; new fields do not.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib.resources import files
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ...output import csv_cell, json_text
from ..findings import findings as all_findings
from ..labels import Name, role_of
from ..report import Report
from ..rows import Row, check_paths
from ..selection import VIEWS, Options, Selection, selected
from ..tree import BELOW, Node
from ..views import row_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "COLUMNS",
    "FORMAT",
    "VERSION",
    "document",
    "filled",
    "render_csv",
    "render_html",
    "render_json",
    "row_fields",
]


# ----------------------------------------------------------------------------------------------------------------- CSV


COLUMNS = (
    "path",
    "name",
    "depth",
    "kind",
    "category",
    "calls",
    "cpu_ns",
    "cpu_self_ns",
    "gpu_ns",
    "gpu_self_ns",
    "gpu_sum_ns",
    "kernels",
    "copies",
    "copied_bytes",
    "gap_ns",
    "proj_ns",
    "resident_ns",
    "overlap_ns",
    "queued_ns",
    "launching_ns",
    "waited_ns",
    "communication_ns",
    "communication_hidden_ns",
    "copying_ns",
    "copying_hidden_ns",
    "allocated_bytes",
    "released_bytes",
    "peak_bytes",
    "share",
    "each_min_ns",
    "each_median_ns",
    "each_p99_ns",
    "each_max_ns",
    "skew",
    "fused",
    "flags",
    "flops",
    "moved_bytes",
    "rated_ns",
    "unrated_ns",
    "roof_ns",
    "tflops",
    "gbs",
    "roof_share",
    "bound",
    "headroom_ns",
    "suspect",
)


def render_csv(
    report: Report,
    by: str | Selection = "tree",
    depth: int | None = None,
    **options: Unpack[Options],
) -> str:
    """by, depth, options: as `Report.rows` has them; or all of it as a Selection."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    chosen = selected(by, depth, options)
    rows = report.select(chosen)
    check_paths(rows)
    for row in rows:
        writer.writerow(_line(row))
    return out.getvalue()


def _line(row: Row) -> list[object]:
    each = row.each
    return [
        csv_cell("/".join(row.path)),
        csv_cell(row.name),
        row.depth,
        row.kind,
        csv_cell(row.category),
        row.calls,
        row.cpu,
        row.cpu_self,
        row.gpu,
        row.gpu_self,
        row.gpu_sum,
        row.kernels,
        row.copies,
        row.copied_bytes,
        row.gap,
        row.proj,
        row.resident,
        row.overlap,
        row.queued,
        row.launching,
        row.waited,
        row.communication,
        row.communication_hidden,
        row.copying,
        row.copying_hidden,
        row.allocated,
        row.released,
        "" if row.peak is None else row.peak,
        f"{row.share:.6f}",
        each.low if each else "",
        each.middle if each else "",
        each.most if each else "",
        each.high if each else "",
        f"{row.skew:.6f}" if row.skew is not None else "",
        csv_cell("; ".join(row.fused)),
        "; ".join(row.flags),
        row.flops,
        row.moved,
        row.rated,
        row.unrated,
        row.roof,
        *("" if value is None else f"{value:.6g}" for value in (row.tflops, row.gbs, row.roof_share)),
        row.bound or "",
        "" if row.headroom is None else row.headroom,
        int(row.suspect),
    ]


# ---------------------------------------------------------------------------------------------------------------- JSON


FORMAT, VERSION = "fxnvtx-report", 2
_FIELDS = tuple(
    field.name
    for field in fields(Row)
    if field.name not in ("above", "distribution", "gpu_each", "shared", "twice", "part", "weight")
)

_DERIVED = ("tflops", "gbs", "roof_share", "bound", "headroom", "suspect")


_values = attrgetter(*_FIELDS)


def row_fields(row: Row) -> dict[str, Any]:
    found = dict(zip(_FIELDS, _values(row), strict=True))
    each = row.each
    found.update({name: getattr(row, name) for name in _DERIVED})
    return {**found, "path": list(row.path), "each": None if each is None else vars(each), "skew": row.skew}


def document(report: Report, by: str) -> dict[str, Any]:
    """All but the rows."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "unit": "ns",
        "by": by,
        "gpu": report.has_gpu,
        "peaks": asdict(report.peaks),
        "sources": report.sources,
        "ranks": [part.title for part in report.parts],
        "notes": report.notes,
    }


def render_json(
    report: Report,
    by: str | Selection = "tree",
    depth: int | None = None,
    *,
    findings: bool = False,
    **options: Unpack[Options],
) -> str:
    """by, depth, options: as `Report.rows` has them; or all of it as a Selection."""
    chosen = selected(by, depth, options)
    rows = report.select(chosen)
    check_paths(rows)
    whole = document(report, chosen.by)
    if findings:
        found, silent = all_findings(report)
        whole["findings"] = [asdict(finding) for finding in found]
        whole["unsaid"] = [asdict(silence) for silence in silent]
    head = json_text(whole, indent=1).removesuffix("\n}")
    # one line per row: Python's encoder is several times slower where it indents
    lines = ",\n".join(json_text(row_fields(row)) for row in rows)
    return f'{head},\n "rows": [\n{lines}\n ]\n}}\n'


# ---------------------------------------------------------------------------------------------------------------------


# in this order: one scope, each builds on the ones before
_SCRIPTS = ("pure.js", "model.js", "table.js", "icicle.js", "steps.js", "timeline.js", "app.js")
_REPLAYED, _ESTIMATE, _OPEN = 1, 2, 4
_WORK = ("flops", "moved", "roof", "bound", "headroom")
_COLUMNS = ("calls", "cpu", "cpu_self", "gpu", "gpu_self", "gap")
# what most captures have nothing of: left out of the page where all is zero
_RARE = (
    "resident",
    "overlap",
    "payload",
    "communication",
    "communication_hidden",
    "waited",
    "queued",
    "launches",
    "peak",
)


def render_html(report: Report, chosen: Selection | None = None, **options: Unpack[Options]) -> str:
    """The page. chosen, or options as `Report.rows` has them: what is in it; the page sorts, and has all views.
    `kernels`: device operations become boxes of their own under their range."""
    chosen = chosen or selected("tree", None, options)
    root = report.tree(chosen.include, chosen.exclude, chosen.fold, chosen.split_fused)
    every = replace(chosen, depth=None, kernels=False, sort=None)
    views = {
        by: {"rows": [_view_row(row, report.classes) for row in rows]}
        for by in VIEWS
        if by not in ("tree", "range")
        and (rows := report.select(replace(every, by=by)))
        and not (by == "class" and not report.classes)
    }
    found, silent = all_findings(report)
    data = {
        "version": 2,
        "gpu": report.has_gpu,
        "sources": report.sources,
        "ranks": [part.title for part in report.parts],
        "notes": report.notes,
        "views": views,
        "findings": [asdict(finding) for finding in found],
        "unsaid": [asdict(silence) for silence in silent],
        "timeline": _timeline(report),
        "classes": report.classes,
        "work": report.has_work,
        **_columns(root, chosen.kernels, report.classes),
    }
    return filled("report.html", report.sources, _SCRIPTS, data)


def filled(name: str, sources: Sequence[str], scripts: Sequence[str], data: dict[str, Any]) -> str:
    page = _read(name)
    for mark, text in (
        ("__TITLE__", html.escape(", ".join(sources))),
        ("__STYLE__", _read("style.css")),
        ("__SCRIPT__", "\n".join(map(_read, scripts))),
        # last, so that no range's name is taken for a mark
        ("__DATA__", _embedded(data)),
    ):
        page = page.replace(mark, text, 1)
    return page


def _read(name: str) -> str:
    return files("fxnvtx.report").joinpath("page", name).read_text(encoding="utf-8")


def _embedded(data: dict[str, Any]) -> str:
    # "</script" and "<!--" would end or change the script element whatever the string around them
    return json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def _timeline(report: Report) -> dict[str, Any] | None:
    """One step of the first process that has one, by lanes: its threads, then its streams."""
    found = next((part.timeline for part in report.parts if part.timeline is not None), None)
    if found is None:
        return None
    names: dict[str, int] = {}
    lanes: dict[tuple[int, int, int], int] = {}
    boxes: list[list[int | str]] = []
    for thread, level, start, end, name in found.spans:
        lane = lanes.setdefault((0, thread, 0), len(lanes))
        role = role_of(name, report.classes.get(name.text, ""))
        boxes.append([lane, level, start, end, names.setdefault(name.text, len(names)), role])
    for device, stream, start, end, text in found.work:
        lane = lanes.setdefault((1, device, stream), len(lanes))
        boxes.append([lane, 0, start, end, names.setdefault(text, len(names)), "kernel"])
    # a thread's number as its process knows it
    titles = [f"thread {one & 0xFFFFFF}" if not kind else f"GPU {one}, stream {two}" for kind, one, two in lanes]
    return {
        "title": found.title, "length": found.length, "cut": found.cut, "lanes": titles, "names": list(names),
        "boxes": boxes,
    }  # fmt: skip


def _columns(root: Node, kernels: bool, classes: Mapping[str, str]) -> dict[str, Any]:
    """The tree as arrays: a parent always stands before its children."""
    names: dict[str, int] = {}
    categories: dict[str, int] = {"": 0}
    roles: dict[str, int] = {"": 0}
    rare: dict[str, list[int | None]] = {field: [] for field in _RARE}
    fields = ("parent", "name", "category", "role", "kernels", "flags", *_COLUMNS)
    tree: dict[str, list[int]] = {field: [] for field in fields}

    def add(parent: int, name: Name, flags: int, kernels_below: int, values: Sequence[int]) -> int:
        tree["parent"].append(parent)
        tree["name"].append(names.setdefault(name.text, len(names)))
        tree["category"].append(categories.setdefault(name.category, len(categories)))
        role = role_of(name, classes.get(name.text, "")) if name.text else ""
        tree["role"].append(roles.setdefault(role, len(roles)))
        tree["flags"].append(flags)
        tree["kernels"].append(kernels_below)
        for field, value in zip(_COLUMNS, values, strict=True):
            tree[field].append(value)
        return len(tree["parent"]) - 1

    work: list[dict[str, Any]] = []
    todo: list[tuple[Node, int]] = [(root, 0)]
    while todo:
        node, parent = todo.pop()
        flags = (
            _REPLAYED * ("replayed" in node.flags) | _ESTIMATE * ("estimate" in node.flags) | _OPEN * bool(node.open)
        )
        below = node.below[1] + node.below[2]
        index = add(parent, node.name, flags, below, [getattr(node, field) for field in _COLUMNS])
        for field in _RARE:
            rare[field].append(node.of(field) if field in BELOW else getattr(node, field))
        work.append(_work_of(row_of(node, 0, None)))
        if kernels:
            for name, (count, _duration, credit) in sorted((node.ops or {}).items(), key=lambda item: -item[1][2]):
                add(index, Name(name, "kernel"), 0, count, (count, 0, 0, credit, credit, 0))
                for values in rare.values():
                    values.append(0)
                work.append({})
        todo.extend((child, index) for child in reversed(node.ordered()))
    if any(work):
        rare |= {field: [of.get(field) for of in work] for field in _WORK}
    some = {field: values for field, values in rare.items() if any(values)}
    return {"names": list(names), "categories": list(categories), "roles": list(roles), "tree": {**tree, **some}}


def _work_of(row: Row) -> dict[str, Any]:
    if not row.measured:
        return {}
    share = row.roof_share
    return {
        "flops": row.flops,
        "moved": row.moved,
        "roof": None if share is None else round(share, 4),
        "bound": row.bound,
        "headroom": row.headroom,
    }


def _view_row(row: Row, classes: Mapping[str, str]) -> dict[str, Any]:
    each = row.each
    return {
        **_work_of(row),
        "name": row.name,
        "role": role_of(Name(row.name, row.category), classes.get(row.name, "")) if row.kind == "range" else row.kind,
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
        "most": each.most if each and each.count > 9 else None,
        "high": each.high if each else None,
        "resident": row.resident,
        "overlap": row.overlap,
        "payload": row.payload,
        "communication": row.communication,
        "communication_hidden": row.communication_hidden,
        "waited": row.waited,
        "queued": row.queued,
        "launches": row.launches,
        "peak": row.peak,
        "skew": None if row.skew is None else round(row.skew, 6),
    }
