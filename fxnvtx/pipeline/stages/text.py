"""Prompt to text embedding."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import torch

from ...models import ByteTokenizer
from ..args import ServerArgs
from ..batch import Batch
from ..residency import ComponentUse
from ..stage import PipelineStage

__all__ = ["TextEncodingStage"]


class TextEncodingStage(PipelineStage):
    """Embeds the prompt and the negative prompt. Requests of a group with equal prompts share one run."""

    deduplicated: ClassVar[tuple[str, ...]] = ("embedding", "negative_embedding")

    def __init__(self, tokenizer: ByteTokenizer, component: str = "text_encoder") -> None:
        self.tokenizer = tokenizer
        self.component = component

    def component_uses(self, args: ServerArgs, stage_name: str) -> list[ComponentUse]:
        return [ComponentUse(self.component)]

    def deduplication_key(self, batch: Batch, args: ServerArgs) -> Hashable:
        return batch.prompt, batch.negative_prompt

    @torch.no_grad()
    def forward(self, batch: Batch, args: ServerArgs) -> Batch:
        with self.use_component(self.component) as encoder:
            device = next(encoder.parameters()).device
            with self.ranged("encode_prompt"):
                batch.embedding = encoder(self.tokenizer(batch.prompt).to(device))
            with self.ranged("encode_negative_prompt"):
                batch.negative_embedding = encoder(self.tokenizer(batch.negative_prompt).to(device))
        return batch
