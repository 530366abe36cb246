"""Which modules get a range, and what it is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.errors import InstrumentError, SelectionError
from fxnvtx.modules import label_of
from fxnvtx.modules.selection import DEFAULT_EXCLUDE, Selection, name_modules, walk_paths

from . import zoo
from .test_soundness_forms import x
from .tools import labels, run_recorded, shape

PATHS = pytest.mark.parametrize("path", ["hooks", "auto"])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = zoo.Straight()
        self.drop = nn.Dropout(0.5)
        self.skip = nn.Identity()

    def forward(self, x):
        return self.skip(self.drop(self.attn(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.heads = nn.ModuleDict({"left": nn.Linear(4, 4)})
        self.seq = nn.Sequential(nn.Linear(4, 4), nn.Dropout2d())

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.heads["left"](self.seq[0](x))


FULL = [
    "Model", "blocks.0", "blocks.0.attn", "blocks.0.attn.a", "blocks.0.attn.b",
    "blocks.1", "blocks.1.attn", "blocks.1.attn.a", "blocks.1.attn.b", "seq.0", "heads.left",
]  # fmt: skip


def seen(model):
    result, recording = run_recorded(model, x())
    assert result[0] == "value"
    return labels(recording)


@PATHS
def test_default_labels(path):
    model: Any = fxnvtx.instrument(Model().eval(), path=path)
    assert seen(model) == FULL
    assert label_of(model) == "Model"
    assert label_of(model.blocks) is None
    assert label_of(model.blocks[0].drop) is None
    assert label_of(model.blocks[1].attn.b) == "blocks.1.attn.b"
    assert label_of(nn.Linear(1, 1)) is None


@PATHS
def test_a_name_begins_every_label(path):
    model = fxnvtx.instrument(Model().eval(), "transformer", path=path)
    assert seen(model) == ["transformer", *(f"transformer.{n}" for n in FULL[1:])]
    fxnvtx.instrument(model, "renamed", path=path)
    assert seen(model)[:2] == ["renamed", "renamed.blocks.0"]
    fxnvtx.instrument(model, path=path)
    assert seen(model) == FULL


def test_a_label_is_never_empty():
    assert seen(fxnvtx.instrument(nn.Linear(4, 4), "")) == ["Linear"]
    nameless = type("", (nn.Linear,), {})
    assert seen(fxnvtx.instrument(nameless(4, 4))) == ["model"]


@PATHS
def test_the_skip_types_can_be_replaced(path):
    model = fxnvtx.instrument(Model().eval(), path=path, exclude=None)
    assert [n for n in seen(model) if n.endswith(("drop", "skip"))] == [
        "blocks.0.drop", "blocks.0.skip", "blocks.1.drop", "blocks.1.skip",
    ]  # fmt: skip
    fxnvtx.instrument(model, path=path, exclude=nn.Linear)
    assert seen(model) == ["Model", *(f"blocks.{i}{end}" for i in (0, 1) for end in ("", ".attn", ".drop", ".skip"))]
    assert all(isinstance(kind(), nn.Module) for kind in DEFAULT_EXCLUDE)


@PATHS
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"depth": 0}, ["Model"]),
        ({"depth": 1}, ["Model", "blocks.0", "blocks.1", "heads.left"]),  # seq.0 lies below seq
        ({"depth": 2}, [n for n in FULL if n.count(".") < 3]),
        ({"depth": 99}, FULL),
        ({"include": "blocks.*"}, FULL[:9]),
        ({"include": ["*.attn"]}, ["Model", "blocks.0.attn", "blocks.1.attn"]),
        ({"include": "*.attn", "depth": 1}, ["Model", "blocks.0.attn", "blocks.1.attn"]),
        ({"include": (zoo.Straight, "heads.*")}, ["Model", "blocks.0.attn", "blocks.1.attn", "heads.left"]),
        ({"exclude": "blocks.1*"}, [n for n in FULL if not n.startswith("blocks.1")]),
        ({"exclude": ["blocks.?"]}, [n for n in FULL if n not in {"blocks.0", "blocks.1"}]),
        ({"include": "blocks.0*", "exclude": ["*.a", "*.b"]}, ["Model", "blocks.0", "blocks.0.attn"]),
        ({"include": ()}, ["Model"]),
    ],
)
def test_include_exclude_and_depth(path, options, expected):
    if "exclude" in options:
        found = options["exclude"]
        options = {**options, "exclude": [*DEFAULT_EXCLUDE, *([found] if isinstance(found, str) else found)]}
    assert seen(fxnvtx.instrument(Model().eval(), path=path, **options)) == expected


@pytest.mark.parametrize("options", [{"include": "bloks.*"}, {"exclude": ["attn"]}, {"include": ["blocks.*", "nope"]}])
def test_a_glob_that_matches_nothing(options):
    model = Model()
    with pytest.raises(SelectionError) as caught:
        fxnvtx.instrument(model, **options)
    assert "blocks" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert label_of(model) is None


@pytest.mark.parametrize(
    "options",
    [
        {"include": 5},
        {"include": [5]},
        {"exclude": 1.5},
        {"exclude": [None]},
        {"depth": -1},
        {"depth": 1.0},
        {"depth": True},
    ],
)
def test_options_without_meaning(options):
    with pytest.raises(InstrumentError) as caught:
        fxnvtx.instrument(Model(), **options)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ tied modules


class Holder(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.shared = shared

    def forward(self, x):
        return self.shared(x)


class Outer(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.left = Holder(shared)
        self.right = Holder(shared)
        self.own = shared

    def forward(self, x):
        return self.own(self.right(self.left(x)))


@PATHS
def test_a_tied_module_is_called_by_the_path_that_reaches_it(path):
    model = fxnvtx.instrument(Outer(zoo.Straight()), "m", path=path)
    _, recording = run_recorded(model, x())
    inside = lambda p: (p, ((f"{p}.a", ()), (f"{p}.b", ())))  # noqa: E731
    assert shape(recording.tree()) == (
        ("m", (("m.left", (inside("m.left.shared"),)), ("m.right", (inside("m.right.shared"),)), inside("m.own"))),
    )


@PATHS
def test_a_module_tied_twice_in_one_level_keeps_one_name(path):
    model = fxnvtx.instrument(zoo.SameChildTwoNames(), path=path)
    assert seen(model) == ["SameChildTwoNames", "a", "a"]
    assert label_of(model.b) == "a"


@PATHS
def test_a_module_called_twice(path):
    assert seen(fxnvtx.instrument(zoo.CalledTwice(), path=path)) == ["CalledTwice", "a", "a", "b"]


@PATHS
def test_a_module_that_contains_itself(path):
    model = zoo.Straight()
    model.a.parent = model  # a cycle
    fxnvtx.instrument(model, path=path)
    assert seen(model) == ["Straight", "a", "b"]


def test_replaced_children_are_picked_up():
    model = fxnvtx.instrument(Model().eval(), "m")
    gone = model.blocks[1]
    model.blocks[1] = zoo.Straight()
    fxnvtx.instrument(model, "m")
    assert seen(model)[5:8] == ["m.blocks.1", "m.blocks.1.a", "m.blocks.1.b"]
    assert seen(gone) == []


def test_two_instrumented_models_one_inside_the_other():
    inner = fxnvtx.instrument(zoo.Straight(), "inner")
    outer = fxnvtx.instrument(Holder(inner), "outer")
    assert seen(outer) == ["outer", "outer.shared", "outer.shared.a", "outer.shared.b"]
    fxnvtx.uninstrument(outer)
    assert seen(outer) == ["inner", "inner.a", "inner.b"]
    fxnvtx.instrument(outer, "outer")
    fxnvtx.set_enabled(outer, False)
    assert seen(outer) == ["inner", "inner.a", "inner.b"]  # the one that is switched on names them
    fxnvtx.set_enabled(inner, False)
    assert seen(outer) == []


@PATHS
def test_a_part_instrumented_later_keeps_its_own_name(path):
    outer = fxnvtx.instrument(Holder(zoo.Straight()), "outer", path=path)
    fxnvtx.instrument(outer.shared, "inner", path=path)
    assert seen(outer) == ["outer", "inner", "inner.a", "inner.b"]
    fxnvtx.uninstrument(outer.shared)
    assert seen(outer) == ["outer", "outer.shared", "outer.shared.a", "outer.shared.b"]


def test_naming_is_pure():
    model = Model()
    before = [dict(m.__dict__) for m in model.modules()]
    named = name_modules(model, Selection())
    assert [n.fqn for n in named][:3] == ["", "blocks.0", "blocks.0.attn"]
    assert len(list(walk_paths(model))) == len(list(model.named_modules(remove_duplicate=False)))
    assert [dict(m.__dict__) for m in model.modules()] == before


@pytest.mark.slow
def test_very_deep_and_very_wide_models():
    deep: nn.Module = nn.Linear(4, 4)
    for _ in range(150):
        deep = Holder(deep)
    found = seen(fxnvtx.instrument(deep))
    assert len(found) == 151
    assert found[-1] == ".".join(["shared"] * 150)
    wide = fxnvtx.instrument(nn.Sequential(*(nn.Linear(4, 4) for _ in range(300))))
    assert seen(wide) == ["Sequential", *(str(i) for i in range(300))]


def test_torch_is_not_needed_to_run_for_a_label():
    assert fxnvtx.instrument(torch.nn.Transformer(4, 1, 1, 1, 8), "t", path="hooks") is not None
