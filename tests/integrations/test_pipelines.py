"""Six pipelines of diffusers: the same pictures to the bit, and a tree that is the pipeline's structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install fxnvtx[diffusers]")

import diffusers

from fxnvtx import record
from fxnvtx.integrations import diffusers as fx
from fxnvtx.models.tiny_diffusers import TINY

from .asking import STEPS, build, every, labels, only, parents, recorded, same, traces

NAMES = list(TINY)


@pytest.mark.slow
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


def test_an_image_to_image_request_goes_through_the_last_timesteps() -> None:
    flux, _ = build("FluxPipeline")
    shared = {k: v for k, v in flux.components.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = diffusers.FluxImg2ImgPipeline(**shared)
    pipe.set_progress_bar_config(disable=True)
    fx.instrument(pipe)
    _, arguments = TINY["FluxPipeline"]()
    recording = recorded(
        lambda: pipe(**arguments, image=torch.rand(1, 3, 16, 16), num_inference_steps=4, strength=0.5, output_type="pt")
    )
    assert labels(only(recording, "denoising_loop").children) == ["denoising_step_0_t500", "denoising_step_1_t250"]
    assert labels(only(recording, "prepare_latents").children) == ["vae.encode"]


def stable_diffusion(scheduler: Any) -> Any:
    """The older kind: a UNet, guidance in one batch, a CLIP text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    ltx, _ = build("LTXPipeline")
    dit, _ = build("DiTPipeline")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    words = CLIPTextConfig(
        vocab_size=98,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=1,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=dit.vae,
        unet=unet.eval(),
        text_encoder=CLIPTextModel(words).eval(),
        tokenizer=ltx.tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scheduler_that_evaluates_twice_a_step() -> None:
    pipe = stable_diffusion(diffusers.HeunDiscreteScheduler(steps_offset=1))
    fx.instrument(pipe)
    loop = only(
        recorded(lambda: pipe("a fox", num_inference_steps=3, height=16, width=16, output_type="pt")), "denoising_loop"
    )
    one = ["predict_noise", "scheduler_step"]
    assert [labels(step.children) for step in loop.children] == [one * 2, one * 2, one]
    assert labels(loop.children) == [f"denoising_step_{i}" for i in range(3)]  # each has two timesteps
    for step in loop.children:
        assert all(labels(c.children) == ["unet"] for c in step.children if c.label == "predict_noise")


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
