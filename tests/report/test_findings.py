"""Each rule: a capture in which it must speak, one in which it must not, one that does not hold enough to say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from fxnvtx.cli import cli
from fxnvtx.recording import Entry, Range, encoded
from fxnvtx.report import Report, from_recording, load
from fxnvtx.report.findings import RULES, Finding, Silence, findings, findings_text
from fxnvtx.report.work import parse_peaks

from .captures import DATA, Capture
from .samples import pipeline, recorded

MS = 1_000_000


def steps(times: list[int], inside: Callable[[int, int], list[Range]] = lambda index, start: []) -> Report:
    """A request with steps of these times (ms); `inside` gives the ranges of a step that starts at a time."""
    ranges, now = [], 0
    for index, time in enumerate(times):
        ranges.append(Range(f"denoising_step_{index}_t0", "step", None, 1, 1, now, now + time * MS))
        ranges += inside(index, now)
        now += time * MS
    ranges.append(Range("request#0", "request", None, 1, 0, 0, now))
    return from_recording(recorded(ranges))


def device(path: Path, gap: int = 0, busy: int = 1000, copy: int = 0, outside: int = 0) -> Report:
    """Twenty kernels of a layer, with idle time before each, and a copy."""
    capture = Capture(path)
    at = 100_000
    capture.range(0, 20_000, "net")
    for number in range(20):
        capture.kernel(at, at + busy, capture.call(100 * number, 100 * number + 50))
        at += busy + gap
    if copy:
        capture.copy(at, at + copy, capture.call(5000, 5010), 10)
    if outside:
        capture.kernel(at + copy, at + copy + outside, capture.call(30_000, 30_010))
    return load(capture.close())


def offloaded(hidden: bool) -> Report:
    """Half of a request passes while weights come; hidden: another thread computes meanwhile."""
    ranges = [
        Range("request#0", "request", None, 1, 0, 0, 100),
        Range("residency.load dit", "residency", 1024, 1, 1, 0, 50),
    ]
    if hidden:
        ranges.append(Range("vae", "module", None, 2, 0, 0, 50))
    return from_recording(recorded(ranges))


def guided(share: int) -> Report:
    return steps(
        [10] * 4,
        lambda index, start: [
            Range("predict_noise.unconditional", "op", None, 1, 2, start, start + share * MS // 10),
        ],
    )


def compiling(step: int) -> Report:
    return steps(
        [10] * 4, lambda index, start: [Range("compile", "compile", None, 1, 2, start, start + MS)] * (index == step)
    )


def ranks(folder: Path, scale: float) -> Report:
    paths = [
        pipeline(folder / f"rank{rank}.sqlite", scale=scale if rank else 1.0, requests=1).close() for rank in range(2)
    ]
    return load(*paths)


def working(path: Path, length: int) -> Report:
    """A layer whose work takes the device 1,000 ns at best, and took `length`."""
    capture = Capture(path)
    capture.text(encoded(Entry("net", "", False, "forward", 1, (("bf16", 10**6),), 10, "", "cuda")))
    capture.range(0, 20_000, "net")
    capture.kernel(1_000, 1_000 + length, capture.call(100, 200))
    return load(capture.close(), peak=parse_peaks("bf16=1T,mem=1T"))


def waiting(path: Path, communication: int = 0, wait: int = 0, call: int = 100, allocated: int | None = None) -> Report:
    """Two steps of 20 us with a layer each, and what it launches. allocated: in which step something is."""
    capture = Capture(path)
    for step in range(2):
        at = 20_000 * step
        capture.range(at, at + 20_000, f"denoising_step_{step}_t0", "step")
        capture.range(at, at + 20_000, "net")
        capture.kernel(at + 30_000, at + 31_000, capture.call(at, at + call))
        if communication:
            capture.kernel(
                at + 30_900, at + 30_900 + communication, capture.call(at + 1000, at + 1100), "ncclDevKernel_AllReduce",
                stream=8,
            )  # fmt: skip
        if wait:
            capture.call(at + 2000, at + 2000 + wait, name="cudaStreamSynchronize_v3020")
        if allocated == step:
            capture.memory(at + 3000, capture.call(at + 3000, at + 3010, name="cudaMalloc_v3020"), 1 << 20)
    return load(capture.close())


CASES: dict[str, tuple[Callable[[Path], Report], Callable[[Path], Report], Callable[[Path], Report]]] = {
    "first_step": (lambda p: steps([40, 10, 10, 11]), lambda p: steps([14, 10, 10, 11]), lambda p: steps([40, 10, 10])),
    "uneven_steps": (
        lambda p: steps([9] + [10] * 12 + [50]),
        lambda p: steps([90] + [10] * 12 + [19]),
        lambda p: steps([10] * 10),
    ),
    "late_compilation": (lambda p: compiling(2), lambda p: compiling(0), lambda p: steps([10])),
    "launch_bound": (
        lambda p: device(p / "x.sqlite", gap=400),
        lambda p: device(p / "x.sqlite", gap=100),
        lambda p: steps([1]),
    ),
    "idle_gaps": (
        lambda p: device(p / "x.sqlite", gap=400),
        lambda p: device(p / "x.sqlite", gap=10),
        lambda p: steps([1]),
    ),
    "residency_waits": (lambda p: offloaded(False), lambda p: offloaded(True), lambda p: steps([1])),
    "copies": (
        lambda p: device(p / "x.sqlite", copy=2000),
        lambda p: device(p / "x.sqlite", copy=500),
        lambda p: steps([1]),
    ),
    "guidance": (lambda p: guided(50), lambda p: guided(10), lambda p: offloaded(False)),
    "rank_skew": (lambda p: ranks(p, 1.5), lambda p: ranks(p, 1.02), lambda p: steps([1])),
    "exposed_communication": (
        lambda p: waiting(p / "x.sqlite", communication=900),
        lambda p: waiting(p / "x.sqlite", communication=100),
        lambda p: waiting(p / "x.sqlite"),
    ),
    "waits": (
        lambda p: waiting(p / "x.sqlite", wait=900),
        lambda p: waiting(p / "x.sqlite", wait=100),
        lambda p: steps([1]),
    ),
    "slow_launches": (
        lambda p: waiting(p / "x.sqlite", call=15_000),
        lambda p: waiting(p / "x.sqlite", call=9_000),
        lambda p: steps([1]),
    ),
    "late_allocation": (
        lambda p: waiting(p / "x.sqlite", allocated=1),
        lambda p: waiting(p / "x.sqlite", allocated=0),
        lambda p: waiting(p / "x.sqlite"),
    ),
    "unattributed": (
        lambda p: device(p / "x.sqlite", outside=9000),
        lambda p: device(p / "x.sqlite", outside=500),
        lambda p: steps([1]),
    ),
    "far_below_the_roof": (
        lambda p: working(p / "x.sqlite", 5000),
        lambda p: working(p / "x.sqlite", 1500),
        lambda p: steps([1]),
    ),
    "above_the_roof": (
        lambda p: working(p / "x.sqlite", 500),
        lambda p: working(p / "x.sqlite", 1500),
        lambda p: steps([1]),
    ),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_speaks_is_silent_and_cannot_say(rule: Callable[[Report], object], tmp_path: Path) -> None:
    speaks, quiet, lacking = CASES[rule.__name__]
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    found = rule(speaks(tmp_path / "a"))
    assert isinstance(found, Finding), found
    assert found.rule == rule.__name__
    assert found.ns > 0
    assert found.evidence
    assert list(found.evidence) == sorted(found.evidence, key=lambda item: -item[1])
    assert rule(quiet(tmp_path / "b")) is None
    silence = rule(lacking(tmp_path / "c"))
    assert isinstance(silence, Silence), silence
    assert silence.why
    assert rule.__doc__, "its condition"


def test_figures_are_right_to_the_digit(tmp_path: Path) -> None:
    found, _ = findings(steps([40, 10, 10, 11]))
    (first,) = found
    assert first.ns == 30 * MS
    assert first.evidence == (("denoising_step_0_t0", 40 * MS), ("median of the others", 10 * MS))
    found, _ = findings(device(tmp_path / "x.sqlite", gap=400))
    assert [(finding.rule, finding.ns, finding.evidence) for finding in found] == [
        ("launch_bound", 19 * 400, (("net", 19 * 400),)),
        ("idle_gaps", 400, (("net, before kernel", 400),) * 3),
    ]
    found, _ = findings(offloaded(False))
    assert [(finding.rule, finding.ns) for finding in found] == [("residency_waits", 50)]


def test_the_largest_comes_first_and_what_is_unsaid_last() -> None:
    text = findings_text(steps([40, 10, 10, 11]))
    assert text.startswith("1. the first step takes 4.0x a usual one")
    assert text.splitlines()[-1].startswith("not enough in this capture to say: ")
    assert "launch_bound (no device work)" in text


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("h100_2gpu_slice.sqlite", ["copies", "waits", "unattributed"]),
        ("mfu_2gpu_slice.sqlite", ["waits", "exposed_communication"]),
    ],
)
def test_real_captures(name: str, rules: list[str]) -> None:
    """Read by hand: the first one loads weights from the host, for which .item() waits; its launching calls are slow
    because the queue is full, which is no fault. The second one computes, but ten copies of a number to the device wait
    for it, and its all-to-alls run beside nothing."""
    found, silent = findings(load(DATA / name))
    assert [finding.rule for finding in found] == rules
    assert {item.rule for item in silent} >= {"first_step", "residency_waits", "guidance"}


def test_the_command(tmp_path: Path) -> None:
    path = pipeline(tmp_path / "p.sqlite").close()
    done = CliRunner().invoke(cli, ["report", str(path), "--findings"], env={"COLUMNS": "120"})
    assert done.exit_code == 0
    assert done.output.startswith("1. ")
    assert "request#*" in done.output, "the table follows"
    done = CliRunner().invoke(cli, ["report", str(path), "--findings", "--format", "json"])
    document = json.loads(done.output)
    assert [item["rule"] for item in document["findings"]] == [item.rule for item in findings(load(path))[0]]
    assert document["unsaid"]
