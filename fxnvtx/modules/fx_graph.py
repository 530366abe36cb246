"""The FX transform: a GraphModule in, a GraphModule with range nodes out.

`range_push(label)` and `range_pop()` become `call_function` nodes around every call_module node, nested by the module
hierarchy. Nodes between them belong to the module whose forward made them, which `nn_module_stack` in a node's
metadata tells (torch.fx's own tracer and Dynamo both write it); each maximal run of nodes of one module call gets one
range. Both functions are marked as having side effects, so dead-code elimination keeps them.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

from torch import fx, nn
from torch.fx.node import has_side_effect

from .. import ranges as _ranges
from ..errors import InstrumentError
from .selection import DEFAULT_EXCLUDE, Pattern, Selection, label_text

__all__ = ["has_ranges", "insert_ranges", "owner_chain", "remove_ranges", "run_chains"]

# What a module carries besides its graph that takes part in a call
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
# One call of one module: (key that tells this call from others, FQN, class)
Owner = tuple[str, str, Any]


@has_side_effect
def range_push(text: str) -> None:
    """What the inserted nodes call: `fxnvtx.range_push`."""
    _ranges.range_push(text, category="module")


@has_side_effect
def range_pop() -> None:
    """What the inserted nodes call: `fxnvtx.range_pop`."""
    _ranges.range_pop()


RANGE_NODES: tuple[Callable[..., Any], ...] = (range_push, range_pop)


def has_ranges(graph_module: fx.GraphModule) -> bool:
    return any(_is_range(node) for node in graph_module.graph.nodes)


def _is_range(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in RANGE_NODES


def insert_ranges(
    graph_module: fx.GraphModule,
    name: str | None = None,
    *,
    depth: int | None = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = DEFAULT_EXCLUDE,
    resolve: Callable[[Owner], str | None] | None = None,
    root: bool = True,
) -> fx.GraphModule:
    """A copy of `graph_module` with range nodes; the parameters and submodules are shared with the original.

    The root's label is `name`, else the class that was traced; a module's is `<name>.<fqn>`. A graph that has
    range nodes already is returned as it is. `resolve` turns an owner (key, fqn, class) into a label of its own or
    None for no range, instead of the selection; root=False leaves the outermost range out. The result passes
    `graph.lint()`, and when any node raises, the generated code closes what it opened.
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise InstrumentError(
            f"insert_ranges takes a torch.fx.GraphModule, not {type(graph_module).__name__}; "
            "use fxnvtx.instrument(model)"
        )
    if has_ranges(graph_module):
        return graph_module
    selection = Selection.of(include, exclude, depth)
    labels = resolve or _labels_by_selection(graph_module, name, selection)
    graph = fx.Graph(tracer_cls=getattr(graph_module.graph, "_tracer_cls", None))
    copied: dict[fx.Node, fx.Node] = {}
    value = graph.graph_copy(graph_module.graph, copied)
    for node in graph_module.graph.find_nodes(op="output"):
        graph.output(value, node.type).meta = dict(node.meta)
    # how arguments are taken apart and results put together, in graphs of torch.export and Dynamo
    graph.set_codegen(copy.deepcopy(graph_module.graph._codegen))
    result = fx.GraphModule(graph_module, graph, type(graph_module).__name__)
    result.meta = dict(getattr(graph_module, "meta", {}))
    result.training = graph_module.training
    _carry_over(graph_module, result)
    outermost = label_text(name, _traced_class(graph_module), "") if root else None
    _insert(result.graph, outermost, labels, depth)
    result.graph.on_generate_code(lambda before: _closing(before))
    result.graph.lint()
    result.recompile()
    return result


