"""In any order of adding and removing, fxnvtx lives with those who hook, replace or compile the same modules."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.modules.call_slot import SLOT

from . import zoo
from .test_soundness_forms import x
from .tools import equal, in_process, labels, run_recorded, shape


def pair():
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(zoo.Wide().eval())
    return models


def sample():
    return x(2, 3, 4)


WHOLE = [
    "Wide", "stem", "stem.0", "stem.1", "stem.2", "stem.2.a", "stem.2.b", "attn", "attn.a", "attn.b",
    "loop", "loop.layers.0", "loop.layers.1", "loop.layers.2", "loop.norm", "tail.x",
]  # fmt: skip


def accelerate_hooks(model):
    hooks: Any = pytest.importorskip("accelerate.hooks")

    class Adds(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return args, kwargs

        def post_forward(self, module, output):
            return output + 1

    parts = (model, model.stem, model.attn.a, model.tail["x"])
    for part in parts:
        hooks.add_hook_to_module(part, Adds())
    return lambda: [hooks.remove_hook_from_module(part) for part in parts]


def diffusers_hooks(model):
    hooks: Any = pytest.importorskip("diffusers.hooks.hooks")

    class Adds(hooks.ModelHook):
        def new_forward(self, module, *args, **kwargs):
            return self.fn_ref.original_forward(*args, **kwargs) + 1

    parts = (model, model.stem, model.attn.a, model.tail["x"])
    for part in parts:
        hooks.HookRegistry.check_if_exists_or_initialize(part).register_hook(Adds(), "adds")

    def remove():
        for part in parts:
            part._diffusers_hook.remove_hook("adds", recurse=False)
            del part._diffusers_hook

    return remove


def replaced_forward(model):
    parts = (model, model.stem, model.attn.a, model.tail["x"])
    for part in parts:
        old = part.forward

        @functools.wraps(old)
        def new(*args, _old=old, **kwargs):
            return _old(*args, **kwargs) + 1

        part.forward = new

    def remove():
        for part in parts:
            del part.forward

    return remove


def forward_hooks(model):
    handles = [part.register_forward_hook(lambda m, a, o: o + 1) for part in (model, model.stem, model.attn.a)]
    return lambda: [h.remove() for h in handles]


def whole_compile(model):
    model.compile(backend="eager")

    def remove():
        model._compiled_call_impl = None

    return remove


def part_compile(model):
    for part in (model.attn, model.loop):
        part.compile(backend="eager")

    def remove():
        for part in (model.attn, model.loop):
            part._compiled_call_impl = None

    return remove


OTHERS = [accelerate_hooks, diffusers_hooks, replaced_forward, forward_hooks, whole_compile, part_compile]
# when: the other comes (+) and goes (-), fxnvtx is put in (i) and taken out (u); calls are checked after every step
ORDERS = [o for o in itertools.permutations("+-iu") if o.index("+") < o.index("-") and o.index("i") < o.index("u")]


@pytest.mark.parametrize("order", ORDERS, ids="".join)
@pytest.mark.parametrize("other", OTHERS, ids=lambda o: o.__name__)
@pytest.mark.parametrize("path", ["auto"])
def test_any_order(other, order, path):
    torch._dynamo.reset()
    plain, model = pair()
    removers = []
    instrumented = False
    for step in order:
        match step:
            case "+":
                removers = [other(plain), other(model)]
            case "-":
                [remove() for remove in removers]
                removers = []
            case "i":
                fxnvtx.instrument(model, path=path)
                instrumented = True
            case "u":
                fxnvtx.uninstrument(model)
                instrumented = False
        wanted = plain(sample())
        assert equal(model(sample()), wanted)
        result, recording = run_recorded(model, sample())
        assert equal(result[1], wanted)
        assert recording.balanced
        if not instrumented:
            assert recording.ranges == []
        elif removers and other in (whole_compile, part_compile):
            assert labels(recording)[0] == "Wide"  # what lies inside a compiled region is the backend's business
            assert {"attn", "loop"} <= set(labels(recording)) or other is whole_compile
        else:
            assert labels(recording) == WHOLE
        assert equal(model(sample()), wanted)
    assert [sorted(m.__dict__) for m in model.modules()] == [sorted(m.__dict__) for m in plain.modules()]
    torch._dynamo.reset()


@pytest.mark.parametrize("other", OTHERS, ids=lambda o: o.__name__)
def test_others_come_and_go_while_a_recorder_listens(other):
    torch._dynamo.reset()
    plain, model = pair()
    fxnvtx.instrument(model)
    with fxnvtx.record() as recording:
        removers = [other(plain), other(model)]
        for _ in range(2):
            assert equal(model(sample()), plain(sample()))
        [remove() for remove in removers]
        assert equal(model(sample()), plain(sample()))
        fxnvtx.instrument(model)  # undoing Module.compile() has emptied the place
        assert equal(model(sample()), plain(sample()))
    assert recording.balanced
    assert labels(recording)[-16:] == WHOLE
    assert all(m.__dict__.get(SLOT) is None for m in model.modules())
    torch._dynamo.reset()


@pytest.mark.parametrize("part", ["attn", "loop"])
def test_a_module_compiled_while_a_recorder_listens_keeps_its_range(part):
    torch._dynamo.reset()
    model = fxnvtx.instrument(pair()[0])
    with fxnvtx.record() as recording:
        model.get_submodule(part).compile(backend="eager")
        model(sample())
        model(sample())
    assert labels(recording).count(part) == 2
    torch._dynamo.reset()


def test_the_order_of_ranges_and_other_hooks():
    """A layer's range holds what other libraries do around its forward (loading its weights, say)."""
    model = fxnvtx.instrument(zoo.Straight())
    seen = []
    model.a.register_forward_pre_hook(lambda *_: seen.append([e.text for e in fxnvtx.ranges.local.stack.labels]))
    run_recorded(model, x())
    assert seen == [["Straight", "a"]]


