"""A VAE that works in tiles: which tile each piece of work belongs to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers", reason="needs diffusers: pip install fxnvtx[diffusers]")

from fxnvtx import record
from fxnvtx.integrations import diffusers as fx
from fxnvtx.integrations.diffusers.thread_state import Tiling, place_of

from .asking import build, labels, only, recorded


def test_tiles_of_an_image() -> None:
    pipe, _ = build("DiTPipeline")
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size, pipe.vae.tile_overlap_factor = 8, 16, 0.25
    latent = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = pipe.vae.decode(latent).sample
        fx.instrument(pipe)
        with record() as recording:
            watched = pipe.vae.decode(latent).sample
    assert torch.equal(plain, watched)
    assert recording.balanced
    tiled = only(recording, "vae.tiled_decode")
    places = ["y0_x0", "y0_x6", "y6_x0", "y6_x6"]
    expected = [f"vae_tile_{place}" for place in places for _ in ("post_quant_conv", "decoder")]
    assert labels(tiled.children) == expected
    inside = [labels(tile.children) for tile in tiled.children]
    assert inside == [["vae.post_quant_conv"], ["vae.decoder"]] * 4


def test_tiles_of_an_encoding() -> None:
    pipe, _ = build("DiTPipeline")
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size, pipe.vae.tile_overlap_factor = 8, 16, 0.25
    fx.instrument(pipe)
    with torch.no_grad():
        recording = recorded(lambda: pipe.vae.encode(torch.randn(1, 3, 24, 24)))
    assert labels(recording.tree()) == ["vae.encode"]
    found = labels(only(recording, "vae.tiled_encode").children)
    assert list(dict.fromkeys(found)) == [f"vae_tile_{p}" for p in ("y0_x0", "y0_x12", "y12_x0", "y12_x12")]


@pytest.mark.parametrize("name", ["WanPipeline", "LTXPipeline"])
def test_tiles_of_a_video(name: str) -> None:
    pipe, ask = build(name)
    pipe.vae.enable_tiling(
        tile_sample_min_height=16, tile_sample_min_width=16, tile_sample_stride_height=8, tile_sample_stride_width=8
    )
    wide = {"width": 32, "height": 16} if name == "WanPipeline" else {}
    plain = ask(**wide)
    fx.instrument(pipe)
    with record() as recording:
        watched = ask(**wide)
    assert torch.equal(plain[0], watched[0])
    tiled = only(recording, "vae.tiled_decode")
    found = list(dict.fromkeys(label.rpartition("_x")[2] for label in labels(tiled.children)))
    assert len(found) > 1
    assert all(label.startswith("vae_tile_t") for label in labels(tiled.children))
    assert all(label[0].startswith("vae.") for label in map(labels, (t.children for t in tiled.children)))


def test_tiles_in_time_and_space() -> None:
    pipe, ask = build("LTXPipeline")
    pipe.vae.enable_tiling(
        tile_sample_min_height=16, tile_sample_min_width=16, tile_sample_stride_height=16, tile_sample_stride_width=16
    )
    pipe.vae.use_framewise_decoding = True
    pipe.vae.tile_sample_min_num_frames, pipe.vae.tile_sample_stride_num_frames = 8, 4
    plain = ask(num_frames=17)
    fx.instrument(pipe)
    with record() as recording:
        watched = ask(num_frames=17)
    assert torch.equal(plain[0], watched[0])
    assert recording.balanced
    over_time = only(recording, "vae.temporal_tiled_decode")
    assert set(labels(over_time.children)) == {"vae.tiled_decode"}
    tiles = [tile.label for part in over_time.children for tile in part.children]
    assert len(tiles) == len(set(tiles)) == 4 * len(over_time.children) > 4
    assert {tile.split("_")[2] for tile in tiles} == {f"t{t}" for t in range(len(over_time.children))}


def test_untiled_calls_have_no_tiles() -> None:
    pipe, ask = build("DiTPipeline")
    fx.instrument(pipe)
    assert not [r.label for r in recorded(ask).ranges if "tile" in r.label]


def test_a_tile_without_a_place_is_not_given_that_of_the_one_before() -> None:
    whole = torch.zeros(1, 4, 8, 8)
    tiling = Tiling("vae", whole)
    tile = whole[:, :, 4:, :4]
    assert tiling.label("post_quant_conv", (tile,)).text == "vae_tile_y4_x0"
    assert tiling.label("decoder", (tile.clone(),)).text == "vae_tile_y4_x0"  # what was made of it
    assert tiling.label("post_quant_conv", (tile.clone(),)).text == "vae_tile call 0"
    assert tiling.label("post_quant_conv", (tile.clone(),)).text == "vae_tile call 1"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_place_of_a_view(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=3, max_size=5))
    order = data.draw(st.permutations(range(len(sizes))))
    base = torch.zeros([sizes[a] for a in order])
    whole = base.permute(*(order.index(a) for a in range(len(sizes))))  # any layout in memory
    assert list(whole.shape) == sizes
    starts = [data.draw(st.integers(0, size - 1)) for size in sizes[2:]]
    ends = [data.draw(st.integers(s + 1, size)) for s, size in zip(starts, sizes[2:], strict=True)]
    tile = whole[(slice(None), slice(None), *(slice(s, e) for s, e in zip(starts, ends, strict=True)))]
    assert place_of(tile, whole) == tuple(starts)
    assert place_of(tile.clone(), whole) is None
