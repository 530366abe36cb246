"""`backend="fxnvtx"` by name wherever fxnvtx has been imported: from a source tree or a zip, whose metadata is not
installed, torch would not find the entry point."""

from __future__ import annotations

import types

from .imports import when_imported
from .user_ranges import see_ranges

__all__ = ["NAME", "register"]

NAME = "fxnvtx"
_REGISTRY = "torch._dynamo.backends.registry"  # torch 2.0 to 2.15


def register() -> None:
    """Now, or once torch's registry of backends is imported."""
    when_imported(_REGISTRY, _add)
    see_ranges()


def _add(registry: types.ModuleType) -> None:
    """As torch does with the entry points it discovers: loaded when the backend is first used."""
    from importlib.metadata import EntryPoint

    known = getattr(registry, "_BACKENDS", None)
    if isinstance(known, dict):
        known.setdefault(NAME, EntryPoint(NAME, "fxnvtx.compile.backend:fxnvtx_backend", "torch_dynamo_backends"))
        return
    from .backend import fxnvtx_backend

    registry.register_backend(fxnvtx_backend, name=NAME)
