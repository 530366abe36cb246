"""One model compiled plain and with ranges: what must be equal, and what the ranges must be."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import Any

import torch

import fxnvtx

from ..support.diffusers_zoo import build, tensors_of
from .generated import counted, forget_generated_code, kernel_hashes, without_graph_caches
from .launches import empty_ranges, enclosing, witness


@dataclass
class Compiled:
    outputs: list[torch.Tensor]
    counters: dict[str, Any]
    kernels: list[str]
    seconds: float
    call: Any


@dataclass
class Comparison:
    """Figures of one model. `problems` is empty where every promise holds."""

    name: str
    launches: int = 0
    ranges: int = 0
    fused: int = 0
    root_only: int = 0
    unknown: int = 0
    concrete: int = 0  # launches whose innermost range is one module's, below the root
    kernels: int = 0
    graphs: int = 0
    plain_s: float = 0.0
    ours_s: float = 0.0
    problems: list[str] = field(default_factory=list)


def compile_once(model: torch.nn.Module, arguments: dict[str, Any], backend: str) -> Compiled:
    """Compile a model from scratch and call it once, with the same seed for every backend."""
    forget_generated_code()
    with counted() as counters, without_graph_caches(), torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        torch.manual_seed(2)
        start = time.perf_counter()
        outputs = tensors_of(compiled(**arguments))
        seconds = time.perf_counter() - start
    return Compiled(outputs, counters, kernel_hashes(), seconds, compiled)


def compare(name: str, warm: bool = False) -> Comparison:
    """`warm`: compile plain once more before timing, so that no C++ compiler is in the times."""
    found = Comparison(name)
    model, arguments = build(name)
    ours_model = fxnvtx.instrument(copy.deepcopy(model), "net")
    plain = compile_once(model, arguments, "inductor")
    if warm:
        plain = compile_once(model, arguments, "inductor")
    ours = compile_once(ours_model, arguments, "fxnvtx")
    found.plain_s, found.ours_s = plain.seconds, ours.seconds
    found.kernels, found.graphs = len(ours.kernels), ours.counters["graphs"]
    if not all(torch.equal(a, b) for a, b in zip(plain.outputs, ours.outputs, strict=True)):
        found.problems.append("outputs differ")
    if plain.kernels != ours.kernels:
        found.problems.append(f"kernels differ: {len(plain.kernels)} and {len(ours.kernels)}")
    if plain.counters != ours.counters:
        found.problems.append(f"counters differ: {plain.counters} {ours.counters}")
    with torch.no_grad(), witness() as launches, fxnvtx.record() as recording:
        torch.manual_seed(2)
        again = tensors_of(ours.call(**arguments))
    if not all(torch.equal(a, b) for a, b in zip(again, ours.outputs, strict=True)):
        found.problems.append("outputs differ while somebody listens")
    _check_ranges(found, ours_model, launches, recording)
    fxnvtx.uninstrument(ours_model)
    return found


def _check_ranges(found: Comparison, model: torch.nn.Module, launches: list[Any], recording: Any) -> None:
    found.launches, found.ranges = len(launches), len(recording.ranges)
    found.fused = sum(r.label.startswith("fused(") for r in recording.ranges)
    paths = {"net"} | {f"net.{n}" for n, _ in model.named_modules(remove_duplicate=False) if n}
    if not recording.balanced:
        found.problems.append("not balanced")
    if not launches:
        found.problems.append("no launch was seen")
    for launch in launches:
        around = enclosing(recording, launch)
        if not around or around[0].label != "net":
            found.problems.append(f"{launch.name} is outside")
        elif len(around) == 1:
            found.root_only += 1
        elif "unknown" in around[-1].label or "one of several" in around[-1].label:
            found.unknown += 1
        elif around[-1].label in paths:
            found.concrete += 1
    for item in recording.ranges:
        if not item.label.startswith(("fused(", "owner unknown")) and item.label not in paths:
            found.problems.append(f"{item.label} is no module")
    # the rest of a frame that Dynamo left to Python runs without generated code
    if found.graphs == 1:
        found.problems += [f"{r.label} is empty" for r in empty_ranges(recording, launches)]
