"""From a path below a compiled module to the label that the eager path would have used, at run time.

The label comes from the live module, never from the graph: one graph serves many blocks, and a module may have been
excluded, renamed or replaced since it was traced.

A subgraph that several blocks share (`nested_compile_region`) has the owners of the block it was traced in first. The
parameters that a call passes say which block it is for: where they live under `blocks.2` and the traced ones under
`blocks.0`, every path is moved over.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..modules.registry import Control, Entry, controls, entry_of
from ..modules.selection import Selection, is_callable_module, unwrapped, walk_paths
from ..ranges import Label, label
from .owners import OWN
from .torch_private import hide_module

__all__ = ["Binding", "Names", "at", "family", "moved_row", "moves_of", "named_tensors"]

SHOWN_OWNERS = 4
_default = Selection()
Chain = tuple[tuple[int, str, str, str], ...]
Levels = tuple[tuple[Any, Label], ...]
# (anchor, path as traced, path now); None: not known
Moves = tuple[tuple[int, str, str | None], ...] | None


def family(module: nn.Module) -> Control | None:
    """The instrumented model that contains this module, named or not."""
    found = entry_of(module)
    if found is not None:
        return found[0]
    for control in reversed(controls()):
        model = control.model()
        if model is not None and any(m is module for m in model.modules()):
            return control
    return None


def entries_of(control: Control) -> dict[int, Entry]:
    """By id(module): what an instrumented model calls its modules."""
    return {id(module): e for e in control.entries if (module := e.module()) is not None}


class Binding:
    """One anchor of a region in one call: which module it is now. `module` None: not known which."""

    __slots__ = ("_entries", "control", "fqn", "kind", "reference", "text")

    def __init__(self, kind: type, module: nn.Module | None, fqn: str | None = None) -> None:
        self.kind = kind
        # compiled code must not keep a model alive
        self.reference = None if module is None else weakref.ref(module)
        self.control = family(module) if module is not None else None
        self._entries = {} if self.control is None else entries_of(self.control)
        self.fqn = fqn
        self.text = self._own_text()

    @property
    def module(self) -> nn.Module | None:
        return None if self.reference is None else self.reference()

    @property
    def died(self) -> bool:
        return self.reference is not None and self.reference() is None

    def entry(self, module: nn.Module | None) -> Entry | None:
        """What the instrumented model calls this module; None for one that only has the address of a dead one."""
        found = self._entries.get(id(module))
        return found if found is not None and found.module() is module else None

    def _own_text(self) -> str | None:
        """Label of the anchor itself; None where it was left out by instrument()'s options."""
        if self.module is None:
            return f"{self.kind.__name__} (one of several)"
        if self.control is None:
            return self.kind.__name__
        found = self.entry(self.module)
        if found is None:
            return None
        known = (found.fqn, *found.also, *found.by_parent.values())
        return self.control.text(self.fqn if self.fqn in known else found.fqn)

    def below(self, path: str, hint: str, above: list[str]) -> str | None:
        """Label of the module at `path` below the anchor; None where it has none. `above`: labels around it."""
        if not path:
            return self.text
        if self.module is None:
            return f"{self.text}.{path}"
        module = at(self.module, path)
        if self.control is None:
            if module is not None and not (is_callable_module(module) and _default.takes(path, type(module))):
                return None
            return path
        found = self.entry(module)
        if found is None:
            return None
        return self._reached(found, hint, above)

    def _reached(self, entry: Entry, hint: str, above: list[str]) -> str:
        """A tied module is named by the path it was reached through."""
        assert self.control is not None
        if not entry.also and len(entry.by_parent) < 2:
            return self.control.text(entry.fqn)
        candidates = [entry.fqn, *entry.also, *entry.by_parent.values()]
        for outer in reversed(above):
            inside = [c for c in candidates if self.control.text(c).startswith(f"{outer}.")]
            if inside:
                candidates = inside
                break
        by_name = [c for c in candidates if c.rpartition(".")[2] == hint]
        return self.control.text((by_name or candidates)[0])


