"""The structure of a diffusion model as NVTX ranges: eager, inside torch.compile, and in a per-layer table."""

import warnings
from importlib import import_module
from typing import Any

with warnings.catch_warnings():
    # torch complains at its import that numpy is not there; nothing here needs it
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    from .errors import FxnvtxError
    from .explain import Explanation, explain
    from .graph import insert_ranges
    from .hooks import DiffusionNvtxHooks
    from .instrument import instrument, set_enabled, uninstrument
    from .ranges import maybe_nvtx_range, range, range_pop, range_push
    from .recording import Recording, record

__all__ = [
    "DiffusionNvtxHooks",
    "Explanation",
    "FxnvtxError",
    "Recording",
    "backend",
    "explain",
    "insert_ranges",
    "instrument",
    "maybe_nvtx_range",
    "range",
    "range_pop",
    "range_push",
    "record",
    "set_enabled",
    "uninstrument",
]

_LATER = ("integrations", "models", "pipeline", "report")


def __getattr__(name: str) -> Any:
    """What takes long to import is imported when it is asked for; `backend` brings torch._dynamo."""
    if name == "backend":
        return import_module("fxnvtx.compile.backend").backend
    if name in _LATER:
        return import_module(f"fxnvtx.{name}")
    raise AttributeError(f"module 'fxnvtx' has no attribute {name!r}")
