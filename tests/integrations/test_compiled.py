"""torch.compile and an instrumented pipeline: as many graphs as without, the same result, layers named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install fxnvtx[diffusers]")

from fxnvtx import record
from fxnvtx.integrations import diffusers as fx
from fxnvtx.integrations import diffusers as ours
from fxnvtx.integrations.diffusers import registry
from fxnvtx.integrations.diffusers.thread_state import find

from .asking import STEPS, build, every, labels, only, same


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A Dynamo backend that runs graphs as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        return graph.forward


def compiled(how: str, pipe: Any, backend: Any) -> None:
    if how == "in place":
        pipe.transformer.compile(backend=backend)
    elif how == "wrapped":
        pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    elif how == "blocks":
        pipe.transformer.compile_repeated_blocks(backend=backend)
    else:
        pipe.vae.decode = torch.compile(pipe.vae.decode, backend=backend)


@pytest.mark.parametrize("order", ["instrument first", "compile first"])
@pytest.mark.parametrize("how", ["in place", "wrapped", "blocks", "decode"])
def test_graphs_are_as_many_as_without(how: str, order: str) -> None:
    made, graphs = [], []
    for watched in (False, True):
        torch._dynamo.reset()
        backend = Counting()
        pipe, ask = build("FluxPipeline")
        if watched and order == "instrument first":
            fx.instrument(pipe)
        compiled(how, pipe, backend)
        if watched and order == "compile first":
            fx.instrument(pipe)
        if watched:
            with record() as recording:
                made.append(ask())
            assert recording.balanced
        else:
            made.append(ask())
        graphs.append(backend.graphs)
    assert same(made[0], made[1])
    assert graphs[0] == graphs[1] > 0
    loop = only(recording, "denoising_loop")
    assert [labels(s.children) for s in loop.children] == [["predict_noise.conditional", "scheduler_step"]] * STEPS
    assert labels(recording.tree()[0].children)[-1] == "vae.decode"
    for step in loop.children:
        if how in ("blocks", "decode", "in place"):
            assert labels(step.children[0].children) == ["transformer"]
    fx.uninstrument(pipe)


@pytest.mark.slow
def test_a_denoiser_compiled_with_its_layers_named() -> None:
    pipe, ask = build("FluxPipeline")
    fx.instrument(pipe)
    pipe.transformer.compile(backend="fxnvtx")
    plain = ask()
    with record() as recording:
        watched = ask()
    assert same(plain, watched)
    assert recording.balanced
    for step in only(recording, "denoising_loop").children:
        found = [n.label for n in step.walk()]
        assert found.count("transformer") == 1
        assert "transformer.transformer_blocks.0.attn.to_q" in " ".join(found)
    assert any(n.label.startswith("transformer.single_transformer_blocks.0") for n in every(recording))


def test_blocks_that_torch_compile_wrapped_are_known_by_their_own_paths() -> None:
    pipe, _ = build("FluxPipeline")
    model = pipe.transformer
    for index, block in enumerate(model.transformer_blocks):
        model.transformer_blocks[index] = torch.compile(block, backend="eager")
    assert registry.applicable("transformer_blocks.0.attn", "transformer", model) == ["transformer_blocks.0.attn"]
    fx.instrument(pipe)
    bound = find(model)
    assert bound is not None
    paths = {path for _, path in bound.paths.values()}
    assert "transformer_blocks.0.attn" in paths
    assert not any("_orig_mod" in path for path in paths)
    assert not ours._altered(model, bound)
    model.transformer_blocks[0] = torch.compile(type(model)(**model.config).transformer_blocks[0], backend="eager")
    assert ours._altered(model, bound)
