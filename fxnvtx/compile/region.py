"""One compiled region: which modules it runs this time, and the range around it."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..categories import MODULE
from ..modules.registry import Control, controls
from ..ranges import label, local, open_labels, push
from .labels import Binding, Names, at, named_tensors
from .torch_private import hide_module

__all__ = ["BACKWARD", "Anchor", "Call", "Region", "families"]


BACKWARD = label("backward")
# per anchor: (tensor, the names it may have below the anchor)
Pairs = list[list[tuple[Any, tuple[str, ...]]]]


@dataclass
class Anchor:
    """A module below which the region's paths start. Anchor 0 of a method's region is the module whose frame it is."""

    kind: type
    module: weakref.ref[nn.Module] | None
    parameters: dict[int, str] = field(default_factory=dict)  # position among the arguments -> name below the module


@dataclass
class Region:
    """What is known about a compiled region when it is compiled."""

    key: str
    anchors: list[Anchor]
    framed: bool  # anchor 0 is the module whose method was compiled
    function: str | None  # name of the compiled function, where it is no method of a module
    paths: list[str]  # of its modules, for people
    repeats: bool = False  # a subgraph in it is called more than once
    part: str = ""  # which piece of the module's code it is: name of the code that was compiled
    replayed: bool = True  # it may run without its generated code, or has none of ours
    # by the addresses of a call's parameters; an entry goes when one of them dies, for its address may come again
    bound: dict[Any, Call] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What to call the region where no label is at hand yet."""
        return self.function or (self.anchors[0].kind.__name__ if self.anchors else "region")

    @property
    def note(self) -> str:
        """Where the region is shown, if not in the range of the module whose code it is."""
        return "" if self.framed else "no module's own code: shown in the range of the module that runs it, if one does"

    @functools.cached_property
    def positions(self) -> tuple[int, ...]:
        """Where among the arguments the parameters are that tell whose call it is."""
        return tuple(k for a in self.anchors for k in a.parameters)

    def call(self, args: Sequence[Any]) -> Call:
        """Whose call this is."""
        signature: tuple[Any, ...] = tuple([id(args[k]) for k in self.positions])
        if not self.framed:
            signature = (module_around(), *signature)
        known = self._known(signature)
        if known is not None:
            return known
        pairs: Pairs = [[(args[k], (name,)) for k, name in a.parameters.items()] for a in self.anchors]
        return self._remember(signature, pairs)

    def call_of(self, tensors: Sequence[Any]) -> Call:
        """The same, from tensors that are parameters of the region in unknown order (a backward graph has those)."""
        signature: tuple[Any, ...] = ("tensors", *map(id, tensors))
        if not self.framed:
            signature = (module_around(), *signature)
        known = self._known(signature)
        if known is not None:
            return known
        pairs: Pairs = [[(t, tuple(a.parameters.values())) for t in tensors] for a in self.anchors]
        return self._remember(signature, pairs)

    def _remember(self, signature: Any, pairs: Pairs) -> Call:
        bindings, certain = [], True
        for anchor, tensors in zip(self.anchors, pairs, strict=True):
            binding, sure = bind(anchor, tensors)
            bindings.append(binding)
            certain = certain and sure
        call = Call(self, bindings, pairs)
        if len(self.bound) > 4096:
            self.bound.clear()
        key = signature if certain else (signature, open_labels())
        call.alive = [weakref.ref(t, _Forget(self, key)) for found in pairs for t, _ in found]
        self.bound[key] = call
        return call

    def _known(self, signature: Any) -> Call | None:
        found = self.bound.get(signature)
        if found is None or not found.holds():
            found = self.bound.get((signature, open_labels()))
            if found is None or not found.holds():
                return None
        return found


class _Forget:
    """Takes a binding out again when a tensor dies that it was found by."""

    __slots__ = ("key", "region")

    def __init__(self, region: Region, key: Any) -> None:
        self.region = weakref.ref(region)
        self.key = key

    def __call__(self, _: object) -> None:
        region = self.region()
        if region is not None:
            region.bound.pop(self.key, None)


families: dict[str, list[weakref.ref[Region]]] = {}
_lock = threading.Lock()


def remember(region: Region) -> None:
    """Let cached code find the region it was compiled for."""
    with _lock:
        alive = [r for r in families.get(region.key, ()) if r() is not None]
        families[region.key] = [*alive, weakref.ref(region)]


def module_around() -> str | None:
    """The innermost module whose range is open on this thread. What no module's own code does is shown there."""
    for entry in reversed(local.stack):
        if entry[0].category == MODULE and entry[0] is not BACKWARD:
            text: str = entry[0].text
            return text
    return None


def bind(anchor: Anchor, tensors: list[tuple[Any, tuple[str, ...]]]) -> tuple[Binding, bool]:
    """Which module the anchor is now, and whether that follows from the tensors alone."""
    traced = anchor.module() if anchor.module is not None else None
    found = _by_parameters(anchor, tensors)
    if len(found) == 1:
        control, fqn = found.pop()
        return _binding(anchor, control, fqn), True
    running = _running(anchor)
    if found:
        if running in found:
            assert running is not None
            return _binding(anchor, *running), False
        return Binding(anchor.kind, None), False
    if traced is not None and any(traced is m for c in controls() for m in _modules(c)):
        if running is not None:
            return _binding(anchor, *running), False
        twins = {id(m): m for c in controls() for m in _modules(c) if type(m) is anchor.kind}
        return Binding(anchor.kind, traced if len(twins) == 1 else None), False
    return Binding(anchor.kind, traced), False


