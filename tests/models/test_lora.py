from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxnvtx.errors import ConfigError, SelectionError
from fxnvtx.models import (
    LoRALinear,
    apply_lora,
    merge_lora,
    remove_lora,
    set_lora_scale,
    unmerge_lora,
)

from .samples import SAMPLES, equal


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def dit() -> Any:
    return SAMPLES["dit"]()


def test_on_it_changes_the_output_and_off_it_leaves_every_bit(dit: Any) -> None:
    model, args = dit
    plain = model(*args)
    assert len(apply_lora(model)) == 8
    assert equal(model(*args), plain)
    for scale in (1.0, 0.5, -2.0):
        set_lora_scale(model, scale)
        assert (model(*args) - plain).abs().mean() > 1e-3
        set_lora_scale(model, 0.0)
        assert equal(model(*args), plain)


def test_off_is_off_for_negative_zeros_and_broken_adapters() -> None:
    class NegativeZero(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return -torch.zeros_like(input)

    x = torch.ones(1, 2)
    adapter = LoRALinear(NegativeZero(2, 2), rank=1)
    for value in (1.0, float("inf")):
        adapter.lora_down.weight.fill_(1.0)
        adapter.lora_up.weight.fill_(value)
        assert equal(adapter(x), adapter.base(x))
        assert adapter(x).signbit().all()


def test_the_addition_is_the_low_rank_product() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(3, 6)
    plain = model(x)
    apply_lora(model, ["0"], rank=2, scale=0.7)
    adapter: Any = model[0]
    delta = adapter.lora_up.weight @ adapter.lora_down.weight
    assert torch.linalg.matrix_rank(delta) == 2
    assert torch.allclose(model(x), plain + 0.7 * x @ delta.T, atol=1e-6)


def test_merged_it_acts_the_same_and_unmerging_restores_every_bit(dit: Any) -> None:
    model, args = dit
    plain = model(*args)
    weights = copy.deepcopy(model.state_dict())
    apply_lora(model, scale=1.0)
    beside = model(*args)
    merge_lora(model)
    merged = model(*args)
    merge_lora(model)
    assert equal(model(*args), merged)
    assert torch.allclose(merged, beside, atol=1e-3)
    assert not torch.allclose(merged, plain, atol=1e-2)
    unmerge_lora(model)
    assert equal(model(*args), beside)
    merge_lora(model)
    set_lora_scale(model, 0.0)  # the switch of a stage that does not know how the adapter was on
    assert equal(model(*args), plain)
    set_lora_scale(model, 1.0)
    merge_lora(model)
    remove_lora(model)
    assert equal(model(*args), plain)
    assert all(equal(model.state_dict()[name], value) for name, value in weights.items())


def test_removing_puts_the_same_modules_back(dit: Any) -> None:
    model, _ = dit
    before = dict(model.named_modules())
    names = apply_lora(model, ["*.mlp.fc1", "final_layer.linear"])
    assert names == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "final_layer.linear"]
    assert all(isinstance(model.get_submodule(n), LoRALinear) for n in names)
    remove_lora(model)
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(before[n] is after[n] for n in before)
    remove_lora(model)


def test_the_same_seed_gives_the_same_adapter_and_the_global_generator_is_left_alone(dit: Any) -> None:
    model, args = dit
    other = copy.deepcopy(model)
    third = copy.deepcopy(model)
    state = torch.get_rng_state()
    apply_lora(model, seed=1, scale=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    apply_lora(other, seed=1, scale=1.0)
    apply_lora(third, seed=2, scale=1.0)
    assert equal(model(*args), other(*args))
    assert not torch.allclose(model(*args), third(*args))


def test_scale_travels_in_the_state_dict_and_in_copies(dit: Any) -> None:
    model, args = dit
    fresh = copy.deepcopy(model)
    apply_lora(model, scale=0.25, seed=1)
    apply_lora(fresh, seed=2)
    fresh.load_state_dict(model.state_dict())
    assert equal(fresh(*args), model(*args))
    assert equal(copy.deepcopy(model)(*args), model(*args))


def test_a_linear_with_two_names_gets_one_adapter() -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(3, 3)}).eval()
    assert apply_lora(model, ["a", "b"], scale=1.0) == ["a", "b"]
    assert isinstance(model["a"], LoRALinear)
    assert model["a"] is model["b"]
    assert not model["a"].lora_up.training
    before = shared.weight.clone()
    merge_lora(model)
    assert not torch.equal(shared.weight, before)
    remove_lora(model)
    assert model["a"] is model["b"] is shared  # type: ignore[comparison-overlap]
    assert torch.equal(shared.weight, before)


def test_follows_dtype() -> None:
    model = nn.Sequential(nn.Linear(4, 4).bfloat16())
    plain = model(torch.ones(1, 4, dtype=torch.bfloat16))
    apply_lora(model, ["0"], scale=1.0)
    output = model(torch.ones(1, 4, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert not torch.equal(output, plain)


def test_training_changes_the_adapter(dit: Any) -> None:
    model, args = dit
    apply_lora(model, scale=1.0)
    with torch.enable_grad():
        model(*args).square().sum().backward()
    adapter = model.blocks[0].attn.to_q
    assert adapter.lora_down.weight.grad.any()
    assert adapter.lora_up.weight.grad.any()
    assert adapter.scale.grad is None


def test_wrong_use_is_refused(dit: Any) -> None:
    model, _ = dit
    for call in (lambda: set_lora_scale(model, 1.0), lambda: merge_lora(model), lambda: unmerge_lora(model)):
        with pytest.raises(ConfigError, match="call apply_lora"):
            call()
    with pytest.raises(SelectionError, match=r"'\*\.nothing' matches no Linear"):
        apply_lora(model, ["*.to_q", "*.nothing"])
    with pytest.raises(ConfigError, match="rank"):
        apply_lora(model, rank=0)
    with pytest.raises(SelectionError, match="no Linear of Linear"):
        apply_lora(nn.Linear(2, 2), ["*"])
    apply_lora(model)
    with pytest.raises(ConfigError, match="finite"):
        set_lora_scale(model, float("nan"))
    with pytest.raises(ConfigError, match="already"):
        apply_lora(model)
