"""The two pipelines, end to end: the same pixels in every way of keeping weights, and the tree of it."""

from functools import cache
from typing import Any

import pytest
import torch

import fxnvtx
from fxnvtx.errors import ConfigError
from fxnvtx.models import DiT, build_video, generate, generate_video
from fxnvtx.models import build as build_models
from fxnvtx.pipeline import PIPELINES, Batch, ServerArgs, pipelines, run
from fxnvtx.pipeline.args import RESIDENCY_MODES
from fxnvtx.pipeline.pipelines import DeviceInfo
from fxnvtx.report import from_recording

from .nets import LAYERS, STAGES, labels, weight_bytes

DITS = ("dit", "refiner")


@cache
def image():
    return generate("a fox", 2, 0)


@cache
def video():
    return generate_video("a fox", 2, 0)


def components(pipeline):
    return {"reference": ("text_encoder", "dit", "vae")}.get(pipeline, ("text_encoder", *DITS, "upsampler", "vae"))


def everywhere(mode, pipeline="reference"):
    return dict.fromkeys(components(pipeline), mode)


def pixels(result):
    return result.image if result.image is not None else result.video


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("mode", RESIDENCY_MODES)
@pytest.mark.parametrize("args", [ServerArgs(), LAYERS])
def test_the_pixels_are_the_same_to_the_bit_and_the_weights_within_the_bound(name, mode, args):
    wanted = image() if name == "reference" else video()
    seen = run(name, prompt="a fox", steps=2, args=args.with_values(residency=everywhere(mode, name)))
    assert torch.equal(pixels(seen), wanted)
    models = (build_models if name == "reference" else build_video)().components()
    sizes = {n: weight_bytes(m) for n, m in models.items()}
    assert seen.peak_weight_bytes <= seen.bound_bytes
    if mode == "resident":
        assert seen.bound_bytes == sum(sizes.values())
        assert seen.pipeline.residency.account.resident_bytes == sum(sizes.values())
        return
    if mode == "layerwise-offload":
        assert seen.bound_bytes <= max(sizes.values())  # the smallest DiT has only two blocks
    else:
        assert seen.bound_bytes == max(sizes.values())
    assert seen.pipeline.residency.account.resident_bytes == 0
    assert not weight_bytes(*(m for m in seen.pipeline.components.values()))


