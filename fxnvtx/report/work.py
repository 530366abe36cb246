"""Work joined with time: how long each range would take on a device that did its work at its peak (pure).

A range's own work is what its entry says (recording), as often as it was called. Its roof is the longer of two times:
all its operations at the device's peak, or all its bytes at the memory's. A range's total is the sum of what is inside:
so operations, bytes, times and roofs add up from layers to the model. Peaks are data sheets' dense figures, and what a
user says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple

from ..categories import MODULE, OP
from ..errors import ConfigError
from ..recording import ONE_KIND, Entry
from .labels import Name, clean
from .part import Gpu
from .tree import Node, merge_into, total

__all__ = ["KINDS", "KNOWN", "Peaks", "Table", "different", "parse_peaks", "peaks_of", "rate", "united"]


# ----------------------------------------------------------------------------------------- what devices can do at best


KINDS = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "int8")
T = 1e12


@dataclass(frozen=True)
class Peaks:
    """flops: operations a second by type of number; memory: bytes a second, 0 where not known. source: who says so."""

    flops: Mapping[str, float] = field(default_factory=dict)
    memory: float = 0.0
    source: str = ""

    def __bool__(self) -> bool:
        return bool(self.flops) or self.memory > 0


def _sheet(memory: float, source: str, **tera: float) -> Peaks:
    return Peaks({kind: value * T for kind, value in tera.items()}, memory * T, source)


# By what the driver calls the device, the first that matches. Tensor cores, dense (data sheets often print twice that,
# with sparsity), numbers added up in fp32; fp32 and fp64 are those of the plain units, fp64 of tensor cores where the
# sheet has it. TB/s and TFLOP/s at the boost clock.
_H100 = {"fp64": 67.0, "fp32": 67.0, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4, "fp8": 1978.9, "int8": 1978.9}
_H100_PCIE = {"fp64": 51.0, "fp32": 51.0, "tf32": 378.0, "bf16": 756.0, "fp16": 756.0, "fp8": 1513.0, "int8": 1513.0}
_A100 = {"fp64": 19.5, "fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0, "int8": 624.0}
_L40S = {"fp32": 91.6, "tf32": 183.0, "bf16": 362.05, "fp16": 362.05, "fp8": 733.0, "int8": 733.0}
_RTX_4090 = {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2, "fp8": 330.3, "int8": 660.6}
KNOWN: tuple[tuple[str, Peaks], ...] = (
    (r"\bB200\b", _sheet(8.0, "NVIDIA DGX B200 data sheet", bf16=2250, fp16=2250, fp8=4500, int8=4500)),
    (r"\bH200\b(?! NVL)", _sheet(4.8, "NVIDIA H200 data sheet (SXM)", **_H100)),
    (r"\bH100 PCIe", _sheet(2.0, "NVIDIA H100 data sheet (PCIe)", **_H100_PCIE)),
    (r"\bH100\b.*(HBM3|SXM)", _sheet(3.35, "NVIDIA H100 data sheet (SXM)", **_H100)),
    (r"\bA100.80GB PCIe", _sheet(1.935, "NVIDIA A100 data sheet (80GB PCIe)", **_A100)),
    (r"\bA100-SXM\d?-80GB", _sheet(2.039, "NVIDIA A100 data sheet (80GB SXM)", **_A100)),
    (r"\bA100.*40GB", _sheet(1.555, "NVIDIA A100 data sheet (40GB)", **_A100)),
    (r"\bL40S\b", _sheet(0.864, "NVIDIA L40S data sheet", **_L40S)),
    (r"\bL4\b", _sheet(0.3, "NVIDIA L4 data sheet", fp32=30.3, tf32=60, bf16=121, fp16=121, fp8=242.5, int8=242.5)),
    (r"\bA10\b", _sheet(0.6, "NVIDIA A10 data sheet", fp32=31.2, tf32=62.5, bf16=125, fp16=125, int8=250)),
    (r"\bRTX 4090\b(?! D| Laptop)", _sheet(1.008, "NVIDIA Ada GPU architecture whitepaper", **_RTX_4090)),
    (r"\bV100\b.*SXM2", _sheet(0.9, "NVIDIA V100 data sheet (SXM2)", fp64=7.8, fp32=15.7, fp16=125)),
    (r"\bT4\b", _sheet(0.32, "NVIDIA T4 data sheet", fp32=8.1, fp16=65, int8=130)),
)


def peaks_of(gpus: Iterable[Gpu], given: Peaks | None = None) -> tuple[Peaks, str]:
    """The peaks to measure by, and what to say about them. What the user gives comes first; of the device's memory the
    capture's own figure before the sheet's."""
    kinds = {gpu.name: gpu for gpu in gpus}
    found, said = Peaks(), ""
    if len(kinds) == 1:
        (gpu,) = kinds.values()
        found = next((peaks for pattern, peaks in KNOWN if re.search(pattern, gpu.name)), Peaks())
        said = f"peaks of {gpu.name}: {found.source}" if found else f"no peaks known of {gpu.name}: give --peak"
        if gpu.bandwidth > 0:
            found = replace(found, memory=float(gpu.bandwidth))
    elif kinds:
        said = f"{len(kinds)} kinds of device ({', '.join(sorted(kinds))}): give --peak"
    if given is None or not given:
        return found, said
    both = Peaks({**found.flops, **given.flops}, given.memory or found.memory, found.source)
    return both, f"{said.partition(': give')[0]}; peaks as given with --peak" if found and said else "peaks as given"


_SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_FIGURE = re.compile(r"^(\d+(?:\.\d+)?(?:e[+-]?\d{1,2})?)([KMGTP]?)$", re.IGNORECASE)


def parse_peaks(text: str) -> Peaks:
    """`bf16=989T,mem=3.35T`: operations a second by type of number, and bytes a second of the memory.

    Raises ConfigError for anything else.
    """
    flops: dict[str, float] = {}
    memory = 0.0
    for item in text.split(","):
        kind, equals, figure = (part.strip() for part in item.partition("="))
        found = _FIGURE.match(figure)
        if not equals or found is None or kind not in (*KINDS, "mem"):
            raise ConfigError(
                f"{item.strip()!r} is no peak: write bf16=989T,mem=3.35T, of {', '.join(KINDS)} and mem, per second"
            )
        value = float(found[1]) * _SCALES[found[2].upper()]
        if not 0 < value < 1e21:
            raise ConfigError(f"a peak of {figure} {kind} is not possible")
        if kind == "mem":
            memory = value
        else:
            flops[kind] = value
    return Peaks(flops, memory)


# ----------------------------------------------------------------------------------------------- work joined with time


_Key = tuple[str, str, bool]


class Known(NamedTuple):
    """Of one call."""

    flops: tuple[tuple[str, Fraction], ...]
    moved: Fraction


class Table:
    """Entries by range, and by range and kind of call where the calls say which they are. Parts of a module's code add
    up; different numbers of one part are of different shapes."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        by_key: dict[_Key | tuple[_Key, int], dict[str, set[Known | str]]] = {}
        self.devices: set[str] = set()
        for entry in entries:
            flops = tuple((kind, Fraction(n, entry.calls)) for kind, n in entry.flops)
            known: Known | str = entry.unknown or Known(flops, Fraction(entry.moved, entry.calls))
            key = (clean(entry.label), clean(entry.under), entry.backward)
            if entry.part != ONE_KIND:
                by_key.setdefault(key, {}).setdefault(entry.part, set()).add(known)
            if entry.number is not None:
                by_key.setdefault((key, entry.number), {}).setdefault("eager", set()).add(known)
            self.devices.add(entry.device)
        self._found = {key: _settled(parts) for key, parts in by_key.items()}

    def __bool__(self) -> bool:
        return bool(self._found)

    def of(self, name: Name, under: Name | None, backward: bool) -> Known | str | None:
        """The work of one call; a text that says why it is not known; None where nothing was said of this range.
        under: the nearest module around."""
        module = name if name.category == MODULE else under
        around = "" if module is name or module is None else _bare(module)
        key = (_bare(name), around, backward)
        if module is not None and module.number is not None and (key, module.number) in self._found:
            return self._found[key, module.number]
        return self._found.get(key)


