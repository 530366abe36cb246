"""One model compiled plain and with ranges for the device that is not there; what differs or is untrue is a problem.

The witness does not ask fxnvtx: a launch that is handed a module's parameter (the same memory, or for a convolution's
weight in another layout the same unique shape) is that module's work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

import fxnvtx
from fxnvtx.compile.provenance import unknown_forms
from fxnvtx.recording import Recording

from ..compile.generated import forget_generated_code, kernel_hashes, wrapper_sources
from ..compile.launches import Launch, empty_ranges, enclosing, witness

_OURS = ("import fxnvtx", "from fxnvtx", "_fxnvtx_", "if _fxnvtx_at")
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # their statistics are taken without their parameters


@dataclass
class Case:
    """`by_name`: part of a launch's name -> the module whose work it is (a glob), where no parameter tells.
    `expected`: what must be among the innermost labels. `runs`: whether the result can be called on CPU tensors."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    by_name: dict[str, str] = field(default_factory=dict)
    patches: dict[str, Any] = field(default_factory=dict)
    grad: bool = False
    expected: tuple[str, ...] = ()
    runs: bool = True


def stripped(source: str) -> list[str]:
    """A wrapper's statements without ours, comments, indentation and numbers that count compilations."""
    lines = [re.sub(r"graph_\d+_|_(?:split|mm)_\d+", "", line.strip()) for line in source.splitlines()]
    skipped = ("", "try:", "pass", "finally:")
    return [line for line in lines if line not in skipped and not line.startswith(("#", *_OURS))]


def made(case: Case, device: str | torch.device = "cpu") -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The case's model and inputs, each time the same."""
    torch.manual_seed(0)
    return case.make().train(case.grad).to(device), tuple(x.to(device) for x in case.inputs())


def _compiled(case: Case, backend: str, device: str | torch.device) -> tuple[nn.Module, Callable[[], Any], Any]:
    torch._dynamo.reset()
    forget_generated_code()
    model, inputs = made(case, device)
    if backend == "fxnvtx":
        fxnvtx.instrument(model, "net", path="hooks")
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def once() -> Any:
        result = compiled(*inputs)
        if case.grad:
            result.sum().backward()
        return result

    return model, once, once() if case.runs else _attempt(once)


def _attempt(once: Callable[[], Any]) -> Any:
    """Compile what cannot run: only the text is looked at."""
    try:
        once()
    except NotImplementedError:
        pass
    return None


def problems(case: Case, values: bool = False, device: str | torch.device = "cpu") -> tuple[list[str], list[str]]:
    """What is wrong, and the innermost label of each launch. `values`: kernels compute, outputs are compared. `device`:
    "cpu" where Inductor is told that it is another one (device.py), else a real one."""
    found: list[str] = []
    unknown_forms.clear()
    with torch._inductor.config.patch(case.patches), torch.set_grad_enabled(case.grad):
        _, _, plain = _compiled(case, "inductor", device)
        before = [stripped(s) for s in wrapper_sources()], kernel_hashes()
        model, once, ours = _compiled(case, "fxnvtx", device)
        after = [stripped(s) for s in wrapper_sources()], kernel_hashes()
        found += ["the wrapper differs"] * (before[0] != after[0]) + ["kernels differ"] * (before[1] != after[1])
        found += [f"unknown form of line: {form}" for form in unknown_forms]
        if not case.runs:
            return found, []
        with witness() as launches, fxnvtx.record() as recording:
            again = once()
    if values:
        for one in (ours, again):
            if not all(torch.equal(a, b) for a, b in zip(_tensors(plain), _tensors(one), strict=True)):
                found.append("outputs differ")
        model_again, inputs = made(case, device)
        expected = model_again(*inputs)
        if not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(_tensors(expected), _tensors(ours), strict=True)):
            found.append("outputs are not the model's")
    untrue, labels = judged(case, model, launches, recording)
    return found + untrue, labels


