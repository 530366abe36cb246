"""One level of a model as a generated forward: its children's ranges are pushed inline, at 0.1 us instead of 0.3.

A level is one module's own forward with its children opaque. It is proven traceable (traceability.py), traced by
torch.fx, given range nodes (fx_graph.py), and printed as Python; then the range nodes are replaced by the two or three
statements that they stand for. The result is used in place of the module's forward as long as `holds()` says that
nothing the tracing rested on has changed; it reads children, parameters and buffers from the module at every call.
"""

from __future__ import annotations

import ast
import dis
import inspect
import itertools
import linecache
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as _nn_module
from torch.overrides import TorchFunctionMode

from ..compile.torch_private import hide_from_dynamo
from ..ranges import HANDLE, label, nvtx_pop, nvtx_push
from ..ranges.crossing import begins_only
from ..ranges.emit import unwind
from . import fx_graph as _graph
from .call_slot import SLOT, Slot, calls_plainly, in_range
from .selection import walk_paths
from .traceability import Facts, Refused, read_forward

__all__ = ["Level", "Refused", "trace_level"]


@dataclass(frozen=True)
class Level:
    """A traced level. Holds no module: the same Level serves every module of the same class and structure.

    `fast` and `general` take (module, stack, labels, *forward's own arguments); `children` are the FQNs, relative to
    the level, of the child calls that get a range, in program order.
    """

    children: tuple[str, ...]
    graph: fx.Graph
    source: str
    holds: Callable[[nn.Module], bool]
    fast: Callable[..., Any]
    general: Callable[..., Any]

    def labels_below(self, prefix: str, kinds: dict[str, str]) -> tuple[Any, ...]:
        """What the generated code pushes, for children called `prefix` and more: (entry, NVTX attributes) by turns.
        `kinds`: their classes."""
        made = [label(f"{prefix}{child}", "module", kind=kinds.get(child, "")) for child in self.children]
        return tuple(item for text in made for item in ((text,), text.attributes))


_numbers = itertools.count()
_cache: weakref.WeakKeyDictionary[type, dict[Any, Level | str]] = weakref.WeakKeyDictionary()


def trace_level(module: nn.Module, ranged: Sequence[str]) -> Level:
    """Trace `module`'s own forward; children named in `ranged` (FQNs relative to it) get ranges.

    Raises Refused with the reason. Modules of one class that look alike share one Level.
    """
    function, facts = read_forward(module)
    _first_paths(module)  # before the cache, which knows classes and not who shares what
    for child in ranged:
        if not calls_plainly(module.get_submodule(child)):
            raise Refused(f"{child} overrides __call__, which must run around its range")
        if begins_only(module.get_submodule(child).forward):
            raise Refused(f"{child} returns a coroutine or generator, and its range must last as long as that")
    key = (
        function,
        tuple(sorted((n, type(v), v) for n, v in facts.scalars.items())) if facts.scalars else (),
        tuple(facts.loops.items()),
        tuple(n for n, c in module._modules.items() if c is not None),
        tuple(id(v) for v in facts.functions.values()),
        tuple(ranged),
    )
    known = _cache.setdefault(type(module), {})
    found = known.get(key)
    if found is None:
        try:
            found = _trace(module, function, facts, frozenset(ranged))
        except Refused as refused:
            found = str(refused)  # not the exception: its traceback would keep the module alive
        known[key] = found
    if isinstance(found, str):
        raise Refused(found)
    return found


def _trace(module: nn.Module, function: types.FunctionType, facts: Facts, ranged: frozenset[str]) -> Level:
    graph = _Tracer().trace_one(module)
    _check_graph(graph, function, facts)
    children = []
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in ranged:
            children.append(str(node.target))
            with graph.inserting_before(node):
                graph.call_function(_graph.range_push, (node.target,))
            with graph.inserting_after(node):
                graph.call_function(_graph.range_pop)
    graph.lint()
    code = graph.python_code("self")
    tree = ast.parse(code.src)
    definition = next(s for s in tree.body if isinstance(s, ast.FunctionDef))
    name, number = f"<fxnvtx level of {type(module).__qualname__}", next(_numbers)
    return Level(
        tuple(children),
        graph,
        code.src,
        _guard(module, facts, function, children),
        _build(definition, _FAST, children, code.globals, function, f"{name}, {number}>"),
        _build(definition, _GENERAL, children, code.globals, function, f"{name}, general {number}>"),
    )


