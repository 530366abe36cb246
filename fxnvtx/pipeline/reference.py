"""The `reference` pipeline: prompt, text encoder, DiT with guidance, VAE, image."""

from __future__ import annotations

from ..models import build as build_models
from .args import ServerArgs
from .compiling import compile_component
from .composed import ComposedPipeline
from .executor import PipelineExecutor
from .residency.place import Place, default_place
from .stages import DecodingStage, DenoisingStage, LatentStage, TextEncodingStage

__all__ = ["build"]


def build(
    args: ServerArgs | None = None,
    *,
    size: str = "tiny",
    seed: int = 0,
    compile: bool = False,
    executor: PipelineExecutor | None = None,
    place: Place | None = None,
) -> ComposedPipeline:
    """A pipeline whose requests (`Batch`) end with `image`, uint8 [height, width, 3].

    `seed` is that of the weights. `compile`: the DiT goes through torch.compile(backend="fxnvtx").
    """
    args = args or ServerArgs()
    place = place or default_place(args.residency_dir)
    models = build_models(size, seed)
    pipeline = ComposedPipeline(args, executor=executor, place=place)
    pipeline.name = "reference"
    pipeline.add_component("text_encoder", models.text_encoder, "text_encoder")
    pipeline.add_component("dit", models.dit, "dit")
    pipeline.add_component("vae", models.vae, "vae")
    if compile:
        compile_component(pipeline, "dit")
    side = models.size.image // models.vae.scale[0]
    channels = models.vae.latent_channels
    pipeline.add_stage("text_encoding", TextEncodingStage(models.tokenizer))
    pipeline.add_stage("latent_preparation", LatentStage((1, channels, side, side), place.device))
    pipeline.add_stage("denoising", DenoisingStage(models.scheduler))
    pipeline.add_stage("decoding", DecodingStage())
    pipeline.check(args)
    return pipeline
