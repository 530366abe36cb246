"""Every model of a program is instrumented just before its first call, without a line in the program.

`nn.Module.__call__` reads one attribute, `_compiled_call_impl`; instrumented modules have their slot there. A
descriptor in its place on the class sees the calls of all other modules, and of those alone: nothing is replaced that a
program or torch.fx looks at, no frame of ours appears in a traceback, and an instrumented module costs what it costs.
"""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .. import ranges as _ranges
from ..compile.torch_private import dynamo_active, hide_module
from ..errors import FxnvtxError, warn_once
from ..modules import instrument, unwrapped
from ..modules.call_slot import SLOT, tracing
from ..modules.registry import controls_of, entry_of
from ..modules.selection import DEFAULT_EXCLUDE, Pattern, is_callable_module, walk_paths
from ..ranges import emit
from ..ranges.crossing import around
from .methods import Methods, unwrapped_method

__all__ = ["Everything", "Family", "instrument_everything"]


# ----------------------------------------------------------------------------------------- which models belong to which


class Family:
    """The parents of every module that is put into another while `watch()` is on, or was there before.

    Modules are held weakly. A parent is believed only as long as it still holds the child.
    """

    def __init__(self, met: Callable[[nn.Module], None] | None = None) -> None:
        self._parents: dict[int, list[weakref.ref[nn.Module]]] = {}
        self._known: dict[int, weakref.ref[nn.Module]] = {}
        self._met = met  # called with every module that gets a child
        self._undo: list[Callable[[], None]] = []

    def watch(self) -> None:
        """Note every registration from now on, and what is there already."""
        self._undo.append(register_module_module_registration_hook(self._registered).remove)
        # copies and unpickled modules are put together without registration
        original = nn.Module.__setstate__
        family = self

        def set_state(self: nn.Module, state: dict[str, Any]) -> None:
            original(self, state)
            family.scan(self)

        nn.Module.__setstate__ = set_state  # type: ignore[method-assign]
        self._undo.append(lambda: setattr(nn.Module, "__setstate__", original))
        for found in gc.get_objects():
            if issubclass(type(found), nn.Module):  # isinstance() asks the object, and a lazy one would answer
                self.scan(found)

    def unwatch(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _registered(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if isinstance(child, nn.Module):
            self._note(parent, child)

    def scan(self, parent: nn.Module) -> None:
        for child in parent.__dict__.get("_modules", {}).values():
            if isinstance(child, nn.Module):
                self._note(parent, child)

    def _note(self, parent: nn.Module, child: nn.Module) -> None:
        key = id(child)
        parents = self._parents.get(key)
        if parents is None or self._known[key]() is not child:
            parents = self._parents[key] = []
            self._known[key] = weakref.ref(child, lambda ref: self._forget(key, ref))
        if all(known() is not parent for known in parents):
            parents.append(weakref.ref(parent))
        if self._met is not None:
            self._met(parent)

    def _forget(self, key: int, ref: weakref.ref[nn.Module]) -> None:
        if self._known.get(key) is ref:
            del self._known[key], self._parents[key]

    def parents(self, module: nn.Module) -> Iterator[nn.Module]:
        """Those that hold `module` as a child now, the one that got it first at the front."""
        known = self._known.get(id(module))
        if known is None or known() is not module:
            return
        for ref in list(self._parents[id(module)]):
            parent = ref()
            if parent is not None and any(child is module for child in parent._modules.values()):
                yield parent

    def owners(self, module: nn.Module) -> list[nn.Module]:
        """The outermost modules that `module` belongs to: itself where nobody owns it. A bare ModuleList or ModuleDict
        at the top is a collection of models, not one."""
        top: list[nn.Module] = []
        seen: set[int] = set()
        todo = [module]
        while todo:
            one = todo.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            above = [p for p in self.parents(one) if p is not one and not self._collection(p)]
            todo.extend(reversed(above))
            if not above and (one is module or not _bare(one)):
                top.append(one)
        return top or [module]

    def _collection(self, module: nn.Module) -> bool:
        """A bare container that nobody owns."""
        return _bare(module) and not any(True for _ in self.parents(module))


def _bare(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and not is_callable_module(module)


# ---------------------------------------------------------------------------------------------- the models of a program


class _Unmet:
    """What nn.Module has in the slot's place. No __set__: a module's own slot, in its dict, wins."""

    def __init__(self, met: Everything) -> None:
        self.met = met

    def __get__(self, module: nn.Module | None, kind: type | None = None) -> Any:
        if module is None or torch.compiler.is_compiling():  # the second is what Dynamo sees when it inlines a call
            return None
        if not emit.active or dynamo_active() or tracing():
            return None
        self.met.meet(module)
        return module.__dict__.get(SLOT)


class Everything:
    """What is done while a program runs: modules are instrumented below the outermost model that owns them, diffusers
    pipelines get request, stages and steps, and Inductor compiles with the backend "fxnvtx"."""

    def __init__(self, depth: int | None = None, path: str = "auto", layers: bool = True) -> None:
        self.depth = depth
        self.path = path
        self.layers = layers
        self.methods = Methods(self.meet)
        self.family = Family(self.methods.see)
        self._lock = threading.RLock()
        self._done: dict[int, weakref.ref[nn.Module]] = {}  # modules that were met and have no range of their own
        self._ours: dict[int, weakref.ref[nn.Module]] = {}  # the roots instrumented here

    def start(self) -> None:
        from . import diffusers

        self._compile = torch.compile
        torch.compile = _compile_with_layers(torch.compile)
        if self.layers:
            self.methods.start()
            self.family.watch()
            self._before = nn.Module.__dict__[SLOT]
            setattr(nn.Module, SLOT, _Unmet(self))
        diffusers.watch(depth=self.depth, path=self.path, layers=self.layers)

    def stop(self) -> None:
        from . import diffusers

        diffusers.unwatch()
        if self.layers:
            setattr(nn.Module, SLOT, self._before)
            self.family.unwatch()
            self.methods.stop()
        torch.compile = self._compile

    def meet(self, module: nn.Module) -> None:
        """Called with a module that has no slot, when it is called. Never raises: the program must go on."""
        inner = unwrapped(module)
        known = self._done.get(id(inner))
        if (known is not None and known() is inner) or entry_of(inner) is not None:
            return
        try:
            with self._lock:
                self._meet(inner)
        except FxnvtxError as error:
            warn_once(type(inner).__name__, str(error))
        except Exception as error:  # whatever somebody's module does when it is read
            warn_once(type(inner).__name__, f"{type(inner).__name__} is not instrumented: {error}")
        if entry_of(inner) is None and (self._owned(inner) or not _passing(inner)):
            _remember(self._done, inner)

    def _owned(self, module: nn.Module) -> bool:
        return any(True for _ in self.family.parents(module))

    def _meet(self, module: nn.Module) -> None:
        root = self._root(module)
        if isinstance(root, (fx.GraphModule, nn.modules.loss._Loss)):
            return  # instrument() copies the one, and the other has no inside
        if root is module and _passing(module) and (_ranges.local.stack or around() is not None):
            return  # made for one call inside somebody's forward: nn.Softmax(dim=-1)(scores)
        known = self._ours.get(id(root))
        if controls_of(root) is not None and (known is None or known() is not root):
            return  # the program's own instrument() call: its options stand
        if entry_of(root) is not None and controls_of(root) is None:
            return  # part of what the program instruments
        _remember(self._ours, root)
        instrument(root, depth=self.depth, path=self.path, exclude=self._covered(root))

    def _root(self, module: nn.Module) -> nn.Module:
        """The outermost owner. Of several, one that runs now, else one that has been met, else the first."""
        owners = [unwrapped(owner) for owner in self.family.owners(module)]
        if len(owners) == 1:
            return owners[0]
        met = [owner for owner in owners if controls_of(owner) is not None]
        stack = _ranges.local.stack
        running = [o for o in met if (control := controls_of(o)) is not None and control.runs_on(stack)]
        return (running or met or owners)[0]

    def _covered(self, root: nn.Module) -> tuple[Pattern, ...]:
        """What to leave out below `root`: the usual, and the models in it that had their names before it came."""
        below: list[Pattern] = []
        tops: list[tuple[str, ...]] = []
        for path, module, _ in walk_paths(root):
            if not path:
                continue
            if any(path[: len(top)] == top for top in tops):
                if f"{'.'.join(tops[-1])}.*" not in below:
                    below.append(f"{'.'.join(tops[-1])}.*")
                continue
            found = entry_of(module)
            if found is not None and found[0].model() not in (None, root):
                tops.append(path)
                below.append(".".join(path))
        return (*DEFAULT_EXCLUDE, *below)


def _passing(module: nn.Module) -> bool:
    """A layer of torch's own, without children."""
    return type(module).__module__.startswith("torch.nn.") and not module._modules


def _remember(where: dict[int, weakref.ref[nn.Module]], module: nn.Module) -> None:
    key = id(module)

    def forget(ref: weakref.ref[nn.Module]) -> None:
        if where.get(key) is ref:
            del where[key]

    where[key] = weakref.ref(module, forget)


def _compile_with_layers(original: Any) -> Any:
    @functools.wraps(original)
    def compile(*args: Any, backend: Any = "inductor", **kwargs: Any) -> Any:
        args = (unwrapped_method(args[0]), *args[1:]) if args else args
        return original(*args, backend="fxnvtx" if backend == "inductor" else backend, **kwargs)

    return compile


@contextmanager
def instrument_everything(depth: int | None = None, path: str = "auto") -> Iterator[None]:
    """While this runs, every module is instrumented just before its first call."""
    met = Everything(depth, path)
    met.start()
    try:
        yield
    finally:
        met.stop()


hide_module(globals())
