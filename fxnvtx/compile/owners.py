"""From FX metadata to the owner of a kernel. Pure: reads nodes, touches nothing.

An owner is a chain of steps, outermost module first: the modules that were running when the node was traced. The
module whose frame was compiled is not part of it; its range encloses the whole region.

Rules, in this order:
  1. A node's chain is what Dynamo wrote down (`nn_module_stack`, or `fwd_nn_module_stack` in a backward graph).
  2. A node that came from user code (`source_fn_stack`) but has no such record belongs to the compiled frame: the empty
     chain.
  3. A node that a compiler pass put in the place of others has the owners of those it replaced.
  4. What puts a result into an input, after functionalisation, belongs to the module that wrote there.
  5. Autograd's sum of gradients of a value used several times belongs to the nearest common ancestor of its terms.
  6. Any other node without a record belongs to the owner of the nodes that use its result (through views that have no
     record either), if they agree; else to the owner of its inputs, if they agree; else its owner is unknown: the label
     says so and why, inside the nearest module around all of them.
  7. Views and constants launch nothing of their own: they count only in a kernel made of nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor
from torch.fx import Graph, Node

__all__ = [
    "NO_RECORD",
    "OWN",
    "Before",
    "Chain",
    "Owners",
    "Row",
    "Step",
    "UserRange",
    "common",
    "input_shapes",
    "owners_of",
]


OWN = -1  # the anchor of a step that is a range of the user's, whose path is its label


class UserRange:
    """Stands in a module stack where a module's class does, for a range of the user's."""


class Step(NamedTuple):
    """One module call: `path` is relative to the region's anchor module, `hint` the last name it was reached by."""

    anchor: int
    path: str
    hint: str
    call: str


Chain = tuple[Step, ...]


class Row(NamedTuple):
    """Who owns a kernel: the chains of all modules in it (distinct, in program order), and why some are unknown (empty
    where all are known). For what is not known, the chain is that of the nearest module around."""

    chains: tuple[Chain, ...]
    unknown: str = ""


NOTHING_KNOWN = "made by the compiler for no operation of the model"
NO_RECORD = "a compiler pass put it in without a record"


# Operators that Inductor folds into whoever reads them. Matched on the name, so that every overload is covered.
_FOLDED = frozenset(
    {
        "alias",
        "as_strided",
        "broadcast_in_dim",
        "detach",
        "diagonal",
        "empty",
        "empty_strided",
        "expand",
        "full",
        "full_like",
        "getitem",
        "iota",
        "lift_fresh",
        "lift_fresh_copy",
        "movedim",
        "narrow",
        "ones",
        "permute",
        "reshape",
        "scalar_tensor",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "sym_size",
        "sym_stride",
        "sym_numel",
        "sym_storage_offset",
        "t",
        "transpose",
        "unbind",
        "unfold",
        "unsqueeze",
        "view",
        "view_as_complex",
        "view_as_real",
        "view_dtype",
        "zeros",
        "_reshape_alias",
        "_unsafe_view",
    }
)


def is_folded(node: Node) -> bool:
    """Whether the node is a view or a constant."""
    if node.op != "call_function":
        return True
    return _operator(node) in _FOLDED


def stack_of(node: Node) -> Mapping[str, tuple[str, type]] | None:
    """The module stack Dynamo recorded; {} for code of the compiled frame itself; None where nothing is known."""
    for stack, origin in (("nn_module_stack", "source_fn_stack"), ("fwd_nn_module_stack", "fwd_source_fn_stack")):
        if node.meta.get(stack):
            return cast("Mapping[str, tuple[str, type]]", node.meta[stack])
        if node.meta.get(origin):
            return {}
    return None


def _operator(node: Node) -> str:
    """An operator's name without its overload."""
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "_opname", None) or getattr(target, "__name__", "")
    return str(name).split(".")[0]


def _writes(node: Node) -> bool:
    """Whether a node of Dynamo's graph changes a tensor in place."""
    name = _operator(node)
    return name == "setitem" or (name.endswith("_") and not name.endswith("__"))


