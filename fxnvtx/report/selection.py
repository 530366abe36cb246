"""What a view may be asked for, and what it makes of a tree: the part that was asked for, fused kernels shared out, and
which row a range belongs to (pure).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypedDict

from ..categories import LOOP, MODULE, OP, STAGE
from ..errors import ConfigError
from .labels import Folding, Name, category_of, fused_owners, is_module
from .rows import ORDERS, Row
from .tree import SUMS, Node, merge_into, total

__all__ = [
    "VIEWS",
    "Keys",
    "Options",
    "Selection",
    "Shown",
    "by_path",
    "filtered",
    "matches",
    "selected",
    "split_fused",
    "with_modules",
]


# ------------------------------------------------------------------------------------------------------------ the wish


VIEWS = ("tree", "request", "stage", "step", "component", "module", "class", "kernel", "range")


class Options(TypedDict, total=False):
    """What may be asked for besides view and depth, as `Report.rows` explains it."""

    include: Sequence[str]
    exclude: Sequence[str]
    fold: bool
    kernels: bool
    split_fused: bool
    sort: str | None


@dataclass(frozen=True)
class Selection:
    """All that `Report.rows` may be asked for, as one value. Raises ConfigError for what has no meaning."""

    by: str = "tree"
    depth: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    fold: bool = False
    kernels: bool = False
    split_fused: bool = False
    sort: str | None = None

    def __post_init__(self) -> None:
        if self.by not in VIEWS:
            raise ConfigError(f"there is no view by {self.by!r}: choose one of {', '.join(VIEWS)}")
        if self.depth is not None and self.depth < 1:
            raise ConfigError(f"depth is {self.depth}: it counts levels, so 1 or more")
        if self.sort is not None and self.sort not in ORDERS:
            raise ConfigError(f"rows cannot be sorted by {self.sort!r}: choose one of {', '.join(ORDERS)}")


def selected(by: str | Selection, depth: int | None, options: Options) -> Selection:
    """What a renderer was asked for: by its own arguments, or by a whole Selection in place of the view."""
    if isinstance(by, Selection):
        return by
    given: dict[str, Any] = {**options, "include": tuple(options.get("include", ()))}
    return Selection(by, depth, **{**given, "exclude": tuple(options.get("exclude", ()))})


class Shown(Protocol):
    """What a table needs of a report."""

    has_gpu: bool
    notes: list[str]

    def select(self, chosen: Selection) -> list[Row]: ...


# ---------------------------------------------------------------------------------------------------- a part of a tree


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
    todo: list[tuple[Node, Node, str, bool]] = [(child, copy, "", not include) for child in reversed(root.ordered())]
    order: list[tuple[Node, bool]] = []
    while todo:
        node, above, before, inside = todo.pop()
        path = "" if not paths else f"{before}/{node.name.text}" if before else node.name.text
        other = alias(node) or node.name.text
        if matches(node.name.text, path, exclude) or matches(other, other, exclude):
            changed.append(above)
            continue
        inside = inside or matches(node.name.text, path, include) or matches(other, other, include)
        copied = _alone(node, above)
        order.append((copied, inside))
        todo.extend((child, copied, path, inside) for child in reversed(node.ordered()))
    for copied, inside in reversed(order):
        if not inside:
            parent = copied.parent
            assert parent is not None
            if not copied.children:
                del parent.children[copied.name]
            else:
                way.add(id(copied))
                _empty(copied)
    for node in changed:
        at: Node | None = node
        while at is not None and at.parent is not None and at.each is not None:
            at.each = at.cpu_min = at.cpu_max = at.peak = None  # of whole calls; what is left of them is not known
            at.gpu_shared = 0
            at = at.parent
    for copied, _ in reversed(order):
        copied.cpu = copied.cpu_self + sum(child.cpu for child in copied.children.values())
    total(copy)
    return copy, way


def _alone(node: Node, parent: Node) -> Node:
    """A copy without what is inside."""
    copied = parent.children[node.name] = Node(node.name, parent)
    for field in SUMS:
        setattr(copied, field, getattr(node, field))
    copied.each, copied.cpu_min, copied.cpu_max = node.each, node.cpu_min, node.cpu_max
    copied.first, copied.flags, copied.ops, copied.peak = node.first, node.flags, node.ops, node.peak
    return copied


def _empty(node: Node) -> None:
    for field in _OWN_SUMS:
        setattr(node, field, 0)
    node.each = node.cpu_min = node.cpu_max = node.ops = None


# ------------------------------------------------------------------ fused kernels shared out: an estimate, equal parts


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
        del parent.children[node.name]
        if node.children or id(parent) not in known:
            for child in node.children.values():
                into = parent.children.get(child.name)
                if into is None:
                    into = parent.children[child.name] = Node(child.name, parent)
                merge_into(into, child)
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
        node = known[full] = parent.children[Name(full, "module")] = Node(Name(full, "module"), parent)
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


# ---------------------------------------------------------------------- which row of a grouped view a range belongs to


NO_CLASS = "class not recorded"


class Keys:
    """Made from the whole tree, used on it and on each process's own.

    A module is a range of category "module". Captures that have none (torch's own ranges) are shown by operator: there
    "op" takes its place.
    """

    def __init__(self, root: Node, classes: dict[str, str], chosen: Selection) -> None:
        self._classes = classes
        self._chosen = chosen
        self.fold = Folding(classes)
        some = any(node.parent is not None and category_of(node.name) == MODULE for node in root.walk())
        self._unit = MODULE if some else OP

    def function(self) -> Callable[[Node], str | None]:
        """range -> its row's name, or None where it belongs to the row around it."""
        by = self._chosen.by
        if by in {"request", "step"}:
            return lambda node: self._shown(node.name) if category_of(node.name) == by else None
        return {"range": self._range, "stage": self._stage, "component": self._component, "class": self._class}.get(
            by, self._module
        )

    def alias(self, node: Node) -> str | None:
        """What else a pattern can mean this range by: in the view by class, its class."""
        return self._class(node) if self._chosen.by == "class" else None

    def _shown(self, name: Name) -> str:
        return self.fold(name.text, name.category) if self._chosen.fold else name.text

    def _is_module(self, node: Node) -> bool:
        return category_of(node.name) == self._unit and not fused_owners(node.name.text)

    def _range(self, node: Node) -> str:
        shown = self._shown(node.name)
        return f"{node.name.domain}:{shown}" if node.name.domain else shown

    def _stage(self, node: Node) -> str | None:
        """Where the loop lies in no stage, it is one."""
        return self._shown(node.name) if category_of(node.name) in (STAGE, LOOP) else None

    def _component(self, node: Node) -> str | None:
        """The outermost modules: the view looks no further inside."""
        return node.name.text if node.is_unknown() else self._shown(node.name) if self._is_module(node) else None

    def _class(self, node: Node) -> str | None:
        if node.is_unknown():
            return node.name.text
        return self._classes.get(_bare(node.name.text), NO_CLASS) if self._is_module(node) else None

    def _module(self, node: Node) -> str | None:
        if node.is_unknown():
            return node.name.text
        if not self._is_module(node):
            return None
        text = self._shown(node.name)
        if self._chosen.depth is not None:
            text = ".".join(_bare(text).split(".")[: self._chosen.depth])
        return text


def _bare(text: str) -> str:
    """A label without the shapes of its inputs."""
    return text.partition(" in=")[0]


def with_modules(root: Node) -> Iterator[tuple[Node, str, str]]:
    """All ranges, outer ones first, and where each is: the innermost module, and the operator in it if any
    ("blocks.0.attn > aten::copy_"); without modules the outermost operator stands for one; "" where neither is. And the
    outermost range's name."""
    todo: list[tuple[Node, str, str, str]] = [(child, "", "", child.name.text) for child in root.children.values()]
    while todo:
        node, module, inner, outer = todo.pop()
        text = node.name.text
        # another library's domain, such as NCCL's, names no modules of a model
        if is_module(node.name) and (not module or (category_of(node.name) == MODULE and not node.name.domain)):
            module, inner = text, ""
        elif module and is_module(node.name):
            inner = text
        yield node, f"{module} > {inner}" if inner else module, outer
        todo.extend((child, module, inner, outer) for child in node.children.values())
