"""What one range around a module call costs, over the bare call: every way side by side, in one process.

    FXNVTX=on python benchmarks/overhead.py

Absolute times mean little on a shared machine; compare the rows. Each row is the best of several rounds, and the
rounds of all rows are interleaved, so a slow minute hurts all alike.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

os.environ.setdefault("FXNVTX", "on")

import nvtx
import torch
from torch import nn

import fxnvtx
from fxnvtx import ranges
from fxnvtx.ranges import emit

CHILDREN = 50
ROUNDS = 40
CALLS = 60


class Leaf(nn.Module):
    def forward(self, x: object) -> object:
        return x


class Chain(nn.Module):
    """A level of many children that do nothing, so that only the calls themselves are timed."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ModuleList(Leaf() for _ in range(CHILDREN))

    def forward(self, x):  # type: ignore[no-untyped-def]
        for item in self.items:
            x = item(x)
        return x


class Annotated(Leaf):
    def forward(self, x: object) -> object:
        with nvtx.annotate("leaf", domain="bench"):
            return x


class Recorded(Leaf):
    def forward(self, x: object) -> object:
        with torch.profiler.record_function("leaf"):
            return x


def chain(kind: type[nn.Module] = Leaf) -> nn.Module:
    model = Chain()
    model.items = nn.ModuleList(kind() for _ in range(CHILDREN))
    return model


def shape_hooks(model: nn.Module) -> nn.Module:
    """Forward pre and post hooks that write the input shapes into the label at every call, as serving stacks do."""
    domain = ranges.domain

    for name, module in model.named_modules():

        def before(_: nn.Module, args: tuple[object, ...], name: str = name) -> None:
            shapes = [list(a.shape) if isinstance(a, torch.Tensor) else None for a in args]
            attributes = domain.get_event_attributes(f"{name} in={shapes}")
            ranges.nvtx_push(attributes, ranges.HANDLE)

        def after(_: nn.Module, args: object, output: object) -> None:
            ranges.nvtx_pop(ranges.HANDLE)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    return model


def plain_hooks(model: nn.Module) -> nn.Module:
    """Forward pre and post hooks with attributes built beforehand."""
    for name, module in model.named_modules():
        attributes = ranges.label(name or "root").attributes
        module.register_forward_pre_hook(
            lambda m, a, attributes=attributes: ranges.nvtx_push(attributes, ranges.HANDLE)
        )
        module.register_forward_hook(lambda m, a, o: ranges.nvtx_pop(ranges.HANDLE))
    return model


def switched_off() -> nn.Module:
    model = fxnvtx.instrument(chain(), "chain")
    fxnvtx.set_enabled(model, False)
    return model


def nobody_listens() -> nn.Module:
    """Instrumented while there is no listener: the model must be exactly what it was."""
    before = emit.nvtx_on
    emit.nvtx_on = False
    emit._changed()
    model = fxnvtx.instrument(chain(), "chain")
    return_to.append(before)
    return model


return_to: list[bool] = []


def once(model: nn.Module, x: object) -> float:
    started = time.perf_counter()
    for _ in range(CALLS):
        model(x)
    return (time.perf_counter() - started) / CALLS


def blocks(recorded: bool) -> float:
    """Microseconds of one `with range(...)` of a prebuilt object, over an empty `with`."""
    shown, empty = fxnvtx.range("block"), contextlib.nullcontext()
    best = [float("inf")] * 2
    with fxnvtx.record() if recorded else empty:
        for _ in range(ROUNDS):
            for which, manager in enumerate((shown, empty)):
                started = time.perf_counter()
                for _ in range(1000):
                    with manager:
                        pass
                best[which] = min(best[which], time.perf_counter() - started)
    return (best[0] - best[1]) / 1000 * 1e6


def main() -> None:
    silent = nobody_listens()
    x = torch.zeros(2, 3)
    groups: list[tuple[str, Callable[[], nn.Module]]] = [
        ("fxnvtx, hooks path", lambda: fxnvtx.instrument(chain(), "chain", path="hooks")),
        ("fxnvtx, fx path", lambda: fxnvtx.instrument(chain(), "chain", path="fx")),
        ("fxnvtx, switched off", switched_off),
        ("pre+post hooks, prebuilt labels", lambda: plain_hooks(chain())),
        ("pre+post hooks formatting shapes", lambda: shape_hooks(chain())),
        ("nvtx.annotate in forward", lambda: chain(Annotated)),
        ("torch record_function in forward", lambda: chain(Recorded)),
    ]
    bare = chain()
    quiet = [once(bare, x) for _ in range(ROUNDS)], [once(silent, x) for _ in range(ROUNDS)]
    ratio = sorted(b / a for a, b in zip(*quiet, strict=True))[ROUNDS // 2]
    emit.nvtx_on = return_to[0]
    emit._changed()
    fxnvtx.uninstrument(silent)
    models = [(name, make()) for name, make in groups]
    best = {name: float("inf") for name, _ in models}
    floor = float("inf")
    recorded = {f"{name}, recorder on": model for name, model in models[:2]}
    best |= dict.fromkeys(recorded, float("inf"))
    for _ in range(ROUNDS):
        floor = min(floor, once(bare, x))
        for name, model in models:
            best[name] = min(best[name], once(model, x))
        with fxnvtx.record():
            for name, model in recorded.items():
                best[name] = min(best[name], once(model, x))
    print(f"bare call of a module: {floor / (CHILDREN + 1) * 1e6:.2f} us; tool attached: {ranges.tool_attached()}")
    print(f"{'one range, over the bare call':34s}      us   times the fxnvtx hooks path")
    unit = (best["fxnvtx, hooks path"] - floor) / (CHILDREN + 1)
    for name, seconds in best.items():
        cost = (seconds - floor) / (CHILDREN + 1)
        print(f"{name:34s}  {cost * 1e6:6.3f}   {cost / unit:6.1f}")
    print(f"{'with range(...), nothing inside':34s}  {blocks(False):6.3f}; recorder on {blocks(True):6.3f}")
    print(f"instrumented, nobody listens: {ratio:.3f} times the bare model (1.000 is no difference)")


if __name__ == "__main__":
    main()
