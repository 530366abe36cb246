"""Whatever tree is written into a capture comes back as that tree, and nothing is lost or counted twice."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxnvtx.recording import Range
from fxnvtx.report import Report, from_recording, load, render_html, render_text
from fxnvtx.report.attribution.batches import Ints
from fxnvtx.report.attribution.overlaps import cover_before, own_parts, unions
from fxnvtx.report.tree import Node

from .captures import VERSIONS, Capture
from .samples import recorded

LABELS = ("a", "b", "c.0", "c.1", "fused(a, c.0)")


@dataclass
class Written:
    """A range to write: what it holds, in order. An int is a launch whose kernel takes so many ns."""

    label: str
    inside: list[Written | int] = field(default_factory=list)


trees = st.recursive(
    st.builds(Written, st.sampled_from(LABELS), st.lists(st.integers(0, 40), max_size=3)),
    lambda below: st.builds(
        Written, st.sampled_from(LABELS), st.lists(st.one_of(below, st.integers(0, 40)), max_size=4)
    ),
    max_leaves=12,
)
threads = st.lists(st.lists(st.one_of(trees, st.integers(1, 40)), max_size=4), min_size=1, max_size=3)


@dataclass
class Expected:
    calls: int = 0
    cpu: int = 0
    cpu_self: int = 0
    kernels: int = 0
    gpu_sum: int = 0


class Writer:
    """Writes trees and notes what a report has to say about each path."""

    def __init__(self, capture: Capture, gaps: Iterator[int], streams: int) -> None:
        self.capture = capture
        self.gaps = gaps
        self.streams = streams
        self.paths: dict[tuple[str, ...], Expected] = {}
        self.intervals: list[tuple[int, int, tuple[str, ...]]] = []
        self.ranges: list[Range] = []
        self.now = 1000
        self.device = [5000] * streams

    def thread(self, tid: int, items: list[Written | int]) -> None:
        self.now = 1000
        for item in items:
            self._item(item, (), tid)

    def _tick(self) -> int:
        self.now += next(self.gaps)
        return self.now

    def _item(self, item: Written | int, path: tuple[str, ...], tid: int) -> int:
        """Returns the time that the item took of the range around it."""
        if isinstance(item, int):
            start = self._tick()
            end = self._tick()
            correlation = self.capture.call(start, end, tid=tid)
            stream = item % self.streams
            begin = self.device[stream] + next(self.gaps)
            self.device[stream] = begin + item
            self.capture.kernel(begin, begin + item, correlation, stream=stream)
            self.intervals.append((begin, begin + item, path))
            found = self.paths.setdefault(path or ("outside",), Expected())
            found.kernels += 1
            found.gpu_sum += item
            return 0
        here = (*path, item.label)
        place = len(self.ranges)
        start = self._tick()
        self.ranges.append(Range(item.label, "module", None, tid, len(path), start, None))
        inner = sum(self._item(below, here, tid) for below in item.inside)
        end = self._tick()
        self.capture.range(start, end, item.label, tid=tid)
        self.ranges[place] = Range(item.label, "module", None, tid, len(path), start, end)
        found = self.paths.setdefault(here, Expected())
        found.calls += 1
        found.cpu += end - start
        found.cpu_self += end - start - inner
        return end - start


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(threads, st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(1, 3), st.sampled_from(VERSIONS))
def test_a_written_tree_comes_back(
    items: list[list[Written | int]], gaps: list[int], streams: int, version: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        capture = Capture(Path(folder) / "written.sqlite", version)
        # a range takes at least one tick, or order could not tell which of two is the outer one
        writer = Writer(capture, itertools.cycle([gap + 1 for gap in gaps]), streams)
        for tid, thread in enumerate(items, 1):
            writer.thread(tid, thread)
        report = load(capture.close())
    found = {
        tuple(name.text for name in node.path()) if not node.is_unknown() else ("outside",): Expected(
            node.calls, node.cpu, node.cpu_self, node.kernels, node.gpu_sum
        )
        for node in report.root.walk()
        if node.parent is not None
    }
    assert found == writer.paths
    _check_device_time(report, writer)
    _check_conservation(report.root)


def _check_device_time(report: Report, writer: Writer) -> None:
    """Each range's GPU time is the union of the kernels launched in it and below."""
    for node in report.root.walk():
        path = () if node.parent is None else tuple(name.text for name in node.path())
        mine = sorted(
            (start, end)
            for start, end, where in writer.intervals
            if (where[: len(path)] == path if not node.is_unknown() else where == ())
        )
        assert node.gpu == _measure(mine), path


def _measure(rows: list[tuple[int, int]]) -> int:
    """The length of the union of sorted intervals."""
    whole, reach = 0, -1
    for start, end in rows:
        whole += max(0, end - max(start, reach))
        reach = max(reach, end)
    return whole


