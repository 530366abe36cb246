"""The arguments of a pipeline run, from Python, a dict, a JSON file or a command line, and which somebody chose.

A value that equals the default counts as chosen when somebody wrote it down.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..categories import Numbers
from ..errors import ConfigError

__all__ = [
    "DEVICE_MODES",
    "PERFORMANCE_MODES",
    "RESIDENCY_MODES",
    "ExplicitArgs",
    "ServerArgs",
    "add_arguments",
    "parse",
    "parse_residency",
]


# ------------------------------------------------------------------------------------------- which arguments were given


Self = TypeVar("Self", bound="ExplicitArgs")


class ExplicitArgs:
    """Base of an argument dataclass that remembers which of its fields were given.

    A value that equals the default counts as given when somebody wrote it down: "vae_cpu_offload=false" is a
    decision, leaving it out is none.
    """

    _explicit: frozenset[str] = frozenset()

    def __new__(cls: type[Self], *values: Any, **named: Any) -> Self:
        made = object.__new__(cls)
        positional = [f.name for f in dataclasses.fields(cls) if f.init][: len(values)]  # type: ignore[arg-type]
        object.__setattr__(made, "_explicit", frozenset(positional) | frozenset(named))
        return made

    def is_arg_explicitly_set(self, name: str) -> bool:
        """Whether `name` was given on the command line, in a config file, in from_dict or from_kwargs, or to the
        constructor. Raises ConfigError for a name that is no argument."""
        self.require_names([name])
        return name in self._explicit

    def with_defaults(self: Self, **values: Any) -> Self:
        """A copy in which `values` stand where nothing was given. They are defaults: they do not count as given."""
        self.require_names(values)
        return self._copied({k: v for k, v in values.items() if k not in self._explicit}, self._explicit)

    def with_values(self: Self, **values: Any) -> Self:
        """A copy with `values`, which count as given."""
        self.require_names(values)
        return self._copied(values, self._explicit | frozenset(values))

    @classmethod
    def require_names(cls, names: Iterable[str]) -> None:
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in names:
            if name not in known:
                raise ConfigError(f"there is no argument {name!r}: the arguments are {', '.join(sorted(known))}")

    def _copied(self: Self, changes: dict[str, Any], explicit: frozenset[str]) -> Self:
        current = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        made = type(self)(**{**current, **changes})
        object.__setattr__(made, "_explicit", explicit)
        return made


# -------------------------------------------------------------------------------------------------------- the arguments


RESIDENCY_MODES = ("resident", "component-offload", "layerwise-offload", "snapshot-offload")
PERFORMANCE_MODES = ("auto", "speed", "memory")
DEVICE_MODES = ("auto", "resident", "original")


@dataclass
class ServerArgs(ExplicitArgs):
    """Everything that may be chosen about a run. Raises ConfigError where a value has no meaning."""

    enable_layerwise_nvtx_marker: bool = False
    """Request, stage, loop and step ranges, residency ranges, and a range per layer of each component in use."""

    enable_stage_nvtx_marker: bool = False
    """The same without layers: 50 steps on several GPUs make a capture too big to open otherwise."""

    nvtx_depth: int | None = None
    """How many levels of modules below a component get ranges. None: all."""

    nvtx_steps: str | None = None
    """Denoising steps, from 0, that get layer ranges, like "4-8,20". None: all."""

    nvtx_shapes: bool = False
    """A marker `<label> in=[[2, 3], [4]]` with the input shapes at every layer's call."""

    cuda_profiler_range: bool = False
    """cudaProfilerStart/Stop around every request that is no warm-up. Does nothing without CUDA."""

    performance_mode: str = "auto"
    """speed: all weights stay; memory: nothing stays that is not in use; auto: the pipeline's own defaults."""

    residency: dict[str, str] = field(default_factory=dict)
    """Component name -> resident | component-offload | layerwise-offload | snapshot-offload. Wins over the flags."""

    text_encoder_cpu_offload: bool | None = None
    image_encoder_cpu_offload: bool | None = None
    vae_cpu_offload: bool | None = None
    dit_cpu_offload: bool | None = None
    """Flags per kind of component: True is component-offload, False is resident, None leaves it open."""

    layerwise_offload_components: list[str] | None = None
    """Components of which one block at a time is kept."""

    two_stage_device_mode: str = "auto"
    """resident | original | auto (by device memory) for the two-stage pipeline's residency defaults."""

    residency_dir: str | None = None
    """Folder of the files that hold offloaded weights without a GPU. None: the system's temporary folder."""

    guidance_interval: tuple[int, int] | None = None
    """First and last step, from 0, that pay for an unconditional pass. None: all steps."""

    sync_steps: bool = False
    """Wait for the device at the end of each profiled step, so that its wall time is the step's own."""

    memory_snapshots: bool = False
    """Write resident weight bytes and device memory into the metrics of each stage."""

    def __post_init__(self) -> None:
        _require_choice("performance_mode", self.performance_mode, PERFORMANCE_MODES)
        _require_choice("two_stage_device_mode", self.two_stage_device_mode, DEVICE_MODES)
        if not isinstance(self.residency, Mapping):
            raise ConfigError('residency must map component names to modes, like {"dit": "layerwise-offload"}')
        for component, mode in self.residency.items():
            _require_choice(f"residency of {component}", mode, RESIDENCY_MODES)
        if self.nvtx_depth is not None and (not _is_int(self.nvtx_depth) or self.nvtx_depth < 0):
            raise ConfigError(f"nvtx_depth={self.nvtx_depth!r} must be 0 or more, or left out for all levels")
        for name in _BOOLS:
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name in _OPTIONAL_BOOLS):
                raise ConfigError(f"{name}={value!r} must be true or false")
        listed = self.layerwise_offload_components
        if listed is not None and (isinstance(listed, str) or not all(isinstance(c, str) for c in listed)):
            raise ConfigError("layerwise_offload_components must be a list of component names, or null")
        if self.guidance_interval is not None:
            self.guidance_interval = _interval(self.guidance_interval)
        self.step_windows()

    # ------------------------------------------------------------------------------------------ ways to make one

    @classmethod
    def from_kwargs(cls, **values: Any) -> ServerArgs:
        """Arguments by name; all of them count as explicitly set."""
        cls.require_names(values)
        return cls(**values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ServerArgs:
        """Arguments from a mapping; all of its keys count as explicitly set."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"arguments must be a mapping of names to values, not {type(values).__name__}")
        return cls.from_kwargs(**{str(k): v for k, v in values.items()})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ServerArgs:
        """Arguments from a JSON object in a file."""
        return cls.from_dict(read_config(path))

    @classmethod
    def from_cli(cls, argv: list[str] | None = None) -> ServerArgs:
        """Arguments from a command line (sys.argv without one); `--config FILE` first, what is spelled out wins."""

        return cls.from_dict(parse(argv))

    # --------------------------------------------------------------------------------------------- what follows

    @property
    def stage_ranges(self) -> bool:
        """Whether request, stage, loop, step and residency ranges are wanted."""
        return self.enable_layerwise_nvtx_marker or self.enable_stage_nvtx_marker

    def step_windows(self) -> Numbers:
        """The steps whose layers get ranges."""
        wanted = self.nvtx_steps if self.nvtx_steps is not None else ""
        try:
            return Numbers.read(wanted.strip() or "0:")
        except (AttributeError, ConfigError) as error:
            reason = error if isinstance(error, ConfigError) else "write steps like 4-8,20"
            raise ConfigError(f"nvtx_steps={wanted!r}: {reason}") from None

    def residency_mode(self, component: str, kind: str) -> str:
        """Where the weights of `component` are kept; `kind` is dit, vae, text_encoder, image_encoder or other."""
        chosen = self.residency.get(component)
        if chosen is not None:
            return chosen
        name = f"{kind}_cpu_offload"
        flag = getattr(self, name) if name in _OPTIONAL_BOOLS else None
        listed = component in (self.layerwise_offload_components or ())
        # a flag that somebody set outranks a list that a pipeline's defaults brought along
        outranked = flag is not None and name in self._explicit and "layerwise_offload_components" not in self._explicit
        if listed and not outranked:
            return "layerwise-offload"
        if flag is not None:
            return "component-offload" if flag else "resident"
        if self.performance_mode == "memory":
            return "layerwise-offload" if kind == "dit" else "component-offload"
        return "resident"


_OPTIONAL_BOOLS = ("text_encoder_cpu_offload", "image_encoder_cpu_offload", "vae_cpu_offload", "dit_cpu_offload")
_BOOLS = (
    "enable_layerwise_nvtx_marker",
    "enable_stage_nvtx_marker",
    "nvtx_shapes",
    "cuda_profiler_range",
    "sync_steps",
    "memory_snapshots",
    *_OPTIONAL_BOOLS,
)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a config file. Raises ConfigError where there is none."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"the config file {path} is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"the config file {path} must hold one JSON object with argument names as keys")
    return document


def field_names() -> list[str]:
    return [f.name for f in dataclasses.fields(ServerArgs)]


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} has no meaning: use {', '.join(choices)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _interval(value: Any) -> tuple[int, int]:
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_int(v) for v in value) and value[0] <= value[1]:
        return int(value[0]), int(value[1])
    raise ConfigError(f"guidance_interval={value!r} must be two steps, the first not after the last, like [2, 10]")


# ---------------------------------------------------------------------------------------------------- as a command line


_SWITCHES = {
    "enable_layerwise_nvtx_marker": "ranges for requests, stages, steps and every layer",
    "enable_stage_nvtx_marker": "ranges for requests, stages and steps, none for layers",
    "nvtx_shapes": "a marker with the input shapes at every layer's call",
    "cuda_profiler_range": "cudaProfilerStart/Stop around every request",
    "text_encoder_cpu_offload": "bring text encoders in only while they work",
    "image_encoder_cpu_offload": "bring image encoders in only while they work",
    "vae_cpu_offload": "bring VAEs in only while they work",
    "dit_cpu_offload": "bring DiTs in only while they work",
    "sync_steps": "wait for the device at the end of each step",
    "memory_snapshots": "write memory figures into the metrics",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` every argument of ServerArgs. What is not written stays out of the namespace."""
    absent: Any = argparse.SUPPRESS
    for name, text in _SWITCHES.items():
        parser.add_argument(
            _flag(name),
            dest=name,
            nargs="?",
            const=True,
            type=_boolean,
            default=absent,
            metavar="true|false",
            help=text,
        )
    parser.add_argument("--nvtx-depth", type=int, default=absent, help="levels of modules below a component")
    parser.add_argument("--nvtx-steps", default=absent, metavar="4-8,20", help="steps that get layer ranges")
    parser.add_argument("--performance-mode", choices=PERFORMANCE_MODES, default=absent)
    parser.add_argument("--two-stage-device-mode", choices=DEVICE_MODES, default=absent)
    parser.add_argument(
        "--residency",
        action="append",
        default=absent,
        metavar="COMPONENT=MODE",
        help=f"where a component's weights are kept: {', '.join(RESIDENCY_MODES)}",
    )
    parser.add_argument("--layerwise-offload-components", type=_names, default=absent, metavar="A,B|none")
    parser.add_argument("--residency-dir", default=absent, metavar="DIR")
    parser.add_argument("--guidance-interval", type=_two_steps, default=absent, metavar="FIRST-LAST")


def parse(argv: list[str] | None) -> dict[str, Any]:
    """The arguments that were written, in `--config FILE` or spelled out (these win), by name."""
    parser = _Parser(prog="fxnvtx", allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument("--config", default=None, metavar="FILE.json")
    given = vars(parser.parse_args(argv))
    config = given.pop("config")
    if "residency" in given:
        given["residency"] = parse_residency(given["residency"])
    return {**(read_config(config) if config else {}), **given}


def parse_residency(pairs: list[str]) -> dict[str, str]:
    """["dit=layerwise-offload", "vae=resident"] -> a mapping. Raises ConfigError for anything else."""
    found = {}
    for pair in pairs:
        component, equals, mode = pair.partition("=")
        if not equals or not component.strip():
            raise ConfigError(f"--residency {pair}: write COMPONENT=MODE, for example dit=layerwise-offload")
        found[component.strip()] = mode.strip()
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _boolean(text: str) -> bool:
    value = text.strip().lower()
    if value in {"true", "1", "yes", "on"}:
        return True
    if value in {"false", "0", "no", "off"}:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _names(text: str) -> list[str] | None:
    if text.strip().lower() in {"none", "null", ""}:
        return None
    return [part.strip() for part in text.split(",") if part.strip()]


def _two_steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    try:
        return int(first), int(last or first)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no interval of steps: write it like 2-10") from None
