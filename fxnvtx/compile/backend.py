"""The Dynamo backend "fxnvtx": `torch.compile(model, backend="fxnvtx")`, or `backend(...)` for more.

Where ranges cannot go around kernel launches, the graph is divided by owners: cut into one compiled piece per module
call, so that no kernel crosses a module's boundary (boundaries="strict"); or with range nodes, for a backend that runs
the graph as it is. These hold no labels: they move the call's cursor to a row of the region's table, as generated code
does, so that one graph shows the true names of every block it serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch.fx import GraphModule, Node
from torch.fx.node import has_side_effect

from ..errors import CompileError, warn_once
from ..modules.explain import CompiledRegion, note
from ..ranges import label, pop, push
from . import inductor
from .module_index import current_frame, digest, read_graph
from .owners import Chain, Owners, Row, owners_of
from .region import Region, remember
from .runtime import Table, current, ranged, watched

__all__ = ["Backend", "backend", "fxnvtx_backend"]

COMPILE = label("compile", "compile")
BOUNDARIES = ("fused", "strict")
# These run the graph they are given, node by node. Others trace it again and would lose or move what we insert.
_RUNS_THE_GRAPH = ("eager", "eager_noexcept")
Compiled = Callable[..., Any]


class Backend:
    """A Dynamo backend with ranges. Two made with the same options are equal, as Dynamo's cache wants it."""

    def __init__(self, inner: Any, boundaries: str, depth: int | None, mode: str | None, options: Any) -> None:
        self.inner = inner
        self.boundaries = boundaries
        self.depth = depth
        self.mode = mode
        self.options = options
        self.__name__ = "fxnvtx"
        self._cuda_graphs = False  # whether any region was compiled to be replayed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Backend) and self._options() == other._options()

    def __hash__(self) -> int:
        return hash((str(self.inner), self.boundaries, self.depth, self.mode))

    def __repr__(self) -> str:
        return f"fxnvtx.backend(inner={self.inner!r}, boundaries={self.boundaries!r})"

    def _options(self) -> tuple[Any, ...]:
        return self.inner, self.boundaries, self.depth, self.mode, self.options

    def __call__(self, graph_module: Any, example_inputs: Any, **kwargs: Any) -> Compiled:
        entry = push(COMPILE)
        try:
            return self._compile(graph_module, list(example_inputs), kwargs)
        finally:
            pop(entry)

    def _compile(self, graph_module: Any, inputs: list[Any], kwargs: dict[str, Any]) -> Compiled:
        mode, options = kwargs.pop("mode", self.mode), kwargs.pop("options", self.options)
        try:
            region, owners = read_graph(graph_module, current_frame(), inputs)
        except Exception as error:  # a model compiles, whatever its layers may be called
            warn_once("graph", f"a compiled region is not shown, reading its graph failed: {error!r}")
            return self._compile_unseen(graph_module, inputs, mode, options, kwargs)
        remember(region)
        about = note(CompiledRegion(region.title, self._inner_name(), "kernels", owners=region.paths, note=region.note))
        if self.inner != "inductor":
            return self._compile_other(graph_module, inputs, _given(mode, options, kwargs), region, owners, about)
        if mode and options:
            raise CompileError("give the fxnvtx backend either a mode or options, not both")
        patches = inductor.config_of(mode, options)
        reason = inductor.why_no_ranges(patches)
        if reason is not None:
            about.path, about.reason = "region", reason
            warn_once(reason, f"layers inside {region.title} will not be visible, one range per region is: {reason}")
            return ranged(region, inductor.compile_plain(graph_module, inputs, patches))
        region.replayed = inductor.replays(patches)
        self._cuda_graphs = self._cuda_graphs or region.replayed
        if self.boundaries == "strict":
            if has_subgraphs(graph_module):
                about.reason = "strict boundaries are not possible around control flow; kernels may be fused"
                warn_once("control flow", f"{region.title}: {about.reason}")
            else:
                return self._compile_pieces(graph_module, inputs, patches, region, owners, about)
        compilation = inductor.Compilation(region.key, owners, about)
        return ranged(region, inductor.compile_graph(graph_module, inputs, patches, compilation))

    def _compile_unseen(self, graph_module: Any, inputs: list[Any], mode: Any, options: Any, kwargs: Any) -> Compiled:
        """As if fxnvtx were not there."""
        if self.inner == "inductor":
            return inductor.compile_plain(graph_module, inputs, inductor.config_of(mode, options))
        compiled: Compiled = lookup(self.inner)(graph_module, inputs, **_given(mode, options, kwargs))
        return compiled

    def _compile_pieces(
        self,
        graph_module: Any,
        inputs: list[Any],
        patches: dict[str, Any],
        region: Region,
        owners: Owners,
        about: CompiledRegion,
    ) -> Compiled:
        def compile_piece(piece: Any, piece_inputs: Any) -> Compiled:
            # pieces of two blocks may be the same code: only their owners tell them apart
            compilation = inductor.Compilation(region.key, owners, about, digest(region.key, piece, owners))
            return watched(inductor.compile_graph(piece, piece_inputs, patches, compilation))

        pieces = cut(graph_module, owners, self.depth)
        about.path, about.reason = "pieces", f"{len(set(pieces.values()))} pieces"
        return ranged(region, compile_pieces(graph_module, inputs, pieces, compile_piece), watching=False)

    def _compile_other(
        self,
        graph_module: Any,
        inputs: list[Any],
        kwargs: dict[str, Any],
        region: Region,
        owners: Owners,
        about: CompiledRegion,
    ) -> Compiled:
        compiler = lookup(self.inner)
        if self.inner in _RUNS_THE_GRAPH:
            table = with_range_nodes(graph_module, region.key, owners)
            about.path, about.reason = "nodes", f'"{self.inner}" runs the graph as it is'
            return ranged(region, compiler(graph_module, inputs, **kwargs), table=table)
        about.path = "region"
        about.reason = f"{about.backend} compiles the graph further and would drop or move range nodes"
        return ranged(region, compiler(graph_module, inputs, **kwargs))

    def _inner_name(self) -> str:
        return self.inner if isinstance(self.inner, str) else getattr(self.inner, "__name__", repr(self.inner))

    def reset(self) -> None:
        """Called by torch._dynamo.reset(): CUDA graphs that Inductor keeps must go, as with its own backend."""
        if self.inner != "inductor":
            getattr(self.inner, "reset", lambda: None)()
        elif self._cuda_graphs:
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()
        self._cuda_graphs = False


