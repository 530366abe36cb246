"""Where kernels of replayed CUDA graphs count: below the launch (which step), at the layer they were captured in."""

from __future__ import annotations

from collections.abc import Callable

from .labels import UNKNOWN, Name
from .tree import Node, Tree

__all__ = ["BEFORE", "LEVEL", "NO_TABLE", "layers", "place"]

BEFORE = Name(UNKNOWN + "the CUDA graph was captured before the recording began", "unknown")
NO_TABLE = Name(
    UNKNOWN + "no CUDA graph nodes in this export (record with --cuda-graph-trace=node)", "unknown"
)  # fmt: skip
LEVEL = Name(UNKNOWN + "graph-level trace (record with --cuda-graph-trace=node)", "unknown")
NO_RANGE = Name(UNKNOWN + "captured outside every range (a warm-up without ranges?)", "unknown")
_STRUCTURE = {"request", "stage", "loop", "step", "compile", "unknown"}


def layers(launched: Node, captured: Node) -> list[Name]:
    """The ranges between a graph's launch and its kernel: what encloses the captured call below the range that
    launches the graph now."""
    path = captured.path()
    texts = [name.text for name in path]
    for name in reversed(launched.path()):
        if name.category not in _STRUCTURE and name.text in texts:
            below = path[len(texts) - 1 - texts[::-1].index(name.text) + 1 :]
            return [part for part in below if part.category not in _STRUCTURE]
    return [part for part in path if part.category not in _STRUCTURE]


def place(
    tree: Tree, launched: Node, captured: Node | None, missing: Name, later: Callable[[Node], bool] = lambda node: False
) -> Node:
    """The node for a replayed kernel: below its launch (which step), at its layer (from the capture). later: whether a
    node is there only because of ranges that come after the launch."""
    if captured is None:
        return tree.child(launched, missing)
    names = layers(launched, captured)
    if not names and (captured.parent is None or captured.is_unknown()):
        return tree.child(launched, NO_RANGE)
    node = launched
    for name in names:
        below = node.kids.get(name)
        if below is None:
            below = tree.child(node, name)
            below.flags = frozenset({"replayed"})
            below.first = launched.first
        elif later(below):
            below.flags = frozenset({"replayed"})
            below.first = launched.first
        node = below
    return node
