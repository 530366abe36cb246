"""The structure of a diffusion model as NVTX ranges: eager, inside torch.compile, and in a per-layer table."""

from .errors import FxnvtxError
from .ranges import maybe_nvtx_range, range, range_pop, range_push
from .recording import Recording, record

__all__ = ["FxnvtxError", "Recording", "maybe_nvtx_range", "range", "range_pop", "range_push", "record"]
