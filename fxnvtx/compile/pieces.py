"""boundaries="strict": one compiled piece per module call, so that no kernel crosses a module's boundary."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from .owners import Chain, Owners

__all__ = ["cut"]


def cut(graph_module: GraphModule, owners: Owners, depth: int | None) -> dict[Node, int]:
    """The number of the piece of every node. A piece is a maximal run of nodes with the same owner down to `depth`.

    A run of which nothing outside needs a result (it only writes in place) stays with the piece before it: a compiled
    piece must return something.
    """
    pieces: dict[Node, int] = {}
    number = 0
    here: Chain | None = None
    started: list[Node] = []
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        chains = owners.chains(node)
        chain = (chains[0] if chains else ())[:depth]
        if here is not None and chain != here and node.op != "get_attr" and _used_later(started):
            number += 1
            started = []
        if node.op != "get_attr":
            here = chain
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
