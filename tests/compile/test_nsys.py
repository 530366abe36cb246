"""A capture by the real Nsight Systems has what the recorder has: the same owner paths, as often, in every step."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ..support.limits import CHILD_S
from ..support.nsys import with_capture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.nsys,
    pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not on the PATH"),
]

SCRIPT = """
import contextlib, json, sys
import torch
import fxnvtx

torch.manual_seed(0)
dit = fxnvtx.instrument(fxnvtx.models.build("tiny").dit, "transformer")
compiled = torch.compile(dit, backend="fxnvtx")
latent, text, pooled = torch.randn(1, 4, 16, 16), torch.randn(1, 16, 32), torch.randn(1, 32)
with torch.no_grad():
    compiled(latent, torch.tensor([900.0]), text, pooled)
    recording = fxnvtx.record() if sys.argv[1] == "both" else contextlib.nullcontext()
    with recording as recorded:
        for step in range(3):
            with fxnvtx.range("step", category="step", payload=step):
                latent = latent - 0.1 * compiled(latent, torch.tensor([900.0 - 100 * step]), text, pooled)

if recorded is not None:
    assert recorded.balanced
    paths, above = [], []
    for r in recorded.ranges:
        del above[r.depth :]
        above.append(r.label)
        paths.append(list(above))
    print(json.dumps(paths))
"""


def _capture(folder: Path, way: str) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """(paths by the recorder, paths in the capture from the first step on)."""
    script = folder / f"{way}.py"
    script.write_text(SCRIPT)
    out = folder / way
    command = ["nsys", "profile", "--trace=nvtx", "--sample=none", "--cpuctxsw=none", "--export=sqlite", "-f", "true"]
    command += ["-o", str(out), sys.executable, str(script), way]
    env = {**os.environ, "FXNVTX": "auto"}

    def execute() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=CHILD_S, check=False, env=env)

    done = with_capture(execute, Path(f"{out}.sqlite"))
    assert done.returncode == 0, done.stderr + done.stdout
    listed = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    recorded = [tuple(p) for p in json.loads(listed[0])] if listed else []
    with sqlite3.connect(f"{out}.sqlite") as database:
        domain = database.execute(
            "select domainId from NVTX_EVENTS where eventType = 75 and text = 'fxnvtx'"
        ).fetchone()
        rows = database.execute(
            "select e.start, e.end, e.globalTid, coalesce(s.value, e.text) from NVTX_EVENTS e left join StringIds s "
            "on s.id = e.textId where e.eventType = 59 and e.domainId = ? order by e.start, -e.end",
            domain,
        ).fetchall()
    paths = []
    above: dict[int, list[Any]] = {}
    for start, end, thread, text in rows:
        assert end is not None, text
        open_here = above.setdefault(thread, [])
        while open_here and open_here[-1][0] < end:
            open_here.pop()
        open_here.append((end, text))
        paths.append(tuple(t for _, t in open_here))
        assert start <= end
    return recorded, [p for p in paths if p[0] == "step"]


def test_the_capture_and_the_recorder_agree(tmp_path):
    recorded, captured = _capture(tmp_path, "both")
    assert len(recorded) > 60
    assert Counter(captured) == Counter(recorded)
    steps = [p for p in captured if p == ("step",)]
    layers = [p for p in captured if p == ("step", "transformer", "transformer.blocks.1", "transformer.blocks.1.attn")]
    assert len(steps) == 3
    assert len(layers) >= 3
    # NVTX as the only listener takes another path through the code
    _, alone = _capture(tmp_path, "alone")
    assert Counter(alone) == Counter(recorded)
