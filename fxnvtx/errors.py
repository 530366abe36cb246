"""Every error that a user of fxnvtx can cause, one line each that says what to do; and what is said only once."""

from __future__ import annotations

import logging
import threading

__all__ = [
    "CaptureError",
    "CompileError",
    "ConfigError",
    "FxnvtxError",
    "InstrumentError",
    "LabelError",
    "OutputError",
    "PipelineError",
    "SelectionError",
    "ToolError",
    "TraceError",
    "warn_once",
]

log = logging.getLogger("fxnvtx")
_said: set[str] = set()
_lock = threading.Lock()


def warn_once(reason: str, text: str) -> None:
    """Log what a user has to know: once per process and reason."""
    with _lock:
        if reason in _said:
            return
        _said.add(reason)
    log.warning("%s", text)


class FxnvtxError(Exception):
    """Base of all errors that fxnvtx raises on purpose."""


class LabelError(FxnvtxError, TypeError):
    """A range label is not text."""


class InstrumentError(FxnvtxError, TypeError):
    """The object cannot be instrumented, or an option of `instrument` has no meaning."""


class SelectionError(FxnvtxError, ValueError):
    """An include/exclude pattern matches no module."""


class TraceError(FxnvtxError, RuntimeError):
    """path="fx" was asked for and a level cannot be traced soundly."""


class CompileError(FxnvtxError, RuntimeError):
    """An option of the Dynamo backend has no meaning."""


class ConfigError(FxnvtxError, ValueError):
    """A setting (argument, config file or environment variable) has no meaning."""


class PipelineError(FxnvtxError, RuntimeError):
    """A pipeline, a stage, an executor or the residency manager was used against its contract."""


class CaptureError(FxnvtxError, RuntimeError):
    """A capture or recording cannot be read."""


class OutputError(FxnvtxError, OSError):
    """Something could not be written."""


class ToolError(FxnvtxError, RuntimeError):
    """An external tool (nsys) failed."""
