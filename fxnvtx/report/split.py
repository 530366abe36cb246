"""Fused kernels shared out over the modules they list: an estimate, equal parts (pure)."""

from __future__ import annotations

from .labels import Name, fused_owners
from .tree import Node, merge_into

__all__ = ["split_fused"]

_SHARED = ("gpu_self", "gpu_sum", "gpu_shared", "gap_self", "cpu", "cpu_self")
ESTIMATE = frozenset({"estimate"})


def split_fused(root: Node) -> Node:
    """A copy of the tree in which every fused range's time went to its owners in equal parts.

    Nothing is lost: remainders of the division go to the first owner. Counts of kernels go to the first owner only,
    so that sums stay true.
    """
    copy = Node(root.name, None)
    merge_into(copy, root)
    for node in [node for node in copy.walk() if fused_owners(node.name.text)]:
        parent = node.parent
        if parent is None:
            continue
        owners = [_owner(parent, owner) for owner in fused_owners(node.name.text)]
        del parent.kids[node.name]
        for below in node.walk():
            for field in _SHARED:
                value = getattr(below, field)
                if field == "cpu" and below is not node:
                    continue
                part, rest = divmod(value, len(owners))
                for index, owner in enumerate(owners):
                    setattr(owner, field, getattr(owner, field) + part + (rest if index == 0 else 0))
                    owner.flags = owner.flags | ESTIMATE
            first = owners[0]
            first.kernels += below.kernels
            first.copies += below.copies
            first.copied_bytes += below.copied_bytes
            for name, (count, duration, credit) in (below.ops or {}).items():
                first.add_op(name, count, duration, credit)
    return copy


def _owner(parent: Node, owner: str) -> Node:
    """The node of an owner named relative to the range around the fused one."""
    full = f"{parent.name.text}.{owner}"
    for node in parent.walk():
        if node is not parent and node.name.text in (owner, full):
            return node
    made = Node(Name(full if parent.name.category == "module" else owner, "module"), parent)
    made.first = parent.first
    parent.kids[made.name] = made
    return made
