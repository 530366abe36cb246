"""torch's own tools find an instrumented model as they would find the plain one, also while a recorder listens."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import fx, nn

import fxnvtx
from fxnvtx.modules.call_slot import SLOT

from . import zoo
from .test_soundness_forms import x
from .tools import equal, run_recorded, shape
from .twins import Twins

KINDS = (zoo.Wide, zoo.Decides, zoo.Loop, zoo.HasOwnCall)
data = {zoo.Wide: (2, 3, zoo.W), zoo.Decides: (3, zoo.W), zoo.Loop: (3, zoo.W), zoo.HasOwnCall: (3, zoo.W)}


def pair(kind, **options):
    """(plain, instrumented)"""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(kind().eval())
    return models[0], fxnvtx.instrument(models[1], **options)


def copies_of(model):
    yield copy.deepcopy(model)
    yield copy.copy(model)
    yield pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


class OwnState(zoo.Straight):
    """Copies everything it has, as some libraries' modules do."""

    def __getstate__(self):
        return self.__dict__

    def __setstate__(self, state):
        self.__dict__.update(state)


@pytest.mark.parametrize("kind", [*KINDS, OwnState])
def test_copies_work_on_their_own_weights(kind):
    plain, model = pair(kind)
    size = data.get(kind, (3, zoo.W))
    wanted = plain(x(*size))
    model(x(*size))
    made = list(copies_of(model))
    with fxnvtx.record() as while_it_records:
        model(x(*size))
        made += list(copies_of(model))
        for one in made:
            assert equal(one(x(*size)), wanted)
    assert while_it_records.balanced
    for one in made:
        if kind is not OwnState:
            assert SLOT not in one.__dict__
        assert equal(one(x(*size)), wanted)
        if one._modules is not model._modules:  # a shallow copy shares its children
            with torch.no_grad():
                [p.zero_() for p in one.parameters()]
            with fxnvtx.record():
                assert not equal(one(x(*size)), wanted)
            fxnvtx.instrument(one, "copy")
            (found, recording) = run_recorded(one, x(*size))
            assert found[0] == "value"
            assert recording.tree()[0].label == "copy"
            assert not equal(found[1], wanted)
    assert equal(run_recorded(model, x(*size))[0][1], wanted)


def test_a_deep_copy_is_not_instrumented_and_the_original_still_is():
    _, model = pair(zoo.Straight)
    with fxnvtx.record() as recording:
        copy.deepcopy(model)(x())
    assert recording.ranges == []
    assert len(run_recorded(model, x())[1].ranges) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_are_the_plain_ones(kind):
    plain, model = pair(kind)
    with fxnvtx.record():
        assert list(model.state_dict()) == list(plain.state_dict())
        assert equal(dict(model.state_dict()), dict(plain.state_dict()))
        other = kind()
        other.load_state_dict(model.state_dict(), strict=True)
        model.load_state_dict(plain.state_dict(), strict=True)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert repr(model) == repr(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind):
    plain, model = pair(kind)
    weights = {k: torch.randn_like(v) for k, v in plain.state_dict().items()}
    wanted = torch.func.functional_call(plain, weights, (x(*data[kind]),))
    with fxnvtx.record() as recording:
        assert equal(torch.func.functional_call(model, weights, (x(*data[kind]),)), wanted)
    assert recording.balanced
    assert equal(model(x(*data[kind])), plain(x(*data[kind])))


def test_transforms_of_torch_func():
    plain, model = pair(zoo.Wide)
    batch = x(5, 2, 3, zoo.W)
    for transform in (torch.func.vmap, lambda f: torch.func.grad(lambda v: f(v).sum()), lambda f: torch.func.jacrev(f)):
        sample = batch if transform is torch.func.vmap else batch[0]
        wanted = transform(plain)(sample)
        with fxnvtx.record() as recording:
            assert equal(transform(model)(sample), wanted)
        assert recording.balanced


def code_of(traced):
    return traced.code


@pytest.mark.parametrize("kind", [zoo.Wide, zoo.Loop, zoo.Straight])
@pytest.mark.parametrize("path", ["auto", "hooks"])
def test_fx_symbolic_trace_gives_the_same_graph(kind, path):
    plain, model = pair(kind, path=path)
    wanted = fx.symbolic_trace(plain)
    assert fx.symbolic_trace(model).code == wanted.code
    with fxnvtx.record() as recording:
        traced = fx.symbolic_trace(model)
    assert traced.code == wanted.code
    assert [n.target for n in traced.graph.nodes] == [n.target for n in wanted.graph.nodes]
    assert recording.balanced
    sample = x(*data.get(kind, (3, zoo.W)))
    assert equal(traced(sample), plain(sample))


@pytest.mark.parametrize("kind", [zoo.Wide, zoo.Loop])
def test_jit_trace_gives_the_same_graph(kind):
    plain, model = pair(kind)
    sample = x(*data[kind])
    wanted = torch.jit.trace(plain, sample)
    with fxnvtx.record() as recording:
        traced = torch.jit.trace(model, sample)
    assert recording.balanced
    assert str(traced.inlined_graph).count("aten::") == str(wanted.inlined_graph).count("aten::")
    assert scopes(traced) == scopes(wanted)
    other = x(*data[kind], seed=4)
    assert equal(traced(other), wanted(other))


