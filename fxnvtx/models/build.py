"""Reference models with random weights, made from a size and a seed; and adapters on them.

Low-rank adapters (arXiv 2106.09685) can be switched while a model serves, in two ways: beside its Linear (two small
matrices more per call, switching costs nothing), or merged into its weight (switching rewrites the weight). In both,
off gives the bits that the model gave before.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError, SelectionError
from .dit import ByteTokenizer, DiT, TextEncoder
from .vae import VAE, LatentUpsampler, VideoVAE

# ------------------------------------------ sizes: S, B, L and XL of arXiv 2212.09748, table 1; tiny is ours, for a CPU


@dataclass(frozen=True)
class ModelSize:
    """One row of the table.

    `image` and `video` are what it generates, in pixels: side; frames and side. `tile` is the piece of a video latent
    that is decoded at a time: frames, rows, columns.
    """

    depth: int
    dim: int
    heads: int
    text_depth: int
    text_dim: int
    text_heads: int
    vae_channels: tuple[int, ...]
    vae_groups: int
    video_channels: tuple[int, ...]
    image: int
    video: tuple[int, int]
    tile: tuple[int, int, int]


_SD_VAE = (128, 256, 512, 512)
SIZES: dict[str, ModelSize] = {
    "tiny": ModelSize(2, 64, 4, 1, 32, 2, (8, 16, 16, 16), 4, (8, 8, 16, 16), 64, (8, 64), (2, 4, 4)),
    "small": ModelSize(12, 384, 6, 4, 256, 4, (32, 64, 128, 128), 32, (16, 32, 64, 64), 256, (16, 128), (4, 8, 8)),
    "base": ModelSize(12, 768, 12, 6, 512, 8, _SD_VAE, 32, (32, 64, 128, 128), 256, (16, 256), (4, 16, 16)),
    "large": ModelSize(24, 1024, 16, 12, 768, 12, _SD_VAE, 32, (64, 128, 256, 256), 256, (32, 256), (4, 16, 16)),
    "xl": ModelSize(28, 1152, 16, 12, 768, 12, _SD_VAE, 32, (128, 256, 512, 512), 256, (32, 512), (4, 32, 32)),
}


def model_size(name: str) -> ModelSize:
    """The row of that name; ConfigError where there is none."""
    if name not in SIZES:
        raise ConfigError(f"there is no model size {name!r}: choose one of {', '.join(SIZES)}")
    return SIZES[name]


# ------------------------------------------------------------------------------------------------------- the scheduler

# Euler steps along the straight paths of flow matching: a sample at noise level s is (1 - s) * data + s * noise.


TRAIN_TIMESTEPS = 1000


class FlowMatchEulerScheduler:
    """Noise levels from 1 (noise) to 0 (data), and the step between two of them.

    `shift` > 1 spends more of the steps at high noise, as larger images need (arXiv 2403.03206, equation 23). A step is
    told its index, so nothing is kept from one step to the next: copies of the scheduler agree with it.
    """

    def __init__(self, shift: float = 3.0) -> None:
        if not (math.isfinite(shift) and shift > 0):
            raise ConfigError(f"shift must be a positive number, not {shift!r}")
        self.shift = shift
        self.sigmas: tuple[float, ...] = ()
        self.timesteps = torch.empty(0)

    def set_timesteps(self, steps: int, *, start: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
        """Lay `steps` steps from noise level `start` (1 for pure noise; less to refine a sample) down to 0.

        Sets `sigmas` (steps + 1 numbers, the last is 0) and returns `timesteps` (float32 [steps], 1000 * sigma).
        """
        if not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"steps must be a whole number, at least 1, not {steps!r}")
        if not 0 < start <= 1:
            raise ConfigError(f"start must be a noise level above 0 and at most 1, not {start!r}")
        first = start / (self.shift - (self.shift - 1) * start)  # what the shift below turns into `start`
        even = [first * (1 - index / steps) for index in range(steps + 1)]
        shifted = [self.shift * s / (1 + (self.shift - 1) * s) for s in even]
        self.sigmas = (start, *shifted[1:])
        self.timesteps = torch.tensor(self.sigmas[:-1], dtype=torch.float32, device=device) * TRAIN_TIMESTEPS
        return self.timesteps

    def _sigma(self, index: int) -> float:
        if not 0 <= index < len(self.timesteps):
            raise ConfigError(f"there is no step {index} of {len(self.timesteps)}: call set_timesteps first")
        return self.sigmas[index]

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """From the sample at noise level `sigmas[index]` and its velocity (noise - data) to `sigmas[index + 1]`."""
        sigma = self._sigma(index)
        return sample + velocity * (self.sigmas[index + 1] - sigma)

    def add_noise(self, sample: Tensor, noise: Tensor, index: int = 0) -> Tensor:
        """`sample` at the noise level of step `index`."""
        sigma = self._sigma(index)
        return sample * (1 - sigma) + noise * sigma


# --------------------------------------------------------------------------------------------------------------- models


IMAGE_LATENT_CHANNELS = 4
VIDEO_LATENT_CHANNELS = 8

Module = TypeVar("Module", bound=nn.Module)


class _Components:
    def components(self) -> dict[str, nn.Module]:
        """The modules by name, in the order in which a request uses them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, nn.Module)}

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast every module, as `nn.Module.to`; returns self."""
        for module in self.components().values():
            module.to(*args, **kwargs)
        return self


@dataclass
class ImageModels(_Components):
    """What turns a prompt into an image."""

    size: ModelSize
    tokenizer: ByteTokenizer
    text_encoder: TextEncoder
    dit: DiT
    vae: VAE
    scheduler: FlowMatchEulerScheduler


@dataclass
class VideoModels(_Components):
    """What turns a prompt into a video in two stages: `dit` at half the side, `upsampler`, `refiner`.

    `dit` and `refiner` carry adapters (lora.py), switched off; the second stage switches the refiner's on.
    """

    size: ModelSize
    tokenizer: ByteTokenizer
    text_encoder: TextEncoder
    dit: DiT
    upsampler: LatentUpsampler
    refiner: DiT
    vae: VideoVAE
    scheduler: FlowMatchEulerScheduler


def build(size: str = "tiny", seed: int = 0, *, device: torch.device | str = "cpu") -> ImageModels:
    """The models of an image pipeline, float32, in eval mode. The same seed gives the same weights to the bit.

    The global random generators are neither used nor changed. device="meta" allocates nothing.
    """
    row = model_size(size)
    return ImageModels(
        size=row,
        tokenizer=ByteTokenizer(),
        text_encoder=_make(_text_encoder(row), seed, 0, device),
        dit=_make(_dit(row, IMAGE_LATENT_CHANNELS), seed, 1, device),
        vae=_make(
            lambda: VAE(latent=IMAGE_LATENT_CHANNELS, channels=row.vae_channels, groups=row.vae_groups), seed, 2, device
        ),
        scheduler=FlowMatchEulerScheduler(),
    )


def build_video(size: str = "tiny", seed: int = 0, *, device: torch.device | str = "cpu") -> VideoModels:
    """The models of a two-stage video pipeline; otherwise as `build`."""
    row = model_size(size)
    models = VideoModels(
        size=row,
        tokenizer=ByteTokenizer(),
        text_encoder=_make(_text_encoder(row), seed, 0, device),
        dit=_make(_dit(row, VIDEO_LATENT_CHANNELS), seed, 1, device),
        upsampler=_make(
            lambda: LatentUpsampler(channels=VIDEO_LATENT_CHANNELS, hidden=row.video_channels[-1]), seed, 2, device
        ),
        refiner=_make(_dit(row, VIDEO_LATENT_CHANNELS), seed, 3, device),
        vae=_make(lambda: VideoVAE(latent=VIDEO_LATENT_CHANNELS, channels=row.video_channels), seed, 4, device),
        scheduler=FlowMatchEulerScheduler(),
    )
    for number, dit in enumerate((models.dit, models.refiner)):
        apply_lora(dit, seed=_mix(seed, 5 + number))
    return models


def _text_encoder(row: ModelSize) -> Callable[[], TextEncoder]:
    return lambda: TextEncoder(row.text_dim, row.text_depth, row.text_heads)


def _dit(row: ModelSize, channels: int) -> Callable[[], DiT]:
    return lambda: DiT(channels=channels, dim=row.dim, depth=row.depth, heads=row.heads, text_dim=row.text_dim)


def _mix(seed: int, component: int) -> int:
    # apart from one another for every component of neighbouring seeds
    return (seed * 1_000_003 + component) % 2**63


def _make(construct: Callable[[], Module], seed: int, component: int, device: torch.device | str) -> Module:
    """Construct on the meta device, where the constructors of torch draw no random number, then fill."""
    with torch.device("meta"):
        module = construct().float()  # whatever the default dtype is
    if torch.device(device).type != "meta":
        module.to_empty(device="cpu")
        fill(module, torch.Generator().manual_seed(_mix(seed, component)))
        module.to(device)
    return module.eval()


@torch.no_grad()
def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Random weights that keep the variance of what flows through: matrices by their fan-in, norms 1, biases 0."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


# ------------------------------------------------------------------------------------------------- adapters

ATTENTION = ("*.attn.to_q", "*.attn.to_k", "*.attn.to_v", "*.attn.to_out")


class LoRALinear(nn.Module):
    """A Linear with a low-rank addition: base(x) + scale * lora_up(lora_down(x)).

    `scale` is a parameter that never trains: it is saved with the adapter, and compiled or traced code sees it change.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        weight = base.weight
        with torch.device("meta"):  # where constructors draw no random number
            down = nn.Linear(base.in_features, rank, bias=False, dtype=weight.dtype)
            up = nn.Linear(rank, base.out_features, bias=False, dtype=weight.dtype)
        self.base = base
        self.lora_down = down.to_empty(device=weight.device)
        self.lora_up = up.to_empty(device=weight.device)
        self.scale = nn.Parameter(weight.new_zeros(()), requires_grad=False)
        self.unmerged: tuple[Tensor, float] | None = None  # weight and scale from before merging, while merged

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        # Not only y + 0 * delta: that turns -0.0 into 0.0, and an infinite delta into NaN.
        return torch.where(self.scale == 0, y, y + self.scale * self.lora_up(self.lora_down(x)))


