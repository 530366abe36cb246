"""Fused kernels shared out over the modules they list: an estimate, equal parts (pure)."""

from __future__ import annotations

import re

from .labels import Name, fused_owners, is_module
from .tree import Node, merge_into

__all__ = ["split_fused"]

_SHARED = ("gpu_self", "gpu_sum", "gpu_shared", "gap_self", "cpu_self")
_MORE = re.compile(r"^(\d+) more$")
ESTIMATE = frozenset({"estimate"})


def split_fused(root: Node) -> Node:
    """A copy of the tree in which every fused range's time went to its owners in equal parts.

    What the list does not name ("3 more", "?") and what the enclosing module itself owns ("self") stays with the
    enclosing module. Nothing is lost: remainders of the division, and the counts of kernels, go to the first owner.
    """
    copy = Node(root.name, None)
    merge_into(copy, root)
    fused: dict[int, tuple[Node, list[Node]]] = {}
    for node in copy.walk():
        if node.parent is not None and fused_owners(node.name.text):
            fused.setdefault(id(node.parent), (node.parent, []))[1].append(node)
    for parent, nodes in fused.values():
        for node in nodes:
            del parent.kids[node.name]
        known: dict[str, Node] = {}
        for below in parent.walk():
            known.setdefault(below.name.text, below)
        for node in nodes:
            _share(node, parent, [_owner(parent, owner, known) for owner in _owners(node)])
    return copy


def _owners(node: Node) -> list[str]:
    """The listed modules; "" stands for the module around, once per module that is not named."""
    found = []
    for owner in fused_owners(node.name.text):
        more = _MORE.match(owner)
        if more:
            found.extend([""] * int(more[1]))
        else:
            found.append("" if owner in ("self", "?") else owner)
    return found


def _owner(parent: Node, owner: str, known: dict[str, Node]) -> Node:
    """The node of an owner, which is named relative to the range around the fused one."""
    if not owner:
        return parent
    full = f"{parent.name.text}.{owner}" if is_module(parent.name) else owner
    node = known.get(full) or known.get(owner)
    if node is None:
        node = known[full] = parent.kids[Name(full, "module")] = Node(Name(full, "module"), parent)
        node.first = parent.first
    return node


def _share(node: Node, parent: Node, owners: list[Node]) -> None:
    for index, owner in enumerate(owners):
        owner.flags = owner.flags | ESTIMATE
        part = _part(node.cpu, len(owners), index)
        at: Node | None = owner
        while at is not None and at is not parent:  # the parent has it already
            at.cpu += part
            at = at.parent
    for below in node.walk():
        for field in _SHARED:
            value = getattr(below, field)
            if value:
                for index, owner in enumerate(owners):
                    setattr(owner, field, getattr(owner, field) + _part(value, len(owners), index))
        first = owners[0]
        for field in ("kernels", "copies", "copied_bytes"):
            setattr(first, field, getattr(first, field) + getattr(below, field))
        for name, (count, duration, credit) in (below.ops or {}).items():
            first.add_op(name, count, duration, credit)


def _part(value: int, parts: int, index: int) -> int:
    share, rest = divmod(value, parts)
    return share + (rest if index == 0 else 0)
