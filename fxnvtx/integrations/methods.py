"""A model entered by another way than `__call__`: `forward_with_cfg`, `decode`, `encode`, `generate`.

Public methods of the program's own module classes are wrapped while a program runs under `fxnvtx run`. One that leads
to a call of a child has a range `<label>.<method>` where it is the way in; inside the model's own range there is
nothing to add. Whether it leads to such a call is read from its source, with the module at hand to say which names are
children.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import threading
import weakref
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ..compile.torch_private import dynamo_active, hide_module
from ..modules import label_of
from ..modules.registry import entry_of
from ..ranges import emit, label, open_labels, pop, push

__all__ = ["Methods", "leads_to_children", "unwrapped_method"]

_OF_EVERY_MODULE = frozenset(dir(nn.Module)) - {"forward"}
# The one that is at work. Module state and not the wrappers' own, so that a class that is pickled by value
# (cloudpickle does so with those of __main__) takes along nothing but its own functions.
_meet: Callable[[nn.Module], None] | None = None


class Methods:
    """Which methods are wrapped. `meet` instruments a module that is about to be entered."""

    def __init__(self, meet: Callable[[nn.Module], None]) -> None:
        self._given = meet
        self._seen: weakref.WeakSet[type] = weakref.WeakSet()
        self._held: list[tuple[type, str, FunctionType, FunctionType]] = []
        self._lock = threading.RLock()

    def start(self) -> None:
        global _meet
        _meet = self._given
        self._script = torch.jit.script
        torch.jit.script = self._plainly(torch.jit.script)  # type: ignore[assignment]

    def stop(self) -> None:
        global _meet
        _meet = None
        torch.jit.script = self._script
        self._restore()
        self._held.clear()

    def see(self, module: nn.Module) -> None:
        """Wrap the methods of a class that has modules as children."""
        kind = type(module)
        if kind in self._seen:
            return
        with self._lock:
            self._seen.add(kind)
            for base in kind.__mro__:
                if issubclass(base, nn.Module) and not base.__module__.startswith(("torch.", "fxnvtx.")):
                    for name, found in list(vars(base).items()):
                        self._wrap(base, name, found)

    def _wrap(self, base: type, name: str, found: Any) -> None:
        if type(found) is not FunctionType or name.startswith("_") or name == "forward" or name in _OF_EVERY_MODULE:
            return
        if hasattr(found, "_fxnvtx_method") or inspect.iscoroutinefunction(found) or inspect.isgeneratorfunction(found):
            return
        wrapper = _wrapper(found, name)
        setattr(base, name, wrapper)
        self._held.append((base, name, found, wrapper))

    def _restore(self) -> None:
        for base, name, original, wrapper in self._held:
            if vars(base).get(name) is wrapper:
                setattr(base, name, original)

    def _plainly(self, script: Callable[..., Any]) -> Callable[..., Any]:
        """TorchScript compiles methods from their source, in the names of the function it finds: not of a wrapper."""

        @functools.wraps(script)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self._restore()
                try:
                    return script(*args, **kwargs)
                finally:
                    for base, name, original, wrapper in self._held:
                        if vars(base).get(name) is original:
                            setattr(base, name, wrapper)

        return call


def _wrapper(original: FunctionType, name: str) -> FunctionType:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not emit.active or dynamo_active():
            return original(self, *args, **kwargs)
        entry = _enter(self, name, original)
        try:
            return original(self, *args, **kwargs)
        finally:
            pop(entry)

    call._fxnvtx_method = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def unwrapped_method(method: Any) -> Any:
    """The bound method as the program's class defines it: what is to be compiled."""
    function = getattr(method, "__func__", None)
    if function is not None and hasattr(function, "_fxnvtx_method"):
        return MethodType(function.__wrapped__, method.__self__)
    return method


