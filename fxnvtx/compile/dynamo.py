"""What Dynamo traces and what it hands to a backend: the user's own ranges, and who compiles an instrumented model.

The user's own ranges in code that Dynamo traces are one more owner level around what is computed inside. While it
traces, Dynamo meets `range(...)`, `range_push`, `range_pop` and what a decorated function calls. It must not follow
them (they read who listens, and break or guard). Instead they leave two markers in its graph, which are taken out again
before any backend sees it; for ours, what lies between them gets the range as one more entry of its module stack, which
AOTAutograd carries along, into the backward graph too.

Everything Dynamo compiles passes one method, whatever the backend and however it was asked for. There the markers go,
and there we see whose code it is. Instrumented models that another backend compiles are said once, explained, or taken
over: what is compiled stays as it is, unless "inductor" is to mean ours: for one model by instrument(model,
compile=True), for all that `instrument()` knows by FXNVTX_COMPILE=1.

Imports nothing of torch and of ours before Dynamo is there: it is loaded with fxnvtx itself.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from ..errors import warn_once

__all__ = ["HANDS_OVER", "TAKE_PART", "TRACED", "absorb", "silent_models", "watch_compilers"]

TAKE_PART = "FXNVTX_COMPILE"
# torch 2.11 to 2.15: the variables for Python functions and for classes, and who makes one for an object that is there
_FUNCTIONS = ("torch._dynamo.variables.functions", "UserFunctionVariable")
_CLASSES = ("torch._dynamo.variables.user_defined", "UserDefinedClassVariable")
_OBJECTS = ("torch._dynamo.variables.builder", "VariableBuilder", "_wrap")
# and the method that hands a graph to a backend; it is older than that
HANDS_OVER, _KIND, _METHOD = "torch._dynamo.output_graph", "OutputGraph", "call_user_compiler"
_unsaid: dict[tuple[str, str], str] = {}  # (model, backend) -> what to say once somebody listens
_said: set[tuple[str, str]] = set()


def begin(text: str, category: str) -> None:
    """A marker: what follows is inside this range."""


def end() -> None:
    """A marker: the innermost range is over."""


def _ranges() -> Any:
    """The module of the public forms, once somebody has used one."""
    return sys.modules.get(f"{(__package__ or '').partition('.')[0]}.ranges")


def _patch_objects(namespace: types.ModuleType) -> None:
    """A range made outside and entered inside: Dynamo takes context managers only where it saw them made."""
    found = getattr(namespace, _OBJECTS[1], None)
    original = getattr(found, _OBJECTS[2], None)
    if not isinstance(found, type) or original is None:
        return  # such a one breaks the graph, as any other context manager does

    def wrap(self: Any, value: Any) -> Any:
        from torch._dynamo.guards import GuardBuilder

        ranges = _ranges()
        if ranges is None or type(value) is not ranges.range:
            return original(self, value)
        self.install_guards(GuardBuilder.ID_MATCH)
        return _range_variable()(_texts(value.label) if value.enabled else ())

    setattr(found, _OBJECTS[2], wrap)


def _patch(namespace: types.ModuleType, kind: str, answer: Callable[[Any, Any, Any, Any], Any]) -> None:
    found = getattr(namespace, kind, None)
    original = getattr(found, "call_function", None)
    if not isinstance(found, type) or original is None:
        warn_once("ranges", "this torch lets Dynamo see fxnvtx.range: inside compiled code it may break the graph")
        return

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        instead = answer(self, tx, args, kwargs)
        return original(self, tx, args, kwargs) if instead is None else instead

    found.call_function = call_function  # type: ignore[attr-defined]


def _instead_of_functions(variable: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    ranges = _ranges()
    if ranges is None:
        return None
    function = getattr(variable, "fn", None)
    opening = (ranges.push, ranges.range_push)
    if function in opening and args:
        return _opened(tx, *_label_of(args[0], kwargs))
    if function in (ranges.pop, ranges.range_pop):
        return _emit(tx, end)
    return None


def _instead_of_the_class(variable: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    ranges = _ranges()
    if ranges is None or getattr(variable, "value", None) is not ranges.range:
        return None
    enabled = kwargs.get("enabled")
    shown = enabled is None or not enabled.is_python_constant() or bool(enabled.as_python_constant())
    given = args[0] if args else kwargs.get("text")
    return _range_variable()(_label_of(given, kwargs) if shown and given is not None else ())


def _range_variable() -> Any:
    """The class of Dynamo's variable for `range(...)`, made late: its base lives in torch."""
    global _made
    if _made is None:
        from torch._dynamo.variables.ctx_manager import ContextWrappingVariable

        class RangeVariable(ContextWrappingVariable):
            """`target_values`: (label, category), or nothing for a range that is switched off."""

            def enter(self, tx: Any, *args: Any) -> Any:
                if self.target_values:
                    _opened(tx, *self.target_values)
                return _nothing()

            def exit(self, tx: Any, *args: Any) -> Any:
                return _emit(tx, end) if self.target_values else _nothing()

            def module_name(self) -> str:
                return __name__

            def fn_name(self) -> str:
                return "resumed"

        _made = RangeVariable
    return _made


