"""`--infer-steps`: a loop that calls one model again and again is one; whatever is not evidently a loop is none."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxnvtx
from fxnvtx import ranges
from fxnvtx.integrations.everything import instrument_everything
from fxnvtx.recording import Node, Recording
from fxnvtx.recording.loops import Call, Site, Sites, inferred
from fxnvtx.recording.spool import Spool, read_spool
from fxnvtx.report import load

from .test_cli import fxnvtx as command
from .test_cli import one_line_error

net = nn.Sequential(nn.Linear(4, 4))
other = nn.Linear(4, 4)
x = torch.ones(1, 4)


@pytest.fixture
def shown(tmp_path: Path) -> Callable[[Callable[[], Any]], list[Any]]:
    """Runs a function as a launched program would run, and gives its recording's tree."""

    def run(program: Callable[[], Any]) -> list[Any]:
        spool = Spool(tmp_path, True, None, Sites())
        with instrument_everything(depth=0):
            ranges.add_sink(spool)
            try:
                program()
            finally:
                ranges.remove_sink(spool)
                spool.write()
        (path,) = tmp_path.iterdir()
        return tree(read_spool(path))

    return run


def tree(recording: Recording) -> list[Any]:
    assert recording.balanced

    def short(node: Node) -> Any:
        below = [short(child) for child in node.children]
        return (node.label.removesuffix(" (inferred)"), below) if below else node.label

    return [short(node) for node in recording.tree()]


def steps(*bodies: list[Any]) -> list[Any]:
    return [(f"step_{number}", body) for number, body in enumerate(bodies)]


def p_sample(x: Any) -> Any:
    return net(x)


def generated(n: int) -> Iterator[Any]:
    for _ in range(n):
        yield p_sample(x)


def p_sample_loop(n: int) -> None:
    """As in guided-diffusion, DiT and their descendants: a generator, with two functions below it."""
    for _ in generated(n):
        pass


def guided(n: int) -> None:
    for _ in range(n):
        a = net(x)
        b = net(x)
        [net(y) for y in (a, b)]
        other(x)


def runge_kutta(n: int) -> None:
    """Like torchdiffeq: the loop over stages lies inside the one over steps."""

    def step() -> None:
        for _ in range(4):
            net(x)

    for _ in range(n):
        step()


def fixed_grid(n: int, stages: int) -> None:
    """Like torchdiffeq's euler, heun and rk4: a step is a function, its stages are lines of it."""

    def func(x: Any) -> Any:
        return net(x)

    def _step_func(stages: int) -> None:
        func(x)
        if stages > 1:
            func(x)
        if stages > 2:
            func(func(x))

    for _ in range(n):
        _step_func(stages)


def adaptive(*taken: int) -> None:
    """Like torchdiffeq's dopri5: for every point in time as many steps as it takes, each a loop over its stages."""

    def _runge_kutta_step() -> None:
        for _ in range(6):
            net(x)

    def _advance(count: int) -> None:
        while count:
            _runge_kutta_step()
            count -= 1

    net(x)
    for count in taken:
        _advance(count)


def edm(n: int) -> None:
    """Heun's method as EDM samples with it: the last step has no correction."""
    for number in range(n):
        net(x)
        if number < n - 1:
            net(x)


def images(n: int) -> None:
    for _ in range(n):
        for _ in range(4):
            net(x)
        other(x)


MODEL = "Sequential"


def test_the_loops_of_samplers(shown: Any) -> None:
    def program() -> None:
        other(x)
        for _ in range(2):
            p_sample_loop(3)
        guided(3)
        runge_kutta(5)
        net(x)

    gen = ("loop in generated", steps(*[[MODEL]] * 3))
    cfg = ("loop in guided", steps(*[[*[MODEL] * 4, "Linear"]] * 3))
    ode = ("loop in runge_kutta", steps(*[[MODEL] * 4] * 5))
    assert shown(program) == ["Linear", gen, gen, cfg, ode, MODEL]


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("n", [2, 5, 20])
def test_the_steps_of_solvers_on_a_grid(shown: Any, n: int, stages: int) -> None:
    assert shown(lambda: fixed_grid(n, stages)) == [("loop in fixed_grid", steps(*[[MODEL] * stages] * n))]


@pytest.mark.parametrize("taken", [(4,), (2, 2), (2, 3), (5, 2, 2, 7), (1, 0, 1, 1), (3, 0, 2)])
def test_the_steps_of_adaptive_solvers(shown: Any, taken: tuple[int, ...]) -> None:
    found = shown(lambda: adaptive(*taken))
    if max(taken) == 1:
        loops = [("loop in adaptive", steps(*[[MODEL] * 6] * sum(taken)))]
    else:
        loops = [("loop in adaptive.<locals>._advance", steps(*[[MODEL] * 6] * count)) for count in taken if count]
    if sys.version_info < (3, 11):  # functions go by their last name there
        loops = [(text.replace("adaptive.<locals>.", ""), below) for text, below in loops]
    assert found == [MODEL, *loops]


@pytest.mark.parametrize("taken", [(1, 2), (1, 3, 2, 1), (1,)])
def test_where_steps_are_not_evident_there_are_calls(shown: Any, taken: tuple[int, ...]) -> None:
    assert shown(lambda: adaptive(*taken)) == [MODEL] * (1 + 6 * sum(taken))


def test_a_last_step_without_correction(shown: Any) -> None:
    assert shown(lambda: edm(4)) == [("loop in edm", steps(*[[MODEL] * 2] * 3, [MODEL]))]


