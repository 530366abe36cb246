"""What `fxnvtx profile --pipeline diffusers:<Class>` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install fxnvtx[diffusers]")

from fxnvtx import record
from fxnvtx.cli.profile import Job, diffusers_runner
from fxnvtx.errors import ConfigError
from fxnvtx.models.tiny_diffusers import TINY

from .asking import every, only


def job(**options: Any) -> Job:
    given = {
        "pipeline": "diffusers:?",
        "prompt": "a red fox",
        "steps": 2,
        "seed": 0,
        "size": "tiny",
        "compile": False,
        "residency": {},
        "depth": None,
        "stages_only": False,
        "warmup": 1,
        "model": None,
    }
    return Job(**{**given, **options})


@pytest.mark.parametrize("name", list(TINY))
def test_a_picture_of_each(name: str) -> None:
    run = diffusers_runner(name, job())
    told: list[tuple[int, int]] = []
    with record() as recording:
        run(True, None)
        assert recording.ranges == []  # a warm-up shows nothing
        made = run(False, lambda done, total: told.append((done, total)))
    assert told[-1] == (2, 2)
    assert recording.balanced
    assert only(recording, "request#1").payload == name
    picture = made.image if made.video is None else made.video
    assert picture.dtype == torch.uint8
    assert picture.shape[-1] == 3
    assert picture.ndim == (3 if name in ("DiTPipeline", "FluxPipeline", "StableDiffusion3Pipeline") else 4)
    assert picture.float().std() > 0


@pytest.mark.slow
def test_prompt_seed_and_depth_count() -> None:
    def video(**options: Any) -> torch.Tensor:
        found = diffusers_runner("LTXPipeline", job(steps=1, **options))(False, None).video
        assert found is not None
        return found

    assert torch.equal(video(), video())
    assert not torch.equal(video(), video(seed=1))
    assert not torch.equal(video(), video(prompt="the moon"))
    with record() as recording:
        diffusers_runner("LTXPipeline", job(depth=0))(False, None)
    assert {n.label for n in every(recording) if n.category == "module"} == {"text_encoder", "transformer"}


def test_a_folder_is_loaded(tmp_path: Path) -> None:
    pipe, _ = TINY["DiTPipeline"]()
    pipe.save_pretrained(tmp_path)
    run = diffusers_runner("DiTPipeline", job(model=str(tmp_path), stages_only=True))
    with record() as recording:
        made = run(False, None)
    assert made.image is not None
    assert only(recording, "denoising_loop")
    assert not [n for n in every(recording) if n.category == "module"]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tiny weights for NoPipeline: use one of DiTPipeline, .*--model"):
        diffusers_runner("NoPipeline", job())
    with pytest.raises(ConfigError, match="is no folder"):
        diffusers_runner("FluxPipeline", job(model=str(tmp_path / "missing")))
    with pytest.raises(ConfigError, match="has no pipeline 'NoPipeline'"):
        diffusers_runner("NoPipeline", job(model=str(tmp_path)))
    with pytest.raises(ConfigError, match="cannot be loaded from"):
        diffusers_runner("FluxPipeline", job(model=str(tmp_path)))
