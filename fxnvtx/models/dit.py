"""The diffusion transformer of Peebles & Xie (arXiv 2212.09748), for images and videos, and the text encoder before it.

Blocks, final layer and sizes are the published ones (adaLN). Text comes in two ways: its pooled vector joins the
timestep in adaLN, its tokens join the patches in the sequence (the paper's "in-context conditioning"), which adds
nothing to a block. So the XL stack has exactly the published 669,344,256 parameters. The text encoder needs no
download: bytes in, one vector per byte and one for the whole prompt out. And adapters on their Linears.

All forwards in this package are straight lines: no branches, no helper calls, only children, parameters, torch
functions and tensor methods. So torch.fx can trace each of them, alone with its children opaque or through the
whole model.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..errors import ConfigError, SelectionError

# ------------------------------------------------------------------------------------------------------- layers of both


class Attention(nn.Module):
    """Multi-head self-attention: [batch, tokens, dim] to the same shape.

    `mask` is what `scaled_dot_product_attention` takes: True where a key may be seen, broadcast to
    [batch, heads, tokens, tokens].
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.to_k(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.to_v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between: [..., dim] to the same shape."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


# ----------------------------------------------------------------------------------------------------------------- text


class ByteTokenizer:
    """UTF-8 bytes as tokens. Ids: 0 padding, 1 start, 2 end, then 3 + byte."""

    pad, start, end, first_byte = 0, 1, 2, 3
    vocabulary = 259

    def __init__(self, max_length: int = 64) -> None:
        if max_length < 2:
            raise ConfigError(f"max_length must be at least 2 (start and end), not {max_length}")
        self.max_length = max_length

    def __call__(self, prompts: str | Sequence[str]) -> Tensor:
        """Ids of one prompt or several, int64 [batch, max_length]; a longer prompt is cut."""
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = []
        for prompt in batch:
            if not isinstance(prompt, str):
                raise ConfigError(f"a prompt must be a str, not {type(prompt).__name__}")
            text = prompt.encode("utf-8", "replace")[: self.max_length - 2]
            ids = [self.start, *(self.first_byte + byte for byte in text), self.end]
            rows.append(ids + [self.pad] * (self.max_length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), self.max_length)


class TextBlock(nn.Module):
    """Pre-norm transformer block; padding is not attended to."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Ids [batch, length] to (one vector per token [batch, length, dim], zero at padding; their mean [batch, dim])."""

    def __init__(self, dim: int, depth: int, heads: int, max_length: int = 64) -> None:
        super().__init__()
        self.pad = ByteTokenizer.pad
        self.token_embedding = nn.Embedding(ByteTokenizer.vocabulary, dim)
        self.position_embedding = nn.Parameter(torch.randn(max_length, dim) * dim**-0.5)
        self.blocks = nn.ModuleList([TextBlock(dim, heads) for _ in range(depth)])
        self.final_norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        mask = ids != self.pad
        x = self.token_embedding(ids) + self.position_embedding[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        x = self.final_norm(x) * mask.unsqueeze(-1)
        return x, x.sum(1) / mask.sum(1, keepdim=True)


# -------------------------------------------------------------------------------------------- the diffusion transformer


MAX_GRID = 128  # patches along one side of the latent, and patches in time


class PatchEmbed(nn.Module):
    """Cut a latent into patches and embed them: [batch, C, H, W] or [batch, C, T, H, W] to [batch, patches, dim].

    An image is a video of one frame. H and W must be divisible by `patch`; H / patch, W / patch and T at most MAX_GRID.
    """

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * patch * patch, dim)
        self.frame_position = nn.Parameter(torch.randn(MAX_GRID, dim) * dim**-0.5)
        self.row_position = nn.Parameter(torch.randn(MAX_GRID, dim) * dim**-0.5)
        self.column_position = nn.Parameter(torch.randn(MAX_GRID, dim) * dim**-0.5)

    def forward(self, latent: Tensor) -> Tensor:
        rows = latent.shape[-2] // self.patch
        columns = latent.shape[-1] // self.patch
        x = latent.reshape(latent.shape[0], latent.shape[1], -1, rows, self.patch, columns, self.patch)
        x = self.proj(x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4))
        x = x + self.frame_position[: x.shape[1], None, None] + self.row_position[:rows, None]
        x = x + self.column_position[:columns]
        return x.flatten(1, 3)


class Unpatchify(nn.Module):
    """Patches [batch, patches, channels * patch * patch] back to the shape of `latent`."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        rows = latent.shape[-2] // self.patch
        columns = latent.shape[-1] // self.patch
        x = x.reshape(latent.shape[0], -1, rows, columns, latent.shape[1], self.patch, self.patch)
        return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(latent.shape)


class TimestepProjection(nn.Module):
    """Sinusoids of a timestep: [batch] to float32 [batch, dim], periods from 2 pi to 2 pi * 10000."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pairs = dim // 2
        self.decay = -math.log(10000.0) / self.pairs

    def forward(self, timestep: Tensor) -> Tensor:
        # arange, in the one form that torch.fx traces on every device; float32 whatever the model's dtype is
        index = timestep.new_ones(self.pairs, dtype=torch.float32).cumsum(0) - 1.0
        angle = timestep.float().unsqueeze(-1) * torch.exp(index * self.decay)
        return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


class TimeTextEmbed(nn.Module):
    """Timestep [batch] (0 to 1000) and pooled text [batch, text_dim] to the condition [batch, dim] of adaLN."""

    def __init__(self, dim: int, text_dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.time_proj = TimestepProjection(frequencies)
        self.linear_1 = nn.Linear(frequencies, dim)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(dim, dim)
        self.text_proj = nn.Linear(text_dim, dim)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        time = self.time_proj(timestep).to(pooled.dtype)
        return self.linear_2(self.act(self.linear_1(time))) + self.text_proj(pooled)


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition).unsqueeze(1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        x = x + gate_attn * self.attn(self.norm1(x) * (1 + scale_attn) + shift_attn)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class FinalLayer(nn.Module):
    """Last norm and projection: [batch, tokens, dim] to [batch, tokens, out]."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """Predicts the velocity of a noisy latent.

    latent [batch, channels, H, W] or [batch, channels, T, H, W]; timestep [batch], 0 to 1000; text tokens
    [batch, length, text_dim]; pooled text [batch, text_dim]. Returns the shape of the latent.
    """

    def __init__(self, *, channels: int, dim: int, depth: int, heads: int, text_dim: int, patch: int = 2) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(channels, dim, patch)
        self.time_text_embed = TimeTextEmbed(dim, text_dim)
        self.context_embed = nn.Linear(text_dim, dim)
        self.blocks = nn.ModuleList([DiTBlock(dim, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(dim, channels * patch * patch)
        self.unpatchify = Unpatchify(patch)

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        condition = self.time_text_embed(timestep, pooled)
        context = self.context_embed(text)
        x = torch.cat([context, self.patch_embed(latent)], dim=1)
        for block in self.blocks:
            x = block(x, condition)
        x = self.final_layer(x[:, context.shape[1] :], condition)
        return self.unpatchify(x, latent)


# ------------------------------------------------------------------------------------------------- adapters

# Low-rank adapters (arXiv 2106.09685) can be switched while a model serves, in two ways: beside its Linear (two small
# matrices more per call, switching costs nothing), or merged into its weight (switching rewrites the weight). In both,
# off gives the bits that the model gave before.

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
