"""A report: what one or more captures said, as one tree, and the rows of its views; and captures read side by side into
one, in processes of this machine or by whatever map a cluster offers.
"""

from __future__ import annotations

import html
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from .. import errors
from ..errors import CaptureError, ConfigError, FxnvtxError
from ..recording import Recording
from .capture import expanded, lacking, read_file
from .capture.recording import read_recording
from .labels import Name
from .part import WHOLE, Part, Window
from .render import render_text
from .rows import ordered
from .selection import Selection
from .tree import Node, merge_into, total
from .views import Row, rows_of, tree_of
from .work import Peaks, Table, peaks_of, rate, united

__all__ = ["Report", "from_recording", "gather", "load", "load_on", "read_one"]


class Report:
    """One tree over all processes, and each process's own.

    notes: what a reader should know before believing the numbers (open ranges, damaged rows, what is missing).
    """

    def __init__(self, parts: Sequence[Part], peak: Peaks | None = None) -> None:
        self.parts = list(parts)
        self.peaks, about_work = _rated(self.parts, peak)
        self.has_gpu = any(part.has_gpu for part in self.parts)
        self.classes: dict[str, str] = {}
        for part in self.parts:
            self.classes.update(part.classes)
        if self.has_gpu:
            for part in self.parts:
                if not part.device_calls:
                    for node in part.tree.root.every():
                        node.each = None  # CPU times would mix with the others' device times
        if len(self.parts) == 1:
            self.root = self.parts[0].tree.root
            self.side = self.parts[0].side.root
        else:
            self.root, self.side = Node(Name("", ""), None), Node(Name("", ""), None)
            for part in self.parts:
                merge_into(self.root, part.tree.root)
                merge_into(self.side, part.side.root)
            total(self.root)
            total(self.side)
        self.has_work = any(part.work for part in self.parts)
        self.notes = [*_notes(self.parts, self.root), *about_work]

    @property
    def sources(self) -> list[str]:
        return list(dict.fromkeys(part.source for part in self.parts))

    def rows(
        self,
        by: str = "tree",
        depth: int | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        fold: bool = False,
        kernels: bool = False,
        split_fused: bool = False,
        sort: str | None = None,
    ) -> list[Row]:
        """The rows of one view. Raises ConfigError for a view or a pattern that has no meaning.

        by: tree, request, stage, step, component, module, class, kernel or range. depth: levels of the tree, or
        dotted parts of a module's name. include, exclude: globs on names or on paths joined by "/". fold: identical
        blocks, steps and requests become one row. kernels: device operations as rows under their range. sort: largest
        first by one of order.ORDERS (default: as they ran; grouped ones by time).
        """
        return self.select(Selection(by, depth, tuple(include), tuple(exclude), fold, kernels, split_fused, sort))

    def select(self, chosen: Selection) -> list[Row]:
        """The same as `rows`, for what is asked for as one value."""
        return ordered(rows_of(self.root, self.side, self.parts, self.classes, chosen), chosen.sort)

    def tree(
        self, include: Sequence[str] = (), exclude: Sequence[str] = (), fold: bool = False, split_fused: bool = False
    ) -> Node:
        """The tree that the rows of the view "tree" come from, with its sums."""
        chosen = Selection("tree", None, tuple(include), tuple(exclude), fold, False, split_fused)
        return tree_of(self.root, self.classes, chosen)

    def _repr_html_(self) -> str:
        """What a notebook shows: the folded tree, cut where it would fill pages."""
        return f"<pre>{html.escape(render_text(self, fold=True, width=120, limit=60))}</pre>"


def _outermost_unknown(root: Node) -> list[Node]:
    found, todo = [], [root]
    while todo:
        node = todo.pop()
        if node.is_unknown():
            found.append(node)
        else:
            todo.extend(node.children.values())
    return found


def _rated(parts: list[Part], given: Peaks | None) -> tuple[Peaks, list[str]]:
    """Join the parts' work with their times; the peaks to measure by, and what to say about both."""
    peaks, said = peaks_of((gpu for part in parts for gpu in part.gpus), given)
    if not any(part.work for part in parts):
        return peaks, ["--peak has no effect: no capture says what work its ranges stand for"] if given else []
    why: dict[str, int] = {}
    whole = 0
    for part in parts:
        root = part.tree.root
        for reason, time in rate(root, Table(part.work), peaks, part.has_gpu).items():
            why[reason] = why.get(reason, 0) + time
        total(root)
        part.tree.root = united(root)
        whole += root.gpu if part.has_gpu else root.cpu
    notes = [said] if said else []
    for reason, time in sorted(why.items(), key=lambda item: -item[1])[:3]:
        if whole and peaks and time * 100 >= whole:
            notes.append(f"the work of {time / whole:.1%} of the time is not known: {reason}")
    return peaks, notes


