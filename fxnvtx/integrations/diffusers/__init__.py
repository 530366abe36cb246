"""Diffusers pipelines: request > stage or loop > step > component > layers, as ranges.

    pipe = fxnvtx.integrations.diffusers.instrument(FluxPipeline.from_pretrained(...))

Nothing here imports diffusers, and nothing of it is changed but a few methods of the classes involved, for as long as a
pipeline is instrumented; pipelines, components and schedulers keep class, attributes and state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from ...compile.torch_private import hide_module
from ...control import controls_of
from ...errors import InstrumentError
from ...names import DEFAULT_EXCLUDE, Pattern
from . import attach
from .registry import Options, Pipe, is_pipeline, named_modules

__all__ = ["instrument", "set_enabled", "uninstrument", "unwatch", "watch"]

P = TypeVar("P")


def instrument(
    pipe: P,
    *,
    depth: int | None = None,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = DEFAULT_EXCLUDE,
    path: str = "auto",
    shapes: bool = False,
    layers: bool = True,
) -> P:
    """Give a DiffusionPipeline or ModularPipeline its ranges; returns the pipeline itself.

    - `request#N` around each call, N counting the requests that somebody listened to;
    - stages: `encode_prompt`, `prepare_latents` and the like, `vae.decode`; every block of a ModularPipeline;
    - `denoising_loop` > `denoising_step_<i>_t<timestep>` (without `_t` where the CPU does not know it as the step
      begins) > `predict_noise.conditional`, `predict_noise.unconditional` where diffusers names the pass, else
      `predict_noise` and `predict_noise.pass_<n>` > the component and its layers; `scheduler_step`;
    - `vae_tile_y<i>_x<j>` (offset in points) around the parts of a VAE that decodes or encodes in tiles;
    - `residency.load <component>`, `residency.offload <component>`, payload bytes, for weights that offloading moves.

    depth, include, exclude, path, shapes: as in `fxnvtx.instrument`, for every component; globs may begin with the
    component's name. layers=False leaves the components' own ranges and their layers out.
    Components that are replaced are taken in when the next request begins. Calling it again is a no-op or an update.

    Errors: InstrumentError (no pipeline), SelectionError, TraceError.
    """
    if not is_pipeline(pipe):
        raise InstrumentError(
            f"instrument takes a diffusers pipeline, not {type(pipe).__name__}; "
            "for a model use fxnvtx.instrument(model)"
        )
    options = Options(depth, _frozen(include), _frozen(exclude), path, bool(shapes), bool(layers))
    attach.attach(pipe, options, type(pipe).__name__)
    return pipe


def _frozen(patterns: Any) -> Any:
    return patterns if patterns is None or isinstance(patterns, (str, type)) else tuple(patterns)


def uninstrument(pipe: P) -> P:
    """Take everything out again; returns the pipeline. One that is not instrumented is left as it is."""
    if not is_pipeline(pipe):
        raise InstrumentError(f"uninstrument takes a diffusers pipeline, not {type(pipe).__name__}")
    attach.detach(pipe)
    return pipe


def set_enabled(pipe: Any, enabled: bool) -> None:
    """Switch all ranges of an instrumented pipeline. Takes effect at its next request."""
    record = attach.pipe_of(pipe)
    if record is None:
        raise InstrumentError(f"this {type(pipe).__name__} is not instrumented: call instrument(pipe) first")
    _switch(record, bool(enabled))


def _switch(record: Pipe, enabled: bool) -> None:
    record.enabled = enabled
    pipe = record.ref()
    for _, component in named_modules(pipe) if pipe is not None else ():
        control = controls_of(component)
        if control is not None:
            control.set_enabled(enabled)
    for nested in record.nested:
        found = attach.pipe_of(nested())
        if found is not None:
            _switch(found, enabled)


def watch(*, depth: int | None = None, path: str = "auto", layers: bool = True) -> None:
    """Instrument every pipeline that is built or loaded from now on. Works before diffusers is imported, and does not
    import it."""
    attach.watch(Options(depth=depth, path=path, layers=layers))


def unwatch() -> None:
    """Stop watching; pipelines that are instrumented by now stay so."""
    attach.unwatch()


hide_module(globals(), nested=True)
