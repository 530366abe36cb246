"""The stages of the reference pipelines."""

from .decoding import DecodingStage
from .denoising import DenoisingStage
from .latents import LatentStage
from .lora import LoRASwitchStage
from .text import TextEncodingStage
from .upsampling import UpsamplingStage

__all__ = [
    "DecodingStage",
    "DenoisingStage",
    "LatentStage",
    "LoRASwitchStage",
    "TextEncodingStage",
    "UpsamplingStage",
]
