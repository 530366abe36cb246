"""Reference models: ordinary PyTorch, random weights from a seed, traceable by torch.fx whole and level by level."""

from .build import SIZES, FlowMatchEulerScheduler, ImageModels, ModelSize, VideoModels, build, build_video
from .dit import MLP, Attention, ByteTokenizer, DiT, DiTBlock, TextEncoder
from .generate import (
    Tile,
    denoise,
    generate,
    generate_video,
    join_tiles,
    noise,
    plan_tiles,
    to_uint8,
    write_apng,
    write_png,
)
from .lora import LoRALinear, apply_lora, merge_lora, remove_lora, set_lora_scale, unmerge_lora
from .vae import VAE, LatentUpsampler, VideoVAE

__all__ = [
    "MLP",
    "SIZES",
    "VAE",
    "Attention",
    "ByteTokenizer",
    "DiT",
    "DiTBlock",
    "FlowMatchEulerScheduler",
    "ImageModels",
    "LatentUpsampler",
    "LoRALinear",
    "ModelSize",
    "TextEncoder",
    "Tile",
    "VideoModels",
    "VideoVAE",
    "apply_lora",
    "build",
    "build_video",
    "denoise",
    "generate",
    "generate_video",
    "join_tiles",
    "merge_lora",
    "noise",
    "plan_tiles",
    "remove_lora",
    "set_lora_scale",
    "to_uint8",
    "unmerge_lora",
    "write_apng",
    "write_png",
]
