"""From the work that a table carries to entries of labels: once per table and block, when it first runs for a listener.

Generated code goes through its rows in one order, so how often each range opens in one run follows from the table.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from ..categories import MODULE
from ..labels import Label
from ..ranges import local
from ..work import Entry, register
from .notices import warn_once
from .region import Call
from .torch_private import hide_module

__all__ = ["tell_work"]


class _Key(NamedTuple):
    label: str
    under: str


class _Base(NamedTuple):
    """The range that is open where no row's is. module: the nearest one around what opens in it. why: its calls may
    not be those of the generated function."""

    key: _Key
    module: str
    why: str


class _Table(Protocol):
    work: list[Any]
    backward: bool
    below: bool


class _Resolved(Protocol):
    levels: list[tuple[tuple[Any, Label], ...]]


def tell_work(table: _Table, resolved: _Resolved, call: Call) -> None:
    """Register what the ranges of this table's rows stand for. Never raises."""
    if not table.work:
        return
    try:
        register(_entries(table, resolved, call), None if call.control is None else call.control.model())
    except Exception as error:  # a model runs, whatever its work may be
        warn_once("telling", f"the work of a compiled region is not carried: {error!r}")


def _entries(table: _Table, resolved: _Resolved, call: Call) -> Iterable[Entry]:
    opened: dict[_Key, int] = {}
    flops: dict[_Key, dict[str, int]] = {}
    moved: dict[_Key, int] = {}
    unknown: dict[_Key, str] = {}
    base = _base(table, call)
    device = next((t.device.type for held in call.alive if (t := held()) is not None), "")
    seen: set[Any] = set()
    here: tuple[tuple[Any, Label], ...] = ()
    for row, launched, size, why in table.work:
        levels = resolved.levels[row]
        same = 0
        while same < min(len(here), len(levels)) and here[same] == levels[same]:
            same += 1
        for depth in range(same, len(levels)):
            step, text = levels[depth]
            if text.category == MODULE:
                if step in seen:
                    continue  # a piece of a call that was counted
                seen.add(step)
            key = _key(levels[: depth + 1], base)
            opened[key] = opened.get(key, 0) + 1
        here = levels
        key = _key(levels, base)
        if not levels:
            opened[key] = 1
            why = why or base.why
        total = flops.setdefault(key, {})
        for kind, count in launched:
            total[kind] = total.get(kind, 0) + count
        moved[key] = moved.get(key, 0) + size
        unknown[key] = unknown.get(key) or why
    opened.setdefault(base.key, 1)
    for key, calls in opened.items():
        numbers = tuple(sorted(flops.get(key, {}).items()))
        why = unknown.get(key, "")
        yield Entry(*key, table.backward, call.region.part, calls, numbers, moved.get(key, 0), why, device)


def _key(levels: tuple[tuple[Any, Label], ...], base: _Base) -> _Key:
    if not levels:
        return base.key
    text = levels[-1][1]
    if text.category == MODULE:
        return _Key(text.text, "")
    around = [above.text for _, above in levels[:-1] if above.category == MODULE]
    return _Key(text.text, around[-1] if around else base.module)


def _base(table: _Table, call: Call) -> _Base:
    again = "a part of the code that may run several times" if table.below else ""
    if call.base is not None and call.region.framed:
        return _Base(_Key(call.base, ""), call.base, again)
    around = [entry[0].text for entry in local.stack if entry[0].category == MODULE]
    module = around[-1] if around else ""
    if call.base is not None:
        return _Base(_Key(call.base, module), module, again)
    return _Base(_Key(module, ""), module, "in a compiled function that is no module's")


hide_module(globals())  # compiled code calls this with Dynamo watching
