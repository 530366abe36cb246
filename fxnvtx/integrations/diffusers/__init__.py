"""Diffusers pipelines: request > stage or loop > step > component > layers, as ranges.

    pipe = fxnvtx.integrations.diffusers.instrument(FluxPipeline.from_pretrained(...))

Nothing here imports diffusers, and nothing of it is changed but a few methods of the classes involved, for as long as a
pipeline is instrumented; pipelines, components and schedulers keep class, attributes and state.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch import nn

from ...compile import no_longer_when_imported, when_imported
from ...compile.torch_private import hide_module
from ...errors import InstrumentError, SelectionError, warn_once
from ...modules import instrument as instrument_model
from ...modules import uninstrument as uninstrument_model
from ...modules.registry import controls_of, sync
from ...modules.selection import DEFAULT_EXCLUDE, Pattern, walk_paths
from . import registry, wrappers
from .registry import Bound, Held, Options, Pipe, Wrap, bind, definer, instance_override, lock, methods, pipes, unbind
from .thread_state import find, state
from .wrappers import hold_residency, release_residency

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
    if not registry.is_pipeline(pipe):
        raise InstrumentError(
            f"instrument takes a diffusers pipeline, not {type(pipe).__name__}; "
            "for a model use fxnvtx.instrument(model)"
        )
    options = Options(depth, _frozen(include), _frozen(exclude), path, bool(shapes), bool(layers))
    attach(pipe, options, type(pipe).__name__)
    return pipe


def _frozen(patterns: Any) -> Any:
    return patterns if patterns is None or isinstance(patterns, (str, type)) else tuple(patterns)


def uninstrument(pipe: P) -> P:
    """Take everything out again; returns the pipeline. One that is not instrumented is left as it is."""
    if not registry.is_pipeline(pipe):
        raise InstrumentError(f"uninstrument takes a diffusers pipeline, not {type(pipe).__name__}")
    detach(pipe)
    return pipe


def set_enabled(pipe: Any, enabled: bool) -> None:
    """Switch all ranges of an instrumented pipeline. Takes effect at its next request."""
    record = pipe_of(pipe)
    if record is None:
        raise InstrumentError(f"this {type(pipe).__name__} is not instrumented: call instrument(pipe) first")
    _switch(record, bool(enabled))


def _switch(record: Pipe, enabled: bool) -> None:
    record.enabled = enabled
    pipe = record.ref()
    for _, component in registry.named_modules(pipe) if pipe is not None else ():
        control = controls_of(component)
        if control is not None:
            control.set_enabled(enabled)
    for nested in record.nested:
        found = pipe_of(nested())
        if found is not None:
            _switch(found, enabled)


# ------------------------------------------------------------------------------------- what the pipeline is made of now


def pipe_of(thing: Any) -> Pipe | None:
    """The record of an instrumented pipeline."""
    bound = find(thing)
    return bound.pipe if bound is not None and bound.role == "pipeline" else None


def attach(pipe: Any, options: Options, name: str, outer: Pipe | None = None) -> Pipe:
    """Instrument a pipeline, or bring one up to date. Raises what `fxnvtx.instrument` raises for its components."""
    with lock:
        record = pipe_of(pipe)
        if record is None:
            record = Pipe(weakref.ref(pipe), options, name, outer)
            own = bind(pipe, name, record, "pipeline")
            record.finalizer = weakref.finalize(pipe, _release, record)
            record.finalizer.atexit = False
            try:
                _check(options, pipe)
                _hold_pipeline(pipe, own)
                _scan(pipe, record, force=True)
            except BaseException:
                detach(pipe)
                raise
        else:
            _check(options, pipe)
            changed, record.options = record.options != options, options
            _hold_pipeline(pipe, record.parts[id(pipe)])
            _scan(pipe, record, force=changed)
        hold_residency()
        return record


def refresh(record: Pipe) -> None:
    """At the beginning of a request: take in what was replaced. Never raises: the request has to run."""
    pipe = record.ref()
    if pipe is None:
        return
    try:
        with lock:
            hold_residency()
            _hold_pipeline(pipe, record.parts[id(pipe)])
            _scan(pipe, record, force=False)
    except Exception as error:  # whatever somebody's component does when it is read
        warn_once(f"diffusers {record.name}", f"{record.name}: not brought up to date: {error}")


def detach(pipe: Any) -> None:
    """Take everything out again."""
    with lock:
        record = pipe_of(pipe)
        if record is None:
            return
        if record.finalizer is not None:
            record.finalizer.detach()
        _release(record)


def _release(record: Pipe) -> None:
    with lock:
        for nested in record.nested:
            detach(nested())
        record.nested = []
        for key, bound in list(record.parts.items()):
            _drop(key, bound)
        if not pipes():
            release_residency()


def _drop(key: int, bound: Bound) -> None:
    last = unbind(key, bound)
    part = bound.ref()
    if part is not None and last and bound.layers:
        uninstrument_model(part)


def _check(options: Options, pipe: Any) -> None:
    named = list(registry.named_modules(pipe))
    for what, patterns in (("include", options.include), ("exclude", options.exclude)):
        for glob in registry.unmatched(patterns, named):
            names = ", ".join(name for name, _ in named)
            raise SelectionError(f"{what}={glob!r} matches no module of any component ({names})")


# ------------------------------------------------------------------------------------------------ the parts


def _scan(pipe: Any, record: Pipe, force: bool) -> None:
    wanted: dict[int, tuple[str, str, Any]] = {
        id(part): (role, name, part) for role, name, part in registry.parts_of(pipe)
    }
    for name, block in registry.blocks_of(pipe):
        wanted.setdefault(id(block), ("block", name, block))
    wanted[id(pipe)] = ("pipeline", record.name, pipe)
    for nested in [n for n in record.nested if (part := n()) is None or id(part) not in wanted]:
        record.nested.remove(nested)
        detach(nested())
    for key, bound in list(record.parts.items()):
        now = wanted.get(key)
        if now is None or bound.ref() is not now[2] or bound.name != now[1]:
            _drop(key, bound)
    for key, (role, name, part) in wanted.items():
        if part is pipe:
            continue
        if role == "pipeline":
            if pipe_of(part) is None:
                attach(part, record.options, name, record)
                record.nested.append(weakref.ref(part))
            continue
        known = record.parts.get(key)
        bound = known or bind(part, name, record, role)
        _hold_part(part, bound)
        if role == "module":
            _layers(part, bound, record.options, anew=known is None or force)


def _layers(component: nn.Module, bound: Bound, options: Options, anew: bool) -> None:
    """The component's own range and those of its layers, or none of them."""
    altered = anew or _altered(component, bound)
    if options.layers and altered:
        _instrument(component, bound, options)
    elif options.layers:
        _set_arounds(component, bound)  # the user may have instrumented it anew
    elif altered:
        bound.paths = _paths(component)
        if bound.layers:
            bound.layers = False
            uninstrument_model(component)