def test_few_steps_for_many_images_are_the_steps(shown: Any) -> None:
    assert shown(lambda: images(6)) == [("loop in images", steps(*[[MODEL]] * 4)), "Linear"] * 6


def test_what_is_no_loop(shown: Any) -> None:
    def twice(x: Any) -> Any:
        return net(net(x))

    def deeper(n: int) -> None:
        net(x)
        if n:
            deeper(n - 1)

    def program() -> None:
        twice(x)
        net(x)
        p_sample(x)
        p_sample(x)
        deeper(4)
        for _ in range(1):
            net(x)
        for model in (net, other):  # not one model
            model(x)
        for size in (1, 2, 3):  # not the same shapes
            net(torch.ones(size, 4))
        with fxnvtx.range("mine", category="request"):  # the program says what its parts are
            for _ in range(2):
                net(x)

    mine = ("mine", [MODEL] * 2)
    assert shown(program) == [*[MODEL] * 12, "Linear", *[MODEL] * 3, mine]


def test_iterations_with_other_shapes_are_left_out(shown: Any) -> None:
    def program() -> None:
        for size in (2, 2, 2, 1):
            net(torch.ones(size, 4))

    assert [item if isinstance(item, str) else len(item[1]) for item in shown(program)] == [3, MODEL]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=5))
def test_loops_one_after_the_other(loops: list[tuple[int, int]]) -> None:
    """Real stacks, of functions that are written for the occasion: `n` iterations of `k` calls each."""
    lines = ["def program(call):"]
    for n, k in loops:
        lines += [f"    for _ in range({n}):", *["        call()"] * k]
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    sites = Sites()
    calls: list[Call] = []

    def call() -> None:
        site = sites.here()
        assert site is not None
        calls.append(Call("net", 1, len(calls), len(calls), Site("", site.frames)))

    names["program"](call)
    found = [[len(iteration) for iteration in loop.iterations] for loop in inferred(calls)]
    assert found == [[k] * n for n, k in loops if n > 1]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(2, 20), st.integers(0, 2), st.integers(0, 2))
def test_loops_inside_loops_of_one_function(rounds: int, inner: int, before: int, after: int) -> None:
    """Other models around the inner loop: it holds the steps, but where it looks like passes of guidance."""
    body = ["    for _ in range(rounds):", *["        call('other')"] * before]
    body += ["        for _ in range(inner):", "            if inner:", "                call('net')"]
    body += ["        call('other')"] * after
    names: dict[str, Any] = {}
    exec("\n".join(["def program(call, rounds, inner):", *body]), names)
    sites = Sites()
    calls: list[Call] = []

    def call(label: str) -> None:
        site = sites.here()
        assert site is not None
        calls.append(Call(label, 1, len(calls), len(calls), Site("", site.frames)))

    names["program"](call, rounds, inner)
    found = [[len(iteration) for iteration in loop.iterations] for loop in inferred(calls)]
    if not before + after:  # nothing tells where one ends and the next begins
        assert found == [[1] * (rounds * inner)]
    elif inner <= 3 and inner <= rounds:
        assert found == [[before + inner + after] * rounds]
    else:
        assert found == [[1] * inner] * rounds


def test_nothing_is_kept_alive_and_a_debugger_goes_first() -> None:
    sites = Sites()
    kept: list[Any] = []

    def function() -> None:
        local = torch.ones(1)
        kept.append(weakref.ref(local))
        assert sites.here() is not None
        assert sys._getframe().f_trace is not None

    function()
    assert kept[0]() is None

    def tracer(frame: Any, event: str, arg: Any) -> Any:
        events.append(event)
        return None

    events: list[str] = []
    before = sys.gettrace()
    sys.settrace(None)
    try:
        here = sites.here()
        sys.settrace(tracer)
        during = sites.here()
        line = 1  # an event for the marked frame, which says nothing
        sys.settrace(None)
        mine = sys._getframe()
        mine.f_trace = tracer
        after = sites.here()
    finally:
        sys.settrace(before)
        sys._getframe().f_trace = None
    assert here is not None
    assert during is None
    assert after is not None
    assert after.frames[-1].number != here.frames[-1].number, "a frame that a debugger has claimed is passed over"
    assert set(events) == {"call"}
    assert line == 1


SCRIPT = """
import torch
net = torch.nn.Sequential(torch.nn.Linear(4, 4))
def sample():
    for _ in range(3):
        net(torch.ones(1, 4))
sample()
"""


def test_the_option(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    assert command("-o", "plain", "script.py", cwd=tmp_path).returncode == 0
    assert command("-o", "steps", "--infer-steps", "script.py", cwd=tmp_path).returncode == 0
    plain, found = (Recording.load(tmp_path / name / "recording.json") for name in ("plain", "steps"))
    assert tree(plain) == [(MODEL, ["0"])] * 3
    assert tree(found) == [("loop in sample", steps(*[[(MODEL, ["0"])]] * 3))]
    loop = found.ranges[0]
    assert (loop.label, loop.category, loop.payload) == ("loop in sample (inferred)", "loop", 3)
    inside = [r for r in found.ranges if r.category == "step"]
    assert [(r.label, r.payload) for r in inside] == [(f"step_{i} (inferred)", i) for i in range(3)]
    rows = [row for row in load(tmp_path / "steps").rows("step") if row.kind != "summary"]
    assert sum(row.calls for row in rows if "inferred" in row.name) == 3
    refused = command("--infer-steps", "--stages-only", "script.py", cwd=tmp_path)
    assert "--infer-steps reads the calls of models" in one_line_error(refused)
