"""Euler steps along the straight paths of flow matching: a sample at noise level s is (1 - s) * data + s * noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError

TRAIN_TIMESTEPS = 1000


class FlowMatchEulerScheduler:
    """Noise levels from 1 (noise) to 0 (data), and the step between two of them.

    `shift` > 1 spends more of the steps at high noise, as larger images need (arXiv 2403.03206, equation 23). A step is
    told its index, so nothing is kept from one step to the next: copies of the scheduler agree with it.
    """

    def __init__(self, shift: float = 3.0) -> None:
        if not (math.isfinite(shift) and shift > 0):
            raise ConfigError(f"shift must be a positive number, not {shift!r}")
        self.shift = shift
        self.sigmas: tuple[float, ...] = ()
        self.timesteps = torch.empty(0)

    def set_timesteps(self, steps: int, *, start: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
        """Lay `steps` steps from noise level `start` (1 for pure noise; less to refine a sample) down to 0.

        Sets `sigmas` (steps + 1 numbers, the last is 0) and returns `timesteps` (float32 [steps], 1000 * sigma).
        """
        if not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"steps must be a whole number, at least 1, not {steps!r}")
        if not 0 < start <= 1:
            raise ConfigError(f"start must be a noise level above 0 and at most 1, not {start!r}")
        first = start / (self.shift - (self.shift - 1) * start)  # what the shift below turns into `start`
        even = [first * (1 - index / steps) for index in range(steps + 1)]
        shifted = [self.shift * s / (1 + (self.shift - 1) * s) for s in even]
        self.sigmas = (start, *shifted[1:])
        self.timesteps = torch.tensor(self.sigmas[:-1], dtype=torch.float32, device=device) * TRAIN_TIMESTEPS
        return self.timesteps

    def _sigma(self, index: int) -> float:
        if not 0 <= index < len(self.timesteps):
            raise ConfigError(f"there is no step {index} of {len(self.timesteps)}: call set_timesteps first")
        return self.sigmas[index]

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """From the sample at noise level `sigmas[index]` and its velocity (noise - data) to `sigmas[index + 1]`."""
        sigma = self._sigma(index)
        return sample + velocity * (self.sigmas[index + 1] - sigma)

    def add_noise(self, sample: Tensor, noise: Tensor, index: int = 0) -> Tensor:
        """`sample` at the noise level of step `index`."""
        sigma = self._sigma(index)
        return sample * (1 - sigma) + noise * sigma
