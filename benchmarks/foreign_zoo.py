"""Models that are not diffusers', each from its own repository, tiny and with random weights.

FXNVTX_FOREIGN names a folder with checkouts (facebookresearch/DiT as DiT, openai/guided-diffusion,
facebookresearch/flow_matching, hpcaitech/Open-Sora) and, in `packages`, timm, einops, denoising_diffusion_pytorch and
what they want (pip install --no-deps --target). One model per process: two checkouts have a module `models`, and these
packages must not be seen by others.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, dict[str, Any]]
MODELS: dict[str, Callable[[], Built]] = {}
r = torch.randn


def model(function: Callable[[], Built]) -> Callable[[], Built]:
    MODELS[function.__name__] = function
    return function


def build(name: str) -> Built:
    """(model in eval mode, keyword arguments for one call). Weights that start at zero are made random."""
    packages = str(Path(os.environ["FXNVTX_FOREIGN"], "packages"))
    if packages not in sys.path:
        sys.path.append(packages)
    torch.manual_seed(0)
    made, arguments = MODELS[name]()
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return made.eval(), arguments


def _from(folder: str, module: str) -> Any:
    place = str(Path(os.environ["FXNVTX_FOREIGN"]) / folder)
    if place not in sys.path:
        sys.path.insert(0, place)
    return importlib.import_module(module)


@model
def dit_official() -> Built:
    kind = _from("DiT", "models").DiT
    made = kind(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2, num_classes=10)
    return made, {"x": r(2, 4, 8, 8), "t": torch.tensor([3, 7]), "y": torch.tensor([1, 2])}


@model
def guided_unet() -> Built:
    made = _from("guided-diffusion", "guided_diffusion.unet").UNetModel(
        image_size=16,
        in_channels=3,
        model_channels=32,
        out_channels=6,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_heads=2,
        use_scale_shift_norm=True,
        resblock_updown=True,
    )
    return made, {"x": r(2, 3, 16, 16), "timesteps": torch.tensor([3, 7])}


@model
def flow_unet() -> Built:
    made = _from("flow_matching/examples/image", "models.unet").UNetModel(
        in_channels=3,
        model_channels=32,
        out_channels=3,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_heads=2,
    )
    return made, {"x": r(2, 3, 16, 16), "timesteps": torch.tensor([0.3, 0.7]), "extra": {}}


@model
def opensora_vae() -> Built:
    class Registry:
        """What the file is registered with; the real one wants a framework for training."""

        def register_module(self, name: str) -> Any:
            return lambda kind: kind

    for package in ("opensora", "opensora.models", "opensora.models.vae", "opensora.utils"):
        folder = Path(os.environ["FXNVTX_FOREIGN"], "Open-Sora", *package.split("."))
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    for name, value in (("registry.MODELS", Registry()), ("utils.ckpt.load_checkpoint", None)):
        place, _, attribute = f"opensora.{name}".rpartition(".")
        sys.modules[place] = types.ModuleType(place)
        setattr(sys.modules[place], attribute, value)
    vae = _from("Open-Sora", "opensora.models.vae.autoencoder_2d")
    config = vae.AutoEncoderConfig(
        from_pretrained=None,
        cache_dir=None,
        resolution=16,
        in_channels=3,
        ch=32,
        out_ch=3,
        ch_mult=[1, 2],
        num_res_blocks=1,
        z_channels=4,
        scale_factor=0.36,
        shift_factor=0.11,
        sample=False,
    )

    class Decoded(vae.AutoEncoder):  # type: ignore[misc,name-defined]
        """The distribution between the halves is no tensor."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decode(self.encode(x))  # type: ignore[no-any-return]

    return Decoded(config), {"x": r(1, 3, 2, 16, 16)}


@model
def timm_vit() -> Built:
    kind = importlib.import_module("timm.models.vision_transformer").VisionTransformer
    made = kind(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=10, init_values=0.1)
    return made, {"x": r(2, 3, 16, 16)}


@model
def lucid_unet() -> Built:
    kind = importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch").Unet
    made = kind(dim=16, dim_mults=(1, 2), channels=3, flash_attn=True, attn_dim_head=8, attn_heads=2)
    return made, {"x": r(2, 3, 16, 16), "time": torch.tensor([3, 7])}
