"""The work of operators and of launches: torch.utils.flop_counter's formulas, and the bytes that code reads and writes.

Bytes are counted once per tensor and launch, as if caches were perfect within a launch and empty between launches.
Views cost nothing. What has no formula and is no plain arithmetic on elements is not known, and says so.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["NOTHING", "Work", "formulas", "launch_work", "operator_work", "summed"]

DYNAMIC = "shapes that change"
_PLAIN = frozenset({"aten", "prims", "prim", "inductor", "inductor_prims", "_c10d_functional", "c10d_functional"})
# Operators of these names multiply matrices or do more; without a formula their work is not known.
_HEAVY = re.compile(
    r"attention|fft|linalg|lstm|gru|rnn_|cdist|conv(?!ert)|matmul|(?:^|_)(?:(?:add)?(?:b?mm|mv|bmm)|v?dot|addr|ger|einsum)(?:_|$)"
    r"|pack_mm|grouped_mm|cholesky|_svd|_solve|grid_sampler"
)
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"})
_UNREAD = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_"})  # the first argument
_GATHERING = frozenset({"embedding", "index", "index_select", "gather", "take"})
_ALLOCATING = re.compile(r"(?:new_)?empty(?:_|$)|_unsafe_view|resize_|_reshape_alias|lift_fresh|set_$|detach|sym_")


class Work(NamedTuple):
    """flops: by type of number. moved: bytes. unknown: why not all is known, "" where it is."""

    flops: tuple[tuple[str, int], ...] = ()
    moved: int = 0
    unknown: str = ""


NOTHING = Work()


def summed(works: Iterable[Work]) -> Work:
    flops: dict[str, int] = {}
    moved, unknown = 0, ""
    for work in works:
        for kind, count in work.flops:
            flops[kind] = flops.get(kind, 0) + count
        moved += work.moved
        unknown = unknown or work.unknown
    return Work(tuple(sorted(flops.items())), moved, unknown)


# ------------------------------------------------------------------------------------------------ operators


@functools.cache
def formulas() -> dict[Any, Callable[..., Any]]:
    """By operator: torch's formulas, and those of operators that only CPUs have, for which torch has none."""
    from torch.utils import flop_counter

    found: dict[Any, Callable[..., Any]] = dict(flop_counter.flop_registry)
    aten = torch.ops.aten
    added: list[tuple[Any, str, Callable[..., Any]]] = [
        (aten, "_scaled_dot_product_flash_attention_for_cpu", flop_counter.sdpa_flop),
        (aten, "_scaled_dot_product_flash_attention_for_cpu_backward", flop_counter.sdpa_backward_flop),
        (aten, "_int_mm", flop_counter.mm_flop),
        (torch.ops.mkldnn, "_convolution_pointwise", _mkldnn_convolution),
        (torch.ops.mkldnn, "_linear_pointwise", _mkldnn_linear),
    ]
    for namespace, name, formula in added:
        if hasattr(namespace, name):
            found.setdefault(getattr(namespace, name), formula)
    return found


def _mkldnn_convolution(x: Tensor, weight: Tensor, *rest: Any, out_val: Tensor, **more: Any) -> Any:
    from torch.utils.flop_counter import conv_flop_count

    shape = list(weight.shape)
    if len(shape) != len(x.shape):  # packed for groups
        shape = [shape[0] * shape[1], *shape[2:]]
    return conv_flop_count(list(x.shape), shape, list(out_val.shape))


def _mkldnn_linear(x: Tensor, weight: Tensor, *rest: Any, out_val: Tensor, **more: Any) -> Any:
    return 2 * out_val.numel() * x.shape[-1]


def operator_work(operator: Any, args: Any, kwargs: Any, result: Any) -> Work:
    """The work of one call of a torch operator, whose values may be fake tensors. Looks at shapes only."""
    packet = getattr(operator, "_overloadpacket", None)  # OpOverload, torch 2.0 to 2.15
    if packet is None:
        return Work(unknown=f"no formula for {getattr(operator, '__name__', operator)}")
    name = str(packet.__name__)
    if _is_view(operator) or _ALLOCATING.match(name):
        return NOTHING
    try:
        moved = _moved(operator, name, args, kwargs, result)
        formula = formulas().get(packet)
        if formula is None:
            plain = operator.namespace in _PLAIN and not _HEAVY.search(name)
            return Work(moved=moved, unknown="" if plain else f"no formula for {operator.namespace}.{name}")
        count = _whole(formula(*args, **kwargs, out_val=result))
        return Work(((_kind(name, args, kwargs), count),) if count else (), moved)
    except _UnknownError:
        return Work(unknown=DYNAMIC)
    except Exception:  # a formula that does not understand what it was given
        return Work(unknown=f"no formula for this use of {name}")


class _UnknownError(Exception):
    """A size that is not fixed."""


def _whole(value: Any) -> int:
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt) and value.node.is_constant():
        return int(value)
    raise _UnknownError


