"""The two pipelines by name, and one request through one of them: what the command line calls.

reference: prompt, text encoder, DiT with guidance, VAE, image. two-stage: a video at half the side, upsampled, refined
by a second DiT with its LoRA on, decoded; where its weights are kept follows from the device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..models import build as build_models
from ..models import build_video
from ..models.generate import HALO, REFINE_START
from .args import DEVICE_MODES, ServerArgs
from .executor import ComposedPipeline, PipelineExecutor
from .memory import Place, default_place
from .request import Batch, RequestMetrics, running_with
from .stages import (
    DecodingStage,
    DenoisingStage,
    LatentStage,
    LoRASwitchStage,
    TextEncodingStage,
    UpsamplingStage,
)

__all__ = [
    "MODE_VARIABLE",
    "PIPELINES",
    "RESIDENT_MIN_BYTES",
    "DeviceInfo",
    "Result",
    "build_reference",
    "build_two_stage",
    "compile_component",
    "device_mode",
    "probe_device",
    "run",
    "stays_resident",
    "two_stage_defaults",
]


# --------------------------------------------------------- the device, seen through one probe, and what follows from it


GIB = 1 << 30
# A two-stage video model with both DiTs, the text encoder and the VAE fits next to its activations from here on.
RESIDENT_MIN_BYTES = 130 * GIB
MODE_VARIABLE = "FXNVTX_TWO_STAGE_DEVICE_MODE"
AUXILIARY_FLAGS = ("text_encoder_cpu_offload", "image_encoder_cpu_offload", "vae_cpu_offload")
log = logging.getLogger("fxnvtx.pipeline")


@dataclass(frozen=True)
class DeviceInfo:
    """What is known of the compute device: its name is for the log, its memory (bytes) decides."""

    cuda: bool
    name: str
    total_bytes: int


Probe = Callable[[], DeviceInfo]


def probe_device() -> DeviceInfo:
    """The device that this process computes on."""
    if not torch.cuda.is_available():
        return DeviceInfo(False, "cpu", 0)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return DeviceInfo(True, str(properties.name), int(properties.total_memory))


def stays_resident(device: DeviceInfo) -> bool:
    """The one place that decides whether everything fits. The name takes no part: "GH200 480GB" has 96 GB, and an
    18 GB slice of an H200 is called H200 too."""
    return device.cuda and device.total_bytes >= RESIDENT_MIN_BYTES


def device_mode(args: ServerArgs, device: DeviceInfo, environment: Mapping[str, str] | None = None) -> str:
    """resident or original: the explicit argument, else the environment, else the device's memory."""
    chosen = args.two_stage_device_mode
    if not args.is_arg_explicitly_set("two_stage_device_mode"):
        variables = os.environ if environment is None else environment
        chosen = variables.get(MODE_VARIABLE, "").strip().lower() or "auto"
        if chosen not in DEVICE_MODES:
            raise ConfigError(f"{MODE_VARIABLE}={chosen} has no meaning: use {', '.join(DEVICE_MODES)}")
    if chosen != "auto":
        return chosen
    return "resident" if stays_resident(device) else "original"


