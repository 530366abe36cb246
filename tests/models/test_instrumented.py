"""The promise that the reference models are for: the same image to the bit, and every block seen."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from fxnvtx.models import build, build_video, generate, generate_video
from fxnvtx.modules import instrument
from fxnvtx.recording import Node, Recording, record


def instrumented(models: Any, path: str) -> Any:
    for name, module in models.components().items():
        instrument(module, name, path=path)
    return models


def tree(nodes: list[Node]) -> list[Any]:
    return [(node.label, tree(node.children)) for node in nodes]


def record_image(path: str) -> tuple[torch.Tensor, Recording]:
    models = instrumented(build(), path)
    with record() as recording:
        return generate("a cat", 2, 3, models=models), recording


@pytest.mark.parametrize("path", ["fx", "hooks", "auto"])
def test_the_image_is_the_same_to_the_bit(path: str) -> None:
    image, recording = record_image(path)
    assert torch.equal(image, generate("a cat", 2, 3))
    assert recording.balanced
    calls = Counter(r.label for r in recording.ranges)
    assert calls["text_encoder"] == 2  # the prompt and the negative prompt
    # two steps with guidance
    assert calls["dit"] == calls["dit.blocks.1"] == calls["dit.blocks.1.attn.to_q"] == 4
    assert calls["vae.decoder.mid_block.attn"] == 1


def test_every_path_gives_the_same_tree() -> None:
    trees = [tree(record_image(path)[1].tree()) for path in ("fx", "hooks", "auto")]
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.parametrize("path", ["fx", "hooks"])
def test_the_video_is_the_same_to_the_bit(path: str) -> None:
    models = instrumented(build_video(), path)
    with record() as recording:
        video = generate_video("a cat", 2, 3, refine_steps=2, models=models)
    assert torch.equal(video, generate_video("a cat", 2, 3, refine_steps=2))
    assert recording.balanced
    calls = Counter(r.label for r in recording.ranges)
    assert (calls["dit"], calls["upsampler"], calls["refiner"], calls["vae.decoder"]) == (4, 1, 2, 4)
    assert calls["refiner.blocks.0.attn.to_q.lora_up"] == 2
