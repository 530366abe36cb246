"""What several tests share: running a model both ways, and comparing to the bit."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import torch

import fxnvtx
from fxnvtx.ranges import local


def shape(nodes: list[Any]) -> tuple[Any, ...]:
    """A recorded tree without its times: (label, children) all the way down."""
    return tuple((n.label, shape(n.children)) for n in nodes)


def labels(recording: Any) -> list[str]:
    return [r.label for r in recording.ranges]


def outcome(function: Any, *args: Any, **kwargs: Any) -> tuple[str, Any]:
    """("value", result) or ("error", type of the exception)."""
    try:
        return "value", function(*args, **kwargs)
    except BaseException as error:
        return "error", type(error)


def equal(a: Any, b: Any) -> bool:
    """Equal to the bit: type, structure, dtype, shape and the bytes of every tensor (so -0.0 is not 0.0)."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (type(a), a.dtype, a.shape, a.device, a.requires_grad) != (
            type(b),
            b.dtype,
            b.shape,
            b.device,
            b.requires_grad,
        ):
            return False
        if a.is_meta:
            return True
        left, right = a.detach().contiguous(), b.detach().contiguous()
        return bytes(left.untyped_storage())[: left.nbytes] == bytes(right.untyped_storage())[: right.nbytes]
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    return bool(a == b) or repr(a) == repr(b)


def run_recorded(model: Any, *args: Any, **kwargs: Any) -> tuple[tuple[str, Any], Any]:
    """The outcome of one call while a recorder listens, and the recording; the stack must be as it was."""
    before = list(local.stack)
    with fxnvtx.record() as recording:
        result = outcome(model, *args, **kwargs)
    assert local.stack == before
    return result, recording


def in_process(script: str, *arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
    """Run `script` in an interpreter of its own; its environment is ours with `environment` on top."""
    import os

    full = {k: v for k, v in os.environ.items() if k not in {"FXNVTX", "NVTX_DISABLE", "NVTX_INJECTION64_PATH"}}
    full.update(environment)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=full,
    )
