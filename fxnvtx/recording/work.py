"""How much work each range stands for: operations and bytes, as they are carried in recordings and captures.

An `Entry` is registered once per label and shape, when it becomes known: compiled code when it first runs for somebody
who listens, eager code where somebody asked for it (`record(work=True)`). It goes into the recordings that are stopped
after that, and to NVTX as one registered string, which a tool keeps also where its capture begins later.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from nvtx._lib.lib import mark

from ..ranges import emit
from ..ranges.labels import HANDLE, domain

__all__ = ["PREFIX", "Entry", "News", "carried", "decoded", "encoded", "read_entry", "register"]

PREFIX = "fxnvtx.work "
MOST = 100_000  # entries of one process
_COLOR = 0xFF888888


class Entry(NamedTuple):
    """What the ranges of one label do themselves, without the ranges inside them, in one run of the code around.

    under: label of the nearest module around, where the range is no module's (`fused(...)` says who by it). backward:
    it is inside a backward pass. part: which piece of the module's code this is; pieces add up, all others of a label
    are alternatives (other shapes). calls: how many calls of the label the numbers are for. flops: operations by type
    of number, torch.utils.flop_counter's. moved: bytes read and written. unknown: why the numbers are not known.
    """

    label: str
    under: str
    backward: bool
    part: str
    calls: int
    flops: tuple[tuple[str, int], ...]
    moved: int
    unknown: str
    device: str


# with the model that an entry is about: what is known of one goes with it, another may have the same labels
_entries: dict[Entry, weakref.ref[Any] | None] = {}
_registered = 0  # how many there have ever been
_lock = threading.Lock()


def register(entries: Iterable[Entry], model: object = None) -> None:
    """Let every recording and capture of this process carry these, while `model` lives; those known already are not
    carried twice."""
    global _registered
    owner = None if model is None else weakref.ref(model)
    with _lock:
        for gone in [e for e, held in _entries.items() if held is not None and held() is None]:
            del _entries[gone]
        found = dict.fromkeys(entries)
        new = [e for e in found if e not in _entries][: max(0, MOST - len(_entries))]
        _entries.update(dict.fromkeys((e for e in found if e in _entries), owner))
        _entries.update(dict.fromkeys(new, owner))
        _registered += len(new)
    if emit.nvtx_on:
        for entry in new:
            mark(domain.get_event_attributes(encoded(entry), _COLOR, "work"), HANDLE)


def carried(labels: Collection[str]) -> list[list[Any]]:
    """What is known of these labels, as JSON has it."""
    with _lock:
        return [_row(e) for e, held in _entries.items() if e.label in labels and (held is None or held() is not None)]


class News:
    """What became known since one last asked: for a recording that is written while the process runs. Asking costs one
    comparison where there is nothing new."""

    def __init__(self) -> None:
        self._asked = 0
        self._given: set[Entry] = set()

    def rows(self) -> list[list[Any]]:
        """As JSON has them, each once."""
        if self._asked == _registered:
            return []
        with _lock:
            self._asked = _registered
            new = [e for e in _entries if e not in self._given]
        self._given.update(new)
        return [_row(e) for e in new]


def encoded(entry: Entry) -> str:
    """One line of text that `decoded` reads."""
    return PREFIX + json.dumps(_row(entry), separators=(",", ":"))


def decoded(text: str) -> Entry | None:
    """The entry that a text of a capture carries; None where it carries none that this version understands."""
    if not text.startswith(PREFIX):
        return None
    try:
        return read_entry(json.loads(text[len(PREFIX) :]))
    except (ValueError, RecursionError):
        return None


def _row(entry: Entry) -> list[Any]:
    return [dict(value) if isinstance(value, tuple) else value for value in entry]


_KINDS = (str, str, bool, str, int, dict, int, str, str)


def read_entry(row: Any) -> Entry | None:
    """An entry as JSON has it; None for anything else. Later versions may add to its end."""
    if not isinstance(row, list) or len(row) < len(_KINDS):
        return None
    values = row[: len(_KINDS)]
    if any(type(value) is not kind for value, kind in zip(values, _KINDS, strict=True)):
        return None
    flops = values[5]
    if any(type(n) is not int or n < 0 for n in (*flops.values(), values[4], values[6])) or values[4] < 1:
        return None
    values[5] = tuple(sorted((str(kind), n) for kind, n in flops.items()))
    return Entry(*values)
