"""While a torch.profiler session is on, its trace holds the ranges that a recorder keeps: names, nesting, number."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from decimal import Decimal

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule

import fxnvtx
from fxnvtx import ranges
from fxnvtx.compile.listeners import ProfilerListener, RoctxListener, chosen
from fxnvtx.ranges import emit
from fxnvtx.report import from_recording, load
from fxnvtx.report.capture.kineto import CLOCKS_NS, settled

from ..core.tools import in_process, shape


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.relu(self.lin(self.norm(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def user_annotations(prof, folder):
    """The user annotations of an exported trace as nested (label, children), and the threads they are on."""
    path = folder / "trace.json"
    prof.export_chrome_trace(str(path))
    events = json.loads(path.read_text(), parse_float=Decimal)["traceEvents"]
    shown = [e for e in events if e.get("cat") == "user_annotation" and not e["name"].startswith("ProfilerStep")]
    # of two that start together the outer one was recorded first, and ends last
    shown.sort(key=lambda e: (e["tid"], e["args"]["Ev Idx"]))
    roots: list = []
    stack: list = []
    spans = []
    for _, own in itertools.groupby(shown, key=lambda e: e["tid"]):
        spans += settled([(int(e["ts"] * 1000), int((e["ts"] + e["dur"]) * 1000)) for e in own])
    for event, (start, end) in zip(shown, spans, strict=True):
        while stack and stack[-1][0] <= start:
            stack.pop()
        assert not stack or end <= stack[-1][0]
        node: tuple[str, list] = (event["name"], [])
        (stack[-1][1] if stack else roots).append(node)
        stack.append((end, node[1]))

    def frozen(nodes):
        return tuple((name, frozen(children)) for name, children in nodes)

    return frozen(roots), {e["tid"] for e in shown}


def session():
    return profile(activities=[ProfilerActivity.CPU])


def made(how):
    torch.manual_seed(0)
    torch._dynamo.reset()
    # a name of its own: other tests' models may still be there, and classes go by names
    model = fxnvtx.instrument(Net().eval(), "profiled", path="hooks" if how == "hooks" else "auto")
    if how == "whole":
        return torch.compile(model, backend="fxnvtx")
    if how == "regional":
        for block in model.blocks:
            block.compile(backend="fxnvtx")
    return model


@pytest.mark.parametrize("how", ["hooks", "fx", "whole", "regional"])
def test_the_trace_holds_the_recorders_ranges(tmp_path, how):
    model = made(how)
    x = torch.randn(4, 8)
    with torch.no_grad():
        wanted = model(x)
        frames = dict(torch._dynamo.utils.counters["frames"])
        with fxnvtx.record() as recording, session() as prof, fxnvtx.range("request", category="request"):
            assert torch.equal(model(x), wanted)
        with session() as again:
            model(x)
        assert not emit.active
        assert torch.equal(model(x), wanted)
    assert dict(torch._dynamo.utils.counters["frames"]) == frames
    found, threads = user_annotations(prof, tmp_path)
    assert found == shape(recording.tree())
    assert "profiled.blocks.2" in str(found)
    assert len(threads) == 1
    assert threads == {r.thread_id for r in recording.ranges}
    assert user_annotations(again, tmp_path)[0] == found[0][1]


@pytest.mark.parametrize("how", ["hooks", "whole", "regional"])
def test_the_report_reads_the_trace_as_it_reads_the_recording(tmp_path, how):
    """Same rows, same numbers of calls, same nesting. The times are the trace's own, to its last digit (1 ns)."""
    model = made(how)
    x = torch.randn(4, 8)
    path = tmp_path / "trace.json"
    with torch.no_grad():
        model(x)
        with fxnvtx.record() as recording, session() as prof:
            for number in range(2):
                with fxnvtx.range(f"request#{number}", category="request"):
                    model(x)
                    model(x)
    prof.export_chrome_trace(str(path))
    recorded, traced = from_recording(recording), load(path)

    def tree(report, **options):
        return [(row.depth, row.name, row.category, row.calls, row.kind) for row in report.rows("tree", **options)]

    assert tree(traced) == tree(recorded)
    assert tree(traced, fold=True) == tree(recorded, fold=True)
    for view in ("request", "module", "range"):
        found, wanted = ({(r.name, r.category, r.calls) for r in rep.rows(view)} for rep in (traced, recorded))
        assert found == wanted, view
    document = json.loads(path.read_text(), parse_float=Decimal)
    own = [e for e in document["traceEvents"] if e.get("cat") == "user_annotation"]
    assert len(own) == len(recording.ranges)
    for row in traced.rows("range"):
        if row.calls:
            assert row.cpu == sum(int(e["dur"] * 1000) for e in own if e["name"] == row.name), row.name