def at(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path as `selection.walk_paths` writes it: what torch.compile has wrapped as if it had not."""
    here: Any = module
    for name in path.split(".") if path else ():
        here = getattr(here, "_modules", {}).get(name)
        if here is None:
            return None
        here = unwrapped(here)
    return here if isinstance(here, nn.Module) else None


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every parameter and buffer by every path that `at` understands."""
    for path, module, _ in walk_paths(model):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield ".".join((*path, name)), tensor


class Names:
    """The labels of one table's rows for one binding of its anchors."""

    def __init__(self, bindings: list[Binding], base: str | None) -> None:
        self.bindings = bindings
        self.base = base

    def levels(self, row: tuple[tuple[Chain, ...], str]) -> Levels:
        """The ranges around a kernel, outermost first, the region's own range left out."""
        chains, unknown = row
        named: dict[Levels, None] = {}
        for chain in chains:
            named[tuple(self._steps(chain))] = None
        found = list(named)
        if len(found) == 1 and not unknown:
            return found[0]
        shared = _shared(found)
        if len(found) < 2 and unknown:
            return (*shared, (("unknown", unknown), label(f"owner unknown ({unknown})", "op")))
        text = fused_text([self._relative(levels, shared) for levels in found], unknown)
        return (*shared, (("fused", text), label(text, "op")))

    def _steps(self, chain: Chain) -> Iterator[tuple[Any, Label]]:
        above = [self.base] if self.base is not None else []
        for step in chain:
            anchor, path, hint, _ = step
            if anchor == OWN:
                yield (step, label(path, hint or None))
                continue
            text = self.bindings[anchor].below(path, hint, above)
            if text is not None and not (anchor == 0 and not path and text == self.base):
                above.append(text)
                yield (step, label(text))

    def _relative(self, levels: Levels, shared: Levels) -> str:
        if len(levels) == len(shared):
            return "self"
        outer = shared[-1][1].text if shared else self.base
        text = levels[-1][1].text
        return text[len(outer) + 1 :] if outer is not None and text.startswith(f"{outer}.") else text


def _shared(found: list[Levels]) -> Levels:
    if not found:
        return ()
    first = min(found, key=len)
    for index, level in enumerate(first):
        if any(f[index] != level for f in found):
            return first[:index]
    return first


def fused_text(names: list[str], unknown: str = "") -> str:
    """`fused(a, b)`: the owners of a kernel, relative to what encloses it. A long list is cut and says by how much.
    `unknown`: why some are not known, empty where all are."""
    distinct = list(dict.fromkeys(names))
    shown = distinct[:SHOWN_OWNERS]
    if len(distinct) > len(shown):
        shown.append(f"{len(distinct) - len(shown)} more")
    if unknown:
        shown.append(f"unknown: {unknown}")
    return f"fused({', '.join(shown)})"


# ------------------------------------------------------------------------------------------------------ nested regions


def moves_of(rows: Iterable[Any], bindings: Iterable[Binding], repeats: bool, tensors: Iterable[Any]) -> Moves:
    """How to get from the traced paths to those of this call; None where nothing has to be moved. `repeats`: a subgraph
    is called more than once, so that what the rows say may be another call's."""
    tensors = [t for t in tensors if hasattr(t, "data_ptr")]
    moves: list[tuple[int, str, str | None]] = []
    for anchor, binding in enumerate(bindings):
        traced = {step[1] for chains, _ in rows for chain in chains for step in chain if step[0] == anchor}
        if not traced or binding.module is None:
            continue
        now = _holders(binding.module, tensors)
        move = _move(traced, now)
        if move is not None:
            if move[0] != move[1]:
                moves.append((anchor, *move))
        elif repeats:
            moves.append((anchor, "", None))
    return tuple(moves) or None


def _holders(module: nn.Module, tensors: list[Any]) -> set[str]:
    """Paths of the modules that hold these tensors."""
    wanted = {id(t) for t in tensors}
    found = set()
    for path, below, _ in walk_paths(module):
        for own in (*below._parameters.values(), *below._buffers.values()):
            if own is not None and id(own) in wanted:
                found.add(".".join(path))
    return found


def _move(traced: set[str], now: set[str]) -> tuple[str, str] | None:
    """(old, new) so that every module in use is a traced one after replacing new by old; None where there is none or
    more than one."""
    if not now:
        return None
    if now <= traced:
        return "", ""
    starts = {tuple(p.split(".")[:n]) for p in traced for n in range(1, p.count(".") + 2)}
    some = min(now).split(".")
    fitting = set()
    for length in range(1, len(some) + 1):
        new = ".".join(some[:length])
        if not all(p == new or p.startswith(f"{new}.") for p in now):
            continue
        for start in starts:
            old = ".".join(start)
            if all(old + p[len(new) :] in traced for p in now):
                fitting.add((old, new))
    # nested solutions (a.0 -> a.1 and a.0.mlp -> a.1.mlp) say the same: the shortest moves most
    fitting = {f for f in fitting if not any(_implies(g, f) for g in fitting if g != f)}
    return fitting.pop() if len(fitting) == 1 else None


def _implies(outer: tuple[str, str], inner: tuple[str, str]) -> bool:
    old, new = inner
    return old.startswith(f"{outer[0]}.") and new == outer[1] + old[len(outer[0]) :]


def moved_row(row: Any, moves: Moves) -> Any:
    """A row with its paths moved; where the move is unknown, its owners are and the region stands for them."""
    if moves is None:
        return row
    chains, unknown = row
    result = []
    for chain in chains:
        steps: list[Any] | None = []
        for anchor, path, hint, number in chain:
            for at, old, new in moves:
                if at == anchor and new is None:
                    steps, unknown = None, "which of several blocks this call is for cannot be told"
                elif at == anchor and new is not None and (path == old or path.startswith(f"{old}.")):
                    path = new + path[len(old) :]
            if steps is None:
                break
            steps.append((anchor, path, hint, number))
        result.append(() if steps is None else tuple(steps))
    return tuple(dict.fromkeys(result)), unknown


hide_module(globals())  # autograd and compiled code call this with Dynamo watching
