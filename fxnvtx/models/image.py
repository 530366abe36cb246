"""PNG and animated PNG, written with the standard library (the format: W3C PNG, third edition)."""

from __future__ import annotations

import ctypes
import os
import struct
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..errors import ConfigError
from ..output import write_bytes


def write_png(path: str | os.PathLike[str], image: Tensor) -> Path:
    """Write an image, uint8 [height, width, 3]. Raises ConfigError (not an image) and OutputError (cannot write)."""
    return write_apng(path, image.unsqueeze(0))


def write_apng(path: str | os.PathLike[str], frames: Tensor, fps: int = 8) -> Path:
    """Write a video, uint8 [frames, height, width, 3], as one animated PNG that plays for ever.

    Viewers that know no animation show the first frame. Raises ConfigError and OutputError.
    """
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ConfigError(f"an image is uint8 [..., height, width, 3], not {frames.dtype} {list(frames.shape)}")
    if not 1 <= fps <= 0xFFFF:
        raise ConfigError(f"fps must be from 1 to 65535, not {fps}")
    return write_bytes(path, _encode(frames.cpu(), fps))


def _encode(frames: Tensor, fps: int) -> bytes:
    count, height, width, _ = frames.shape
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    if count > 1:
        chunks.append(_chunk(b"acTL", struct.pack(">II", count, 0)))
    number = 0  # control and data chunks of an animation share one sequence
    for index, frame in enumerate(frames):
        data = zlib.compress(_rows(frame))
        if count > 1:
            control = struct.pack(">IIIIIHHBB", number, width, height, 0, 0, 1, fps, 0, 0)
            chunks.append(_chunk(b"fcTL", control))
            number += 1
        if index == 0:
            chunks.append(_chunk(b"IDAT", data))
        else:
            chunks.append(_chunk(b"fdAT", struct.pack(">I", number) + data))
            number += 1
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + _chunk(b"IEND", b"")


def _rows(frame: Tensor) -> bytes:
    """The pixels as PNG wants them: before each row a byte that names its filter, 0 for none."""
    rows = F.pad(frame.flatten(1), (1, 0)).contiguous()
    return ctypes.string_at(rows.data_ptr(), rows.numel())  # bytes without numpy, which torch can do without


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
