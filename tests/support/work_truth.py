"""The work of a model's layers by another witness: torch.utils.flop_counter's own mode over the plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from fxnvtx.recording import Recording
from fxnvtx.report import Report
from fxnvtx.report.report import from_recording
from fxnvtx.report.tree import BELOW
from fxnvtx.report.work import parse_peaks

_FLOPS = BELOW.index("flops")
PEAKS = parse_peaks("fp32=1T,bf16=1T,fp64=1T,mem=1T")
# CPUs' attention has no formula in torch: it is what other devices' is
_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **more: (
        flop_counter.sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *rest, **more: (
        flop_counter.sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def true_flops(model: nn.Module, run: Callable[[], Any], name: str) -> dict[str, int]:
    """FLOPs of every module by the label that it has in a model instrumented under `name`."""
    with FlopCounterMode(display=False, custom_mapping=_CPU) as counter:
        run()
    kind = type(model).__name__
    counts = {}
    for module, flops in counter.get_flop_counts().items():
        if module == kind or module.startswith(f"{kind}."):
            counts[name + module[len(kind) :]] = sum(flops.values())
    return counts


def report_of(recording: Recording) -> Report:
    return from_recording(recording, peak=PEAKS)


def shown_flops(recording: Recording, backward: bool = False) -> dict[str, int]:
    """FLOPs of every module that has any, by label, with all inside it; in backward passes or out of them."""
    found: dict[str, int] = {}
    todo = [(child, False, frozenset[str]()) for child in report_of(recording).root.children.values()]
    while todo:
        node, inside, around = todo.pop()
        text = node.name.text
        inside = inside or text == "backward"
        flops = node.below[_FLOPS]
        if flops and node.name.category == "module" and inside == backward and text not in {*around, "backward"}:
            found[text] = found.get(text, 0) + flops
        todo.extend((child, inside, around | {text}) for child in node.children.values())
    return found
