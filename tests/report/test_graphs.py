"""Kernels of replayed CUDA graphs: the launch says which step, the capture says which layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxnvtx.recording import Entry, encoded
from fxnvtx.report import Report, load
from fxnvtx.report.work import parse_peaks

from .captures import Capture

VERSIONS = ("2023_4", "2026_2")  # CUDA_GRAPH_EVENTS, CUDA_GRAPH_NODE_EVENTS


@pytest.fixture(params=VERSIONS)
def capture(request: pytest.FixtureRequest, tmp_path: Path) -> Capture:
    return Capture(tmp_path / "graphs.sqlite", request.param)


def gpu_by_path(report: Report) -> dict[str, int]:
    return {"/".join(row.path): row.gpu_self for row in report.rows() if row.gpu_self}


def write_capture_phase(capture: Capture, tid: int = 1) -> None:
    """A warm-up request in which a graph with the nodes 10 (norm) and 11 (attn) is captured on thread `tid`."""
    capture.range(100, 900, "request#0", "request", tid=tid)
    capture.range(110, 890, "denoising_step_0_t999", "step", tid=tid)
    capture.range(200, 800, "transformer", tid=tid)
    capture.range(300, 500, "transformer.blocks.0", tid=tid)
    capture.range(310, 390, "transformer.blocks.0.norm", tid=tid)
    capture.range(400, 490, "transformer.blocks.0.attn", tid=tid)
    capture.graph_node(350, 10, tid=tid)
    capture.graph_node(450, 11, tid=tid)


def write_replay(capture: Capture, at: int, step: int, nodes: tuple[int, int], tid: int = 1) -> None:
    capture.range(at, at + 500, "request#1", "request", tid=tid)
    capture.range(at + 10, at + 490, f"denoising_step_{step}_t{step}", "step", tid=tid)
    capture.range(at + 20, at + 480, "transformer", tid=tid)
    correlation = capture.call(at + 100, at + 120, name="cudaGraphLaunch_v10000", tid=tid)
    capture.kernel(at + 1000, at + 1030, correlation, "norm_kernel", node=nodes[0])
    capture.kernel(at + 1040, at + 1100, correlation, "attn_kernel", node=nodes[1])


LAYER = "transformer/transformer.blocks.0/transformer.blocks.0."


def test_a_replay_is_put_below_its_step_at_its_layer(capture: Capture) -> None:
    write_capture_phase(capture)
    capture.graph_node(850, 20, original=10)  # made at instantiation
    capture.graph_node(850, 21, original=11)
    for step in (3, 4):
        write_replay(capture, 10_000 * step, step, (20, 21))
    report = load(capture.close())
    assert gpu_by_path(report) == {
        f"request#1/denoising_step_{step}_t{step}/{LAYER}{layer}": time
        for step in (3, 4)
        for layer, time in (("norm", 30), ("attn", 60))
    }
    modules = {row.name: row for row in report.rows(by="module")}
    assert modules["transformer.blocks.0.attn"].gpu == 120
    assert modules["transformer.blocks.0"].gpu == 180
    steps = {row.name: row.gpu for row in report.rows(by="step")}
    assert (steps["denoising_step_3_t3"], steps["denoising_step_0_t999"]) == (90, 0)
    replayed = [row for row in report.rows() if "replayed" in row.flags]
    assert {row.calls for row in replayed} == {0}, "a replay runs no Python: no calls may be made up"


def test_clones_of_clones_are_followed(capture: Capture) -> None:
    write_capture_phase(capture)
    for node, original in ((20, 10), (21, 11), (30, 20), (31, 21), (40, 30), (41, 31)):
        capture.graph_node(850, node, original=original)
    write_replay(capture, 10_000, 1, (40, 41))
    assert gpu_by_path(load(capture.close())) == {
        f"request#1/denoising_step_1_t1/{LAYER}norm": 30,
        f"request#1/denoising_step_1_t1/{LAYER}attn": 60,
    }


def test_a_node_that_is_its_own_ancestor_ends_in_a_reason(capture: Capture) -> None:
    capture.graph_node(850, 20, original=21)
    capture.graph_node(850, 21, original=20)
    write_replay(capture, 10_000, 1, (20, 21))
    (path,) = gpu_by_path(load(capture.close()))
    assert path.endswith("transformer/cannot attribute: the CUDA graph was captured before the recording began")


def test_the_thread_that_captured_may_come_later(capture: Capture) -> None:
    write_capture_phase(capture, tid=9)
    capture.graph_node(850, 20, original=10, tid=9)
    capture.graph_node(850, 21, original=11, tid=9)
    write_replay(capture, 10_000, 1, (20, 21), tid=2)
    assert gpu_by_path(load(capture.close())) == {
        f"request#1/denoising_step_1_t1/{LAYER}norm": 30,
        f"request#1/denoising_step_1_t1/{LAYER}attn": 60,
    }


def test_two_processes_may_use_the_same_node_numbers(capture: Capture) -> None:
    write_capture_phase(capture)
    capture.graph_node(850, 20, original=10)
    capture.graph_node(850, 21, original=11)
    write_replay(capture, 10_000, 1, (20, 21))
    # process 8 replays nodes with the same numbers, but captured them before the recording began
    capture.range(10_000, 10_500, "transformer", pid=8)
    correlation = capture.call(10_100, 10_120, pid=8, name="cudaGraphLaunch_v10000")
    capture.kernel(11_000, 11_025, correlation, pid=8, node=20)
    found = gpu_by_path(load(capture.close()))
    assert found["transformer/cannot attribute: the CUDA graph was captured before the recording began"] == 25
    assert found[f"request#1/denoising_step_1_t1/{LAYER}norm"] == 30


def test_captured_before_the_window(capture: Capture) -> None:
    write_replay(capture, 10_000, 1, (20, 21))
    capture.graph_node(50_000, 99)  # some other graph
    assert gpu_by_path(load(capture.close())) == {
        "request#1/denoising_step_1_t1/transformer/"
        "cannot attribute: the CUDA graph was captured before the recording began": 90
    }


def test_captured_outside_every_range(capture: Capture) -> None:
    capture.graph_node(50, 10)
    capture.graph_node(60, 20, original=10)
    write_replay(capture, 10_000, 1, (20, 20))
    (path,) = gpu_by_path(load(capture.close()))
    assert path.endswith("transformer/cannot attribute: captured outside every range (a warm-up without ranges?)")


def test_a_graph_traced_as_a_whole(capture: Capture) -> None:
    capture.range(100, 900, "transformer")
    correlation = capture.call(200, 210, name="cudaGraphLaunch_v10000")
    capture.graph_run(1000, 1500, correlation, graph=4)
    report = load(capture.close())
    (path,) = gpu_by_path(report)
    assert path == "transformer/cannot attribute: graph-level trace (record with --cuda-graph-trace=node)"
    assert {row.name: row.gpu for row in report.rows(by="module")}["transformer"] == 500


def test_no_table_of_graph_nodes(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "none.sqlite")
    write_replay(capture, 10_000, 1, (20, 21))
    capture.database.execute("DROP TABLE CUDA_GRAPH_EVENTS")
    (path,) = gpu_by_path(load(capture.close()))
    assert "cannot attribute: no CUDA graph nodes in this export" in path


def test_a_replay_inside_the_captured_block_takes_only_what_is_below(capture: Capture) -> None:
    """Blocks captured one by one: the launch already lies in the block's range."""
    capture.range(100, 900, "transformer")
    capture.range(200, 800, "transformer.blocks.0")
    capture.range(300, 400, "transformer.blocks.0.ff")
    capture.graph_node(350, 10)
    capture.graph_node(850, 20, original=10)
    capture.range(10_000, 11_000, "transformer")
    capture.range(10_100, 10_900, "transformer.blocks.0")
    capture.kernel(12_000, 12_040, capture.call(10_200, 10_210), node=20)
    assert gpu_by_path(load(capture.close())) == {
        "transformer/transformer.blocks.0/transformer.blocks.0.ff": 40,
    }