def judged(case: Case, model: nn.Module, launches: list[Launch], recording: Recording) -> tuple[list[str], list[str]]:
    """What is untrue in a recording of the model as `net`, and the innermost label of each launch."""
    found: list[str] = []
    labels = []
    owners = _Owners(model)
    for index, launch in enumerate(launches):
        around = [r.label for r in enclosing(recording, launch)]
        labels.append(around[-1] if around else "")
        given = owners.fed(launch, launches[index + 1 :]) | owners.summed(launch, launches[:index])
        found += owners.judge(case, launch, around, given)
    found += [f"{r.label} is empty" for r in empty_ranges(recording, launches)]
    found += [f"{r.label}" for r in recording.ranges if "unknown" in r.label or "one of several" in r.label]
    found += [] if recording.balanced else ["not balanced"]
    found += [f"nothing is labelled {text}: {labels}" for text in case.expected if text not in labels]
    found += [] if launches else ["nothing was launched"]
    return found, labels


def _tensors(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _shape(sizes: Iterable[int]) -> tuple[int, ...]:
    """A shape in any layout."""
    return tuple(sorted(n for n in sizes if n > 1))


class _Owners:
    """The witness's own knowledge of a model: whose memory is whose."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.memory: dict[int, str] = {}
        self.shapes: dict[tuple[int, ...], set[str]] = {}
        for name, tensor in model.named_parameters():
            owner = name.rpartition(".")[0]
            self.memory[tensor.untyped_storage().data_ptr()] = owner
            if tensor.dim() > 2:
                self.shapes.setdefault(_shape(tensor.shape), set()).add(owner)

    def whose(self, launch: Launch) -> set[str]:
        found = {self.memory[s] for s in launch.storages if s in self.memory}
        for shape in launch.shapes:
            same = self.shapes.get(_shape(shape), set())
            found |= same if len(same) == 1 else set()
        return found

    def fed(self, launch: Launch, later: list[Launch]) -> set[str]:
        """The convolutions that are handed this launch's result: it may put their operand in the layout they want."""
        calls = [c for c in later if "convolution" in c.name and not _is_generated(c)]
        return {o for c in calls if c.storages & launch.storages for o in self.whose(c)}

    def summed(self, launch: Launch, earlier: list[Launch]) -> set[str]:
        """Whose product, cut into several along its inner dimension, this launch may sum up."""
        calls = [c for c in earlier if c.name == "bmm_dtype"]
        return {o for c in calls if c.storages & launch.storages for o in self.whose(c)}

    def judge(self, case: Case, launch: Launch, around: list[str], given: set[str]) -> list[str]:
        if [text for text in around if text != "backward"][:1] != ["net"]:
            return [f"{launch.name} is outside: {around}"]
        named = _named(around)
        owners = self.whose(launch)
        where = f"{launch.name} lies in {around[-1]}"
        if not _is_generated(launch):
            told = [f"net.{p}" for part, p in case.by_name.items() if part in launch.name]
            wrong = owners and named != {f"net.{o}" for o in owners}
            wrong = wrong or any(len(named) != 1 or not fnmatch(around[-1], pattern) for pattern in told)
            return [f"{where}, and is the work of {owners or told}"] if wrong else []
        left_out = [f"net.{o}" for o in owners if f"net.{o}" not in named]
        found = [f"{where}, and reads {o}'s parameters" for o in left_out[_not_shown(around[-1]) :]]
        if case.grad:
            return found
        for name in named:
            module = self.model.get_submodule(name[4:]) if name.startswith("net.") else nn.Module()
            own = [*module.parameters(recurse=False)]
            if own and not isinstance(module, _NORMS) and name[4:] not in owners | given:
                found.append(f"{where}, and reads nothing of {name}")
        return found


def _is_generated(launch: Launch) -> bool:
    return launch.name.startswith(("triton", "cpp", "multi_kernel")) or "_fused_" in launch.name


def _named(around: list[str]) -> set[str]:
    """The modules that the innermost label names."""
    label = around[-1]
    if not label.startswith("fused("):
        return {label}
    outer = around[-2]
    names = [name for name in label[6:-1].split(", ") if not name.endswith(" more")]
    return {outer if name == "self" else f"{outer}.{name}" for name in names}


def _not_shown(label: str) -> int:
    """How many modules a long label leaves out."""
    found = re.search(r", (\d+) more\)$", label)
    return int(found[1]) if found else 0
