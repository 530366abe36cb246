"""The work of a model's layers by another witness: torch.utils.flop_counter's own mode over the plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import flop_counter
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import fxnvtx
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


def trained_flops(model: nn.Module, run: Callable[[], Any], name: str) -> dict[str, int]:
    """The same with backward passes: every module's calls run once more, alone.

    torch's counter tells a backward operation's module by hooks on tensors, and gives many to a neighbour (a SiLU with
    millions of FLOPs). A module run by itself, on inputs that need a gradient where they did, has only its own.
    """
    calls: list[tuple[str, nn.Module, Any, Any]] = []
    own = {module: f"{name}.{path}".rstrip(".") for path, module in model.named_modules()}

    def called(module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        calls.append((own[module], module, *tree_map(_apart, (args, kwargs))))

    hooks = [module.register_forward_hook(called, with_kwargs=True) for module in own]
    run()
    for hook in hooks:
        hook.remove()
    counts: dict[str, int] = {}
    for label, module, args, kwargs in calls:
        with FlopCounterMode(display=False, custom_mapping=_CPU) as counter:
            outputs = [
                t for t in tree_leaves(module(*args, **kwargs)) if isinstance(t, torch.Tensor) and t.requires_grad
            ]
            if outputs:
                torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        counts[label] = counts.get(label, 0) + counter.get_total_flops()
    return counts


def _apart(value: Any) -> Any:
    """The same numbers in a tensor that no graph leads to."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def report_of(recording: Recording) -> Report:
    return from_recording(recording, peak=PEAKS)


def modules_with_unknown_work(recording: Recording) -> set[str]:
    """Modules whose row says that not all work inside them is known."""
    unrated = BELOW.index("unrated")
    todo, found = list(report_of(recording).root.children.values()), set()
    while todo:
        node = todo.pop()
        if node.below[unrated]:
            found.add(node.name.text)
        todo.extend(node.children.values())
    return found


def fusing_modules(recording: Recording) -> set[str]:
    """Modules right inside which a kernel has operations of several of the modules below: these read less by that."""
    found = set()
    todo = [(child, "") for child in report_of(recording).root.children.values()]
    while todo:
        node, module = todo.pop()
        if node.name.category == "op" and node.below[_FLOPS]:
            found.add(module)
        module = node.name.text if node.name.category == "module" else module
        todo.extend((child, module) for child in node.children.values())
    return found


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


WAYS = ("eager", "whole", "by block", "trained")


def compared(name: str, way: str) -> tuple[int, int, list[str]]:
    """How many layers of a model of the zoo read what torch counts; how many read less, because some of their work is
    in a kernel fused with others' or is said to be unknown; and what is wrong."""
    from . import diffusers_zoo as zoo

    torch._dynamo.reset()
    trained = way == "trained"
    root = way.replace(" ", "_")  # a name of its own: of two living models with one name nobody could say whose it is
    model, arguments = zoo.build(name)
    model.requires_grad_(trained)

    def run(call: Callable[..., Any]) -> None:
        torch.manual_seed(2)
        outputs = zoo.tensors_of(call(**arguments))
        if trained:
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])

    with torch.set_grad_enabled(trained):
        counts = (trained_flops if trained else true_flops)(model, lambda: run(model), root)
        truth = {label: flops for label, flops in counts.items() if flops}
        call: Any = fxnvtx.instrument(model, root, path="hooks")
        if way in ("whole", "trained"):
            call = torch.compile(model, backend="fxnvtx")
        elif way == "by block":
            for block in (b for child in model.children() if isinstance(child, nn.ModuleList) for b in child):
                block.compile(backend="fxnvtx")
        run(call)
        with fxnvtx.record(work=way in ("eager", "by block")):
            run(call)
        with fxnvtx.record(work=way == "eager") as recording:
            run(call)
    shown = shown_flops(recording)
    for label, flops in shown_flops(recording, backward=True).items() if trained else ():
        shown[label] = shown.get(label, 0) + flops
    labels = sorted(shown.keys() | truth.keys())
    wrong = {x: (shown.get(x, 0), truth.get(x, 0)) for x in labels if shown.get(x) != truth.get(x)}
    around = tuple(f"{module}." for module in fusing_modules(recording))
    said = modules_with_unknown_work(recording)
    less = {x for x, (ours, theirs) in wrong.items() if ours < theirs and (x.startswith(around) or x in said)}
    problems = [f"{x}: {ours}, not {theirs}" for x, (ours, theirs) in wrong.items() if x not in less]
    return len(truth) - len(less), len(less), problems