def two_stage_defaults(
    args: ServerArgs,
    auxiliary: Mapping[str, str],
    probe: Probe = probe_device,
    environment: Mapping[str, str] | None = None,
) -> ServerArgs:
    """`args` with the residency defaults of a two-stage model.

    `auxiliary`: the components that are no DiTs and have a flag, and their kinds (text_encoder, image_encoder, vae).
    What was set explicitly stays as it is. The rest: in resident mode nothing is offloaded; in original mode the
    auxiliary components are offloaded layer by layer, unless their flag says otherwise, and the DiTs, which are in use
    for a whole loop, as wholes. One log line says what changed.
    """
    device = probe()
    mode = device_mode(args, device, environment)
    if args.performance_mode != "auto" and not args.is_arg_explicitly_set("two_stage_device_mode"):
        return args
    resident = mode == "resident"
    wanted: dict[str, object] = dict.fromkeys((*AUXILIARY_FLAGS, "dit_cpu_offload"), not resident)
    open_ones = [name for name, kind in auxiliary.items() if not args.is_arg_explicitly_set(f"{kind}_cpu_offload")]
    wanted["layerwise_offload_components"] = None if resident else open_ones
    changed = args.with_defaults(**wanted)
    decided = [f"{k}={getattr(changed, k)}" for k in wanted if getattr(changed, k) != getattr(args, k)]
    kept = [k for k in wanted if args.is_arg_explicitly_set(k)]
    if decided:
        size = f"{device.total_bytes / GIB:.1f} GiB" if device.cuda else "no CUDA"
        left = f"; set explicitly and kept: {', '.join(kept)}" if kept else ""
        log.info("two-stage device mode %s (%s, %s): %s%s", mode, device.name, size, ", ".join(decided), left)
    return changed


# ------------------------------------------------------------------------------------------------------------ compiling


def compile_component(pipeline: ComposedPipeline, name: str) -> None:
    """Put torch.compile(backend="fxnvtx") around a component. Compiling happens at its first call."""
    pipeline.components[name] = torch.compile(pipeline.components[name], backend="fxnvtx")
    pipeline.residency.refresh_pipeline()


# ------------------------------------------------------------------------------------------------------------ reference


def build_reference(
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


# ------------------------------------------------------------------------------------------------------------ two-stage


DITS = ("dit", "refiner")
AUXILIARY = {"text_encoder": "text_encoder", "vae": "vae"}  # component -> kind


def build_two_stage(
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

    Residency that `args` leave open follows from the device (`probe`, `environment`): see `two_stage_defaults`.
    `seed` is that of the weights. `compile`: both DiTs go through torch.compile(backend="fxnvtx").
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


# ------------------------------------------------------------------------------------------------------------ a request


PIPELINES: dict[str, Callable[..., ComposedPipeline]] = {
    "reference": build_reference,
    "two-stage": build_two_stage,
}


@dataclass
class Result:
    """What one request gave. `image`: uint8 [height, width, 3]; `video`: uint8 [frames, height, width, 3]; one is None.

    `peak_weight_bytes`: the most weight bytes in compute memory at one time; `bound_bytes`: what they stay under.
    """

    image: Tensor | None
    video: Tensor | None
    metrics: RequestMetrics
    peak_weight_bytes: int
    bound_bytes: int
    pipeline: ComposedPipeline


def run(
    name: str = "reference",
    *,
    prompt: str,
    negative_prompt: str = "",
    steps: int = 4,
    seed: int = 0,
    size: str = "tiny",
    args: ServerArgs | None = None,
    compile: bool = False,
    warmup: int = 0,
    on_step: Callable[[int, int], None] | None = None,
    pipeline: ComposedPipeline | None = None,
) -> Result:
    """Build the pipeline `name` (or take `pipeline`), run `warmup` silent requests and one that counts.

    `on_step(done, total)` is called after every denoising step of that one. Raises ConfigError for a name or value that
    has no meaning.
    """
    if name not in PIPELINES:
        raise ConfigError(f"there is no pipeline {name!r}: choose one of {', '.join(PIPELINES)}")
    built = pipeline or PIPELINES[name](args, size=size, compile=compile)
    batch = Batch(prompt=prompt, negative_prompt=negative_prompt, steps=steps, seed=seed)
    for _ in range(warmup):
        built(Batch(prompt=prompt, negative_prompt=negative_prompt, steps=1, refine_steps=1, is_warmup=True))
    total = steps + (batch.refine_steps if "refinement" in built.stages else 0)
    done = 0

    def count_step() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    with running_with(on_step=count_step):
        batch = built(batch)
    account = built.residency.account
    return Result(batch.image, batch.video, batch.metrics, account.peak_bytes, built.residency.bound_bytes, built)
