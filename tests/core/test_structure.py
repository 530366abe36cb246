"""A model may change after instrument(): the next outermost call shows it as it is by then, on every path."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxnvtx
from fxnvtx.modules.instrumented import Structure
from fxnvtx.recording import build_tree

from .test_random_trees import expected_tree, names_agree, slow
from .tools import equal, outcome, shape
from .trees import Chain, Leaf, W, build, recipes

PATHS = pytest.mark.parametrize("path", ["hooks", "auto"])


def sample():
    return torch.randn(3, W, generator=torch.Generator().manual_seed(0))


class Watched:
    """An instrumented model with a recorder on from before until after everything that happens to it."""

    def __init__(self, model, path):
        self.model = model.eval()
        self.recorder = fxnvtx.record()
        self.recording = self.recorder.__enter__()
        fxnvtx.instrument(model, "m", path=path)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        fxnvtx.uninstrument(self.model)
        self.recorder.__exit__(None, None, None)

    def call(self):
        """(outcome, tree) of one call."""
        before = len(self.recording.ranges)
        result = outcome(self.model, sample())
        return result, shape(build_tree(self.recording.ranges[before:]))

    def check(self):
        """The call shows exactly the modules that torch's hooks see, by names that they have now."""
        result, tree = self.call()
        fxnvtx.set_enabled(self.model, False)
        assert self.call()[1] == ()
        wanted = outcome(self.model, sample())
        calls = expected_tree(self.model, sample())
        fxnvtx.set_enabled(self.model, True)
        assert result[0] == wanted[0]
        assert equal(result[1], wanted[1])
        names: dict[int, set[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), set()).add(f"m.{name}" if name else "m")
        names_agree(calls, tree, names)
        assert self.recording.balanced
        return tree


class Lora(nn.Module):
    """Wraps a layer the way adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(W, 2, bias=False)
        self.lora_B = nn.Linear(2, W, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def put(parent, name, child, way):
    """One of the ways in which a child gets its place."""
    if way == "setattr":
        setattr(parent, name, child)
    elif way == "add_module":
        parent.add_module(name, child)
    elif way == "dict":
        parent._modules[name] = child
    else:
        parent.__dict__["_modules"] = {**parent._modules, name: child}


WAYS = ["setattr", "add_module", "dict", "whole dict"]


def places(model):
    return [(p, n) for p in dict.fromkeys(model.modules()) for n, c in p._modules.items() if c is not None]


def edit(model, data):
    """Change one thing."""
    found = places(model)
    kind = data.draw(st.sampled_from(["replace", "wrap", "add", "remove", "move", "rename"]))
    parent, name = data.draw(st.sampled_from(found))
    child = parent._modules[name]
    way = data.draw(st.sampled_from(WAYS))
    if kind == "replace":
        put(
            parent,
            name,
            data.draw(st.sampled_from([Leaf, lambda: nn.Linear(W, W), lambda: Chain(Leaf(), Leaf())]))(),
            way,
        )
    elif kind == "wrap":
        put(parent, name, data.draw(st.sampled_from([Lora, nn.Sequential]))(child), way)
    elif kind == "add":
        target = data.draw(st.sampled_from(list(dict.fromkeys(model.modules()))))
        put(target, f"n{len(target._modules)}", Leaf(), "dict" if not target._modules else way)
    elif kind == "remove":
        names = list(parent._modules)
        # torch deletes by number only where the names are the numbers, which other edits may have changed
        if isinstance(parent, (nn.Sequential, nn.ModuleList)) and names == [str(i) for i in range(len(names))]:
            del parent[names.index(name)]
        else:
            del parent._modules[name]
    elif kind == "move":
        other, there = data.draw(st.sampled_from(found))
        moved = other._modules.get(there)
        if moved is not None and not any(m is parent for m in moved.modules()):
            put(parent, name, moved, way)
    else:
        parent._modules["renamed"] = parent._modules.pop(name)
    model.eval()


@pytest.mark.slow
@PATHS
@settings(slow, max_examples=60)
@given(recipe=recipes(depth=4), data=st.data())
def test_any_edits(path, recipe, data):
    with Watched(build(recipe), path) as watched:
        watched.check()
        for _ in range(data.draw(st.integers(1, 4))):
            if not places(watched.model):
                break
            edit(watched.model, data)
            watched.check()


class Attention(nn.Module):
    """Fuses its projections as diffusers does, and may have a processor that is a module."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(W, W) for _ in range(3))
        self.fused = False
        self.processor = None

    def fuse(self):
        self.to_qkv = nn.Linear(W, 3 * W)
        self.fused = True

    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, -1) if self.fused else (self.to_q(x), self.to_k(x), self.to_v(x))
        out = torch.softmax(q @ k.T, -1) @ v
        return out if self.processor is None else self.processor(out)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.out = nn.Linear(W, W)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def fuse(net):
    for block in net.blocks:
        block.fuse()


def processor(net):
    net.blocks[1].processor = Leaf()


def adapters(net):
    for block in net.blocks:
        block.to_q = Lora(block.to_q)
    net.out = Lora(net.out)


def adapters_off_again(net):
    adapters(net)
    for block in net.blocks:
        block.to_q = block.to_q.base_layer


def longer(net):
    net.blocks.append(Attention())
    net.blocks.insert(0, Attention())
    net.blocks.extend([Attention()])


def shorter(net):
    net.blocks.pop(0)
    net.blocks = net.blocks[:1]


