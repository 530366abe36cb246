"""What a pipeline is made of: its components, schedulers, stages and blocks, and which of their methods matter."""

from __future__ import annotations

import fnmatch
import re
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from ...compile.torch_private import hide_module
from ...names import unwrapped, walk_paths

__all__ = [
    "ROOT_METHODS",
    "TILED_METHODS",
    "applicable",
    "blocks_of",
    "is_denoiser",
    "is_pipeline",
    "named_modules",
    "parts_of",
    "stages_of",
    "unmatched",
]


# Methods by which pipelines reach a component without calling it, so that its own range never opens.
ROOT_METHODS = ("encode", "decode", "generate", "get_text_features", "get_image_features", "predict_num_frames")
TILED_METHODS = tuple(f"{prefix}tiled_{what}" for prefix in ("", "_", "_temporal_") for what in ("encode", "decode"))
_STAGE = re.compile(r"(encode|enhance|prepare|decode)_\w+$|run_safety_checker$|upsample_latents$")
_NO_STAGE = {"prepare_extra_step_kwargs"}
_DENOISER = re.compile(r"(transformer|unet|denoiser|prior|dit)(_\w+)?$")


def is_denoiser(name: str) -> bool:
    """Whether a component of this name predicts the noise."""
    return _DENOISER.match(name) is not None


def is_pipeline(thing: Any) -> bool:
    """A DiffusionPipeline or ModularPipeline, told without importing diffusers."""
    return any(
        base.__name__ in ("DiffusionPipeline", "ModularPipeline") and base.__module__.startswith("diffusers.")
        for base in type(thing).__mro__
    )


def is_scheduler(thing: Any) -> bool:
    return callable(getattr(type(thing), "step", None)) and callable(getattr(type(thing), "set_timesteps", None))


def parts_of(pipe: Any) -> Iterator[tuple[str, str, Any]]:
    """(role, name, object) of every component of a pipeline, each object once, under its first name."""
    seen: set[int] = set()
    for name, part in list(vars(pipe).items()):
        part = unwrapped(part)
        if name.startswith("_") or part is None or id(part) in seen:
            continue
        if isinstance(part, nn.Module):
            role = "module"
        elif is_pipeline(part):
            role = "pipeline"
        elif is_scheduler(part):
            role = "scheduler"
        else:
            continue
        seen.add(id(part))
        yield role, name, part


def stages_of(pipe: Any) -> list[str]:
    """Names of the pipeline's methods that are stages."""
    found = []
    for base in type(pipe).__mro__:
        for name, member in vars(base).items():
            if isinstance(member, types.FunctionType) and _STAGE.match(name) and name not in _NO_STAGE:
                found.append(name)
    return sorted(set(found))


def blocks_of(pipe: Any) -> Iterator[tuple[str, Any]]:
    """(name, block) of everything that a ModularPipeline runs, outermost first; nothing for other pipelines."""
    todo = [("", getattr(pipe, "_blocks", None))]
    seen: set[int] = set()
    while todo:
        name, block = todo.pop(0)
        if block is None or id(block) in seen:
            continue
        seen.add(id(block))
        if name:
            yield name, block
        children = getattr(block, "sub_blocks", None)
        if isinstance(children, dict):
            todo.extend((str(key), child) for key, child in children.items())


def named_modules(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the components that are models."""
    return ((name, part) for role, name, part in parts_of(pipe) if role == "module")


def applicable(patterns: Any, name: str, component: nn.Module) -> Any:
    """`include` or `exclude` for one component: types, and the globs that match in it. A glob is an FQN below the
    component, with or without the component's name in front."""
    if patterns is None or isinstance(patterns, type):
        return patterns
    fqns = [".".join(path) for path, _, _ in walk_paths(component)]
    found = []
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns):
        if not isinstance(pattern, str):
            found.append(pattern)
            continue
        for glob in (pattern, pattern.removeprefix(f"{name}.")):
            if any(fnmatch.fnmatchcase(fqn, glob) for fqn in fqns):
                found.append(glob)
                break
    return found


def unmatched(patterns: Any, named: list[tuple[str, nn.Module]]) -> list[str]:
    """The globs that match in no component."""
    globs = [p for p in ([patterns] if isinstance(patterns, (str, type)) else patterns or ()) if isinstance(p, str)]
    return [g for g in globs if not any(applicable(g, name, component) for name, component in named)]


hide_module(globals(), nested=True)  # some of this runs while a compiled component is being called
