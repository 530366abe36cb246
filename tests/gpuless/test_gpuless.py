"""Inductor's code for a GPU, generated and run without one: every launch lies in the range of who computes in it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.limits import CHILD_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
ROOT = Path(__file__).resolve().parents[2]
CASES = {"layers": 4, "launches": 16, "interpreted": 7, "templates": 3, "work": 6, "zoo": 4}


@pytest.mark.parametrize("group", CASES)
def test_every_launch_is_in_the_range_of_who_computes(group, tmp_path):
    if group == "zoo":
        pytest.importorskip("diffusers", reason="the diffusers extra is not installed")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if group == "interpreted":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "tests.gpuless.child", group]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=CHILD_S
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"case"')]
    found = {r["case"]: r for r in map(json.loads, lines)}
    assert len(found) == CASES[group], done.stderr[-3000:]
    wrong = {name: r["problems"] for name, r in found.items() if r["problems"]}
    assert not wrong, json.dumps(wrong, indent=1)
