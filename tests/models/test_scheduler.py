from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxnvtx.errors import ConfigError
from fxnvtx.models import FlowMatchEulerScheduler

shifts = st.floats(0.1, 20)
starts = st.floats(0.01, 1)


@given(shifts, st.integers(1, 60), starts)
def test_noise_levels_fall_from_the_start_to_zero(shift: float, steps: int, start: float) -> None:
    scheduler = FlowMatchEulerScheduler(shift)
    timesteps = scheduler.set_timesteps(steps, start=start)
    sigmas = scheduler.sigmas
    assert (sigmas[0], sigmas[-1], len(sigmas)) == (start, 0.0, steps + 1)
    assert all(a > b for a, b in itertools.pairwise(sigmas))
    assert timesteps.dtype == torch.float32
    assert timesteps.tolist() == pytest.approx([s * 1000 for s in sigmas[:-1]])


def test_shift_moves_steps_to_high_noise_as_published() -> None:
    scheduler = FlowMatchEulerScheduler(3.0)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas == pytest.approx((1, 9 / 10, 3 / 4, 1 / 2, 0))  # 3 s / (1 + 2 s)
    plain = FlowMatchEulerScheduler(1.0)
    plain.set_timesteps(4)
    assert plain.sigmas == pytest.approx((1, 0.75, 0.5, 0.25, 0))


@given(shifts, st.integers(1, 20), starts)
def test_the_true_velocity_leads_back_to_the_data(shift: float, steps: int, start: float) -> None:
    generator = torch.Generator().manual_seed(steps)
    data, noise = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    scheduler = FlowMatchEulerScheduler(shift)
    scheduler.set_timesteps(steps, start=start)
    sample = scheduler.add_noise(data, noise)
    for index in range(steps):
        assert torch.allclose(sample, scheduler.add_noise(data, noise, index))
        sample = scheduler.step(noise - data, index, sample)
    assert torch.allclose(sample, data)


def test_copies_and_interleaved_runs_agree() -> None:
    scheduler = FlowMatchEulerScheduler()
    scheduler.set_timesteps(5)
    other = copy.deepcopy(scheduler)
    sample, velocity = torch.randn(2, 4)
    first = scheduler.step(velocity, 1, sample)
    scheduler.step(velocity, 4, sample)
    assert torch.equal(scheduler.step(velocity, 1, sample), first)
    assert torch.equal(other.step(velocity, 1, sample), first)


def test_wrong_use_is_refused() -> None:
    scheduler = FlowMatchEulerScheduler()
    with pytest.raises(ConfigError, match="call set_timesteps"):
        scheduler.step(torch.zeros(1), 0, torch.zeros(1))
    for steps, start in ((0, 1.0), (-1, 1.0), (2.5, 1.0), (2, 0.0), (2, 1.5), (2, float("nan"))):
        with pytest.raises(ConfigError):
            scheduler.set_timesteps(steps, start=start)  # type: ignore[arg-type]
    scheduler.set_timesteps(2)
    with pytest.raises(ConfigError, match="no step 2 of 2"):
        scheduler.step(torch.zeros(1), 2, torch.zeros(1))
    for shift in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError):
            FlowMatchEulerScheduler(shift)
