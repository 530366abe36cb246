from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fxnvtx.errors import ConfigError
from fxnvtx.models import build_video, join_tiles, plan_tiles

axis = st.tuples(st.integers(1, 9), st.integers(1, 10), st.integers(0, 4), st.integers(1, 3))


@given(st.lists(axis, min_size=1, max_size=3))
def test_tiles_cover_everything_once_whatever_the_sizes(axes: list[tuple[int, int, int, int]]) -> None:
    sizes, tile, halo, scale = zip(*axes, strict=True)
    latent = torch.arange(torch.tensor(sizes).prod().item()).reshape(1, 1, *sizes)
    tiles = plan_tiles(sizes, tile=tile, halo=halo)
    owned = torch.zeros_like(latent)
    for t in tiles:
        owned[t.write([1] * len(sizes))] += 1
        assert all(stop - start <= limit for start, stop, limit in zip(t.start, t.stop, tile, strict=True))
    assert owned.min() == owned.max() == 1

    def decode(part: torch.Tensor) -> torch.Tensor:
        for i, factor in enumerate(scale):
            part = part.repeat_interleave(factor, dim=2 + i)
        return part

    joined = join_tiles([decode(latent[t.read]) for t in tiles], tiles, scale)
    assert torch.equal(joined, decode(latent))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 3))
def test_a_halo_as_wide_as_the_filter_makes_tiles_exact(size: int, tile: int, reach: int) -> None:
    latent = torch.randint(-9, 9, (1, 1, size)).double()
    weight = torch.arange(1.0, 2 * reach + 2).double().reshape(1, 1, -1)
    tiles = plan_tiles([size], tile=[tile], halo=[reach])
    parts = [F.conv1d(latent[t.read], weight, padding=reach) for t in tiles]
    assert torch.equal(join_tiles(parts, tiles, [1]), F.conv1d(latent, weight, padding=reach))


@torch.no_grad()
def test_the_video_decoder_in_tiles_is_the_decoder_in_one_piece() -> None:
    vae = build_video().vae
    latent = torch.randn(1, 8, 2, 3, 24, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latent)

    def tiled(halo: int) -> torch.Tensor:
        tiles = plan_tiles(latent.shape[2:], tile=(2, 3, 8), halo=(halo,) * 3)
        assert len(tiles) == 3
        return join_tiles([vae.decode(latent[t.read]) for t in tiles], tiles, vae.scale)

    assert torch.allclose(tiled(vae.halo), whole, atol=1e-5)
    assert (tiled(0) - whole).abs().max() > 1e-2  # the seams that the halo is there for


def test_the_halo_is_what_the_decoder_sees() -> None:
    vae = build_video().vae
    latent = torch.randn(1, 8, 1, 1, 33, requires_grad=True)
    vae.decode(latent)[..., 16 * 8 : 17 * 8].sum().backward()
    seen = latent.grad[0].abs().sum((0, 1, 2)).nonzero().flatten() - 16  # type: ignore[index]
    assert (seen.min().item(), seen.max().item()) == (-vae.halo, vae.halo)


@pytest.mark.parametrize(("tile", "halo"), [((0, 1), (0, 0)), ((1, 1), (-1, 0)), ((1,), (0, 0)), ((1, 1), (0, 0, 0))])
def test_impossible_tiles_are_refused(tile: tuple[int, ...], halo: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        plan_tiles((4, 4), tile=tile, halo=halo)
