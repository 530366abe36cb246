"""Nothing of ours keeps a model, not even until the cyclic collector comes; copies are plain."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.modules.call_slot import SLOT
from fxnvtx.modules.registry import controls

from . import zoo
from .test_soundness_forms import x
from .tools import in_process, labels, run_recorded

OPTIONS = [{"path": "hooks"}, {"path": "auto"}, {"shapes": True}, {"name": "n", "depth": 1}]


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("then", ["nothing", "again", "off", "edit", "raise"])
def test_a_model_that_is_dropped_while_somebody_listens_is_freed_at_once(no_collector, options, then):
    with fxnvtx.record():
        model = fxnvtx.instrument(zoo.Wide(), **options)
        model(x(2, 3, 4))
        if then == "again":
            fxnvtx.instrument(model, "other")
        elif then == "off":
            fxnvtx.set_enabled(model, False)
        elif then == "edit":
            setattr(model, next(iter(model._modules)), nn.Sequential(nn.Linear(4, 4)))
        elif then == "raise":
            with pytest.raises(Exception):
                model(torch.zeros(0))
        if then != "raise":
            model(x(2, 3, 4))
        known = [weakref.ref(m) for m in model.modules()]
        control = weakref.ref(next(c for c in controls() if c.model() is model))
        del model
        assert [r() for r in known] == [None] * len(known)
    assert control() is None  # a recording refers to what it saw


def test_a_removed_part_is_freed_at_once(no_collector):
    with fxnvtx.record():
        model = fxnvtx.instrument(zoo.Wide())
        model(x(2, 3, 4))
        name, child = next(iter(model.named_children()))
        known = [weakref.ref(m) for m in child.modules()]
        del child
        delattr(model, name)
        assert [r() for r in known] == [None] * len(known)


def test_a_part_outlives_its_model(no_collector):
    with fxnvtx.record() as recording:
        model = fxnvtx.instrument(zoo.Straight())
        child = model.a
        del model
        assert SLOT not in child.__dict__
        child(x())
    assert labels(recording) == []


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


class CopiesEverything(zoo.Straight):
    """Brings its own state, and leaves nothing out."""

    def __getstate__(self):
        return self.__dict__.copy()


@pytest.mark.parametrize("kind", [zoo.Straight, CopiesEverything])
@pytest.mark.parametrize("how", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("in_a_call", [False, True])
def test_copies_are_not_instrumented(kind, how, in_a_call):
    model = fxnvtx.instrument(kind(), "m")
    made = []
    with fxnvtx.record():
        if in_a_call:
            handle = nn.modules.module.register_module_forward_hook(lambda *_: made.append(how(model)))
            model(x())
            handle.remove()
            del made[1:]
        else:
            made.append(how(model))
        model(x())
    (other,) = made
    assert all(c.model() is not m for m in other.modules() for c in controls())
    with fxnvtx.record() as recording:
        other(x())
    assert labels(recording) == []
    fxnvtx.uninstrument(model)
    assert run_recorded(other, x())[1].ranges == []
    fxnvtx.instrument(other, "o")
    assert labels(run_recorded(other, x())[1]) == ["o", "o.a", "o.b"]
    fxnvtx.uninstrument(other)


def test_a_shallow_copy_outlives_the_original(no_collector):
    with fxnvtx.record():
        model = fxnvtx.instrument(CopiesEverything(), "m")
        wanted = model(x())
        other = copy.copy(model)
        del model
        assert torch.equal(other(x()), wanted)


def test_a_shallow_copy_shows_nothing_once_the_original_is_given_back():
    model = fxnvtx.instrument(CopiesEverything(), "m")
    with fxnvtx.record() as recording:
        other = copy.copy(model)
        fxnvtx.uninstrument(model)
        other(x())
    assert labels(recording) == []


def test_compile_takes_the_place_of_a_slot():
    """Module.compile() after instrument(): the range is around it from the very next call on, for a root too."""
    for part in (lambda m: m, lambda m: m.a):
        model = fxnvtx.instrument(zoo.Straight(), "m", path="hooks")
        with fxnvtx.record() as recording:
            compiled = part(model)
            compiled._compiled_call_impl = inner = compiled._call_impl
            assert compiled.__dict__[SLOT] is not inner
            model(x())
        assert labels(recording) == ["m", "m.a", "m.b"]
        assert compiled.__dict__[SLOT] is inner


def test_nothing_is_said_at_interpreter_exit():
    script = """
        import torch, fxnvtx
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.a = torch.nn.Linear(1, 1)
                self.me = [self]
            def forward(self, x):
                return self.a(x)
        recorder = fxnvtx.record()
        recorder.__enter__()
        kept = [fxnvtx.instrument(Net(), f"m{i}") for i in range(3)]
        for net in kept:
            net(torch.zeros(1, 1))
        fxnvtx.kept = kept
        torch.kept = [fxnvtx.instrument(Net())]
        import builtins
        builtins.kept = [fxnvtx.instrument(Net())]
    """
    found = in_process(script)
    assert found.returncode == 0
    assert found.stderr == ""
