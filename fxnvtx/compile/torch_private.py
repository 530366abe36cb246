"""Python functions that Dynamo must neither trace nor compile: the eager path's own code.

Speaks to Dynamo's C extension only, which torch loads anyway; `torch._dynamo` costs a second to import and is
not needed for it. A torch without these entry points gets the answers of a torch without Dynamo.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

try:
    from torch._C._dynamo import eval_frame as _eval_frame
except ImportError:  # a torch built without Dynamo
    _eval_frame = None  # type: ignore[assignment]

__all__ = ["dynamo_active", "hide_from_dynamo", "hide_from_torchscript", "hide_module", "jit_traces", "undisturbed"]

_set_strategy = getattr(_eval_frame, "set_code_exec_strategy", None)
_Strategy = getattr(_eval_frame, "_FrameExecStrategy", None)
_Action = getattr(_eval_frame, "_FrameAction", None)


def _nothing_active() -> Any:
    return None


_callback: Callable[[], Any] = getattr(_eval_frame, "get_eval_frame_callback", _nothing_active)
_jit_state: Callable[[], Any] = getattr(torch._C, "_get_tracing_state", _nothing_active)


def hide_from_dynamo(code: types.CodeType) -> None:
    """Let frames of `code` run natively wherever Dynamo is active; the frames they call are compiled as ever.

    Holds for frames that the interpreter enters. A function that Dynamo inlines into a frame it is tracing is
    read, not entered; that is decided by Dynamo's own rules.
    """
    if _set_strategy is not None and _Strategy is not None and _Action is not None:
        _set_strategy(code, _Strategy(_Action.SKIP, _Action.DEFAULT))


def dynamo_active() -> bool:
    """Whether Dynamo watches the frames that this thread enters now: inside a compiled call, or being compiled."""
    return _callback() is not None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let Dynamo watch no frame of this thread meanwhile (torch 2.11 to 2.15: set_eval_frame(callback) -> before)."""
    change = getattr(_eval_frame, "set_eval_frame", None)
    if change is None or not dynamo_active():
        yield
        return
    before = change(None)
    try:
        yield
    finally:
        change(before)


def hide_from_torchscript(attribute: str) -> None:
    """torch.jit.script converts whatever lies in a module's dict; let it pass this one over."""
    from torch.jit import _recursive

    ignored = getattr(_recursive, "ignored_attributes", None)
    if isinstance(ignored, list) and attribute not in ignored:
        ignored.append(attribute)


def jit_traces() -> bool:
    """Whether torch.jit.trace is following this thread."""
    return _jit_state() is not None


def hide_module(namespace: Mapping[str, Any], nested: bool = False) -> None:
    """Hide every function and method that a module defines; `namespace` is its globals(). `nested`: those that are
    defined inside of them, too."""
    own = namespace["__name__"]
    for found in list(namespace.values()):
        if getattr(found, "__module__", None) != own:
            continue
        for member in (found, *(vars(found).values() if isinstance(found, type) else ())):
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(function, types.FunctionType):
                _hide(function.__code__, nested)


def _hide(code: types.CodeType, nested: bool) -> None:
    hide_from_dynamo(code)
    for constant in code.co_consts if nested else ():
        if isinstance(constant, types.CodeType):
            _hide(constant, nested)


hide_module(globals())
