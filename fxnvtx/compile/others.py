"""Instrumented models that were compiled by a backend which is not ours: said once, explained, or taken over.

Everything Dynamo compiles passes one method, whatever the backend and however it was asked for. There we see whose
code it is. What is compiled stays as it is, unless "inductor" is to mean ours: for one model by instrument(model,
compile=True), for all that `instrument()` knows by FXNVTX_COMPILE=1.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from .. import control as _control
from .. import ranges as _ranges
from .._imports import when_imported
from .naming import family
from .notices import CompiledRegion, note, warn_once
from .user_ranges import absorb

__all__ = ["TAKE_PART", "silent_models", "watch_others"]

TAKE_PART = "FXNVTX_COMPILE"
# torch 2.11 to 2.15; the method is older than that
_WHERE, _KIND, _METHOD = "torch._dynamo.output_graph", "OutputGraph", "call_user_compiler"
_untold: dict[tuple[str, str], str] = {}  # (model, backend) -> what to say once somebody listens
_told: set[tuple[str, str]] = set()


@functools.cache
def watch_others() -> None:
    """Now, or when Dynamo gets imported."""
    when_imported(_WHERE, _watch)
    _ranges.on_listeners_changed(_tell)


def silent_models() -> str | None:
    """Which instrumented models were compiled by other backends, in words; None where there are none."""
    if not _told and not _untold:
        return None
    return ", ".join(f'{model} by "{name}"' for model, name in (*_told, *_untold))


def _watch(namespace: types.ModuleType) -> None:
    kind = getattr(namespace, _KIND, None)
    original = getattr(kind, _METHOD, None)
    if not isinstance(kind, type) or original is None:
        warn_once(
            "others", "this torch does not show which backend compiles a model: fxnvtx cannot say what is missing"
        )
        return
    setattr(kind, _METHOD, _watching(original))


def _watching(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call_user_compiler(self: Any, gm: Any, example_inputs: Any) -> Any:
        compiler = getattr(self, "compiler_fn", None)
        ours = None
        try:
            absorb(gm, keep=_is_ours(compiler))
            ours = _look(compiler, gm, example_inputs)
        except Exception as error:  # a model compiles, whatever we make of it
            warn_once("others", f"what another backend compiled is not known, reading its graph failed: {error!r}")
        if ours is None:
            return original(self, gm, example_inputs)
        self.compiler_fn = ours
        try:
            return original(self, gm, example_inputs)
        finally:
            self.compiler_fn = compiler

    return call_user_compiler


def _unwrapped(compiler: Any) -> tuple[Any, Any]:
    """What torch.compile has put around a backend, and the backend."""
    while hasattr(compiler, "_torchdynamo_orig_backend"):
        compiler = compiler._torchdynamo_orig_backend
    return compiler, getattr(compiler, "compiler_fn", compiler)


def _is_ours(compiler: Any) -> bool:
    from .backend import Backend

    wrapper, inner = _unwrapped(compiler)
    taken = os.environ.get(TAKE_PART) == "1" or any(control.compiles for control in _control.controls())
    return isinstance(inner, Backend) or (taken and isinstance(getattr(wrapper, "config", None), dict))


def _look(compiler: Any, graph_module: Any, inputs: Any) -> Any:
    """The backend to compile with instead; None where it stays as it is."""
    from .backend import Backend, fxnvtx_backend
    from .module_index import current_frame, read_graph

    wrapper, inner = _unwrapped(compiler)
    if not _control.controls() or isinstance(inner, Backend):
        return None
    region, _ = read_graph(graph_module, current_frame(), list(inputs))
    modules = [m for a in region.anchors if a.module is not None and (m := a.module()) is not None]
    found = next((c for m in modules if (c := family(m)) is not None), None)
    if found is None:
        return None
    name = getattr(wrapper, "compiler_name", None) or getattr(inner, "__name__", None) or type(inner).__name__
    options = getattr(wrapper, "config", None)
    taken = found.compiles or os.environ.get(TAKE_PART) == "1"
    if name == "inductor" and isinstance(options, dict) and taken:
        return functools.partial(fxnvtx_backend, options=dict(options))
    reason = 'its layers show where the model is compiled with backend="fxnvtx"'
    if name == "inductor":
        reason += f", with instrument(model, compile=True), or with {TAKE_PART}=1 in the environment"
    if _runs_operator():
        reason = f"torch.cond, while_loop and their like compile themselves when they are called eagerly; {reason}"
    note(CompiledRegion(region.title, name, "none", reason, region.paths))
    _say(found.text(""), name, reason)
    return None


def _runs_operator() -> bool:
    """Whether what is compiled is torch.cond, while_loop or another such operator, called in eager mode (seen in torch
    2.13; where torch has no such mark the line just does not say so)."""
    marks = getattr(sys.modules.get("torch._higher_order_ops.utils"), "_hop_compile_tls", None)
    return bool(getattr(marks, "in_hop_compile", False))


def _say(model: str, name: str, reason: str) -> None:
    if (model, name) not in _told:
        _untold[model, name] = f'{model} was compiled by "{name}", no layer inside is shown: {reason}'
    _tell()


def _tell() -> None:
    """Said while somebody listens: to nobody else it matters."""
    while _ranges.active and _untold:
        key, text = _untold.popitem()
        _told.add(key)
        _ranges.log.warning("%s", text)
