"""What ranges inside torch.compile cost: run time and compile time, instrumented over plain, in one process.

    python benchmarks/compiled.py [MODEL ...]        reference, flux, ltx_video, or any name of the diffusers zoo

Calls alternate between the two, so that a slow moment hurts both. Two compilations of the very same model differ by a
percent or more in either direction (where their weights come to lie), so the ratio is the median over several pairs of
models, made in either order, and all of them are printed. The compile times are of a warm C++ compiler: everything but
gcc is in them, also alternating.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fxnvtx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.compile.generated import forget_generated_code, without_graph_caches

ROUNDS = 400
INSTANCES = 6
COMPILATIONS = 5


def reference() -> tuple[torch.nn.Module, dict[str, Any]]:
    dit = fxnvtx.models.build("tiny").dit
    arguments = {
        "latent": torch.randn(1, 4, 16, 16),
        "timestep": torch.tensor([500.0]),
        "text": torch.randn(1, 16, 32),
        "pooled": torch.randn(1, 32),
    }
    return dit, arguments


def made(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    if name == "reference":
        return reference()
    from tests.support.diffusers_zoo import build

    return build(name)


def compiled(name: str, backend: str) -> tuple[Callable[[], Any], float]:
    """(a call, seconds that compiling took)."""
    torch._dynamo.reset()
    forget_generated_code()
    model, arguments = made(name)
    if backend == "fxnvtx":
        fxnvtx.instrument(model, name)
    call = torch.compile(model, backend=backend)
    gc.collect()
    start = time.perf_counter()
    call(**arguments)
    return lambda: call(**arguments), time.perf_counter() - start


def alternating(a: Callable[[], Any], b: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median seconds of both."""
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds):
        for which in (0, 1) if index % 2 else (1, 0):
            start = time.perf_counter()
            (a, b)[which]()
            times[which].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    print(f"{'model':12s} {'plain us':>9s} {'no listener':>11s} {'recording':>9s} {'ranges':>6s} {'compile':>8s}")
    with torch.no_grad(), without_graph_caches():
        for name in names or ["reference", "flux", "ltx_video"]:
            compiled(name, "inductor")
            compiled(name, "fxnvtx")
            pairs = [(compiled(name, "inductor")[1], compiled(name, "fxnvtx")[1]) for _ in range(COMPILATIONS)]
            ratio = statistics.median(ours for _, ours in pairs) / statistics.median(plain for plain, _ in pairs)
            silent, heard = [], []
            for index in range(INSTANCES):
                torch._dynamo.reset()
                first = ("inductor", "fxnvtx") if index % 2 else ("fxnvtx", "inductor")
                made_in_turn = {backend: _without_reset(name, backend) for backend in first}
                plain, ours = made_in_turn["inductor"], made_in_turn["fxnvtx"]
                for call in (plain, ours):
                    for _ in range(20):
                        call()
                base, quiet = alternating(plain, ours, ROUNDS)
                silent.append(quiet / base)
                with fxnvtx.record() as recording:
                    ours()
                    base_again, loud = alternating(plain, ours, ROUNDS // 4)
                heard.append(loud / base_again)
            ranges = len(recording.ranges) // (ROUNDS // 4 + 1)
            ratios = f"{statistics.median(silent):11.4f} {statistics.median(heard):9.4f} {ranges:6d} {ratio:8.3f}"
            spread = " ".join(f"{value:.4f}" for value in sorted(silent))
            print(f"{name:12s} {base * 1e6:9.0f} {ratios}   {spread}", flush=True)


def _without_reset(name: str, backend: str) -> Callable[[], Any]:
    """A compiled call, made so that others stay compiled."""
    model, arguments = made(name)
    call = torch.compile(fxnvtx.instrument(model, name) if backend == "fxnvtx" else model, backend=backend)
    call(**arguments)
    return lambda: call(**arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