# ------------------------------------------------------------------------------------------------ tracing


class _NothingConcrete(TorchFunctionMode):
    """While a level is traced, no torch function may really run: its answer would be frozen into the code."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        symbolic: list[bool] = []
        fx.node.map_aggregate((args, kwargs), lambda a: symbolic.append(isinstance(a, fx.Proxy)) or a)  # type: ignore[func-returns-value]
        if not any(symbolic) and getattr(func, "__name__", "") not in {"__get__", "__set__"}:
            raise Refused(f"{getattr(func, '__name__', func)} runs on constants: tracing would freeze its answer")
        return func(*args, **kwargs)


def _first_paths(module: nn.Module) -> dict[int, str]:
    """By id, the first path to each module below. Refused where this level can reach one by several names: one call
    in the graph stands for one name, and the other may be given another module later."""
    paths: dict[int, str] = {}
    for steps, child, _ in walk_paths(module):
        if any("." in step for step in steps[:2]):  # only a write into `_modules` can make one
            raise Refused(f"the name of its child {steps[-1]!r} has a dot in it, and could be taken for a path")
        path = ".".join(steps)
        first = paths.setdefault(id(child), path)
        if first != path and child is not module and _in_reach(module, path):
            raise Refused(f"{first} and {path} are the same module")
    return paths


def _in_reach(module: nn.Module, path: str) -> bool:
    """Whether a level's own forward can call what lies at `path`: a child, or an item of a container child."""
    parts = path.split(".")
    loops = (nn.ModuleList, nn.Sequential)
    return len(parts) == 1 or (len(parts) == 2 and isinstance(module._modules.get(parts[0]), loops))


def unpack(value: Any, count: int) -> tuple[Any, ...]:
    """`a, b = value` with Python's own complaint when the number does not fit."""
    items = tuple(value)
    if len(items) != count:
        what = "too many values to unpack" if len(items) > count else "not enough values to unpack"
        raise ValueError(f"{what} (expected {count}{'' if len(items) > count else f', got {len(items)}'})")
    return items


class _Tracer(fx.Tracer):
    """Children are leaves, tensors of self are read by name at every call, unpacking is checked at run time."""

    def trace_one(self, module: nn.Module) -> fx.Graph:
        self.paths = _first_paths(module)
        try:
            with _NothingConcrete():
                return self.trace(module)
        except Refused:
            raise
        except Exception as error:  # a forward may fail under tracing in any way
            first = str(error).strip().splitlines()
            raise Refused(f"torch.fx cannot trace it: {type(error).__name__}: {first[0] if first else ''}") from None
        finally:
            self.__dict__.clear()  # torch leaves cycles through a tracer, and this one knows the module

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def path_of_module(self, mod: nn.Module) -> str:
        return self.paths[id(mod)]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, torch.Tensor):
            return self.create_proxy("get_attr", attr, (), {})
        return attr_val

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Unpacks:
    """`b, n, c = x.shape` becomes one node that checks the number, where fx would index without a check."""

    def __iter__(self) -> Any:
        calling = sys._getframe(1)  # and not our own frame, which would be a cycle around the model
        for instruction in dis.get_instructions(calling.f_code):
            if instruction.offset == calling.f_lasti:
                if instruction.opname != "UNPACK_SEQUENCE":
                    break
                unpacked = self.tracer.create_proxy("call_function", unpack, (self, instruction.argval), {})  # type: ignore[attr-defined]
                return (unpacked[i] for i in range(instruction.argval))
        raise Refused("a tensor is iterated")


