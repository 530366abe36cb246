"""The structure of a diffusion model as NVTX ranges: eager, inside torch.compile, and in a per-layer table."""

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
