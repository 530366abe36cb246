"""On real two-GPU captures every range's numbers are those of Nsight Systems' own reports."""

from __future__ import annotations

import runpy
import shutil
from collections import Counter
from pathlib import Path

import pytest

from fxnvtx.report import Report, load, scrub

from .captures import DATA, Capture
from .conftest import Stats

CAPTURES = ("h100_2gpu_slice.sqlite", "mfu_2gpu_slice.sqlite")
pytestmark = pytest.mark.nsys


@pytest.fixture(scope="module", params=CAPTURES)
def capture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # nsys stats adds tables to the file it is given
    return Path(shutil.copy(DATA / request.param, tmp_path_factory.mktemp("real")))


def test_push_pop_times_and_counts(capture: Path, nsys_stats: Stats) -> None:
    ours = {row.name: row for row in load(DATA / capture.name, exact=True).rows(by="range")}
    theirs = nsys_stats("nvtx_pushpop_sum", capture)
    assert len(theirs) > 5000
    assert {row["Range"] for row in theirs} == {row.name for row in ours.values() if row.kind == "range"}
    for row in theirs:
        mine = ours[row["Range"]]
        assert (mine.calls, mine.cpu) == (int(row["Instances"]), int(row["Total Time (ns)"])), row
        assert (mine.cpu_min, mine.cpu_max) == (int(row["Min (ns)"]), int(row["Max (ns)"])), row


def test_projected_gpu_times_and_counts(capture: Path, nsys_stats: Stats) -> None:
    ours = {row.name: row for row in load(DATA / capture.name, exact=True).rows(by="range")}
    theirs = nsys_stats("nvtx_gpu_proj_sum", capture)
    assert len(theirs) > 2000
    assert {row["Range"] for row in theirs} == {row.name for row in ours.values() if row.proj_calls}
    for row in theirs:
        mine = ours[row["Range"]]
        assert mine.proj == int(row["Total Proj Time (ns)"]), row
        assert mine.proj_calls == int(row["Range Instances"]), row
        assert mine.launches == int(row["Total GPU Ops"]), row


def test_kernel_times_by_range_and_kernel(capture: Path, nsys_stats: Stats) -> None:
    theirs: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for row in nsys_stats("nvtx_kern_sum", capture):
        if row["NVTX Range"]:
            theirs[row["NVTX Range"], row["Kernel Name"]] += int(row["Total Time (ns)"])
            counts[row["NVTX Range"], row["Kernel Name"]] += int(row["Kern Inst"])
    times, numbers = _kernels(load(DATA / capture.name, exact=True))
    assert len(theirs) > 1000
    assert times == theirs
    assert numbers == counts


def _kernels(report: Report) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """Each kernel counted in every range around it, as nsys does."""
    times: Counter[tuple[str, str]] = Counter()
    numbers: Counter[tuple[str, str]] = Counter()
    for node in report.root.walk():
        for name, (count, duration, _credit) in (node.ops or {}).items():
            if name.startswith("[") or node.is_unknown():
                continue
            for label in {part.text if not part.domain else f"{part.domain}:{part.text}" for part in node.path()}:
                times[label, name] += duration
                numbers[label, name] += count
    return times, numbers


def test_a_scrubbed_copy_gives_nsys_the_same_numbers(capture: Path, tmp_path: Path, nsys_stats: Stats) -> None:
    copy = scrub(capture, tmp_path / "copy.sqlite")
    for report in ("nvtx_gpu_proj_sum", "nvtx_pushpop_sum"):
        assert nsys_stats(report, copy) == nsys_stats(report, capture)


@pytest.mark.slow
def test_a_hundred_thousand_ranges(tmp_path: Path, nsys_stats: Stats) -> None:
    benchmark = runpy.run_path(str(DATA.parent.parent / "benchmarks" / "report.py"))
    path = tmp_path / "large.sqlite"
    ranges, kernels = benchmark["write_capture"](path, 100_000)
    report = load(path, exact=True)
    ours = {f"fxnvtx:{row.name}": row for row in report.rows(by="range")}
    assert sum(row.calls for row in ours.values()) == ranges
    assert report.root.below[1] == kernels
    pushed, projected = nsys_stats("nvtx_pushpop_sum", path), nsys_stats("nvtx_gpu_proj_sum", path)
    for row in pushed:
        assert (ours[row["Range"]].calls, ours[row["Range"]].cpu) == (
            int(row["Instances"]),
            int(row["Total Time (ns)"]),
        )
    for row in projected:
        assert ours[row["Range"]].proj == int(row["Total Proj Time (ns)"])
    assert len(pushed) == len(ours)


def test_crossing_open_and_start_end_ranges(tmp_path: Path, nsys_stats: Stats) -> None:
    """What real captures here do not hold, written by hand: nsys must still agree."""
    capture = Capture(tmp_path / "odd.sqlite", domain=None)
    capture.range(100, 900, "outer")
    capture.range(200, 500, "left")
    capture.range(400, 700, "right")  # crosses left: another domain's stack
    capture.range(450, 650, "inner")
    capture.range(800, None, "never closed", registered=False)
    capture.range(150, 850, "async", kind=60, registered=False)
    capture.range(300, 600, "async", kind=60, registered=False)
    for start in (120, 250, 420, 460, 480, 600, 690, 720, 860):
        correlation = capture.call(start, start + 5)
        capture.kernel(start * 10, start * 10 + 40, correlation, name=f"kernel {start}")
    path = capture.close()
    ours = {row.name: row for row in load(path, exact=True).rows(by="range")}
    shutil.copy(path, tmp_path / "theirs.sqlite")
    theirs = nsys_stats("nvtx_gpu_proj_sum", tmp_path / "theirs.sqlite")
    assert {row["Range"] for row in theirs} == {"outer", "left", "right", "inner", "never closed", "async"}
    for row in theirs:
        mine = ours[row["Range"]]
        assert mine.proj == int(row["Total Proj Time (ns)"]), row
        assert mine.proj_calls == int(row["Range Instances"]), row
        assert mine.launches == int(row["Total GPU Ops"]), row
    for row in nsys_stats("nvtx_pushpop_sum", tmp_path / "theirs.sqlite"):
        mine = ours[row["Range"]]
        assert (mine.calls, mine.cpu) == (int(row["Instances"]), int(row["Total Time (ns)"])), row
