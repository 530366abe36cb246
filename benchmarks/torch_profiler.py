"""What a range costs while a torch.profiler session is on, over the same model without ranges in the same session.

    python benchmarks/torch_profiler.py

The model is a chain of modules that do nothing. Each row is the best of several rounds, interleaved; on a shared
machine only the ratios say something.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fxnvtx

CHILDREN, CALLS, ROUNDS = 50, 20, 15


class Leaf(nn.Module):
    def forward(self, x: object) -> object:
        return x


class Named(Leaf):
    def forward(self, x: object) -> object:
        with torch.profiler.record_function("leaf"):
            return x


def chain(kind: type[nn.Module]) -> nn.Module:
    return nn.Sequential(*(kind() for _ in range(CHILDREN)))


def main() -> None:
    plain, named = chain(Leaf), chain(Named)
    hooks = fxnvtx.instrument(chain(Leaf), "chain", path="hooks")
    forwards = fxnvtx.instrument(chain(Leaf), "chain")
    rows: dict[str, Callable[[object], object]] = {
        "bare call": plain,
        "fxnvtx, hooks path": hooks,
        "fxnvtx, fx path": forwards,
        "record_function": named,
    }
    best = dict.fromkeys(rows, float("inf"))
    for _ in range(ROUNDS):
        for name, model in rows.items():
            with profile(activities=[ProfilerActivity.CPU]):
                model(None)
                start = time.perf_counter()
                for _ in range(CALLS):
                    model(None)
                best[name] = min(best[name], time.perf_counter() - start)
    bare = best["bare call"]
    for name, spent in best.items():
        each = spent / CALLS / CHILDREN * 1e6
        print(f"{name:20} {each:6.2f} us a module, {each - bare / CALLS / CHILDREN * 1e6:6.2f} us over the bare call")


if __name__ == "__main__":
    main()