def swapped(net):
    modules = net.blocks._modules
    modules["0"], modules["1"] = modules["1"], modules["0"]


def torn_out(net):
    del net.blocks[0].to_q
    net.blocks[0].to_q = nn.Linear(W, W)


def inside_a_leaf(net):
    net.out = torch.nn.utils.parametrizations.weight_norm(net.out)


EDITS = [fuse, processor, adapters, adapters_off_again, longer, shorter, swapped, torn_out, inside_a_leaf]


@PATHS
@pytest.mark.parametrize("change", EDITS, ids=lambda f: f.__name__)
def test_what_libraries_do(path, change):
    with Watched(Net(), path) as watched:
        watched.check()
        change(watched.model.eval())
        watched.model.eval()
        changed = watched.check()
        assert watched.call()[1] == changed


@pytest.mark.parametrize("change", EDITS, ids=lambda f: f.__name__)
def test_on_the_fx_path_nothing_is_left_to_the_hooks_that_need_not(change):
    """Levels that appeared, and levels whose children are others by now, get a generated forward again."""
    fresh = Net().eval()
    with Watched(Net(), "auto") as watched:
        watched.call()
        for model in (watched.model, fresh):
            change(model)
        watched.call()
        fxnvtx.instrument(fresh, "m")
        rows = [[(r.fqn, r.path, r.label) for r in fxnvtx.explain(m).rows] for m in (watched.model, fresh)]
        assert rows[0] == rows[1]


@PATHS
def test_a_part_that_is_called_alone(path):
    """A VAE's decoder: its root is never called."""
    with Watched(Net(), path) as watched:
        block = watched.model.blocks[0]
        block(sample())
        block.to_q = Lora(block.to_q)
        before = len(watched.recording.ranges)
        block(sample())
        seen = [r.label for r in watched.recording.ranges[before:]]
        assert seen[:3] == ["m.blocks.0", "m.blocks.0.to_q", "m.blocks.0.to_q.base_layer"]


def test_a_change_while_nobody_listens():
    model = fxnvtx.instrument(Net().eval(), "m")
    adapters(model)
    with fxnvtx.record() as recording:
        model(sample())
    assert "m.out.lora_A" in [r.label for r in recording.ranges]


def test_patterns_that_match_nothing_any_more_raise_nothing():
    with fxnvtx.record() as recording:
        model = fxnvtx.instrument(Net().eval(), "m", include=["*", "out"], exclude=["blocks.1"])
        model.blocks = nn.ModuleList([Attention()])
        model(sample())
    assert [r.label for r in recording.ranges] == ["m", "m.blocks.0", *(f"m.blocks.0.to_{n}" for n in "qkv"), "m.out"]


def test_a_level_that_cannot_be_traced_any_more_goes_to_the_hooks_path():
    model = fxnvtx.instrument(nn.Sequential(Leaf(), Chain(Leaf(), Leaf())), "m", path="fx")
    with fxnvtx.record() as recording:
        model.append(Attention())
        model(sample())
    assert [r.label for r in recording.ranges][-4:] == ["m.2", "m.2.to_q", "m.2.to_k", "m.2.to_v"]


def test_names_that_could_be_taken_for_paths():
    """`x.0` is a child's own name here, and the way to another one."""
    for path in ("hooks", "auto"):
        model = nn.Sequential(nn.Sequential(Leaf()), Leaf())
        first, second = model
        model._modules = {"x.0": second, "x": first}
        wanted = model(sample())
        with Watched(model, path) as watched:
            assert equal(watched.call()[0][1], wanted)
    with pytest.raises(fxnvtx.errors.TraceError, match="dot"):
        fxnvtx.instrument(model, path="fx")


def test_modules_that_will_not_be_hashed():
    class Alike(nn.Linear):
        def __eq__(self, other):
            return isinstance(other, Alike)

    model = nn.Sequential(Alike(W, W), Alike(W, W))
    known = Structure(model)
    assert not known.changed()
    model[1] = Alike(W, W)
    assert known.changed()


def test_a_structure_tells_every_change_and_no_other():
    model = build((Chain, (nn.Sequential, ("leaf",), ("drop",)), ("linear",)))
    known = Structure(model)
    for same in (lambda: model.train(), lambda: model.to(torch.float64), lambda: copy.deepcopy(model)):
        same()
        assert not known.changed()
    for _ in range(20):  # an id() that is taken again is told from its predecessor
        del model.first._modules["1"]  # type: ignore[union-attr]
        model.first._modules["1"] = nn.Dropout()  # type: ignore[union-attr]
        assert known.changed()
        assert known.changed(id(model.first)) and known.changed(id(model))
        known = Structure(model)
    model.second = nn.Linear(W, W)
    assert known.changed(id(model))
    assert Structure(nn.Linear(1, 1)).size == 1


@pytest.mark.slow
def test_threads_that_call_while_the_model_changes():
    import threading

    with Watched(Net(), "auto") as watched:
        stop, errors = threading.Event(), []

        def work():
            while not stop.is_set():
                try:
                    watched.model(sample())
                except Exception as error:  # pragma: no cover
                    errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _, block in itertools.product(range(10), watched.model.blocks):
            block.to_q = Lora(block.to_q)
            watched.model(sample())
            block.to_q = block.to_q.base_layer
        stop.set()
        for thread in threads:
            thread.join()
        assert not errors
        watched.check()
