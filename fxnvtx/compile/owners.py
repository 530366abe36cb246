"""From FX metadata to the owner of a kernel. Pure: reads nodes, touches nothing.

An owner is a chain of steps, outermost module first: the modules that were running when the node was traced. The
module whose frame was compiled is not part of it; its range encloses the whole region.

Rules, in this order:
  1. A node's chain is what Dynamo wrote down (`nn_module_stack`, or `fwd_nn_module_stack` in a backward graph).
  2. A node that came from user code but has no such record belongs to the compiled frame itself: the empty chain.
  3. A node that a compiler pass made without any record belongs to the owner of the nodes that use its result, if they
     agree; else to the owner of its inputs, if they agree; else its owner is unknown, and the label says so.
  4. Views and constants launch nothing of their own: they count only in a kernel made of nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch.fx import Node

__all__ = ["Chain", "Owners", "Row", "Step", "common", "owners_of"]


class Step(NamedTuple):
    """One module call: `path` is relative to the region's anchor module, `hint` the last name it was reached by."""

    anchor: int
    path: str
    hint: str
    call: str


Chain = tuple[Step, ...]


class Row(NamedTuple):
    """Who owns a kernel: the chains of all modules in it (distinct, in program order), and whether some are unknown."""

    chains: tuple[Chain, ...]
    unknown: bool


# Operators that Inductor folds into whoever reads them. Matched on the name, so that every overload is covered.
_FOLDED = frozenset(
    """alias as_strided broadcast_in_dim detach diagonal empty empty_strided expand full full_like getitem iota
    lift_fresh lift_fresh_copy movedim narrow ones permute reshape scalar_tensor select slice split split_with_sizes
    squeeze sym_size sym_stride sym_numel sym_storage_offset t transpose unbind unfold unsqueeze view view_as_complex
    view_as_real view_dtype zeros _reshape_alias _unsafe_view""".split()
)


def is_folded(node: Node) -> bool:
    """Whether the node is a view or a constant."""
    if node.op != "call_function":
        return True
    packet = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", "")
    return str(packet).split(".")[0] in _FOLDED


def stack_of(node: Node) -> Mapping[str, tuple[str, type]] | None:
    """The module stack Dynamo recorded; {} for code of the compiled frame itself; None where nothing is known."""
    for key in ("nn_module_stack", "fwd_nn_module_stack"):
        if key in node.meta:
            return node.meta[key] or {}
    return {} if node.meta.get("stack_trace") else None


class Owners:
    """Looks up chains of nodes. `step(key, path)` turns one entry of a module stack into a Step, or None to skip it."""

    def __init__(self, step: Callable[[str, str], Step | None]) -> None:
        self._step = step
        self._chains: dict[Node, Chain | None] = {}

    def chain(self, node: Node) -> Chain | None:
        """The node's owner; None where it is unknown."""
        if node in self._chains:
            return self._chains[node]
        found = self._recorded(node)
        if found is None:
            found = self._inherited(node)
        self._chains[node] = found
        return found

    def _recorded(self, node: Node) -> Chain | None:
        stack = stack_of(node)
        if stack is None:
            return None
        steps = (self._step(key, entry[0]) for key, entry in stack.items())
        return tuple(s for s in steps if s is not None)

    def _inherited(self, node: Node) -> Chain | None:
        for relatives in (node.users, node.all_input_nodes):
            chains = {c for c in map(self._recorded, self._computing(relatives)) if c is not None}
            if len(chains) == 1:
                return chains.pop()
        return None

    @staticmethod
    def _computing(nodes: Iterable[Node]) -> Iterator[Node]:
        return (n for n in nodes if n.op == "call_function")

    def row(self, nodes: Iterable[Node]) -> Row:
        """The owners of one kernel."""
        nodes = [n for n in nodes if n.op not in ("placeholder", "output", "get_attr")]
        working = [n for n in nodes if not is_folded(n)] or nodes
        found: dict[Chain, None] = {}
        unknown = not working
        for node in working:
            chain = self.chain(node)
            if chain is None:
                unknown = True
            else:
                found[chain] = None
        return Row(tuple(found), unknown)


def common(chains: Iterable[Chain]) -> Chain:
    """The nearest common ancestor of some chains."""
    chains = list(chains)
    if not chains:
        return ()
    first = min(chains, key=len)
    for index, step in enumerate(first):
        if any(c[index] != step for c in chains):
            return first[:index]
    return first


def owners_of(row: Row) -> Any:
    """A row as a literal that Python source can hold."""
    return (tuple(tuple(tuple(s) for s in c) for c in row.chains), row.unknown)
