"""The stages of the reference pipelines."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import PipelineError
from ..models import (
    ByteTokenizer,
    FlowMatchEulerScheduler,
    LoRALinear,
    Tile,
    join_tiles,
    plan_tiles,
    set_lora_scale,
    to_uint8,
)
from ..ranges.labels import Label, label
from .args import ServerArgs
from .component_use import ComponentUse
from .executor import PipelineStage, StageParallelism
from .request import Batch, Embedding, running

__all__ = [
    "DecodingStage",
    "DenoisingStage",
    "Guidance",
    "LatentStage",
    "LoRASwitchStage",
    "TextEncodingStage",
    "UpsamplingStage",
    "noise",
    "step_label",
    "tile_name",
]


class LatentStage(PipelineStage):
    """Fills `latent` with noise of `shape` from the request's seed."""

    def __init__(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.shape = shape
        self.device = torch.device(device)

    def forward(self, batch: Batch, args: ServerArgs) -> Batch:
        batch.latent = noise(self.shape, batch.seed, self.device)
        return batch


def noise(shape: tuple[int, ...], seed: int, device: torch.device) -> torch.Tensor:
    """Standard normal float32 noise: drawn on the CPU, so that it is the same for every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


class TextEncodingStage(PipelineStage):
    """Embeds the prompt and the negative prompt. Requests of a group with equal prompts share one run."""

    deduplicated: ClassVar[tuple[str, ...]] = ("embedding", "negative_embedding")

    def __init__(self, tokenizer: ByteTokenizer, component: str = "text_encoder") -> None:
        self.tokenizer = tokenizer
        self.component = component

    def component_uses(self, args: ServerArgs, stage_name: str) -> list[ComponentUse]:
        return [ComponentUse(self.component)]

    def deduplication_key(self, batch: Batch, args: ServerArgs) -> Hashable:
        return batch.prompt, batch.negative_prompt

    @torch.no_grad()
    def forward(self, batch: Batch, args: ServerArgs) -> Batch:
        with self.use_component(self.component) as encoder:
            device = next(encoder.parameters()).device
            with self.ranged("encode_prompt"):
                batch.embedding = encoder(self.tokenizer(batch.prompt).to(device))
            with self.ranged("encode_negative_prompt"):
                batch.negative_embedding = encoder(self.tokenizer(batch.negative_prompt).to(device))
        return batch


# --------------------------------------------------------------------------------------------- classifier-free guidance


@dataclass(frozen=True)
class Guidance:
    """`scale` 1 means none. `interval`: first and last step, from 0, that are guided; None means all."""

    scale: float
    interval: tuple[int, int] | None = None

    def applies(self, step: int) -> bool:
        """Whether this step needs more than the conditional pass."""
        if self.scale == 1.0:
            return False
        return self.interval is None or self.interval[0] <= step <= self.interval[1]

    def combine(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """The prediction of a step with the two usual passes."""
        return unconditional + self.scale * (conditional - unconditional)


class DenoisingStage(PipelineStage):
    """Takes `latent` from noise to data with the DiT named `component`.

    `start` below 1 refines: the latent gets noise of that level first, from the seed after the request's, and the loop
    has `refine_steps`. `guided`: whether the request's guidance scale applies. Under a parallel executor the ranks
    share the passes of a step.

    For guidance by more than two passes (an image beside the text, a degraded model) override `branches` and `combine`.
    """

    parallelism: ClassVar[StageParallelism] = StageParallelism.CFG_PARALLEL

    def __init__(
        self,
        scheduler: FlowMatchEulerScheduler,
        component: str = "dit",
        *,
        start: float = 1.0,
        guided: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.component = component
        self.start = start
        self.guided = guided
        self.dtype = dtype

    def component_uses(self, args: ServerArgs, stage_name: str) -> list[ComponentUse]:
        return [ComponentUse(self.component, dtype=self.dtype)]

    def verify_input(self, batch: Batch, args: ServerArgs) -> list[str]:
        return [f"{name} is missing" for name in ("latent", "embedding", "negative_embedding") if _lacks(batch, name)]

    @torch.no_grad()
    def forward(self, batch: Batch, args: ServerArgs) -> Batch:
        assert batch.latent is not None
        scheduler = copy.copy(self.scheduler)  # a loop's noise levels are its own
        latent = batch.latent
        if self.start < 1.0:
            timesteps = scheduler.set_timesteps(batch.refine_steps, start=self.start)
            latent = scheduler.add_noise(latent, noise(tuple(latent.shape), batch.seed + 1, latent.device))
        else:
            timesteps = scheduler.set_timesteps(batch.steps)
        guidance = Guidance(batch.guidance_scale if self.guided else 1.0, args.guidance_interval)
        on_step = running().on_step
        with self.use_component(self.component) as dit, self.ranged("denoising_loop", "loop", len(timesteps)):
            for index, timestep in enumerate(timesteps.tolist()):
                with self.step(step_label(index, timestep), index):
                    now = timesteps[index].to(latent.device).expand(latent.shape[0])
                    velocity = self.predict_noise(dit, latent, now, batch, guidance, index)
                    with self.ranged("scheduler_step"):
                        latent = scheduler.step(velocity, index, latent)
                if on_step is not None:
                    on_step()
        batch.latent = latent
        return batch

    def branches(self, batch: Batch) -> Sequence[tuple[str, Embedding]]:
        """The passes of a guided step in their order, each with its name and what it is given; an unguided step has the
        first. Every rank must answer alike."""
        assert batch.embedding is not None
        assert batch.negative_embedding is not None
        return [("conditional", batch.embedding), ("unconditional", batch.negative_embedding)]

    def combine(self, passes: Sequence[Tensor], guidance: Guidance) -> Tensor:
        """The prediction of a guided step, from that of each branch in their order."""
        return guidance.combine(*passes)

    def predict_noise(
        self, dit: nn.Module, latent: Tensor, timestep: Tensor, batch: Batch, guidance: Guidance, step: int
    ) -> Tensor:
        """The velocity at one step: one pass, or all where guidance applies (shared among ranks, if there are any)."""
        branches = self.branches(batch)
        if not guidance.applies(step):
            branches = branches[:1]
        group = running().group
        size, rank = (1, 0) if group is None else (group.cfg_size, group.cfg_rank)
        with self.ranged("predict_noise", payload=len(branches)):
            if len(branches) == 1 or group is None or size == 1:
                passes = [self._pass(name, dit, latent, timestep, text) for name, text in branches]
            else:
                passes = []
                for first in range(0, len(branches), size):
                    # with more ranks than passes some do one that another does as well: all have to meet
                    name, text = branches[(first + rank) % len(branches)]
                    passes += group.gather_cfg(self._pass(name, dit, latent, timestep, text))
            return passes[0] if len(branches) == 1 else self.combine(passes[: len(branches)], guidance)

    def _pass(self, name: str, dit: nn.Module, latent: Tensor, timestep: Tensor, text: Embedding) -> Tensor:
        with self.ranged(f"predict_noise.{name}"):
            if self.dtype is None:
                found: Tensor = dit(latent, timestep, *text)
                return found
            low = dit(latent.to(self.dtype), timestep, text[0].to(self.dtype), text[1].to(self.dtype))
            return low.to(latent.dtype)  # type: ignore[no-any-return]


def _lacks(batch: Batch, name: str) -> bool:
    return getattr(batch, name, None) is None


class _OnLatent(PipelineStage):
    """Does something with `latent` that takes one component."""

    component: str

    def component_uses(self, args: ServerArgs, stage_name: str) -> list[ComponentUse]:
        return [ComponentUse(self.component)]

    def verify_input(self, batch: Batch, args: ServerArgs) -> list[str]:
        return ["latent is missing"] if batch.latent is None else []


class UpsamplingStage(_OnLatent):
    """Doubles height and width of `latent`."""

    def __init__(self, component: str = "upsampler") -> None:
        self.component = component

    @torch.no_grad()
    def forward(self, batch: Batch, args: ServerArgs) -> Batch:
        with self.use_component(self.component) as upsampler:
            batch.latent = upsampler(batch.latent)
        return batch


class LoRASwitchStage(PipelineStage):
    """Sets the scale of the adapters of `component`; 0 switches them off.

    The change goes through the residency manager: an adapter that lies in a file is changed in the file.
    """

    def __init__(self, component: str, scale: float) -> None:
        self.component = component
        self.scale = scale

    def forward(self, batch: Batch, args: ServerArgs) -> Batch:
        manager = running().manager
        if manager is None:
            raise PipelineError(f"stage {self.component_name} switches weights: add it to a pipeline")
        manager.update_component(self.component, self._switch)
        return batch

    def _switch(self, part: nn.Module) -> None:
        if any(isinstance(module, LoRALinear) for module in part.modules()):
            set_lora_scale(part, self.scale)


class DecodingStage(_OnLatent):
    """Decodes `latent` with the VAE; `tile` and `halo` are in latent points per axis, None decodes the whole at once.

    Fills `image` from a latent of four dimensions, `video` from one of five.
    """

    def __init__(
        self, component: str = "vae", *, tile: tuple[int, ...] | None = None, halo: tuple[int, ...] | None = None
    ) -> None:
        self.component = component
        self.tile = tile
        self.halo = halo

    @torch.no_grad()
    def forward(self, batch: Batch, args: ServerArgs) -> Batch:
        assert batch.latent is not None
        with self.use_component(self.component) as vae:
            pixels = self._decode(vae, batch.latent)
        done = to_uint8(pixels)[0]
        if done.dim() == 3:
            batch.image = done
        else:
            batch.video = done
        return batch

    def _decode(self, vae: Any, latent: Tensor) -> Tensor:
        if self.tile is None:
            found: Tensor = vae.decode(latent)
            return found
        axes = latent.dim() - 2
        tiles = plan_tiles(latent.shape[2:], tile=self.tile, halo=self.halo or (0,) * axes)
        parts = []
        for tile in tiles:
            with self.ranged(tile_name(tile, self.tile)):
                parts.append(vae.decode(latent[tile.read]))
        return join_tiles(parts, tiles, vae.scale)


def tile_name(tile: Tile, size: tuple[int, ...]) -> str:
    """`vae_tile_t0_y1_x2`: which tile along each axis; the same string for the same place in every request."""
    places = [start // step for start, step in zip(tile.start, size, strict=True)]
    return "vae_tile_" + "_".join(f"{axis}{place}" for axis, place in zip("tyx"[-len(places) :], places, strict=True))


def step_label(index: int, timestep: float) -> Label:
    """The label of one denoising step. Equal steps of every request share one registered string.

    `timestep` is shown as a whole number where it is one, else with four digits.
    """
    shown = str(int(timestep)) if float(timestep).is_integer() else f"{timestep:.4g}"
    return label(f"denoising_step_{index}_t{shown}", "step")