def _instrument(component: nn.Module, bound: Bound, options: Options) -> None:
    instrument_model(
        component,
        bound.name,
        path=options.path,
        depth=options.depth,
        include=registry.applicable(options.include, bound.name, component),
        exclude=registry.applicable(options.exclude, bound.name, component),
        shapes=options.shapes,
    )
    bound.layers = True
    bound.paths = _paths(component)
    _set_arounds(component, bound)


def _set_arounds(component: nn.Module, bound: Bound) -> None:
    control = controls_of(component)
    if control is not None and not control.arounds:
        control.arounds = _arounds(component, bound)
        if not bound.pipe.shown:
            control.set_enabled(False)
        if control.arounds:
            sync(control.modules())


def _arounds(component: nn.Module, bound: Bound) -> dict[str, Any]:
    """What the component's slots ask for: the pass of a denoiser, the tile of a VAE's parts."""
    found: dict[str, Any] = {}
    if registry.is_denoiser(bound.name):
        found[""] = _pass_around(bound.name)
    if any(callable(getattr(component, name, None)) for name in registry.TILED_METHODS):
        found.update((name, _tile_around(name)) for name, child in component.named_children() if child is not None)
    return found


def _pass_around(name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, object] | None]:
    def around(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, object] | None:
        passes = state.passes
        if passes is None or state.named_pass:
            return None
        number = passes[name] = passes.get(name, -1) + 1
        return wrappers.pass_label(number), number

    return around


def _tile_around(part: str) -> Any:
    """What to show around a call of `part`, a direct child of a VAE."""

    def around(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, object] | None:
        tiling = state.tiling
        return None if tiling is None else (tiling.label(part, args), None)

    return around


