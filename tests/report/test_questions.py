"""Overlap, queues, waits, memory, a part of the time and a diff of kernels, on captures whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxnvtx.cli import cli
from fxnvtx.errors import ConfigError
from fxnvtx.recording import Range
from fxnvtx.report import Row, diff, load, render_csv, render_json, render_text
from fxnvtx.report.attribution.batches import Limits
from fxnvtx.report.capture import read_sqlite
from fxnvtx.report.part import Window, read_times

from .captures import Capture
from .samples import recorded

# one row a window, and whatever is usual
CUTS = (Limits(batch=3, run=2, window=1), Limits())


def asked(path: Path) -> Path:
    """A step of two layers: one computes, communicates and copies, the other waits and allocates."""
    capture = Capture(path)
    capture.range(0, 1000, "denoising_step_0_t9", "step")
    capture.range(100, 500, "net.0")
    capture.range(500, 900, "net.1")
    capture.kernel(300, 400, capture.call(110, 120))
    # hidden from 350 to 400, exposed from 400 to 500
    capture.kernel(350, 500, capture.call(130, 150), "ncclDevKernel_AllReduce_Sum_bf16", stream=8)
    # hidden for all of its time: by the second kernel, and not by NCCL's
    capture.kernel(600, 700, capture.call(510, 520))
    capture.copy(620, 650, capture.call(530, 540), 64)
    capture.call(550, 850, name="cudaDeviceSynchronize_v3020")
    first, second = (capture.call(at, at + 5, name="cudaMalloc_v3020") for at in (860, 870))
    capture.memory(860, first, 1000)
    capture.memory(870, second, 500)
    capture.memory(880, capture.call(880, 885, name="cudaFree_v3020"), -1000)
    capture.memory(890, capture.call(890, 895, name="cudaHostAlloc_v3020"), 9999, kind=1)
    return capture.close()


@pytest.mark.parametrize("limits", CUTS, ids=["cut", "whole"])
def test_figures_of_layers_are_right_to_the_digit(tmp_path: Path, limits: Limits) -> None:
    (part,) = read_sqlite(asked(tmp_path / "c.sqlite"), limits=limits)
    nodes = {node.name.text: node for node in part.tree.root.walk()}
    one, two, step = nodes["net.0"], nodes["net.1"], nodes["denoising_step_0_t9"]
    assert (one.communication, one.communication_hidden) == (150, 50)
    assert (one.queued, one.launching, one.waited) == (180 + 200, 10 + 20, 0)
    assert (two.copying, two.copying_hidden, two.communication) == (30, 30, 0)
    assert (two.queued, two.launching, two.waited) == (80 + 80, 10 + 10, 300)
    assert (two.allocated, two.released, two.peak) == (1500, 1000, 1500)
    assert (one.peak, step.peak, part.tree.root.peak) == (None, 1500, 1500)
    for counter in ("communication", "communication_hidden", "copying", "queued", "launching", "waited", "allocated"):
        assert step.of(counter) == one.of(counter) + two.of(counter) > 0
    assert step.waited == step.queued == 0
    assert part.has_memory


def test_every_format_tells_them(tmp_path: Path) -> None:
    report = load(asked(tmp_path / "c.sqlite"))
    text = render_text(report, width=250)
    assert (
        text.splitlines()[0].split()[-6:] == ["exposed", "wait", "queue", "memory", "share"][-6:] or "exposed" in text
    )
    line = next(line for line in text.splitlines() if "net.1" in line)
    assert "300 ns" in line
    assert "1.5 KiB" in line
    assert "exposed" in render_text(report, width=70, sort="exposed"), "what rows are sorted by is shown"
    header, *rows = render_csv(report).splitlines()
    cells = dict(zip(header.split(","), next(row for row in rows if "net.0" in row).split(","), strict=True))
    assert (cells["communication_ns"], cells["communication_hidden_ns"], cells["peak_bytes"]) == ("150", "50", "")
    assert '"waited": 300' in render_json(report)
    assert next(row.name for row in report.rows("module", sort="exposed")) == "net.0"


def test_nothing_is_said_of_what_is_not_there(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "c.sqlite")
    capture.range(0, 100, "net")
    capture.kernel(50, 60, capture.call(10, 20))
    report = load(capture.close())
    assert not report.parts[0].has_memory
    assert report.root.peak is None
    header = render_text(report, width=250).splitlines()[0]
    assert not {"exposed", "wait", "memory"} & {*header.split()}


intervals = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 12), st.sampled_from(("kernel", "nccl", "copy")), st.integers(0, 1)),
    max_size=12,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(intervals, st.sampled_from(CUTS))
def test_overlap_agrees_with_counting(tmp_path_factory: pytest.TempPathFactory, items, limits) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("overlap") / "c.sqlite"
    capture = Capture(path)
    for number, label in enumerate(("net.0", "net.1")):
        capture.range(1000 * number, 1000 * number + 900, label)
    for number, (start, length, kind, layer) in enumerate(items):
        call = capture.call(1000 * layer + 10 * number, 1000 * layer + 10 * number + 5)
        if kind == "copy":
            capture.copy(3000 + start, 3000 + start + length, call, 1)
        else:
            name = "ncclDevKernel" if kind == "nccl" else "gemm"
            capture.kernel(3000 + start, 3000 + start + length, call, name, stream=number)
    capture.close()
    (part,) = read_sqlite(path, limits=limits)
    compute = {at for start, length, kind, _ in items if kind == "kernel" for at in range(start, start + length)}
    for layer in (0, 1):
        node = next(child for child in part.tree.root.children.values() if child.name.text == f"net.{layer}")
        for kind, all_of_it, hidden in (
            ("nccl", node.communication, node.communication_hidden),
            ("copy", node.copying, node.copying_hidden),
        ):
            mine = [range(start, start + length) for start, length, what, at in items if what == kind and at == layer]
            assert all_of_it == sum(map(len, mine))
            assert hidden == sum(at in compute for times in mine for at in times)


# ------------------------------------------------------------------------------------------------ a part of the time


@pytest.mark.parametrize("limits", CUTS, ids=["cut", "whole"])
@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ((0, None), {"step": (1, 1000), "net.0": (1, 400), "net.1": (1, 400)}),
        ((200, 600), {"step": (1, 400), "net.0": (1, 300), "net.1": (1, 100)}),
        ((0, 500), {"step": (1, 500), "net.0": (1, 400)}),
        ((500, None), {"step": (1, 500), "net.1": (1, 400)}),
    ],
)
def test_ranges_are_cut_to_a_part_of_the_time(
    tmp_path: Path, between: tuple[int, int | None], expected: dict[str, tuple[int, int]], limits: Limits
) -> None:
    def shown(children: Callable[[], object]) -> dict[str, tuple[int, int]]:
        return {n.name.text: (n.calls, n.cpu) for n in children() if n.parent is not None and n.calls}  # type: ignore[attr-defined]

    window = Window(compiling=True, between=between)
    capture = Capture(tmp_path / "c.sqlite")
    spans = ((0, 1000, "step", "step"), (100, 500, "net.0", "module"), (500, 900, "net.1", "module"))
    for start, end, name, category in spans:
        capture.range(7000 + start, 7000 + end, name, category)
        if name != "step":
            capture.kernel(20_000 + start, 20_100 + start, capture.call(7000 + start + 100, 7000 + start + 110))
    (part,) = read_sqlite(capture.close(), window=window, limits=limits)
    assert shown(part.tree.root.walk) == expected
    low, high = between[0], between[1] or 1000
    assert part.operations == sum(low <= at < high for at in (200, 600)), "what was launched in it counts"
    assert any("--between" in note for note in part.notes)
    ranges = [Range(name, kind, None, 1, 0 if name == "step" else 1, start, end) for start, end, name, kind in spans]
    report = load(recorded(ranges).save(tmp_path / "r.json"), window=window)
    assert shown(report.root.walk) == expected


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1.5s:2s", (1_500_000_000, 2_000_000_000)), (":3", (0, 3_000_000_000)), ("250ms:", (250_000_000, None)),
        ("10us : 20us", (10_000, 20_000)), (":", (0, None)),
    ],
)  # fmt: skip
def test_times_are_read(text: str, found: tuple[int, int | None]) -> None:
    assert read_times(text) == found


@pytest.mark.parametrize("text", ["", "1", "2:1", "1:1", "x:", "-1:2", "1:2:3", "1e9:", "9" * 20 + ":", "1s:2m"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_times(text)
    assert "\n" not in str(caught.value)


def test_the_first_requests_are_left_out(tmp_path: Path) -> None:
    ranges = [Range(f"request#{n}", "request", None, 1, 0, 100 * n, 100 * n + 90) for n in range(4)]
    path = recorded(ranges).save(tmp_path / "r.json")

    def left(first: int) -> list[str]:
        return [row.name for row in load(path, window=Window(first=first)).rows("request") if row.kind == "range"]

    assert left(1) == ["request#1", "request#2", "request#3"]
    assert left(3) == left(9) == ["request#3"], "the last one is always shown"
    done = CliRunner().invoke(cli, ["report", str(path), "--skip-first", "2", "--no-fold"])
    assert "the first 2 of 4 requests are left out" in done.output


# ------------------------------------------------------------------------------------------------ kernels compared


def test_kernels_are_compared(tmp_path: Path) -> None:
    def written(name: str, length: int, other: str) -> Path:
        capture = Capture(tmp_path / name)
        for step in range(4):
            at = 10_000 * step
            capture.range(at, at + 5000, f"denoising_step_{step}_t0", "step")
            capture.kernel(at + 1000, at + 1000 + length, capture.call(at + 10, at + 20), "gemm")
            capture.kernel(at + 4000, at + 4100, capture.call(at + 30, at + 40), other)
        return capture.close()

    a, b = written("a.sqlite", 1000, "softmax"), written("b.sqlite", 2500, "fused_softmax")
    found = {row.name: row for row in diff(load(a), load(b), by="kernel").rows}
    assert {name: (row.a, row.b, row.verdict) for name, row in found.items()} == {
        "gemm": (1000, 2500, "change"), "softmax": (100, None, "only in A"), "fused_softmax": (None, 100, "only in B"),
    }  # fmt: skip
    done = CliRunner().invoke(cli, ["diff", str(a), str(b), "--by", "kernel", "--format", "markdown"])
    assert done.exit_code == 0
    assert "fused\\_softmax" in done.output
    done = CliRunner().invoke(cli, ["diff", str(a), str(b), "--by", "kernel", "--split-fused"])
    assert done.exit_code == 2


def test_no_kernels_to_compare(tmp_path: Path) -> None:
    path = recorded([Range("net", "module", None, 1, 0, 0, 90)]).save(tmp_path / "r.json")
    found = diff(load(path), load(path), by="kernel")
    assert not found.rows
    assert any("no work of a device" in note for note in found.notes)


def test_rows_know_what_is_exposed() -> None:
    assert Row("x", 0, "range", "module", communication=5, communication_hidden=2).exposed == 3
