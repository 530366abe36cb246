"""What holds after every test of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

try:
    import diffusers
except ImportError:  # each test file skips itself, with the reason
    pass
else:
    diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and on a busy machine lose a lot waiting for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Whatever a test does, the next one finds no instrumented pipeline, no patched class and an empty stack."""
    from fxnvtx.integrations import diffusers as ours
    from fxnvtx.integrations.diffusers import registry
    from fxnvtx.ranges import local

    yield
    assert not local.stack
    for record in registry.pipes():
        pipe: Any = record.ref()
        if pipe is not None:
            ours.detach(pipe)
    assert len(registry.methods) == 0