class Before:
    """A graph as it was before the passes: which nodes a pass replaced is only visible by comparison."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = {n.name: n for n in graph.nodes}
        self._inputs = {n.name: [i.name for i in n.all_input_nodes] for n in graph.nodes}
        self._after: Graph | None = None
        self._present: set[str] = set()
        self._taken: set[str] = set()

    def _look_at(self, after: Graph) -> None:
        """Take stock of the final graph, once."""
        if self._after is not after:
            self._after = after
            self._present = {n.name for n in after.nodes}
            self._taken = {r for n in after.nodes if (r := _replaced(n)) and not n.meta.get("source_fn_stack")}

    def replaced_by(self, node: Node) -> list[Node]:
        """The nodes that are gone and whose work `node` does now. `node` lies in the graph as the passes left it."""
        self._look_at(node.graph)
        present, taken = self._present, self._taken
        first = _replaced(node)
        if first is None or first in present or first not in self.nodes:
            return []
        gone: dict[str, None] = {first: None}  # what other nodes stand for is theirs
        todo = [first]
        while todo:
            for name in self._inputs[todo.pop()]:
                if name not in present and name not in taken and name not in gone:
                    gone[name] = None
                    todo.append(name)
        return [self.nodes[name] for name in gone]


def _replaced(node: Node) -> str | None:
    """The name of the node that a pattern match ended in and that `node` took the place of."""
    sources = node.meta.get("from_node")
    return getattr(sources[-1], "name", None) if sources else None


def _sources(node: Node) -> Iterator[str]:
    """The names of all nodes that this one was made of or took the place of, in this graph and in those before it."""
    todo = list(node.meta.get("from_node") or ())
    while todo:
        source = todo.pop()
        yield getattr(source, "name", "")
        todo.extend(getattr(source, "from_node", None) or ())


class Owners:
    """Looks up chains of nodes. `step(key, path)` turns one entry of a module stack into a Step, or None to skip it."""

    def __init__(self, step: Callable[[str, str], Step | None]) -> None:
        self._step = step
        self._chains: dict[Node, tuple[Chain, ...]] = {}
        self._writers: dict[str, Chain] = {}  # nodes of Dynamo's graph, by name

    def read(self, node: Node) -> None:
        """Remember a node of Dynamo's graph that changes a tensor: AOTAutograd makes others of it, without a record."""
        chain = self._recorded(node) if _writes(node) else None
        if chain is not None:
            self._writers[node.name] = chain

    def chains(self, node: Node, before: Before | None = None) -> tuple[Chain, ...]:
        """The node's owners: one, several where a pass merged nodes of several, none where unknown."""
        found = self._chains.get(node)
        if found is None:
            recorded = self._recorded(node)
            found = (recorded,) if recorded is not None else self._deduced(node, before)
            self._chains[node] = found
        return found

    def forget(self) -> None:
        """Drop what was looked up: it keeps the graphs alive."""
        self._chains.clear()

    def _recorded(self, node: Node) -> Chain | None:
        stack = stack_of(node)
        if stack is None:
            return None
        steps = (self._step(key, entry[0]) for key, entry in stack.items())
        return tuple(s for s in steps if s is not None)

    def _deduced(self, node: Node, before: Before | None) -> tuple[Chain, ...]:
        if before is not None:
            gone = [n for n in before.replaced_by(node) if not is_folded(n)]
            chains = dict.fromkeys(c for c in map(self._recorded, gone) if c is not None)
            if chains:
                return tuple(chains)
        if _operator(node) == "copy_" and isinstance(node.args[1], Node):
            writers = [self._writers[name] for name in _sources(node.args[1]) if name in self._writers]
            if writers:
                return (common(writers),)
        inputs = self._of(node.all_input_nodes)
        if node.meta.get("is_gradient_acc") and inputs:
            return (inputs[-1] if len({_paths(c) for c in inputs}) == 1 else common(inputs),)
        for chains_around in (self._using(node, before), inputs):
            if len({_paths(c) for c in chains_around}) == 1:
                return (chains_around[-1],)
        return ()

    def _of(self, nodes: Iterable[Node]) -> list[Chain]:
        return [c for c in map(self._recorded, self._computing(nodes)) if c is not None]

    def _using(self, node: Node, before: Before | None) -> list[Chain]:
        """The chains of the nodes that use a result. The parts of an operation with several results that a pass put in
        have a record from torch 2.12 on; in 2.11 neither they nor the replaced nodes that read them have one."""
        found: list[Chain] = []
        todo, seen = list(node.users), {node}
        while todo:
            user = todo.pop(0)
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            recorded = self._recorded(user)
            if recorded is not None:
                found.append(recorded)
            elif is_folded(user):
                todo.extend(user.users)
            elif before is not None:
                found.extend(self._of(n for n in before.replaced_by(user) if not is_folded(n)))
        return found

    @staticmethod
    def _computing(nodes: Iterable[Node]) -> Iterator[Node]:
        return (n for n in nodes if n.op == "call_function")

    def row(self, nodes: Iterable[Node], before: Before | None = None) -> Row:
        """The owners of one kernel."""
        nodes = [n for n in nodes if n.op not in ("placeholder", "output", "get_attr")]
        working = [n for n in nodes if not is_folded(n)] or nodes
        if not working:
            return Row((), NOTHING_KNOWN)
        found: dict[Chain, None] = {}
        unknown = ""
        for node in working:
            chains = self.chains(node, before)
            if not chains:
                unknown = NO_RECORD
                chains = (common([*self._using(node, before), *self._of(node.all_input_nodes)]),)
            found.update(dict.fromkeys(chains))
        return Row(tuple(found), unknown)


def _paths(chain: Chain) -> tuple[tuple[int, str], ...]:
    """A chain without the numbers of the calls."""
    return tuple((s.anchor, s.path) for s in chain)


def input_shapes(nodes: Iterable[Node], weights: Container[Node]) -> list[list[int]]:
    """Shapes of what a kernel reads, in program order, as far as they are fixed; weights left out."""
    inside = set(nodes)
    found: dict[Node, list[int]] = {}
    for node in nodes:
        for given in node.all_input_nodes:
            value = given.meta.get("val")
            if given in inside or given in found or not isinstance(value, Tensor) or _origin(given) in weights:
                continue
            sizes = list(value.shape)
            if all(type(n) is int for n in sizes):
                found[given] = sizes
    return list(found.values())


def _origin(node: Node) -> Node:
    """What a chain of views is a view of."""
    while node.op == "call_function" and is_folded(node) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


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
