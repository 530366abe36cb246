"""Six pipelines of diffusers: the same pictures to the bit, and a tree that is the pipeline's structure."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install fxnvtx[diffusers]")

from fxnvtx import record
from fxnvtx.integrations import diffusers as fx
from fxnvtx.integrations.tiny import TINY

from .asking import STEPS, build, every, labels, only, parents, recorded, same, traces

NAMES = list(TINY)


@pytest.mark.parametrize("name", NAMES)
def test_a_request(name: str) -> None:
    pipe, ask = build(name)
    plain = ask()
    before = traces(pipe, values=False)
    assert fx.instrument(pipe) is pipe
    with record() as recording:
        watched = ask()
    assert same(plain, watched)
    assert recording.balanced
    assert same(plain, ask())  # nobody listens

    (root,) = recording.tree()
    assert (root.label, root.category, root.payload) == ("request#1", "request", name)
    loop = only(recording, "denoising_loop")
    assert loop in root.children
    assert (loop.category, loop.payload) == ("loop", STEPS)
    assert [s.payload for s in loop.children] == list(range(STEPS))
    for index, step in enumerate(loop.children):
        assert step.category == "step"
        assert step.label.startswith(f"denoising_step_{index}_t")
        kinds = [child.label.partition(".")[0] for child in step.children]
        assert kinds.count("scheduler_step") == (2 if name == "LTX2Pipeline" else 1)
        assert set(kinds) == {"predict_noise", "scheduler_step"}
    decode = only(recording, "vae.decode")
    assert decode.category == "stage"
    assert "vae.decoder" in labels(decode.children)

    # every layer lies inside its parent, and the outermost ones inside a stage or a pass
    above = parents(root)
    modules = [node for node in root.walk() if node.category == "module"]
    assert len(modules) > 50
    for node in modules:
        outer = above[id(node)]
        if outer.category == "module":
            assert node.label.startswith(outer.label + ".")
        else:
            component = node.label.partition(".")[0]
            assert component in vars(pipe)
            if component.startswith("transformer"):
                assert node.label == component
                assert outer.label.startswith("predict_noise")

    assert fx.uninstrument(pipe) is pipe
    assert traces(pipe, values=False) == before
    with record() as silent:
        assert same(plain, ask())
    assert silent.ranges == []


def test_timesteps_are_those_of_the_scheduler() -> None:
    pipe, ask = build("FluxPipeline")
    fx.instrument(pipe)
    recording = recorded(lambda: ask(num_inference_steps=3))
    given = [float(t) for t in pipe.scheduler.timesteps]
    shown = [float(s.label.rpartition("_t")[2]) for s in only(recording, "denoising_loop").children]
    assert shown == pytest.approx(given, rel=1e-3)
    assert len(set(shown)) == 3


def test_layers_are_named_from_their_component() -> None:
    pipe, ask = build("FluxPipeline")
    fx.instrument(pipe)
    found = {node.label for node in every(recorded(ask))}
    assert "transformer.transformer_blocks.0.attn.to_q" in found
    assert "vae.decoder.up_blocks.0.resnets.0.conv1" in found


def test_the_prompt_is_encoded_in_a_stage_of_its_own() -> None:
    pipe, ask = build("LTXPipeline")
    fx.instrument(pipe)
    (root,) = recorded(ask).tree()
    assert labels(root.children) == ["encode_prompt", "prepare_latents", "denoising_loop", "vae.decode"]
    encode = root.children[0]
    assert labels(encode.children) == ["text_encoder", "text_encoder"]  # the prompt, and the one to stay away from


def test_passes_of_guidance_are_told_apart() -> None:
    pipe, ask = build("WanPipeline")
    fx.instrument(pipe)
    loop = only(recorded(lambda: ask(num_inference_steps=4)), "denoising_loop")
    for step in loop.children:
        assert labels(step.children) == ["predict_noise.conditional", "predict_noise.unconditional", "scheduler_step"]
    experts = [labels(step.children[0].children) for step in loop.children]
    assert ["transformer"] in experts
    assert ["transformer_2"] in experts


def test_the_copied_scheduler_of_ltx2_steps_in_ranges_and_its_class_is_left_alone() -> None:
    pipe, ask = build("LTX2Pipeline")
    kind = type(pipe.scheduler)
    fx.instrument(pipe)
    assert type(pipe.scheduler) is kind
    steps = [n for n in every(recorded(ask)) if n.label == "scheduler_step"]
    assert len(steps) == 2 * STEPS


def test_requests_are_counted() -> None:
    pipe, ask = build("FluxPipeline")
    fx.instrument(pipe)
    ask()  # nobody listens: not counted
    recording = recorded(lambda: (ask(), ask()))
    assert labels(recording.tree()) == ["request#1", "request#2"]


def test_depth_and_layers() -> None:
    pipe, ask = build("FluxPipeline")
    fx.instrument(pipe, depth=1)
    found = [n.label for n in every(recorded(ask)) if n.category == "module"]
    assert "transformer.transformer_blocks.0" in found
    assert "transformer.transformer_blocks.0.attn" not in found
    fx.instrument(pipe, layers=False)
    recording = recorded(ask)
    assert [n.label for n in every(recording) if n.category == "module"] == []
    assert only(recording, "denoising_loop")
    assert only(recording, "vae.decode")


def test_paths_show_the_same_tree() -> None:
    trees = []
    for path in ("auto", "hooks"):
        pipe, ask = build("StableDiffusion3Pipeline")
        fx.instrument(pipe, path=path)
        trees.append([(r.label, r.depth) for r in recorded(ask).ranges])
    assert trees[0] == trees[1]


def test_shapes_become_marks() -> None:
    pipe, ask = build("FluxPipeline")
    fx.instrument(pipe, shapes=True)
    marks = [m.label for m in recorded(ask).marks]
    assert any(m.startswith("transformer in=[[1, ") for m in marks)


def test_under_inference_mode() -> None:
    pipe, ask = build("FluxPipeline")
    plain = ask()
    fx.instrument(pipe)
    with torch.inference_mode(), record() as recording:
        watched = ask()
    assert same(plain, [t.clone() for t in watched])
    assert recording.balanced
