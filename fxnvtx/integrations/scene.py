"""What runs on this thread: the request, its loops, and the step in which a component is called."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .bound import Pipe
    from .tiles import Tiling

__all__ = ["Closing", "Request", "Scene", "here"]


class Closing(Protocol):
    def close(self) -> None: ...


class Request:
    """One call of a pipeline."""

    def __init__(self, pipe: Pipe, outer: Request | None) -> None:
        self.pipe = pipe
        self.outer = outer
        self.open: list[Closing] = []  # loops under way, the innermost last

    def close(self) -> None:
        """End what the pipeline left open: a loop that an exception left is closed before its request is."""
        while self.open:
            self.open.pop().close()


class Scene(threading.local):
    def __init__(self) -> None:
        self.request: Request | None = None
        self.passes: dict[str, int] | None = None  # component -> its calls since the step or the scheduler's last one
        self.stages = 0  # stages open: what would be one inside of another is an op
        self.named_pass = 0  # cache contexts open: they name the pass
        self.inside: set[tuple[int, str]] = set()  # (object, method) under way: a method that calls super()'s
        self.tiling: Tiling | None = None
        self.timesteps: tuple[Tensor, list[float]] | None = None  # on a device, and what they are


here = Scene()
