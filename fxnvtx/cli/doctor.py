"""Why do I see no ranges: versions, tool, domain, compile, graphs. Says what it found and what follows."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import click

__all__ = ["Finding", "doctor_command", "findings"]

TORCH_2 = (11, 15)  # the releases of torch 2 that were run: docs/versions.md


@dataclass(frozen=True)
class Finding:
    """One thing looked at. state: "ok", "note" or "bad"."""

    what: str
    state: str
    found: str
    follows: str = ""


def findings() -> Iterator[Finding]:
    yield Finding("fxnvtx", "ok", f"{_version('fxnvtx')} on Python {platform.python_version()}")
    yield from _torch()
    yield from _nvtx()
    yield from _nsys()
    yield from _cuda()
    yield _diffusers()
    yield from _sglang()
    yield from _other_stacks()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _torch() -> Iterator[Finding]:
    import torch

    release = int(torch.__version__.split(".")[1]) if torch.__version__.startswith("2.") else -1
    first, last = TORCH_2
    if first <= release <= last:
        yield Finding("torch", "ok", torch.__version__)
    else:
        said = f"tested with 2.{first} to 2.{last}; compiled layers may not show"
        yield Finding("torch", "note", torch.__version__, said)
    from ..compile.inductor import missing

    lacking = missing()
    if lacking:
        yield Finding("compiled layers", "bad", lacking, "one range per compiled region is shown")
    else:
        yield Finding("compiled layers", "ok", "Inductor has all that the fused boundaries need")


def _nvtx() -> Iterator[Finding]:
    from .. import ranges
    from ..ranges import emit

    if emit.mode == "off" or os.environ.get("NVTX_DISABLE"):
        yield Finding("listener", "bad", ranges.why_silent(), "nothing is emitted: unset the variable")
    elif ranges.HANDLE.enabled():
        yield Finding("listener", "ok", f"an NVTX tool listens to domain {ranges.DOMAIN!r}")
    elif ranges.tool_attached():
        yield Finding(
            "listener",
            "ok",
            "an NVTX tool is attached, but says that the domain is disabled",
            "Nsight Systems up to 2023.4 says so always; fxnvtx emits all the same",
        )
    else:
        yield Finding(
            "listener",
            "note",
            f"no NVTX tool is attached to this process (FXNVTX={emit.mode})",
            "run under `nsys profile --trace=nvtx`, or use fxnvtx.record()",
        )
    yield Finding("nvtx", "ok", _version("nvtx"))


def _nsys() -> Iterator[Finding]:
    from ..errors import ToolError
    from . import find_nsys, nsys_version

    nsys = find_nsys()
    if nsys is None:
        yield Finding("nsys", "note", "not on the PATH", "captures need it; everything else works without")
        return
    try:
        yield Finding(
            "nsys",
            "ok",
            nsys_version(nsys),
            "it may lose the last ranges of a process that ends by a signal or os._exit; fxnvtx's recordings do not",
        )
    except ToolError as error:
        yield Finding("nsys", "bad", str(error), "reinstall Nsight Systems, or use --no-nsys")


def _cuda() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("CUDA", "note", "no device", "reports show CPU time only")
        return
    yield Finding("CUDA", "ok", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    yield Finding(
        "CUDA graphs",
        "note",
        "replayed kernels show their layer only with --cuda-graph-trace=node and the graph's capture in the window",
    )


def _diffusers() -> Finding:
    if importlib.util.find_spec("diffusers") is None:
        return Finding("diffusers", "note", "not installed", "pip install 'fxnvtx[diffusers]' for its pipelines")
    return Finding("diffusers", "ok", _version("diffusers"))


def _sglang() -> Iterator[Finding]:
    from ..integrations.sglang import missing_targets

    missing = missing_targets()
    if missing is None:  # nobody misses what is not installed
        return
    if missing:
        yield Finding("SGLang", "note", "; ".join(missing), f"SGLang {_version('sglang')} shows no ranges for that")
    else:
        yield Finding("SGLang", "ok", f"{_version('sglang')}; its --enable-layerwise-nvtx-marker gives fxnvtx's ranges")


# docs/launcher.md says what was tried of each
_STACKS = {
    "vllm_omni": "vllm-omni",
    "xfuser": "xfuser",
    "fastvideo": "fastvideo",
    "cache_dit": "cache-dit",
}


def _other_stacks() -> Iterator[Finding]:
    for module, package in _STACKS.items():
        if importlib.util.find_spec(module) is not None:
            yield Finding(package, "ok", f"{_version(package)}; put `fxnvtx run` before its command")
    if importlib.util.find_spec("lightx2v") is not None:
        yield Finding(
            "lightx2v",
            "note",
            "its transformers are functions over weights and no modules: their blocks and layers have no ranges",
            "modules show (text encoders, most VAEs), and your own fxnvtx.range()",
        )


@click.command("doctor")
def doctor_command() -> None:
    """Say why ranges may be missing: versions, tool, domain, compile, graphs."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    style = {"ok": "green", "note": "yellow", "bad": "red"}
    worst = False
    for item in findings():
        found = item.found + (f"; {item.follows}" if item.follows else "")
        table.add_row(Text(item.state, style=style[item.state]), Text(item.what), Text(found))
        worst = worst or item.state == "bad"
    Console().print(table)
    if worst:
        raise SystemExit(1)
