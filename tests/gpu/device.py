"""Where this folder's tests run, and why they are skipped elsewhere."""

from __future__ import annotations

import pytest
import torch

DEVICE = torch.device("cuda")
needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
