"""Attribution on arrays gives every range the numbers of the loop over rows that it replaced, wherever it is cut."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxnvtx.categories import Numbers
from fxnvtx.errors import CaptureError, FxnvtxError
from fxnvtx.recording import Range
from fxnvtx.report.attribution import batches as spools
from fxnvtx.report.attribution.batches import Limits, Spool
from fxnvtx.report.attribution.names import Interner, Sums
from fxnvtx.report.attribution.threads import fill
from fxnvtx.report.capture import read_sqlite
from fxnvtx.report.capture.recording import spans_of
from fxnvtx.report.part import WHOLE, Part, Window
from fxnvtx.report.tree import BELOW, SUMS, Node, Tree
from tests.support.limits import CHILD_S
from tests.support.oracle.nsys import read_sqlite as read_by_rows
from tests.support.oracle.recording import fill as fill_by_rows

from .captures import DATA, VERSIONS, Capture

# these are newer than the row by row reader, and have tests of their own
NEWER = {
    "queued", "launching", "waited", "communication", "communication_hidden", "copying", "copying_hidden", "allocated",
    "released",
}  # fmt: skip
FIELDS = (*(name for name in SUMS if name not in NEWER), "each", "cpu_min", "cpu_max", "first", "flags", "gap", "gpu")
# one row a window, a few rows a window with runs in a file, whatever is usual
CUTS = (Limits(batch=3, run=2, window=1), Limits(batch=7, run=16, window=10), Limits())


def told(root: Node) -> dict[tuple[object, ...], dict[str, object]]:
    """Everything that a tree says, by path."""
    return {
        node.path(): {
            **{field: getattr(node, field) for field in FIELDS},
            "below": [value for name, value in zip(BELOW, node.below, strict=True) if name not in NEWER],
            "ops": node.ops or {},
            "children": [child.name for child in node.ordered()],
        }
        for node in root.walk()
    }


def same_parts(ours: list[Part], theirs: list[Part]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        for field in ("pid", "rank", "index", "domains", "has_gpu", "device_calls", "gaps", "operations", "notes"):
            assert getattr(mine, field) == getattr(other, field), field
        assert told(mine.tree.root) == told(other.tree.root)
        assert told(mine.side.root) == told(other.side.root)


# ------------------------------------------------------------------------------------------------ captures at hand


@pytest.mark.slow
@pytest.mark.parametrize("limits", [Limits(batch=500, run=700, window=64), Limits()], ids=["cut", "whole"])
@pytest.mark.parametrize("name", ["h100_2gpu_slice.sqlite", "mfu_2gpu_slice.sqlite"])
def test_real_captures(name: str, limits: Limits) -> None:
    for exact in (False, True):
        theirs = read_by_rows(DATA / name, exact)
        same_parts(read_sqlite(DATA / name, exact, limits=limits), theirs)
    same_parts(read_sqlite(DATA / name, exact, limits=limits, adbc=False), theirs)


# ------------------------------------------------------------------------------------------------ random captures


@dataclass(frozen=True)
class Launch:
    tid: int
    start: int
    length: int
    work: tuple[tuple[int, int, int, str, int | None], ...]  # device, start, length, kind, graph node


names = st.sampled_from(("a", "b", "denoising_step", "request", "residency.load", "aten::mm, op_id = 3"))
categories = st.sampled_from((None, "module", "piece", "residency", "step", "module", "request", "compile"))
chosen = st.sampled_from(
    (WHOLE, WHOLE, Window(), Window(first=1), Window(steps=Numbers.read("1:")), Window(requests=Numbers.read("1")))
)
moments, lengths = st.integers(0, 30), st.integers(0, 12)
spans = st.tuples(
    st.integers(1, 2),  # process
    st.integers(1, 2),  # thread
    moments,
    st.one_of(lengths, lengths, lengths, st.none(), st.integers(-2, 60)),
    names,
    categories,
    st.one_of(st.none(), st.integers(-2, 2)),  # payload
    st.booleans(),  # registered
    st.sampled_from((59, 59, 59, 59, 60)),
)
work = st.tuples(
    st.integers(0, 1),
    st.integers(1, 60),
    lengths,
    st.sampled_from(("kernel", "kernel", "copy", "graph")),
    st.one_of(st.none(), st.none(), st.integers(10, 16)),
)
launched = st.builds(Launch, st.integers(1, 2), moments, lengths, st.lists(work, min_size=1, max_size=3).map(tuple))
graph_nodes = st.tuples(moments, st.integers(10, 16), st.one_of(st.none(), st.integers(10, 16)), st.integers(1, 2))


Item = tuple[int, int, int, "int | None", str, "str | None", "int | None", bool, int]


def uncrossed(items: list[Item]) -> list[Item]:
    """Those that lie inside or beside one another on their thread, as one stack's ranges do."""
    kept: list[Item] = []
    for item in items:
        pid, tid, start, length = item[:4]
        end = start + (100 if length is None else length)
        if all(
            (pid, tid) != other[:2]
            or end <= other[2]
            or start >= (stop := other[2] + (100 if other[3] is None else other[3]))
            or (start >= other[2] and end <= stop)
            or (start <= other[2] and end >= stop)
            for other in kept
        ):
            kept.append(item)
    return kept


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    st.lists(spans, max_size=14),
    st.lists(launched, max_size=8),
    st.lists(graph_nodes, max_size=6),
    st.integers(0, 3),
    st.sampled_from(VERSIONS[1:]),
    st.booleans(),
    chosen,
)
def test_random_captures(
    items: list[Item],
    launches: list[Launch],
    nodes: list[tuple[int, int, int | None, int]],
    lost: int,
    version: str,
    stacked: bool,
    window: Window,
) -> None:
    if stacked:
        items = uncrossed(items)
    with tempfile.TemporaryDirectory() as folder:
        capture = Capture(Path(folder) / "random.sqlite", version)
        for pid, tid, start, length, label, category, payload, registered, kind in items:
            end = None if length is None else start + length
            capture.range(start, end, label, category, pid, tid, payload, registered, kind)
        for number, launch in enumerate(launches):
            correlation = capture.call(launch.start, launch.start + launch.length, 1, launch.tid)
            if number < lost:
                capture._correlation += 1  # what nothing recorded launched
                correlation += number % 2
            for device, start, length, what, node in launch.work:
                if what == "copy":
                    capture.copy(start, start + length, correlation, 8, 1)
                elif what == "graph":
                    capture.graph_run(start, start + length, correlation, 3, 1)
                else:
                    capture.kernel(start, start + length, correlation, f"k{length % 3}", 1, device, node=node)
        for start, node, original, tid in nodes:
            capture.graph_node(start, node, original, 1, tid)
        path = capture.close()
        for exact in (False, True):
            try:
                theirs = read_by_rows(path, exact, window=window)
            except FxnvtxError:  # the window leaves nothing
                with pytest.raises(FxnvtxError):
                    read_sqlite(path, exact, window=window)
                continue
            for limits in CUTS:
                same_parts(read_sqlite(path, exact, window=window, limits=limits, adbc=limits.window != 10), theirs)


