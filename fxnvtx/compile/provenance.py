"""What a line of Inductor's generated code launches, which FX nodes that computes, and so who owns it.

What launches is known, kind of line by kind of line. A form that is in neither list is no launch and is remembered in
`unknown_forms`, which the tests want empty under every version of torch. Inductor announces each kernel and the
scheduler nodes it was made of (set_kernel_post_grad_provenance_tracing). Launches without announcement say by
themselves (`line.node`), or are being written for the scheduler's current node. inductor.py checks what is there.

Inductor's origins are generous: an intermediate result carries the nodes of all operands that were not yet in memory
when it was made, whether it is made of them or not. What a loop nest writes and what it reads tell the truth: the nodes
between the two are computed there. Who computed what it reads is not.

Terms. The node that was being lowered when an IR node was made is the last of its origins in graph order; it is the
one whose work the IR node is. An *extern* operation (a library call, a fallback, a template) computes its whole node
and nothing else. A node's value is *complete* in a buffer that holds all of it; other buffers of the same node hold
intermediate results, and who reads those computes the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

from torch import Tensor
from torch.fx import Node

from ..errors import warn_once
from ..modules.explain import CompiledRegion
from .owners import Before, Owners, Row, input_shapes, is_folded
from .work import NOTHING, Work, launch_work

__all__ = ["FLOW", "LAUNCHING", "QUIET", "Compilation", "Launch", "Lowered", "attributed", "unknown_forms"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Kinds of wrapper lines, by class name, of torch 2.11 to 2.15.
LAUNCHING = _names(
    """
    KernelCallLine ExternKernelOutLine ExternKernelAllocLine ExternKernelMultiOutLine ScatterFallbackLine
    IndexPutFallbackLine DynamicScalarLine
    """
)
# After these, which launch came last is known no longer: what follows may be reached another way.
FLOW = _names("EnterSubgraphLine ExitSubgraphLine ConditionalLine")
QUIET = FLOW | _names(
    """
    AllocFromPoolLine AllocateLine AssertAlignmentLine AssertDivByZeroLine AssertSizeStrideLine CommBufferAllocateLine
    CommBufferFreeLine CommBufferLine CommentLine DeallocFromPoolLine EnterCudaMemPoolContextLine
    EnterCudaStreamContextLine EnterDeviceContextManagerLine EnterDeviceContextManagerWithStreamInfoLine
    ExitCudaMemPoolContextLine ExitCudaStreamContextLine ExitDeviceContextManagerLine
    ExitDeviceContextManagerWithStreamInfoLine FreeIfNotReusedLine FreeLine GroupedAssertSizeStrideLine
    KernelDefinitionLine MultiOutputLine NullLine ReinterpretLine ReuseLine SymbolicCallArgLine UnbackedSymbolDefsLine
    """
)
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
        if id(graph) not in self._lowered:
            self._lowered[id(graph)] = Lowered(graph)
        return self._lowered[id(graph)]

    def _caller(self, graph: Any) -> Row | None:
        """Who calls a graph below another (SubgraphLowering, torch 2.11 to 2.15): an autotuned choice has no record."""
        parent = getattr(graph, "parent", None)
        current = getattr(getattr(parent, "scheduler", None), "current_node", None)
        nodes = current and self.lowered(parent).of_schedule((current,))
        return self.owners.row(nodes, self.before) if nodes else None

    def launch(self, nodes: Iterable[Node], lowered: Lowered, parts: Iterable[Any] = ()) -> Launch:
        """`parts`: the scheduler nodes of its code, none where it is ready-made. The graph's order of nodes repeats, as
        generated code must; that of sets does not."""
        nodes = sorted(nodes, key=lambda n: (lowered.position.get(n, -1), n.name))
        row = self.owners.row(nodes, self.before)
        if row.unknown and not any(self.owners.chains(n, self.before) for n in nodes):
            row = self._caller(lowered.graph) or row
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


class Lowered:
    """One of Inductor's GraphLowerings, after scheduling. Everything is looked up in it and nothing is changed."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.position = {n: i for i, n in enumerate(graph.graph.nodes)}
        self.externs: dict[Node, list[Any]] = {}
        for operation in graph.operations:
            node = self.node_of(operation) if is_extern(operation) else None
            if node is not None:
                self.externs.setdefault(node, []).append(operation)

    def node_of(self, ir: Any) -> Node | None:
        """The node whose work this IR node is. A graph's origins may hold nodes of the graph around it, too."""
        origins = [n for n in getattr(ir, "origins", None) or () if isinstance(n, Node)]
        mine = [n for n in origins if n in self.position]
        if mine:
            working = [n for n in mine if not is_folded(n)]
            return max(working or mine, key=self.position.__getitem__)
        origin = getattr(ir, "origin_node", None)
        if isinstance(origin, Node):
            return origin
        return origins[-1] if len(origins) == 1 else None

    def of_schedule(self, parts: Iterable[Any]) -> list[Node]:
        """The nodes computed by a kernel made of these scheduler nodes."""
        found: dict[Node, None] = {}
        for whole in parts:
            for part in whole.get_nodes() if hasattr(whole, "get_nodes") else ():
                found.update(dict.fromkeys(self.of_part(part)))
        return list(found)

    def of_part(self, part: Any) -> Iterable[Node]:
        """The nodes computed by one loop nest or operation."""
        top = self.node_of(part.node)
        if top is None:
            return ()
        if is_extern(part.node):
            return (top,)
        return _Slice(self, part, top).nodes()

    def reads(self, part: Any) -> set[str]:
        """Names of the buffers that the part reads. Weak dependencies order kernels and read nothing."""
        return {d.name for d in part.read_writes.reads if type(d).__name__ != "WeakDep"}

    def complete_in(self, name: str) -> Iterable[Node]:
        """The nodes whose whole value is in this buffer."""
        ir = self._ir(name)
        if ir is None:
            return ()
        own = self.node_of(ir)
        origin = getattr(ir, "origin_node", None)
        if isinstance(origin, Node):  # a later node may have been handed on the same buffer
            return (origin,) if own is None else (origin, own)
        # Results of an operation with several. A convolution's own buffer, say, has no such node: its bias comes later.
        return (own,) if own is not None and type(ir).__name__ in ("MultiOutput", "MutationOutput") else ()

    def input_name(self, node: Node) -> str:
        """The buffer of an input. A subgraph's names begin with its own."""
        qualify = getattr(self.graph, "qualify_name", None)  # torch 2.11 to 2.15
        return node.name if qualify is None else str(qualify(node.name))

    def is_written_in_place(self, name: str) -> bool:
        buffer = self.graph.scheduler.name_to_buf.get(name)
        return buffer is not None and bool(buffer.get_mutations())

    def _ir(self, name: str) -> Any:
        buffer = self.graph.scheduler.name_to_buf.get(name)
        return None if buffer is None else buffer.node


