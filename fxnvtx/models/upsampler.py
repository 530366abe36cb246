"""Between the two stages of a video: a latent of twice the height and width."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from torch import Tensor, nn

from .video_vae import ResnetBlock3d, Upsample3d


class LatentUpsampler(nn.Module):
    """[batch, channels, T, H, W] to [batch, channels, T, 2 H, 2 W]."""

    def __init__(self, *, channels: int, hidden: int, depth: int = 1) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(channels, hidden, 3, padding=1)
        self.res_blocks = nn.ModuleList([ResnetBlock3d(hidden, hidden) for _ in range(depth)])
        self.upsample = Upsample3d(hidden, (1, 2, 2))
        self.post_res_blocks = nn.ModuleList([ResnetBlock3d(hidden, hidden) for _ in range(depth)])
        self.conv_out = nn.Conv3d(hidden, channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.conv_in(latent)
        for block in self.res_blocks:
            x = block(x)
        x = self.upsample(x)
        for block in self.post_res_blocks:
            x = block(x)
        return self.conv_out(x)
