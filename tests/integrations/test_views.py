"""What the reports say of a real pipeline: steps are steps, stages do not nest, nothing counts twice."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="needs diffusers: pip install fxnvtx[diffusers]")

from fxnvtx.integrations import diffusers as fx
from fxnvtx.report import VIEWS, from_recording

from .asking import build, recorded

STEPS = 4


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "LTX2Pipeline"])
def test_steps_and_stages(name: str) -> None:
    pipe, ask = build(name)
    fx.instrument(pipe)
    report = from_recording(recorded(lambda: ask(num_inference_steps=STEPS)))
    steps = [row for row in report.rows("step") if row.kind == "range"]
    assert len(steps) == STEPS
    assert all(row.name.startswith("denoising_step_") for row in steps)
    stages = [row.name for row in report.rows("stage") if row.kind == "range"]
    assert "denoising_loop" in stages
    assert "vae.decode" in stages
    for by in VIEWS:
        if by == "kernel":
            continue
        rows = [row for row in report.rows(by) if row.kind != "summary"]
        assert sum(row.cpu_self for row in rows) == report.root.cpu, by
        if by in ("request", "stage", "step", "component"):
            assert sum(row.share for row in rows) == pytest.approx(1.0), by
    for node in report.root.walk():
        above = node.parent
        while node.name.category == "stage" and above is not None:
            assert above.name.category != "stage", (node.name, above.name)
            above = above.parent
