"""The tree seen from a side: rows by path, request, stage, step, component, module, class, kernel or label (pure)."""

from __future__ import annotations

from fnmatch import fnmatchcase

from .keys import Keys
from .labels import Folding, fused_owners
from .part import Part
from .rows import VIEWS, Row, Selection, Spread
from .split import split_fused
from .tree import BELOW, Node, merge_into, total

__all__ = ["VIEWS", "Row", "Selection", "rows_of"]


def rows_of(root: Node, side: Node, parts: list[Part], classes: dict[str, str], chosen: Selection) -> list[Row]:
    """The rows of one view of the merged tree; `parts` give the numbers per rank."""
    gpu = any(part.has_gpu for part in parts)
    if chosen.split_fused:
        root = split_fused(root)
        total(root)
    whole = root.gpu if gpu else root.cpu
    keys = Keys(root, classes, chosen)
    rows = _view(root, side, keys, chosen, gpu)
    if len(parts) > 1:
        for part in parts:
            own = split_fused(part.tree.root) if chosen.split_fused else part.tree.root
            if chosen.split_fused:
                total(own)
            title = _title(part, parts)
            values = {row.path: row.gpu if gpu else row.cpu for row in _view(own, part.side.root, keys, chosen, gpu)}
            for row in rows:
                row.ranks[title] = values.get(row.path, 0)
    for row in rows:
        row.share = (row.gpu if gpu else row.cpu) / whole if whole else 0.0
    return rows


def _title(part: Part, parts: list[Part]) -> str:
    same = [other for other in parts if other.title == part.title]
    return part.title if len(same) == 1 else f"{part.title} ({part.index + 1} of {part.source})"


def _view(root: Node, side: Node, keys: Keys, chosen: Selection, gpu: bool) -> list[Row]:
    if chosen.by == "tree":
        return _tree(root, side, keys.fold, chosen, gpu)
    if chosen.by == "kernel":
        return _kernels(root, chosen)
    return _grouped(root, side, keys, chosen, gpu)


# ------------------------------------------------------------------------------------------------ by path


def _tree(root: Node, side: Node, fold: Folding, chosen: Selection, gpu: bool) -> list[Row]:
    samples: dict[tuple[str, ...], list[int]] = {}
    shown = root
    if chosen.fold:
        shown = Node(root.name, None)
        merge_into(shown, root, lambda node: node.name._replace(text=fold(node.name.text, node.name.category)))
        total(shown)
        samples = _samples(root, fold, gpu)
    keep = _kept(shown, chosen)
    rows: list[Row] = []
    todo: list[tuple[Node, tuple[str, ...]]] = [(kid, ()) for kid in reversed(shown.ordered())]
    while todo:
        node, above = todo.pop()
        if keep is not None and id(node) not in keep:
            continue
        path = (*above, node.name.text)
        row = _row(node, path, len(above))
        values = samples.get(path)
        if values and len(values) > 1:
            row.each = Spread.of(values)
        rows.append(row)
        if chosen.depth is not None and len(path) >= chosen.depth:
            continue
        if chosen.kernels:
            rows.extend(_op_rows(node, path))
        todo.extend((kid, path) for kid in reversed(node.ordered()))
    if side.kids and not chosen.include:
        for node in side.walk():
            if node.parent is not None and not _excluded(node, chosen):
                row = _row(node, ("start/end ranges", *(name.text for name in node.path())), len(node.path()) - 1)
                row.kind = "side"
                rows.append(row)
    return rows


def _samples(root: Node, fold: Folding, gpu: bool) -> dict[tuple[str, ...], list[int]]:
    """Per folded path: the measure of each node that fell on it."""
    found: dict[tuple[str, ...], list[int]] = {}
    todo: list[tuple[Node, tuple[str, ...]]] = [(kid, ()) for kid in root.kids.values()]
    while todo:
        node, above = todo.pop()
        path = (*above, fold(node.name.text, node.name.category))
        found.setdefault(path, []).append(node.gpu if gpu else node.cpu)
        todo.extend((kid, path) for kid in node.kids.values())
    return found


def _kept(root: Node, chosen: Selection) -> set[int] | None:
    """Identities of the nodes to show: matching ones, all below them, and the way to them. None: all."""
    if not chosen.include and not chosen.exclude:
        return None
    keep: set[int] = set()
    todo: list[tuple[Node, str, bool]] = [(kid, "", not chosen.include) for kid in root.kids.values()]
    while todo:
        node, above, inside = todo.pop()
        path = f"{above}/{node.name.text}" if above else node.name.text
        if _matches(node.name.text, path, chosen.exclude):
            continue
        inside = inside or _matches(node.name.text, path, chosen.include)
        if inside:
            at: Node | None = node
            while at is not None and id(at) not in keep:
                keep.add(id(at))
                at = at.parent
        todo.extend((kid, path, inside) for kid in node.kids.values())
    return keep


def _matches(text: str, path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(text, pattern) or fnmatchcase(path, pattern) for pattern in patterns)


def _excluded(node: Node, chosen: Selection) -> bool:
    return _matches(node.name.text, node.name.text, chosen.exclude)


# ------------------------------------------------------------------------------------------------ by a property


