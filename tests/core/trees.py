"""A family of module classes that combine freely, and hypothesis strategies for trees of them.

Every class takes and returns one tensor of shape (n, 4). Some levels can be traced, some decide, some take keywords or
nested inputs. Each has source in this file, which the fx path needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

W = 4


class Leaf(nn.Module):
    """A layer with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(W))

    def forward(self, x):
        return torch.tanh(x * self.gain)


class Chain(nn.Module):
    """Straight-line, two children."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x):
        return self.second(F.gelu(self.first(x))) + x


class Twice(nn.Module):
    """Calls the first child twice."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x):
        y = self.first(x)
        y = self.second(y)
        return self.first(y)


class Keywords(nn.Module):
    """Calls its child with a keyword, through a level that takes one."""

    def __init__(self, inner: nn.Module, outer: nn.Module) -> None:
        super().__init__()
        self.inner = TakesKeyword(inner)
        self.outer = outer

    def forward(self, x):
        return self.outer(self.inner(x=x, shift=x * 0.5))


class TakesKeyword(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, *, shift, scale=0.5):
        return self.inner(x + shift) * scale


class Nested(nn.Module):
    """Passes lists, tuples and dicts down, and gets them back."""

    def __init__(self, inner: nn.Module, outer: nn.Module) -> None:
        super().__init__()
        self.inner = TakesNested(inner)
        self.outer = outer

    def forward(self, x):
        out = self.inner([x, (x * 2, {"k": x})], {"shift": x})
        return self.outer(out["y"][0])


class TakesNested(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, items, extra):
        a, b = items
        return {"y": [self.inner(a + b[1]["k"]), extra["shift"]]}


class Looped(nn.Module):
    """A ModuleList, run in a loop."""

    def __init__(self, items: list[nn.Module]) -> None:
        super().__init__()
        self.items = nn.ModuleList(items)

    def forward(self, x):
        for item in self.items:
            x = x + item(x)
        return x


class Keyed(nn.Module):
    """A ModuleDict, one item of which decides nothing, and one number on self."""

    def __init__(self, items: list[nn.Module]) -> None:
        super().__init__()
        self.table = nn.ModuleDict({f"k{i}": item for i, item in enumerate(items)})
        self.scale = 0.5

    def forward(self, x):
        for key in self.table:
            x = self.table[key](x) * self.scale
        return x


class Decides(nn.Module):
    """Cannot be traced."""

    def __init__(self, yes: nn.Module, no: nn.Module) -> None:
        super().__init__()
        self.yes = yes
        self.no = no

    def forward(self, x):
        if x.sum() > 0:
            return self.yes(x)
        return self.no(x) - 1


class Wraps(nn.Module):
    """Helper, star arguments, a generator inside: cannot be traced either."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return sum(self.inner(a) for a in args)


PAIRS: tuple[Callable[..., nn.Module], ...] = (Chain, Twice, Keywords, Nested, Decides)
LISTS: tuple[Callable[..., nn.Module], ...] = (Looped, Keyed)
TRACEABLE_PAIRS: tuple[Callable[..., nn.Module], ...] = (Chain, Twice, Keywords, Nested)
# A recipe is nested tuples: what to make, and recipes of its children; ("tied", n) is the n-th module made so far.
Recipe = tuple[Any, ...]

leaves = st.sampled_from([("leaf",), ("linear",), ("drop",), ("identity",), ("norm",)])
tied = st.integers(0, 5).map(lambda n: ("tied", n))


def recipes(traceable: bool = False, depth: int = 6) -> st.SearchStrategy[Recipe]:
    """Trees of at most `depth` levels."""
    found: st.SearchStrategy[Recipe] = leaves | tied if not traceable else leaves
    for _ in range(depth - 1):
        found = leaves | leaves | _level(found, traceable)
    return _level(found, traceable)


def _level(inner: st.SearchStrategy[Recipe], traceable: bool) -> st.SearchStrategy[Recipe]:
    pairs = TRACEABLE_PAIRS if traceable else PAIRS
    options = [
        st.tuples(st.sampled_from(pairs), inner, inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda i: (Looped, *i)),
        st.lists(inner, min_size=1, max_size=3).map(lambda i: (nn.Sequential, *i)),
    ]
    if not traceable:
        options += [
            st.lists(inner, min_size=1, max_size=2).map(lambda i: (Keyed, *i)),
            inner.map(lambda i: (Wraps, i)),
            tied,
        ]
    return st.one_of(options)


def build(recipe: Recipe) -> nn.Module:
    """The model of a recipe; the same recipe gives the same weights."""
    torch.manual_seed(0)
    made: list[nn.Module] = []
    return _build(recipe, made)


def _build(recipe: Recipe, made: list[nn.Module]) -> nn.Module:
    kind, *rest = recipe
    if kind == "tied":
        return made[rest[0] % len(made)] if made else _build(("leaf",), made)
    if isinstance(kind, str):
        makers: dict[str, Callable[[], nn.Module]] = {
            "leaf": Leaf,
            "linear": lambda: nn.Linear(W, W),
            "drop": lambda: nn.Dropout(0.5),
            "identity": nn.Identity,
            "norm": lambda: nn.LayerNorm(W),
        }
        module = makers[kind]()
    else:
        children = [_build(r, made) for r in rest]
        module = kind(children) if kind in LISTS else kind(*children)
    made.append(module)
    return module
