"""A report as JSON: documented, versioned, for programs.

    {"format": "fxnvtx-report", "version": 2, "unit": "ns", "by": the view, "gpu": was device work recorded,
     "peaks": {"flops": {type of number: per second}, "memory": bytes per second, "source"},
     "sources": [file], "ranks": [title of every process], "notes": [text], "rows": [row]}

A row: name, path (list of names from the outermost range), depth, kind (range, kernel, unknown, outside, summary,
side), category, calls, cpu, cpu_self, cpu_min, cpu_max, gpu, gpu_self, gpu_sum, kernels, copies, copied_bytes,
launches, gap, proj, proj_calls, resident, overlap, payload, queued, launching, waited, communication,
communication_hidden, copying, copying_hidden, allocated, released, peak (null: no allocation), open, share (0 to 1),
each (of single calls: null, or count, low, middle, most (the 99th percentile), high), ranks (title -> ns), skew (null,
or 0 to 1), fused (list of owners), flags ("replayed", "estimate"), flops, moved (bytes), rated and unrated (ns
whose work is known, is not), roof (ns that the work takes at the device's peaks), roof_compute, roofless; made of them,
null where not known: tflops, gbs, roof_share (1: as fast as the device can), bound (compute, memory, launch), headroom
(ns), suspect (above its roof). views.Row and tree.Node define them.
With findings asked for: "findings" (rule, text, ns, evidence as pairs of name and ns) and "unsaid" (rule, why).
A change that takes a field away or changes its meaning raises `version`; new fields do not.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ..printable import json_text
from .findings import findings as all_findings
from .report import Report
from .rows import Row, check_paths
from .selection import Options, Selection, selected

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FORMAT", "VERSION", "document", "render_json", "row_fields"]

FORMAT, VERSION = "fxnvtx-report", 2
_FIELDS = tuple(
    field.name for field in fields(Row) if field.name not in ("above", "distribution", "gpu_each", "shared", "twice")
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