def _enter(module: Any, name: str, original: FunctionType) -> Any:
    """The method's range, opened; None where it is not the way into the model."""
    try:
        if _meet is None or not isinstance(module, nn.Module) or not _leads(module, original):
            return None
        _meet(module)
        text = label_of(module)
        found = entry_of(module)
        if text is None or found is None or not found[0].enabled:
            return None
        if any(open_ == text or open_.startswith(f"{text}.") for open_ in open_labels()):
            return None
        return push(label(f"{text}.{name}", "module"))
    except Exception as error:  # whatever somebody's module does when it is read; the call must go on
        emit.log.debug("%s has no range: %r", name, error)
        return None


_known: weakref.WeakKeyDictionary[type, dict[FunctionType, bool]] = weakref.WeakKeyDictionary()


def _leads(module: nn.Module, function: FunctionType) -> bool:
    known = _known.setdefault(type(module), {})
    found = known.get(function)
    if found is None:
        found = known[function] = leads_to_children(module, function)
    return found


# ------------------------------------------------------------------------------------------------ reading the source


def leads_to_children(module: nn.Module, function: Callable[..., Any], seen: frozenset[Any] = frozenset()) -> bool:
    """Whether `function`, a method of `module`, calls the module itself or a child, in its own body or through other
    methods of the module. False where there is no source to read."""
    function = inspect.unwrap(function)
    if function in seen:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    body = tree.body[0] if tree.body else None
    if not isinstance(body, ast.FunctionDef) or not body.args.args:
        return False
    reader = _Reader(module, body.args.args[0].arg, seen | {function})
    # twice: a name may be used in a nested function above the line that binds it
    return any(reader.reads(node) for _ in range(2) for node in ast.walk(body))


class _Reader:
    def __init__(self, module: nn.Module, me: str, seen: frozenset[Any]) -> None:
        self.module = module
        self.me = me
        self.seen = seen
        self.children: set[str] = set()  # local names bound to children, or to what is made of them

    def reads(self, node: ast.AST) -> bool:
        """Note what `node` binds; whether it is a call that leads to a child."""
        if isinstance(node, (ast.For, ast.comprehension)) and self._names_child(node.iter):
            self._bind(node.target)
        elif isinstance(node, ast.Assign) and self._names_child(node.value):
            for target in node.targets:
                self._bind(target)
        return isinstance(node, ast.Call) and self._calls(node.func)

    def _bind(self, target: ast.AST) -> None:
        self.children |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}

    def _names_child(self, value: ast.AST) -> bool:
        """A child, a list of children, a part of one; zip() and enumerate() of those. Not the result of calling it."""
        if isinstance(value, ast.Call):
            return isinstance(value.func, ast.Name) and any(self._names_child(a) for a in value.args)
        if isinstance(value, (ast.Subscript, ast.Starred)):
            return self._names_child(value.value)
        found = self._resolve(value)
        return isinstance(found, nn.Module) and found is not self.module

    def _resolve(self, node: ast.AST) -> Any:
        """The object that `self.a.b` is now; None for anything else."""
        if isinstance(node, ast.Name):
            return self.module if node.id == self.me else None
        if not isinstance(node, ast.Attribute):
            return None
        owner = self._resolve(node.value)
        return None if owner is None else inspect.getattr_static(owner, node.attr, None) or _child(owner, node.attr)

    def _calls(self, called: ast.AST) -> bool:
        if isinstance(called, ast.Subscript):
            return self._names_child(called.value)
        if isinstance(called, ast.Name):
            return called.id == self.me or called.id in self.children
        if not isinstance(called, ast.Attribute):
            return False
        found = self._resolve(called)
        if isinstance(found, nn.Module):
            return True
        owner = self._resolve(called.value)
        if called.attr in _OF_EVERY_MODULE or not isinstance(owner, nn.Module) or not isinstance(found, FunctionType):
            return False
        return owner is not self.module or leads_to_children(owner, found, self.seen)


def _child(owner: Any, name: str) -> Any:
    return owner._modules.get(name) if isinstance(owner, nn.Module) else None


hide_module(globals())
