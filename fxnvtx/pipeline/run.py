"""One request through a named pipeline: what the command line calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError
from . import reference, two_stage
from .args import ServerArgs
from .batch import Batch
from .composed import ComposedPipeline
from .context import running_with
from .profiler import RequestMetrics

__all__ = ["PIPELINES", "Result", "run"]

PIPELINES: dict[str, Callable[..., ComposedPipeline]] = {
    "reference": reference.build,
    "two-stage": two_stage.build,
}


@dataclass
class Result:
    """What one request gave. `image`: uint8 [height, width, 3]; `video`: uint8 [frames, height, width, 3]; one is None.

    `peak_weight_bytes`: the most weight bytes in compute memory at one time; `bound_bytes`: what they stay under.
    """

    image: Tensor | None
    video: Tensor | None
    metrics: RequestMetrics
    peak_weight_bytes: int
    bound_bytes: int
    pipeline: ComposedPipeline


def run(
    name: str = "reference",
    *,
    prompt: str,
    negative_prompt: str = "",
    steps: int = 4,
    seed: int = 0,
    size: str = "tiny",
    args: ServerArgs | None = None,
    compile: bool = False,
    warmup: int = 0,
    on_step: Callable[[int, int], None] | None = None,
    pipeline: ComposedPipeline | None = None,
) -> Result:
    """Build the pipeline `name` (or take `pipeline`), run `warmup` silent requests and one that counts.

    `on_step(done, total)` is called after every denoising step of that one. Raises ConfigError for a name or value that
    has no meaning.
    """
    if name not in PIPELINES:
        raise ConfigError(f"there is no pipeline {name!r}: choose one of {', '.join(PIPELINES)}")
    built = pipeline or PIPELINES[name](args, size=size, compile=compile)
    batch = Batch(prompt=prompt, negative_prompt=negative_prompt, steps=steps, seed=seed)
    for _ in range(warmup):
        built(Batch(prompt=prompt, negative_prompt=negative_prompt, steps=1, refine_steps=1, is_warmup=True))
    total = steps + (batch.refine_steps if "refinement" in built.stages else 0)
    done = 0

    def told() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    with running_with(on_step=told):
        batch = built(batch)
    account = built.residency.account
    return Result(batch.image, batch.video, batch.metrics, account.peak_bytes, built.residency.bound_bytes, built)
