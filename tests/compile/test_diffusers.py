"""Real diffusers models: same kernels, bits and graphs, every launch in a range, no empty range, every owner exists.

FXNVTX_ALL_MODELS=1 takes all models of the zoo instead of three (about ten minutes on two cores).
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("diffusers", reason="the diffusers extra is not installed")

from ..support.diffusers_zoo import MODELS
from .compare import compare

pytestmark = pytest.mark.slow
CHOSEN = list(MODELS) if os.environ.get("FXNVTX_ALL_MODELS") == "1" else ["dit", "pixart", "vae_tiny"]


@pytest.mark.parametrize("name", CHOSEN)
def test_ranges_change_nothing_and_hold_everything(name):
    found = compare(name)
    assert found.problems == []
    assert found.launches > 10
    assert found.ranges > 10
    assert found.unknown == 0
    assert found.root_only <= found.launches // 20
