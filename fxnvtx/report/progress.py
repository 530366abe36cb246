"""A progress line that appears only where somebody would otherwise wonder."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["Late"]

AFTER = 2.0  # seconds


class Late:
    """Call it with the number of rows read since the last call; shows itself on a terminal's stderr after two seconds.

    >>> with Late("reading") as tick:
    ...     load(path, tick=tick)
    """

    def __init__(self, title: str, after: float = AFTER) -> None:
        self._title = title
        self._after = after
        self._start = time.monotonic()
        self._progress: Progress | None = None
        self._rows = 0

    def __enter__(self) -> Late:
        return self

    def __call__(self, rows: int) -> None:
        self._rows += rows
        if self._progress is None:
            if time.monotonic() - self._start < self._after or not sys.stderr.isatty():
                return
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                TextColumn("{task.completed:,.0f} rows"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
            self._progress.add_task(self._title, total=None)
        self._progress.update(self._progress.task_ids[0], completed=self._rows)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
