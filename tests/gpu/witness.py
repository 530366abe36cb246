"""Every launch as CUDA saw it: kernels (a multi-kernel's too), copies and zeroing, whoever asked for them.

torch.profiler has CUPTI write down each call that launches, with its thread, and what it led to on the device. While
its session is on, fxnvtx's ranges are in the same trace, on the same clock.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_CALLS = ("cuda_runtime", "cuda_driver")
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class DeviceLaunch:
    """`call`: the function that launched. `work`: the kernel's name, or what is copied where. `labels`: of the ranges
    that were open, outermost first."""

    call: str
    work: str
    thread: Any
    labels: tuple[str, ...]


def launches_of(trace: dict[str, Any]) -> list[DeviceLaunch]:
    """All work of the device in an exported trace, by the time of its launch."""
    events = trace["traceEvents"]
    calls: dict[int, dict[str, Any]] = {}
    ranges: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") in _CALLS and "correlation" in event.get("args", {}):
            calls[event["args"]["correlation"]] = event
        elif event.get("cat") == "user_annotation" and not event["name"].startswith("ProfilerStep"):
            ranges.setdefault(event["tid"], []).append(event)
    found = []
    for event in events:
        if event.get("cat") not in _WORK:
            continue
        call = calls[event["args"]["correlation"]]
        around = [r for r in ranges.get(call["tid"], []) if _holds(r, call)]
        # of two that start in the same instant, the profiler numbers the outer one first
        around.sort(key=lambda r: (r["ts"], r["args"].get("Ev Idx", 0)))
        labels = tuple(r["name"] for r in around)
        found.append((call["ts"], DeviceLaunch(call["name"], event["name"], call["tid"], labels)))
    return [launch for _, launch in sorted(found, key=lambda pair: pair[0])]


def _holds(outer: dict[str, Any], inner: dict[str, Any]) -> bool:
    return bool(outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"])


@contextlib.contextmanager
def device_witness(folder: Path) -> Iterator[list[DeviceLaunch]]:
    """What is launched inside; the list is filled at the end."""
    seen: list[DeviceLaunch] = []
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as session:
        yield seen
        torch.cuda.synchronize()
    path = folder / "trace.json"
    session.export_chrome_trace(str(path))
    seen += launches_of(json.loads(path.read_text()))
