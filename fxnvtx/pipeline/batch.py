"""One request on its way through the stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from .profiler import RequestMetrics

__all__ = ["Batch", "Embedding"]

Embedding = tuple[Tensor, Tensor]  # one vector per token [1, length, dim], and one for the whole prompt [1, dim]


@dataclass
class Batch:
    """What was asked for, and what the stages have made of it so far. Raises ConfigError for what has no meaning."""

    prompt: str = ""
    negative_prompt: str = ""
    steps: int = 4
    refine_steps: int = 2
    guidance_scale: float = 4.0
    seed: int = 0
    is_warmup: bool = False

    embedding: Embedding | None = None
    negative_embedding: Embedding | None = None
    latent: Tensor | None = None  # [1, channels, height, width] or [1, channels, frames, height, width]
    image: Tensor | None = None  # uint8 [height, width, 3]
    video: Tensor | None = None  # uint8 [frames, height, width, 3]
    extra: dict[str, Any] = field(default_factory=dict)
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a str, not {type(getattr(self, name)).__name__}")
        for name in ("steps", "refine_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
