"""Which option has a meaning in which mode of `fxnvtx report`: the others are errors, never ignored in silence."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.core import ParameterSource

from .selection import VIEWS

__all__ = ["check_options", "refuse"]

_TABLES = frozenset({"text", "json", "csv"})
_ALL = _TABLES | {"html"}
_NESTED = frozenset({"tree", "module", "class", "component", "range"})
_STEPS = frozenset({"request", "step"})

# option -> formats in which it has a meaning, and views (None: all) in which the tables have
_MEANING: dict[str, tuple[frozenset[str], frozenset[str] | None]] = {
    "by": (_TABLES, None),
    "depth": (_TABLES, frozenset({"tree", "module"})),
    "include": (_ALL, None),
    "exclude": (_ALL, None),
    "fold": (_ALL, _STEPS | (_NESTED - {"class"})),
    "kernels": (_ALL, frozenset({"tree"})),
    "split_fused": (_ALL, _NESTED - {"component"}),
    "limit": (frozenset({"text"}), None),
    "sort": (_TABLES, None),
    "requests": (_ALL, None),
    "steps": (_ALL, None),
    "skip_warmup": (_ALL, None),
    "skip_first": (_ALL, None),
    "between": (_ALL, None),
    "keep_compile": (_ALL, None),
    "jobs": (_ALL, None),
    "peak": (_ALL, frozenset(VIEWS) - {"kernel"}),
    "findings_": (frozenset({"text", "json"}), None),
    "exact": (_ALL, frozenset(VIEWS) - {"stage", "class", "kernel"}),
    "classes": (_ALL, _NESTED),
    "form": (_ALL | {"chrome", "speedscope"}, None),
}


def check_options(context: click.Context, mode: str, by: str, folded: bool) -> None:
    """Raise a usage error for an option that was given and has no meaning. mode: a format, or "scrub"."""
    for name, (formats, views) in _MEANING.items():
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        if mode not in formats:
            refuse(context, name, "--scrub" if mode == "scrub" else f"--format {mode}")
        if views is not None and mode in _TABLES and by not in views:
            refuse(context, name, f"--by {by}")
        if name == "classes" and mode in _TABLES and by != "class" and not folded:
            refuse(context, name, f"--by {by} without --fold")


def refuse(context: click.Context, name: str, mode: str) -> None:
    """Raise the usage error for one option."""
    option = next(parameter for parameter in context.command.params if parameter.name == name)
    shown: Iterable[str] = [word for word in option.opts if word.startswith("--")] or option.opts
    raise click.UsageError(f"{next(iter(shown))} has no meaning with {mode}")
