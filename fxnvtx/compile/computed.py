"""Which of the nodes that Inductor names for a kernel the kernel really computes.

Inductor's origins are generous: a copy of one operand of an attention is said to come from the nodes of all its
operands. What a kernel reads tells more. A node whose input lies in a buffer that the kernel does not read cannot be in
it. Only that proof removes a node; where anything is not known, the node stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.fx import Node

from .owners import is_folded

__all__ = ["computed_nodes"]


def computed_nodes(graph: Any, arguments: Iterable[Any], written: set[str], named: list[Node]) -> list[Node]:
    """`named` without the nodes that cannot be in a kernel that is launched with these arguments. `graph` is Inductor's
    GraphLowering; `written` are the buffers that earlier kernels were given, to which this call's are added."""
    names = [a for a in arguments if isinstance(a, str) and a in graph.scheduler.name_to_buf]
    parts: dict[Any, None] = {}
    for name in names:
        operation = graph.scheduler.name_to_buf[name].defining_op
        if name in written or operation is None or operation.is_extern() or operation.is_template():
            continue
        whole = graph.scheduler.name_to_fused_node.get(operation.get_name(), operation)
        parts.update(dict.fromkeys(whole.get_nodes()))
    written.update(names)
    realized = {b.origin_node for b in graph.buffers if getattr(b, "origin_node", None) is not None}
    found: dict[Node, None] = {}
    for part in parts:
        found.update(dict.fromkeys(_of_part(graph, part, realized)))
    allowed = set(named)
    kept = [n for n in found if n in allowed]
    return kept if any(not is_folded(n) for n in kept) else named


def _of_part(graph: Any, part: Any, realized: set[Any]) -> Iterable[Node]:
    """The nodes of one loop nest."""
    origins = set(part.node.origins)
    reads = {dependency.name for dependency in part.read_writes.reads}
    available: set[Any] = set()
    for name in reads:
        buffer = graph.scheduler.name_to_buf.get(name)
        if buffer is not None:
            if buffer.get_mutations():
                return origins  # read under another name than it was written
            own = getattr(buffer.node, "origin_node", None)
            available.update([own] if own is not None else buffer.node.origins)
    possible: dict[Node, bool] = {}

    def reachable(node: Node) -> bool:
        """Whether the kernel can have this value."""
        if node in available:
            return True
        if node.op == "placeholder":
            return node.name in reads or not isinstance(node.meta.get("val"), Tensor)
        if node in origins:
            return can_be_here(node)
        if is_folded(node):
            return all(reachable(n) for n in node.all_input_nodes)
        return node not in realized

    def can_be_here(node: Node) -> bool:
        if node not in possible:
            possible[node] = True
            possible[node] = all(reachable(n) for n in node.all_input_nodes)
        return possible[node]

    return [n for n in origins if can_be_here(n)]
