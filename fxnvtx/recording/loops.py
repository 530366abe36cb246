"""Steps of programs that name none: the iterations of a loop that calls one model again and again.

Only what is evident counts. A loop of one call of a function, which its bytecode shows, has led to the model more than
once; its iterations begin with a call of the same model with the same shapes. While the program runs, each outermost
call notes the functions it came through (`Sites`); what the loops were is read from that afterwards (`inferred`, pure).
A step so found spans the model's calls of one iteration and not the work between two iterations, of
which nothing is known.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from opcode import opmap
from types import CodeType, FrameType
from typing import Any

from ..ranges.labels import input_shapes

__all__ = ["Call", "Frame", "Loop", "Site", "Sites", "inferred"]

_DEEPEST = 60  # frames that are looked at: above them there may be as many as Python allows
_PASSES, _STAGES = 3, 13
_ONE_STEP = re.compile(r"(?:^|_)step(?:_|$)")
_EXTENDED = opmap["EXTENDED_ARG"]
# Of Python 3.10 to 3.14. Not JUMP_BACKWARD_NO_INTERRUPT, by which a coroutine waits.
_BACK = frozenset(
    number
    for name, number in opmap.items()
    if name == "JUMP_BACKWARD"
    or name.startswith("POP_JUMP_BACKWARD_IF")
    or (sys.version_info < (3, 11) and (name == "JUMP_ABSOLUTE" or name.startswith("POP_JUMP_IF")))
)
_known: dict[CodeType, tuple[tuple[int, int], ...]] = {}
_numbers = itertools.count(1)  # of the process: a frame keeps its own


@dataclass(frozen=True)
class Frame:
    """A function call on the stack: its number in the process, the place of the instruction that it is at, the loops
    around that (first and last place, the outermost loop first), and the function's name."""

    number: int
    place: int
    loops: tuple[tuple[int, int], ...]
    function: str


@dataclass(frozen=True)
class Site:
    """Where an outermost call came from. frames: outermost first."""

    shapes: str
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class Call:
    """An outermost call of a model, complete. Times in ns."""

    label: str
    thread_id: int
    start_ns: int
    end_ns: int
    site: Site


@dataclass(frozen=True)
class Loop:
    """A loop in one call of `function`; its iterations, each with its calls."""

    function: str
    iterations: tuple[tuple[Call, ...], ...]


# ------------------------------------------------------------------------------------------------ while it runs


class _Mark:
    """Tells one call of a function from the next: it lies in the frame's `f_trace` and goes with the frame.

    That place is for tracing functions, which Python calls only while somebody traces this thread; then nothing is
    marked. Should one begin in the middle, this is a tracing function that does nothing.
    """

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        return None


class Sites:
    """Notes where calls come from. Costs a walk up the stack at every outermost call, and nothing inside it."""

    def here(self) -> Site | None:
        """The site of the call that the calling thread is making, or None while it is being traced."""
        if sys.gettrace() is not None:
            return None
        frame: FrameType | None = sys._getframe(1)
        last: FrameType | None = None
        while frame is not None and _between(frame):
            frame, last = frame.f_back, frame
        shapes = "" if last is None else self._shapes(last)
        found: list[Frame] = []
        while frame is not None and len(found) < _DEEPEST:
            if not _between(frame):
                mark = frame.f_trace
                if mark is None:
                    mark = frame.f_trace = _Mark(next(_numbers))
                if isinstance(mark, _Mark):  # else a debugger was here
                    code, place = frame.f_code, frame.f_lasti
                    around = tuple(loop for loop in _loops_of(code) if loop[0] <= place <= loop[1])
                    found.append(Frame(mark.number, place, around, getattr(code, "co_qualname", code.co_name)))
            frame = frame.f_back
        return Site(shapes, tuple(reversed(found)))

    def _shapes(self, frame: FrameType) -> str:
        """Of the tensors in `f(*args, **kwargs)`, the way in to every module."""
        code = frame.f_code
        names = code.co_varnames[code.co_argcount + code.co_kwonlyargcount :]
        values = frame.f_locals
        args = values.get(names[0], ()) if code.co_flags & 4 and names else ()
        return str(input_shapes(args if isinstance(args, tuple) else (), _keywords(values)))


def _keywords(values: Any) -> dict[str, object]:
    given = values.get("kwargs")
    return given if isinstance(given, dict) else {}


def _loops_of(code: CodeType) -> tuple[tuple[int, int], ...]:
    """First and last place of every loop in a function, outer ones first: where its code jumps back to, and from."""
    known = _known.get(code)
    if known is not None:
        return known
    ends: dict[int, int] = {}
    text = code.co_code
    argument = 0
    for place in range(0, len(text), 2):
        argument |= text[place + 1]
        if text[place] == _EXTENDED:
            argument <<= 8
            continue
        if text[place] in _BACK:
            after = place + 2
            while sys.version_info >= (3, 11) and after < len(text) and text[after] == 0:  # what it has cached
                after += 2
            target = after - 2 * argument if sys.version_info >= (3, 11) else 2 * argument
            if target <= place:  # Python 3.10 jumps forwards by the same instructions
                ends[target] = max(place, ends.get(target, 0))
        argument = 0
    if len(_known) > 10_000:  # a program that makes functions
        _known.clear()
    found = _known[code] = tuple(sorted(ends.items(), key=lambda loop: (loop[0], -loop[1])))
    return found


def _between(frame: FrameType) -> bool:
    """Whether the frame is ours or torch's: what lies between the program and its model."""
    name = frame.f_globals.get("__name__", "")
    return isinstance(name, str) and name.partition(".")[0] in ("fxnvtx", "torch")


# ------------------------------------------------------------------------------------------------ afterwards


