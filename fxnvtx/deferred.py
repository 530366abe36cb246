"""Ranges around work that a call only begins: coroutines and generators, from the first step to the last."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Generator
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any

from .compile.torch_private import hide_module
from .ranges import Label, pop, push

__all__ = ["begins_only", "held_open"]


def begins_only(forward: Any) -> bool:
    """Whether calling `forward` only makes the object that does the work."""
    return inspect.isgeneratorfunction(forward)


def held_open(made: Any, label: Label, owner: Any) -> Any:
    """An object of the same type that does the work of `made` inside a range; what is none of these comes back."""
    if type(made) is CoroutineType:
        return _coroutine(made, label, owner)
    if type(made) is GeneratorType:
        return _generator(made, label, owner)
    if type(made) is AsyncGeneratorType:
        return _asyncgen(made, label, owner)
    return made


def _open(label: Label, owner: Any) -> Any:
    return push(label, None, owner)


async def _coroutine(made: CoroutineType[Any, Any, Any], label: Label, owner: Any) -> Any:
    entry = _open(label, owner)
    try:
        return await made
    finally:
        pop(entry)


def _generator(made: Generator[Any, Any, Any], label: Label, owner: Any) -> Generator[Any, Any, Any]:
    entry = _open(label, owner)
    try:
        return (yield from made)
    finally:
        pop(entry)


async def _asyncgen(made: AsyncGenerator[Any, Any], label: Label, owner: Any) -> AsyncGenerator[Any, Any]:
    entry = _open(label, owner)
    try:
        item = await made.asend(None)
        while True:
            try:
                sent = yield item
            except GeneratorExit:
                await made.aclose()
                raise
            except BaseException as error:
                item = await made.athrow(error)
            else:
                item = await made.asend(sent)
    except StopAsyncIteration:
        return
    finally:
        pop(entry)


hide_module(globals())
