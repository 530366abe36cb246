"""A whole pipeline under the real Nsight Systems: what arrives there is what the recorder saw."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="needs diffusers: pip install fxnvtx[diffusers]")

from fxnvtx.cli import capture

from ..support.nsys import with_capture

PROGRAM = """
import json, sys
import fxnvtx
from fxnvtx.integrations import diffusers as fx
from fxnvtx.models.tiny_diffusers import TINY
import torch
torch.set_num_threads(1)
pipe, arguments = TINY["WanPipeline"]()
pipe.vae.enable_tiling(16, 16, 8, 8)
fx.instrument(pipe)
arguments = dict(arguments, width=32, num_inference_steps=2, output_type="np")
with fxnvtx.record() as recording:
    pipe(**arguments)
pipe(**arguments)  # NVTX as the only listener: the cheap path
json.dump([[r.label, r.depth] for r in recording.ranges], open(sys.argv[1], "w"))
"""


@pytest.mark.nsys
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not on the PATH")
def test_nsys_sees_what_the_recorder_saw(tmp_path: Path) -> None:
    script, said = tmp_path / "program.py", tmp_path / "ranges.json"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), str(said)]
    database = with_capture(lambda: capture(command, tmp_path / "capture"), tmp_path / "capture.sqlite")
    recorded = [(label, depth) for label, depth in json.loads(said.read_text())]
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "select coalesce(e.text, s.value), e.start, e.end from NVTX_EVENTS e "
            "left join StringIds s on s.id = e.textId where e.eventType = 59 order by e.start, e.end desc"
        ).fetchall()
    seen = []
    ends: list[int] = []
    for text, start, end in rows:
        while ends and ends[-1] <= start:
            ends.pop()
        seen.append((text, len(ends)))
        ends.append(end)
    first = next(i for i, (text, _) in enumerate(seen) if text == "request#1")
    second = next(i for i, (text, _) in enumerate(seen) if text == "request#2")
    assert seen[first:second] == recorded
    again = seen[second:]
    assert [(t.replace("request#2", "request#1"), d) for t, d in again] == recorded
    assert len(recorded) > 500
    assert any(text.startswith("vae_tile_t0_y0_x") for text, _ in recorded)