def scopes(traced):
    return [n.scopeName() for n in traced.inlined_graph.nodes()]


def test_jit_script_while_recording():
    plain, model = pair(zoo.Straight)
    wanted = torch.jit.script(plain)
    with fxnvtx.record():
        scripted = torch.jit.script(model)
        assert equal(scripted(x()), wanted(x()))
    assert equal(scripted(x()), wanted(x()))


def test_a_scripted_child():
    def make():
        return nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))

    twins = Twins(make)
    twins.agree(x())
    assert shape_labels(twins.tree) == ["Sequential", "0", "1"]


def shape_labels(tree):
    return [label for node in tree for label in (node[0], *shape_labels(node[1]))]


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", [zoo.Wide, zoo.Loop])
def test_export_gives_the_same_program(kind, strict):
    plain, model = pair(kind)
    sample = x(*data[kind])
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    wanted = torch.export.export(plain, (sample,), strict=strict, dynamic_shapes=dynamic)
    fxnvtx.instrument(model, shapes=True)
    with fxnvtx.record() as recording:
        found = torch.export.export(model, (sample,), strict=strict, dynamic_shapes=dynamic)
    assert recording.balanced
    nodes = [(n.op, str(n.target), str(n.args)) for n in wanted.graph.nodes]
    assert [(n.op, str(n.target), str(n.args)) for n in found.graph.nodes] == nodes
    owners = [owner(n) for n in wanted.graph.nodes]
    assert [owner(n) for n in found.graph.nodes] == owners
    bigger = torch.cat([sample] * 3)
    assert equal(found.module()(bigger), wanted.module()(bigger))


def owner(node):
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


@pytest.mark.slow
def test_make_fx():
    from torch.fx.experimental.proxy_tensor import make_fx

    plain, model = pair(zoo.Wide)
    fxnvtx.instrument(model, shapes=True)
    sample = x(2, 3, zoo.W)
    for mode in ("real", "symbolic"):
        wanted = make_fx(plain, tracing_mode=mode, _allow_non_fake_inputs=True)(sample)
        with fxnvtx.record() as recording:
            found = make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(sample)
        assert found.code == wanted.code
        assert recording.balanced


def test_lazy_modules():
    twins = Twins(lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU()))

    def first(model):
        torch.manual_seed(2)
        model(x())

    twins.each(first)
    twins.agree(x())


def test_lazy_modules_that_materialize_under_a_recorder():
    twins = Twins(lambda: nn.Sequential(nn.LazyLinear(4), zoo.Straight()))

    def first(model):
        torch.manual_seed(2)
        with fxnvtx.record():
            model(x())

    twins.each(first)
    twins.agree(x())


def test_meta_tensors_and_to_empty():
    def make():
        with torch.device("meta"):
            return zoo.Wide()

    twins = Twins(make)
    assert twins.agree(torch.empty(2, 3, zoo.W, device="meta"))[1].is_meta

    def fill(model):
        model.to_empty(device="cpu")
        with torch.no_grad():
            [p.fill_(0.5) for p in model.parameters()]

    twins.each(fill).agree(x(2, 3, zoo.W))


def test_quantization_swaps_children():
    twins = Twins(lambda: zoo.Wide().eval())
    twins.agree(x(2, 3, zoo.W))
    twins.each(lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, inplace=True))
    twins.agree_in_value(x(2, 3, zoo.W))
    twins.renew().agree(x(2, 3, zoo.W))


@pytest.mark.parametrize("path", ["auto", "hooks"])
@pytest.mark.parametrize("kind", [zoo.Wide, zoo.SharedList, zoo.Decides, zoo.LocalFactory])
def test_nothing_keeps_a_model_or_a_replaced_child_alive(kind, path):
    _, model = pair(kind, path=path)
    sample = x(*data.get(kind, (3, zoo.W)))
    run_recorded(model, sample)
    name = next(iter(model._modules))
    gone = [weakref.ref(model._modules[name])]
    setattr(model, name, nn.Identity())
    gc.collect()
    assert gone[0]() is None
    fxnvtx.instrument(model, path=path)
    with fxnvtx.record():
        gone.append(weakref.ref(model))
        gone += [weakref.ref(m) for m in model.modules()]
        del model
        gc.collect()
        assert [ref() for ref in gone] == [None] * len(gone)


def test_a_child_that_outlives_its_model_is_left_clean():
    _, model = pair(zoo.Wide)
    child = model.loop
    before = dict(child.__dict__)
    with fxnvtx.record() as recording:
        del model
        gc.collect()
        child(x())
    assert recording.balanced
    assert child.__dict__ == before
    assert all(SLOT not in m.__dict__ for m in child.modules())
    assert shape(fxnvtx.recording.build_tree([])) == ()