_made: Any = None


def resumed(text: str = "", category: str = "") -> Any:
    """A range in which the graph broke: the rest of its body runs in Python."""
    from ..ranges import range as real

    return real(text, category=category or None, enabled=bool(text))


def _label_of(variable: Any, kwargs: Any) -> tuple[str, str]:
    """(label, category) of what was given for a range; what is only known at run time is called so."""
    value = getattr(variable, "value", None)
    category = kwargs.get("category")
    named = category.as_python_constant() if category is not None and category.is_python_constant() else None
    if variable.is_python_constant():
        value = variable.as_python_constant()
    if isinstance(value, str):
        return value, named or ""
    return _texts(value) if hasattr(value, "text") else ("range", named or "")


def _texts(made: Any) -> tuple[str, str]:
    return made.text, getattr(made, "category", None) or ""


def _opened(tx: Any, text: str, category: str) -> Any:
    return _emit(tx, begin, text, category)


def _emit(tx: Any, marker: Callable[..., None], *args: str) -> Any:
    watch_compilers(sys.modules[HANDS_OVER])  # which takes the markers out
    tx.output.create_proxy("call_function", marker, args, {})
    return _nothing()


def _nothing() -> Any:
    from torch._dynamo.variables import ConstantVariable

    return ConstantVariable.create(None)


# ------------------------------------------------------------------------------------------------ markers


def absorb(graph_module: Any, keep: bool) -> None:
    """Take the markers out of a Dynamo graph and its subgraphs, in place; with `keep`, what is between them gets the
    ranges into its module stack: below the modules that were running where the range began."""
    from .owners import UserRange

    for module in graph_module.modules():
        graph = getattr(module, "graph", None)
        markers = [n for n in getattr(graph, "nodes", ()) if n.op == "call_function" and n.target in (begin, end)]
        if graph is None or not markers:
            continue
        inside: list[tuple[int, str, tuple[str, type]]] = []  # (modules above, key, entry)
        for number, node in enumerate(list(graph.nodes)):
            if node.op == "call_function" and node.target is begin:
                text, category = node.args
                above = len(node.meta.get("nn_module_stack") or ())
                inside.append((above, f"fxnvtx.{number}", (f"{category}\0{text}", UserRange)))
            elif node.op == "call_function" and node.target is end:
                if inside:
                    inside.pop()
            elif keep and inside and node.op not in ("placeholder", "get_attr", "output"):
                node.meta["nn_module_stack"] = _with_ranges(node.meta.get("nn_module_stack") or {}, inside)
        for node in markers:
            graph.erase_node(node)
        module.recompile()


