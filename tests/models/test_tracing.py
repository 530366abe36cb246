"""What the fx path needs of the reference models: every level is straight-line, and its trace is the same function."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxnvtx.models
from fxnvtx.models import apply_lora, build, set_lora_scale

from .samples import SAMPLES, equal


@pytest.fixture(params=SAMPLES, scope="module")
def sample(request: pytest.FixtureRequest) -> Any:
    return SAMPLES[request.param]()


class OneLevel(fx.Tracer):
    """Children stay opaque."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def ours(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if type(m).__module__.startswith(fxnvtx.models.__name__)}


@torch.no_grad()
def test_the_whole_model_traces_to_the_same_function(sample: Any) -> None:
    model, args = sample
    traced = fx.symbolic_trace(model)
    assert equal(traced(*args), model(*args))
    twice = tuple(torch.cat([a, a]) for a in args)  # nothing about the sample's size was baked in
    assert equal(traced(*twice), model(*twice))


@torch.no_grad()
def test_every_level_traces_to_the_same_function(sample: Any) -> None:
    model, args = sample
    calls: dict[str, tuple[Any, Any]] = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: calls.__setitem__(name, (a, out)))
        for name, module in ours(model).items()
    ]
    model(*args)
    for handle in handles:
        handle.remove()
    assert calls.keys() == ours(model).keys()
    assert len(calls) >= 4
    for name, (inputs, output) in calls.items():
        level = model.get_submodule(name)
        traced = fx.GraphModule(level, OneLevel().trace(level))
        assert equal(traced(*inputs), output), name


@torch.no_grad()
def test_dynamo_takes_the_whole_model_as_one_graph(sample: Any) -> None:
    model, args = sample
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert equal(compiled(*args), model(*args))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dit", "vae"])
def test_dynamo_needs_one_graph_for_all_sizes(kind: str) -> None:
    model, args = SAMPLES[kind]()
    torch.compiler.reset()
    graphs: list[fx.GraphModule] = []

    def count(graph: fx.GraphModule, _: object) -> fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for copies in (5, 7):  # no other size of these samples: Dynamo takes equal sizes for the same one
        batch = tuple(torch.cat([a] * copies) for a in args)
        assert equal(compiled(*batch), model(*batch))
    assert len(graphs) == 1


@torch.no_grad()
def test_a_trace_sees_a_lora_scale_set_later() -> None:
    model, args = SAMPLES["dit"]()
    plain = model(*args)
    apply_lora(model)
    traced = fx.symbolic_trace(model)
    assert equal(traced(*args), plain)
    set_lora_scale(model, 1.0)
    assert equal(traced(*args), model(*args))
    assert not torch.allclose(traced(*args), plain)


def test_autograd_reaches_every_weight(sample: Any) -> None:
    model, args = sample
    model.zero_grad()
    output = model(*args)
    outputs = output if isinstance(output, tuple) else (output,)
    sum(o.square().sum() for o in outputs).backward()
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
    assert reached == expected
    model.zero_grad()


@torch.no_grad()
def test_bfloat16(sample: Any) -> None:
    model, args = sample
    half = copy.deepcopy(model).bfloat16()
    cast = [a.bfloat16() if a.is_floating_point() and a.dim() > 1 else a for a in args]  # timesteps stay float32
    output, exact = half(*cast), model(*args)
    first, wanted = (output[0], exact[0]) if isinstance(output, tuple) else (output, exact)
    assert first.dtype == torch.bfloat16
    assert (first.float() - wanted).norm() < 0.2 * wanted.norm()


# ------------------------------------------------------------------------------------------------ straight lines

FORBIDDEN = (
    ast.If,
    ast.IfExp,
    ast.BoolOp,
    ast.While,
    ast.Try,
    ast.With,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.Starred,
    ast.Assert,
    ast.Raise,
    ast.Global,
    ast.Import,
    ast.FunctionDef,
    ast.Is,
    ast.IsNot,
    ast.In,
)


def faults(module: nn.Module) -> list[str]:
    """What in the forward of this one module is not straight-line, in words."""
    forward = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward))).body[0]
    assert isinstance(forward, ast.FunctionDef)
    found = [type(n).__name__ for statement in forward.body for n in ast.walk(statement) if isinstance(n, FORBIDDEN)]
    for node in ast.walk(forward):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            value = getattr(module, node.attr)
            if not isinstance(value, (nn.Module, Tensor, int, float, str)):
                found.append(f"self.{node.attr} is {type(value).__name__}")
        if isinstance(node, ast.For) and not isinstance(getattr(module, ast.unparse(node.iter)[5:]), nn.ModuleList):
            found.append(f"for over {ast.unparse(node.iter)}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            loops = {
                n.target.id for n in ast.walk(forward) if isinstance(n, ast.For) and isinstance(n.target, ast.Name)
            }
            if node.func.id not in loops:
                found.append(f"calls {node.func.id}")
    if forward.args.vararg or forward.args.kwarg or forward.args.kwonlyargs:
        found.append("star arguments")
    return found


def test_every_forward_is_a_straight_line(sample: Any) -> None:
    for name, module in ours(sample[0]).items():
        assert faults(module) == [], name


def test_the_judge_of_straight_lines_sees_what_it_should() -> None:
    class Crooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = [1, 2]

        def helper(self, x: Tensor) -> Tensor:
            return x

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            if y is None:
                return self.helper(x)
            return x * len(self.table)

    seen = faults(Crooked())
    assert {"If", "Is", "calls len", "self.table is list", "self.helper is method"} <= set(seen)


def test_no_model_keeps_state_from_a_call() -> None:
    models = build()
    before = {n: dict(vars(m)) for c in models.components().values() for n, m in c.named_modules()}
    with torch.no_grad():
        models.text_encoder(models.tokenizer("x"))
    after = {n: dict(vars(m)) for c in models.components().values() for n, m in c.named_modules()}
    assert before.keys() == after.keys()
    assert all(before[n].keys() == after[n].keys() for n in before)
