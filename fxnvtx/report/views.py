"""The tree seen from a side: rows by path, request, stage, step, component, module, class, kernel or label (pure).

Whatever the view, its rows count nothing twice: in the flat ones (by request, stage, step, component) no row lies
inside another, in the others the `self` columns are each row's own. What no row counts is a row of its own, "outside".
"""

from __future__ import annotations

from .labels import Folding, fused_owners
from .part import Part
from .rows import FLAT, Row
from .selection import VIEWS, Keys, Selection, by_path, filtered, matches, split_fused
from .tree import BELOW, FROM_DEVICE, FROM_WORK, NOTHING, Node, merge_into, merged, total

__all__ = ["VIEWS", "Row", "Selection", "row_of", "rows_of", "tree_of"]

_SUMMED = (
    "calls", "cpu", "cpu_self", "gpu", "gpu_self", "gpu_sum", "kernels", "copies", "copied_bytes", "launches", "gap",
    "proj", "proj_calls", "resident", "overlap", "open", *FROM_DEVICE, *FROM_WORK,
)  # fmt: skip


def rows_of(root: Node, side: Node, parts: list[Part], classes: dict[str, str], chosen: Selection) -> list[Row]:
    """The rows of one view of the merged tree; `parts` give the numbers per rank."""
    gpu = any(part.has_gpu for part in parts)
    keys = Keys(root, classes, chosen)
    shown, way = _prepared(root, keys, chosen)
    wholes = (shown.gpu, shown.cpu)
    whole = shown.gpu if gpu else shown.cpu
    rows = _view(shown, side, way, keys, chosen, gpu)
    if len(parts) > 1:
        known: dict[tuple[int, str, str], int] = {}
        places = _places(rows, known)
        for part in parts:
            own, own_way = _prepared(part.tree.root, keys, chosen)
            title = _title(part, parts)
            theirs = _view(own, part.side.root, own_way, keys, chosen, gpu)
            measures = dict(zip(_places(theirs, known), (_measure(row, gpu) for row in theirs), strict=True))
            for place, row in zip(places, rows, strict=True):
                row.ranks[title] = measures.get(place, 0)
    flat = chosen.by in FLAT or chosen.by == "kernel"
    for row in rows:
        row.gpu_each = gpu
        if whole:
            itself = flat or row.kind == "outside"
            elsewhere = row.twice + (row.shared if gpu and not itself else 0)
            row.share = (_measure(row, gpu, itself) - elsewhere) / whole
            row.part = row.share if chosen.by == "tree" else _measure(row, gpu, True) / whole
        row.weight = max(row.gpu / wholes[0] if wholes[0] else 0.0, row.cpu / wholes[1] if wholes[1] else 0.0)
    return rows


def _measure(row: Row, gpu: bool, own: bool = False) -> int:
    if gpu:
        return row.gpu_self if own else row.gpu
    return row.cpu_self if own else row.cpu


def _places(rows: list[Row], known: dict[tuple[int, str, str], int]) -> list[int]:
    """A number for each row that is the same for rows with the same path."""
    numbers: dict[int, int] = {}
    found = []
    for row in rows:
        above = -1 if row.above is None else numbers.get(id(row.above), -2)
        number = known.setdefault((above, row.kind, row.name), len(known))
        numbers[id(row)] = number
        found.append(number)
    return found


def _prepared(root: Node, keys: Keys, chosen: Selection) -> tuple[Node, set[int]]:
    """The tree with fused work shared out and reduced to what was asked for, where that was wished."""
    if chosen.split_fused:
        root = split_fused(root)
        total(root)
    if (chosen.include or chosen.exclude) and chosen.by != "kernel":
        return filtered(root, chosen.include, chosen.exclude, keys.alias)
    return root, set()


def _title(part: Part, parts: list[Part]) -> str:
    same = [other for other in parts if other.title == part.title]
    return part.title if len(same) == 1 else f"{part.title} ({part.index + 1} of {part.source})"


def _view(root: Node, side: Node, way: set[int], keys: Keys, chosen: Selection, gpu: bool) -> list[Row]:
    if chosen.by == "tree":
        return _tree(root, side, keys.fold, chosen)
    if chosen.by == "kernel":
        return _kernels(root, chosen)
    if chosen.by in FLAT:
        return _flat(root, keys, chosen, gpu)
    return _grouped(root, side, way, keys, chosen, gpu)


# ------------------------------------------------------------------------------------------------ by path