def _given(mode: Any, options: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What torch.compile would pass on: only what was given."""
    return {k: v for k, v in (("mode", mode), ("options", options)) if v} | kwargs


def lookup(inner: Any) -> Callable[..., Any]:
    """The Dynamo backend of this name, or the callable itself."""
    from torch._dynamo.backends.registry import list_backends, lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        return lookup_backend(inner)
    except InvalidBackend as error:
        names = ", ".join(list_backends(()))
        raise CompileError(f"inner={inner!r} is no Dynamo backend; known ones: {names}") from error


def backend(
    inner: str | Compiled = "inductor",
    boundaries: str = "fused",
    *,
    depth: int | None = 1,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Backend:
    """A Dynamo backend whose regions show their layers: `torch.compile(model, backend=fxnvtx.backend(...))`.

    `inner`: the backend that does the work, by name or as a callable. `boundaries` (with "inductor" only): "fused"
    leaves every kernel as Inductor makes it; "strict" compiles one piece per module down to `depth` levels below the
    compiled frame (None: all), so that nothing is fused across them, at the price of speed. `mode`, `options`: as for
    torch.compile, which passes its own on, too.

    Errors: CompileError (unknown inner backend, unknown boundaries, boundaries where they have no meaning).
    """
    if boundaries not in BOUNDARIES:
        raise CompileError(f"boundaries must be one of {', '.join(map(repr, BOUNDARIES))}, not {boundaries!r}")
    if boundaries == "strict" and inner != "inductor":
        raise CompileError(f'boundaries="strict" is for inner="inductor"; with inner={inner!r} leave boundaries out')
    if depth is not None and (not isinstance(depth, int) or isinstance(depth, bool) or depth < 1):
        raise CompileError(f"depth must be a whole number from 1 on, or None for all levels, not {depth!r}")
    if mode and options:
        raise CompileError("give the fxnvtx backend either a mode or options, not both")
    if not isinstance(inner, str) and not callable(inner):
        raise CompileError(f"inner must be the name of a Dynamo backend or a callable, not {inner!r}")
    if inner == "fxnvtx" or isinstance(inner, Backend):
        raise CompileError("the fxnvtx backend cannot be its own inner backend; name the one that does the work")
    lookup(inner)
    return Backend(inner, boundaries, depth, mode, options)


fxnvtx_backend = Backend("inductor", "fused", None, None, None)

# ------------------------------------------------------------------------------------------------------------ by owners


def cut(graph_module: GraphModule, owners: Owners, depth: int | None) -> dict[Node, int]:
    """The number of the piece of every node. A piece is a maximal run of nodes with the same owner down to `depth`.

    A run of which nothing outside needs a result (it only writes in place) stays with the piece before it: a compiled
    piece must return something.
    """
    pieces: dict[Node, int] = {}
    number = 0
    previous: Chain | None = None
    started: list[Node] = []
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        chains = owners.chains(node)
        chain = (chains[0] if chains else ())[:depth]
        if previous is not None and chain != previous and node.op != "get_attr" and _used_later(started):
            number += 1
            started = []
        if node.op != "get_attr":
            previous = chain
        started.append(node)
        pieces[node] = number
    return pieces


def _used_later(nodes: list[Node]) -> bool:
    """Whether a node after this run needs one of its results."""
    inside = set(nodes)
    return any(user not in inside for node in nodes for user in node.users)


def has_subgraphs(graph_module: GraphModule) -> bool:
    """Whether the graph holds bodies of control flow: those cannot be cut."""
    return any(isinstance(m, GraphModule) for n, m in graph_module.named_modules() if n)


def compile_pieces(
    graph_module: Any, example_inputs: Any, pieces: dict[Node, int], compiler: Callable[[Any, Any], Any]
) -> Callable[..., Any]:
    """Cut a graph into numbered pieces and compile each, as Dynamo's DDPOptimizer does at its bucket boundaries."""
    from torch._dynamo.backends import distributed as split
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.split_module import split_module

    if len(set(pieces.values())) < 2:
        return cast("Callable[..., Any]", compiler(graph_module, example_inputs))
    whole = split_module(graph_module, None, lambda node: pieces[node])  # type: ignore[arg-type]
    split.propagate_dynamo_source(graph_module, whole)
    split.propagate_metadata(graph_module, whole)
    fake_mode = detect_fake_mode(example_inputs) or FakeTensorMode()
    split.SubmodCompiler(whole, compiler, fake_mode).run(*example_inputs)
    whole.recompile()
    return whole.forward


# ---------------------------------------------------------------------------------------------------------- range nodes


@has_side_effect
def move(row: int) -> None:
    """From here on, what runs belongs to this row."""
    cursor = current.cursor
    if cursor is not None:
        cursor(row)


def with_range_nodes(graph_module: GraphModule, key: str, owners: Owners) -> Table:
    """Insert the nodes, in place. Placeholders, attribute reads and the output belong to nobody."""
    rows: dict[Row, int] = {}
    previous: Row | None = None
    for node in list(graph_module.graph.nodes):
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        row = owners.row([node])
        if row != previous:
            previous = row
            number = rows.setdefault(row, len(rows) + 1)
            with graph_module.graph.inserting_before(node):
                graph_module.graph.call_function(move, (number,))
    graph_module.recompile()
    literal: list[Any] = [owners_of(row) for row in rows]
    return Table(key, False, literal, [])
