"""How many bytes a residency strategy of SGLang is about to move: read off the tensors, before they move."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["bytes_of", "layer_bytes"]


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
