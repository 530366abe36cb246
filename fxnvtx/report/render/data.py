"""A report for programs: as JSON, documented and versioned, and as CSV (RFC 4180): one line per row, times in
nanoseconds, paths joined by "/".

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
import io
from typing import TYPE_CHECKING

from ...output import csv_cell
from ..report import Report
from ..rows import Row, check_paths
from ..selection import Options, Selection, selected

if TYPE_CHECKING:
    from typing_extensions import Unpack
from dataclasses import asdict, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ...output import json_text
from ..findings import findings as all_findings

__all__ = ["COLUMNS", "FORMAT", "VERSION", "document", "render_csv", "render_json", "row_fields"]


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
