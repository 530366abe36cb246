"""Processes that share one cache folder: plain and instrumented code never meet, instrumented code is shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.limits import CHILD_S

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
import torch
import fxnvtx

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.SUB = torch.nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.relu(self.SUB(self.norm(x)))

torch.manual_seed(0)
backend = sys.argv[1]
model = Block()
x = torch.randn(3, 8)
if backend == "fxnvtx":
    fxnvtx.instrument(model, "net")
compiled = torch.compile(model, backend=backend)
labels = []
with fxnvtx.record() as recording:
    result = compiled(x)
    result.sum().backward()
counters = torch._dynamo.utils.counters
print(json.dumps({
    "labels": [r.label for r in recording.ranges if r.category != "compile"],
    "fx_hits": counters["inductor"]["fxgraph_cache_hit"],
    "fx_misses": counters["inductor"]["fxgraph_cache_miss"],
    "aot_hits": counters["aot_autograd"]["autograd_cache_hit"],
    "aot_misses": counters["aot_autograd"]["autograd_cache_miss"],
    "result": result.tolist(),
}))
"""


def _run(folder: Path, backend: str, sub: str = "proj") -> dict:
    script = folder / f"script_{sub}.py"
    script.write_text(SCRIPT.replace("SUB", sub))
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "FXNVTX": "auto"}
    env.pop("NVTX_INJECTION64_PATH", None)
    done = subprocess.run(
        [sys.executable, str(script), backend], capture_output=True, text=True, timeout=CHILD_S, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_plain_and_instrumented_share_a_folder_and_nothing_else(tmp_path):
    first = _run(tmp_path, "inductor")
    second = _run(tmp_path, "fxnvtx")
    third = _run(tmp_path, "inductor")
    fourth = _run(tmp_path, "fxnvtx")
    renamed = _run(tmp_path, "fxnvtx", sub="fc")  # the same kernels, but its module is called otherwise
    assert first["aot_misses"] == 1
    assert first["aot_hits"] == first["fx_hits"] == 0
    assert second["aot_hits"] == second["fx_hits"] == 0
    assert third["aot_hits"] == 1
    assert third["aot_misses"] == third["fx_misses"] == 0
    assert fourth["aot_hits"] == 1
    assert fourth["aot_misses"] == fourth["fx_misses"] == 0
    assert first["labels"] == third["labels"] == []
    assert "net.proj" in second["labels"]
    assert fourth["labels"] == second["labels"]
    assert second["labels"].count("backward") == 1
    assert "net.fc" in renamed["labels"]
    assert "net.proj" not in renamed["labels"]
    assert renamed["aot_hits"] == renamed["fx_hits"] == 0
    assert first["result"] == second["result"] == third["result"] == fourth["result"] == renamed["result"]