def _paths(component: nn.Module) -> dict[int, tuple[weakref.ref[Any], str]]:
    found: dict[int, tuple[weakref.ref[Any], str]] = {}
    for path, module, _ in walk_paths(component):
        found.setdefault(id(module), (weakref.ref(module), ".".join(path)))
    return found


def _altered(component: nn.Module, bound: Bound) -> bool:
    """Whether modules were replaced since (a LoRA was loaded or fused)."""
    now = {id(module): module for _, module, _ in walk_paths(component)}
    return now.keys() != bound.paths.keys() or any(bound.paths[key][0]() is not m for key, m in now.items())


# ------------------------------------------------------------------------------------------------ their methods


def _hold_pipeline(pipe: Any, own: Bound) -> None:
    _hold(pipe, own, "__call__", wrappers.request(refresh))
    _hold(pipe, own, "progress_bar", wrappers.bar_method)
    for name in registry.stages_of(pipe):
        _hold(pipe, own, name, wrappers.stage(name))


def _hold_part(part: Any, bound: Bound) -> None:
    for name, wrap in _methods(part, bound):
        _hold(part, bound, name, wrap)


def _methods(part: Any, bound: Bound) -> Iterator[tuple[str, Wrap]]:
    if bound.role == "scheduler":
        yield "step", wrappers.scheduler_step
        yield "set_timesteps", wrappers.set_timesteps
    elif bound.role == "block":
        yield "__call__", wrappers.stage("__call__")
        yield "progress_bar", wrappers.bar_method
    elif bound.role == "module":
        yield "cache_context", wrappers.cache_context
        for name in registry.ROOT_METHODS:
            yield name, wrappers.root_method(name)
        for name in registry.TILED_METHODS:
            yield name, wrappers.tiled_method(name)


def _hold(thing: Any, bound: Bound, name: str, wrap: Wrap) -> None:
    """Have the method wrapped for this object, where it comes from: its own dict, or the class that defines it."""
    if any(held.name == name and _current(held, thing) for held in bound.held):
        return
    owner = thing if instance_override(thing, name) and name != "__call__" else definer(type(thing), name)
    if owner is None:
        return
    held = methods.hold(owner, name, wrap)
    if held is not None:
        bound.held.append(held)


def _current(held: Any, thing: Any) -> bool:
    """Whether calls of the object still reach this wrapper."""
    if instance_override(thing, held.name):
        return held.owner is thing and vars(thing)[held.name] is held.wrapper
    return held.owner is not thing


# ------------------------------------------------------------------------------------------ as they are built


# The classes whose method every pipeline of diffusers goes through while it is built.
_BUILDERS = {
    "diffusers.pipelines.pipeline_utils": ("DiffusionPipeline", "register_modules"),
    "diffusers.modular_pipelines.modular_pipeline": ("ModularPipeline", "__init__"),
}


class _Watch:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.held: list[Held] = []

    def arm(self, module: types.ModuleType) -> None:
        kind, method = _BUILDERS[module.__name__]
        owner = getattr(module, kind, None)
        if isinstance(owner, type):
            held = methods.hold(owner, method, self.wrap)
            if held is not None:
                self.held.append(held)

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(pipe, *args, **kwargs)
            self.meet(pipe)
            return result

        return call

    def meet(self, pipe: Any) -> None:
        if _now is not self or not registry.is_pipeline(pipe):
            return
        try:
            attach(pipe, self.options, type(pipe).__name__)
        except Exception as error:  # the program must go on
            warn_once(f"watch {type(pipe).__name__}", f"{type(pipe).__name__} is not instrumented: {error}")


_now: _Watch | None = None


def watch(*, depth: int | None = None, path: str = "auto", layers: bool = True) -> None:
    """Instrument every pipeline that is built or loaded from now on. Works before diffusers is imported, and does not
    import it."""
    global _now
    options = Options(depth=depth, path=path, layers=layers)
    if _now is not None:
        _now.options = options
        return
    _now = _Watch(options)
    for module in _BUILDERS:
        when_imported(module, _now.arm)


def unwatch() -> None:
    """Stop watching; pipelines that are instrumented by now stay so."""
    global _now
    if _now is None:
        return
    for module in _BUILDERS:
        no_longer_when_imported(module, _now.arm)
    for held in _now.held:
        methods.release(held)
    _now = None


hide_module(globals(), nested=True)  # some of this runs while a compiled component is being called
