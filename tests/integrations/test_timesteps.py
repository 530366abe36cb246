"""Timesteps in the labels of steps: right, and without making the CPU wait for a device."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install fxnvtx[diffusers]")

import diffusers
from diffusers import schedulers

from fxnvtx.integrations import diffusers as fx
from fxnvtx.integrations.diffusers.thread_state import computed

from .asking import labels, only, recorded


def all_schedulers() -> list[Any]:
    found = [getattr(schedulers, name, None) for name in dir(schedulers) if name.endswith("Scheduler")]
    return [f for f in found if isinstance(f, type) and not name_of_dummy(f)]


def name_of_dummy(kind: type) -> bool:
    return "dummy" in kind.__module__


def made(kind: Any) -> Any:
    """One with default settings, its timesteps set to four; None where it does not work that way."""
    try:
        scheduler = kind()
        if "device" not in inspect.signature(kind.set_timesteps).parameters:
            return None
        scheduler.set_timesteps(4, device="cpu")
        return scheduler if len(scheduler.timesteps) else None
    except Exception:
        return None


def same_state(a: Any, b: Any) -> bool:
    """Of two schedulers' dicts, as deep as lists and dicts go."""
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)
    if hasattr(a, "__dict__") and not isinstance(a, type) and not callable(a):
        return type(a) is type(b) and same_state(vars(a), vars(b))
    return bool(a == b) or callable(a)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_computing_them_once_more_changes_no_scheduler() -> None:
    """All schedulers that diffusers has: the same numbers, the scheduler and the random state as they were."""
    tried = 0
    for kind in all_schedulers():
        scheduler = made(kind)
        if scheduler is None:
            continue
        tried += 1
        before, random = copy.deepcopy(vars(scheduler)), torch.get_rng_state()
        numbers = computed(scheduler, kind.set_timesteps, (4,), {"device": "meta"})
        assert numbers == [float(t) for t in scheduler.timesteps], kind
        assert same_state(before, vars(scheduler)), kind
        assert torch.equal(random, torch.get_rng_state()), kind
    assert tried > 25


class OnDevice(diffusers.DiffusionPipeline):
    """Its timesteps lie where the CPU cannot read them: on the meta device, where reading raises."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, steps: int, skip: int = 0, shuffle: bool = False) -> None:
        self.scheduler.set_timesteps(steps, device="meta")
        timesteps = self.scheduler.timesteps[skip:]
        if shuffle:
            timesteps = timesteps.flip(0)
        with self.progress_bar(total=len(timesteps)) as bar:
            for _ in timesteps:
                bar.update()


def steps_of(**options: Any) -> list[str]:
    pipe = OnDevice(diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    fx.instrument(pipe)
    return labels(only(recorded(lambda: pipe(4, **options)), "denoising_loop").children)


def test_timesteps_on_a_device() -> None:
    assert steps_of() == [f"denoising_step_{i}_t{t}" for i, t in enumerate([750, 500, 250, 0])]


def test_a_slice_of_them() -> None:
    """What image-to-image pipelines go through."""
    assert steps_of(skip=2) == ["denoising_step_0_t250", "denoising_step_1_t0"]


def test_what_cannot_be_known_is_not_guessed() -> None:
    assert steps_of(shuffle=True) == [f"denoising_step_{i}" for i in range(4)]
