"""Reference models: ordinary PyTorch, random weights from a seed, traceable by torch.fx whole and level by level."""

from .build import ImageModels, VideoModels, build, build_video
from .dit import DiT, DiTBlock
from .generate import denoise, generate, generate_video, noise, to_uint8
from .image import write_apng, write_png
from .layers import MLP, Attention
from .lora import LoRALinear, apply_lora, merge_lora, remove_lora, set_lora_scale, unmerge_lora
from .scheduler import FlowMatchEulerScheduler
from .sizes import SIZES, ModelSize
from .text import ByteTokenizer, TextEncoder
from .tiles import Tile, join_tiles, plan_tiles
from .upsampler import LatentUpsampler
from .vae import VAE
from .video_vae import VideoVAE

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
