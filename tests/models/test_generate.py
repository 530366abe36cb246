from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fxnvtx.errors import ConfigError
from fxnvtx.models import SIZES, build, build_video, generate, generate_video, to_uint8

from .samples import equal


def switch(models: Any) -> Any:
    """The scale of one of the refiner's adapters."""
    return models.refiner.blocks[0].attn.to_q.scale


def test_the_same_seed_gives_the_same_image() -> None:
    image = generate("a cat", 3, 7)
    assert image.shape == (64, 64, 3)
    assert image.dtype == torch.uint8
    assert torch.equal(image, generate("a cat", 3, 7))
    assert torch.equal(image, generate("a cat", 3, 7, models=build("tiny", 0)))
    assert image.float().std() > 10


def test_everything_asked_for_matters() -> None:
    models = build()
    image = generate("a cat", 3, 7, models=models)
    others = [
        generate("a dog", 3, 7, models=models),
        generate("a cat", 4, 7, models=models),
        generate("a cat", 3, 8, models=models),
        generate("a cat", 3, 7, guidance_scale=1.0, models=models),
        generate("a cat", 3, 7, negative_prompt="blurred", models=models),
        generate("a cat", 3, 7, models=build(seed=1)),
    ]
    assert all((image != other).float().mean() > 0.2 for other in others)


def test_the_same_seed_gives_the_same_video_and_the_adapter_is_off_again() -> None:
    models = build_video()
    video = generate_video("a cat", 2, 7, models=models)
    assert video.shape == (8, 64, 64, 3)
    assert video.dtype == torch.uint8
    assert torch.equal(video, generate_video("a cat", 2, 7, models=models))
    assert torch.equal(video, generate_video("a cat", 2, 7))
    assert (video != generate_video("a dog", 2, 7, models=models)).float().mean() > 0.2
    assert not switch(models).any()


def test_the_adapter_is_off_again_after_an_error() -> None:
    models = build_video()
    switched = []

    def fail(module: torch.nn.Module, args: object) -> None:
        switched.append(switch(models).item())
        raise KeyboardInterrupt

    models.refiner.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate_video("a cat", 1, models=models)
    assert switched == [1.0]
    assert not switch(models).any()


def test_the_unguided_pass_runs_only_where_it_is_needed() -> None:
    models = build()
    calls = []
    models.dit.register_forward_pre_hook(lambda m, a: calls.append(1))
    generate("a cat", 3, models=models)
    assert len(calls) == 6
    generate("a cat", 3, guidance_scale=1.0, models=models)
    assert len(calls) == 9


def test_nobody_elses_random_numbers_are_used_or_changed() -> None:
    random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), torch.get_rng_state()
    image, video = generate("a cat", 1), generate_video("a cat", 1)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    torch.manual_seed(2)
    assert torch.equal(generate("a cat", 1), image)
    assert torch.equal(generate_video("a cat", 1), video)


@pytest.mark.slow
@pytest.mark.parametrize("run", [generate, generate_video])
def test_the_users_default_dtype_and_device_do_not_matter(run: Callable[..., torch.Tensor]) -> None:
    expected = run("a cat", 1)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(run("a cat", 1), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(run("a cat", 1), expected)


def test_eight_threads_with_the_same_models() -> None:
    models = build()
    expected = [generate("a cat", steps, models=models) for steps in range(1, 9)]
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda steps: generate("a cat", steps, models=models), range(1, 9)))
    assert all(map(torch.equal, images, expected))


@pytest.mark.parametrize("make", [build, build_video])
def test_weights_come_from_the_seed(make: object) -> None:
    one, two, other = make(seed=5), make(seed=5), make(seed=6)  # type: ignore[operator]
    for name, module in one.components().items():
        a, b, c = (m.components()[name].state_dict() for m in (one, two, other))
        assert all(equal(a[k], b[k]) for k in a)
        matrices = [k for k in a if a[k].dim() > 1]
        assert matrices
        assert not any(torch.equal(a[k], c[k]) for k in matrices)
        assert not module.training
        assert all(p.isfinite().all() for p in module.parameters())


def test_the_video_is_decoded_in_tiles() -> None:
    models = build_video()
    shapes = []
    models.vae.decoder.register_forward_pre_hook(lambda m, a: shapes.append(tuple(a[0].shape[2:])))
    generate_video("a cat", 1, models=models)
    assert (
        shapes == [(2, 6, 6)] * 4
    )  # tiles of 2 x 4 x 4 out of 2 x 8 x 8, each with 2 points around where there are any


def test_components_do_not_share_their_numbers() -> None:
    models: Any = build_video()
    assert not torch.equal(models.dit.blocks[0].mlp.fc1.weight, models.refiner.blocks[0].mlp.fc1.weight)


@pytest.mark.slow
def test_every_size_builds_without_memory_on_the_meta_device() -> None:
    for size, row in SIZES.items():
        for models in (build(size, device="meta"), build_video(size, device="meta")):
            assert all(p.is_meta for m in models.components().values() for p in m.parameters())
        assert row.image % 16 == 0
        assert row.video[0] % 4 == 0
        assert row.video[1] % 32 == 0
        assert row.dim % row.heads == 0
        assert row.text_dim % row.text_heads == 0


@pytest.mark.slow
def test_small_generates_too() -> None:
    models = build("small")
    assert generate("a cat", 1, guidance_scale=1.0, models=models).shape == (256, 256, 3)


def test_bfloat16_generates() -> None:
    image = generate("a cat", 2, models=build().to(torch.bfloat16))
    exact = generate("a cat", 2)
    assert (image.float() - exact.float()).abs().mean() < 0.3 * exact.float().std()


def test_to_uint8() -> None:
    pixels = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    image = to_uint8(pixels)
    assert image.shape == (1, 1, 5, 3)
    assert image.is_contiguous()
    assert image[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of tiny, small"):
        generate("a cat", size="huge")
    with pytest.raises(ConfigError, match="steps must be"):
        generate("a cat", 0)
    with pytest.raises(ConfigError, match="prompt must be a str"):
        generate(["a cat"])  # type: ignore[arg-type]
