"""A small pipeline's capture: two requests, steps, blocks with kernels, residency work, a fused kernel."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fxnvtx.recording import Range, Recording

from .captures import Capture


def recorded(ranges: Iterable[Range], **meta: object) -> Recording:
    """A recording of these ranges, as a file of them is read."""
    rows = [
        [r.label, r.category, r.payload, r.thread_id, r.depth, r.start_ns, r.end_ns, r.leaked]
        for r in sorted(ranges, key=lambda r: (r.start_ns, r.depth))
    ]
    document = {
        "format": "fxnvtx-recording",
        "version": 1,
        "meta": meta,
        "strays": 0,
        "ranges": rows,
        "marks": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording.json"
        path.write_text(json.dumps(document))
        return Recording.load(path)


def pipeline(
    path: Path,
    requests: int = 2,
    steps: int = 4,
    blocks: int = 3,
    scale: float = 1.0,
    pid: int = 7,
    version: str = "2023_4",
    capture: Capture | None = None,
) -> Capture:
    """Every block: norm (10 us on the GPU), attn (30 us), a fused(norm, attn) kernel (6 us), all times `scale`."""
    capture = capture or Capture(path, version)
    now, device = 1_000_000, 1_000_000

    def launch(kernel: str, length: int) -> None:
        nonlocal now, device
        correlation = capture.call(now, now + 2_000, pid=pid)
        device = max(device, now + 3_000)
        length = int(length * scale)
        capture.kernel(device, device + length, correlation, kernel, pid=pid)
        device += length + 500
        now += 3_000

    for request in range(requests):
        begin = now
        now += 1_000
        load = now
        capture.range(load, load + 40_000, "residency.load transformer", "residency", pid=pid, payload=1 << 20)
        capture.copy(load + 5_000, load + 35_000, capture.call(load + 1_000, load + 2_000, pid=pid), 1 << 20, pid=pid)
        now = load + 41_000
        device = max(device, now)
        for step in range(steps):
            step_begin = now
            now += 500
            model_begin = now
            now += 500
            for block in range(blocks):
                name = f"transformer.blocks.{block}"
                block_begin = now
                for layer, kernel, length in (("norm", "norm_k", 10_000), ("attn", "attn_k", 30_000)):
                    start = now
                    now += 200
                    launch(kernel, length)
                    capture.range(start, now, f"{name}.{layer}", pid=pid)
                    now += 100
                start = now
                launch("fused_k", 6_000)
                capture.range(start, now, "fused(norm, attn)", pid=pid)
                now += 100
                capture.range(block_begin, now, name, pid=pid)
                now += 300
            capture.range(model_begin, now, "transformer", pid=pid)
            now += 200
            capture.range(step_begin, now, f"denoising_step_{step}_t{1000 - step}", "step", pid=pid)
            now += 1_000
        now = max(now, device)  # the host waits for the device
        capture.range(begin, now, f"request#{request}", "request", pid=pid)
        now += 5_000
    return capture