def tree_of(root: Node, classes: dict[str, str], chosen: Selection) -> Node:
    """The tree as the view "tree" shows it."""
    keys = Keys(root, classes, chosen)
    return _folded(_prepared(root, keys, chosen)[0], keys.fold, chosen)


def _folded(root: Node, fold: Folding, chosen: Selection) -> Node:
    if not chosen.fold:
        return root
    folded = Node(root.name, None)
    merge_into(folded, root, lambda node: node.name._replace(text=fold(node.name.text, node.name.category)))
    total(folded)
    return folded


def _tree(root: Node, side: Node, fold: Folding, chosen: Selection) -> list[Row]:
    root = _folded(root, fold, chosen)
    rows = _subtree(root, chosen, None)
    if side.children and not chosen.include:
        top = Row("start/end ranges", 0, "side", "")  # in paths only
        for row in _subtree(side, chosen, top):
            if matches(row.name, row.name, chosen.exclude):
                continue
            row.kind = "side"
            rows.append(row)
    return rows


def _subtree(root: Node, chosen: Selection, top: Row | None) -> list[Row]:
    rows: list[Row] = []
    todo: list[tuple[Node, int, Row | None]] = [(child, 0, top) for child in reversed(root.ordered())]
    while todo:
        node, depth, above = todo.pop()
        row = row_of(node, depth, above)
        rows.append(row)
        if top is None and chosen.depth is not None and depth + 1 >= chosen.depth:
            continue
        if top is None and chosen.kernels:
            rows.extend(_op_rows(node, row))
        todo.extend((child, depth + 1, row) for child in reversed(node.ordered()))
    return rows


# ------------------------------------------------------------------------------------------------ by a property


def _flat(root: Node, keys: Keys, chosen: Selection, gpu: bool) -> list[Row]:
    """Rows of which none lies inside another: the outermost ranges of a kind, each with all that is inside it."""
    key = keys.function()
    rows: dict[str, Row] = {}
    outside = Row(f"outside every {chosen.by}", 0, "outside", "")
    todo = list(reversed(root.ordered()))
    while todo:
        node = todo.pop()
        name = key(node)
        if name is None:
            _own(outside, node)
            todo.extend(reversed(node.ordered()))
            continue
        row = rows.get(name)
        if row is None:
            row = rows[name] = Row(name, 0, "unknown" if node.is_unknown() else "range", node.name.category)
        _accumulate(row, node, whole=True)
        row.cpu_self += node.cpu
        row.gpu_self += node.gpu - node.gpu_shared
    found = list(rows.values())
    if chosen.by == "component":
        found.sort(key=lambda row: (row.kind == "unknown", -(row.gpu if gpu else row.cpu)))
    return [*found, *_summary(found, chosen.by), *_worth(outside)]


def _grouped(root: Node, side: Node, way: set[int], keys: Keys, chosen: Selection, gpu: bool) -> list[Row]:
    """Rows that may lie inside one another; a range's own time belongs to the innermost row around it."""
    key = keys.function()
    rows: dict[str, Row] = {}
    outside = Row(f"outside every {chosen.by}", 0, "outside", "")
    every = chosen.by == "range"
    roots = [(root, False)] + ([(side, True)] if every and not chosen.include else [])
    for start, aside in roots:
        inside: dict[str, int] = {}  # row -> how many of its ranges are around here
        # a node and the innermost row around it; None and the row that ends here
        todo: list[tuple[Node | None, Row]] = [(child, outside) for child in reversed(start.ordered())]
        while todo:
            node, inner = todo.pop()
            if node is None:
                inside[inner.name] -= 1
                continue
            name = None if id(node) in way else key(node)
            if name is not None:
                row = rows.get(name)
                if row is None:
                    kind = "side" if aside else "unknown" if node.is_unknown() else "range"
                    row = rows[name] = Row(name, 0, kind, node.name.category)
                again = inside.get(name, 0) > 0
                _accumulate(row, node, whole=every or not again)
                if every and again:
                    row.twice += node.gpu - node.gpu_shared if gpu else node.cpu
                inner = row
                inside[name] = inside.get(name, 0) + 1
                todo.append((None, row))
            if inner is outside:
                _own(outside, node)
            else:
                inner.cpu_self += node.cpu_self
                inner.gpu_self += node.gpu_self
            todo.extend((child, inner) for child in reversed(node.ordered()))
    found = list(rows.values())
    found.sort(key=lambda row: (row.kind == "unknown", -(row.gpu if gpu else row.cpu)))  # stable: outer ones first
    return [*found, *_worth(outside)]


