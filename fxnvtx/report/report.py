"""A report: what one or more captures said, as one tree, and the rows of its views."""

from __future__ import annotations

import html
from collections.abc import Sequence

from ..errors import ConfigError
from .labels import Name
from .part import Part
from .rows import ORDERS, ordered
from .tree import Node, merge_into, total
from .views import Row, Selection, rows_of, tree_of
from .work import Peaks, Table, peaks_of, rate

__all__ = ["Report"]


class Report:
    """One tree over all processes, and each process's own.

    notes: what a reader should know before believing the numbers (open ranges, damaged rows, what is missing).
    """

    def __init__(self, parts: Sequence[Part], peak: Peaks | None = None) -> None:
        self.parts = list(parts)
        self.peaks, about_work = _rated(self.parts, peak)
        self.has_gpu = any(part.has_gpu for part in self.parts)
        self.classes: dict[str, str] = {}
        for part in self.parts:
            self.classes.update(part.classes)
        if self.has_gpu:
            for part in self.parts:
                if not part.device_calls:
                    for node in part.tree.root.walk():
                        node.each = None  # CPU times would mix with the others' device times
        if len(self.parts) == 1:
            self.root = self.parts[0].tree.root
            self.side = self.parts[0].side.root
        else:
            self.root, self.side = Node(Name("", ""), None), Node(Name("", ""), None)
            for part in self.parts:
                merge_into(self.root, part.tree.root)
                merge_into(self.side, part.side.root)
            total(self.root)
            total(self.side)
        self.has_work = any(part.work for part in self.parts)
        self.notes = [*_notes(self.parts, self.root), *about_work]

    @property
    def sources(self) -> list[str]:
        return list(dict.fromkeys(part.source for part in self.parts))

    def rows(
        self,
        by: str = "tree",
        depth: int | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        fold: bool = False,
        kernels: bool = False,
        split_fused: bool = False,
        sort: str | None = None,
    ) -> list[Row]:
        """The rows of one view. Raises ConfigError for a view or a pattern that has no meaning.

        by: tree, request, stage, step, component, module, class, kernel or range. depth: levels of the tree, or
        dotted parts of a module's name. include, exclude: globs on names or on paths joined by "/". fold: identical
        blocks, steps and requests become one row. kernels: device operations as rows under their range. sort: largest
        first by one of order.ORDERS (default: as they ran; grouped ones by time).
        """
        if sort is not None and sort not in ORDERS:
            raise ConfigError(f"rows cannot be sorted by {sort!r}: choose one of {', '.join(ORDERS)}")
        chosen = Selection(by, depth, tuple(include), tuple(exclude), fold, kernels, split_fused)
        return ordered(rows_of(self.root, self.side, self.parts, self.classes, chosen), sort)

    def tree(
        self, include: Sequence[str] = (), exclude: Sequence[str] = (), fold: bool = False, split_fused: bool = False
    ) -> Node:
        """The tree that the rows of the view "tree" come from, with its sums."""
        chosen = Selection("tree", None, tuple(include), tuple(exclude), fold, False, split_fused)
        return tree_of(self.root, self.classes, chosen)

    def _repr_html_(self) -> str:
        """What a notebook shows: the folded tree, cut where it would fill pages."""
        from .render_text import render_text

        return f"<pre>{html.escape(render_text(self, fold=True, width=120, limit=60))}</pre>"


def _outermost_unknown(root: Node) -> list[Node]:
    found, todo = [], [root]
    while todo:
        node = todo.pop()
        if node.is_unknown():
            found.append(node)
        else:
            todo.extend(node.kids.values())
    return found


def _rated(parts: list[Part], given: Peaks | None) -> tuple[Peaks, list[str]]:
    """Join the parts' work with their times; the peaks to measure by, and what to say about both."""
    peaks, said = peaks_of((gpu for part in parts for gpu in part.gpus), given)
    if not any(part.work for part in parts):
        return peaks, ["--peak has no effect: no capture says what work its ranges stand for"] if given else []
    why: dict[str, int] = {}
    whole = 0
    for part in parts:
        root = part.tree.root
        for reason, time in rate(root, Table(part.work), peaks, part.has_gpu).items():
            why[reason] = why.get(reason, 0) + time
        total(root)
        whole += root.gpu if part.has_gpu else root.cpu
    notes = [said] if said else []
    for reason, time in sorted(why.items(), key=lambda item: -item[1])[:3]:
        if whole and peaks and time * 100 >= whole:
            notes.append(f"the work of {time / whole:.1%} of the time is not known: {reason}")
    return peaks, notes


def _notes(parts: list[Part], root: Node) -> list[str]:
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    lost = sum(node.gpu - node.gpu_shared for node in _outermost_unknown(root))
    if lost:
        share = f"{lost / root.gpu:.1%}" if root.gpu else "all"
        notes.append(f"{share} of the GPU time is not attributed to a layer: see the rows that say why")
    still_open = sum(node.open for node in root.walk())
    if still_open:
        notes.append(f"{still_open:,} ranges were still open when the capture ended; their time ends there")
    return notes