@pytest.mark.parametrize("seed", range(20))
def test_a_clock_that_jumps_changes_no_nesting(seed):
    """Ranges of a random tree, longer than a jump; then some cores' clocks are ahead."""
    chance = random.Random(seed)

    def lay(depth, start):
        """(end of a range that starts there, its spans)"""
        spans, at = [], start + 5_000
        for _ in range(chance.randrange(4) if depth else 0):
            at, below = lay(depth - 1, at)
            spans += below
            at += chance.choice([0, 0, 3_000])
        return at + 5_000, [(start, at + 5_000, depth), *spans]

    spans = lay(4, 0)[1]
    assert settled([s[:2] for s in spans]) == [s[:2] for s in spans]
    jumped = [
        (s + (i > 0) * chance.choice([0, -700]), e + chance.choice([0, 900]), d) for i, (s, e, d) in enumerate(spans)
    ]
    found = []
    stack: list[int] = []
    for start, end in settled([s[:2] for s in jumped]):
        while stack and stack[-1] <= start:
            stack.pop()
        assert not stack or end <= stack[-1]
        stack.append(end)
        found.append(4 - len(stack) + 1)
    assert found == [depth for _, _, depth in spans]


def test_what_was_not_nested_stays_so():
    crossing = [(0, 50_000), (30_000, 90_000)]
    assert settled(crossing) == crossing
    for more, wanted in ((CLOCKS_NS, (30_000, 50_000)), (CLOCKS_NS + 1, (30_000, 50_000 + CLOCKS_NS + 1))):
        assert settled([(0, 50_000), (30_000, 50_000 + more)])[1] == wanted
    assert settled([(0, 50_000), (50_000 - CLOCKS_NS, 90_000)])[1] == (50_000, 90_000)
    assert settled([(0, 50_000), (49_000 - CLOCKS_NS, 90_000)])[1] == (49_000 - CLOCKS_NS, 90_000)


def test_the_operators_of_a_trace_without_our_ranges_are_read(tmp_path):
    seen = []
    for name in ("first", None, "third"):
        with session() as prof, fxnvtx.range("mine", enabled=name is not None):
            torch.ones(1).add(1)
        prof.export_chrome_trace(str(tmp_path / "trace.json"))
        rows = {row.name for row in load(tmp_path / "trace.json").rows("range")}
        seen.append(("mine" in rows, "aten::add" in rows))
    assert seen == [(True, False), (False, True), (True, False)]


