"""The `two-stage` pipeline: a video at half the side, upsampled, refined by a second DiT with its LoRA on, decoded."""

from __future__ import annotations

from collections.abc import Mapping

from ..models import build_video
from ..models.generate import HALO, REFINE_START
from .args import ServerArgs
from .compiling import compile_component
from .composed import ComposedPipeline
from .device import Probe, probe_device, two_stage_defaults
from .executor import PipelineExecutor
from .residency.place import Place, default_place
from .stages import (
    DecodingStage,
    DenoisingStage,
    LatentStage,
    LoRASwitchStage,
    TextEncodingStage,
    UpsamplingStage,
)

__all__ = ["build"]

DITS = ("dit", "refiner")
AUXILIARY = {"text_encoder": "text_encoder", "vae": "vae"}  # component -> kind


def build(
    args: ServerArgs | None = None,
    *,
    size: str = "tiny",
    seed: int = 0,
    compile: bool = False,
    executor: PipelineExecutor | None = None,
    place: Place | None = None,
    probe: Probe = probe_device,
    environment: Mapping[str, str] | None = None,
) -> ComposedPipeline:
    """A pipeline whose requests (`Batch`) end with `video`, uint8 [frames, height, width, 3].

    Residency that `args` leave open follows from the device (`probe`, `environment`): see device.py. `seed` is that of
    the weights. `compile`: both DiTs go through torch.compile(backend="fxnvtx").
    """
    args = two_stage_defaults(args or ServerArgs(), AUXILIARY, probe, environment)
    place = place or default_place(args.residency_dir)
    models = build_video(size, seed)
    pipeline = ComposedPipeline(args, executor=executor, place=place)
    pipeline.name = "two-stage"
    pipeline.add_component("text_encoder", models.text_encoder, "text_encoder")
    pipeline.add_component("dit", models.dit, "dit")
    pipeline.add_component("upsampler", models.upsampler, "other")
    pipeline.add_component("refiner", models.refiner, "dit")
    pipeline.add_component("vae", models.vae, "vae")
    if compile:
        for name in DITS:
            compile_component(pipeline, name)
    frames, side = models.size.video
    time, space = frames // models.vae.scale[0], side // models.vae.scale[1] // 2
    shape = (1, models.vae.latent_channels, time, space, space)
    pipeline.add_stage("text_encoding", TextEncodingStage(models.tokenizer))
    pipeline.add_stage("latent_preparation", LatentStage(shape, place.device))
    pipeline.add_stage("denoising", DenoisingStage(models.scheduler))
    pipeline.add_stage("upsampling", UpsamplingStage())
    pipeline.add_stage("lora_on", LoRASwitchStage("refiner", 1.0))
    pipeline.add_stage("refinement", DenoisingStage(models.scheduler, "refiner", start=REFINE_START, guided=False))
    pipeline.add_stage("lora_off", LoRASwitchStage("refiner", 0.0))
    pipeline.add_stage("decoding", DecodingStage(tile=models.size.tile, halo=HALO))
    pipeline.check(args)
    return pipeline
