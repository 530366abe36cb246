"""Whatever is changed after instrument(), the next call gives what the plain model gives."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxnvtx

from . import zoo
from .test_soundness_forms import x
from .twins import Twins


@pytest.mark.parametrize("value", [-0.0, 0, False, 1.0, True, 1, 2, "1", None, math.nan, math.inf, torch.tensor(3.0)])
def test_a_number_on_self(value):
    twins = Twins(zoo.Scaled, warm=(x(),))
    assert twins.traced() and twins.holds()
    twins.each(lambda m: setattr(m, "scale", value)).agree(x())
    assert not twins.holds()
    twins.each(lambda m: setattr(m, "scale", 0.0)).agree(x())
    assert twins.holds()
    twins.each(lambda m: setattr(m, "mode", "none")).agree(x())
    twins.each(lambda m: delattr(m, "mode"))
    assert twins.agree(x())[1] is AttributeError


def test_one_is_not_true():
    twins = Twins(zoo.Truthy, warm=(x(),))
    for value in (True, 1.0, 1):
        assert twins.each(lambda m, value=value: setattr(m, "flag", value)).agree(x())[1]["flag"] is value  # type: ignore[misc]


def test_a_nan_on_self_stays_on_the_fx_path():
    class Nan(zoo.Scaled):
        def __init__(self):
            super().__init__()
            self.scale = math.nan

        def forward(self, x):
            return self.a(x) * self.scale

    twins = Twins(Nan, warm=(x(),))
    assert twins.holds()
    twins.each(lambda m: setattr(m, "scale", float("nan"))).agree(x())


def test_train_and_eval():
    twins = Twins(zoo.Dropouts, warm=(x(),))
    for mode in (False, True, False):
        twins.each(lambda m, mode=mode: m.train(mode)).agree(x())  # type: ignore[misc]
    twins.each(lambda m: m.drop.train()).agree(x())


def test_the_class_gets_another_forward(monkeypatch):
    twins = Twins(zoo.Straight, warm=(x(),))
    monkeypatch.setattr(zoo.Straight, "forward", lambda self, x: self.a(x) * 3)
    twins.agree(x())
    monkeypatch.undo()
    twins.agree(x())
    assert twins.holds()


def test_the_instance_gets_another_forward():
    twins = Twins(zoo.Straight, warm=(x(),))
    twins.each(lambda m: setattr(m, "forward", lambda x, m=m: m.b(x))).agree(x())
    twins.each(lambda m: delattr(m, "forward")).agree(x())
    assert twins.holds()
    twins.each(lambda m: setattr(m.a, "forward", torch.neg)).agree(x())


def test_a_childs_class_gets_another_forward(monkeypatch):
    twins = Twins(zoo.Straight, warm=(x(),))
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight) * 2)
    twins.agree(x())


def test_torch_functions_get_patched(monkeypatch):
    real, gelu = F.scaled_dot_product_attention, F.gelu
    attention, straight = Twins(zoo.Attention, warm=(x(2, 3, 4),)), Twins(zoo.Straight, warm=(x(),))
    assert attention.traced() and straight.traced()
    seen = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(1) or real(*a, **k) * 2)  # type: ignore[func-returns-value]
    monkeypatch.setattr(F, "gelu", lambda x: gelu(x) - 1)
    attention.agree(x(2, 3, 4))
    assert len(seen) == 6  # each of the three runs twice
    straight.agree(x())
    monkeypatch.undo()
    assert attention.holds() and straight.holds()
    monkeypatch.setattr(zoo, "F", type("Other", (), {"gelu": staticmethod(torch.relu)}))
    straight.agree(x())
    monkeypatch.delattr(zoo, "F")
    assert straight.agree(x())[1] is NameError


class Deep(zoo.Base):
    def forward(self, x):
        return torch.nn.modules.activation.F.silu(self.a(x))  # type: ignore[attr-defined]


def test_a_five_part_name_is_compared_at_every_call(monkeypatch):
    twins = Twins(Deep, warm=(x(),))
    assert twins.traced()
    monkeypatch.setattr(F, "silu", torch.relu)
    twins.agree(x())


def test_global_numbers_and_tables(monkeypatch):
    number, table = Twins(zoo.GlobalNumber, warm=(x(),)), Twins(zoo.GlobalTable, warm=(x(),))
    monkeypatch.setattr(zoo, "EPS", 5.0)
    number.agree(x())
    monkeypatch.setitem(zoo.TABLE, "scale", -1.0)
    table.agree(x())


def test_children_replaced_deleted_or_none():
    twins = Twins(zoo.Straight, warm=(x(),))

    def replace(m):
        torch.manual_seed(3)
        m.a = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    twins.each(replace).agree_in_value(x())
    twins.renew().agree(x())
    assert ("a.0", ()) in twins.tree[0][1][0][1]
    twins.each(lambda m: setattr(m, "a", None))
    assert twins.agree_in_value(x())[1] is TypeError
    twins.each(lambda m: delattr(m, "a"))
    assert twins.agree_in_value(x())[1] is AttributeError
    twins.each(lambda m: setattr(m, "a", torch.neg)).agree(x())
    twins.each(lambda m: delattr(m, "a")).each(lambda m: setattr(m, "a", nn.Identity())).agree_in_value(x())


def test_a_child_replaced_by_a_function_in_place():
    twins = Twins(zoo.Straight, warm=(x(),))
    twins.each(lambda m: m.__dict__.__setitem__("a", torch.neg)).agree(x())  # wins over the child for Python
    twins.each(lambda m: m.__dict__.__delitem__("a")).agree(x())


def test_a_child_replaced_by_one_that_adds_to_call():
    def replace(m):
        torch.manual_seed(3)
        m.a = zoo.OwnCall()

    twins = Twins(zoo.Straight, warm=(x(),))
    twins.each(replace).agree_in_value(x())
    twins.renew().agree(x())
    twins = Twins(zoo.HasOwnCall, warm=(x(),))
    assert [label for label, _ in twins.tree[0][1]] == ["a", "b"]

    def swap(m):
        m.a, m.b = m.b, m.a

    twins.each(swap).agree_in_value(x())
    twins.renew().agree(x())
    assert [label for label, _ in twins.tree[0][1]] == ["a", "b"]


def test_a_child_replaced_by_an_instrumented_one_that_adds_to_call():
    twins = Twins(lambda: nn.Sequential(zoo.Straight(), zoo.OwnCall()), warm=(x(),))
    assert twins.traced("0")
    models: list[Any] = [twins.plain, twins.auto, twins.hooks]
    for model in models:
        model[0].a = model[1]
    twins.agree_in_value(x())
    twins.renew().agree(x())


def test_a_module_list_that_changes():
    twins = Twins(zoo.Loop, warm=(x(),))
    assert twins.traced() and twins.holds()

    def append(m):
        torch.manual_seed(5)
        m.layers.append(nn.Linear(4, 4))

    twins.each(append)
    assert not twins.holds()
    twins.agree_in_value(x())
    twins.renew().agree(x())
    assert [label for label, _ in twins.tree[0][1]] == [*(f"layers.{i}" for i in range(4)), "norm"]
    twins.each(lambda m: setattr(m, "layers", nn.ModuleList(reversed(list(m.layers))))).agree_in_value(x())
    twins.each(lambda m: m.layers.__delitem__(0)).agree_in_value(x())
    twins.each(lambda m: m.layers.__setitem__(0, nn.Identity())).agree_in_value(x())
    twins.each(lambda m: setattr(m, "layers", nn.ModuleList())).agree_in_value(x())
    twins.each(lambda m: delattr(m, "layers"))
    twins.each(lambda m: setattr(m, "layers", [nn.Identity(), torch.neg])).agree_in_value(x())
    twins.each(lambda m: delattr(m, "layers"))
    assert twins.agree_in_value(x())[1] is AttributeError


def test_an_item_of_a_looped_sequential_replaced_by_its_other_name():
    twins = Twins(zoo.LoopSequential, warm=(x(),))

    def replace(m):
        torch.manual_seed(4)
        m.layers[0] = nn.Linear(4, 4)

    twins.each(replace).agree_in_value(x())
    twins.renew().agree(x())


def test_parameters_and_buffers_replaced():
    twins = Twins(zoo.OwnTensors, warm=(x(),))
    assert twins.traced()

    def load(m):
        torch.manual_seed(9)
        m.load_state_dict({k: torch.randn_like(v) for k, v in m.state_dict().items()})

    twins.each(load).agree(x())
    twins.each(lambda m: setattr(m, "weight", nn.Parameter(torch.full((4,), 2.0)))).agree(x())
    twins.each(lambda m: setattr(m, "shift", torch.arange(4.0))).agree(x())
    assert twins.holds()
    twins.each(lambda m: m.to(torch.float64)).agree(x().double())
    twins.each(lambda m: m.to(torch.bfloat16)).agree(x().bfloat16())
    twins.each(lambda m: m.float())
    twins.each(lambda m: setattr(m, "weight", None))
    assert twins.agree(x())[0] == "error"
    twins.each(lambda m: delattr(m, "weight"))
    assert twins.agree(x())[1] is AttributeError
    twins.each(lambda m: setattr(m, "weight", torch.ones(4))).agree(x())
    twins.each(lambda m: m.share_memory()).agree(x())


def test_weights_tied_and_parametrized_later():
    def tie(m):
        m.b.weight = m.a.weight

    twins = Twins(zoo.Straight, warm=(x(),)).each(tie)
    twins.agree(x())
    twins.each(lambda m: torch.nn.utils.parametrizations.orthogonal(m.a)).agree(x())
    twins = Twins(zoo.OwnTensors, warm=(x(),))

    class Double(nn.Module):
        def forward(self, w):
            return w * 2

    twins.each(lambda m: torch.nn.utils.parametrize.register_parametrization(m, "weight", Double())).agree(x())
    twins.each(lambda m: torch.nn.utils.parametrize.remove_parametrizations(m, "weight")).agree(x())


@pytest.mark.parametrize("where", ["", "a"])
def test_forward_hooks_added_later(where):
    seen = []

    def pre(module, args):
        seen.append("pre")
        return (args[0] + 1,)

    def pre_kwargs(module, args, kwargs):
        seen.append("pre kwargs")
        return (args[0] * 2,), kwargs

    def post(module, args, output):
        seen.append("post")
        return output - 3

    def always(module, args, output):
        seen.append("always")

    twins = Twins(zoo.Straight, warm=(x(),))
    kinds = (
        lambda m: m.register_forward_pre_hook(pre),
        lambda m: m.register_forward_pre_hook(pre_kwargs, with_kwargs=True),
        lambda m: m.register_forward_hook(post),
        lambda m: m.register_forward_hook(always, always_call=True),
    )
    for kind in kinds:
        handles: list[Any] = []
        twins.each(lambda m, kind=kind, handles=handles: handles.append(kind(m.get_submodule(where))))  # type: ignore[misc]
        seen.clear()
        twins.agree(x())
        assert len(seen) == 6
        seen.clear()
        twins.agree(x(3, 9))  # raises: what always_call promises must hold
        assert len(seen) == (0 if kind is kinds[2] else 6)
        [h.remove() for h in handles]
        twins.agree(x())
        assert twins.holds()


def test_global_hooks():
    from torch.nn.modules import module as nn_module

    twins = Twins(zoo.Straight, warm=(x(),))
    calls = []
    for register in (nn_module.register_module_forward_hook, nn_module.register_module_forward_pre_hook):
        handle = register(lambda m, *_: calls.append(type(m).__name__))
        try:
            calls.clear()
            twins.agree(x())
            assert sorted(calls) == ["Linear"] * 12 + ["Straight"] * 6
        finally:
            handle.remove()


def test_backward_hooks_added_later():
    twins = Twins(zoo.Straight, warm=(x(),))
    grads: dict[int, list[torch.Tensor]] = {}

    def add(m):
        m.register_full_backward_hook(lambda mod, gi, go: grads.setdefault(id(m), []).append(gi[0].clone()))
        m.a.register_full_backward_pre_hook(lambda mod, go: (go[0] * 2,))

    twins.each(add)
    for model in (twins.plain, twins.auto, twins.hooks):
        with fxnvtx.record():
            model(x().requires_grad_()).sum().backward()
    (one, *others) = grads.values()
    assert len(one) == 1
    assert all(torch.equal(o[0], one[0]) for o in others)
    assert all(
        torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
        for a, b in zip(twins.plain.parameters(), twins.auto.parameters(), strict=True)  # type: ignore[arg-type]
    )


def test_an_edited_source_file_is_not_believed(tmp_path, monkeypatch):
    """inspect reads the file as it is now; the class is what was imported."""
    import importlib
    import sys

    body = textwrap.dedent(
        """
        from torch import nn
        class M(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(4, 4)
            def forward(self, x):
                return {}
        """
    )
    path = tmp_path / "edited_model.py"
    path.write_text(body.format("self.a(x) if self.training else x"))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("edited_model")
    path.write_text(body.format("self.a(x)"))
    twins = Twins(module.M)
    assert not twins.traced()
    twins.agree(x())
    twins.each(lambda m: m.eval()).agree(x())
    sys.modules.pop("edited_model")