def test_work_of_a_replayed_layer_counts_as_often_as_the_graph_ran(capture: Capture) -> None:
    """Three steps replay it, the second one twice; the capture says what one call of the layer does."""
    write_capture_phase(capture)
    for layer, flops in (("norm", 30_000), ("attn", 120_000)):
        label = f"transformer.blocks.0.{layer}"
        capture.text(encoded(Entry(label, "", False, "forward", 1, (("bf16", flops),), 0, "", "cuda")))
    capture.graph_node(850, 20, original=10)
    capture.graph_node(850, 21, original=11)
    for step in (3, 4, 5):
        write_replay(capture, 10_000 * step, step, (20, 21))
    again = capture.call(40_150, 40_170, name="cudaGraphLaunch_v10000")
    capture.kernel(42_000, 42_030, again, "norm_kernel", node=20)
    capture.kernel(42_040, 42_100, again, "attn_kernel", node=21)
    report = load(capture.close(), peak=parse_peaks("bf16=4T"))
    rows = {"/".join(row.path): row for row in report.rows()}
    for step, runs in ((3, 1), (4, 2), (5, 1)):
        above = f"request#1/denoising_step_{step}_t{step}"
        norm, attn = (rows[f"{above}/{LAYER}{layer}"] for layer in ("norm", "attn"))
        assert (norm.calls, norm.flops, norm.rated) == (0, 30_000 * runs, 30 * runs)
        assert (attn.calls, attn.flops, attn.rated) == (0, 120_000 * runs, 60 * runs)
        # at 4 T/s 30,000 operations take 7.5 ns and 120,000 take 30: a quarter and half of the time
        assert attn.roof_share == 0.5
        assert attn.headroom == 30 * runs
        assert norm.roof == round(7.5 * runs)
        assert rows[above].flops == 150_000 * runs
    captured = rows[f"request#0/denoising_step_0_t999/{LAYER}attn"]
    assert (captured.calls, captured.flops, captured.rated) == (1, 0, 0), "nothing ran while it was captured"
    attn = next(row for row in report.rows(fold=True) if row.name == "transformer.blocks.*.attn")
    assert (attn.flops, attn.rated, attn.roof_share) == (480_000, 240, 0.5)
