"""Fused kernels shared out over the modules they list: an estimate, equal parts (pure)."""

from __future__ import annotations

import re

from ..categories import MODULE
from .labels import Name, category_of, fused_owners
from .tree import Node, merge_into

__all__ = ["split_fused"]

_WORK = ("flops", "moved", "roof", "roof_compute", "rated", "unrated", "roofless")
_SHARED = ("gpu_self", "gpu_sum", "gap_self", "cpu_self", *_WORK)
# of the first owner, because these come in whole operations and calls
_WHOLE = (
    "kernels", "copies", "copied_bytes", "queued", "launching", "waited", "communication", "communication_hidden",
    "copying", "copying_hidden", "allocated", "released",
)  # fmt: skip
_MORE = re.compile(r"^(\d+) more$")
ESTIMATE = frozenset({"estimate"})


def split_fused(root: Node) -> Node:
    """A copy of the tree in which every fused range's time went to its owners in equal parts.

    What the list does not name ("3 more", "?") and what the enclosing module itself owns ("self") stays with the
    enclosing module. Nothing is lost: remainders of the division, and the counts of kernels, go to the first owner.
    """
    copy = Node(root.name, None)
    merge_into(copy, root)
    fused = [node for node in copy.walk() if node.parent is not None and fused_owners(node.name.text)]
    known: dict[int, dict[str, Node]] = {}  # by parent: what may be an owner in it
    for node in reversed(fused):  # from the inside out
        parent = node.parent
        assert parent is not None
        del parent.kids[node.name]
        if node.kids or id(parent) not in known:
            for kid in node.kids.values():
                into = parent.kids.get(kid.name)
                if into is None:
                    into = parent.kids[kid.name] = Node(kid.name, parent)
                merge_into(into, kid)
            names = known[id(parent)] = {}
            for below in parent.walk():
                names.setdefault(below.name.text, below)
        _share(node, parent, [_owner(parent, owner, known[id(parent)]) for owner in _owners(node)])
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
    full = f"{parent.name.text}.{owner}" if category_of(parent.name) == MODULE else owner
    node = known.get(full) or known.get(owner)
    if node is None:
        node = known[full] = parent.kids[Name(full, "module")] = Node(Name(full, "module"), parent)
        node.first = parent.first
    return node


def _share(node: Node, parent: Node, owners: list[Node]) -> None:
    for index, owner in enumerate(owners):
        owner.flags = owner.flags | ESTIMATE
        for field in _SHARED:
            part = _part(getattr(node, field), len(owners), index)
            setattr(owner, field, getattr(owner, field) + part)
        part = _part(node.cpu_self, len(owners), index)
        at: Node | None = owner
        while at is not None and at is not parent:  # the parent has it already
            at.cpu += part
            at = at.parent
    first = owners[0]
    for field in _WHOLE:
        setattr(first, field, getattr(first, field) + getattr(node, field))
    for name, (count, duration, credit) in (node.ops or {}).items():
        first.add_op(name, count, duration, credit)


def _part(value: int, parts: int, index: int) -> int:
    share, rest = divmod(value, parts)
    return share + (rest if index == 0 else 0)
