"""Work that a thread leaves and comes back to: each task shows its own tree, whatever runs in between."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import os
import subprocess
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxnvtx
from fxnvtx.ranges import local
from fxnvtx.recording.spool import Spool, read_spool
from fxnvtx.report.capture.recording import read_recording

from ..support import nvtx_tap
from ..support.limits import CHILD_S
from .tasks_app import KINDS, PROGRAM, expected, pause, run, together
from .tools import shape
from .with_bodies import wrong

APP = "tests.core.tasks_app"
ROOT = Path(__file__).parents[2]

nodes: st.SearchStrategy[Any] = st.recursive(
    st.tuples(st.sampled_from(KINDS), st.just([])),
    lambda below: st.tuples(st.sampled_from(KINDS), st.lists(below, max_size=3)),
    max_leaves=8,
)


def step_all(program, data):
    """Run the tasks of a program step by step in the drawn order, each in a context of its own."""
    tasks = [(run(node, str(number)), contextvars.copy_context()) for number, node in enumerate(program)]
    while tasks:
        index = data.draw(st.integers(0, len(tasks) - 1))
        task, context = tasks[index]
        try:
            context.run(task.send, None)
        except StopIteration:
            del tasks[index]
        yield


def lie_inside(nodes):
    for node in nodes:
        assert all(node.start_ns <= c.start_ns and c.end_ns <= node.end_ns for c in node.children)
        lie_inside(node.children)


@settings(max_examples=60, deadline=None)
@given(st.lists(nodes, min_size=1, max_size=4), st.booleans(), st.data())
def test_any_interleaving(program, enclosed, data):
    around = fxnvtx.range("outer", enabled=enclosed)
    with fxnvtx.record() as recording:
        with around:
            for _ in step_all(program, data):
                assert len(local.stack) == enclosed
        assert local.stack == []
    tree = recording.tree()
    lie_inside(tree)
    if enclosed:
        (outer,) = tree
        assert outer.label == "outer"
        tree = outer.children
    wanted = [expected(node, str(number)) for number, node in enumerate(program)]
    assert sorted(shape(tree)) == sorted(wanted)
    assert recording.balanced


@pytest.fixture(scope="module")
def recorded():
    with fxnvtx.record() as recording:
        asyncio.run(together(PROGRAM))
    assert recording.balanced
    return recording


def test_tasks_lie_in_what_started_them(recorded, tmp_path):
    (everything,) = recorded.tree()
    assert everything.label == "all"
    wanted = [expected(node, str(number)) for number, node in enumerate(PROGRAM)]
    assert sorted(shape(everything.children)) == sorted(wanted)
    assert [r.depth for r in recorded.ranges][:2] == [0, 1]
    loaded = fxnvtx.Recording.load(recorded.save(tmp_path / "r.json"))
    assert loaded.ranges == recorded.ranges


def test_a_spool_has_the_same_tree(recorded, tmp_path):
    spool = Spool(tmp_path, first=True)
    fxnvtx.ranges.add_sink(spool)
    try:
        asyncio.run(together(PROGRAM))
    finally:
        fxnvtx.ranges.remove_sink(spool)
    spool.write()
    assert spool.path is not None
    kept = read_spool(spool.path)
    assert kept.balanced

    def sorted_shape(tree):
        return sorted((label, sorted_shape(children)) for label, children in tree)

    assert sorted_shape(shape(kept.tree())) == sorted_shape(shape(recorded.tree()))


def paths(root):
    """Calls by path of a report's tree."""
    return Counter({tuple(n.text for n in node.path()): node.calls for node in root.walk() if node.calls})


def in_process(listener, output, **environment):
    command = [sys.executable, "-m", APP, listener, str(output)]
    clean = {k: v for k, v in os.environ.items() if k not in {"FXNVTX", "NVTX_DISABLE", "NVTX_INJECTION64_PATH"}}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**clean, **environment}, timeout=CHILD_S, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_arrives_at_a_tool(recorded, tmp_path):
    library = nvtx_tap.build(tmp_path)
    if library is None:
        pytest.skip("no C compiler on the PATH to build the NVTX tool with")
    log = tmp_path / "log"
    in_process("tool", "-", NVTX_INJECTION64_PATH=str(library), NVTX_TAP_LOG=str(log))
    stream = nvtx_tap.read(log)
    assert stream.open == {} and stream.stray == 0
    assert stream.crossing_open == set()
    assert Counter(stream.crossing) == Counter(r.label for r in recorded.ranges if r.crossing)
    assert Counter(p[0] for p in stream.pushed) == Counter(r.label for r in recorded.ranges if not r.crossing)


def test_the_report_shows_them_beside_the_tree(recorded):
    part = read_recording(recorded)
    crossing = sum(1 for r in recorded.ranges if r.crossing)
    assert crossing > 20
    shown = sum(node.calls for node in part.side.root.walk())
    assert crossing > shown > 20  # but for "all", which is around everything
    assert shown + sum(paths(part.tree.root).values()) == len(recorded.ranges)
    assert ("all",) in paths(part.tree.root)


