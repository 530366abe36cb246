"""A Dynamo graph by owners, for when the ranges cannot go around kernel launches.

Cut into one compiled piece per module call, so that no kernel crosses a module's boundary (boundaries="strict"); or
with range nodes, for a backend that runs the graph as it is. These hold no labels: they move the call's cursor to a row
of the region's table, as generated code does, so that one graph shows the true names of every block it serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch.fx import GraphModule, Node
from torch.fx.node import has_side_effect

from .owners import Chain, Owners, Row, owners_of
from .runtime import Table, current

__all__ = ["compile_pieces", "cut", "has_subgraphs", "move", "with_range_nodes"]


# --------------------------------------------------------------------------------------------------------------- pieces


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