def test_data_parallel_wrappers():
    model = fxnvtx.instrument(zoo.Straight(), "m")
    wrapped = nn.DataParallel(model)
    _, recording = run_recorded(wrapped, x())
    assert labels(recording) == ["m", "m.a", "m.b"]
    fxnvtx.instrument(wrapped, "w")
    assert labels(run_recorded(wrapped, x())[1]) == ["w", "w.module", "w.module.a", "w.module.b"]


def test_distributed_data_parallel():
    done = in_process(
        """
        import os, torch, torch.distributed as dist, fxnvtx
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
        fxnvtx.instrument(model, "m")
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        with fxnvtx.record() as recording:
            ddp(torch.ones(2, 4)).sum().backward()
        assert [r.label for r in recording.ranges] == ["m", "m.0", "m.1"], recording.ranges
        assert recording.balanced
        assert all(p.grad is not None for p in model.parameters())
        dist.destroy_process_group()
        print("fine")
        """
    )
    assert done.stdout.strip().endswith("fine"), done.stderr


# ------------------------------------------------------------------------------------------------ Dynamo


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(zoo.Straight() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def numbers(counters):
    return (
        counters["stats"]["unique_graphs"],
        sum(counters["graph_break"].values()),
        sum(counters["recompiles"].values()),
    )


def regional(model):
    for block in model.blocks:
        block.compile(backend="eager")


def wrapped(model):
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")


@pytest.mark.parametrize("how", [regional, wrapped])
@pytest.mark.parametrize("when", ["before", "after", "listening", "only before"])
def test_identical_blocks_share_one_graph(dynamo, how, when):
    torch.manual_seed(0)
    bare = Blocks()
    how(bare)
    [bare(x()) for _ in range(3)]
    alone = numbers(dynamo)
    assert alone[0] == 2  # the first block's input needs no gradient, the others' do
    torch._dynamo.reset()
    dynamo.clear()

    model = Blocks()
    wanted = model(x())
    if when == "after":
        how(model)
    fxnvtx.instrument(model, "m")
    with fxnvtx.record():
        if when == "listening":
            model(x())
    if when != "after":
        how(model)
    if when not in {"after", "only before"}:
        fxnvtx.instrument(model, "m")
    for _ in range(2):
        assert torch.allclose(model(x()), wanted)
        result, recording = run_recorded(model, x())
        assert torch.allclose(result[1], wanted)
        assert recording.balanced
        assert labels(recording) == ["m", *(f"m.blocks.{i}" for i in range(4))]
    assert numbers(dynamo) == alone


@pytest.mark.parametrize("listen_first", [False, True])
def test_a_recorder_that_comes_and_goes_recompiles_nothing(dynamo, listen_first):
    torch.manual_seed(0)
    model = zoo.Wide().eval()
    wanted = model(sample())
    fxnvtx.instrument(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for listen in (listen_first, not listen_first, listen_first):
        if listen:
            result, recording = run_recorded(compiled, sample())
            assert recording.balanced
            assert result[0] == "value", result
            assert torch.allclose(result[1], wanted)
            assert shape(recording.tree())[0][0] == "Wide"
        else:
            assert torch.allclose(compiled(sample()), wanted)
        assert fxnvtx.ranges.local.stack == []
    fxnvtx.set_enabled(model, False)
    compiled(sample())
    fxnvtx.uninstrument(model)
    compiled(sample())
    run_recorded(compiled, sample())
    assert numbers(dynamo) == (1, 0, 0)


def test_instrument_returns_the_compiled_model_it_was_given(dynamo):
    compiled: Any = torch.compile(zoo.Straight(), backend="eager")
    assert fxnvtx.instrument(compiled) is compiled
    compiled(x())
    assert labels(run_recorded(compiled, x())[1])[0] == "Straight"
    assert numbers(dynamo)[0] == 1
    fxnvtx.set_enabled(compiled, False)
    assert fxnvtx.uninstrument(compiled) is compiled


def test_a_graph_break_in_the_model_leaves_ranges_balanced(dynamo):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = zoo.Straight(), zoo.Straight()

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    torch.manual_seed(0)
    model = Breaks()
    wanted = model(x())
    compiled = torch.compile(fxnvtx.instrument(model), backend="eager")
    for _ in range(2):
        result, recording = run_recorded(compiled, x())
        assert torch.allclose(result[1], wanted)
        assert recording.balanced
