"""Range nodes in a Dynamo graph, for a backend that runs that graph as it is.

The nodes hold no labels: they move the call's cursor to a row of the region's table, as generated code does, so that
one graph shows the true names of every block it serves.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule
from torch.fx.node import has_side_effect

from .owners import Owners, Row, owners_of
from .runtime import Table, current

__all__ = ["move", "with_range_nodes"]


@has_side_effect
def move(row: int) -> None:
    """From here on, what runs belongs to this row."""
    cursor = current.cursor
    if cursor is not None:
        cursor(row)


def with_range_nodes(graph_module: GraphModule, key: str, owners: Owners) -> Table:
    """Insert the nodes, in place. Placeholders, attribute reads and the output belong to nobody."""
    rows: dict[Row, int] = {}
    here: Row | None = None
    for node in list(graph_module.graph.nodes):
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        row = owners.row([node])
        if row != here:
            here = row
            number = rows.setdefault(row, len(rows) + 1)
            with graph_module.graph.inserting_before(node):
                graph_module.graph.call_function(move, (number,))
    graph_module.recompile()
    literal: list[Any] = [owners_of(row) for row in rows]
    return Table(key, False, literal, [])
