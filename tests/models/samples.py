"""Every reference model with arguments it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxnvtx.models import build, build_video, noise, set_lora_scale

Sample = tuple[nn.Module, tuple[Tensor, ...]]


def _prompt(models: Any, text: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return models.text_encoder(models.tokenizer(text))


def dit() -> Sample:
    models = build()
    latent = noise((2, 4, 8, 6), 0, like=models.dit)
    return models.dit, (latent, torch.tensor([900.0, 20.0]), *_prompt_pair(models))


def _prompt_pair(models: Any) -> tuple[Tensor, Tensor]:
    (a, pooled_a), (b, pooled_b) = _prompt(models, "a cat"), _prompt(models, "")
    return torch.cat([a, b]), torch.cat([pooled_a, pooled_b])


def video_dit() -> Sample:
    models = build_video()
    latent = noise((1, 8, 2, 4, 6), 0, like=models.dit)
    set_lora_scale(models.dit, 0.5)
    return models.dit, (latent, torch.tensor([500.0]), *_prompt(models, "a cat runs"))


def text_encoder() -> Sample:
    models = build()
    return models.text_encoder, (models.tokenizer(["a cat", ""]),)


def vae() -> Sample:
    models = build()
    return models.vae, (noise((1, 3, 16, 24), 0, like=models.vae),)


def video_vae() -> Sample:
    models = build_video()
    return models.vae, (noise((1, 3, 4, 16, 24), 0, like=models.vae),)


def upsampler() -> Sample:
    models = build_video()
    return models.upsampler, (noise((1, 8, 2, 4, 3), 0, like=models.upsampler),)


SAMPLES: dict[str, Callable[[], Sample]] = {
    "dit": dit,
    "video_dit": video_dit,
    "text_encoder": text_encoder,
    "vae": vae,
    "video_vae": video_vae,
    "upsampler": upsampler,
}


def equal(one: Any, other: Any) -> bool:
    """The same bits, in a tensor or in a tuple of tensors."""
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if one.dtype.is_floating_point and one.dtype == torch.float32:
        return torch.equal(one.view(torch.int32), other.contiguous().view(torch.int32))
    return torch.equal(one, other)
