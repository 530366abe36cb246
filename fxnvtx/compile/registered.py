"""What is put in place wherever fxnvtx has been imported, each piece once what it concerns is imported too.

- `backend="fxnvtx"` by name: from a source tree or a zip, whose metadata is not installed, torch would not find the
  entry point;
- the user's own ranges in code that Dynamo traces;
- torch.profiler shows fxnvtx's ranges, once there can be any; on ROCm so does AMD's profiler;
- with the first slot, Dynamo must not see slots, and what other backends compile is looked at.

So nothing below compile/ needs to know of it.
"""

from __future__ import annotations

import types

from .._imports import when_imported
from .dynamo import see_ranges, watch_compilers

__all__ = ["NAME", "register"]

NAME = "fxnvtx"
_REGISTRY = "torch._dynamo.backends.registry"  # torch 2.0 to 2.15
_PROFILER = "torch.autograd.profiler"
_VERSION = "torch.version"
_RANGES, _CONTROL = "fxnvtx.ranges", "fxnvtx.control"


_registered = False


def register() -> None:
    """Now, or once what each piece concerns is imported. Again: nothing happens."""
    global _registered
    if _registered:
        return
    _registered = True
    when_imported(_REGISTRY, _add)
    see_ranges()
    when_imported(_RANGES, lambda _: when_imported(_PROFILER, _follow_sessions))
    when_imported(_RANGES, lambda _: when_imported(_VERSION, _listen_on_rocm))
    when_imported(_CONTROL, _with_first_slot)


def _add(registry: types.ModuleType) -> None:
    """As torch does with the entry points it discovers: loaded when the backend is first used."""
    from importlib.metadata import EntryPoint

    known = getattr(registry, "_BACKENDS", None)
    if isinstance(known, dict):
        known.setdefault(NAME, EntryPoint(NAME, "fxnvtx.compile.backend:fxnvtx_backend", "torch_dynamo_backends"))
        return
    from .backend import fxnvtx_backend

    registry.register_backend(fxnvtx_backend, name=NAME)


def _follow_sessions(profiler: types.ModuleType) -> None:
    from .kineto import follow_sessions

    follow_sessions(profiler)


def _listen_on_rocm(version: types.ModuleType) -> None:
    if getattr(version, "hip", None) is not None:
        from .roctx import listen_on_rocm

        listen_on_rocm(version.hip)


def _with_first_slot(control: types.ModuleType) -> None:
    control.before_slots.append(_hide_slots)


def _hide_slots() -> None:
    from .hidden import hide_slots

    hide_slots()
    watch_compilers()
