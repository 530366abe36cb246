"""DiffusionNvtxHooks: the eager path as an object one can register, switch and remove."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from . import control as _control
from .control import Control, lock
from .errors import InstrumentError
from .names import DEFAULT_EXCLUDE, Pattern, Selection, unwrapped

__all__ = ["DiffusionNvtxHooks"]


class DiffusionNvtxHooks:
    """Ranges around the modules of any number of models, switched on and off together. Starts switched off.

    `skip_types`: module types that get no range (default: Identity and Dropout kinds). `shapes`: a marker
    `<label> in=[[2, 3], [4]]` with the input shapes at every call. `depth`: levels of ranges below each model.
    """

    def __init__(
        self,
        skip_types: Pattern | Iterable[Pattern] = DEFAULT_EXCLUDE,
        *,
        shapes: bool = False,
        depth: int | None = None,
    ) -> None:
        self._selection = Selection.of(None, skip_types, depth)
        self._shapes = bool(shapes)
        self._enabled = False
        self._models: list[Control] = []

    @property
    def enabled(self) -> bool:
        return self._enabled

    def register_hooks(self, model: nn.Module, prefix: str = "") -> int:
        """Instrument `model` under `prefix`; returns how many of its modules were not instrumented before.

        Registering a model again picks up replaced children and another prefix. Containers that are never called
        do not count.
        """
        if not isinstance(model, nn.Module):
            raise InstrumentError(f"register_hooks takes a torch.nn.Module, not {type(model).__name__}")
        model = unwrapped(model)
        with lock:
            control = Control(model, prefix or None, self._selection, "hooks", self._shapes)
            control.enabled = self._enabled
            fresh = sum(_control.entry_of(n.module) is None for n in control.scan())
            _control.register(model, control)
            self._models = [c for c in self._models if c.model() not in (None, model)] + [control]
            return fresh

    def set_enabled(self, enabled: bool) -> None:
        """Takes effect at the next outermost call; a forward under way goes on as it began."""
        self._enabled = bool(enabled)
        for control in self._models:
            control.set_enabled(self._enabled)

    def remove_hooks(self) -> None:
        """Take everything out again. Safe to call twice, and in the middle of a forward."""
        with lock:
            for control in self._models:
                model = control.model()
                if model is not None and _control.controls_of(model) is control:
                    _control.unregister(model)
            self._models = []