def deep_dit(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DiT(channels=4, dim=64, depth=8, heads=4, text_dim=32).eval()


@pytest.mark.slow
def test_layerwise_offload_holds_two_blocks_of_a_deep_dit_and_what_is_outside_them():
    pipeline = pipelines.build_reference(
        ServerArgs(residency={**everywhere("component-offload"), "dit": "layerwise-offload"})
    )
    dit = pipeline.components["dit"] = deep_dit()
    block, total = weight_bytes(dit.blocks[0]), weight_bytes(dit)
    bound = total - 8 * block + 2 * block
    peaks = []
    for module in dit.blocks:
        module.register_forward_hook(lambda *_: peaks.append(pipeline.residency.account.of("dit")))
    offloaded = pipeline(Batch(prompt="a fox", steps=2)).image
    assert len(peaks) == 4 * 8
    assert max(peaks) <= bound < total / 2
    assert pipeline.residency.account.peak_bytes <= pipeline.residency.bound_bytes == bound
    whole = pipelines.build_reference()
    whole.components["dit"] = deep_dit()
    assert torch.equal(whole(Batch(prompt="a fox", steps=2)).image, offloaded)


@pytest.mark.slow
def test_one_request_after_the_other_in_changing_modes():
    pipeline = pipelines.build_reference()
    for mode in (*RESIDENCY_MODES, *reversed(RESIDENCY_MODES)):
        batch = pipeline(Batch(prompt="a fox", steps=2), LAYERS.with_values(residency=everywhere(mode)))
        assert torch.equal(batch.image, image()), mode


def test_the_tree_of_one_image():
    with fxnvtx.record() as recording:
        run("reference", prompt="a fox", steps=2, args=LAYERS)
    assert recording.balanced
    (request,) = recording.tree()
    assert (request.label, request.category) == ("request#0", "request")
    stages = ["stage_text_encoding", "stage_latent_preparation", "stage_denoising", "stage_decoding"]
    assert [s.label for s in request.children] == stages
    (loop,) = request.children[2].children
    assert (loop.label, loop.payload) == ("denoising_loop", 2)
    assert [s.label for s in loop.children] == ["denoising_step_0_t1000", "denoising_step_1_t750"]
    for step in loop.children:
        predict, scheduler = step.children
        assert (predict.label, predict.payload) == ("predict_noise", 2)
        assert scheduler.label == "scheduler_step"
        passes = predict.children
        assert [p.label for p in passes] == ["predict_noise.conditional", "predict_noise.unconditional"]
        for guided in passes:
            (dit,) = guided.children
            assert dit.label == "denoising.dit"
            assert "denoising.dit.blocks.1" in [c.label for c in dit.children]
    (vae,) = request.children[3].children
    assert vae.label == "decoding.vae"


def test_the_tree_of_one_video():
    with fxnvtx.record() as recording:
        result = run("two-stage", prompt="a fox", steps=2, args=STAGES)
    assert recording.balanced
    stages = [
        "text_encoding",
        "latent_preparation",
        "denoising",
        "upsampling",
        "lora_on",
        "refinement",
        "lora_off",
        "decoding",
    ]
    assert labels(recording, "stage") == [f"stage_{name}" for name in stages]
    assert [s.range for s in result.metrics.stages.values()] == labels(recording, "stage")
    names = [s.name for s in result.metrics.stages.values()]
    assert {"denoising", "refinement", "lora_on", "lora_off"} <= set(names)
    assert len(set(names)) == len(stages)
    steps = labels(recording, "step")
    assert [s.range for s in result.metrics.steps] == [x for x in steps if x.startswith("denoising_step")]
    assert [s.stage for s in result.metrics.steps] == ["denoising"] * 2 + ["refinement"] * 2
    tiles = [x for x in labels(recording) if x.startswith("vae_tile")]
    assert len(tiles) == len(set(tiles)) > 1
    assert not labels(recording, "module")


def test_two_lora_switches_are_two_rows_in_ranges_figures_and_report():
    with fxnvtx.record() as recording:
        result = run("two-stage", prompt="a fox", steps=1, args=STAGES)
    switches = ["stage_lora_on", "stage_lora_off"]
    assert [x for x in labels(recording, "stage") if "lora" in x] == switches
    assert [(s.name, s.range) for s in result.metrics.stages.values() if "lora" in s.range] == [
        ("lora_on", "stage_lora_on"),
        ("lora_off", "stage_lora_off"),
    ]
    rows = {row.name: row.calls for row in from_recording(recording).rows(by="stage")}
    assert [rows[name] for name in switches] == [1, 1]
    assert rows.keys() >= {s.range for s in result.metrics.stages.values()}


@pytest.mark.slow
def test_tiles_of_the_vae_hold_their_own_layers():
    with fxnvtx.record() as recording:
        run("two-stage", prompt="a fox", steps=1, args=LAYERS)
    tiles = [n for root in recording.tree() for n in root.walk() if n.label.startswith("vae_tile")]
    for tile in tiles:
        (vae,) = tile.children
        assert vae.label == "decoding.vae"
        assert any(n.label == "decoding.vae.decoder.conv_out" for n in vae.walk())


@pytest.mark.slow
def test_the_lora_is_on_while_refining_and_off_after():
    pipeline = pipelines.build_two_stage()
    scales = []

    def note(module, _):
        scales.append(float(module.scale))

    pipeline.residency.bring_back("refiner")
    adapter = next(m for m in pipeline.components["refiner"].modules() if type(m).__name__ == "LoRALinear")
    adapter.register_forward_pre_hook(note)
    for _ in range(2):
        pipeline(Batch(prompt="a fox", steps=1))
    assert scales == [1.0] * 4
    pipeline.residency.bring_back("refiner")
    assert float(adapter.scale) == 0.0


@pytest.mark.slow
def test_guidance_in_an_interval_shows_which_steps_paid():
    with fxnvtx.record() as recording:
        result = run("reference", prompt="a fox", steps=4, args=STAGES.with_values(guidance_interval=(1, 2)))
    predicted = [n for root in recording.tree() for n in root.walk() if n.label == "predict_noise"]
    assert [n.payload for n in predicted] == [1, 2, 2, 1]
    assert [len(n.children) for n in predicted] == [1, 2, 2, 1]
    plain = run("reference", prompt="a fox", steps=4).image
    assert result.image is not None
    assert plain is not None
    assert not torch.equal(result.image, plain)


def test_windows_of_steps_show_layers_only_there():
    with fxnvtx.record() as recording:
        run("reference", prompt="a fox", steps=4, args=LAYERS.with_values(nvtx_steps="1,3"))
    steps = [n for root in recording.tree() for n in root.walk() if n.label.startswith("denoising_step")]
    shown = [sum(n.label == "denoising.dit.final_layer" for n in step.walk()) for step in steps]
    assert shown == [0, 2, 0, 2]
    assert "decoding.vae.decoder" in labels(recording)


def test_a_lower_precision_for_one_stage_leaves_the_weights_as_they_are():
    pipeline = pipelines.build_reference()
    denoising: Any = pipeline.stages["denoising"]
    denoising.dtype = torch.bfloat16
    low = pipeline(Batch(prompt="a fox", steps=2)).image
    assert not torch.equal(low, image())
    denoising.dtype = None
    assert torch.equal(pipeline(Batch(prompt="a fox", steps=2)).image, image())


def test_groups_give_the_images_of_their_requests():
    pipeline = pipelines.build_reference(STAGES)
    seeds = [0, 1, 0]
    with fxnvtx.record() as recording:
        done = pipeline.run_grouped([Batch(prompt="a fox", steps=2, seed=s) for s in seeds])
    assert torch.equal(done[0].image, image())
    assert torch.equal(done[2].image, image())
    assert torch.equal(done[1].image, generate("a fox", 2, 1))
    assert labels(recording).count("encode_prompt") == 1  # one prompt, encoded once
    assert labels(recording).count("denoising_loop") == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_warmup_is_silent_and_changes_nothing(name):
    with fxnvtx.record() as recording:
        pipeline = PIPELINES[name](LAYERS)
        pipeline(Batch(prompt="a cat", steps=1, is_warmup=True))
    assert recording.ranges == []
    done = pipeline(Batch(prompt="a fox", steps=2))
    assert torch.equal(
        done.image if done.image is not None else done.video, image() if name == "reference" else video()
    )


def test_progress():
    told = []
    run("two-stage", prompt="a fox", steps=3, on_step=lambda done, total: told.append((done, total)), warmup=1)
    assert told == [(n, 5) for n in range(1, 6)]


def test_residency_follows_the_device():
    big = DeviceInfo(True, "NVIDIA H200", 141 << 30)
    assert pipelines.build_two_stage(probe=lambda: big, environment={}).residency.account.resident_bytes > 0
    small = pipelines.build_two_stage(probe=lambda: DeviceInfo(False, "cpu", 0), environment={})
    assert small.args.layerwise_offload_components == list(pipelines.AUXILIARY)
    assert small.residency.account.of("dit") == small.residency.account.of("vae") == 0


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match="reference, two-stage"):
        run("three-stage", prompt="")
    with pytest.raises(ConfigError, match="'refiner', which is none of the components"):
        run("reference", prompt="", args=ServerArgs(residency={"refiner": "resident"}))
    with pytest.raises(ConfigError, match="no model size"):
        run("reference", prompt="", size="huge")
