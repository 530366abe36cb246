"""The bytes of kernels and the FLOPs of layers in code for a GPU, by witnesses that do not ask fxnvtx.

A Triton kernel's bytes are what its launch is handed: every pointer that its source loads from counts the size of its
tensor as read, every one that it stores to as written. FLOPs are those of torch.utils.flop_counter over the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fxnvtx
from fxnvtx.ranges.stack import Range

from ..compile.launches import enclosing, witness
from ..support.work_truth import shown_flops, true_flops
from . import device

Found = tuple[list[str], list[str]]


def handed(kernel: device.StandIn, tensors: list[torch.Tensor]) -> int:
    """Bytes that one launch reads and writes."""
    found = re.search(rf"def {kernel.kernel_name}\(([^)]*)\)|def \w+\(([^)]*)\):\n", kernel.source)
    assert found is not None, kernel.source
    names = [name.partition(":")[0].strip() for name in (found[1] or found[2]).split(",")]
    pointers = [name for name in names if "_ptr" in name]
    assert len(pointers) == len(tensors), (names, len(tensors))
    total = 0
    for name, tensor in zip(pointers, tensors, strict=True):
        size = tensor.numel() * tensor.element_size()
        total += size * (f"tl.load({name} +" in kernel.source) + size * (f"tl.store({name} +" in kernel.source)
    return total


class Elementwise(nn.Module):
    """Kernels that read a value twice, broadcast, reduce, write in place and make what nobody else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.LayerNorm(64), nn.LayerNorm(64, elementwise_affine=False)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = self.first(x) * (1 + scale) + scale
        z = self.down(nn.functional.gelu(self.up(y)).square())
        return self.last(x + z) * scale.exp()


class OneRow(nn.Module):
    """A batch of one: Inductor makes sums of products of these matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 4096), nn.Linear(4096, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.up(x)))


def work(make: Callable[[], nn.Module], inputs: tuple[torch.Tensor, ...], grad: bool = False) -> Found:
    """What is wrong with one model's work."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make().train(grad)
    with torch.set_grad_enabled(grad):
        truth = {label: flops for label, flops in true_flops(model, lambda: model(*inputs), "net").items() if flops}
        compiled = torch.compile(fxnvtx.instrument(model, "net", path="hooks"), backend="fxnvtx", fullgraph=True)
        compiled(*inputs)
        log: list[tuple[str, int]] = []
        original: Any = device.StandIn.run

        def run(self: device.StandIn, *args: Any, **kwargs: Any) -> None:
            log.append((self.kernel_name, handed(self, [a for a in args if isinstance(a, torch.Tensor)])))

        device.StandIn.run = run  # type: ignore[method-assign]
        try:
            with witness() as launches, fxnvtx.record() as recording:
                compiled(*inputs)
        finally:
            device.StandIn.run = original  # type: ignore[method-assign]
    found = [f"{label}: {flops} FLOPs" for label, flops in shown_flops(recording).items() ^ truth.items()]
    carried = {(row[0], row[1]): row for row in recording.meta["work"]}
    told = [f"{row[0]}: {row[7]}" for row in carried.values() if row[7]]
    found += [text for text in told if text != "net.flip: no formula for fxnvtx_gpuless.flip"]
    sums: dict[tuple[str, str], int] = {}
    others: set[tuple[str, str]] = set()
    sizes = iter(log)
    for launch in launches:
        key = _key(enclosing(recording, launch))
        if launch.name.startswith("triton"):
            _, size = next(sizes)
            sums[key] = sums.get(key, 0) + size
        else:
            others.add(key)
    checked = [key for key in sums if key not in others]
    found += [f"{key}: {carried[key][6]} bytes, not {sums[key]}" for key in checked if carried[key][6] != sums[key]]
    found += [] if checked and len(log) == sum(launch.name.startswith("triton") for launch in launches) else ["no log"]
    return found, [" in ".join(key) for key in checked]


def _key(around: list[Range]) -> tuple[str, str]:
    inner = around[-1]
    if inner.category in ("module", "piece"):
        return inner.label, ""
    return inner.label, next((r.label for r in reversed(around[:-1]) if r.category in ("module", "piece")), "")
