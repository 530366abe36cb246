"""Why each module does, or does not, show up: the answer to "why do I see no range here"."""

from __future__ import annotations

import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from io import StringIO

from torch import fx, nn

from ..errors import InstrumentError
from ..ranges import emit, why_silent
from . import fx_graph as _graph
from . import unwrapped
from .registry import Control, Entry, controls_of, entry_of
from .selection import is_callable_module, walk_paths

__all__ = ["CompiledRegion", "Explanation", "Row", "explain", "note", "regions"]


@dataclass(frozen=True)
class Row:
    """One module by one of its names. `path` is "fx", "hooks", or "" where it gets no range."""

    fqn: str
    kind: str
    label: str
    path: str
    reason: str


@dataclass
class Explanation:
    """What `explain` found; printing it gives a table."""

    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def covered(self) -> list[Row]:
        return [r for r in self.rows if r.path]

    @property
    def uncovered(self) -> list[Row]:
        """Modules that no range will ever cover by name; their work counts to the nearest module above."""
        return [r for r in self.rows if not r.path]

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column, style in (("module", ""), ("class", "dim"), ("label", ""), ("path", "cyan"), ("why", "dim")):
            table.add_column(column, style=style, overflow="fold")
        for row in self.rows:
            table.add_row(row.fqn or "(root)", row.kind, row.label or "-", row.path or "none", row.reason)
        text = StringIO()
        wide = Console().width if sys.stdout.isatty() else 160
        console = Console(file=text, width=wide, no_color=True, highlight=False, markup=False, force_jupyter=False)
        console.print(table)
        for note in self.notes:
            console.print(f"- {note}")
        return text.getvalue().rstrip()

    __repr__ = __str__


def explain(model: nn.Module) -> Explanation:
    """Per module: its label, the path that emits its range, and why; then what no range will cover.

    Raises InstrumentError where the model was never instrumented.
    """
    if not isinstance(model, nn.Module):
        raise InstrumentError(f"explain takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, fx.GraphModule):
        return _explain_graph(model)
    inner = unwrapped(model)
    control = controls_of(inner)
    if control is None:
        raise InstrumentError(f"this {type(inner).__name__} is not instrumented: call fxnvtx.instrument(model) first")
    control.look_everywhere()
    found = Explanation(f"{control.text('')}: {sum(1 for _ in inner.modules())} modules")
    known = {fqn: entry for entry in control.entries for fqn in (entry.fqn, *entry.by_parent.values(), *entry.also)}
    for path, module, _ in walk_paths(inner):
        fqn = ".".join(path)
        entry = known.get(fqn)
        kind = type(module).__name__
        if entry is None or entry.module() is not module:
            found.rows.append(Row(fqn, kind, "", "", _why_not(control, fqn, module)))
        else:
            found.rows.append(Row(fqn, kind, control.text(_shown_as(entry, fqn)), entry.path, _why(entry, fqn)))
    found.notes = [*_state(control, inner), *map(str, regions())]
    return found


def _shown_as(entry: Entry, fqn: str) -> str:
    """Two names below one caller cannot be told apart at run time: both show as the first."""
    return next((f for f in entry.by_parent.values() if fqn in entry.also and _same_parent(f, fqn)), fqn) or entry.fqn


def _same_parent(a: str, b: str) -> bool:
    return a.rpartition(".")[0] == b.rpartition(".")[0]


def _why(entry: Entry, fqn: str) -> str:
    reasons = []
    if fqn in entry.also:
        reasons.append("same module under another name of the same caller; which one was used cannot be known")
    elif len(entry.by_parent) > 1:
        reasons.append("tied: named by the path it is reached through")
    if entry.level is not None:
        reasons.append("its forward is generated")
    elif entry.reason:
        reasons.append(f"its forward stays: {entry.reason}")
    if entry.kind.__call__ is not nn.Module.__call__:
        reasons.append("the class defines __call__: a range appears only if that calls nn.Module.__call__")
    return "; ".join(reasons)


def _why_not(control: Control, fqn: str, module: nn.Module) -> str:
    if not is_callable_module(module):
        return "a container that is never called"
    if not control.selection.takes(fqn, type(module)):
        return "excluded"
    if control.selection.depth is not None:
        return f"below depth {control.selection.depth}"
    return "not read yet: the next call of the model does so"


def _state(control: Control, model: nn.Module) -> list[str]:
    notes = []
    if not control.enabled:
        notes.append("switched off: fxnvtx.set_enabled(model, True) brings the ranges back")
    if not emit.active:
        notes.append(f"nobody listens, so nothing is emitted: {why_silent()}")
    found = entry_of(model)
    if found is not None and found[0] is not control:
        notes.append(f"a later instrument() call names these modules: {found[0].text('')}")
    return notes


def _explain_graph(model: fx.GraphModule) -> Explanation:
    """A GraphModule with range nodes shows what its nodes say."""
    found = Explanation(f"{type(model).__name__}: a graph")
    if not _graph.has_ranges(model):
        found.notes.append("no range nodes: use the GraphModule that fxnvtx.instrument returns")
    for node in model.graph.nodes:
        if node.op == "call_function" and node.target is _graph.range_push:
            text = str(node.args[0])
            if all(r.label != text for r in found.rows):
                found.rows.append(Row(text, "", text, "fx", "range nodes in the graph"))
    return found


# ------------------------------------------------------------------------------------------------- compiled regions

_SHOWN = 6


@dataclass
class CompiledRegion:
    """`path`: "kernels" (ranges around kernel launches), "pieces" (one compiled piece per module), "nodes" (range nodes
    in the graph that runs), "region" (one range around the whole) or "none" (another backend compiled it). `reason`:
    why not "kernels", empty otherwise. `owners`: paths of the modules in the region, relative to `name`; `launches`:
    launch sites in the generated code, 0 where it came from a cache; `unknown`: those whose owner is not known; `note`:
    where else than in a range of its own it is shown, and why."""

    name: str
    backend: str
    path: str
    reason: str = ""
    owners: list[str] = field(default_factory=list)
    launches: int = 0
    unknown: int = 0
    note: str = ""

    def __str__(self) -> str:
        shown = ", ".join(self.owners[:_SHOWN]) + (", ..." if len(self.owners) > _SHOWN else "")
        text = f"compiled region {self.name} ({self.backend}): path {self.path}, {len(self.owners)} modules"
        if shown:
            text += f" [{shown}]"
        if self.launches:
            text += f", {self.launches} launch sites"
        if self.unknown:
            text += f", {self.unknown} of them cannot be attributed"
        return "; ".join(filter(None, (text, self.reason, self.note)))


_regions: deque[CompiledRegion] = deque(maxlen=1000)
_lock = threading.Lock()


def note(region: CompiledRegion) -> CompiledRegion:
    with _lock:
        _regions.append(region)
    return region


def regions() -> list[CompiledRegion]:
    """The last 1000 regions compiled with the fxnvtx backend, the oldest first."""
    with _lock:
        return list(_regions)
