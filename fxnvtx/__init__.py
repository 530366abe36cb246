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
from .compile import when_imported as _when_imported

if TYPE_CHECKING:
    from . import integrations, models, pipeline, report
    from .compile.backend import backend
    from .errors import FxnvtxError
    from .modules import DiffusionNvtxHooks, instrument, set_enabled, uninstrument
    from .modules.explain import Explanation, explain
    from .modules.fx_graph import insert_ranges
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
    "DiffusionNvtxHooks": "modules",
    "Explanation": "modules.explain",
    "FxnvtxError": "errors",
    "Recording": "recording",
    "backend": "compile.backend",
    "explain": "modules.explain",
    "insert_ranges": "modules.fx_graph",
    "instrument": "modules",
    "maybe_nvtx_range": "ranges",
    "range": "ranges",
    "range_pop": "ranges",
    "range_push": "ranges",
    "record": "recording",
    "set_enabled": "modules",
    "uninstrument": "modules",
}
_PACKAGES = frozenset({"integrations", "models", "pipeline", "report"})


def import_quietly(name: str) -> Any:
    """The module `name`. Torch, which it may bring along, complains where numpy is missing: nothing here needs it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        return import_module(name)


def _shown_by_the_report(recording: ModuleType) -> None:
    def as_html(recorded: Recording) -> str:
        from .report import from_recording

        return from_recording(recorded)._repr_html_()

    recording.as_html = as_html  # type: ignore[attr-defined]


# The report reads recordings, and knows of them; what a notebook shows of one it says here.
_when_imported(f"{__name__}.recording", _shown_by_the_report)


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
