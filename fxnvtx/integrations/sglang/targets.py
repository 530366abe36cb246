"""What the environment asks of the plugin, what the plugin hooks into, and whether the installed release has that.

Looked up in the source files: SGLang wants no plugin to import its runtime before the process has chosen its device.
Nothing here may keep a server from starting.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from ...categories import Numbers
from ...errors import ConfigError

__all__ = [
    "OLDER_TARGETS",
    "ROOT",
    "TARGETS",
    "Options",
    "Target",
    "found_in",
    "guarded",
    "has_plugins",
    "log",
    "missing_targets",
    "present",
    "read_options",
    "sglang_folder",
]

VARIABLE = "FXNVTX_SGLANG"
MODES = ("layers", "stages", "off")
log = logging.getLogger("fxnvtx.sglang")
F = TypeVar("F", bound=Callable[..., Any])
_warned: set[str] = set()


def guarded(function: F) -> F:
    """A part of the plugin whose failure must not reach SGLang: it is logged once, and None comes back."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            message = f"{function.__name__}: {type(error).__name__}: {error}"
            if message not in _warned and len(_warned) < 100:
                _warned.add(message)
                log.warning("some ranges are missing (%s)", message)
            return None

    return cast(F, call)


@dataclass(frozen=True)
class Options:
    """`steps`: the steps whose layers show, None for all. `record`: a folder for one recording a request."""

    mode: str = "layers"
    depth: int | None = None
    steps: Numbers | None = None
    shapes: bool = True
    record: str | None = None

    @property
    def layers(self) -> bool:
        return self.mode == "layers"


def read_options(environment: Mapping[str, str] | None = None) -> Options:
    """The options of the environment. What has no meaning is logged and left at its default."""
    given = os.environ if environment is None else environment

    def text(name: str) -> str:
        return given.get(f"{VARIABLE}{name}", "").strip()

    def warn(name: str, wanted: str) -> None:
        log.warning("%s%s=%s has no meaning: use %s; it is ignored", VARIABLE, name, text(name), wanted)

    mode = text("").lower() or "layers"
    if mode not in MODES:
        warn("", ", ".join(MODES))
        mode = "layers"
    depth: int | None = None
    if text("_DEPTH"):
        if text("_DEPTH").isdecimal():
            depth = int(text("_DEPTH"))
        else:
            warn("_DEPTH", "a whole number of levels")
    shapes = text("_SHAPES").lower() or "1"
    if shapes not in {"0", "1", "true", "false"}:
        warn("_SHAPES", "1 or 0")
        shapes = "1"
    return Options(mode, depth, _steps(text, warn), shapes in {"1", "true"}, text("_RECORD") or None)


def _steps(text: Callable[[str], str], warn: Callable[[str, str], None]) -> Numbers | None:
    if not text("_STEPS"):
        return None
    try:
        return Numbers.read(text("_STEPS"))
    except ConfigError:
        warn("_STEPS", "step numbers like 4-8,20")
        return None


# --------------------------------------------------------------------------------------------------- targets

ROOT = "sglang.multimodal_gen.runtime."


@dataclass(frozen=True)
class Target:
    """One function or method. `module`: below ROOT. `handler`: the plugin's function for it. `shows`: what is lost
    where a release lacks it. `older`: where earlier releases have it."""

    module: str
    name: str
    kind: str  # AROUND, AFTER, REPLACE: SGLang's HookType
    handler: str
    shows: str
    layers: bool = False  # of use only where layers are shown
    older: Target | None = None

    @property
    def path(self) -> str:
        return f"{ROOT}{self.module}.{self.name}"


_NVTX = "utils.nvtx_pytorch_hooks"
_EXECUTOR = "pipelines_core.executors.pipeline_executor"
_STRATEGIES = "managers.memory_managers.component_residency_strategies"
_OLDER_STRATEGIES = "managers.memory_managers.component_resident_strategies"  # up to 0.5.17
_MANAGER = "managers.memory_managers.component_manager"
_LAYERS = "managers.memory_managers.layerwise_offload"
_DENOISING = "pipelines_core.stages.denoising"
_COMPILE = "utils.torch_compile"


def _move(kind: str, method: str, what: str, older: str) -> Target:
    shows, handler = f"residency.{what} ({kind})", f"residency_{what}"
    before = Target(_OLDER_STRATEGIES, f"{older}.{method}", "AROUND", handler, shows)
    return Target(_STRATEGIES, f"{kind}.{method}", "AROUND", handler, shows, older=before)


def _compiles(module: str, name: str, kind: str, handler: str, older: Target | None = None) -> Target:
    return Target(module, name, kind, handler, "layers inside torch.compile", layers=True, older=older)


_BEFORE_0_5_15 = _compiles(_DENOISING, "DenoisingStage._maybe_enable_torch_compile", "AROUND", "stage_compiles")

