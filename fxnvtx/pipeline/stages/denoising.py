"""The denoising loop: steps, guidance passes, scheduler steps, each with its range."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...models import FlowMatchEulerScheduler
from ..args import ServerArgs
from ..batch import Batch, Embedding
from ..context import running
from ..guidance import Guidance
from ..residency import ComponentUse
from ..stage import PipelineStage, StageParallelism
from ..steps import step_label
from .latents import noise

__all__ = ["DenoisingStage"]


class DenoisingStage(PipelineStage):
    """Takes `latent` from noise to data with the DiT named `component`.

    `start` below 1 refines: the latent gets noise of that level first, from the seed after the request's, and the loop
    has `refine_steps`. `guided`: whether the request's guidance scale applies. Under a parallel executor half of the
    ranks do the conditional pass and half the unconditional one.
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
        told = running().on_step
        with self.use_component(self.component) as dit, self.ranged("denoising_loop", "loop", len(timesteps)):
            for index, timestep in enumerate(timesteps.tolist()):
                with self.step(step_label(index, timestep), index):
                    now = timesteps[index].to(latent.device).expand(latent.shape[0])
                    velocity = self.predict_noise(dit, latent, now, batch, guidance, index)
                    with self.ranged("scheduler_step"):
                        latent = scheduler.step(velocity, index, latent)
                if told is not None:
                    told()
        batch.latent = latent
        return batch

    def predict_noise(
        self, dit: nn.Module, latent: Tensor, timestep: Tensor, batch: Batch, guidance: Guidance, step: int
    ) -> Tensor:
        """The velocity at one step: one pass, or two where guidance applies (shared among ranks, if there are any)."""
        assert batch.embedding is not None
        assert batch.negative_embedding is not None
        guided = guidance.applies(step)
        group = running().group
        with self.ranged("predict_noise", payload=2 if guided else 1):
            if not guided:
                return self._pass("conditional", dit, latent, timestep, batch.embedding)
            if group is None or group.cfg_size == 1:
                conditional = self._pass("conditional", dit, latent, timestep, batch.embedding)
                unconditional = self._pass("unconditional", dit, latent, timestep, batch.negative_embedding)
                return guidance.combine(conditional, unconditional)
            if group.cfg_rank % 2 == 0:
                mine = self._pass("conditional", dit, latent, timestep, batch.embedding)
            else:
                mine = self._pass("unconditional", dit, latent, timestep, batch.negative_embedding)
            passes = group.gather_cfg(mine)
            return guidance.combine(passes[0], passes[1])

    def _pass(self, name: str, dit: nn.Module, latent: Tensor, timestep: Tensor, text: Embedding) -> Tensor:
        with self.ranged(f"predict_noise.{name}"):
            if self.dtype is None:
                found: Tensor = dit(latent, timestep, *text)
                return found
            low = dit(latent.to(self.dtype), timestep, text[0].to(self.dtype), text[1].to(self.dtype))
            return low.to(latent.dtype)  # type: ignore[no-any-return]


def _lacks(batch: Batch, name: str) -> bool:
    return getattr(batch, name, None) is None
