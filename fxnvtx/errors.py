"""Every error that a user of fxnvtx can cause. One line each, and the line says what to do."""

from __future__ import annotations

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
]


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
