"""The user's own ranges in code that Dynamo traces: one more owner level around what is computed inside.

While it traces, Dynamo meets `range(...)`, `range_push`, `range_pop` and what a decorated function calls. It must not
follow them (they read who listens, and break or guard). Instead they leave two markers in its graph, which are taken
out again before any backend sees it; for ours, what lies between them gets the range as one more entry of its module
stack, which AOTAutograd carries along, into the backward graph too.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from .._imports import when_imported
from .notices import warn_once

__all__ = ["OWN", "UserRange", "absorb", "see_ranges"]

OWN = -1  # the anchor of a step that is a range of the user's, whose path is its label

# torch 2.11 to 2.15: the variables for Python functions and for classes, and who makes one for an object that is there
_FUNCTIONS = ("torch._dynamo.variables.functions", "UserFunctionVariable")
_CLASSES = ("torch._dynamo.variables.user_defined", "UserDefinedClassVariable")
_OBJECTS = ("torch._dynamo.variables.builder", "VariableBuilder", "_wrap")


_before_marker: Callable[[], None] | None = None


class UserRange:
    """Stands where a module's class does in a module stack."""


def begin(text: str, category: str) -> None:
    """A marker: what follows is inside this range."""


def end() -> None:
    """A marker: the innermost range is over."""


def _ranges() -> Any:
    """The module of the public forms, once somebody has used one."""
    return sys.modules.get(f"{(__package__ or '').partition('.')[0]}.ranges")


def see_ranges(before_marker: Callable[[], None]) -> None:
    """Have Dynamo take our ranges for what they are, now or when it gets imported. `before_marker` is called before a
    marker is left: whoever takes the markers out must be there."""
    global _before_marker
    _before_marker = before_marker
    when_imported(_FUNCTIONS[0], lambda namespace: _patch(namespace, _FUNCTIONS[1], _instead_of_functions))
    when_imported(_CLASSES[0], lambda namespace: _patch(namespace, _CLASSES[1], _instead_of_the_class))
    when_imported(_OBJECTS[0], _patch_objects)


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
                return "fxnvtx.compile.user_ranges"

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
    if _before_marker is not None:
        _before_marker()
    tx.output.create_proxy("call_function", marker, args, {})
    return _nothing()


def _nothing() -> Any:
    from torch._dynamo.variables import ConstantVariable

    return ConstantVariable.create(None)


# ------------------------------------------------------------------------------------------------ markers


def absorb(graph_module: Any, keep: bool) -> None:
    """Take the markers out of a Dynamo graph and its subgraphs, in place; with `keep`, what is between them gets the
    ranges into its module stack: below the modules that were running where the range began."""
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
