"""Whatever a pipeline, a component, a scheduler or a callback raises: every range is closed by its own pop."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install fxnvtx[diffusers]")

import diffusers

from fxnvtx import record
from fxnvtx.integrations import diffusers as fx
from fxnvtx.integrations.diffusers.thread_state import state
from fxnvtx.ranges import local

from .asking import build, labels, only, recorded


class Stop(BaseException):
    pass


def at_rest() -> bool:
    return (
        not local.stack and state.request is None and state.passes is None and not state.named_pass and not state.inside
    )


@pytest.mark.parametrize("kind", [RuntimeError, Stop, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["transformer", "layer", "scheduler", "vae", "encode_prompt", "set_timesteps"])
def test_an_exception(monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], where: str) -> None:
    pipe, ask = build("FluxPipeline")

    target, name = {
        "transformer": (pipe.transformer, "forward"),
        "layer": (pipe.transformer.transformer_blocks[0].attn.to_q, "forward"),
        "scheduler": (type(pipe.scheduler), "step"),
        "set_timesteps": (type(pipe.scheduler), "set_timesteps"),
        "vae": (pipe.vae.decoder.conv_out, "forward"),
        "encode_prompt": (type(pipe), "encode_prompt"),
    }[where]

    @functools.wraps(getattr(target, name))  # pipelines read signatures
    def fail(*args: Any, **kwargs: Any) -> None:
        raise kind("here")

    monkeypatch.setattr(target, name, fail)
    fx.instrument(pipe)
    with record() as recording, pytest.raises(kind, match="here"):
        ask()
    assert recording.balanced
    assert at_rest()
    assert labels(recording.tree()) == ["request#1"]
    monkeypatch.undo()
    fx.uninstrument(pipe)


def test_an_exception_in_a_callback() -> None:
    pipe, ask = build("FluxPipeline")
    fx.instrument(pipe)

    def fail(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        raise Stop

    with record() as recording, pytest.raises(Stop):
        ask(callback_on_step_end=fail)
    assert recording.balanced
    assert at_rest()
    assert len(only(recording, "denoising_loop").children) == 1
    assert only(recording, "scheduler_step")
    recording = recorded(ask)  # and the next request is whole
    assert len(only(recording, "denoising_loop").children) == 2


class Looping(diffusers.DiffusionPipeline):
    """A pipeline in the older style: `for t in self.progress_bar(...)`, and two passes that nobody names."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: torch.nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, steps: int, style: str = "for", stop_at: int | None = None) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        sample = torch.ones(1, 3)
        if style == "for":
            for index, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
                if index == stop_at:
                    break
                sample = self.step(sample, t)
        elif style == "held":
            items = iter(self.progress_bar(self.scheduler.timesteps))  # outlives an exception, with this frame
            for t in items:
                sample = self.step(sample, t)
        elif style == "with-for":
            with self.progress_bar(self.scheduler.timesteps) as bar:
                for t in bar:
                    sample = self.step(sample, t)
        else:
            with self.progress_bar(total=steps) as bar:
                for t in self.scheduler.timesteps:
                    sample = self.step(sample, t)
                    bar.update()
        return sample

    def step(self, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        wanted, unwanted = self.unet(sample), self.unet(-sample)
        return self.scheduler.step(wanted - unwanted, t, sample).prev_sample


def looping() -> Looping:
    torch.manual_seed(0)
    made = Looping(torch.nn.Linear(3, 3), diffusers.DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("style", ["for", "held", "with-for", "update"])
def test_styles_of_progress_bars(style: str, shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = looping()
    pipe.set_progress_bar_config(disable=not shown)
    with torch.no_grad():
        plain = pipe(3, style)
        fx.instrument(pipe)
        with record() as recording:
            watched = pipe(3, style)
    assert torch.equal(plain, watched)
    assert recording.balanced
    assert at_rest()
    loop = only(recording, "denoising_loop")
    times = ["_t667", "_t334", "_t1"]
    if style == "update":  # nothing tells which timesteps this loop goes through before it is over
        times = ["", "", ""]
    given = [int(t) for t in pipe.scheduler.timesteps]
    assert labels(loop.children) == [f"denoising_step_{i}" + (f"_t{given[i]}" if times[i] else "") for i in range(3)]
    for step in loop.children:
        assert labels(step.children) == ["predict_noise", "predict_noise.pass_1", "scheduler_step"]
        assert [labels(child.children) for child in step.children[:2]] == [["unet"], ["unet"]]
    if shown:
        assert "3/3" in capsys.readouterr().err


def test_a_loop_left_early() -> None:
    pipe = looping()
    fx.instrument(pipe)
    with torch.no_grad():
        recording = recorded(lambda: pipe(3, "for", stop_at=1))
    assert recording.balanced
    assert at_rest()
    loop = only(recording, "denoising_loop")
    assert len(loop.children) == 2  # the second began; the pipeline left it


@pytest.mark.parametrize("style", ["for", "held", "with-for", "update"])
def test_an_exception_in_each_style(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = looping()
    fx.instrument(pipe)
    calls = iter([False, False, False, True])
    plain = pipe.unet.forward

    def sometimes(sample: torch.Tensor) -> torch.Tensor:
        if next(calls):
            raise Stop
        return plain(sample)

    monkeypatch.setattr(pipe.unet, "forward", sometimes)
    with record() as recording:
        with torch.no_grad(), pytest.raises(Stop) as caught:  # it holds the frames, and a generator in mid-flight
            pipe(3, style)
        assert recording.balanced
        assert at_rest()
        assert caught.tb is not None
    assert len(only(recording, "denoising_loop").children) == 2


def test_a_bar_of_another_kind_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = looping()

    def bar(iterable: Any = None, total: int | None = None) -> Iterator[Any]:
        yield from iterable

    monkeypatch.setattr(pipe, "progress_bar", bar, raising=False)
    fx.instrument(pipe)
    with torch.no_grad():
        recording = recorded(lambda: pipe(3, "for"))
    assert [n.label for n in recording.tree()[0].children if n.category == "module"] == ["unet"] * 6
    fx.uninstrument(pipe)


def test_nothing_of_the_pipelines_frame_is_kept_alive() -> None:
    """The timesteps are read from the pipeline's own variables; its tensors must still go when it lets go of them."""
    noise: list[Any] = []

    class Holding(Looping):
        def __call__(self) -> None:  # type: ignore[override]
            self.scheduler.set_timesteps(2)
            timesteps = self.scheduler.timesteps
            sample = torch.ones(1, 3)
            noise.append(weakref.ref(sample))
            with self.progress_bar(total=2) as bar:
                for t in timesteps:
                    sample = self.step(sample, t)
                    noise.append(noise[0]() is None)
                    bar.update()

    pipe = Holding(torch.nn.Linear(3, 3), diffusers.DDIMScheduler())
    fx.instrument(pipe)
    with torch.no_grad():
        recording = recorded(pipe)
    assert labels(only(recording, "denoising_loop").children) == ["denoising_step_0_t500", "denoising_step_1_t0"]
    assert noise[1:] == [True, True]


def test_uninstrument_in_the_middle_of_a_request() -> None:
    pipe, ask = build("FluxPipeline")
    plain = ask()
    fx.instrument(pipe)

    def away(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        fx.uninstrument(pipe)
        return tensors

    with record() as recording:
        made = ask(callback_on_step_end=away)
    assert all(torch.equal(a, b) for a, b in zip(plain, made, strict=True))
    assert recording.balanced
    assert at_rest()