@settings(max_examples=40, deadline=None)
@given(st.lists(nodes, min_size=1, max_size=3))
def test_tasks_one_after_the_other_are_a_tree_in_the_report(program):
    with fxnvtx.record() as recording:
        for number, node in enumerate(program):
            made = run(node, str(number))
            with contextlib.suppress(StopIteration):
                while True:
                    made.send(None)
    part = read_recording(recording)
    assert not part.side.root.children
    assert paths(part.tree.root) == calls_by_path(recording.tree())


def calls_by_path(tree, above=()):
    found: Counter[tuple[str, ...]] = Counter()
    for node in tree:
        path = (*above, node.label)
        found[path] += 1
        found.update(calls_by_path(node.children, path))
    return found


@pytest.mark.parametrize("fail", [False, True])
def test_an_async_forward_is_covered_whole(fail):
    class Async(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)

        async def forward(self, x):
            x = self.a(x)
            await pause()
            if fail:
                raise ValueError
            return self.b(x)

    model = fxnvtx.instrument(Async(), "m")
    with fxnvtx.record() as recording:
        first, second = model(torch.zeros(1, 4)), model(torch.zeros(1, 4))
        contexts = [contextvars.copy_context() for _ in range(2)]
        for made, context in zip((first, second), contexts, strict=True):
            context.run(made.send, None)
        for made, context in zip((first, second), contexts, strict=True):
            with pytest.raises(ValueError if fail else StopIteration):
                context.run(made.send, None)
    inside = (("m.a", ()),) if fail else (("m.a", ()), ("m.b", ()))
    assert shape(recording.tree()) == (("m", inside),) * 2
    assert recording.balanced


def test_switching_off_while_an_async_forward_waits_lets_it_go_on():
    class Async(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        async def forward(self, x):
            await pause()
            return self.a(x)

    model = fxnvtx.instrument(Async(), "m")
    with fxnvtx.record() as recording:
        made = model(torch.zeros(1, 4))
        made.send(None)
        fxnvtx.set_enabled(model, False)
        with pytest.raises(StopIteration):
            made.send(None)
        model.a(torch.zeros(1, 4))
    assert shape(recording.tree()) == (("m", (("m.a", ()),)),)


def test_one_range_object_in_many_tasks():
    shared = fxnvtx.range("shared")

    async def task(turns):
        with shared:
            for _ in range(turns):
                await asyncio.sleep(0)
            with shared:
                pass

    async def main():
        await asyncio.gather(*(task(n) for n in (3, 1, 2)))

    with fxnvtx.record() as recording, shared:
        asyncio.run(main())
    assert shape(recording.tree()) == (("shared", (("shared", (("shared", ()),)),) * 3),)
    assert recording.balanced


def test_a_recorder_that_comes_or_goes_meanwhile():
    async def task(name):
        with fxnvtx.range(name):
            await pause()
            with fxnvtx.range(f"{name} inside"):
                pass
            await pause()

    context = contextvars.copy_context()
    early = task("early")
    context.run(early.send, None)  # nobody listens
    with fxnvtx.record() as first:
        context.run(early.send, None)
        late, other = task("late"), contextvars.copy_context()
        other.run(late.send, None)
    for made, where in ((early, context), (late, other), (late, other)):
        try:
            where.run(made.send, None)
        except StopIteration:
            pass
    assert shape(first.tree()) == (("early inside", ()), ("late", ()))
    assert [r.end_ns for r in first.ranges if r.label == "late"] == [None]  # as it was when the recorder stopped
    assert local.stack == []


def test_a_thread_that_is_given_the_context():
    async def main():
        async with fxnvtx.range("request"):
            await asyncio.to_thread(work)

    def work():
        with fxnvtx.range("there"):
            assert threading.current_thread() is not threading.main_thread()

    with fxnvtx.record() as recording:
        asyncio.run(main())
    assert shape(recording.tree()) == (("request", (("there", ()),)),)


def test_which_with_statements_are_left():
    assert wrong() == []


@pytest.mark.skipif(not hasattr(inspect, "markcoroutinefunction"), reason="Python 3.12")
def test_a_function_that_is_called_a_coroutine_function():
    def waits():
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_result, 5)
        return future

    async def main():
        return await fxnvtx.range("marked")(inspect.markcoroutinefunction(waits))()  # type: ignore[attr-defined]

    with fxnvtx.record() as recording:
        assert asyncio.run(main()) == 5
    assert shape(recording.tree()) == (("marked", ()),)


class Big:
    pass


async def coroutine(kept):
    kept.append(weakref.ref(big := Big()))
    await pause()
    del big


def generator(kept):
    kept.append(weakref.ref(big := Big()))
    yield
    del big


async def asyncgen(kept):
    kept.append(weakref.ref(big := Big()))
    yield
    del big


@pytest.mark.parametrize("function", [coroutine, generator, asyncgen])
def test_what_an_exception_is_thrown_into_is_freed_at_once(function):
    """A cancelled request's tensors do not wait for the garbage collector."""
    kept: list[Any] = []

    def throw():
        made = fxnvtx.range("thrown into")(function)(kept)
        if function is asyncgen:
            with pytest.raises(StopIteration):
                made.asend(None).send(None)
            made.athrow(ValueError()).send(None)
        else:
            made.send(None)
            made.throw(ValueError())

    gc.collect()
    gc.disable()
    try:
        with fxnvtx.record():
            try:
                throw()
            except ValueError:
                pass
            assert [reference() for reference in kept] == [None]
    finally:
        gc.enable()
