"""watch(): pipelines of a program that knows nothing of us."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.limits import CHILD_S

pytest.importorskip("diffusers", reason="needs diffusers: pip install fxnvtx[diffusers]")

from fxnvtx.integrations import diffusers as fx
from fxnvtx.integrations.diffusers import registry

from .asking import build, labels, recorded

PROGRAM = """
import json, sys
import fxnvtx
from fxnvtx.integrations import diffusers as fx
fx.watch()
fx.watch()
before = "diffusers" in sys.modules
from fxnvtx.models.tiny_diffusers import TINY
pipe, arguments = TINY["FluxPipeline"]()
loader = sys.modules["diffusers.pipelines.pipeline_utils"].__spec__.loader
with fxnvtx.record() as recording:
    pipe(**arguments, num_inference_steps=1, output_type="np")
fx.unwatch()
other, _ = TINY["FluxPipeline"]()
with fxnvtx.record() as silent:
    other(**arguments, num_inference_steps=1, output_type="np")
print(json.dumps({
    "before": before, "restored": not any("fxnvtx" in type(f).__module__ for f in sys.meta_path),
    "loader": list(vars(loader)),
    "labels": [r.label for r in recording.ranges], "silent": len(silent.ranges),
}))
"""


@pytest.mark.slow
def test_before_diffusers_is_imported(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=CHILD_S)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert not said["before"]
    assert said["labels"][0] == "request#1"
    assert "transformer.transformer_blocks.0.attn.to_q" in said["labels"]
    assert said["silent"] == 0
    assert said["restored"]
    assert "exec_module" not in said["loader"]


def test_with_diffusers_imported() -> None:
    fx.watch(depth=0)
    try:
        pipe, ask = build("FluxPipeline")
    finally:
        fx.unwatch()
    found = labels(recorded(ask).tree()[0].children)
    assert found == ["encode_prompt", "prepare_latents", "denoising_loop", "vae.decode"]
    fx.uninstrument(pipe)


def test_a_watched_pipeline_may_be_instrumented_by_hand_as_well() -> None:
    fx.watch()
    try:
        pipe, ask = build("FluxPipeline")
        fx.instrument(pipe, depth=0)
    finally:
        fx.unwatch()
    assert [n.label for n in recorded(ask).ranges].count("denoising_loop") == 1
    fx.uninstrument(pipe)
    assert len(registry.methods) == 0
