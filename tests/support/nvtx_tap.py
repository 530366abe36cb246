"""Builds nvtx_tap.c and reads what it wrote: the real NVTX calls of a process, without any NVIDIA tool."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("nvtx_tap.c")


def build(folder: Path) -> Path | None:
    """The injection library, or None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    library = folder / "libnvtx_tap.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-pthread", str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


@dataclass
class Stream:
    """What arrived, per thread: `tree` nests (label, children); `open` is how many ranges were never popped; `stray`
    counts pops with nothing open. `crossing`: labels of start/end ranges, and in `crossing_open` those never ended."""

    categories: dict[int, str] = field(default_factory=dict)
    trees: dict[int, list[Any]] = field(default_factory=dict)
    open: dict[int, int] = field(default_factory=dict)
    stray: int = 0
    marks: list[str] = field(default_factory=list)
    pushed: list[tuple[str, str, str, bool]] = field(default_factory=list)  # (label, category, payload, registered)
    crossing: list[str] = field(default_factory=list)
    crossing_open: set[tuple[int, str]] = field(default_factory=set)


def read(log: Path, domain: str = "fxnvtx") -> Stream:
    """The calls of one domain."""
    found = Stream()
    named: dict[str, str] = {}
    stacks: dict[int, list[list[Any]]] = {}
    started: dict[int, str] = {}
    for line in log.read_text().splitlines():
        kind, *rest = line.split(" ")
        if kind == "D":
            named[rest[0]] = _text(rest[1])
        elif kind == "C" and named.get(rest[0]) == domain:
            found.categories[int(rest[1])] = _text(rest[2])
        elif kind == "S" and named.get(rest[1]) == domain:
            found.crossing.append(_text(rest[5]))
            started[int(rest[0])] = found.crossing[-1]
        elif kind == "E" and named.get(rest[1]) == domain:
            del started[int(rest[0])]
        elif kind in "PMO" and named.get(rest[1]) == domain:
            thread = int(rest[0])
            stack = stacks.setdefault(thread, [found.trees.setdefault(thread, [])])
            if kind == "O":
                if len(stack) == 1:
                    found.stray += 1
                else:
                    stack.pop()
                continue
            text = _text(rest[5])
            if kind == "M":
                found.marks.append(text)
                continue
            found.pushed.append((text, found.categories.get(int(rest[2]), "?"), rest[4], rest[3] == "1"))
            children: list[Any] = []
            stack[-1].append((text, children))
            stack.append(children)
    found.crossing_open = set(started.items())
    found.open = {thread: len(stack) - 1 for thread, stack in stacks.items() if len(stack) > 1}
    return found


def _text(encoded: str) -> str:
    return bytes.fromhex(encoded.rstrip(".")).decode("utf-8")


def nested(tree: list[Any]) -> tuple[Any, ...]:
    """Lists to tuples, to compare with a recorded tree."""
    return tuple((label, nested(children)) for label, children in tree)
