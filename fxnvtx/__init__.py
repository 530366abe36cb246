"""The structure of a diffusion model as NVTX ranges: eager, inside torch.compile, and in a per-layer table.

Every public name is imported when it is first asked for: reading a capture needs no torch, and instrumenting a model
needs no torch._dynamo.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .compile import register as _register_backend

if TYPE_CHECKING:
    from . import integrations, models, pipeline, report
    from .compile.backend import backend
    from .errors import FxnvtxError
    from .explain import Explanation, explain
    from .graph import insert_ranges
    from .instrument import DiffusionNvtxHooks, instrument, set_enabled, uninstrument
    from .ranges import maybe_nvtx_range, range, range_pop, range_push
    from .recording import Recording, record

__version__ = "0.2.0"

_register_backend()

__all__ = [
    "DiffusionNvtxHooks",
    "Explanation",
    "FxnvtxError",
    "Recording",
    "backend",
    "explain",
    "insert_ranges",
    "instrument",
    "integrations",
    "maybe_nvtx_range",
    "models",
    "pipeline",
    "range",
    "range_pop",
    "range_push",
    "record",
    "report",
    "set_enabled",
    "uninstrument",
]

# public name -> the module it lies in
_HOMES = {
    "DiffusionNvtxHooks": "instrument",
    "Explanation": "explain",
    "FxnvtxError": "errors",
    "Recording": "recording",
    "backend": "compile.backend",
    "explain": "explain",
    "insert_ranges": "graph",
    "instrument": "instrument",
    "maybe_nvtx_range": "ranges",
    "range": "ranges",
    "range_pop": "ranges",
    "range_push": "ranges",
    "record": "recording",
    "set_enabled": "instrument",
    "uninstrument": "instrument",
}
_PACKAGES = frozenset({"integrations", "models", "pipeline", "report"})


def import_quietly(name: str) -> Any:
    """The module `name`. Torch, which it may bring along, complains where numpy is missing: nothing here needs it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        return import_module(name)


class _Package(ModuleType):
    """This package's type: the functions `explain` and `instrument` lie in modules of the same names.

    Python binds a submodule as an attribute of its package when anybody imports it, which would put the module
    `fxnvtx.explain` where users call the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_quietly(f"{__name__}.{_HOMES[name]}"), name)
        setattr(sys.modules[__name__], name, value)
        return value
    if name in _PACKAGES:
        return import_quietly(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
