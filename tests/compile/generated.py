"""What Inductor generated: sources of kernels, and Dynamo's counters."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .launches import generated_modules

_KERNEL = re.compile(r"^\w+ = async_compile\.\w+\(.*?^'''[^\n]*\)$", re.S | re.M)


def forget_generated_code() -> None:
    from torch._inductor.codecache import PyCodeCache

    PyCodeCache.cache_clear()


def wrapper_sources() -> list[str]:
    return [Path(m.__file__).read_text() for m in generated_modules()]


def kernel_hashes() -> list[str]:
    """One hash for each kernel of each generated module, by name and text."""
    found = []
    for source in wrapper_sources():
        for match in _KERNEL.finditer(source):
            found.append(hashlib.sha256(match.group(0).encode()).hexdigest())
    return sorted(found)


@contextlib.contextmanager
def without_graph_caches() -> Iterator[None]:
    """Every graph is compiled anew; only the C++ compiler's results are kept, by source."""
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


@contextlib.contextmanager
def counted() -> Iterator[dict[str, Any]]:
    """Graphs, graph breaks and recompiles of what is compiled inside."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    result: dict[str, Any] = {}
    yield result
    result["graphs"] = counters["stats"]["unique_graphs"]
    result["breaks"] = dict(counters["graph_break"])
    result["calls"] = counters["stats"]["calls_captured"]
    result["frames"] = dict(counters["frames"])