def _notes(parts: list[Part], root: Node) -> list[str]:
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    lost = sum(node.gpu - node.gpu_shared for node in _outermost_unknown(root))
    if lost:
        share = f"{lost / root.gpu:.1%}" if root.gpu else "all"
        notes.append(f"{share} of the GPU time is not attributed to a layer: see the rows that say why")
    still_open = sum(node.open for node in root.every())
    if still_open:
        notes.append(f"{still_open:,} ranges were still open when the capture ended; their time ends there")
    return notes


# ---------------------------------------------------------------------------------------------- from paths to a report


def from_recording(recording: Recording, source: str = "this process", peak: Peaks | None = None) -> Report:
    """The report of what `fxnvtx.record()` collected. peak: what the device can do, see peaks.parse_peaks."""
    return Report([read_recording(recording, source, window=replace(WHOLE, timeline=True))], peak)


def load(
    *paths: str | os.PathLike[str],
    exact: bool = False,
    jobs: int | None = None,
    tick: Callable[[int], None] | None = None,
    window: Window = WHOLE,
    peak: Peaks | None = None,
) -> Report:
    """Read captures, traces and recordings, several at once in parallel processes, into one report.

    exact: keep the running numbers that torch's emit_nvtx puts into names. jobs: how many processes read (default: as
    many as pay, up to the number of cores). tick: called with the number of rows read since the last call. window:
    which requests and steps count. peak: what the device can do, before what is known of it. Raises CaptureError, in
    one line, for a file that cannot be read.
    """
    if not paths:
        raise CaptureError("no capture given: name at least one .sqlite, .nsys-rep or recording")
    files: dict[object, Path] = {}
    again: list[Path] = []
    for path in expanded(paths):
        try:
            found = path.stat()
            identity: object = (found.st_dev, found.st_ino)
        except (OSError, ValueError):
            identity = path  # its reader says what is wrong with it
        if identity in files:
            again.append(path)
        else:
            files[identity] = path
    report = Report(gather(list(files.values()), exact, jobs, tick, window=window), peak)
    report.notes.extend(f"{path} was named twice and read once" for path in again)
    for path in files.values():
        if more := lacking(path):
            names = ", ".join(recording.name for recording in more)
            report.notes.append(f"{path} has less ranges of some processes than what they recorded: {names}")
    return report


# -------------------------------------------------------------------------------------------------- files side by side


_WORTH_IT = 64 << 20  # bytes
Job = tuple[str, bool, Window]  # path, exact, what counts


class Mapper(Protocol):
    """map(function, items) -> results in the order of the items."""

    def __call__(self, function: Callable[[Job], list[Part]], items: list[Job]) -> Iterable[list[Part]]: ...


def read_one(job: Job) -> list[Part]:
    """What every worker runs: the processes of one file."""
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
        [sys.executable, "-c", "from fxnvtx.report.report import answer; answer()"],
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


# -------------------------------------------------------------------------------------------------------- on a cluster


class Client(Protocol):
    """What is used of a dask.distributed.Client."""

    def map(self, function: Callable[..., Any], *iterables: Any, **options: Any) -> Any: ...

    def gather(self, futures: Any) -> Any: ...


def load_on(client: Client, *paths: str | os.PathLike[str], exact: bool = False) -> Report:
    """The same report as `load`, read by the workers of `client`; every worker must see the files under these paths.

    Only the aggregated trees travel. Raises CaptureError for a file that cannot be read, wherever that was noticed.
    """
    if not paths:
        raise CaptureError("no capture given: name at least one .sqlite, .nsys-rep or recording")
    if not (hasattr(client, "map") and hasattr(client, "gather")):
        raise ConfigError("load_on needs a dask.distributed Client: pip install fxnvtx[cluster]")

    def mapper(function: Callable[[Job], list[Part]], items: list[Job]) -> Any:
        return client.gather(client.map(function, items, pure=False))

    return Report(gather([Path(path) for path in paths], exact, None, None, mapper))


# ---------------------------------------------------------------------------------------- in an interpreter of its own


def answer() -> None:
    """What that interpreter runs: read the capture that stdin names, give its trees to the process that asked."""
    # whatever else is printed must not get between the reader and the pickle
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        given: tuple[str, object] = ("parts", read_one(pickle.load(sys.stdin.buffer)))
    except FxnvtxError as error:
        given = (type(error).__name__, str(error))
    with out:
        pickle.dump(given, out)
