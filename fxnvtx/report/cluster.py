"""Many captures read on a Dask cluster (the extra "cluster"): one task per file, one merge here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..errors import CaptureError, ConfigError
from .gather import Job, gather
from .part import Part
from .report import Report


class Client(Protocol):
    """What is used of a dask.distributed.Client."""

    def map(self, function: Callable[..., Any], *iterables: Any, **options: Any) -> Any: ...

    def gather(self, futures: Any) -> Any: ...


__all__ = ["load_on"]


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
