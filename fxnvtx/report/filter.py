"""The part of a tree that was asked for, with sums that hold only that part (pure)."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from .tree import SUMS, Node, total

__all__ = ["by_path", "filtered", "matches"]

_OWN_SUMS = tuple(name for name in SUMS if name not in ("calls", "open"))


def matches(text: str, path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a glob matches the name, or the path where it has a "/" in it."""
    return any(fnmatchcase(text, pattern) or ("/" in pattern and fnmatchcase(path, pattern)) for pattern in patterns)


def by_path(patterns: tuple[str, ...]) -> bool:
    """Whether paths are wanted at all: those of a deep tree are much text."""
    return any("/" in pattern for pattern in patterns)


def filtered(
    root: Node, include: tuple[str, ...], exclude: tuple[str, ...], alias: Callable[[Node], str | None]
) -> tuple[Node, set[int]]:
    """A copy with what matches, all inside it, and the way to it; and the identities of the nodes on that way.

    A range on the way keeps of its time what was kept inside it. `alias`: another name that a range can be meant by.
    """
    copy = Node(root.name, None)
    paths = by_path((*include, *exclude))
    way: set[int] = set()
    changed: list[Node] = []
    # node, its copy's parent, the path above, whether an enclosing range matched
    todo: list[tuple[Node, Node, str, bool]] = [(kid, copy, "", not include) for kid in reversed(root.ordered())]
    order: list[tuple[Node, bool]] = []
    while todo:
        node, above, before, inside = todo.pop()
        path = "" if not paths else f"{before}/{node.name.text}" if before else node.name.text
        other = alias(node) or node.name.text
        if matches(node.name.text, path, exclude) or matches(other, other, exclude):
            changed.append(above)
            continue
        inside = inside or matches(node.name.text, path, include) or matches(other, other, include)
        mine = _alone(node, above)
        order.append((mine, inside))
        todo.extend((kid, mine, path, inside) for kid in reversed(node.ordered()))
    for mine, inside in reversed(order):
        if not inside:
            parent = mine.parent
            assert parent is not None
            if not mine.kids:
                del parent.kids[mine.name]
            else:
                way.add(id(mine))
                _empty(mine)
    for node in changed:
        at: Node | None = node
        while at is not None and at.parent is not None and at.each is not None:
            at.each = at.cpu_min = at.cpu_max = at.peak = None  # of whole calls; what is left of them is not known
            at.gpu_shared = 0
            at = at.parent
    for mine, _ in reversed(order):
        mine.cpu = mine.cpu_self + sum(kid.cpu for kid in mine.kids.values())
    total(copy)
    return copy, way


def _alone(node: Node, parent: Node) -> Node:
    """A copy without what is inside."""
    mine = parent.kids[node.name] = Node(node.name, parent)
    for field in SUMS:
        setattr(mine, field, getattr(node, field))
    mine.each, mine.cpu_min, mine.cpu_max = node.each, node.cpu_min, node.cpu_max
    mine.first, mine.flags, mine.ops, mine.peak = node.first, node.flags, node.ops, node.peak
    return mine


def _empty(node: Node) -> None:
    for field in _OWN_SUMS:
        setattr(node, field, 0)
    node.each = node.cpu_min = node.cpu_max = node.ops = None
