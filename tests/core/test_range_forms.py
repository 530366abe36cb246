"""range() as a context manager and as a decorator: it closes what it opened, whatever happens in between."""

from __future__ import annotations

import asyncio
import inspect
import threading

import pytest

import fxnvtx
from fxnvtx.ranges import local

from .tools import labels, shape


class Stop(BaseException):
    pass


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, Stop])
def test_an_exception_closes_every_range(kind):
    with fxnvtx.record() as recording:
        with pytest.raises(kind), fxnvtx.range("a"), fxnvtx.range("b"):
            raise kind
        assert local.stack == []
    assert shape(recording.tree()) == (("a", (("b", ()),)),)
    assert recording.balanced


def test_one_object_can_be_entered_again():
    again = fxnvtx.range("r")
    with fxnvtx.record() as recording, again, again, again:
        pass
    assert shape(recording.tree()) == (("r", (("r", (("r", ()),)),)),)
    assert recording.balanced


def test_one_object_shared_by_threads_closes_the_right_range():
    """The newest entry may belong to a thread that entered while nobody listened."""
    shared = fxnvtx.range("shared")
    entered, leave = threading.Event(), threading.Event()

    def silent():
        with shared:
            entered.set()
            leave.wait(30)

    with fxnvtx.record() as recording:
        shared.__enter__()
    thread = threading.Thread(target=silent)  # enters after the recorder has gone
    thread.start()
    entered.wait(30)
    shared.__exit__(None, None, None)
    assert local.stack == []
    leave.set()
    thread.join()
    assert local.stack == []
    assert labels(recording) == ["shared"]


def test_many_threads_share_one_object():
    shared = fxnvtx.range("shared")
    stacks = []

    def work():
        for _ in range(2000):
            with shared, shared:
                pass
        stacks.append(list(local.stack))

    with fxnvtx.record() as recording:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert stacks == [[]] * 8
    assert recording.balanced
    assert len(recording.ranges) == 8 * 4000
    assert {r.depth for r in recording.ranges} == {0, 1}


def test_a_decorated_function_keeps_its_face():
    @fxnvtx.range("f")
    def f(x: int, *, y: int = 2) -> int:
        """Doc."""
        return x + y

    assert (f.__name__, f.__doc__) == ("f", "Doc.")
    assert str(inspect.signature(f)) == "(x: 'int', *, y: 'int' = 2) -> 'int'"
    with fxnvtx.record() as recording:
        assert f(1, y=3) == 4
        with pytest.raises(TypeError):
            f()  # type: ignore[call-arg]
    assert labels(recording) == ["f", "f"]
    assert recording.balanced


def test_enabled_false_costs_nothing_and_emits_nothing():
    def f():
        return 1

    assert fxnvtx.range("f", enabled=False)(f) is f
    assert fxnvtx.maybe_nvtx_range("f", enabled=False)(f) is f
    with fxnvtx.record() as recording, fxnvtx.range("x", enabled=False), fxnvtx.maybe_nvtx_range("y", False):
        pass
    assert recording.ranges == []


def test_decorated_coroutine():
    @fxnvtx.range("c")
    async def c():
        with fxnvtx.range("inside"):
            await asyncio.sleep(0)
        return 7

    assert inspect.iscoroutinefunction(c)
    with fxnvtx.record() as recording:
        assert asyncio.run(c()) == 7
    assert shape(recording.tree()) == (("c", (("inside", ()),)),)


def test_decorated_generator_keeps_its_protocol():
    @fxnvtx.range("g")
    def g():
        try:
            got = yield 1
            yield got
        except ValueError:
            yield "caught"
        return "end"

    assert inspect.isgeneratorfunction(g)
    with fxnvtx.record() as recording:
        made = g()
        assert recording.ranges == []  # a generator does nothing until it is asked
        assert next(made) == 1
        assert made.send(5) == 5
        assert made.throw(ValueError) == "caught"
        with pytest.raises(StopIteration) as stop:
            next(made)
        assert stop.value.value == "end"
    assert labels(recording) == ["g"]
    assert recording.balanced


def test_decorated_async_generator_keeps_its_protocol():
    @fxnvtx.range("ag")
    async def ag():
        with fxnvtx.range("inside"):
            try:
                got = yield 1
                yield got
            except ValueError:
                yield "caught"

    async def use():
        made = ag()
        return [await made.asend(None), await made.asend(5), await made.athrow(ValueError), [i async for i in made]]

    async def abandon():
        made = ag()
        await made.asend(None)
        await made.aclose()

    assert inspect.isasyncgenfunction(ag)
    with fxnvtx.record() as recording:
        assert asyncio.run(use()) == [1, 5, "caught", []]
        asyncio.run(abandon())
        assert local.stack == []
    assert shape(recording.tree()) == (("ag", (("inside", ()),)),) * 2
    assert recording.balanced


def test_a_generator_closed_half_way_closes_its_range():
    @fxnvtx.range("g")
    def g():
        yield 1
        yield 2

    with fxnvtx.record() as recording:
        made = g()
        next(made)
        made.close()
        assert local.stack == []
        for _ in g():
            break  # the loop drops it, CPython closes it at once
        assert local.stack == []
    assert recording.balanced
    assert len(recording.ranges) == 2
