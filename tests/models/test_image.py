from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxnvtx.errors import ConfigError, OutputError
from fxnvtx.models import write_apng, write_png


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = [], 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size)[0] == zlib.crc32(kind + body)
        found.append((kind, body))
        at += 12 + size
    assert found[0][0] == b"IHDR"
    assert found[-1] == (b"IEND", b"")
    return found


def pixels(header: bytes, data: bytes) -> Tensor:
    """Undo deflate and the filters (only filter 0 is expected)."""
    width, height, depth, color, *rest = struct.unpack(">IIBBBBB", header)
    assert (depth, color, *rest) == (8, 2, 0, 0, 0)
    rows = torch.tensor(list(zlib.decompress(data)), dtype=torch.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_a_png_reads_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    path = write_png(tmp_path_factory.mktemp("png") / "image.png", image)
    found = chunks(path.read_bytes())
    assert [kind for kind, _ in found] == [b"IHDR", b"IDAT", b"IEND"]
    assert torch.equal(pixels(found[0][1], found[1][1]), image)


def test_an_image_that_is_not_contiguous(tmp_path: Path) -> None:
    image = torch.arange(2 * 4 * 3, dtype=torch.uint8).reshape(3, 4, 2).permute(2, 1, 0)
    found = chunks(write_png(tmp_path / "image.png", image).read_bytes())
    assert torch.equal(pixels(found[0][1], found[1][1]), image)


def test_an_animation_reads_back_as_it_was(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (3, 4, 5, 3), dtype=torch.uint8)
    found = chunks(write_apng(tmp_path / "video.png", frames, fps=12).read_bytes())
    assert [kind for kind, _ in found] == [
        b"IHDR", b"acTL", b"fcTL", b"IDAT", b"fcTL", b"fdAT", b"fcTL", b"fdAT", b"IEND",
    ]  # fmt: skip
    assert found[1][1] == struct.pack(">II", 3, 0)
    controls = [body for kind, body in found if kind == b"fcTL"]
    numbered = [body[:4] for kind, body in found if kind in {b"fcTL", b"fdAT"}]
    assert [struct.unpack(">I", n)[0] for n in numbered] == list(range(5))
    assert all(struct.unpack(">IIIIHHBB", c[4:]) == (5, 4, 0, 0, 1, 12, 0, 0) for c in controls)
    data = [body if kind == b"IDAT" else body[4:] for kind, body in found if kind in {b"IDAT", b"fdAT"}]
    assert torch.equal(torch.stack([pixels(found[0][1], d) for d in data]), frames)


def test_wrong_images_and_unwritable_paths(tmp_path: Path) -> None:
    good = torch.zeros(2, 2, 3, dtype=torch.uint8)
    for bad in (good.float(), good[..., :2], good[0], good[:0], good[None]):
        with pytest.raises(ConfigError, match="uint8"):
            write_png(tmp_path / "image.png", bad)
    for fps in (0, 70_000):
        with pytest.raises(ConfigError, match="fps"):
            write_apng(tmp_path / "image.png", good[None], fps=fps)
    with pytest.raises(OutputError, match="cannot write"):
        write_png(tmp_path / "missing" / "image.png", good)
    assert not list(tmp_path.iterdir())
