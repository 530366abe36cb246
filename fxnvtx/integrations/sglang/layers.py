"""What shows of a component: its layers while it is in use, and how many bytes its weights have before they move.

SGLang's hook objects say which components are in use; no forward hook of theirs is put on.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet, ref

from .targets import Options, guarded

if TYPE_CHECKING:
    from torch import nn

    from ...modules import Attachments

__all__ = ["Handle", "Layers", "bytes_of", "layer_bytes"]


class Handle:
    """What SGLang's hook objects keep two of for each module: here where its range begins, and where it ends. There is
    no range without either, so that removing one of them takes it out, from the next outermost call on. A component's
    own range stays; only `remove_hooks` takes that."""

    def __init__(self, layers: Layers, hooks: Any, module: nn.Module) -> None:
        self._layers = layers
        self._hooks, self._module = ref(hooks), ref(module)

    def remove(self) -> None:
        hooks, module = self._hooks(), self._module()
        if hooks is not None and module is not None:
            self._layers.leave_out(hooks, module)


class Layers:
    """Which component shows its layers, under which name. One per process: a component that two stages use has one
    name at a time, the one of the use that goes on."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.shown = True  # whether the present step is one whose layers were asked for
        self._attachments: Attachments | None = None
        self._active: list[tuple[nn.Module, str]] = []  # the innermost one last
        self._registered: WeakKeyDictionary[Any, list[tuple[nn.Module, str]]] = WeakKeyDictionary()
        # component -> its name in a use -> layers whose handles were removed
        self._left_out: WeakKeyDictionary[nn.Module, dict[str, WeakSet[nn.Module]]] = WeakKeyDictionary()

    @property
    def attachments(self) -> Attachments:
        if self._attachments is None:
            from ...modules import Attachments

            self._attachments = Attachments()
        return self._attachments

    @guarded
    def register(self, hooks: Any, model: nn.Module, prefix: str) -> int:
        """Note that `hooks` will show `model`. How many of its modules get a range; 0 where no layers are wanted."""
        if not self.options.layers:
            return 0
        from ...modules.selection import DEFAULT_EXCLUDE, Selection, label_text, name_modules, unwrapped

        named = name_modules(unwrapped(model), Selection.of(None, DEFAULT_EXCLUDE, self.options.depth))
        names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # a replaced layer must not be kept alive
        for entry in named:
            names[entry.module] = label_text(prefix, type(entry.module), entry.fqn)
        names.update(getattr(hooks, "_module_to_name_map", ()))
        hooks._module_to_name_map = names  # what SGLang's code asks it for
        hooks._hook_handles = [Handle(self, hooks, module) for module in names for _ in ("begins", "ends")]
        self._registered.setdefault(hooks, []).append((model, prefix))
        if getattr(hooks, "_enabled", False):
            self.enable(model, prefix)
        return len(named)

    def set_enabled(self, hooks: Any, enabled: bool) -> None:
        """From the next outermost call on; a call under way ends as it began."""
        act: Callable[[Any, str], None] = self.enable if enabled else self.disable
        for model, prefix in self._registered.get(hooks, ()):
            act(model, prefix)

    @guarded
    def ahead(self, executor: Any, stages: Any, server_args: Any) -> None:
        """Read the components of a request before it begins: a large model takes tens of milliseconds, which would
        otherwise show as a stage's own."""
        from torch import nn

        from ...modules.selection import unwrapped

        manager = executor.component_residency_manager
        known = {id(m) for m in self.attachments.modules()}
        for stage in stages if self.options.layers else ():
            for use in stage.component_uses(server_args, manager.stage_name(stage)):
                model = manager.get_module(use.component_name)
                if isinstance(model, nn.Module) and id(unwrapped(model)) not in known:
                    known.add(id(unwrapped(model)))
                    self._name(model, manager._nvtx_prefix_for_use(use))
                    self.attachments.disable(model)

    @guarded
    def enable(self, model: nn.Module, prefix: str) -> None:
        if self._active and self._active[-1] == (model, prefix):
            return  # SGLang says so again at every step of a loop; looking for new children would take a walk each time
        if (model, prefix) not in self._active:
            self._active.append((model, prefix))
        self._name(model, prefix)

    @guarded
    def disable(self, model: nn.Module, prefix: str) -> None:
        if (model, prefix) not in self._active:
            return
        self._active.remove((model, prefix))
        outer = next((p for m, p in reversed(self._active) if m is model), None)
        if outer is None:
            self.attachments.disable(model)
        else:
            self._name(model, outer)

    @guarded
    def remove(self, hooks: Any) -> None:
        """Take out what nobody else has registered. Safe to call twice, and in the middle of a call."""
        mine = self._registered.pop(hooks, [])
        for model, prefix in mine:
            self._left_out.get(model, {}).pop(prefix, None)
            self.disable(model, prefix)
        kept = [model for others in self._registered.values() for model, _ in others]
        for model, _ in mine:
            if all(other is not model for other in kept):
                self._active = [(m, p) for m, p in self._active if m is not model]
                self.attachments.remove(model)

    @guarded
    def leave_out(self, hooks: Any, module: nn.Module) -> None:
        """Show no range of this layer where it is used as `hooks` says."""
        for model, prefix in self._registered.get(hooks, ()):
            self._left_out.setdefault(model, {}).setdefault(prefix, WeakSet()).add(module)
            if (model, prefix) in self._active:
                self._name(model, prefix)

    @guarded
    def silence(self, module: Any, prefix: str) -> None:
        """Compiled code brings its ranges along: a use without ranges has to switch them off."""
        from torch import nn

        if self.options.layers and isinstance(module, nn.Module):
            self.attachments.silence(module, prefix)

    @guarded
    def show_step(self, index: int | None) -> None:
        """Step `index` begins (None: the loop is over): show the layers of the components in use, or not."""
        steps = self.options.steps
        shown = steps is None or index is None or index in steps
        if shown != self.shown:
            self.shown = shown
            for model, _ in self._active:
                self.attachments.switch(model, shown)

    # ------------------------------------------------------------------------------------------ torch.compile

    @guarded
    def compiles(self, module: Any) -> None:
        """`module`, or a method of it, is about to be compiled: have it known before its first call."""
        from torch import nn

        if isinstance(module, nn.Module):
            self.attachments.prepare(module, type(module).__name__)

    def rooted(self, target: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, which runs a method of `target`, inside the range of that component."""
        from torch import nn

        from ...modules import with_root

        return with_root(target, compiled) if isinstance(target, nn.Module) else compiled

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Let torch.compile and Module.compile without a backend take ours while the block runs."""
        import torch

        compile = torch.compile

        def with_ranges(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("backend", "inductor") == "inductor":
                if args:
                    self.compiles(args[0])
                kwargs["backend"] = "fxnvtx"
            return compile(*args, **kwargs)

        torch.compile = with_ranges  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.compile = compile

    def _name(self, model: nn.Module, prefix: str) -> None:
        shapes, without = self.options.shapes, self._paths_left_out(model, prefix)
        self.attachments.enable(model, prefix, self.options.depth, self.shown, shapes=shapes, without=without)

    def _paths_left_out(self, model: nn.Module, prefix: str) -> tuple[str, ...]:
        modules = self._left_out.get(model, {}).get(prefix)
        if not modules:
            return ()
        from ...modules.selection import unwrapped, walk_paths

        paths = [".".join(path) for path, module, _ in walk_paths(unwrapped(model)) if path and module in modules]
        return tuple(map(glob.escape, paths))


# ----------------------------------------------------------------------------------------------- bytes that move


def bytes_of(what: str, strategy: Any, module: Any, use: Any) -> int | None:
    """Bytes of `module` that `what` (load, prefetch, wait, offload) will move; None where there is no telling."""
    try:
        if what == "wait":
            # a wait is for a prefetch under way; without one the method returns at once
            return None if getattr(strategy, "_ready_events", {}).get(use.component_name) is not None else 0
        tensors = [*module.parameters(), *module.buffers()]
        if what == "offload":
            return sum(_nbytes(t) for t in tensors if t.device.type != "cpu")
        if type(strategy).__name__.startswith("Layerwise"):
            parked = getattr(module, "_parked_non_layer_weights", None) or {}
            return sum(_nbytes(t) for t in parked.values()) or None  # the layers follow one by one
        device, dtype = _device(), use.target_dtype
        return sum(_nbytes(t) for t in tensors if _moves(t, device, dtype))
    except Exception:  # a release that keeps its weights another way
        return None


def layer_bytes(manager: Any, index: int) -> int | None:
    """Bytes of one layer that a layer-wise manager moves; None where there is no telling."""
    try:
        weights = manager._weight_metadata[index].values()
        return int(sum(math.prod(w["shape"]) * w["dtype"].itemsize for w in weights))
    except Exception:  # a release that keeps its weights another way
        return None


def _moves(tensor: Any, device: Any, dtype: Any) -> bool:
    converted = dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype
    return bool(converted or tensor.device != device)


def _nbytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def _device() -> Any:
    from sglang.multimodal_gen.runtime.distributed import get_local_torch_device  # type: ignore[import-not-found]

    return get_local_torch_device()