def apply_lora(
    model: nn.Module, targets: Sequence[str] = ATTENTION, *, rank: int = 4, scale: float = 0.0, seed: int = 0
) -> list[str]:
    """Replace the Linears of `model` whose names match one of `targets` (globs) by LoRALinears; returns the names.

    Both matrices are random, as if trained (from `seed`; the global generators are not touched).
    It starts switched off unless `scale` says otherwise. Raises SelectionError where a target matches no Linear,
    ConfigError where the model has an adapter already.
    """
    if rank < 1:
        raise ConfigError(f"rank must be at least 1, not {rank}")
    if _find(model):
        raise ConfigError("this model has an adapter already: call remove_lora(model) first")
    modules = model.named_modules(remove_duplicate=False)
    linears = {name: module for name, module in modules if name and type(module) is nn.Linear}
    for target in targets:
        if not any(fnmatchcase(name, target) for name in linears):
            raise SelectionError(
                f"{target!r} matches no Linear of {type(model).__name__}; the first are {list(linears)[:3]}"
            )
    chosen = [name for name in linears if any(fnmatchcase(name, target) for target in targets)]
    generator = torch.Generator().manual_seed(seed)
    made: dict[nn.Linear, LoRALinear] = {}  # a Linear that has two names gets one adapter
    for name in chosen:
        linear = linears[name]
        if linear not in made:
            made[linear] = LoRALinear(linear, rank).train(linear.training)
            _fill(made[linear], generator)
        model.set_submodule(name, made[linear])
    set_lora_scale(model, scale)
    return chosen