def _is_view(operator: Any) -> bool:
    """Whether the result is (part of) an argument's memory, and nothing is written."""
    returns = operator._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _moved(operator: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    out = {a.name for a in operator._schema.arguments if a.kwarg_only and a.alias_info is not None}
    first = 1 if name in _UNREAD else 0
    given = tree_leaves((list(args)[first:], {k: v for k, v in kwargs.items() if k not in out}))
    read = {id(t): t for t in given if isinstance(t, Tensor)}
    produced = total = sum(size_of(t) for t in written)
    for place, tensor in enumerate(read.values()):
        size = size_of(tensor)
        if place == 0 and name in _GATHERING:
            size = min(size, produced)
        total += size
    return total


def size_of(tensor: Tensor) -> int:
    """Bytes in memory of what a tensor shows: what is expanded counts once."""
    count = tensor.numel()
    if tensor.layout is torch.strided:
        count = 1
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if _whole(length) == 0:
                return 0
            count *= 1 if _whole(stride) == 0 else _whole(length)
    return _whole(count) * tensor.element_size()


def _kind(name: str, args: Any, kwargs: Any) -> str:
    """The type of number that the operator multiplies, as data sheets call it."""
    tensor = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()), None)
    if tensor is None:
        return "int8"
    if tensor.dtype is torch.float32 and tensor.device.type == "cuda":
        convolves = "conv" in name
        allowed = torch.backends.cudnn.allow_tf32 if convolves else torch.get_float32_matmul_precision() != "highest"
        return "tf32" if allowed and "attention" not in name else "fp32"
    return _KINDS.get(tensor.dtype, "fp8" if tensor.element_size() == 1 else str(tensor.dtype).rpartition(".")[2])


_KINDS = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}

# ------------------------------------------------------------------------------------------------ launches


def node_work(node: Node) -> Work:
    """The work of one node of a graph, from the fake values that it and its inputs carry."""
    if node.op != "call_function" or getattr(node.target, "__module__", "") == "_operator":
        return NOTHING
    values = tree_map(lambda a: a.meta.get("val") if isinstance(a, Node) else a, (node.args, dict(node.kwargs)))
    result = node.meta.get("val")
    work = operator_work(node.target, values[0], values[1], result)
    if not _products(node) or not isinstance(result, Tensor):
        return work
    try:
        return work._replace(flops=((_kind("mm", values[0], {}), 2 * _whole(result.numel())),))
    except _UnknownError:
        return Work(unknown=DYNAMIC)


def _products(node: Node) -> bool:
    """Whether these are the products, yet to be summed, of a matrix product: Inductor multiplies single rows and
    columns by elements. Whose decomposition a node is from is its `original_aten`, torch 2.11 to 2.15."""
    if node.target is not torch.ops.aten.mul.Tensor or not all(isinstance(a, Node) for a in node.args):
        return False
    origin = getattr(node.meta.get("original_aten"), "_overloadpacket", None)
    return getattr(origin, "__name__", "") in _PRODUCTS


class Lowered(Protocol):
    """What is asked of one of Inductor's graphs, as provenance.py has looked through it."""

    graph: Any
    externs: dict[Node, list[Any]]


def launch_work(nodes: Iterable[Node], parts: Iterable[Any], lowered: Lowered, counted: set[Any]) -> Work:
    """The work of one launch that computes `nodes`. `parts`: the scheduler nodes that its code is made of, none for a
    call of ready-made code. `counted`: what earlier launches of the same code have done is not done again."""
    parts = [part for whole in parts for part in (whole.get_nodes() if hasattr(whole, "get_nodes") else [whole])]
    ready_made = not parts or all(_ready_made(part) for part in parts)
    mine = {id(getattr(part, "node", None)) for part in parts}
    found = []
    for node in nodes:
        operations = lowered.externs.get(node, ())
        # a kernel that prepares what ready-made code is given does not do that code's work
        if node not in counted and (ready_made or not operations or any(id(o) in mine for o in operations)):
            counted.add(node)
            work = node_work(node)
            found.append(work if ready_made else work._replace(moved=0))
    if not ready_made:
        try:
            found.append(Work(moved=_moved_by(parts, lowered.graph)))
        except _UnknownError:
            found.append(Work(unknown=DYNAMIC))
    return summed(found)


def _ready_made(part: Any) -> bool:
    from torch._inductor import ir

    return isinstance(getattr(part, "node", None), ir.ExternKernel)


def _moved_by(parts: list[Any], graph: Any) -> int:
    """Bytes of the buffers that a kernel's code reads and writes. What it makes and nobody else reads is in registers.

    A buffer counts once as read and once as written, however often the code names it, and no more of it than the
    loops visit. Scheduler, dependencies and buffers are Inductor's, torch 2.11 to 2.15.
    """
    inside = {id(part) for part in parts}
    written = {dep.name: (dep, part) for part in parts for dep in part.read_writes.writes}
    reads: dict[str, int] = {}
    for part in parts:
        for dep in part.read_writes.reads:
            if dep.name not in written and type(dep).__name__ != "WeakDep":
                reads[dep.name] = reads.get(dep.name, 0) + _visited(dep, part, graph)
    total = sum(min(visited, _elements(graph, name)) * _width(graph, name) for name, visited in reads.items())
    for name, (dep, part) in written.items():
        buffer = graph.scheduler.name_to_buf.get(name)
        users = () if buffer is None else buffer.users
        kept = buffer is None or any(id(user.node) not in inside for user in users)
        if kept and name not in graph.removed_buffers:
            elements = _elements(graph, name)
            total += min(_visited(dep, part, graph), elements) * _width(graph, name)
    return total


def _visited(dep: Any, part: Any, graph: Any) -> int:
    """How many elements the loops of one access visit, each place once; where the place is looked up, at every turn."""
    if not hasattr(dep, "index"):  # the whole buffer
        return _elements(graph, dep.name)
    count = 1
    if dep.is_indirect():
        for lengths in part.get_ranges():
            for length in lengths:
                count *= _fixed(length)
        return count
    for variable, length in zip(dep.var_names, dep.size, strict=True):
        if variable in dep.index.free_symbols:
            count *= _fixed(length)
    return count


def _elements(graph: Any, name: str) -> int:
    return _fixed(graph.get_numel(name))


def _width(graph: Any, name: str) -> int:
    return int(graph.get_dtype(name).itemsize)


def _fixed(size: Any) -> int:
    try:
        return int(size)
    except TypeError:
        raise _UnknownError from None