def _binding(anchor: Anchor, control: Control, fqn: str) -> Binding:
    model = control.model()
    return Binding(anchor.kind, None if model is None else at(model, fqn), fqn)


def _modules(control: Control) -> Any:
    model = control.model()
    return () if model is None else model.modules()


def _running(anchor: Anchor) -> tuple[Control, str] | None:
    """The innermost module of the anchor's class whose range is open on this thread."""
    for text in reversed(open_labels()):
        for control in reversed(controls()):
            for known in control.entries:
                if known.kind is anchor.kind:
                    for fqn in (known.fqn, *known.also, *known.by_parent.values()):
                        if control.text(fqn) == text:
                            return control, fqn
    return None


def _by_parameters(anchor: Anchor, tensors: list[tuple[Any, tuple[str, ...]]]) -> set[tuple[Control, str]]:
    """The modules of instrumented models that hold every one of these tensors under the expected name."""
    left: set[tuple[Control, str]] | None = None
    for tensor, names in tensors:
        here = set()
        for control, path in index.paths(tensor):
            for name in names:
                if path == name or path.endswith(f".{name}"):
                    here.add((control, path[: -len(name)].rstrip(".")))
        here = {(c, f) for c, f in here if _kind(c, f) is anchor.kind}
        if here:
            left = here if left is None else (left & here or left)
    return left or set()


def _kind(control: Control, fqn: str) -> type | None:
    model = control.model()
    module = None if model is None else at(model, fqn)
    return None if module is None else type(module)


class Index:
    """Which parameters and buffers the instrumented models hold, by identity."""

    def __init__(self) -> None:
        self._paths: dict[int, list[tuple[Control, str]]] = {}
        self._models: list[tuple[Control, nn.Module]] = []

    def paths(self, tensor: Any) -> list[tuple[Control, str]]:
        found = self._paths.get(id(tensor))
        if found is None or not all(_holds(c, p, tensor) for c, p in found):
            self._build()
            found = self._paths.get(id(tensor), [])
        return found

    def _build(self) -> None:
        paths: dict[int, list[tuple[Control, str]]] = {}
        for control in controls():
            model = control.model()
            if model is not None:
                for name, tensor in named_tensors(model):
                    paths.setdefault(id(tensor), []).append((control, name))
        self._paths = paths


index = Index()


def _holds(control: Control, path: str, tensor: Any) -> bool:
    model = control.model()
    owner, _, name = path.rpartition(".")
    module = None if model is None else at(model, owner)
    return module is not None and (module._parameters.get(name) is tensor or module._buffers.get(name) is tensor)


class _Proof:
    """A binding's module holds a tensor of the call. One is looked at, at every call: weights move in sets."""

    __slots__ = ("name", "owner", "tensor")

    def __init__(self, owner: nn.Module, name: str, tensor: Any) -> None:
        self.owner, self.name, self.tensor = weakref.ref(owner), name, weakref.ref(tensor)

    def __call__(self) -> bool:
        owner, tensor = self.owner(), self.tensor()
        if owner is None or tensor is None:
            return False
        return owner._parameters.get(self.name) is tensor or owner._buffers.get(self.name) is tensor


def _proof(binding: Binding, found: list[tuple[Any, tuple[str, ...]]]) -> _Proof | None:
    """None where nothing of the binding's module came with the call."""
    if binding.module is None:
        return None
    for tensor, names in found:
        for name in names:
            path, _, last = name.rpartition(".")
            owner = at(binding.module, path)
            proof = None if owner is None else _Proof(owner, last, tensor)
            if proof is not None and proof():
                return proof
    return None


class Call:
    """A region bound to the modules of one call: what the generated code needs to name its ranges."""

    def __init__(self, region: Region, bindings: list[Binding], pairs: Pairs) -> None:
        self.region = region
        self.key = region.key
        self.bindings = bindings
        around = None if region.framed else module_around()
        self.base = bindings[0].text if region.framed and bindings else around or region.function
        self.category = "op" if around is None and not region.framed else MODULE
        self.control = next((b.control for b in bindings if b.control is not None), None)
        self._entries = [None if b.control is None else b.control.entries for b in bindings]
        self.alive: list[weakref.ref[Any]] = []  # the tensors that the bindings were found by
        self._proofs = [p for b, found in zip(bindings, pairs, strict=True) if (p := _proof(b, found)) is not None]
        # All that labels depend on. Weak references are equal while their module lives, and to nothing else after
        # that; the lists are kept, so that their addresses are theirs.
        self.signature = (
            self.base,
            *((b.reference, b.text, id(e)) for b, e in zip(bindings, self._entries, strict=True)),
        )

    def holds(self) -> bool:
        """Whether the models are still instrumented as they were, and hold the tensors they held."""
        return all(
            (b.control is None or (b.control.registered and b.control.entries is e)) and not b.died
            for b, e in zip(self.bindings, self._entries, strict=True)
        ) and all(proof() for proof in self._proofs)

    def names(self) -> Names:
        return Names(self.bindings, self.base)

    @property
    def silent(self) -> bool:
        """Whether the model was switched off before its outermost call that is under way."""
        control = self.control
        if control is None:
            return False
        return control in local.silent or (not control.enabled and not control.runs_on(local.stack))

    def is_open(self) -> bool:
        """Whether the range of the region's module is open on this thread already (the eager path opened it)."""
        return self.base in open_labels()

    def open(self) -> list[Any]:
        """Open the region's own range, unless it is open."""
        if self.base is None or self.is_open():
            return []
        made = label(self.base, self.category)
        return [push(made, None, self.control)]


hide_module(globals())  # autograd and compiled code call this with Dynamo watching
