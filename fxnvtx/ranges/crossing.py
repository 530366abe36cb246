"""Ranges that may cross others of their thread: of coroutines and generators, which a thread leaves and comes back to.

A thread's push/pop ranges nest, so one that is open across an `await` would be closed by whatever task runs next. Such
work gets a `Crossing`: an NVTX start/end range with an id of its own, on no stack. Which one surrounds what runs now is
kept per context (contextvars), so each asyncio task has its own, and what a task starts lies inside what started it.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Callable, Generator, Iterator
from contextvars import ContextVar
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, GeneratorType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .labels import Label

__all__ = [
    "ASYNC",
    "Crossing",
    "around",
    "begins_only",
    "held_function",
    "held_open",
    "is_left_inside",
    "latest",
    "surrounding",
    "switch",
]

_numbers = itertools.count(1)


class Crossing:
    """One start/end range. `parent`: the one around it in its context."""

    __slots__ = (
        "end_ns",
        "label",
        "level",
        "number",
        "nvtx",
        "opened",
        "opener",
        "owner",
        "parent",
        "payload",
        "start_ns",
        "thread_id",
    )

    def __init__(self, text: Label, payload: object, owner: object, opener: object, thread_id: int, depth: int) -> None:
        self.number = next(_numbers)
        self.label = text
        self.payload = payload
        self.owner = owner  # the instrumented model whose module this is
        self.opener = opener  # the object whose `with` began it
        self.parent: Crossing | None = around()
        self.level: int = depth + (0 if self.parent is None else self.parent.level + 1)
        self.thread_id = thread_id
        self.start_ns = 0
        self.end_ns: int | None = None
        self.nvtx: Any = None  # NVTX's id of it, where NVTX was told
        self.opened: Any = None  # what those got who are told of every range at once

    def nearest(self, known: frozenset[int]) -> int:
        """The number of this one, or of the next one around it, that is among `known`; 0 for none."""
        found: Crossing | None = self
        while found is not None and found.number not in known:
            found = found.parent
        return 0 if found is None else found.number


_innermost: ContextVar[Crossing | None] = ContextVar("fxnvtx_crossing", default=None)


def around() -> Crossing | None:
    """The innermost crossing range that is open around what runs now."""
    found = _innermost.get()
    while found is not None and found.end_ns is not None:
        found = found.parent
    return found


def surrounding() -> Iterator[Crossing]:
    """The crossing ranges around what runs now, the innermost first."""
    found = around()
    while found is not None:
        yield found
        found = found.parent


def latest() -> int:
    """A number that is higher than those so far, and lower than those to come."""
    return next(_numbers)


def switch(to: Crossing | None) -> Crossing | None:
    """Let `to` be around what runs from now on in this context. Returns what was."""
    before = _innermost.get()
    _innermost.set(to)
    return before


# ------------------------------------------------------------------------------------------------ work in steps

Begin = Callable[[], "Crossing | None"]
End = Callable[["Crossing | None"], None]


def begins_only(forward: Any) -> bool:
    """Whether calling `forward` only makes the object that does the work."""
    while isinstance(forward, functools.partial):
        forward = forward.func
    return any(is_kind(forward) for is_kind, _, _ in _KINDS)


def held_function(function: Any, begin: Begin, end: End) -> Any:
    """A function of the same kind whose work is done inside a range, from its first step to its last; None where
    `function` does its work when it is called."""
    for is_kind, _, make in _KINDS:
        if is_kind(function):
            return make(function, begin, end)
    return None


def held_open(made: Any, begin: Begin, end: End) -> Any:
    """An object of the same type that does the work of `made` inside a range; what is no coroutine or generator comes
    back."""
    for _, kind, make in _KINDS:
        if type(made) is kind:
            return make(lambda: made, begin, end)()
    return made


def _coroutines(function: Any, begin: Begin, end: End) -> Any:
    async def inner(*args: Any, **kwargs: Any) -> Any:
        opened = begin()
        try:
            made = function(*args, **kwargs)
            if opened is None:
                return await made
            if type(made) is not CoroutineType:  # inspect.markcoroutinefunction
                made = _awaiting(made)
            return await _Steps(made, _Inside(opened))
        finally:
            end(opened)

    return inner


async def _awaiting(made: Any) -> Any:
    return await made


def _generators(function: Any, begin: Begin, end: End) -> Any:
    def inner(*args: Any, **kwargs: Any) -> Any:
        opened = begin()
        try:
            made = function(*args, **kwargs)
            return (yield from made if opened is None else _stepped(made, _Inside(opened)))
        finally:
            end(opened)

    return inner


def _asyncgens(function: Any, begin: Begin, end: End) -> Any:
    async def inner(*args: Any, **kwargs: Any) -> Any:
        opened = begin()
        inside = None if opened is None else _Inside(opened)

        def within(step: Any) -> Any:
            return step if inside is None else _Steps(step.__await__(), inside)

        try:
            made = function(*args, **kwargs)
            item = await within(made.asend(None))
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    await within(made.aclose())
                    raise
                except BaseException as error:
                    item = await within(made.athrow(error))
                else:
                    item = await within(made.asend(sent))
        except StopAsyncIteration:
            return
        finally:
            end(opened)

    return inner


_KINDS: tuple[tuple[Any, Any, Any], ...] = (
    (inspect.iscoroutinefunction, CoroutineType, _coroutines),
    (inspect.isgeneratorfunction, GeneratorType, _generators),
    (inspect.isasyncgenfunction, AsyncGeneratorType, _asyncgens),
)


class _Inside:
    """What is around the steps of one coroutine or generator, and around nothing that runs between them: a range, and
    what has been opened in it."""

    __slots__ = ("now",)

    def __init__(self, opened: Crossing) -> None:
        self.now: Crossing | None = opened
        switch(opened.parent)


class _Steps:
    """Awaits something, each step inside a range."""

    __slots__ = ("inside", "made")

    def __init__(self, made: Any, inside: _Inside) -> None:
        self.made = made
        self.inside = inside

    def __await__(self) -> Generator[Any, Any, Any]:
        return _stepped(self.made, self.inside)


def _stepped(made: Any, inside: _Inside) -> Generator[Any, Any, Any]:
    """`yield from made`, each step inside a range."""
    step, sent = made.send, None
    while True:
        before = switch(inside.now)
        try:
            item = step(sent)
        except StopIteration as stop:
            return stop.value
        except BaseException:
            made = step = None  # as below: the awaitable of an athrow() holds what it throws
            raise
        finally:
            inside.now = switch(before)
            sent = None  # an exception holds this frame: what the frame holds must not hold the exception
        try:
            sent = yield item
            step = made.send
        except GeneratorExit:
            before = switch(inside.now)
            try:
                made.close()
            finally:
                inside.now = switch(before)
            raise
        except BaseException as error:
            sent, step = error, made.throw


# ------------------------------------------------------------------------------------------------ in a coroutine

ASYNC = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_LEAVES = frozenset({"YIELD_VALUE", "YIELD_FROM", "SEND"})
_known: dict[tuple[int, int], tuple[CodeType, bool]] = {}  # with the code: its id() is not used again meanwhile


def is_left_inside(frame: FrameType) -> bool:
    """Whether the `with` statement that `frame`, of a coroutine or an asynchronous generator (flags ASYNC), is entering
    may be left and come back to: there is an await or a yield in its body."""
    code = frame.f_code
    key = (id(code), frame.f_lasti)
    found = _known.get(key)
    if found is None:
        if len(_known) > 4096:
            _known.clear()
        found = _known[key] = (code, _leaves(code, frame.f_lasti))
    return found[1]


def _leaves(code: CodeType, at: int) -> bool:
    """Whether the body of the `with` statement whose `__enter__` is called at offset `at` gives up control."""
    listing = dis.Bytecode(code)
    following = [i for i in listing if i.offset >= at]
    setup = next((i for i in following if i.opname in {"SETUP_WITH", "BEFORE_WITH"}), None)
    if setup is None or setup.offset != at:
        return True  # entered in some other way: nothing is known of where it ends
    leaving = [i.offset for i in following if i.opname in _LEAVES]
    entries: Any = getattr(listing, "exception_entries", None)  # Python 3.11 and later
    if entries is None:  # Python 3.10: the body ends where it goes on after an exception
        return any(at < offset < setup.argval for offset in leaving)

    def handler(offset: int) -> int | None:
        return next((e.target for e in entries if e.start <= offset < e.end), None)

    # The body is what the statement's own handler covers, and the handlers that this one covers in turn.
    inside = {handler(following[1].offset)}
    if None in inside:
        return True
    while True:
        more = {e.target for e in entries if handler(e.target) in inside} - inside
        if not more:
            return any(handler(offset) in inside for offset in leaving)
        inside |= more
