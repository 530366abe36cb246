from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxnvtx.models import SIZES, DiT, build
from fxnvtx.models.dit import PatchEmbed, TimestepProjection, Unpatchify

from .samples import SAMPLES, equal


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_xl_is_the_published_dit_xl_2() -> None:
    dit = build("xl", device="meta").dit
    assert count(dit.blocks) == 669_344_256
    # The published 675,129,632 have a class embedding and a position table where we have text and three tables, and
    # predict a variance beside the noise: twice the last layer's outputs.
    text = count(dit.context_embed) + count(dit.time_text_embed.text_proj)
    positions = 3 * 128 * 1152
    assert count(dit) - text - positions + 1001 * 1152 + 256 * 1152 + 16 * 1152 + 16 == 675_129_632


@pytest.mark.parametrize(("size", "millions"), [("small", 33), ("base", 130), ("large", 458), ("xl", 675)])
def test_sizes_are_those_of_the_paper(size: str, millions: int) -> None:
    row = SIZES[size]
    with torch.device("meta"):
        dit = DiT(channels=4, dim=row.dim, depth=row.depth, heads=row.heads, text_dim=1)
    assert count(dit) / 1e6 == pytest.approx(millions, rel=0.02)


def test_patches_go_back_where_they_came_from() -> None:
    embed, back = PatchEmbed(3, 12, 2), Unpatchify(2)
    with torch.no_grad():
        embed.proj.weight.copy_(torch.eye(12))
        embed.proj.bias.zero_()
        for table in (embed.frame_position, embed.row_position, embed.column_position):
            table.zero_()
        for shape in ((2, 3, 4, 6), (2, 3, 5, 4, 6)):
            latent = torch.randn(shape)
            assert torch.equal(back(embed(latent), latent), latent)


def test_every_patch_has_its_own_position() -> None:
    embed = PatchEmbed(1, 32, 2)
    with torch.no_grad():
        tokens = embed(torch.zeros(1, 1, 3, 8, 8))[0]
    assert len(tokens) == 3 * 4 * 4
    assert len({tuple(row) for row in tokens.tolist()}) == len(tokens)


@torch.no_grad()
def test_an_image_is_a_video_of_one_frame() -> None:
    dit, (latent, *rest) = SAMPLES["dit"]()
    assert equal(dit(latent, *rest), dit(latent.unsqueeze(2), *rest).squeeze(2))


@torch.no_grad()
def test_everything_given_matters_and_rows_of_a_batch_do_not_mix() -> None:
    dit, (latent, time, text, pooled) = SAMPLES["dit"]()
    reference = dit(latent, time, text, pooled)
    assert reference.shape == latent.shape
    assert reference.std() > 0.1
    for args in (
        (latent + 1, time, text, pooled),
        (latent, time + 100, text, pooled),
        (latent, time, text + 1, pooled),
        (latent, time, text, pooled + 1),
    ):
        assert (dit(*args) - reference).abs().mean() > 1e-3
    alone = dit(latent[1:], time[1:], text[1:], pooled[1:])
    assert torch.allclose(alone, reference[1:], atol=1e-5)


def test_the_output_at_a_patch_belongs_to_the_latent_at_that_patch() -> None:
    dit, (latent, *rest) = SAMPLES["dit"]()
    blocks: Any = dit.blocks
    for block in blocks:  # gates at zero: no block moves anything between patches
        nn.init.zeros_(block.adaLN_modulation[1].weight)
    latent.requires_grad_()
    dit(latent, *rest)[1, :, 2:4, 4:6].sum().backward()
    touched = latent.grad[1].abs().sum(0) > 0  # type: ignore[index]
    assert touched[2:4, 4:6].all()
    assert touched.sum() == 4
    assert not latent.grad[0].any()  # type: ignore[index]


def test_timestep_projection_is_the_published_one_in_float32_whatever_the_model() -> None:
    timestep = torch.tensor([0.0, 1.0, 999.0])
    angle = timestep[:, None].double() * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat([angle.cos(), angle.sin()], dim=-1)
    projected = TimestepProjection(256).bfloat16()(timestep)
    assert projected.dtype == torch.float32
    assert torch.allclose(projected.double(), expected, atol=2e-4)


def test_a_latent_that_does_not_divide_into_patches_is_refused() -> None:
    dit, (_, *rest) = SAMPLES["dit"]()
    with pytest.raises(RuntimeError, match="shape"):
        dit(torch.zeros(2, 4, 7, 6), *rest)