def test_operations_of_one_call_that_start_together(tmp_path: Path) -> None:
    """On two devices, the second of which comes first in the table."""
    capture = Capture(tmp_path / "together.sqlite")
    for start, ends in ((1, (2, 1)), (3, (3, 3))):
        correlation = capture.call(0, 0)
        for device, end in zip((1, 0), ends, strict=True):
            capture.kernel(start, end, correlation, device=device)
    path = capture.close()
    for limits in CUTS:
        same_parts(read_sqlite(path, limits=limits), read_by_rows(path))


recorded = st.lists(
    st.tuples(st.integers(1, 2), moments, st.one_of(st.none(), lengths), names, categories, st.integers(0, 3)),
    max_size=14,
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(recorded)
def test_random_recordings(items: list[tuple[int, int, int | None, str, str | None, int]]) -> None:
    ranges = [
        Range(label, category or "", depth or None, tid, depth, start, None if length is None else start + length)
        for tid, start, length, label, category, depth in items
    ]
    theirs = Tree()
    fill_by_rows(theirs, spans_of(ranges))
    for limits in CUTS:
        ours = Tree()
        fill(ours, spans_of(ranges), limits)
        assert told(ours.root) == told(theirs.root)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), moments, lengths, st.booleans()), max_size=25))
def test_weights_that_move_while_others_compute(items: list[tuple[int, int, int, bool]]) -> None:
    ranges = [
        Range("m", "residency" if moves else "module", None, tid, 0, start, start + length)
        for tid, start, length, moves in items
    ]
    theirs = Tree()
    fill_by_rows(theirs, spans_of(ranges))
    for limits in CUTS:
        ours = Tree()
        fill(ours, spans_of(ranges), limits)
        assert told(ours.root) == told(theirs.root)


def test_more_paths_than_are_kept() -> None:
    """The overflow row, in whatever window the limit is met."""
    ranges = [
        Range(
            f"r{index % 7}.{index // 3}", "module", None, 1, index % 3, start := index * 10, start + 40 - index % 3 * 11
        )
        for index in range(90)
    ]
    for room in (0, 1, 5, 40, 200):
        theirs = Tree(room)
        fill_by_rows(theirs, spans_of(ranges))
        for limits in CUTS:
            ours = Tree(room)
            fill(ours, spans_of(ranges), limits)
            assert told(ours.root) == told(theirs.root)