def _with_ranges(stack: Any, inside: list[tuple[int, str, tuple[str, type]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    entries = list(stack.items())
    for position in range(len(entries) + 1):
        found.update((key, entry) for above, key, entry in inside if min(above, len(entries)) == position)
        found.update(entries[position : position + 1])
    return found


# Module -> what makes Dynamo take our ranges for what they are, to be called once the module is imported
TRACED: dict[str, Callable[[types.ModuleType], None]] = {
    _FUNCTIONS[0]: lambda namespace: _patch(namespace, _FUNCTIONS[1], _instead_of_functions),
    _CLASSES[0]: lambda namespace: _patch(namespace, _CLASSES[1], _instead_of_the_class),
    _OBJECTS[0]: _patch_objects,
}


# --------------------------------------------------------------------------------------------------- who compiles what


def silent_models() -> str | None:
    """Which instrumented models were compiled by other backends, in words; None where there are none."""
    if not _said and not _unsaid:
        return None
    return ", ".join(f'{model} by "{name}"' for model, name in (*_said, *_unsaid))


@functools.cache  # once: what is wrapped stays wrapped
def watch_compilers(namespace: types.ModuleType) -> None:
    """See every graph that Dynamo hands to a backend. `namespace`: the module HANDS_OVER."""
    _ranges().on_listeners_changed(_say_it)
    kind = getattr(namespace, _KIND, None)
    original = getattr(kind, _METHOD, None)
    if not isinstance(kind, type) or original is None:
        warn_once(
            "others", "this torch does not show which backend compiles a model: fxnvtx cannot say what is missing"
        )
        return
    setattr(kind, _METHOD, _watching(original))


def _watching(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call_user_compiler(self: Any, gm: Any, example_inputs: Any) -> Any:
        compiler = getattr(self, "compiler_fn", None)
        ours = None
        try:
            absorb(gm, keep=_is_ours(compiler))
            ours = _look(compiler, gm, example_inputs)
        except Exception as error:  # a model compiles, whatever we make of it
            warn_once("others", f"what another backend compiled is not known, reading its graph failed: {error!r}")
        if ours is None:
            return original(self, gm, example_inputs)
        self.compiler_fn = ours
        try:
            return original(self, gm, example_inputs)
        finally:
            self.compiler_fn = compiler

    return call_user_compiler


def _unwrapped(compiler: Any) -> tuple[Any, Any]:
    """What torch.compile has put around a backend, and the backend."""
    while hasattr(compiler, "_torchdynamo_orig_backend"):
        compiler = compiler._torchdynamo_orig_backend
    return compiler, getattr(compiler, "compiler_fn", compiler)


def _is_ours(compiler: Any) -> bool:
    from ..modules.registry import controls
    from .backend import Backend

    wrapper, inner = _unwrapped(compiler)
    taken = os.environ.get(TAKE_PART) == "1" or any(control.compiles for control in controls())
    return isinstance(inner, Backend) or (taken and isinstance(getattr(wrapper, "config", None), dict))


def _look(compiler: Any, graph_module: Any, inputs: Any) -> Any:
    """The backend to compile with instead; None where it stays as it is."""
    from ..modules.explain import CompiledRegion, note
    from ..modules.registry import controls
    from .backend import Backend, fxnvtx_backend
    from .labels import family
    from .module_index import current_frame, read_graph

    wrapper, inner = _unwrapped(compiler)
    if not controls() or isinstance(inner, Backend):
        return None
    region, _ = read_graph(graph_module, current_frame(), list(inputs))
    modules = [m for a in region.anchors if a.module is not None and (m := a.module()) is not None]
    found = next((c for m in modules if (c := family(m)) is not None), None)
    if found is None:
        return None
    name = getattr(wrapper, "compiler_name", None) or getattr(inner, "__name__", None) or type(inner).__name__
    options = getattr(wrapper, "config", None)
    taken = found.compiles or os.environ.get(TAKE_PART) == "1"
    if name == "inductor" and isinstance(options, dict) and taken:
        return functools.partial(fxnvtx_backend, options=dict(options))
    reason = 'its layers show where the model is compiled with backend="fxnvtx"'
    if name == "inductor":
        reason += f", with instrument(model, compile=True), or with {TAKE_PART}=1 in the environment"
    if _runs_operator():
        reason = f"torch.cond, while_loop and their like compile themselves when they are called eagerly; {reason}"
    note(CompiledRegion(region.title, name, "none", reason, region.paths))
    _say(found.text(""), name, reason)
    return None


def _runs_operator() -> bool:
    """Whether what is compiled is torch.cond, while_loop or another such operator, called in eager mode (seen in torch
    2.13; where torch has no such mark the line just does not say so)."""
    marks = getattr(sys.modules.get("torch._higher_order_ops.utils"), "_hop_compile_tls", None)
    return bool(getattr(marks, "in_hop_compile", False))


def _say(model: str, name: str, reason: str) -> None:
    if (model, name) not in _said:
        _unsaid[model, name] = f'{model} was compiled by "{name}", no layer inside is shown: {reason}'
    _say_it()


def _say_it() -> None:
    """Said while somebody listens: to nobody else it matters."""
    ranges = _ranges()
    while ranges.emit.active and _unsaid:
        key, text = _unsaid.popitem()
        _said.add(key)
        ranges.emit.log.warning("%s", text)
