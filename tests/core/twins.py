"""Two models from one recipe, one of them instrumented: whatever is done to both, they must agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fxnvtx
from fxnvtx.modules.registry import controls_of

from .tools import equal, outcome, run_recorded, shape


class Twins:
    """`plain`, and the same model instrumented with path="auto" (`auto`) and path="hooks" (`hooks`)."""

    def __init__(self, make: Callable[[], nn.Module], *, warm: tuple[Any, ...] | None = None) -> None:
        self.plain = _seeded(make)
        before = torch.get_rng_state()
        self.auto = fxnvtx.instrument(_seeded(make, before))
        assert torch.equal(torch.get_rng_state(), before), "instrument() touched the random numbers"
        self.hooks = fxnvtx.instrument(_seeded(make, before), path="hooks")
        if warm is not None:
            self.agree(*warm)

    def each(self, change: Callable[[Any], Any]) -> Twins:
        """Do the same to all three."""
        for model in (self.plain, self.auto, self.hooks):
            change(model)
        return self

    def renew(self) -> Twins:
        """Call instrument() again: children were replaced."""
        fxnvtx.instrument(self.auto)
        fxnvtx.instrument(self.hooks, path="hooks")
        return self

    def agree(self, *args: Any, **kwargs: Any) -> Any:
        """Same value to the bit or same type of exception, same random numbers used, same tree; returns the outcome."""
        found = self.agree_in_value(*args, **kwargs)
        assert self.same_tree
        return found

    def agree_in_value(self, *args: Any, **kwargs: Any) -> Any:
        """As `agree`, where children were replaced and instrument() was not called again: labels may be old."""
        state = torch.get_rng_state()
        wanted = [outcome(self.plain, *args, **kwargs)]
        torch.set_rng_state(state)
        wanted.append(outcome(self.plain, *args, **kwargs))  # models may count, so all run equally often
        after = torch.get_rng_state()
        trees = []
        for model in (self.auto, self.hooks):
            torch.set_rng_state(state)
            silent = outcome(model, *args, **kwargs)
            torch.set_rng_state(state)
            heard, recording = run_recorded(model, *args, **kwargs)
            for found, expected in zip((silent, heard), wanted, strict=True):
                assert found[0] == expected[0], (found, expected)
                assert equal(found[1], expected[1]), (found, expected)
            assert torch.equal(torch.get_rng_state(), after)
            assert recording.balanced
            trees.append(shape(recording.tree()))
        self.same_tree = trees[0] == trees[1]
        self.tree = trees[0]
        return wanted[1]

    def traced(self, fqn: str = "") -> bool:
        """Whether the level `fqn` runs a generated forward."""
        control = controls_of(self.auto)
        assert control is not None
        return next(e.level is not None for e in control.entries if e.fqn == fqn)

    def holds(self, fqn: str = "") -> bool:
        """Whether that generated forward would be used by the next call."""
        control = controls_of(self.auto)
        assert control is not None
        entry = next(e for e in control.entries if e.fqn == fqn)
        module = entry.module()
        return entry.level is not None and module is not None and entry.level.holds(module)


def _seeded(make: Callable[[], nn.Module], keep: torch.Tensor | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    if keep is not None:
        torch.set_rng_state(keep)
    return model
