"""Labels: one NVTX domain, its categories and colours, and texts that are registered once and kept.

NVTX keeps every text for ever. A `Label` around it lives as long as somebody has it: those of a model as long as the
model is instrumented, those made for a block of code until many others were made after them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nvtx._lib.lib import Domain as _NvtxDomain
from nvtx._lib.lib import DomainHandle, pop_range, push_range

from ..categories import CATEGORIES
from ..errors import LabelError

__all__ = [
    "CATEGORIES",
    "DOMAIN",
    "HANDLE",
    "Label",
    "classes_of",
    "domain",
    "input_shapes",
    "label",
    "nvtx_end",
    "nvtx_pop",
    "nvtx_push",
    "nvtx_start",
]

DOMAIN = "fxnvtx"


class _Domain(_NvtxDomain):
    """nvtx.Domain without its question whether the domain is enabled.

    From nvtx 0.2.13 on, `Domain()` asks nvtxDomainIsEnabled. That entry point belongs to the payload
    extension; Nsight Systems 2022.4 and 2023.4 refuse the newer extension, the answer is 0, and every call is
    dropped without a word although the tool listens. Calling NVTX with no tool attached is harmless.
    """

    def __new__(cls, name: str | None = None) -> _Domain:
        domain: _Domain = object.__new__(cls)
        domain.handle = DomainHandle(name)
        return domain


# The cheapest way into NVTX: push(prebuilt attributes, domain handle), pop(domain handle).
nvtx_push: Callable[[Any, Any], None] = push_range
nvtx_pop: Callable[[Any], None] = pop_range
domain = _Domain(DOMAIN)
HANDLE = domain.handle
# Ranges that may cross others: start(attributes) -> id, end(id).
nvtx_start: Callable[[Any], int] = domain.start_range
nvtx_end: Callable[[int], None] = domain.end_range


class Label:
    """The text of a range with its NVTX attributes, built once. Make one with `label()`.

    `kind`: the class of the module that it names, "" where it names none or that is not known.
    """

    __slots__ = ("__weakref__", "attributes", "category", "color", "kind", "text")

    def __init__(self, text: str, category: str, color: int, kind: str = "") -> None:
        self.text = text
        self.kind = kind
        self.category = category
        self.color = color
        self.attributes = domain.get_event_attributes(text, color, category)

    def with_payload(self, payload: object) -> Any:
        """NVTX attributes of this label with a number attached (other payloads stay in recordings)."""
        if type(payload) is float or (type(payload) is int and -(2**63) <= payload < 2**63):
            return domain.get_event_attributes(self.text, self.color, self.category, payload)
        return self.attributes

    def __repr__(self) -> str:
        return f"Label({self.text!r}, {self.category!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return label, (self.text, self.category, self.color, self.kind)


Key = tuple[str, str, int, str]

KEPT = 4096
_living: weakref.WeakValueDictionary[Key, Label] = weakref.WeakValueDictionary()
_kept: dict[Key, Label] = {}  # the last ones that no module's class came with


def label(text: str, category: str | None = None, color: int | None = None, kind: str = "") -> Label:
    """The one `Label` of this text (category, colour, class). The text is registered with NVTX once and kept: strings
    that die while a CUDA graph is captured have crashed Nsight Systems, and `--capture-range=nvtx` matches registered
    strings only."""
    if type(text) is not str:
        raise LabelError(f"a range label must be a str, not {type(text).__name__}; pass str(...) of it")
    if category is not None and type(category) is not str:
        raise LabelError(f"a range category must be a str, not {type(category).__name__}")
    if color is not None and type(color) is not int:
        raise LabelError(f"a range color must be an int 0xAARRGGBB, not {type(color).__name__}")
    shown = category or "module"
    key = (text, shown, CATEGORIES.get(shown, 0xFFBBBBBB) if color is None else color & 0xFFFFFFFF, kind)
    found = _kept.get(key) or _living.get(key)
    if found is None:
        # NVTX takes C strings: a NUL would cut the label, a lone surrogate cannot be encoded.
        safe = text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode("utf-8")
        found = _living.setdefault(key, Label(safe, *key[1:]))
        if not kind:
            _kept[key] = found
            if len(_kept) > KEPT:
                _kept.pop(next(iter(_kept)), None)
    return found


def classes_of(labels: Iterable[Label]) -> dict[str, str]:
    """By text, the class of the module that a label names; of several, all: `Conv1d | Linear`.

    A label that does not tell its class (compiled code has such) is given that of instrumented modules of its name.
    """
    found: dict[str, set[str]] = {}
    unknown: set[str] = set()
    for known in labels:
        if known.kind:
            found.setdefault(known.text, set()).add(known.kind)
        elif known.category == "module":
            unknown.add(known.text)
    unknown -= found.keys()
    if unknown:
        for known in list(_living.values()):
            if known.kind and known.text in unknown:
                found.setdefault(known.text, set()).add(known.kind)
    return {text: " | ".join(sorted(found[text])) for text in sorted(found)}


def input_shapes(args: Sequence[object], kwargs: dict[str, object]) -> tuple[object, ...]:
    """Shapes of all tensors in a call, positional then keyword, containers walked. Never raises: what will not tell
    its size (a nested tensor, a lazy one) is left out. A symbolic size is given as text: asking for its number would
    fix it in the program being traced. Hashable, so that it can key a cache."""
    found: list[object] = []
    todo: list[object] = [*reversed([*args, *kwargs.values()])]
    for _ in range(10_000):
        if not todo:
            break
        item = todo.pop()
        if isinstance(item, (list, tuple)):
            todo.extend(reversed(item))
        elif isinstance(item, dict):
            todo.extend(reversed(list(item.values())))
        elif hasattr(type(item), "size") and hasattr(type(item), "dim"):
            try:
                found.append(tuple(n if type(n) is int else str(n) for n in item.size()))  # type: ignore[attr-defined]
            except Exception:  # any tensor subclass may refuse in its own way
                continue
    return tuple(found)
