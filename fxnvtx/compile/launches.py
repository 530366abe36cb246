"""What a line of Inductor's generated code launches, and who owns it.

What launches is known, kind of line by kind of line; everything else is no launch. A form that is in neither list is
no launch either and is remembered in `unknown_forms`, which the tests want empty under every version of torch.

Inductor announces each kernel and the scheduler nodes it was made of (set_kernel_post_grad_provenance_tracing).
Launches without announcement say by themselves (`line.node`), or are being written for the scheduler's current node.
Knows Inductor's internals as inductor.py does, which checks that they are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from torch.fx import Node

from .computed import Lowered
from .notices import CompiledRegion, warn_once
from .owners import Before, Owners, Row, input_shapes
from .work import NOTHING, Work, launch_work

__all__ = ["FLOW", "LAUNCHING", "QUIET", "Compilation", "Launch", "attributed", "unknown_forms"]

# Kinds of wrapper lines, by class name, of torch 2.11 to 2.15.
LAUNCHING = frozenset(
    {
        "KernelCallLine",
        "ExternKernelOutLine",
        "ExternKernelAllocLine",
        "ExternKernelMultiOutLine",
        "ScatterFallbackLine",
        "IndexPutFallbackLine",
        "DynamicScalarLine",
    }
)
# After these, which launch came last is known no longer: what follows may be reached another way.
FLOW = frozenset({"EnterSubgraphLine", "ExitSubgraphLine", "ConditionalLine"})
QUIET = FLOW | {
    "AllocateLine",
    "AllocFromPoolLine",
    "AssertAlignmentLine",
    "AssertDivByZeroLine",
    "AssertSizeStrideLine",
    "CommBufferAllocateLine",
    "CommBufferFreeLine",
    "CommBufferLine",
    "CommentLine",
    "DeallocFromPoolLine",
    "EnterCudaMemPoolContextLine",
    "EnterCudaStreamContextLine",
    "EnterDeviceContextManagerLine",
    "EnterDeviceContextManagerWithStreamInfoLine",
    "ExitCudaMemPoolContextLine",
    "ExitCudaStreamContextLine",
    "ExitDeviceContextManagerLine",
    "ExitDeviceContextManagerWithStreamInfoLine",
    "FreeIfNotReusedLine",
    "FreeLine",
    "GroupedAssertSizeStrideLine",
    "KernelDefinitionLine",
    "MultiOutputLine",
    "NullLine",
    "ReinterpretLine",
    "ReuseLine",
    "SymbolicCallArgLine",
    "UnbackedSymbolDefsLine",
}
# Lines of plain text, without indentation.
_RESULT = r"(?:\(?[\w, ]*\)? = )?"
_QUIET_OPERATORS = r"torch\.ops\.(?:inductor\._reinterpret_tensor|streams\.)|aten\.reinterpret_tensor"
_LAUNCHING_TEXT = re.compile(
    rf"(?!{_RESULT}(?:{_QUIET_OPERATORS})){_RESULT}(?:"
    r"(?:extern_kernels|torch\.ops|aten|prims|inductor_ops|quantized)\.[\w.]+\("  # operators
    r"|\w+\.run\("  # a kernel that writes its own call
    r"|[^=(]+\.(?:zero_|fill_|copy_|normal_)\("  # a workspace zeroed, a copy between devices
    r"|\w+(?:\[[^=]*\])?(?:\.\w+\([^=]*\))*\.(?:clone\(\)|sum\(dim=)"  # carried by a loop; end of a split reduction
    r"|torch\.(?:stack|cat)\("
    r")|\w+\[\w+\] = [\w.()\[\]]+\.clone\(\)"
)
_QUIET_TEXT = re.compile(
    r"$|#|del |assert|raise |import |from |if |else|elif |while |for |return|global |with |def "
    r"|class |try:|finally:|pass"
    rf"|{_RESULT}(?:{_QUIET_OPERATORS}"
    r"|get_raw_stream\(|reinterpret_tensor\(|alloc_from_pool\(|empty_strided|rand_strided\("
    r"|get_external_object_by_index\("
    r"|copy_if_misaligned\("  # copies only what came in at an odd address
    r"|triton\.tools\.|torch\.Event\(|pickle\.|max\(|min\()"
    r"|[\w.]*\bsynchronize\(|[\w.]+\.(?:record|synchronize|wait|wait_event|wait_stream)\(|run_intermediate_hooks\("
    r"|(?:start|end)_graph\(|track_tensor\(|check_memory_step\(|_print|print\(|nvtx\.|torch\.cuda\.nvtx"
    r"|\w+ = \w+\.(?:size|stride|storage_offset|view|as_strided)\("
    r"|[\w\[\]]+ = [\w\[\]\s()*/+,.%;-]+(?:#.*)?$"  # arithmetic on sizes, tuples of names
)
unknown_forms: dict[str, None] = {}  # of lines, the first hundred met in this process


class Launch(NamedTuple):
    """One launch site: who owns it, the shapes it reads, and its work."""

    row: Row
    shapes: list[list[int]]
    work: Work = NOTHING


class Compilation:
    """One region being compiled: its key and its owners."""

    def __init__(self, key: str, owners: Owners, about: CompiledRegion, cache_key: str | None = None) -> None:
        self.key = key
        self.cache_key = cache_key or key  # of all that is written into the code: the key and the owners' paths
        self.owners = owners
        self.about = about
        self.backward = False
        self.before: Before | None = None
        self.announced: tuple[str | None, list[Any]] = (None, [])  # a kernel and the scheduler nodes it is made of
        self.provenance_level = 0  # the user's own setting
        self._lowered: dict[int, Lowered] = {}
        self._weights: set[Node] = set()
        self._counted: set[Node] = set()  # nodes whose work an earlier launch does

    def look_at(self, graph: Any, static: Iterable[int]) -> None:
        """Before the passes: `static` are the positions of weights among the graph's inputs."""
        self.before = Before(graph)
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self._weights = {inputs[i] for i in static if i < len(inputs)}

    def forget(self) -> None:
        """A backward may be compiled later; until then no graph is kept."""
        self.before = None
        self.announced = (None, [])
        self._lowered.clear()
        self._weights.clear()
        self._counted.clear()
        self.owners.forget()

    def lowered(self, graph: Any) -> Lowered:
        """The index of one of Inductor's graphs. A graph below another is lowered and written while that one is."""
        found = self._lowered.get(id(graph))
        if found is None:
            found = self._lowered[id(graph)] = Lowered(graph)
        return found

    def launch(self, nodes: Iterable[Node], lowered: Lowered, parts: Iterable[Any] = ()) -> Launch:
        """`parts`: the scheduler nodes that its code is made of, none where it is ready-made. Sets of nodes have no
        order that repeats; the graph's order does, and generated code must repeat."""
        nodes = sorted(nodes, key=lambda n: (lowered.position.get(n, -1), n.name))
        row = self.owners.row(nodes, self.before)
        self.about.launches += 1
        self.about.unknown += bool(row.unknown)
        try:
            work = launch_work(nodes, parts, lowered, self._counted)
        except Exception as error:  # a model compiles, whatever its kernels may do
            warn_once("work", f"the work of some kernels is not known, looking it up failed: {error!r}")
            work = Work(unknown="its work could not be looked up")
        return Launch(row, input_shapes(nodes, self._weights), work)


