"""Several files read side by side: in processes of this machine, or by whatever map a cluster offers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

from .part import Part

__all__ = ["combine", "gather", "read_one"]


class Mapper(Protocol):
    """map(function, items) -> results in the order of the items."""

    def __call__(
        self, function: Callable[[tuple[str, bool]], list[Part]], items: list[tuple[str, bool]]
    ) -> Iterable[list[Part]]: ...


def read_one(job: tuple[str, bool]) -> list[Part]:
    """What every worker runs: (path, exact) -> the file's processes."""
    from .load import read_file

    return read_file(Path(job[0]), job[1])


def gather(
    files: list[Path], exact: bool, jobs: int | None, tick: Callable[[int], None] | None, mapper: Mapper | None = None
) -> list[Part]:
    """The parts of all files, in the order of the files."""
    work = [(str(path), exact) for path in files]
    if mapper is not None:
        return combine(mapper(read_one, work))
    workers = min(len(files), jobs or os.cpu_count() or 1)
    if workers < 2:
        from .load import read_file

        return combine(read_file(path, exact, tick) for path in files)
    # spawn: a fork would copy the locks and threads of whatever the caller runs
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return combine(pool.map(read_one, work))


def combine(results: Iterable[list[Part]]) -> list[Part]:
    """One list; processes without a known rank are told apart by their place in it."""
    return [part for parts in results for part in parts]
