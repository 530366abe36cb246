"""What the NVTX tests run in a process of its own: argv is (path, listener: "tool" or "recorder", output file).

With listener "tool" nothing records, so the paths that serve NVTX alone run. With "recorder" the same calls are
recorded and the tree is written as JSON. Both must see the same ranges.
"""

from __future__ import annotations

import json
import sys
import threading

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxnvtx
from fxnvtx.ranges import local


class Leaks(nn.Module):
    """Forgets a range, inside a level that can be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fxnvtx.range_push("forgotten")
        return x * 2


class Block(nn.Module):
    def __init__(self, width: int, shared: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, width))
        self.shared = shared
        self.leaks = Leaks()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.leaks(self.norm(x))
        h = self.mlp(h) + self.shared(h)
        return x + h


class Picky(nn.Module):
    """Cannot be traced: it decides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, fail: BaseException | None = None, times: int = 1) -> torch.Tensor:
        for _ in range(times):
            x = self.proj(x)
        if fail is not None:
            fxnvtx.range_push("leaked")
            raise fail
        return x


class Guarded(nn.Module):
    """Survives its child's exception."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = Picky(width)

    def forward(self, x: torch.Tensor, fail: BaseException | None = None) -> torch.Tensor:
        try:
            return self.inner(x, fail)
        except ValueError:
            return self.inner(x, times=2)


class Tears(nn.Module):
    """Closes what its caller opened, and forgets two ranges in the place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fxnvtx.range_pop()
        fxnvtx.range_push("first")
        fxnvtx.range_push("second")
        return x


class Torn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tears = Tears()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fxnvtx.range_push("outer")
        x = self.tears(x)
        fxnvtx.range_push("third")
        return x


class Model(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        shared = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, shared) for _ in range(3))
        self.guarded = Guarded(width)
        self.last = Picky(width)

    def forward(self, x: torch.Tensor, soft: BaseException | None, hard: BaseException | None) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.guarded(x, soft)
        return self.last(x, hard)


class Stop(BaseException):
    pass


def work(model: Model) -> None:
    x = torch.zeros(2, 8)
    model(x, None, None)
    model(x, ValueError("soft"), None)
    for hard in (RuntimeError("hard"), Stop("base"), KeyboardInterrupt()):
        try:
            model(x, ValueError("soft"), hard)
        except type(hard):
            pass
        else:
            raise AssertionError("swallowed")
        assert local.stack == [], local.stack
    with fxnvtx.range("step {0}", category="step", payload=3), fxnvtx.range("ünïcode 層", payload=0.5):
        model(x, None, None)
    with fxnvtx.range("huge", payload=2**80), fxnvtx.range("words", payload="text"):
        pass
    toggled = model.blocks[1].register_forward_pre_hook(lambda *_: fxnvtx.set_enabled(model, False))
    model(x, None, None)  # goes on as it began
    toggled.remove()
    with fxnvtx.range("silent"):  # takes what Leaks forgets
        model(x, None, None)
    toggled = model.blocks[1].register_forward_pre_hook(lambda *_: fxnvtx.set_enabled(model, True))
    with fxnvtx.range("stays silent"):
        model(x, None, None)
    toggled.remove()
    model(x, None, None)
    y = torch.ones(2, 8, requires_grad=True)
    for reentrant in (True, False):
        checkpoint(model.blocks[0], y, use_reentrant=reentrant).sum().backward()
    assert local.stack == []
    fxnvtx.instrument(Torn(), "torn", path="hooks")(x)
    assert local.stack == []


def main(path: str, listener: str, output: str) -> None:
    torch.manual_seed(0)
    model = fxnvtx.instrument(Model().eval(), "dit", path=path)
    if listener == "recorder":
        with fxnvtx.record() as recording:
            run(model)
        recording.save(output)
    else:
        run(model)
        assert fxnvtx.ranges.emit.nvtx_on
        with open(output, "w", encoding="utf-8") as file:
            json.dump({"stack": len(local.stack)}, file)


def run(model: Model) -> None:
    work(model)
    # Stays apart from the toggles above: those change what every thread sees.
    threads = [threading.Thread(target=steady, args=(model,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def steady(model: Model) -> None:
    for _ in range(5):
        model(torch.zeros(2, 8), ValueError("soft"), None)
    assert local.stack == []


if __name__ == "__main__":
    main(*sys.argv[1:])