def _bare(name: Name) -> str:
    return name.text.partition(" in=")[0]


def different(entries: Iterable[Entry]) -> frozenset[str]:
    """Labels of modules whose calls are of several kinds, so that one must tell them apart."""
    numbers: dict[str, set[int]] = {}
    for entry in entries:
        if entry.number is not None:
            numbers.setdefault(entry.under or entry.label, set()).add(entry.number)
    return frozenset(clean(label) for label, known in numbers.items() if len(known) > 1)


def united(root: Node) -> Node:
    """The tree with all kinds of a label's calls in one node."""
    if all(node.name.number is None for node in root.every()):
        return root
    whole = Node(root.name, None)
    merge_into(whole, root, lambda node: node.name._replace(number=None))
    total(whole)
    return whole


def _settled(parts: dict[str, set[Known | str]]) -> Known | str:
    alone = parts.pop("eager", None)
    eager = None if alone is None else _one(alone)
    if not parts:
        assert eager is not None
        return eager
    total: dict[str, Fraction] = {}
    moved = Fraction(0)
    for part in parts.values():
        one = _one(part)
        if isinstance(one, str):
            return one
        for kind, count in one.flops:
            total[kind] = total.get(kind, Fraction(0)) + count
        moved += one.moved
    found = Known(tuple(sorted(total.items())), moved)
    return found if eager in (None, found) else "it ran both eagerly and compiled"


