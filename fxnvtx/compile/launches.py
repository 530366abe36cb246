"""What a line of Inductor's generated code launches, and who owns it.

With provenance tracking on, Inductor announces each kernel (`write_provenance_debug_handle`) with the names of the
post-grad nodes it was made of. Launches without announcement say by themselves (`line.node`), or are being written for
the scheduler's current node. Knows Inductor's internals as inductor.py does, which checks that they are there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from torch.fx import Node

from .computed import computed_nodes
from .explain import CompiledRegion
from .notices import warn_once
from .owners import Before, Owners, Row, input_shapes

__all__ = ["LAUNCHING", "Compilation", "Launch", "announced", "attributed"]

# What a plain text line does, by how it starts or what it calls. Everything else with a call in it may launch.
_QUIET_STARTS = ("#", "del ", "assert", "raise ", "import ", "from ", "if not ", "while ", "else", "return", "global ")
_QUIET_CALLS = (
    "get_raw_stream(",
    "reinterpret_tensor(",
    "alloc_from_pool(",
    "empty_strided",
    "assert_size_stride(",
    "assert_alignment(",
    "get_external_object_by_index(",
    "run_intermediate_hooks(",
)
LAUNCHING = (
    "KernelCallLine",
    "ExternKernelOutLine",
    "ExternKernelAllocLine",
    "ExternKernelMultiOutLine",
    "ScatterFallbackLine",
    "IndexPutFallbackLine",
    "DynamicScalarLine",
)


class Launch(NamedTuple):
    """One launch site: who owns it, and the shapes it reads."""

    row: Row
    shapes: list[list[int]]


class Compilation:
    """One region being compiled: its key and its owners."""

    def __init__(self, key: str, owners: Owners, about: CompiledRegion, cache_key: str | None = None) -> None:
        self.key = key
        self.cache_key = cache_key or key  # of all that is written into the code: the key and the owners' paths
        self.owners = owners
        self.about = about
        self.backward = False
        self.before: Before | None = None
        self._order: dict[Node, int] = {}
        self._weights: set[Node] = set()

    def look_at(self, graph: Any, static: Iterable[int]) -> None:
        """Before the passes: `static` are the positions of weights among the graph's inputs."""
        self.before = Before(graph)
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self._weights = {inputs[i] for i in static if i < len(inputs)}

    def forget(self) -> None:
        """A backward may be compiled later; until then no graph is kept."""
        self.before = None
        self._order.clear()
        self._weights.clear()
        self.owners.forget()

    def launch(self, nodes: Iterable[Node]) -> Launch:
        """Sets of nodes have no order that repeats; the graph's order does, and generated code must repeat."""
        nodes = list(nodes)
        order = self._order
        for node in nodes:
            if node not in order:
                order.update({n: i for i, n in enumerate(node.graph.nodes)})
        nodes.sort(key=lambda n: (order.get(n, -1), n.name))
        row = self.owners.row(nodes, self.before)
        self.about.launches += 1
        self.about.unknown += row.unknown
        return Launch(row, input_shapes(nodes, self._weights))


def compilation_of(wrapper: Any) -> Compilation:
    return cast(Compilation, wrapper.fxnvtx)


def attributed(wrapper: Any, line: Any, wrapper_line: type) -> Launch | None:
    """What this line launches; None where it launches nothing."""
    try:
        return _launch_of(wrapper, line, wrapper_line)
    except Exception as error:
        return _unattributed(error)


def _unattributed(error: Exception) -> Launch:
    """A model compiles, whoever its kernels may belong to."""
    warn_once("owners", f"some kernels cannot be attributed, looking up their owners failed: {error!r}")
    return Launch(Row((), True), [])


def _launch_of(wrapper: Any, line: Any, wrapper_line: type) -> Launch | None:
    if isinstance(line, wrapper_line):
        kind = type(line).__name__
        if kind not in LAUNCHING:
            return None
        handle = wrapper.fxnvtx_handle
        if kind == "KernelCallLine" and handle is not None:
            return _launch_of_kernel(wrapper, line, handle[1])
        node = getattr(line, "node", None)
        launch = _launch_of_ir(wrapper, node)
        if launch is not None:
            return launch
        return _launch_of_current(wrapper)
    text = line if isinstance(line, str) else getattr(line, "line", None)
    if not isinstance(text, str) or "(" not in text:
        return None
    text = text.strip()
    if text.startswith(_QUIET_STARTS) or any(call in text for call in _QUIET_CALLS):
        return None
    return _launch_of_current(wrapper)


def _launch_of_ir(wrapper: Any, node: Any) -> Launch | None:
    """An extern kernel's own origin is exact; the others are a set."""
    origin = getattr(node, "origin_node", None)
    if isinstance(origin, Node):
        return compilation_of(wrapper).launch([origin])
    origins = getattr(node, "origins", None)
    return compilation_of(wrapper).launch(origins) if origins else None


def _launch_of_current(wrapper: Any) -> Launch:
    from torch._inductor.virtualized import V

    scheduled = getattr(getattr(V.graph, "scheduler", None), "current_node", None)
    nodes: dict[Node, None] = {}
    parts = scheduled.get_nodes() if scheduled is not None else ()
    for part in parts:
        inner = getattr(part, "node", None)
        origin = getattr(inner, "origin_node", None)
        if len(parts) == 1 and isinstance(origin, Node):
            return compilation_of(wrapper).launch([origin])
        nodes.update(dict.fromkeys(getattr(inner, "origins", ())))
    return compilation_of(wrapper).launch(nodes)


def _launch_of_kernel(wrapper: Any, line: Any, named: list[Node]) -> Launch:
    from torch._inductor.virtualized import V

    if not named:
        return _launch_of_current(wrapper)
    try:
        named = computed_nodes(V.graph, getattr(line, "call_args", ()), wrapper.fxnvtx_written, named)
    except (AttributeError, KeyError, TypeError, RecursionError):  # not in this torch, too deep: the names have to do
        pass
    return compilation_of(wrapper).launch(named)


def announced(wrapper: Any, kernel_name: str, handle: int | None) -> list[Node]:
    """The nodes that Inductor announces under this handle."""
    from torch._inductor import debug
    from torch._inductor.virtualized import V

    names = debug._inductor_triton_kernel_to_post_grad_node_info.get(f"{kernel_name}:{handle}", ())
    graph = V.graph.graph
    known = wrapper.fxnvtx_nodes.get(id(graph))
    if known is None:
        known = wrapper.fxnvtx_nodes[id(graph)] = {n.name: n for n in graph.nodes}
    return [known[n] for n in names if n in known]
