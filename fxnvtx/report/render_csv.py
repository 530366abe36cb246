"""A report as CSV (RFC 4180): one line per row, times in nanoseconds, paths joined by "/"."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from ..printable import csv_cell
from .report import Report
from .rows import Row, check_paths
from .selection import Options, Selection, selected

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["COLUMNS", "render_csv"]

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