def attributed(wrapper: Any, line: Any, wrapper_line: type) -> Launch | None:
    """What this line launches; None where it launches nothing."""
    if not launches(line, wrapper_line):
        return None
    try:
        return _launch_of(wrapper, line)
    except Exception as error:  # a model compiles, whoever its kernels may belong to
        warn_once("owners", f"some kernels cannot be attributed, looking up their owners failed: {error!r}")
        return Launch(Row((), "its owner could not be looked up"), [])


def launches(line: Any, wrapper_line: type) -> bool:
    """Whether this line of generated code launches something."""
    if isinstance(line, wrapper_line):
        kind = type(line).__name__
        if kind not in LAUNCHING and kind not in QUIET:
            _note(kind)
        return kind in LAUNCHING
    text = line if isinstance(line, str) else getattr(line, "line", None)
    if not isinstance(text, str):
        return False
    text = text.strip()
    if _LAUNCHING_TEXT.match(text):
        return True
    if not _QUIET_TEXT.match(text):
        _note(text)
    return False


def _note(form: str) -> None:
    if len(unknown_forms) < 100:
        unknown_forms[form] = None


def _launch_of(wrapper: Any, line: Any) -> Launch:
    from torch._inductor.virtualized import V

    compilation = cast(Compilation, wrapper.fxnvtx)
    parts: list[Any] = []
    lowered = compilation.lowered(V.graph)
    name, schedule = compilation.announced
    if type(line).__name__ == "KernelCallLine" and name is not None and getattr(line, "kernel_name", name) == name:
        parts = _launched(schedule, getattr(line, "call_args", ()))
        nodes = lowered.of_schedule(parts)
    else:
        node = lowered.node_of(getattr(line, "node", None))
        current = getattr(getattr(V.graph, "scheduler", None), "current_node", None)
        nodes = [node] if node is not None else lowered.of_schedule(() if current is None else (current,))
    return compilation.launch(nodes, lowered, parts)


def _launched(schedule: list[Any], arguments: Any) -> list[Any]:
    """The scheduler nodes of this very launch. Kernels that combine independent ones are announced with all of them
    even where they became several."""
    given = {a for a in arguments if isinstance(a, str)}
    mine = [n for n in schedule if hasattr(n, "get_outputs") and any(b.get_name() in given for b in n.get_outputs())]
    return mine if len(schedule) > 1 and mine and all(_independent(n, schedule) for n in schedule) else schedule


def _independent(node: Any, schedule: list[Any]) -> bool:
    """Whether no other node of the schedule reads what this one writes."""
    names = {b.get_name() for b in node.get_outputs()} if hasattr(node, "get_outputs") else set()
    reads = (n.read_writes.reads for n in schedule if n is not node and hasattr(n, "read_writes"))
    return bool(names) and not any(d.name in names for found in reads for d in found)
