"""The work of compiled layers: equal to torch's own counter, whole, block by block and backward."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fxnvtx
from fxnvtx import recording as work

from ..models import samples
from ..support.work_truth import shown_flops, true_flops
from .models import Unique

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two living models with one name nobody could say whose work it is; other tests' models may still be there."""
    monkeypatch.setattr(work, "_entries", {})


def known(flops: dict[str, int]) -> dict[str, int]:
    return {label: count for label, count in flops.items() if count}


def test_block_by_block_every_layer_is_what_torch_counts() -> None:
    """One graph serves all blocks; the layers around them were counted in an eager call."""
    torch._dynamo.reset()
    model, args = samples.dit()
    with torch.no_grad():
        truth = known(true_flops(model, lambda: model(*args), "net"))
        fxnvtx.instrument(model, "net")
        for block in cast("torch.nn.ModuleList", model.blocks):
            block.compile(backend="fxnvtx")
        model(*args)
        with fxnvtx.record(work=True):
            model(*args)
        with fxnvtx.record() as recording:
            model(*args)
    assert shown_flops(recording) == truth


def test_forward_and_backward() -> None:
    """A module's gradient of its input and of its weight cost what its forward costs, each."""
    torch._dynamo.reset()
    model = Unique()
    x = model.inputs().requires_grad_()
    truth = known(true_flops(model, lambda: model(x), "net"))
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    compiled = torch.compile(fxnvtx.instrument(model, "net"), backend="fxnvtx")
    compiled(x).sum().backward()
    with fxnvtx.record() as recording:
        compiled(x).sum().backward()
    forward, backward = shown_flops(recording), shown_flops(recording, backward=True)
    assert forward == truth
    assert {label: 2 * count for label, count in truth.items()} == backward
    assert forward["net"] + backward["net"] == counter.get_total_flops()
    assert not [row for row in recording.meta["work"] if row[7]]


def test_known_work_costs_compiled_code_no_call() -> None:
    """Entries are made when a block first runs for a listener, and never again."""
    import sys

    torch._dynamo.reset()
    model = fxnvtx.instrument(Unique(), "net")
    x = model.inputs()
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxnvtx")
        compiled(x)
        with fxnvtx.record():
            compiled(x)
            called: list[tuple[str, str]] = []
            sys.setprofile(lambda frame, event, _: called.append((frame.f_code.co_filename, frame.f_code.co_name)))
            try:
                compiled(x)
            finally:
                sys.setprofile(None)
    assert called and not [path for path, _ in called if path.endswith(("/metering.py", "compile/work.py"))]
    assert "carry_work" not in {name for _, name in called}
