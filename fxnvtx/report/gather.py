"""Several files read side by side: in processes of this machine, or by whatever map a cluster offers."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

from .. import errors
from ..errors import CaptureError
from .part import WHOLE, Part, Window

__all__ = ["gather", "read_one"]

_WORTH_IT = 64 << 20  # bytes
Job = tuple[str, bool, Window]  # path, exact, what counts


class Mapper(Protocol):
    """map(function, items) -> results in the order of the items."""

    def __call__(self, function: Callable[[Job], list[Part]], items: list[Job]) -> Iterable[list[Part]]: ...


def read_one(job: Job) -> list[Part]:
    """What every worker runs: the processes of one file."""
    from .capture import read_file

    return read_file(Path(job[0]), job[1], window=job[2])


def gather(
    files: list[Path],
    exact: bool,
    jobs: int | None,
    tick: Callable[[int], None] | None,
    mapper: Mapper | None = None,
    window: Window = WHOLE,
) -> list[Part]:
    """The parts of all files, in the order of the files."""
    work = [(str(path), exact, window) for path in files]
    workers = min(len(files), jobs or _useful(files))
    if mapper is not None:
        results = mapper(read_one, work)
    elif workers < 2:
        from .capture import read_file

        results = (read_file(path, exact, tick, window) for path in files)
    else:
        results = _in_processes(work, workers, tick)
    return [part for parts in results for part in parts]


def _useful(files: list[Path]) -> int:
    """How many processes pay: starting one takes longer than reading a small file."""
    size = sum(path.stat().st_size for path in files if path.exists())
    return (os.cpu_count() or 1) if size > _WORTH_IT else 1


def _in_processes(work: list[Job], workers: int, tick: Callable[[int], None] | None) -> list[list[Part]]:
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_in_process, job) for job in work]
        waiting = set(futures)
        while waiting:
            _, waiting = wait(waiting, timeout=0.5)
            if tick is not None:
                tick(0)
        return [future.result() for future in futures]


def _in_process(job: Job) -> list[Part]:
    """Read one file in an interpreter of its own. Not through multiprocessing, whose workers run the caller's script
    once more where that has no `if __name__ == "__main__"`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-m", "fxnvtx.report.worker"],
        input=pickle.dumps(job),
        capture_output=True,
        env=environment,
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise CaptureError(f"reading {job[0]} failed: {said[-1] if said else f'exit code {done.returncode}'}")
    kind, value = pickle.loads(done.stdout)
    if kind == "parts":
        return list(value)
    raise getattr(errors, kind)(value)
