"""What a range is called and what its text says about it: category, role, fused list; texts folded together (pure)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ..categories import CATEGORIES, MODULE

__all__ = [
    "PIECE",
    "UNKNOWN",
    "Folding",
    "Name",
    "Point",
    "Span",
    "category_of",
    "clean",
    "fold",
    "fused_owners",
    "infer_category",
    "is_module",
    "numbered",
    "role_of",
]


UNKNOWN = "cannot attribute: "

# torch.autograd.profiler.emit_nvtx numbers every op, so that no two ranges would ever share a row
_NUMBERS = re.compile(r", (?:(?:op_id|seq|seqid) = \d+|input_op_ids = \[[^\]]*\])")
_DICT_MODULE = re.compile(r"^\{'Module': ?'([^']+)'")
_DICT_INPUTS = re.compile(r"'Inputs': ?(\[\[.*?\]\])(?=, ?'|\})")
_REQUEST = re.compile(r"^request[#_: ]?\d*$")
_STAGE = re.compile(r"^stage[_:]")
_LOOP = re.compile(r"^\w*denoising_loop$")
_STEP = re.compile(r"^(?:\w*denoising_)?step(?:[_# \[]?\d.*)?$")
# other programs' steps: Megatron's `iteration 10` and `Step 10 to 20`, TensorRT-LLM's `_forward_step 12: 3 ctx reqs`,
# torch.profiler's `ProfilerStep#3`, and their like
_OTHER_STEP = re.compile(
    r"^(?:\[\w+\] ?)?_?(?:(?:forward|train|training|decode|generation|inference|profiler)[_ ]?)?"
    r"(?:step|iteration|iter)s?[ _#:=]*\[?\d.*$",
    re.IGNORECASE,
)
_RESIDENCY = re.compile(r"^residency[.:]")
_OP = re.compile(r"^(?:\w+::\w+|autograd::|\w+Backward\d*$|nccl[A-Z]\w*$)")
_MODULE = re.compile(r"^[A-Za-z_]\w*(?:\.\w+)*(?: in=\[.*\])?$")
_FUSED = re.compile(r"^fused\((.*)\)$")
_COUNTED = re.compile(r"(?<=[^\W\d] )\d+$")
_LAYER = re.compile(r"\b((?:layer|block|stage|decoder|encoder)s?[_ ])\d+(?=[_. ]|$)", re.IGNORECASE)  # `layer_3_attn`
_DIGITS = re.compile(r"\d+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")  # timesteps may have a fraction


class Name(NamedTuple):
    """What tells sibling ranges apart. `domain` is empty for fxnvtx's own domain and for NVTX's default one. number:
    which kind of the label's calls, where their work differs; in a report's trees they are one."""

    text: str
    category: str
    domain: str = ""
    number: int | None = None


def clean(text: str) -> str:
    """The text as fxnvtx would write it: without the running numbers that torch's emit_nvtx adds, shapes behind ` in=`,
    and of the dict-like text of vLLM's and NVIDIA's module hooks the module and its shapes."""
    if " = " in text:
        text = _NUMBERS.sub("", text)
        head, mark, shapes = text.partition(", sizes = ")
        return f"{head} in={shapes}" if mark else text
    if text.startswith("{"):
        module = _DICT_MODULE.match(text)
        if module:
            inputs = _DICT_INPUTS.search(text)
            return f"{module[1]} in={inputs[1]}" if inputs else module[1]
    return text


@lru_cache(maxsize=100_000)
def infer_category(text: str) -> str:
    """The category of a range that was emitted without one, from the spelling of its text."""
    for pattern, category in (
        (_REQUEST, "request"),
        (_STAGE, "stage"),
        (_LOOP, "loop"),
        (_STEP, "step"),
        (_OTHER_STEP, "step"),
        (_RESIDENCY, "residency"),
        (_OP, "op"),
        (_MODULE, "module"),
        (_FUSED, "module"),
    ):
        if pattern.match(text):
            return category
    return "range"


_KNOWN = {*CATEGORIES, "range", "unknown"}


def category_of(name: Name) -> str:
    """The range's category. One that fxnvtx does not know, such as another program's "layer", is judged by the text."""
    return name.category if name.category in _KNOWN else infer_category(name.text)


_ROLES = (
    ("norm", re.compile(r"norm|^ln[_\d]*$|adaln|scale_shift", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention|qkv|^(?:to_)?[qkv](?:_proj)?$|^to_out$|sdpa", re.IGNORECASE)),
    ("mlp", re.compile(r"mlp|^ffn?$|feed_?forward|^fc\d*$|^(?:gate|up|down)_proj$|experts?$|moe", re.IGNORECASE)),
)


@lru_cache(maxsize=100_000)
def role_of(name: Name, kind: str = "") -> str:
    """What a reader tells ranges apart by: the category; of modules "fused", "attention", "mlp", "norm" or "block",
    where the text (the last part that tells) or `kind`, the module's class, say so."""
    category = category_of(name)
    if fused_owners(name.text):
        return "fused"
    if category != MODULE:
        return category
    parts = name.text.partition(" in=")[0].split(".")
    numbered_last = len(parts) > 1 and parts[-1].isdecimal()
    # what lies above a block does not tell what the block is: its class may
    for text in (kind,) if numbered_last else (*reversed(parts), kind):
        if text.isdecimal():
            break
        for role, pattern in _ROLES:
            if pattern.search(text):
                return role
    return "block" if numbered_last else MODULE


