"""Low-rank adapters (arXiv 2106.09685) that can be switched while a model serves.

Two ways to have an adapter on: beside its Linear (two small matrices more per call, switching costs nothing), or merged
into its weight (switching rewrites the weight). In both, off gives the bits that the model gave before.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..errors import ConfigError, SelectionError

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