class _Proxy(_Unpacks, fx.Proxy):  # type: ignore[misc]
    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)


class _Attribute(_Unpacks, fx.proxy.Attribute):  # type: ignore[misc]
    pass


def _check_graph(graph: fx.Graph, function: types.FunctionType, facts: Facts) -> None:
    """Every torch function in the source must have become a node; no constant tensor may have appeared."""
    targets = {id(n.target) for n in graph.nodes if n.op == "call_function"}
    for dotted in facts.called:
        if id(facts.functions[dotted]) not in targets:
            raise Refused(f"{'.'.join(dotted)} is not recorded by torch.fx")
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in facts.tensors:
            raise Refused(f"tracing made a constant of {node.target}")


# ------------------------------------------------------------------------------------------------ guard


def _guard(
    module: nn.Module, facts: Facts, function: types.FunctionType, children: Sequence[str]
) -> Callable[[nn.Module], bool]:
    """`holds(module)`: nobody hooks the module, nobody replaced its forward, and no fact changed."""
    direct = sorted({child.split(".")[0] for child in children})
    # a plain attribute of the same name would win over a child or a tensor, which the generated code reads directly
    shadowing = frozenset({*direct, *facts.tensors, *(n for n in facts.loops if n)})
    scope: dict[str, Any] = {"_g": function.__globals__, "_forward": function, "_shadowing": shadowing}
    lines = ["def holds(module):", "    d = module.__dict__", "    m = d['_modules']"]
    lines += [f"    m[{name!r}]" for name in direct]
    tests = [
        "d['_forward_hooks'] or d['_forward_pre_hooks'] or d['_backward_hooks'] or d['_backward_pre_hooks']",
        "'forward' in d or type(module).forward is not _forward",
        "not _shadowing.isdisjoint(d)",
    ]
    for kind in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"):
        scope[f"_{kind}"] = getattr(_nn_module, f"_global_{kind}")
        tests.append(f"_{kind}")
    for index, (name, value) in enumerate(facts.scalars.items()):
        scope[f"_s{index}"] = value
        # identity first; 0.0 and -0.0, 1 and True, nan and nan need more than ==
        tests.append(f"module.{name} is not _s{index} and not _same(module.{name}, _s{index})")
    scope["_same"] = _same
    for index, (name, keys) in enumerate(facts.loops.items()):
        scope[f"_k{index}"] = keys
        scope[f"_t{index}"] = type(module._modules[name] if name else module)
        looped = f"m[{name!r}]" if name else "module"
        tests.append(f"type({looped}) is not _t{index} or tuple({looped}._modules) != _k{index}")
    for index, (dotted, value) in enumerate(facts.functions.items()):
        scope[f"_f{index}"] = value
        tests.append(f"_g[{dotted[0]!r}]{''.join('.' + p for p in dotted[1:])} is not _f{index}")
    body = [f"    if {test}:\n        return False" for test in tests]
    exec("\n".join([*lines, *body, "    return True"]), scope)
    checked = scope["holds"]
    hide_from_dynamo(checked.__code__)

    def holds(module: nn.Module) -> bool:
        try:
            return bool(checked(module))
        except (AttributeError, KeyError):  # something that was there is gone: the real forward will say so
            return False

    hide_from_dynamo(holds.__code__)
    return holds


def _same(now: Any, then: Any) -> bool:
    return type(now) is type(then) and repr(now) == repr(then)


# ------------------------------------------------------------------------------------------------ code

# A child call between its range nodes. `__m` is the child as it is now. If it has a slot of ours, the slot's body is
# called, for the range is already open; anything else has been put there later, and takes the general form.
_FAST = """
__m = CHILD
__c = __getattr(__m, __SLOT, None)
if type(__c) is __Method and type(__c.__self__) is __Slot:
    __stack.append(__labels[ENTRY])
    __push(__labels[ATTRIBUTES], __HANDLE)
    __body = __c.__self__.body
    TARGET = __body(__m, ARGUMENTS)
    if len(__stack) == __depth:
        del __stack[-1]
        __pop(__HANDLE)
    else:
        __unwind(__stack, __depth - 1)
else:
    TARGET = __in_range(__m, __labels[ENTRY][0], ARGUMENTS)
"""
_GENERAL = """
TARGET = __in_range(CHILD, __labels[ENTRY][0], ARGUMENTS)
"""


