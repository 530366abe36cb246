from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxnvtx.errors import ConfigError
from fxnvtx.models import ByteTokenizer, build


@given(st.text(), st.integers(2, 40))
def test_tokens_are_the_bytes_between_start_and_end(text: str, length: int) -> None:
    ids = ByteTokenizer(length)(text)
    assert ids.shape == (1, length)
    assert ids.dtype == torch.int64
    row = ids[0].tolist()
    used = row[: row.index(ByteTokenizer.end) + 1]
    assert used[0] == ByteTokenizer.start
    assert not any(row[len(used) :])
    body = bytes(i - ByteTokenizer.first_byte for i in used[1:-1])
    assert body == text.encode("utf-8", "replace")[: length - 2]
    assert max(row) < ByteTokenizer.vocabulary


def test_batches_and_wrong_prompts() -> None:
    tokenizer = ByteTokenizer(8)
    assert torch.equal(tokenizer(["a", "bc"]), torch.cat([tokenizer("a"), tokenizer("bc")]))
    assert tokenizer([]).shape == (0, 8)
    with pytest.raises(ConfigError, match="must be a str"):
        tokenizer(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="max_length"):
        ByteTokenizer(1)


@torch.no_grad()
def test_padding_is_not_seen() -> None:
    models = build()
    ids = models.tokenizer(["a cat", ""])
    tokens, pooled = models.text_encoder(ids)
    assert tokens.shape == (2, 64, 32)
    assert pooled.shape == (2, 32)
    assert not tokens[ids == 0].any()
    models.text_encoder.token_embedding.weight[0] += 100.0
    again, pooled_again = models.text_encoder(ids)
    assert torch.equal(tokens, again)
    assert torch.equal(pooled, pooled_again)
    # and a sequence cut after its last token gives the same
    short, pooled_short = models.text_encoder(ids[:, :8])
    assert torch.allclose(short, tokens[:, :8], atol=1e-6)
    assert torch.allclose(pooled_short, pooled, atol=1e-6)


@torch.no_grad()
def test_prompts_differ() -> None:
    models = build()
    _, pooled = models.text_encoder(models.tokenizer(["a cat", "a dog", ""]))
    assert torch.pdist(pooled).min() > 0.05
