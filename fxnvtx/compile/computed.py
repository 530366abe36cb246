"""Which FX nodes a launch really computes.

Inductor's origins are generous: an intermediate result carries the nodes of all operands that were not yet in memory
when it was made, whether it is made of them or not. What a loop nest writes and what it reads tell the truth: the nodes
between the two are computed there. Who computed what it reads is not.

Terms. The node that was being lowered when an IR node was made is the last of its origins in graph order; it is the
one whose work the IR node is. An *extern* operation (a library call, a fallback, a template) computes its whole node
and nothing else. A node's value is *complete* in a buffer that holds all of it; other buffers of the same node hold
intermediate results, and who reads those computes the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.fx import Node

from .owners import is_folded

__all__ = ["Lowered"]


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
        given = self.top.all_input_nodes
        mine = {b.get_name() for b in self.part.get_outputs()}
        tensors = list(_tensors(self.top))
        for operation in operations:
            inputs = list(map(_name_of, getattr(operation, "inputs", ())))
            at = [i for i, name in enumerate(inputs) if name in mine]
            if at and len(inputs) == len(tensors):
                return [tensors[i] for i in at]
        return list(given)

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