def set_lora_scale(model: nn.Module, scale: float) -> None:
    """Set how strongly the adapters act; 0 switches them off. Merged adapters are unmerged first."""
    if not math.isfinite(scale):
        raise ConfigError(f"scale must be a finite number, not {scale!r}")
    for adapter in _adapters(model).values():
        _unmerge(adapter)
        adapter.scale.data.fill_(scale)


def merge_lora(model: nn.Module) -> None:
    """Fold the adapters, at their present scale, into the weights, so that a call does not need them.

    The original weights are kept beside, and `unmerge_lora` restores them to the bit. Merging twice is a no-op. Unmerge
    before saving or loading a state_dict: while merged it holds the merged weights.
    """
    for adapter in _adapters(model).values():
        if adapter.unmerged is None:
            weight = adapter.base.weight.data
            adapter.unmerged = weight.clone(), float(adapter.scale)
            weight.add_(adapter.lora_up.weight.data @ adapter.lora_down.weight.data * adapter.scale)
            adapter.scale.data.zero_()


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`: weights and scale as they were. A no-op where nothing is merged."""
    for adapter in _adapters(model).values():
        _unmerge(adapter)


def remove_lora(model: nn.Module) -> None:
    """Put the original Linears back, unchanged. A no-op where there is no adapter."""
    for name, adapter in _find(model).items():
        _unmerge(adapter)
        model.set_submodule(name, adapter.base)


def _fill(adapter: LoRALinear, generator: torch.Generator) -> None:
    for part in (adapter.lora_down, adapter.lora_up):
        fresh = torch.randn(part.weight.shape, generator=generator, dtype=torch.float32, device="cpu")
        part.weight.data.copy_(fresh * part.in_features**-0.5)


def _unmerge(adapter: LoRALinear) -> None:
    if adapter.unmerged is not None:
        weight, scale = adapter.unmerged
        adapter.base.weight.data.copy_(weight)
        adapter.scale.data.fill_(scale)
        adapter.unmerged = None


def _find(model: nn.Module) -> dict[str, LoRALinear]:
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, LoRALinear)}


def _adapters(model: nn.Module) -> dict[str, LoRALinear]:
    found = _find(model)
    if not found:
        raise ConfigError(f"{type(model).__name__} has no adapter: call apply_lora(model) first")
    return found