def test_very_deep_nesting() -> None:
    ranges = [Range("deep", "module", None, 1, level, level, 4000 - level) for level in range(1500)]
    theirs = Tree()
    fill_by_rows(theirs, spans_of(ranges))
    for limits in (Limits(window=400), Limits()):
        ours = Tree()
        fill(ours, spans_of(ranges), limits)
        flat_ours, flat_theirs = [*ours.root.walk()], [*theirs.root.walk()]
        assert [(node.calls, node.cpu_self, node.first) for node in flat_ours] == [
            (node.calls, node.cpu_self, node.first) for node in flat_theirs
        ]


# ------------------------------------------------------------------------------------------------ parts


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(-9, 9), st.integers(0, 3)), max_size=40),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(-10, 10),
    st.integers(0, 9),
)
def test_a_spool_gives_back_what_it_got_in_order(
    rows: list[tuple[int, int, int]], run: int, window: int, low: int, width: int
) -> None:
    limits = Limits(run=run, window=window)
    spool = Spool({"key": np.int64, "tie": np.int8, "place": np.int32}, ("tie",), limits)
    for place, (group, key, tie) in enumerate(rows):
        spool.append(np.array([group]), (np.array([key]), tie, np.array([place])))
    spool.seal()
    expected = {group: [(k, t, p) for p, (g, k, t) in enumerate(rows) if g == group] for group in spool.groups()}
    for group, wanted in expected.items():
        wanted.sort()
        got: list[tuple[int, int, int]] = []
        for first, last in spools.windows([spool], group, window):
            got.extend(zip(*(column.tolist() for column in spool.read(group, first, last).values()), strict=True))
        assert got == wanted
        some = spool.read(group, low, low + width)["place"].tolist()
        assert some == [p for k, _t, p in wanted if low <= k < low + width]
        assert spool.next_key(group, low) == min((k for k, _t, _p in wanted if k >= low), default=None)
    spool.close()


big = st.one_of(st.integers(-5, 5), st.integers(-(2**62), 2**62), st.integers(2**52, 2**54))


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), big, st.sampled_from((-1, 1))), min_size=1), max_size=4))
def test_sums_never_round(batches: list[list[tuple[int, int, int]]]) -> None:
    sums, expected = Sums(), [0] * 6
    for batch in batches:
        for sign in (-1, 1):
            some = [(number, value) for number, value, its in batch if its == sign]
            sums.add(np.array([n for n, _ in some], np.int64), np.array([v for _, v in some], np.int64), sign)
            for number, value in some:
                expected[number] += sign * value
    assert sums.tolist(6) == expected


@given(st.lists(st.lists(st.integers(-3, 3) | st.integers(-(2**63), 2**63 - 1)), max_size=4))
def test_numbers_are_given_in_the_order_of_appearance(batches: list[list[int]]) -> None:
    interner, order = Interner(), list[int]()
    for batch in batches:
        order += [key for key in dict.fromkeys(batch) if key not in order]
        assert interner(np.array(batch, np.int64)).tolist() == [order.index(key) for key in batch]
    assert interner.keys() == order


# ------------------------------------------------------------------------------------------------ what it needs


def test_arrays_are_loaded_when_a_capture_is_read_and_not_before() -> None:
    """Ours, that is: some releases of nvtx import numpy themselves."""
    code = (
        "import sys, fxnvtx, fxnvtx.cli, fxnvtx.report.commands\n"
        "wanted = {'nanoarrow', 'adbc_driver_manager', 'fxnvtx.report.attribution'}\n"
        "early = wanted & set(sys.modules)\n"
        "from fxnvtx.report import load; load(sys.argv[1])\n"
        "print(len(early), len(wanted & set(sys.modules)), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(DATA / "mfu_2gpu_slice.sqlite")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=CHILD_S)
    assert done.stdout.split() == ["0", "3", "False"]


@pytest.mark.parametrize("missing", ["adbc_driver_sqlite", "adbc_driver_manager", "nanoarrow"])
def test_without_the_column_reader(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = DATA / "h100_2gpu_slice.sqlite"
    whole = read_sqlite(path)
    monkeypatch.setitem(sys.modules, missing, None)
    same_parts(read_sqlite(path), whole)


def test_no_room_for_what_does_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path / "not there"))
    with pytest.raises(CaptureError, match="point SQLITE_TMPDIR to a disk"):
        read_sqlite(DATA / "mfu_2gpu_slice.sqlite", limits=Limits(run=100))


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    read_sqlite(DATA / "mfu_2gpu_slice.sqlite", limits=Limits(run=100))
    assert not [*tmp_path.iterdir()]
    assert len(os.listdir("/proc/self/fd")) == before