def is_module(name: Name) -> bool:
    """Whether a range stands for a module or an operator of a model."""
    return category_of(name) in ("module", "op")


def numbered(text: str, category: str, payload: Any) -> str:
    """Steps and requests that differ only in their integer payload get it into their name."""
    if category in {"step", "request"} and type(payload) is int and not _DIGITS.search(text):
        return f"{text}[{payload}]"
    return text


def fused_owners(text: str) -> tuple[str, ...]:
    """The modules that a fused kernel's range lists; () for any other range."""
    match = _FUSED.match(text)
    if not match:
        return ()
    return tuple(part for part in (owner.strip() for owner in match[1].split(", ")) if part)


class Folding:
    """`fold` for labels whose modules' classes are known: a number stays where it tells different classes apart, as in
    a Sequential of a Linear and an activation, and becomes `*` where it only counts identical blocks."""

    def __init__(self, classes: Mapping[str, str]) -> None:
        self._several: set[str] = set()
        self._known: dict[str, str] = {}
        first: dict[str, str] = {}
        for label in sorted(classes, key=lambda text: text.count(".")):  # what lies above is decided before
            pattern = self._folded(label)
            if first.setdefault(pattern, classes[label]) != classes[label]:
                self._several.add(pattern)

    def __call__(self, text: str, category: str) -> str:
        if not self._several or category in {"step", "request"} or fused_owners(text):
            return fold(text, category)
        found = self._known.get(text)
        if found is None:
            head, mark, tail = text.partition(" in=")
            found = self._known[text] = self._folded(head) + mark + tail
        return found

    def _folded(self, label: str) -> str:
        parts: list[str] = []
        for part in label.split("."):
            counted = ".".join([*parts, "*"])
            parts.append("*" if parts and part.isdecimal() and counted not in self._several else part)
        return ".".join(parts)


@lru_cache(maxsize=200_000)
def fold(text: str, category: str) -> str:
    """The text with what varies between repetitions replaced by `*`.

    Modules: dotted parts that are numbers ("blocks.7.attn" -> "blocks.*.attn"). Steps and requests: every number.
    Ranges of no category: a number behind words ("Compute 370" -> "Compute *").
    Fused modules: which neighbours they are ("blocks.7.ff, blocks.8.norm" -> "blocks.i.ff, blocks.i+1.norm").
    """
    if category in {"step", "request"}:
        return _NUMBER.sub("*", text).replace("*_t*", "*").replace("[*]", "*")
    owners = fused_owners(text)
    if owners:
        return f"fused({', '.join(_folded_owners(owners))})"
    head, mark, tail = text.partition(" in=")
    head = _LAYER.sub(r"\1*", head)
    if category in ("", "range"):
        head = _COUNTED.sub("*", head)  # another program's "Compute 370"
    return re.sub(r"(?<=\.)\d+(?=[.,)]|$)", "*", head) + mark + tail


def _folded_owners(owners: tuple[str, ...]) -> list[str]:
    """Owners whose numbers are all alike get `*`. Where they are not, as in a kernel of two neighbouring blocks, they
    are counted from the first: `blocks.i.ff`, `blocks.i+1.norm1`."""
    split = [owner.split(".") for owner in owners]
    numbers: dict[tuple[str, ...], list[int]] = {}
    for parts in split:
        for place, part in enumerate(parts):
            if place and part.isdecimal():
                numbers.setdefault(_counted(parts[:place]), []).append(int(part))
    found = []
    for parts in split:
        shown = list(parts)
        for place, part in enumerate(parts):
            if place and part.isdecimal():
                known = numbers[_counted(parts[:place])]
                away = int(part) - known[0]
                shown[place] = "*" if len(set(known)) == 1 else f"i{away:+d}" if away else "i"
        found.append(".".join(shown))
    return list(dict.fromkeys(found))


def _counted(parts: list[str]) -> tuple[str, ...]:
    return tuple("*" if place and part.isdecimal() else part for place, part in enumerate(parts))


# ----------------------------------------------------------------------------------------- ranges as readers give them


class _Piece(str):
    """A payload that no other range has."""

    __slots__ = ()


PIECE = _Piece("one more piece of a call")  # the payload of a range that goes on with a call seen before

# thread, start, end, name, payload, is still open. Sorted by thread, start, and end downwards.
Span = tuple[int, int, int, Name, Any, bool]

# thread, start, end of a call that launched device work, and what it launched. Sorted by thread and start.
Point = tuple[int, int, int, Any]
