"""A Triton kernel as a user would write it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def double(source, target, size, block: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    at = tl.program_id(0) * block + tl.arange(0, block)
    value = tl.load(source + at, mask=at < size)
    tl.store(target + at, value * 2, mask=at < size)