def _own(row: Row, node: Node) -> None:
    """Add what a range did itself, outside of those in it."""
    for mine, own in (("cpu", "cpu_self"), ("gpu", "gpu_self")):
        value = getattr(node, own)
        setattr(row, mine, getattr(row, mine) + value)
        setattr(row, own, getattr(row, own) + value)
    row.gap += node.gap_self
    for counter in BELOW:
        setattr(row, counter, getattr(row, counter) + getattr(node, counter))


def _worth(outside: Row) -> list[Row]:
    """The row, where it holds anything."""
    return [outside] if outside.cpu or outside.kernels or outside.copies else []


def _summary(rows: list[Row], by: str) -> list[Row]:
    """One row over all steps (stages, requests), with the spread over them."""
    if len(rows) < 2 or by == "component":
        return []
    whole = Row(f"all {len(rows)} {by}s", 0, "summary", by)
    for row in rows:
        for name in _SUMMED:
            setattr(whole, name, getattr(whole, name) + getattr(row, name))
        _bounds(whole, row)
        whole.distribution = merged(whole.distribution, row.distribution)
    return [whole]


# ------------------------------------------------------------------------------------------------ by kernel


def _kernels(root: Node, chosen: Selection) -> list[Row]:
    rows: dict[str, Row] = {}
    paths = by_path((*chosen.include, *chosen.exclude))
    todo: list[tuple[Node, str, bool]] = [(root, "", not chosen.include)]
    while todo:
        node, before, inside = todo.pop()
        path = "" if not paths else f"{before}/{node.name.text}" if before else node.name.text
        if chosen.include or chosen.exclude:
            if matches(node.name.text, path, chosen.exclude):
                continue
            inside = inside or matches(node.name.text, path, chosen.include)
        for name, (count, duration, credit) in (node.ops or {}).items():
            if not (inside or matches(name, name, chosen.include)) or matches(name, name, chosen.exclude):
                continue
            row = rows.get(name)
            if row is None:
                row = rows[name] = Row(name, 0, "kernel", "kernel")
            row.calls += count
            row.kernels += count
            row.gpu_sum += duration
            row.gpu += credit
            row.gpu_self += credit
        todo.extend((child, path, inside) for child in reversed(node.ordered()))
    return sorted(rows.values(), key=lambda row: (-row.gpu, row.name))


def _op_rows(node: Node, above: Row) -> list[Row]:
    found = []
    for name, (count, duration, credit) in sorted((node.ops or {}).items(), key=lambda item: -item[1][2]):
        row = Row(name, above.depth + 1, "kernel", "kernel", above, calls=count, kernels=count)
        row.gpu_sum, row.gpu, row.gpu_self = duration, credit, credit
        found.append(row)
    return found


# ------------------------------------------------------------------------------------------------ shared


def row_of(node: Node, depth: int, above: Row | None) -> Row:
    """The row of one node of the tree, with all that is inside it."""
    kind = "unknown" if node.is_unknown() else "range"
    row = Row(node.name.text, depth, kind, node.name.category, above)
    _accumulate(row, node, whole=True)
    row.cpu_self, row.gpu_self = node.cpu_self, node.gpu_self
    row.fused = fused_owners(node.name.text)
    row.flags = tuple(sorted(node.flags))
    return row


def _accumulate(row: Row, node: Node, whole: bool) -> None:
    """Add a node to a row. Not `whole`: the row already holds a range around it, so only the calls are new."""
    row.calls += node.calls
    row.open += node.open
    if node.flags:
        row.flags = tuple(sorted({*row.flags, *node.flags}))
    _bounds(row, node)
    row.distribution = merged(row.distribution, node.each)
    if not whole:
        return
    row.cpu += node.cpu
    row.gpu += node.gpu
    row.shared += node.gpu_shared
    row.gap += node.gap
    row.proj += node.proj
    row.proj_calls += node.proj_calls
    row.launches += node.launches
    if node.below != NOTHING:
        for counter, value in zip(BELOW, node.below, strict=True):
            if value:
                setattr(row, counter, getattr(row, counter) + value)
    if node.peak is not None and (row.peak is None or node.peak > row.peak):
        row.peak = node.peak
    if node.name.category == "residency":
        row.payload += node.payload


def _bounds(row: Row, more: Row | Node) -> None:
    if more.cpu_min is not None and (row.cpu_min is None or more.cpu_min < row.cpu_min):
        row.cpu_min = more.cpu_min
    if more.cpu_max is not None and (row.cpu_max is None or more.cpu_max > row.cpu_max):
        row.cpu_max = more.cpu_max