def _grouped(root: Node, side: Node, keys: Keys, chosen: Selection, gpu: bool) -> list[Row]:
    key = keys.function()
    rows: dict[str, Row] = {}
    values: dict[str, list[int]] = {}
    roots = [(root, False)] + ([(side, True)] if chosen.by == "range" else [])
    for start, aside in roots:
        # node, the groups that enclose it, the innermost of them
        todo: list[tuple[Node, frozenset[str], str | None]] = [
            (k, frozenset(), None) for k in reversed(start.ordered())
        ]
        while todo:
            node, around, inner = todo.pop()
            name = key(node)
            if name is not None and not _wanted(node, name, chosen):
                name = None
            if name is not None:
                row = rows.get(name)
                if row is None:
                    kind = "side" if aside else "unknown" if node.is_unknown() else "range"
                    row = rows[name] = Row(name, (name,), 0, kind, node.name.category)
                every = chosen.by == "range"
                _accumulate(row, node, whole=every or name not in around)
                if every or name not in around:
                    values.setdefault(name, []).append(node.gpu if gpu else node.cpu)
                inner = name
                around = around | {name}
            if inner is not None:
                row = rows[inner]
                row.cpu_self += node.cpu_self
                row.gpu_self += node.gpu_self
            todo.extend((kid, around, inner) for kid in reversed(node.ordered()))
    for name, row in rows.items():
        if len(values.get(name, ())) > 1:
            row.each = Spread.of(values[name])
    found = list(rows.values())
    if chosen.by in {"request", "stage", "step"}:
        found.extend(_summary(found, chosen.by))
        return found
    found.sort(key=lambda row: (row.kind == "unknown", -(row.gpu if gpu else row.cpu)))  # stable: outer ones first
    return found


def _summary(rows: list[Row], by: str) -> list[Row]:
    """One row over all steps (stages, requests), with the spread over them."""
    if len(rows) < 2:
        return []
    whole = Row(f"all {len(rows)} {by}s", (f"all {by}s",), 0, "summary", by)
    for row in rows:
        for name in ("calls", "cpu", "cpu_self", "gpu", "gpu_self", "gpu_sum", "kernels", "copies", "copied_bytes"):
            setattr(whole, name, getattr(whole, name) + getattr(row, name))
        for name in ("launches", "gap", "proj", "proj_calls", "resident", "overlap", "open"):
            setattr(whole, name, getattr(whole, name) + getattr(row, name))
    measure = [row.gpu for row in rows] if any(row.gpu for row in rows) else [row.cpu for row in rows]
    whole.each = Spread.of(measure)
    return [whole]


def _wanted(node: Node, name: str, chosen: Selection) -> bool:
    if not chosen.include and not chosen.exclude:
        return True
    path = "/".join(part.text for part in node.path())
    if _matches(name, path, chosen.exclude) or _matches(node.name.text, path, chosen.exclude):
        return False
    return not chosen.include or _matches(name, path, chosen.include) or _matches(node.name.text, path, chosen.include)


# ------------------------------------------------------------------------------------------------ by kernel


def _kernels(root: Node, chosen: Selection) -> list[Row]:
    rows: dict[str, Row] = {}
    for node in root.walk():
        for name, (count, duration, credit) in (node.ops or {}).items():
            if not _wanted(node, name, chosen):
                continue
            row = rows.get(name)
            if row is None:
                row = rows[name] = Row(name, (name,), 0, "kernel", "kernel")
            row.calls += count
            row.kernels += count
            row.gpu_sum += duration
            row.gpu += credit
            row.gpu_self += credit
    return sorted(rows.values(), key=lambda row: (-row.gpu, row.name))


def _op_rows(node: Node, path: tuple[str, ...]) -> list[Row]:
    found = []
    for name, (count, duration, credit) in sorted((node.ops or {}).items(), key=lambda item: -item[1][2]):
        row = Row(name, (*path, name), len(path), "kernel", "kernel", calls=count, kernels=count)
        row.gpu_sum, row.gpu, row.gpu_self = duration, credit, credit
        found.append(row)
    return found


# ------------------------------------------------------------------------------------------------ shared


def _row(node: Node, path: tuple[str, ...], depth: int) -> Row:
    kind = "unknown" if node.is_unknown() else "range"
    row = Row(node.name.text, path, depth, kind, node.name.category)
    _accumulate(row, node, whole=True)
    row.cpu_self, row.gpu_self = node.cpu_self, node.gpu_self
    row.fused = fused_owners(node.name.text)
    row.flags = tuple(sorted(node.flags))
    return row


def _accumulate(row: Row, node: Node, whole: bool) -> None:
    """Add a node to a row. Not `whole`: the row already holds a range around it, so only the calls are new."""
    row.calls += node.calls
    row.open += node.open
    row.flags = tuple(sorted({*row.flags, *node.flags}))
    if node.cpu_min is not None and (row.cpu_min is None or node.cpu_min < row.cpu_min):
        row.cpu_min = node.cpu_min
    if node.cpu_max is not None and (row.cpu_max is None or node.cpu_max > row.cpu_max):
        row.cpu_max = node.cpu_max
    if not whole:
        return
    row.cpu += node.cpu
    row.gpu += node.gpu
    row.gap += node.gap
    row.proj += node.proj
    row.proj_calls += node.proj_calls
    row.launches += node.launches
    for counter, value in zip(BELOW, node.below, strict=True):
        setattr(row, counter, getattr(row, counter) + value)
    if node.name.category == "residency":
        row.payload += node.payload
