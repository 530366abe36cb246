"""shapes=True says what went into each call, and never gets in its way."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxnvtx
from fxnvtx.ranges.labels import input_shapes

from . import zoo
from .test_soundness_forms import x


class Takes(nn.Module):
    def forward(self, *args, **kwargs):
        return None


def marks(model, *args, **kwargs):
    with fxnvtx.record() as recording:
        model(*args, **kwargs)
    assert recording.balanced
    return [m.label for m in recording.marks]


def t(*size):
    return torch.zeros(size)


class Refuses:
    def dim(self):
        raise RuntimeError("no")

    def size(self):
        raise RuntimeError("no")


class Hostile(torch.Tensor):
    def size(self, *args):
        raise ValueError("no size for you")


@pytest.mark.parametrize(
    ("args", "kwargs", "shown"),
    [
        ((), {}, "[]"),
        ((t(2, 3), t(4)), {}, "[[2, 3], [4]]"),
        ((t(),), {}, "[[]]"),
        (([t(1), (t(2), {"k": t(3)})],), {"z": t(4), "a": {"b": [t(5)]}}, "[[1], [2], [3], [4], [5]]"),
        ((1, None, "x", object(), {1, 2}, SimpleNamespace(size=3)), {}, "[]"),
        ((OrderedDict(a=t(7)), t(0, 2)), {}, "[[7], [0, 2]]"),
        ((torch.empty(3, 2, device="meta"), t(1).to_sparse()), {}, "[[3, 2], [1]]"),
        ((Refuses(), t(1), Hostile()), {}, "[[1]]"),
        ((torch.nn.parameter.UninitializedParameter(), t(1)), {}, "[[0], [1]]"),
    ],
)
def test_markers(args, kwargs, shown):
    model = fxnvtx.instrument(Takes(), "m", shapes=True)
    assert marks(model, *args, **kwargs) == [f"m in={shown}"]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    nested = torch.nested.nested_tensor([t(2, 4), t(3, 4)], layout=layout)
    model = fxnvtx.instrument(Takes(), "m", shapes=True)
    (only,) = marks(model, nested, t(9))
    assert only.startswith("m in=[")
    assert only.endswith("[9]]")


@pytest.mark.parametrize("path", ["hooks", "auto"])
def test_every_level_has_its_marker_inside_its_range(path):
    model = fxnvtx.instrument(zoo.Straight(), "m", path=path, shapes=True)
    for rows in (3, 5, 3):
        assert marks(model, x(rows, 4)) == [f"{n} in=[[{rows}, 4]]" for n in ("m", "m.a", "m.b")]
    with fxnvtx.record() as recording:
        model(x(3, 4))
    for mark, item in zip(recording.marks, recording.ranges, strict=True):
        assert item.start_ns <= mark.time_ns <= item.end_ns  # type: ignore[operator]
    fxnvtx.instrument(model, "m", path=path)
    assert marks(model, x(3, 4)) == []


@pytest.mark.parametrize("path", ["hooks", "auto"])
def test_tied_modules_show_the_path_that_reaches_them(path):
    from .test_naming import Outer

    model = fxnvtx.instrument(Outer(nn.Linear(4, 4)), "m", path=path, shapes=True)
    assert [m for m in marks(model, x()) if "shared" in m or "own" in m] == [
        f"m.{n} in=[[3, 4]]" for n in ("left.shared", "right.shared", "own")
    ]


def test_an_endless_input_is_cut():
    loop: list = [t(1)]
    loop.append(loop)
    assert input_shapes([loop], {})[0] == (1,)


leaves = st.integers(0, 3).map(lambda n: t(n, 2)) | st.none() | st.text(max_size=2) | st.just(Refuses())
nests = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
)


@given(st.lists(nests, max_size=3), st.dictionaries(st.text(max_size=3), nests, max_size=2))
def test_any_nesting_in_order(args, kwargs):
    expected = []

    def walk(item):
        if isinstance(item, torch.Tensor):
            expected.append(tuple(item.shape))
        elif isinstance(item, (list, tuple)):
            [walk(i) for i in item]
        elif isinstance(item, dict):
            [walk(i) for i in item.values()]

    walk([*args, *kwargs.values()])
    found = input_shapes(args, kwargs)
    assert list(found) == expected
    assert hash(found) is not None
