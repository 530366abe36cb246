"""Whatever happens in the middle of a forward, the stack is afterwards as it was, and the next run is whole."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxnvtx
from fxnvtx.modules.call_slot import SLOT
from fxnvtx.ranges import label, local, push

from . import zoo
from .test_soundness_forms import x
from .tools import equal, run_recorded, shape

SIZE = 21  # ranges of one run of the model below


class Stop(BaseException):
    pass


class Deciding(nn.Module):
    """Cannot be traced, calls traceable ones."""

    def __init__(self):
        super().__init__()
        self.inner = zoo.Straight()
        self.loop = zoo.Loop()

    def forward(self, x):
        if x.shape[0] > 100:
            return x
        return self.loop(self.inner(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.GELU())
        self.mid = Deciding()
        self.tail = zoo.Loop()
        self.shared = self.mid.inner

    def forward(self, x):
        return self.shared(self.tail(self.mid(self.stem(x))))


ERRORS = (ValueError, Stop, KeyboardInterrupt, GeneratorExit, StopIteration)
PATHS = pytest.mark.parametrize("path", ["hooks", "auto"])


@pytest.fixture(params=["hooks", "auto"])
def model(request):
    torch.manual_seed(0)
    made = fxnvtx.instrument(Model(), "m", path=request.param)
    made.path = request.param
    return made


@pytest.fixture(autouse=True)
def clean():
    yield
    assert local.stack == []
    assert not fxnvtx.ranges.emit.active
    assert local.silent == set()


def whole(model):
    """A following plain run gives the full tree."""
    torch.manual_seed(0)
    wanted = fxnvtx.instrument(Model(), "m", path="hooks")
    result, recording = run_recorded(model, x())
    assert result[0] == "value"
    assert recording.balanced
    assert shape(recording.tree()) == shape(run_recorded(wanted, x())[1].tree())
    assert len(recording.ranges) == SIZE


def positions():
    return [name for name, module in Model().named_modules() if name and not isinstance(module, nn.ModuleList)]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("where", positions())
def test_a_child_that_raises(model, where, kind):
    child = model.get_submodule(where)

    def fail(*args):
        fxnvtx.range_push("leaked")
        push(label("leaked as well"))
        raise kind("here")

    child.forward = fail
    error = kind("here")
    with fxnvtx.record() as recording, fxnvtx.range("outside"):
        before = list(local.stack)
        try:
            model(x())
        except BaseException as caught:
            error = caught
        assert local.stack == before
    assert type(error) is kind
    assert all(r.end_ns is not None for r in recording.ranges)
    assert [r.label for r in recording.ranges if r.leaked] == ["leaked", "leaked as well"]
    assert [r.depth for r in recording.ranges if r.label == "outside"] == [0]
    del child.forward
    local.unnamed = []
    whole(model)


@pytest.mark.parametrize("hook", ["pre", "post", "global pre", "global post"])
@pytest.mark.parametrize("where", ["", "stem.0", "mid", "mid.inner.a", "tail.layers.1", "tail.norm"])
def test_another_librarys_hook_that_raises_first(model, where, hook):
    from torch.nn.modules import module as nn_module

    target = model.get_submodule(where)

    def fail(module, *_):
        if module is target:
            raise Stop

    handle = {
        "pre": lambda: target.register_forward_pre_hook(fail, prepend=True),
        "post": lambda: target.register_forward_hook(fail, prepend=True),
        "global pre": lambda: nn_module.register_module_forward_pre_hook(fail),
        "global post": lambda: nn_module.register_module_forward_hook(fail),
    }[hook]()
    try:
        result, recording = run_recorded(model, x())
    finally:
        handle.remove()
    assert result == ("error", Stop)
    assert recording.balanced
    assert recording.ranges[-1].label == (f"m.{where}" if where else "m") or hook.endswith("post")
    whole(model)


def meanwhile(model, where, action):
    """Run `action` in the middle of a forward, once."""
    done: list[int] = []

    def hook(*_):
        if not done:
            done.append(1)
            action()

    return model.get_submodule(where).register_forward_pre_hook(hook)


ACTIONS = {
    "switch off": lambda m: fxnvtx.set_enabled(m, False),
    "switch off and on": lambda m: (fxnvtx.set_enabled(m, False), fxnvtx.set_enabled(m, True)),  # type: ignore[func-returns-value]
    "uninstrument": fxnvtx.uninstrument,
    "instrument again": lambda m: fxnvtx.instrument(m, "m", path=m.path),
    "another path": lambda m: fxnvtx.instrument(m, "m", path="hooks" if m.path == "auto" else "auto"),
    "another name": lambda m: fxnvtx.instrument(m, "n", path=m.path),
    "shapes": lambda m: fxnvtx.instrument(m, "m", path=m.path, shapes=True),
    "instrument a part": lambda m: fxnvtx.instrument(m.mid, "part", path=m.path),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("where", ["", "stem.0", "mid", "mid.inner.a", "tail.layers.1", "tail.norm", "shared"])
def test_a_change_in_mid_forward(model, where, action):
    wanted = model(x())
    handle = meanwhile(model, where, lambda: ACTIONS[action](model))
    result, recording = run_recorded(model, x())
    handle.remove()
    assert equal(result[1], wanted)
    assert all(r.end_ns is not None and not r.leaked for r in recording.ranges)
    assert recording.ranges[0].label == "m"
    if action in {"switch off", "switch off and on", "instrument again"}:
        assert len(recording.ranges) == SIZE  # goes on as it began
    fxnvtx.uninstrument(model.mid)
    fxnvtx.instrument(model, "m", path=model.path)
    fxnvtx.set_enabled(model, True)
    whole(model)


def test_switched_on_in_mid_forward_stays_silent(model):
    fxnvtx.set_enabled(model, False)
    handle = meanwhile(model, "mid.inner", lambda: fxnvtx.set_enabled(model, True))
    assert run_recorded(model, x())[1].ranges == []
    handle.remove()
    whole(model)


def test_switched_off_and_raising(model):
    fxnvtx.set_enabled(model, False)
    model.tail.norm.forward = None
    result, recording = run_recorded(model, x())
    assert result == ("error", TypeError)
    assert recording.ranges == []
    del model.tail.norm.forward
    fxnvtx.set_enabled(model, True)
    whole(model)


@pytest.mark.parametrize("where", ["stem", "mid.inner.a", "tail.layers.1", "shared"])
def test_a_recorder_that_starts_in_mid_forward(model, where):
    manager = fxnvtx.record()
    kept = []
    handle = meanwhile(model, where, lambda: kept.append(manager.__enter__()))
    wanted = Model.forward(model, x())  # the hook has fired, from now on the recorder listens
    assert equal(model(x()), wanted)
    manager.__exit__(None, None, None)
    handle.remove()
    assert kept[0].balanced
    assert all(SLOT not in m.__dict__ for m in model.modules())
    whole(model)


@pytest.mark.parametrize("where", ["stem", "mid.inner.a", "tail.layers.1", "shared"])
def test_a_recorder_that_stops_in_mid_forward(model, where):
    manager = fxnvtx.record()
    recording = manager.__enter__()
    handle = meanwhile(model, where, lambda: manager.__exit__(None, None, None))
    model(x())
    handle.remove()
    assert local.stack == []
    assert recording.ranges[0].label == "m"
    assert recording.ranges[0].end_ns is None  # it was still open
    whole(model)


def test_a_recorder_that_stops_while_a_child_raises(model):
    manager = fxnvtx.record()
    manager.__enter__()

    def stop_and_raise():
        manager.__exit__(None, None, None)
        raise Stop

    handle = meanwhile(model, "tail.layers.1", stop_and_raise)
    with pytest.raises(Stop):
        model(x())
    handle.remove()
    whole(model)


def test_a_generator_opened_inside_and_abandoned(model):
    @fxnvtx.range("g")
    def g():
        yield

    kept = []

    def start(*_):
        kept.append(g())
        next(kept[-1])

    handle = model.mid.inner.register_forward_pre_hook(start)
    with fxnvtx.record() as recording:
        model(x())
        assert local.stack == []
        kept.clear()
    handle.remove()
    assert [r.leaked for r in recording.ranges if r.label == "g"] == [False, False]
    assert recording.balanced
    whole(model)


class Tears(nn.Module):
    """Closes what its caller opened, and forgets ranges of its own until the stack is as deep as before."""

    def forward(self, x):
        fxnvtx.range_pop()
        for text in ("first", "second")[: int(x.sum())]:
            fxnvtx.range_push(text)
        return x


class Torn(nn.Module):
    def __init__(self):
        super().__init__()
        self.tears = Tears()

    def forward(self, x):
        fxnvtx.range_push("outer")
        x = self.tears(x)
        fxnvtx.range_pop()
        return x


@pytest.mark.parametrize("forgotten", [0, 1, 2])
def test_a_call_does_not_take_what_lies_in_its_place_for_its_own(forgotten):
    model = fxnvtx.instrument(Torn(), "m", path="hooks")
    with fxnvtx.record() as recording:
        model(torch.full((1,), forgotten))
    assert local.stack == []
    found = {r.label: r for r in recording.ranges}
    assert found["m.tears"].leaked  # closed by the pop of "outer"
    assert found["m.tears"].end_ns <= found["outer"].end_ns  # type: ignore[operator]
    names = ["first", "second"][:forgotten]
    assert all(found[n].start_ns > found["outer"].end_ns for n in names)  # type: ignore[operator]
    assert [found[n].leaked for n in names] == [True, False][-forgotten:] if forgotten else True
    assert not found["m"].leaked


def test_recursion(model):
    deep: list[int] = []

    def again(module, args):
        if len(deep) < 3:
            deep.append(1)
            model(*args)

    handle = model.mid.register_forward_pre_hook(again)
    result, recording = run_recorded(model, x())
    handle.remove()
    assert result[0] == "value"
    assert recording.balanced
    assert sum(r.label == "m" for r in recording.ranges) == 4
    assert len(recording.ranges) == 4 * SIZE
    whole(model)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("fail", [False, True])
def test_activation_checkpointing(model, reentrant, fail):
    plain = Model()
    plain.load_state_dict(model.state_dict())
    grads = []
    each: Any
    for each in (plain, model):
        data = x().requires_grad_()
        with fxnvtx.record() as recording:
            out = checkpoint(each, data, use_reentrant=reentrant).sum()
            if fail:
                each.tail.norm.forward = None
                with pytest.raises(TypeError):
                    out.backward()
                del each.tail.norm.forward
                continue
            out.backward()
        grads.append([data.grad, *(p.grad for p in each.parameters())])
    assert recording.balanced
    assert sum(r.label == "m" for r in recording.ranges) == 2  # forward, and once more for the backward
    if not fail:
        assert equal(*grads)
    whole(model)


def test_checkpointed_children(model):
    inner = model.mid.inner.forward
    model.mid.inner.forward = lambda v: checkpoint(inner, v, use_reentrant=False)
    with fxnvtx.record() as recording:
        model(x().requires_grad_()).sum().backward()
    assert recording.balanced
    del model.mid.inner.forward
    whole(model)


@pytest.mark.slow
def test_eight_threads_at_once_with_switches_and_recorders(model):
    wanted = model(x())
    stop = threading.Event()
    problems = []

    def run():
        while not stop.is_set():
            if not equal(model(x()), wanted) or local.stack or local.silent:
                problems.append("run")

    def switch():
        for turn in range(120):
            fxnvtx.set_enabled(model, bool(turn % 2))
            with fxnvtx.record() as recording:
                model(x())
            if any(r.leaked for r in recording.ranges) or local.stack:
                problems.append(str(recording.ranges))
            if turn % 10 == 0:
                fxnvtx.instrument(model, "m", path=("hooks", "auto")[turn // 10 % 2])

    threads = [threading.Thread(target=run) for _ in range(7)]
    for thread in threads:
        thread.start()
    try:
        switch()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []
    fxnvtx.set_enabled(model, True)
    whole(model)


def test_eight_threads_record_the_same_tree_each(model):
    barrier = threading.Barrier(8)

    def run():
        barrier.wait()
        for _ in range(5):
            model(x())

    with fxnvtx.record() as recording:
        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert recording.balanced
    roots = shape(recording.tree())
    assert len(roots) == 40
    assert len(set(roots)) == 1
    whole(model)


def test_asyncio_tasks_that_interleave(model):
    async def request(name):
        with fxnvtx.range(name):
            for _ in range(3):
                model(x())
                await asyncio.sleep(0)

    async def main():
        await asyncio.gather(*(request(f"r{i}") for i in range(4)))

    with fxnvtx.record() as recording:
        asyncio.run(main())
        assert local.stack == []
    models = [n for root in recording.tree() for n in root.walk() if n.label == "m"]
    assert len(models) == 12
    assert len({shape([n]) for n in models}) == 1
    assert all(r.end_ns is not None for r in recording.ranges)
    whole(model)


def test_an_async_forward():
    class Async(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        async def forward(self, x):
            await asyncio.sleep(0)
            return self.a(x)

    async def main():
        return await asyncio.gather(*(made(x()) for _ in range(3)))

    made = fxnvtx.instrument(Async())
    wanted = made.a(x())
    with fxnvtx.record() as recording:
        assert all(equal(r, wanted) for r in asyncio.run(main()))
    assert recording.balanced


@pytest.mark.parametrize("path", ["hooks", "auto"])
def test_a_generator_forward(path):
    """Its range lasts from the first step to the last, wherever the steps are made."""

    class Streams(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(2):
                sent = yield self.a(x)
                x = x if sent is None else sent
            return "done"

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.streams = Streams()

        def forward(self, x):
            return sum(self.streams(x))

    class Passes(Reads):
        def forward(self, x):
            return self.streams(x)

    passes = fxnvtx.instrument(Passes(), "p", path=path)
    with fxnvtx.record() as recording:
        list(passes(x()))
    assert shape(recording.tree()) == (("p", ()), ("p.streams", (("p.streams.a", ()),) * 2))

    inner = (("m.streams", (("m.streams.a", ()),) * 2),)
    model = fxnvtx.instrument(Reads(), "m", path=path)
    wanted = 2 * model.streams.a(x())
    result, recording = run_recorded(model, x())
    assert equal(result[1], wanted)
    assert recording.balanced
    assert shape(recording.tree()) == (("m", inner),)
    with fxnvtx.record() as recording:
        steps = model.streams(x())
        next(steps)
        assert equal(steps.send(x() * 2), model.streams.a(x() * 2))
        with pytest.raises(StopIteration, match="done"):
            next(steps)
        model.streams(x())  # never begun
        steps = model.streams(x())
        next(steps)
        steps.close()
    assert recording.balanced
    assert [r.label for r in recording.ranges].count("m.streams") == 2
