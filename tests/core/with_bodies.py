"""Which `with` statements of a coroutine are left: for the tests, and as a program on any Python, without torch.

Each body is named for what is true of it.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from fxnvtx.ranges.crossing import ASYNC, is_left_inside

found: dict[str, bool] = {}


class Entered:
    def __init__(self, name):
        self.name = name

    def __enter__(self):
        frame = sys._getframe(1)
        assert frame.f_code.co_flags & ASYNC
        found[self.name] = is_left_inside(frame)

    def __exit__(self, *error):
        return False


@types.coroutine
def pause():
    yield


async def items():
    yield 1


def step():
    pass


async def coroutine():
    with Entered("stays: plain"):
        step()
    with Entered("leaves: awaits"):
        await pause()
    with Entered("leaves: loops"):
        for _ in range(2):
            try:
                step()
            except ValueError:
                await pause()
    with Entered("leaves: in a handler"):
        try:
            raise ValueError
        except ValueError:
            await pause()
    with Entered("leaves: in finally"):
        try:
            step()
        finally:
            await pause()
    with Entered("stays: a"), Entered("stays: b"):
        step()
    with Entered("leaves: outer"):
        with Entered("stays: inner"):
            step()
        await pause()
    with Entered("leaves: async for"):
        async for _ in items():
            step()
    with Entered("leaves: a comprehension"):
        [x async for x in items()]
    with Entered("stays: returns early"):
        if found:
            found["after"] = True
        else:
            return 1
    with Entered("leaves: awaits and returns"):
        if not found:
            return await pause()
        await pause()
    for _ in range(1):
        with Entered("stays: breaks"):
            break
    try:
        with Entered("stays: raises"):
            raise KeyError
    except KeyError:
        await pause()
    with Entered("stays: before an await"):
        step()
    await pause()
    return 2


async def generator():
    with Entered("leaves: yields"):
        yield 1
    with Entered("stays: before a yield"):
        step()
    yield 2


def wrong():
    """The names of the bodies that are taken for something else than they are."""
    found.clear()
    made: Any
    for made in (coroutine(), generator()):
        if hasattr(made, "send"):
            try:
                while True:
                    made.send(None)
            except StopIteration:
                continue
        while True:
            try:
                made.__anext__().send(None)
            except StopIteration:
                continue
            except StopAsyncIteration:
                break
    del found["after"]
    assert len(found) > 15
    return [name for name, left in found.items() if left != name.startswith("leaves")]


if __name__ == "__main__":
    print(sys.version_info[:2], wrong())
