"""Tasks that interleave, for the tests and in a process of its own: argv is (listener, output).

Listener: "tool", "alone" (a tool; afterwards each task runs alone) or "recorder".

A program is a list of trees (kind, children), one for each task. Every node is one range, called by its place, "0.2.1",
opened in the way that its kind says; the names of what it holds begin with its own.
"""

from __future__ import annotations

import asyncio
import sys
import types
from typing import Any

import torch
from torch import nn

import fxnvtx
from fxnvtx.ranges import local

KINDS = ("with", "async with", "coroutine", "async generator", "generator", "forward", "straight")


@types.coroutine
def pause():
    yield


class Waits(nn.Module):
    """Its forward is a coroutine."""

    def __init__(self):
        super().__init__()
        self.leaf = nn.Identity()

    async def forward(self, rest):
        await pause()
        self.leaf(torch.zeros(1))
        await rest()


async def run(node, name):
    kind, children = node

    async def rest():
        for number, child in enumerate(children):
            await pause()
            await run(child, f"{name}.{number}")
        await pause()

    if kind == "with":
        with fxnvtx.range(name):
            await rest()
    elif kind == "async with":
        async with fxnvtx.range(name):
            await rest()
    elif kind == "coroutine":
        await fxnvtx.range(name)(rest)()
    elif kind == "async generator":

        @fxnvtx.range(name)
        async def generate():
            yield 1
            await rest()
            yield 2

        async for _ in generate():
            await pause()
    elif kind == "forward":
        model = fxnvtx.instrument(Waits(), name, exclude=())
        await model(rest)
    elif kind == "generator":

        @fxnvtx.range(name)
        def steps():
            for number, child in enumerate(children):
                yield
                straight(child, f"{name}.{number}")
            yield

        for _ in steps():
            await pause()
    else:
        straight(node, name)


def straight(node, name):
    """Nothing is waited for."""
    with fxnvtx.range(name):
        for number, child in enumerate(node[1]):
            straight(child, f"{name}.{number}")


def expected(node, name):
    """The tree of one task."""
    kind, children = node
    if kind in ("generator", "straight"):
        return name, tuple(expected(("straight", child[1]), f"{name}.{n}") for n, child in enumerate(children))
    inside = tuple(expected(child, f"{name}.{n}") for n, child in enumerate(children))
    return name, ((f"{name}.leaf", ()), *inside) if kind == "forward" else inside


PROGRAM: list[Any] = [
    (kind, [(inner, [("straight", [])]) for inner in KINDS] + [("with", [("async with", [])])]) for kind in KINDS
]


async def together(program):
    """All tasks of a program, in one range."""
    async with fxnvtx.range("all"):
        await asyncio.gather(*(run(node, str(number)) for number, node in enumerate(program)))


async def one_by_one(program):
    """Then each of them alone."""
    await together(program)
    for number, node in enumerate(program):
        await run(node, f"alone {number}")


def main(listener: str, output: str) -> None:
    if listener == "alone":
        asyncio.run(one_by_one(PROGRAM))
    elif listener == "tool":
        asyncio.run(together(PROGRAM))
        assert fxnvtx.ranges.emit.nvtx_on
    else:
        with fxnvtx.record() as recording:
            asyncio.run(together(PROGRAM))
        recording.save(output)
    assert local.stack == []


if __name__ == "__main__":
    main(*sys.argv[1:])