def _one(some: set[Known | str]) -> Known | str:
    if len(some) > 1:
        return next(
            (one for one in some if isinstance(one, str)),
            f"it ran with {len(some)} different shapes, and nothing says how often with each",
        )
    return next(iter(some))


_QUIET = frozenset({MODULE, OP})  # ranges whose own time on the host is that of operators


def rate(root: Node, table: Table, peaks: Peaks, gpu: bool) -> dict[str, int]:
    """Fill the counters of work of every node below `root`. `gpu`: its times are the device's. Returns why the work of
    some ranges is not known, with how much time they take."""
    why: dict[str, int] = {}
    timed = gpu or table.devices <= {"cpu", ""}  # the host's time says nothing about a device's
    # node, in a backward pass, the nearest module around, calls of the nearest range that has some
    todo: list[tuple[Node, bool, Name | None, int]] = [(child, False, None, 0) for child in root.children.values()]
    while todo:
        node, backward, under, calls = todo.pop()
        backward = backward or node.name.text == "backward"
        # a replay of a CUDA graph runs no Python: the layers ran as often as it did
        calls = node.calls + node.replays or calls
        _rate(node, table.of(node.name, under, backward), calls, peaks, gpu, timed, why)
        below = node.name if node.name.category == MODULE else under
        todo.extend((child, backward, below, calls) for child in node.children.values())
    return why


def _rate(
    node: Node, known: Known | str | None, calls: int, peaks: Peaks, gpu: bool, timed: bool, why: dict[str, int]
) -> None:
    node.flops = node.moved = node.roof = node.roof_compute = node.rated = node.unrated = node.roofless = 0
    if gpu:
        now, busy = node.gpu_self, node.kernels > 0
    else:
        now, busy = node.cpu_self, node.name.category in _QUIET and node.name.text != "backward"
    if known is None:
        known = "nothing was registered for it" if busy else Known((), Fraction(0))
    if isinstance(known, str):
        node.unrated = now
        if now:
            why[known] = why.get(known, 0) + now
        return
    if gpu and not node.kernels and not node.copies:
        return  # the call was captured into a CUDA graph: the device did nothing of it then
    node.flops = round(sum(count for _, count in known.flops) * calls)
    node.moved = round(known.moved * calls)
    if not timed:
        return
    node.rated = now
    compute = memory = Fraction(0)
    for kind, count in known.flops:
        if not peaks.flops.get(kind):
            node.roofless = now
            return
        compute += count * calls * 10**9 / Fraction(peaks.flops[kind])
    if known.moved:
        if not peaks.memory:
            node.roofless = now
            return
        memory = known.moved * calls * 10**9 / Fraction(peaks.memory)
    node.roof = round(max(compute, memory))
    if compute >= memory:
        node.roof_compute = node.roof
