from __future__ import annotations

import pytest
import torch

from fxnvtx.models import VAE, build, build_video

from .samples import equal


def test_with_the_published_channels_it_has_the_published_size() -> None:
    vae = build("base", device="meta").vae
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (2, 3, 8, 40)])
def test_image_shapes(shape: tuple[int, ...]) -> None:
    vae = build().vae
    image = torch.rand(shape) * 2 - 1
    latent = vae.encode(image)
    assert latent.shape == (shape[0], 4, shape[2] // 8, shape[3] // 8)
    assert vae.decode(latent).shape == image.shape
    assert torch.allclose(vae.decode(latent), vae(image), atol=1e-4)
    assert vae.decode(latent).std() > 0.05


@torch.no_grad()
def test_video_shapes() -> None:
    vae = build_video().vae
    video = torch.rand(2, 3, 8, 16, 24) * 2 - 1
    latent = vae.encode(video)
    assert latent.shape == (2, 8, 2, 2, 3)
    assert vae.decode(latent).shape == video.shape
    assert equal(vae.decode(latent), vae(video))


@torch.no_grad()
def test_number_of_levels_sets_the_scale() -> None:
    vae = VAE(latent=2, channels=(4, 8), groups=2)
    assert vae.scale == (2, 2)
    assert vae(torch.zeros(1, 3, 6, 6)).shape == (1, 3, 6, 6)


@torch.no_grad()
def test_the_upsampler_doubles_height_and_width_only() -> None:
    upsampler = build_video().upsampler
    latent = torch.randn(2, 8, 3, 4, 5)
    assert upsampler(latent).shape == (2, 8, 3, 8, 10)
    assert not torch.allclose(upsampler(latent), upsampler(latent + 1))