TARGETS: tuple[Target, ...] = (
    Target(_NVTX, "maybe_nvtx_range", "REPLACE", "maybe_range", "stages, loops and steps"),
    # The class stays SGLang's own: what else asks its objects, or inherits from it, finds what it knows.
    Target(_NVTX, "DiffusionNvtxHooks.register_hooks", "AROUND", "hooks_register", "layers"),
    Target(_NVTX, "DiffusionNvtxHooks.set_enabled", "AROUND", "hooks_enable", "layers"),
    Target(_NVTX, "DiffusionNvtxHooks.remove_hooks", "AROUND", "hooks_remove", "layers"),
    Target(_EXECUTOR, "PipelineExecutor.execute_with_profiling", "AROUND", "request", "requests"),
    Target(_EXECUTOR, "PipelineExecutor.execute_group_with_profiling", "AROUND", "request", "groups of requests"),
    Target(
        _EXECUTOR,
        "PipelineExecutor.execute_group_sequentially_with_profiling",
        "AROUND",
        "requests_in_turn",
        "groups of requests that are served one by one",
    ),
    Target(_DENOISING, "DenoisingStage._predict_noise", "AROUND", "guidance_pass", "guidance passes"),
    Target(_DENOISING, "DenoisingStage._predict_noise_with_cfg", "AROUND", "guidance", "names of more than two passes"),
    Target("distributed.cfg_policy", "CFGBranch.configure_batch", "AROUND", "branch", "names of more than two passes"),
    _move("ResidentStrategy", "prepare_for_use", "load", "ResidentStrategy"),
    _move("ComponentOffloadStrategy", "prepare_for_use", "load", "VanillaD2HStrategy"),
    _move("ComponentOffloadStrategy", "wait_for_use", "wait", "VanillaD2HStrategy"),
    _move("ComponentOffloadStrategy", "prefetch_for_use", "prefetch", "VanillaD2HStrategy"),
    _move("ComponentOffloadStrategy", "finish_use", "offload", "VanillaD2HStrategy"),
    _move("SnapshotOffloadStrategy", "finish_use", "offload", "SnapshotStrategy"),
    # the base class: up to 0.5.17 this strategy has no methods of its own for a use
    _move("LayerwiseOffloadStrategy", "prepare_for_use", "load", "ComponentResidencyStrategy"),
    _move("LayerwiseOffloadStrategy", "finish_use", "offload", "ComponentResidencyStrategy"),
    Target(_LAYERS, "LayerwiseOffloadManager.prefetch_layer", "AROUND", "layer_comes", "layers that are offloaded"),
    Target(_LAYERS, "LayerwiseOffloadManager.release_layer", "AROUND", "layer_goes", "layers that are offloaded"),
    Target(
        _MANAGER,
        "ComponentResidencyManager._enable_nvtx_for_use",
        "AROUND",
        "use_begins",
        "silence of compiled layers in warm-ups",
        layers=True,
    ),
    _compiles(_COMPILE, "build_torch_compile_kwargs", "AFTER", "compile_arguments", _BEFORE_0_5_15),
    # up to 0.5.19 the arguments are made without a word on the module
    _compiles(_COMPILE, "CompiledModuleRegistry.compile_once", "AROUND", "module_compiles", _BEFORE_0_5_15),
    Target(
        _COMPILE,
        "ActiveTargetCompiledCallable.get_or_compile",
        "AROUND",
        "compiled_method",
        "the root of a compiled vae.decode",
        layers=True,
    ),
    Target(
        "pipelines.diffusers_pipeline",
        "DiffusersPipeline._apply_torch_compile",
        "AROUND",
        "compiles_directly",
        "layers inside torch.compile of the diffusers backend",
        layers=True,
    ),
)
# What only earlier releases have, beside what stands above.
OLDER_TARGETS: tuple[Target, ...] = (
    Target(_OLDER_STRATEGIES, "SnapshotStrategy.prepare_for_use", "AROUND", "residency_load", ""),
    Target(_OLDER_STRATEGIES, "SnapshotStrategy.wait_for_use", "AROUND", "residency_wait", ""),
)


def found_in(package: Path | None, layers: bool = True) -> tuple[list[Target], list[Target]]:
    """The targets of the release in `package` (sglang's folder), each by the place it has there, and those that it
    does not have. `layers`: whether with those that only layers need."""
    found: dict[str, Target] = {}
    missing = []
    for target in TARGETS:
        if target.layers and not layers:
            continue
        place = next((t for t in (target, target.older) if t is not None and present(t, package)), None)
        if place is None:
            missing.append(target)
        else:
            found[place.path] = place
    found.update((t.path, t) for t in OLDER_TARGETS if _file(t, package).exists() and present(t, package))
    return list(found.values()), missing


def present(target: Target, package: Path | None) -> bool:
    """Whether the release in `package` (sglang's folder) has the target. True where its source cannot be read: SGLang
    itself says then what it could not apply."""
    if package is None:
        return False
    source = _source(_file(target, package))
    if source is None:
        return not (package / "multimodal_gen" / "runtime").is_dir()
    outer, _, method = target.name.partition(".")
    found = re.search(rf"^(?:class|def) {re.escape(outer)}\b", source, re.MULTILINE)
    if found is None or not method:
        return found is not None
    # up to the next statement at the left margin; the `):` of a long class line is none
    body = re.split(r"^[A-Za-z_@]", source[found.end() :].partition("\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return re.search(rf"^    (?:async )?def {re.escape(method)}\b", body, re.MULTILINE) is not None


def _file(target: Target, package: Path | None) -> Path:
    return (package or Path()).joinpath("multimodal_gen", "runtime", *target.module.split(".")).with_suffix(".py")


@cache
def _source(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return None


def sglang_folder() -> Path | None:
    """Where the sglang package lies. Imports nothing."""
    try:
        found = importlib.util.find_spec("sglang")
    except (ImportError, ValueError):
        return None
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return Path(places[0]) if places else None


def has_plugins(package: Path) -> bool:
    """Whether the release asks the entry-point group for plugins; else its classes are patched as they are imported."""
    return package.joinpath("multimodal_gen", "runtime", "platforms", "plugins.py").exists()


def missing_targets() -> list[str] | None:
    """See the package."""
    package = sglang_folder()
    if package is None:
        return None
    lacking = [f"{t.shows}: {t.path} is not there" for t in found_in(package)[1]]
    if not has_plugins(package):
        lacking.insert(0, "it loads no plugins (0.5.21 is the first release that does): start it with `fxnvtx run`")
    return lacking
