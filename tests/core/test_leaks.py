"""A pop closes its own range and what was leaked inside it; nothing pops a range it did not push."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

import fxnvtx
from fxnvtx.ranges import label, local, pop, push

from .tools import labels, shape


def test_an_outer_pop_closes_what_was_leaked_inside():
    with fxnvtx.record() as recording:
        with fxnvtx.range("outer"):
            push(label("leaked"))
            fxnvtx.range_push("leaked too")
        assert local.stack == []
    assert shape(recording.tree()) == (("outer", (("leaked", (("leaked too", ()),)),)),)
    assert [r.leaked for r in recording.ranges] == [False, True, True]
    assert not recording.balanced


def test_a_late_pop_of_a_leaked_range_is_nothing():
    with fxnvtx.record() as recording:
        with fxnvtx.range("outer"):
            leaked = push(label("leaked"))
        with fxnvtx.range("next"):
            pop(leaked)
            assert [e.text for e in local.stack.labels] == ["next"]
            pop(leaked)
    assert labels(recording) == ["outer", "leaked", "next"]
    assert local.stack == []


def test_a_stray_pop_closes_nobody_elses_range():
    with fxnvtx.record() as recording, fxnvtx.range("mine"):
        fxnvtx.range_pop()
        fxnvtx.range_pop()
        assert [e.text for e in local.stack.labels] == ["mine"]
    assert recording.strays == 2
    assert not recording.balanced
    assert not any(r.leaked for r in recording.ranges)


def test_push_without_a_listener_pairs_with_its_pop():
    fxnvtx.range_push("unheard")
    with fxnvtx.record() as recording:
        fxnvtx.range_push("heard")
        fxnvtx.range_pop()
        fxnvtx.range_pop()  # of the one nobody heard
        assert recording.strays == 0
        fxnvtx.range_pop()
        assert recording.strays == 1
    assert labels(recording) == ["heard"]


def test_generators_that_interleave():
    @fxnvtx.range("a")
    def one():
        yield
        yield

    @fxnvtx.range("b")
    def other():
        yield
        yield

    with fxnvtx.record() as recording:
        first, second = one(), other()
        next(first)
        next(second)
        assert local.stack == []
        list(first)
        list(second)
    a, b = recording.ranges
    assert (a.label, b.label) == ("a", "b")
    assert a.start_ns < b.start_ns < a.end_ns < b.end_ns  # type: ignore[operator]
    assert shape(recording.tree()) == (("a", ()), ("b", ()))
    assert recording.balanced


def test_a_generator_abandoned_inside_a_range():
    @fxnvtx.range("g")
    def g():
        yield

    kept = []
    with fxnvtx.record() as recording:
        with fxnvtx.range("outer"):
            kept.append(g())
            next(kept[0])
        assert local.stack == []
        with fxnvtx.range("later"):
            kept.clear()
            gc.collect()
            assert [e.text for e in local.stack.labels] == ["later"]
    assert shape(recording.tree()) == (("outer", (("g", ()),)), ("later", ()))


def test_a_generator_finalized_by_another_thread_pops_nothing_there():
    @fxnvtx.range("g")
    def g():
        yield

    made = g()
    with fxnvtx.record() as recording:
        next(made)
        seen: list[Any] = []

        def finish():
            with fxnvtx.range("there"):
                made.close()
                seen.append([e.text for e in local.stack.labels])
            seen.append(list(local.stack))

        thread = threading.Thread(target=finish)
        thread.start()
        thread.join()
        assert seen == [["there"], []]
        with fxnvtx.range("here"):
            pass
        assert local.stack == []  # swept by its own thread at its next turn
    assert shape(recording.tree()) == (("g", ()), ("there", ()), ("here", ()))
    assert recording.balanced


def test_asyncio_tasks_that_interleave_leave_the_stack_clean():
    async def work(name, turns):
        with fxnvtx.range(name):
            for _ in range(turns):
                with fxnvtx.range(f"{name} turn"):
                    await asyncio.sleep(0)

    async def main():
        await asyncio.gather(*(work(f"t{i}", 1 + i % 3) for i in range(9)))

    with fxnvtx.record() as recording:
        asyncio.run(main())
        assert local.stack == []
    assert all(r.end_ns is not None for r in recording.ranges)
    assert sum(r.label in {f"t{i}" for i in range(9)} for r in recording.ranges) == 9


def test_a_cancelled_task_closes_its_range():
    async def work():
        with fxnvtx.range("cancelled"):
            await asyncio.Event().wait()

    async def main():
        task = asyncio.ensure_future(work())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert local.stack == []

    with fxnvtx.record() as recording:
        asyncio.run(main())
    assert recording.balanced
    assert labels(recording) == ["cancelled"]


@given(
    st.lists(st.one_of(st.just("push"), st.just("range_push"), st.just("range_pop"), st.integers(0, 5)), max_size=30)
)
def test_any_order_of_pushes_and_pops(steps):
    """Numbers pop the n-th entry ever pushed, again and again if it comes to that; the outer range stands."""
    opened = []
    with fxnvtx.record() as recording:
        with fxnvtx.range("outer") as outer:
            for step in steps:
                if step == "push":
                    opened.append(push(label("p")))
                elif step == "range_push":
                    fxnvtx.range_push("r")
                elif step == "range_pop":
                    fxnvtx.range_pop()
                elif step < len(opened):
                    pop(opened[step])
                assert local.stack.labels[0] is outer.label
        assert local.stack == []
    local.unnamed = []
    assert all(r.end_ns is not None for r in recording.ranges)
    (root,) = recording.tree()
    assert root.label == "outer"
    for node in root.walk():
        assert all(node.start_ns <= c.start_ns and c.end_ns <= node.end_ns for c in node.children)  # type: ignore[operator]