def test_ranges_that_cross_are_there_with_their_own_times(tmp_path):
    @fxnvtx.range("first")
    def first():
        yield
        yield

    @fxnvtx.range("second")
    def second():
        yield
        torch.ones(2).add(1)

    with fxnvtx.record() as recording, profile(activities=[ProfilerActivity.CPU]) as prof:
        one, other = first(), second()
        next(one)
        next(other)
        list(one)
        list(other)
    path = tmp_path / "trace.json"
    prof.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    first_, second_ = (
        [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation" and e["name"] == name]
        for name in ("first", "second")
    )
    ((start, end),) = first_
    ((begin, over),) = second_
    assert start < begin < end < over
    assert [e.key for e in prof.key_averages() if e.key in {"first", "second"}]
    assert [r.label for r in recording.ranges if r.crossing] == ["first", "second"]


def test_a_range_that_a_session_cuts(tmp_path):
    with fxnvtx.range("before"):  # nobody listens yet
        prof = session()
        prof.__enter__()
        with fxnvtx.range("inside"):
            pass
        across = fxnvtx.range("across")
        across.__enter__()
        prof.__exit__(None, None, None)
        across.__exit__(None, None, None)
    assert ranges.local.stack == []
    assert not emit.active
    assert ("inside", ()) in user_annotations(prof, tmp_path)[0]


def test_a_range_that_ends_while_the_session_does_is_left_once():
    left = []

    def leave(handle):
        left.append(handle)
        handles.pop(id(outer), None)  # another thread, which had come so far when the session ended

    listener = ProfilerListener(lambda text: text, leave)
    outer, middle, inner = (ranges.Open(ranges.label(text), None, 0, 1) for text in ("outer", "middle", "inner"))
    for entry in (outer, middle, inner):
        listener.opened(entry)
    handles = listener._handles
    listener.session_over()
    assert left == ["inner", "middle"]


def test_leaks_and_exceptions_stay_nested(tmp_path):
    with session() as prof, fxnvtx.range("a"):
        with fxnvtx.range("b"):
            fxnvtx.range_push("leaked")
        with fxnvtx.range("c"):
            pass
    ranges.local.unnamed = []
    assert user_annotations(prof, tmp_path)[0] == (("a", (("b", (("leaked", ()),)), ("c", ()))),)


def test_the_windows_of_a_schedule(tmp_path):
    kept = []
    active = []
    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=1, warmup=1, active=1, repeat=2),
        on_trace_ready=lambda p: kept.append(user_annotations(p, tmp_path)[0]),
    ) as prof:
        for step in range(6):
            active.append(emit.active)
            with fxnvtx.range(f"step {step}"):
                pass
            prof.step()
    assert kept == [(("step 2", ()),), (("step 5", ()),)]
    assert active == [False, False, True] * 2


def test_off_means_off_and_torch_may_come_later():
    for mode, seen in (("off", False), ("auto", True)):
        done = in_process(
            f"""
            import os
            os.environ["FXNVTX"] = {mode!r}
            import fxnvtx, fxnvtx.ranges, sys
            assert "torch" not in sys.modules
            import torch
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
                with fxnvtx.range("mine"):
                    pass
            assert any(e.name == "mine" for e in prof.events()) is {seen}
            print("fine")
            """
        )
        assert "fine" in done.stdout, done.stderr
        assert "WARN" not in done.stderr


def test_ranges_go_to_roctx_in_a_rocm_build_only():
    watched = {"ROCP_TOOL_LIBRARIES": "librocprofiler-sdk-tool.so"}
    preloaded = {"LD_PRELOAD": "/opt/rocm/lib/librocprofiler-sdk-tool.so"}
    for hip, mode, environment, wanted in [
        (None, "on", watched, False),
        ("6.4", "auto", {}, False),
        ("6.4", "on", {}, True),
        ("6.4", "auto", watched, True),
        ("6.4", "auto", preloaded, True),
        ("6.4", "off", watched, False),
    ]:
        assert chosen(hip, mode, environment) is wanted


def test_what_roctx_would_hear_is_balanced():
    heard: list[str] = []
    listener = RoctxListener(
        heard.append,
        lambda: heard.append("pop"),
        lambda text: heard.append(f"mark {text}"),
        lambda text: heard.append(f"start {text}") or text,  # type: ignore[func-returns-value]
        lambda text: heard.append(f"end {text}"),
    )
    with fxnvtx.range("began before"):
        early = fxnvtx.range("heard by nobody")
        early.__enter__()
        ranges.add_sink(listener)
        early.__exit__(None, None, None)
        with fxnvtx.range("a"):
            fxnvtx.range_push("leaked")
        across = fxnvtx.range("across")
        across.__enter__()
        across.__exit__(None, None, None)
        with contextlib.closing(fxnvtx.range("steps")(lambda: (yield))()) as steps:
            next(steps)
            with fxnvtx.range("between"):
                pass
    ranges.remove_sink(listener)
    ranges.local.unnamed = []
    assert heard == ["a", "leaked", "pop", "pop", "across", "pop", "start steps", "between", "pop", "end steps"]