@dataclass
class _Visit:
    """A time that one function call led to the model: through one instruction, and one call of the next function."""

    frame: Frame
    child: int | None
    calls: list[Call] = field(default_factory=list)

    def within(self, level: int) -> tuple[int, bool]:
        """Where in the loop at this level it is: the place, or the first place of the next loop inside, and which."""
        deeper = len(self.frame.loops) > level + 1
        return (self.frame.loops[level + 1][0] if deeper else self.frame.place), deeper


def inferred(calls: Sequence[Call]) -> list[Loop]:
    """The loops that these calls came from, none inside another: the innermost whose iterations evidently are steps."""
    visits: dict[int, list[_Visit]] = {}
    depths: dict[int, int] = {}
    for call in sorted(calls, key=lambda c: c.start_ns):
        frames = call.site.frames
        for depth, frame in enumerate(frames):
            child = frames[depth + 1].number if depth + 1 < len(frames) else None
            depths.setdefault(frame.number, depth)
            known = visits.setdefault(frame.number, [])
            if not known or child is None or (known[-1].frame.place, known[-1].child) != (frame.place, child):
                known.append(_Visit(frame, child))
            known[-1].calls.append(call)
    runs = [
        _Run((depths[number], level), (known[0].frame.function, depths[number], place), rounds)
        for number, known in visits.items()
        for level, place, rounds in _runs(known)
    ]
    runs.sort(key=lambda run: run.nested, reverse=True)
    of_site: dict[Any, list[_Run]] = {}
    of_call: dict[int, list[_Run]] = {}
    for run in runs:
        of_site.setdefault(run.site, []).append(run)
        for known_call in run.calls:
            of_call.setdefault(known_call, []).append(run)
    taken: set[int] = set()
    kept: list[Loop] = []
    for run in runs:
        beside = {id(r): r for known_call in run.calls for r in of_call[known_call]}.values()
        outer = [r for r in beside if r.nested < run.nested and r.many and run.calls < r.calls]
        around = max(outer, key=lambda r: r.nested, default=None)
        inside = [r for r in beside if r.nested > run.nested and r.calls < run.calls]
        if not run.many or run.calls & taken or not _is_evident(run, of_site[run.site], around, inside):
            continue
        for loop in run.loops():
            kept.append(loop)
            taken |= {id(call) for iteration in loop.iterations for call in iteration}
    return sorted(kept, key=lambda loop: loop.iterations[0][0].start_ns)


@dataclass
class _Run:
    """A loop of one call of a function: how it lies in others, where in the program it is, and its iterations."""

    nested: tuple[int, int]
    site: tuple[str, int, tuple[int, int]]
    iterations: list[list[Call]]

    def __post_init__(self) -> None:
        self.many = len(self.iterations) > 1
        self.calls = {id(call) for iteration in self.iterations for call in iteration}
        self.labels = {call.label for iteration in self.iterations for call in iteration}

    def loops(self) -> Iterator[Loop]:
        """A model or shapes that change begin something else: another resolution, the last batch of an epoch."""
        for _, alike in itertools.groupby(self.iterations, key=lambda calls: (calls[0].label, calls[0].site.shapes)):
            kept = tuple(tuple(iteration) for iteration in alike)
            if len(kept) > 1:
                yield Loop(self.site[0], kept)


def _is_evident(run: _Run, siblings: Sequence[_Run], around: _Run | None, inside: Sequence[_Run]) -> bool:
    """Whether the iterations of a loop are steps, and not parts of a step or several of them.

    siblings: the runs of the same loop of the program. around: the next loop around it. inside: what runs in it.
    """
    if _ONE_STEP.search(run.site[0].rpartition(".")[2]) and len(run.iterations) <= _STAGES:
        return False  # a function that calls itself a step holds the stages of one
    if around is not None:
        # a solver that steps as often as it must: some of its loops have one round only, and would show nothing
        if around.labels == run.labels and not all(r.many for r in siblings if r.calls < around.calls):
            return False
        if not any(r.many for r in inside) and _is_part(run, siblings, around):
            return False
    for site in {r.site for r in inside}:
        own = [r.calls for r in inside if r.site == site]
        often = {sum(not calls.isdisjoint(map(id, iteration)) for calls in own) for iteration in run.iterations}
        if len(often) > 1 and max(often) > 1:  # so many steps here, and so many there
            return False
    return True


def _is_part(run: _Run, siblings: Sequence[_Run], around: _Run) -> bool:
    """Whether a loop's rounds are what one step consists of: the two or three passes of guidance, or the stages of a
    solver, of which the highest order in use has 13. There are as many each time, and more steps than stages. Those are
    told from a few steps that are made for one image after the other by what else an image takes: other models."""
    counts = {len(r.iterations) for r in siblings}
    if len(counts) > 1 or len(run.iterations) > min(len(siblings), _STAGES):
        return False
    return len(run.iterations) <= _PASSES or len(around.labels) == 1


def _runs(visits: Sequence[_Visit]) -> Iterator[tuple[int, tuple[int, int], list[list[Call]]]]:
    """The loops in one call of a function: the number of loops around each there, its place, its iterations."""
    for level in range(max(len(visit.frame.loops) for visit in visits)):
        for here, run in itertools.groupby(visits, key=lambda v: v.frame.loops[level : level + 1]):
            if not here:
                continue
            iterations: list[list[Call]] = []
            before = (0, False)
            for visit in run:
                at = visit.within(level)
                # an iteration goes forwards only; a loop inside it may take many rounds
                if not iterations or at < before or (at == before and not at[1]):
                    iterations.append([])
                iterations[-1].extend(visit.calls)
                before = at
            yield level, here[0], iterations
