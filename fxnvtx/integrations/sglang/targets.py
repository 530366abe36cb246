"""What the plugin hooks into, and whether the installed release has it.

Looked up in the source files: SGLang wants no plugin to import its runtime before the process has chosen its device.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["ROOT", "TARGETS", "Target", "missing_targets", "present"]

ROOT = "sglang.multimodal_gen.runtime."


@dataclass(frozen=True)
class Target:
    """One function, class, or method. `module`: below ROOT. `handler`: the plugin's function for it. `shows`: what is
    lost where a release lacks it."""

    module: str
    name: str
    kind: str  # AROUND, AFTER, REPLACE: SGLang's HookType
    handler: str
    shows: str
    layers: bool = False  # of use only where layers are shown

    @property
    def path(self) -> str:
        return f"{ROOT}{self.module}.{self.name}"


_NVTX = "utils.nvtx_pytorch_hooks"
_EXECUTOR = "pipelines_core.executors.pipeline_executor"
_STRATEGIES = "managers.memory_managers.component_residency_strategies"
_MANAGER = "managers.memory_managers.component_manager"
_DENOISING = "pipelines_core.stages.denoising"
_MOVES = (
    ("ResidentStrategy", "prepare_for_use", "load"),
    ("ComponentOffloadStrategy", "prepare_for_use", "load"),
    ("ComponentOffloadStrategy", "wait_for_use", "wait"),
    ("ComponentOffloadStrategy", "prefetch_for_use", "prefetch"),
    ("ComponentOffloadStrategy", "finish_use", "offload"),
    ("SnapshotOffloadStrategy", "finish_use", "offload"),
    ("LayerwiseOffloadStrategy", "prepare_for_use", "load"),
    ("LayerwiseOffloadStrategy", "finish_use", "offload"),
)

TARGETS: tuple[Target, ...] = (
    Target(_NVTX, "maybe_nvtx_range", "REPLACE", "maybe_range", "stages, loops and steps"),
    Target(_NVTX, "DiffusionNvtxHooks", "REPLACE", "Hooks", "layers"),
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
    *(
        Target(_STRATEGIES, f"{kind}.{method}", "AROUND", f"residency_{what}", f"residency.{what} ({kind})")
        for kind, method, what in _MOVES
    ),
    Target(
        _MANAGER,
        "ComponentResidencyManager._enable_nvtx_for_use",
        "AROUND",
        "use_begins",
        "silence of compiled layers in warm-ups",
        layers=True,
    ),
    Target(
        "utils.torch_compile",
        "build_torch_compile_kwargs",
        "AFTER",
        "compile_arguments",
        "layers inside torch.compile",
        layers=True,
    ),
    Target(
        "utils.torch_compile",
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


def present(target: Target, package: Path | None) -> bool:
    """Whether the release in `package` (sglang's folder) has the target. True where its source cannot be read: SGLang
    itself says then what it could not apply."""
    if package is None:
        return False
    file = package.joinpath("multimodal_gen", "runtime", *target.module.split(".")).with_suffix(".py")
    source = _source(file)
    if source is None:
        return not (package / "multimodal_gen" / "runtime").is_dir()
    outer, _, method = target.name.partition(".")
    found = re.search(rf"^(?:class|def) {re.escape(outer)}\b", source, re.MULTILINE)
    if found is None or not method:
        return found is not None
    # up to the next statement at the left margin; the `):` of a long class line is none
    body = re.split(r"^[A-Za-z_@]", source[found.end() :].partition("\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return re.search(rf"^    (?:async )?def {re.escape(method)}\b", body, re.MULTILINE) is not None


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


def lacking(targets: Iterable[Target], package: Path | None) -> list[Target]:
    """Those of `targets` that the release does not have."""
    return [t for t in targets if not present(t, package)]


def missing_targets() -> list[str] | None:
    """See the package."""
    package = sglang_folder()
    if package is None:
        return None
    if not package.joinpath("multimodal_gen", "runtime", "platforms", "plugins.py").exists():
        return ["there is no entry point for plugins: SGLang-Diffusion 0.5.23 is the first release with one"]
    return [f"{t.shows}: {t.path} is not there" for t in lacking(TARGETS, package)]
