"""What is compiled, in groups that share a process."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .check import Case
from .models import (
    Branching,
    Combo,
    Copied,
    Cut,
    Deep,
    Dit,
    Foreach,
    Kinds,
    Nested,
    Reductions,
    Scan,
    Streams,
    Vae,
    Wide,
    user_kernel,
)


def _inputs(*shapes: tuple[int, ...]) -> Callable[[], tuple[torch.Tensor, ...]]:
    def make() -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        return tuple(torch.rand(shape, generator=generator) for shape in shapes)

    return make


_BY_NAME = {"scaled_dot_product": "blocks.?.attn", "flip": "flip"}
_ATTENTION = ("net.blocks.0.attn", "net.blocks.1.attn", "net.flip", "net.blocks.0.attn.to_out")
_CONVOLUTIONS = ("net.conv1", "net.conv2", "net.conv3")
_dit, _vae, _square = _inputs((2, 5, 6)), _inputs((2, 6, 16)), _inputs((8, 8))
_kinds = {part: name for name, part in Kinds.NAMES.items()}
_reduced, _cut = _inputs((4, 4096)), _inputs((5, 8))
_COOPERATIVE = {"triton.cooperative_reductions": True, "triton.force_cooperative_reductions": True}

GROUPS: dict[str, dict[str, Case]] = {
    "layers": {
        "dit": Case(Dit, _dit, _BY_NAME, expected=_ATTENTION),
        "vae": Case(Vae, _vae, expected=_CONVOLUTIONS),
        "dit trained": Case(Dit, _dit, _BY_NAME, grad=True, expected=_ATTENTION),
        "vae trained": Case(Vae, _vae, grad=True, expected=_CONVOLUTIONS),
    },
    "launches": {
        "nested": Case(Nested, _cut, expected=tuple(f"net.blocks.{b}.{m}" for b in range(3) for m in ("up", "down"))),
        "combo": Case(
            Combo,
            _inputs((5, 8), (7, 9), (3, 300)),
            patches={"combo_kernels": True, "benchmark_combo_kernel": False},
            expected=("fused(a, b, c)", "net.last"),
        ),
        "foreach": Case(Foreach, _cut, expected=("net.before", "net.each", "net.after")),
        "user": Case(user_kernel, _cut, expected=("net.before", "net.doubling", "net.after")),
        "reductions": Case(Reductions, _reduced, expected=("fused(norm, soft, self)", "net.lin")),
        "cooperative": Case(Reductions, _reduced, patches=_COOPERATIVE, expected=("fused(norm, soft)", "net.lin")),
        "multi-kernel": Case(Reductions, _reduced, patches={"triton.multi_kernel": 1}, expected=("net.lin",)),
        "zeroed": Case(Scan, _inputs((5, 8), (1, 100_000)), {"zero_": "scan"}, expected=("net.scan",)),
        "copied": Case(
            Copied, _inputs((5, 8), (5, 11)), {"Tensor.copy_": "[ob]*"}, expected=("net.out", "net.back", "net.kept")
        ),
        "streams": Case(Streams, _cut, expected=("net.aside", "fused(aside, gate)")),
        "partitions": Case(Cut, _cut, {"flip": "cut"}, patches={"graph_partition": True}, expected=("net.cut",)),
        "synchronised": Case(
            Dit, _dit, _BY_NAME, patches={"triton.debug_sync_kernel": True, "triton.debug_sync_graph": True}
        ),
        "memory planned": Case(Dit, _dit, _BY_NAME, patches={"memory_planning": True, "memory_pool": "combined"}),
        "bandwidth": Case(Dit, _dit, _BY_NAME, patches={"profile_bandwidth": True}),
        "marked": Case(Dit, _dit, _BY_NAME, patches={"profiler_mark_wrapper_call": True}),
        "mixed order": Case(Dit, _dit, _BY_NAME, patches={"triton.mix_order_reduction": True}, grad=True),
    },
    "interpreted": {
        "dit": Case(Dit, _dit, _BY_NAME, expected=_ATTENTION),
        # in another layout a convolution's result would have strides of the CPU's choice
        "vae": Case(Vae, _vae, patches={"layout_optimization": False}, expected=_CONVOLUTIONS),
        "nested": Case(Nested, _cut),
        "foreach": Case(Foreach, _cut, expected=("net.each",)),
        "kinds": Case(Kinds, _square, _kinds, expected=tuple(f"net.{n}" for n in _kinds.values())),
        "branching": Case(Branching, _cut, expected=("net.yes", "net.step", "net.last")),
        "nan asserts": Case(Dit, _dit, _BY_NAME, patches={"nan_asserts": True}),
    },
}
TEMPLATES: dict[str, tuple[tuple[str, ...], Case]] = {
    "templates": (("TritonTemplate",), Case(Wide, _inputs((256, 64)), expected=("fused(up, act)", "net.down"))),
    "sum of products": (("decompose_k", "Subgraph"), Case(Deep, _inputs((32, 8192)), expected=("net.lin",))),
}
