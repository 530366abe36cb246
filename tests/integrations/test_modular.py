"""A ModularPipeline: every block is a stage, a loop of blocks has steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install fxnvtx[diffusers]")
pytest.importorskip("diffusers.modular_pipelines", reason="this diffusers has no modular pipelines")

import diffusers
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)

from fxnvtx import record
from fxnvtx.integrations import diffusers as fx

from .asking import build, labels, recorded


class Prepare(ModularPipelineBlocks):
    model_name = "made-up"

    @property
    def inputs(self) -> list[Any]:
        return [InputParam("steps", default=2)]

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [OutputParam("latents"), OutputParam("timesteps"), OutputParam("num_inference_steps")]

    def __call__(self, components: Any, state: Any) -> Any:
        block_state = self.get_block_state(state)
        components.scheduler.set_timesteps(block_state.steps)
        block_state.timesteps = components.scheduler.timesteps
        block_state.num_inference_steps = block_state.steps
        block_state.latents = torch.ones(1, 3)
        self.set_block_state(state, block_state)
        return components, state


class Predict(ModularPipelineBlocks):
    model_name = "made-up"

    @property
    def expected_components(self) -> list[Any]:
        return [ComponentSpec("unet", torch.nn.Linear)]

    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> Any:
        block_state.noise = components.unet(block_state.latents)
        return components, block_state


class Step(ModularPipelineBlocks):
    model_name = "made-up"

    @property
    def expected_components(self) -> list[Any]:
        return [ComponentSpec("scheduler", diffusers.DDIMScheduler)]

    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> Any:
        block_state.latents = components.scheduler.step(block_state.noise, t, block_state.latents).prev_sample
        return components, block_state


class Denoise(LoopSequentialPipelineBlocks):
    model_name = "made-up"
    block_classes = [Predict, Step]
    block_names = ["predict", "step"]

    @property
    def loop_inputs(self) -> list[Any]:
        return [InputParam("timesteps"), InputParam("num_inference_steps"), InputParam("latents")]

    def __call__(self, components: Any, state: Any) -> Any:
        block_state = self.get_block_state(state)
        with self.progress_bar(total=block_state.num_inference_steps) as bar:
            for i, t in enumerate(block_state.timesteps):
                components, block_state = self.loop_step(components, block_state, i=i, t=t)
                bar.update()
        self.set_block_state(state, block_state)
        return components, state

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [OutputParam("latents")]


class Whole(SequentialPipelineBlocks):
    model_name = "made-up"
    block_classes = [Prepare, Denoise]
    block_names = ["prepare", "denoise"]


def made() -> Any:
    pipe = Whole().init_pipeline()
    torch.manual_seed(0)
    pipe.update_components(unet=torch.nn.Linear(3, 3), scheduler=diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_blocks_are_stages() -> None:
    pipe = made()
    plain = pipe(steps=2, output="latents")
    fx.instrument(pipe)
    with record() as recording:
        watched = pipe(steps=2, output="latents")
    assert torch.equal(plain, watched)
    assert recording.balanced
    (root,) = recording.tree()
    assert (root.label, root.payload) == ("request#1", type(pipe).__name__)
    assert labels(root.children) == ["prepare", "denoise"]
    assert {c.category for c in root.children} == {"stage"}
    (loop,) = root.children[1].children
    assert loop.label == "denoising_loop"
    assert labels(loop.children) == ["denoising_step_0_t500", "denoising_step_1_t0"]
    for step in loop.children:
        assert labels(step.children) == ["predict", "step"]
        assert labels(step.children[0].children) == ["predict_noise"]
        assert labels(step.children[0].children[0].children) == ["unet"]
        assert labels(step.children[1].children) == ["scheduler_step"]


def test_it_leaves_no_trace() -> None:
    pipe = made()
    kinds = [type(pipe), Whole, Denoise, Predict, SequentialPipelineBlocks, LoopSequentialPipelineBlocks]
    before = [dict(vars(k)) for k in kinds]
    fx.instrument(pipe)
    assert [dict(vars(k)) for k in kinds] != before
    fx.uninstrument(pipe)
    assert [dict(vars(k)) for k in kinds] == before
    assert recorded(lambda: pipe(steps=2)).ranges == []


def test_a_block_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    pipe = made()
    fx.instrument(pipe)
    monkeypatch.setattr(pipe.unet, "forward", fail)
    with record() as recording, pytest.raises(KeyboardInterrupt):
        pipe(steps=2)
    assert recording.balanced


def test_a_pipeline_inside_a_pipeline() -> None:
    """What upsamplers and priors are: components of their own, stages of the outer request."""
    inner, _ = build("DiTPipeline")

    class Outer(diffusers.DiffusionPipeline):  # type: ignore[misc]
        def __init__(self, prior_pipe: Any) -> None:
            super().__init__()
            self.prior_pipe = prior_pipe

        def __call__(self) -> None:
            self.prior_pipe(class_labels=[1], num_inference_steps=1)

    outer = Outer(inner)
    fx.instrument(outer)
    (root,) = recorded(outer).tree()
    assert labels([root, *root.children]) == ["request#1", "prior_pipe"]
    assert root.children[0].category == "stage"
    assert "denoising_loop" in labels(root.children[0].children)
    fx.uninstrument(outer)
    assert recorded(outer).ranges == []