def _check_conservation(root: Node) -> None:
    nodes = list(root.walk())
    assert sum(node.cpu_self for node in nodes) == sum(child.cpu for child in root.children.values()) == root.cpu
    assert sum(node.gpu_self for node in nodes) == root.gpu
    for node in nodes:
        assert node.cpu_self >= 0
        assert node.gpu_self >= 0
        assert node.gpu_shared >= 0
        assert node.gpu <= node.below[0]  # never more than the plain sum


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(threads, st.lists(st.integers(0, 30), min_size=1, max_size=9))
def test_a_recording_comes_back_as_its_own_tree(items: list[list[Written | int]], gaps: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Capture(Path(folder) / "unused.sqlite"), itertools.cycle([gap + 1 for gap in gaps]), 1)
        for tid, thread in enumerate(items, 1):
            writer.thread(tid, thread)
    recording = recorded(writer.ranges)
    report = from_recording(recording)
    expected: dict[tuple[str, ...], tuple[int, int]] = {}
    todo: list[tuple[Any, tuple[str, ...]]] = [(node, (node.label,)) for node in recording.tree()]
    while todo:
        node, path = todo.pop()
        calls, time = expected.get(path, (0, 0))
        assert node.end_ns is not None
        expected[path] = (calls + 1, time + node.end_ns - node.start_ns)
        todo.extend((child, (*path, child.label)) for child in node.children)
    rows = {row.path: (row.calls, row.cpu) for row in report.rows()}
    assert rows == expected
    _check_conservation(report.root)


intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda p: (p[0], p[0] + p[1])), max_size=12)


def arrays(rows: list[tuple[int, int]]) -> tuple[Ints, Ints]:
    return np.array([start for start, _ in rows], np.int64), np.array([end for _, end in rows], np.int64)


@given(intervals, st.integers(1, 4), st.lists(st.integers(-3, 80), max_size=9))
def test_union_and_cover_agree_with_counting(cover: list[tuple[int, int]], batch: int, moments: list[int]) -> None:
    points = {at for start, end in cover for at in range(start, end)}
    rows = sorted(cover)
    merged = [*unions(arrays(rows[at : at + batch]) for at in range(0, len(rows), batch))]
    assert sum(int((end - start).sum()) for start, end in merged) == len(points)
    before = sum((cover_before(start, end, np.array(moments, np.int64)) for start, end in merged), start=0)
    assert np.broadcast_to(before, len(moments)).tolist() == [sum(at < moment for at in points) for moment in moments]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 9)), max_size=12), st.integers(0, 12))
def test_parts_of_a_union_agree_with_counting(rows: list[tuple[int, int, int]], cut: int) -> None:
    rows.sort()
    reach = np.full(3, -(2**62))
    own: list[int] = []
    early = [row for row in rows if row[1] < cut]
    late = [row for row in rows if row[1] >= cut]
    for some in (early, late):
        start, end = arrays([(start, start + length) for _, start, length in some])
        found, reach = own_parts(np.array([group for group, _, _ in some], np.int64), start, end, reach)
        own += found.tolist()
    seen: set[tuple[int, int]] = set()
    for (group, begin, length), mine in zip(early + late, own, strict=True):
        points = {(group, at) for at in range(begin, begin + length)}
        assert mine == len(points - seen)
        seen |= points


@pytest.mark.parametrize("view", ["component", "module"])
def test_a_grouped_view_counts_nothing_twice(view: str, tmp_path: Path) -> None:
    """A module inside itself: its time counts once, its calls all."""
    capture = Capture(tmp_path / "recursive.sqlite")
    capture.range(0, 100, "a")
    capture.range(10, 90, "b")
    capture.range(20, 50, "a")
    capture.kernel(1000, 1030, capture.call(30, 32))
    rows = {row.name: row for row in load(capture.close()).rows(by=view)}
    assert rows["a"].cpu == 100
    assert rows["a"].gpu == 30
    if view == "module":
        assert rows["a"].calls == 2
        assert sum(row.cpu_self for row in rows.values()) == 100
        assert sum(row.gpu_self for row in rows.values()) == 30


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    threads, st.lists(st.integers(0, 30), min_size=1, max_size=9), st.booleans(), st.booleans(), st.integers(30, 150)
)
def test_no_view_loses_or_invents_time(
    items: list[list[Written | int]], gaps: list[int], folded: bool, split: bool, width: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Capture(Path(folder) / "views.sqlite"), itertools.cycle([gap + 1 for gap in gaps]), 2)
        for tid, thread in enumerate(items, 1):
            writer.thread(tid, thread)
        report = load(writer.capture.close())
    root = report.root
    rows = report.rows(fold=folded, split_fused=split)
    assert sum(row.cpu_self for row in rows) == root.cpu
    assert sum(row.gpu_self for row in rows) == root.gpu
    assert sum(row.calls for row in rows) + sum(r.label.startswith("fused") for r in writer.ranges) * split == len(
        writer.ranges
    )
    assert sum(row.kernels for row in rows if row.depth == 0) == len(writer.intervals)
    assert sum(row.gpu for row in report.rows(by="kernel", fold=folded)) == root.gpu
    for view in ("module", "range", "component"):
        grouped = report.rows(by=view, fold=folded, split_fused=split)
        assert all(0 <= row.cpu_self <= row.cpu for row in grouped), view
        assert all(row.gpu <= row.gpu_sum for row in grouped), view
    text = render_text(report, width=width, fold=folded, split_fused=split)
    assert max((len(line) for line in text.splitlines()), default=0) <= width
    page = render_html(report, fold=folded, split_fused=split)
    assert "__DATA__" not in page