class _Fill(ast.NodeTransformer):
    def __init__(self, index: int, child: str, target: ast.expr, call: ast.Call) -> None:
        self.index = index
        self.child = child
        self.target = target
        self.call_ = call

    def visit_Name(self, node: ast.Name) -> ast.expr:
        match node.id:
            case "CHILD":  # nn.Module.__getattr__ is a Python function; this is where it looks in the end
                container, _, last = self.child.rpartition(".")
                return ast.parse(f"{_holder(container)}[{last!r}]", mode="eval").body
            case "TARGET":
                return self.target
            case "ENTRY":
                return ast.Constant(2 * self.index)
            case "ATTRIBUTES":
                return ast.Constant(2 * self.index + 1)
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if node.args and isinstance(node.args[-1], ast.Name) and node.args[-1].id == "ARGUMENTS":
            node.args[-1:] = self.call_.args
            node.keywords = self.call_.keywords
        return node


def _holder(container: str) -> str:
    """The local variable for the dict of children of `container` ("" is the level's module itself)."""
    return f"__children_{container}"


def _build(
    definition: ast.FunctionDef,
    template: str,
    children: Sequence[str],
    names: dict[str, Any],
    function: types.FunctionType,
    filename: str,
) -> Callable[..., Any]:
    """The printed forward with every (push, call, pop) replaced by the template's statements."""
    head = ["__depth = len(__stack) + 1"]
    for container in sorted({child.rpartition(".")[0] for child in children}):
        way = "".join(f"[{step!r}]._modules" for step in container.split(".")) if container else ""
        head.append(f"{_holder(container)} = __self._modules{way}")
    body: list[ast.stmt] = list(ast.parse("\n".join(head)).body)
    index = 0
    pending = False
    for statement in definition.body:
        call = statement.value if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call) else None
        called = call.func.id if call is not None and isinstance(call.func, ast.Name) else ""
        if names.get(called) in _graph.RANGE_NODES:
            pending = names[called] is _graph.range_push
        elif pending and call is not None and isinstance(statement, ast.Assign):
            fill = _Fill(index, children[index], statement.targets[0], call)
            filled = [fill.visit(s) for s in ast.parse(template).body]
            body.extend(filled)
            index += 1
            pending = False
        else:
            body.append(statement)
    signature = ast.parse(f"def forward(__self, __stack, __labels, /{_arguments(function)}): pass").body[0]
    assert isinstance(signature, ast.FunctionDef)
    self_name = definition.args.args[0].arg
    renamed = ast.parse(f"{self_name} = __self").body
    signature.body = [*renamed, *body]
    tree = ast.fix_missing_locations(ast.Module([signature], []))
    source = ast.unparse(tree)
    scope = {
        **names,
        "__getattr": getattr,
        "__SLOT": SLOT,
        "__push": nvtx_push,
        "__pop": nvtx_pop,
        "__HANDLE": HANDLE,
        "__Method": types.MethodType,
        "__Slot": Slot,
        "__unwind": unwind,
        "__in_range": in_range,
    }
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), scope)
    made = scope["forward"]
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    made.__qualname__ = function.__qualname__
    hide_from_dynamo(made.__code__)
    return made  # type: ignore[no-any-return]


def _arguments(function: types.FunctionType) -> str:
    """forward's own parameters without self, so that calls bind, and complain, as they do with the original."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise Refused("forward has positional-only parameters")
    listed = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in listed:
            listed.append("*")
        listed.append(parameter.name + ("=None" if parameter.default is not parameter.empty else ""))
    return "".join(f", {item}" for item in listed)
