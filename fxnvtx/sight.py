"""Compilers look at everything a module has and everything that runs. The slot and our functions are not theirs."""

from __future__ import annotations

import sys

from .compile.hidden import hide_slots
from .compile.invisible import hide_from_torchscript, hide_module
from .slot import SLOT

__all__ = ["keep_out_of_sight"]

# Where a compiled model's root has a slot, functions of these run with Dynamo watching.
_OURS = [
    "control",
    "events",
    "gate",
    "graph",
    "hooks",
    "instrument",
    "instrumented",
    "labels",
    "levels",
    "names",
    "ranges",
    "recording",
    "slot",
    "soundness",
    "stack",
    "structure",
]
_hidden: set[str] = set()


def keep_out_of_sight() -> None:
    """Called before the first slot is placed, and again later for what has been imported since."""
    for name in _OURS:
        module = sys.modules.get(f"{__package__}.{name}")
        if module is not None and name not in _hidden:
            _hidden.add(name)
            hide_module(vars(module))
    hide_from_torchscript(SLOT)
    hide_slots()
    from .compile.others import watch_others  # late: it looks at what is registered

    watch_others()
