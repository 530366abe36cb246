"""What the environment asks of the plugin. Nothing in it may keep a server from starting."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from ...errors import ConfigError
from ...steps import Numbers

__all__ = ["VARIABLE", "Options", "guarded", "read_options"]

VARIABLE = "FXNVTX_SGLANG"
MODES = ("layers", "stages", "off")
log = logging.getLogger("fxnvtx.sglang")
F = TypeVar("F", bound=Callable[..., Any])
_told: set[str] = set()


def guarded(function: F) -> F:
    """A part of the plugin whose failure must not reach SGLang: it is told once, and None comes back."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            told = f"{function.__name__}: {type(error).__name__}: {error}"
            if told not in _told and len(_told) < 100:
                _told.add(told)
                log.warning("some ranges are missing (%s)", told)
            return None

    return cast(F, call)


@dataclass(frozen=True)
class Options:
    """`steps`: the steps whose layers show, None for all. `record`: a folder for one recording a request."""

    mode: str = "layers"
    depth: int | None = None
    steps: Numbers | None = None
    shapes: bool = True
    record: str | None = None

    @property
    def layers(self) -> bool:
        return self.mode == "layers"


def read_options(environment: Mapping[str, str] | None = None) -> Options:
    """The options of the environment. What has no meaning is told and left at its default."""
    given = os.environ if environment is None else environment

    def text(name: str) -> str:
        return given.get(f"{VARIABLE}{name}", "").strip()

    def told(name: str, wanted: str) -> None:
        log.warning("%s%s=%s has no meaning: use %s; it is ignored", VARIABLE, name, text(name), wanted)

    mode = text("").lower() or "layers"
    if mode not in MODES:
        told("", ", ".join(MODES))
        mode = "layers"
    depth: int | None = None
    if text("_DEPTH"):
        if text("_DEPTH").isdecimal():
            depth = int(text("_DEPTH"))
        else:
            told("_DEPTH", "a whole number of levels")
    shapes = text("_SHAPES").lower() or "1"
    if shapes not in {"0", "1", "true", "false"}:
        told("_SHAPES", "1 or 0")
        shapes = "1"
    return Options(mode, depth, _steps(text, told), shapes in {"1", "true"}, text("_RECORD") or None)


def _steps(text: Callable[[str], str], told: Callable[[str, str], None]) -> Numbers | None:
    if not text("_STEPS"):
        return None
    try:
        return Numbers.read(text("_STEPS"))
    except ConfigError:
        told("_STEPS", "step numbers like 4-8,20")
        return None
