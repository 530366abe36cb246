"""Weights that offloading moves. Without a GPU the hooks "move" from cpu to cpu:0, where and when they would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate: pip install fxnvtx[diffusers]")
pytest.importorskip("diffusers", reason="needs diffusers: pip install fxnvtx[diffusers]")

from fxnvtx.integrations import diffusers as fx
from fxnvtx.integrations.diffusers.wrappers import nbytes
from fxnvtx.recording import Node, Recording

from .asking import build, every, parents, recorded, same


def size(component: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*component.parameters(), *component.buffers()])


def moves(recording: Recording) -> list[Node]:
    return [node for node in every(recording) if node.category == "residency"]


def test_whole_components_also_in_the_next_request() -> None:
    pipe, ask = build("LTXPipeline")
    plain = ask()
    pipe.enable_model_cpu_offload(device="cpu")
    fx.instrument(pipe)
    for _ in range(2):  # maybe_free_model_hooks() has made new hooks in between
        made: list[Any] = []
        recording = recorded(lambda: made.extend(ask()))  # noqa: B023
        assert same(plain, made)
        assert recording.balanced
        found = moves(recording)
        names = list(dict.fromkeys(n.label for n in found))
        assert names == ["residency.load text_encoder", "residency.load transformer", "residency.load vae"]
        sizes = {n.label.rpartition(" ")[2]: n.payload for n in found}
        assert sizes == {name: size(getattr(pipe, name)) for name in ("text_encoder", "transformer", "vae")}
        (root,) = recording.tree()
        above = parents(root)
        for node in root.walk():
            if node.label == "residency.load vae":
                assert above[id(node)].label == "vae.decode"
            if node.label == "residency.load text_encoder":
                assert above[id(node)].label == "text_encoder"


def test_offloading_enabled_after_instrument() -> None:
    pipe, ask = build("LTXPipeline")
    fx.instrument(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert moves(recorded(ask))


def test_groups_of_blocks() -> None:
    pipe, ask = build("LTXPipeline")
    plain = ask()
    device = torch.device("cpu")
    pipe.transformer.enable_group_offload(
        onload_device=device, offload_device=device, offload_type="block_level", num_blocks_per_group=1
    )
    fx.instrument(pipe)
    made: list[Any] = []
    recording = recorded(lambda: made.extend(ask()))
    assert same(plain, made)
    assert recording.balanced
    found = moves(recording)
    block = [n for n in found if n.label.endswith(" transformer.transformer_blocks.0")]
    assert [n.label.partition(" ")[0] for n in block[:2]] == ["residency.load", "residency.offload"]
    assert {n.payload for n in block} == {size(pipe.transformer.transformer_blocks[0])}
    (root,) = recording.tree()
    above = parents(root)
    for node in root.walk():
        if node.category == "residency" and node.label.endswith("transformer_blocks.0"):
            assert above[id(node)].label == "transformer.transformer_blocks.0"


def test_groups_of_leaves_are_named_in_full() -> None:
    pipe, ask = build("FluxPipeline")
    device = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=device, offload_device=device, offload_type="leaf_level")
    fx.instrument(pipe)
    names = {n.label for n in moves(recorded(lambda: ask(num_inference_steps=1)))}
    assert "residency.load transformer.transformer_blocks.0.attn.to_q" in names
    assert "residency.offload transformer.transformer_blocks.0.attn.to_q" in names


def test_layer_by_layer_as_accelerate_does_it() -> None:
    """What enable_sequential_cpu_offload puts on every component; it asks for a GPU, its hooks do not."""
    import accelerate

    pipe, ask = build("FluxPipeline")
    plain = ask()
    layer = size(pipe.transformer.transformer_blocks[0].attn.to_q)
    for component in (pipe.vae, pipe.transformer):
        accelerate.cpu_offload(component, execution_device=torch.device("cpu"))
    fx.instrument(pipe)
    made: list[Any] = []
    recording = recorded(lambda: made.extend(ask()))
    assert same(plain, made)
    assert recording.balanced
    name = "transformer.transformer_blocks.0.attn.to_q"
    found = [n for n in moves(recording) if n.label.endswith(f" {name}")]
    assert [n.label.partition(" ")[0] for n in found[:2]] == ["residency.load", "residency.offload"]
    assert {n.payload for n in found} == {layer}
    (root,) = recording.tree()
    above = parents(root)
    assert all(above[id(n)].label == name for n in root.walk() if n.label.endswith(f" {name}"))


def test_a_pipeline_that_is_not_instrumented_shows_nothing() -> None:
    pipe, _ = build("FluxPipeline")
    other, ask = build("LTXPipeline")
    other.enable_model_cpu_offload(device="cpu")
    fx.instrument(pipe)
    assert recorded(ask).ranges == []


def test_classes_are_given_back() -> None:
    import accelerate.hooks as hooks
    from diffusers.hooks.group_offloading import ModuleGroup

    methods = [(hooks.CpuOffload, "pre_forward"), (hooks.UserCpuOffloadHook, "offload"), (ModuleGroup, "onload_")]
    before = [vars(kind)[name] for kind, name in methods]
    pipes = [build("FluxPipeline")[0], build("DiTPipeline")[0]]
    for pipe in pipes:
        fx.instrument(pipe)
    assert all(vars(k)[n] is not b for (k, n), b in zip(methods, before, strict=True))
    fx.uninstrument(pipes[0])
    assert all(vars(k)[n] is not b for (k, n), b in zip(methods, before, strict=True))
    fx.uninstrument(pipes[1])
    assert [vars(kind)[name] for kind, name in methods] == before


def test_a_component_that_is_offloaded_by_hand() -> None:
    from accelerate import cpu_offload_with_hook

    pipe, _ = build("LTXPipeline")
    _, hook = cpu_offload_with_hook(pipe.text_encoder, torch.device("cpu:0"))
    fx.instrument(pipe)
    (node,) = recorded(hook.offload).tree()
    assert (node.label, node.payload) == ("residency.offload text_encoder", size(pipe.text_encoder))


def test_bytes_count_a_tied_tensor_once() -> None:
    tensor = torch.zeros(3, 5, dtype=torch.float16)
    assert nbytes([tensor, tensor, torch.zeros(2)]) == 3 * 5 * 2 + 8