def _carry_over(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """What a GraphModule has besides its graph and what the graph refers to: hooks, and attributes set on it."""
    for kept in (*_HOOKS, "_parameters", "_buffers", "_modules"):
        mine = new.__dict__[kept]
        mine.update((key, value) for key, value in old.__dict__[kept].items() if key not in mine)
    for key, value in old.__dict__.items():
        if key not in new.__dict__:
            bound = isinstance(value, MethodType) and value.__self__ is old
            new.__dict__[key] = MethodType(value.__func__, new) if bound else value


def remove_ranges(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Take the range nodes out again, in place; returns the same object."""
    if not has_ranges(graph_module):
        return graph_module
    for node in list(graph_module.graph.nodes):
        if _is_range(node):
            graph_module.graph.erase_node(node)
    graph_module.graph.on_generate_code(_without_closing)
    graph_module.recompile()
    return graph_module


# ------------------------------------------------------------------------------------------------ owners


def owner_chain(node: fx.Node) -> tuple[Owner, ...]:
    """The module calls that a node lies in, outermost first, from its metadata or, for a call_module node, its name."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        return tuple((str(key), _fqn(str(path)), kind) for key, (path, kind) in stack.items() if _fqn(str(path)))
    if node.op == "call_module":
        parts = str(node.target).split(".")
        outer = [(".".join(parts[:i]), ".".join(parts[:i]), None) for i in range(1, len(parts))]
        return (*outer, (f"{node.target}@{node.name}", str(node.target), None))
    return ()


_DYNAMO_STEP = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.?(\w+)")


def _fqn(path: str) -> str:
    """`L['self'].blocks[0]`, `L['self'].blocks.0`, `L['self'].__dict__['_modules']['blocks']['0']` -> `blocks.0`."""
    if "[" not in path:
        return path
    rest = re.sub(r"^[LG]\['[^']*'\]", "", path)
    steps = [next(g for g in match if g) for match in _DYNAMO_STEP.findall(rest)]
    return ".".join(s for s in steps if s not in {"_modules", "__dict__", "_orig_mod"})


def run_chains(nodes: Sequence[fx.Node]) -> list[tuple[fx.Node, tuple[Owner, ...]]]:
    """(node, chain) of every node that computes; placeholders, attribute reads and the output belong to nobody."""
    computing = [n for n in nodes if n.op in {"call_function", "call_method", "call_module"}]
    # where there is metadata, a call_module node without it is no module of the model (torch.export adds its guards so)
    recorded = any(n.meta.get("nn_module_stack") for n in computing)
    return [(n, () if recorded and not n.meta.get("nn_module_stack") else owner_chain(n)) for n in computing]


def _labels_by_selection(
    graph_module: fx.GraphModule, name: str | None, selection: Selection
) -> Callable[[Owner], str | None]:
    chains = [chain for _, chain in run_chains(list(graph_module.graph.nodes))]
    named: dict[str, Any] = {}
    for chain in chains:
        for _, fqn, kind in chain:
            named.setdefault(fqn, kind)
    modules = dict(graph_module.named_modules())
    kinds = {fqn: _class(kind) or type(modules.get(fqn, nn.Module())) for fqn, kind in named.items()}
    selection.check([("", type(graph_module)), *kinds.items()])

    def label_of(owner: Owner) -> str | None:
        fqn = owner[1]
        # a container on the way to a child (`blocks` of `blocks.0`) is never called
        if getattr(kinds[fqn], "forward", None) is nn.Module.forward or not selection.takes(fqn, kinds[fqn]):
            return None
        return label_text(name, type(graph_module), fqn)

    return label_of


def _class(kind: Any) -> type | None:
    """The class that metadata names; torch.export writes `torch.nn.modules.linear.Linear` in place of the class."""
    if isinstance(kind, type) or not isinstance(kind, str):
        return kind if isinstance(kind, type) else None
    home, _, name = kind.rpartition(".")
    found = getattr(sys.modules.get(home), name, None)
    # a class that cannot be found again (made in a function, or renamed) is one that was called
    return found if isinstance(found, type) else type(name, (nn.Module,), {"forward": lambda self: None})


def _traced_class(graph_module: fx.GraphModule) -> type:
    return type(graph_module.__class__.__name__, (), {})


# ------------------------------------------------------------------------------------------------ insertion


def _insert(graph: fx.Graph, outermost: str | None, label_of: Callable[[Owner], str | None], depth: int | None) -> None:
    open_keys: list[str] = []
    steps = run_chains(list(graph.nodes))
    if outermost is not None:
        first = next((n for n in graph.nodes if n.op not in {"placeholder"}), None)
        if first is not None:
            with graph.inserting_before(first):
                graph.call_function(range_push, (outermost,))
    for node, chain in steps:
        wanted = [(key, text) for key, text in ((owner[0], label_of(owner)) for owner in chain) if text is not None]
        wanted = wanted[:depth]
        shared = 0
        while shared < min(len(open_keys), len(wanted)) and open_keys[shared] == wanted[shared][0]:
            shared += 1
        with graph.inserting_before(node):
            for _ in open_keys[shared:]:
                graph.call_function(range_pop)
            for _, text in wanted[shared:]:
                graph.call_function(range_push, (text,))
        open_keys = [*open_keys[:shared], *(key for key, _ in wanted[shared:])]
    end = next((n for n in reversed(graph.nodes) if n.op == "output"), None)
    if end is not None:
        with graph.inserting_before(end):
            for _ in range(len(open_keys) + (outermost is not None)):
                graph.call_function(range_pop)


# ------------------------------------------------------------------------------------------------ unwinding


def _depth() -> int:
    return len(_ranges._unnamed())


def _close_to(depth: int) -> None:
    """Close what a graph left open because a node raised. In the ordinary case there is nothing to do."""
    mine = _ranges._unnamed()
    while len(mine) > depth:
        _ranges.pop(mine.pop())


def _closing(before: Callable[[list[str]], list[str]] | None) -> Callable[[list[str]], list[str]]:
    def transform(body: list[str]) -> list[str]:
        lines = "".join(before(body) if before else body).splitlines()
        guarded = [f"    {line}\n" for line in lines]
        return [
            f"import {__name__} as _fxnvtx\n",
            "_fxnvtx_depth = _fxnvtx._depth()\n",
            "try:\n",
            *(guarded or ["    pass\n"]),
            "finally:\n",
            "    _fxnvtx._close_to(_fxnvtx_depth)\n",
        ]

    transform.before = before  # type: ignore[attr-defined]
    return transform


def _without_closing(current: Callable[[list[str]], list[str]] | None) -> Callable[[list[str]], list[str]]:
    before = getattr(current, "before", None)
    return before if before is not None else lambda body: body