def is_extern(ir: Any) -> bool:
    """Whether an IR operation is a call of ready-made code, or a template, and no loop nest."""
    from torch._inductor import ir as irs

    return isinstance(ir, (irs.InputsKernel, irs.TemplateBuffer)) and not isinstance(ir, irs.NopKernel)


class _Slice:
    """From what one loop nest writes back to what it reads."""

    def __init__(self, lowered: Lowered, part: Any, top: Node) -> None:
        self.lowered = lowered
        self.part = part
        self.top = top
        self.origins = {n for n in part.node.origins if n in lowered.position}
        self.names = lowered.reads(part)
        self.complete = {n for name in self.names for n in lowered.complete_in(name)} - {top}
        self.in_place = any(map(lowered.is_written_in_place, self.names))
        self._possible: dict[Node, bool] = {}

    def nodes(self) -> list[Node]:
        found: dict[Node, None] = {}
        prepared = self._prepared_operands()
        if prepared is not None:
            self._walk(prepared, found)
            if any(not is_folded(n) for n in found):
                return list(found)
            return [self.top]  # a copy in another layout: the work of the one who wants it so
        found[self.top] = None
        if not self._reads_extern(self.top):
            self._walk(self.top.all_input_nodes, found)
        return list(found)

    def _walk(self, start: Iterable[Node], found: dict[Node, None]) -> None:
        todo = list(start)
        seen: set[Node] = set()
        while todo:
            node = todo.pop()
            if node in seen or node in self.complete or node.op == "placeholder":
                continue
            seen.add(node)
            if node in self.origins:
                if not self._can_be_here(node):
                    continue
                found[node] = None
                if self._reads_extern(node):
                    continue  # what an extern operation has been given was computed before it
            elif not is_folded(node):
                continue
            todo.extend(node.all_input_nodes)

    def _prepared_operands(self) -> list[Node] | None:
        """Where the part's result is an operand of the extern operation that is the top's own: the values it may be."""
        operations = self.lowered.externs.get(self.top, ())
        if self.part.node.origin_node is self.top or not operations or self._reads_extern(self.top):
            return None
        mine = {b.get_name() for b in self.part.get_outputs()}
        tensors = list(_tensors(self.top))
        for operation in operations:
            inputs = list(map(_name_of, getattr(operation, "inputs", ())))
            at = [i for i, name in enumerate(inputs) if name in mine]
            if at and len(inputs) == len(tensors):
                return [tensors[i] for i in at]
        return list(self.top.all_input_nodes)

    def _reads_extern(self, node: Node) -> bool:
        names = self.names
        return any(
            operation.get_name() in names or any(b.get_name() in names for b in operation.get_outputs())
            for operation in self.lowered.externs.get(node, ())
        )

    def _can_be_here(self, node: Node) -> bool:
        """Whether the loop nest reads all that the node needs."""
        if node not in self._possible:
            self._possible[node] = True
            self._possible[node] = self._reads_extern(node) or all(map(self._can_have, node.all_input_nodes))
        return self._possible[node]

    def _can_have(self, node: Node) -> bool:
        if node in self.complete:
            return True
        if node.op == "placeholder":
            return self.lowered.input_name(node) in self.names or not isinstance(node.meta.get("val"), Tensor)
        if node in self.origins:
            return self._can_be_here(node)
        if is_folded(node):
            return all(map(self._can_have, node.all_input_nodes))
        # in memory under a name that is not read; where something is written in place, names say less
        return self.in_place


def _name_of(ir: Any) -> str | None:
    """The buffer behind an operand, views taken off."""
    try:
        name = ir.get_name()
    except (AttributeError, NotImplementedError):
        return None
    return name if isinstance(name, str) else None


def _tensors(node: Node) -> Iterator[Node]:
    """The operands that are tensors, in the order of the arguments, repeated where they are given twice."""
    from torch.utils._pytree import tree_leaves

    for leaf in tree_leaves((node.args, dict(node.kwargs))):
        if isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), Tensor):
            yield leaf
