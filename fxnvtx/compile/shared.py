"""A subgraph that several blocks share (`nested_compile_region`): which block is this call for?

The subgraph's owners are those of the block it was traced in first. The parameters that a call passes say which block
it is for: where they live under `blocks.2` and the traced ones under `blocks.0`, every path is moved over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..names import walk_paths
from .region import Call
from .torch_private import hide_module

__all__ = ["moved_row", "moves_of"]

# (anchor, path as traced, path now); None: not known
Moves = tuple[tuple[int, str, str | None], ...] | None


def moves_of(rows: Iterable[Any], call: Call, tensors: Iterable[Any]) -> Moves:
    """How to get from the traced paths to those of this call; None where nothing has to be moved."""
    tensors = [t for t in tensors if hasattr(t, "data_ptr")]
    moves: list[tuple[int, str, str | None]] = []
    for anchor, binding in enumerate(call.bindings):
        traced = {step[1] for chains, _ in rows for chain in chains for step in chain if step[0] == anchor}
        if not traced or binding.module is None:
            continue
        now = _holders(binding.module, tensors)
        move = _move(traced, now)
        if move is not None:
            if move[0] != move[1]:
                moves.append((anchor, *move))
        elif call.region.repeats:
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


hide_module(globals())
