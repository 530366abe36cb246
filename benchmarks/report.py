"""How long a report takes and how much memory it needs, for captures of 0.1, 1 and 10 million ranges.

    python benchmarks/report.py [--millions 0.1,1,10] [--nsys] [--keep FOLDER]

Writes captures in the schema of Nsight Systems 2023.4 (requests of 50 steps over identical blocks, a kernel for every
second range), reads each in a process of its own, and prints seconds and peak resident memory. With --nsys the same
files also go through `nsys stats` (stopped after ten minutes), whose three reports hold the same numbers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NSYS_REPORTS = ("nvtx_pushpop_sum", "nvtx_gpu_proj_sum", "nvtx_kern_sum")
STEPS, LAYERS = (
    50,
    ("norm1", "attn", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out", "norm2", "ff", "ff.up", "ff.down"),
)
BLOCKS = 39
PID = 281474993487872
TID = PID | 4321
TABLES = """
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
  category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER, domainId INTEGER,
  uint64Value INTEGER, int64Value INTEGER, doubleValue REAL, uint32Value INTEGER, int32Value INTEGER, floatValue REAL,
  jsonTextId INTEGER, jsonText TEXT);
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
  globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL, callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
  contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
  demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER, gridX INTEGER NOT NULL,
  graphNodeId INTEGER);
CREATE TABLE META_DATA_EXPORT (name TEXT NOT NULL, value TEXT);
CREATE TABLE PROCESSES (globalPid INTEGER, pid INTEGER, name TEXT);
"""


def write_capture(path: Path, ranges: int) -> tuple[int, int]:
    """Write a capture of about `ranges` ranges and half as many kernels; returns how many of each it holds."""
    path.unlink(missing_ok=True)
    database = sqlite3.connect(path)
    database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + TABLES)
    texts: dict[str, int] = {}

    def text(value: str) -> int:
        return texts.setdefault(value, len(texts) + 1)

    kernels = [text(f"kernel_{i}") for i in range(20)]
    call = text("cudaLaunchKernel_v7000")
    spans: list[tuple[int, ...]] = []
    calls: list[tuple[int, ...]] = []
    works: list[tuple[int, ...]] = []
    written = [0, 0]
    now, device = 1_000_000, 1_000_000

    def flush(limit: int) -> None:
        if len(spans) < limit:
            return
        database.executemany(
            "INSERT INTO NVTX_EVENTS (start, end, eventType, category, globalTid, textId, domainId)"
            " VALUES (?, ?, 59, ?, ?, ?, 1)",
            spans,
        )
        database.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, 0, ?, ?, ?, 0, NULL)", calls)
        database.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, 0, 1, 7, ?, ?, ?, ?, NULL, 64, NULL)", works
        )
        written[0] += len(spans)
        written[1] += len(works)
        spans.clear(), calls.clear(), works.clear()

    database.execute(
        "INSERT INTO NVTX_EVENTS (start, eventType, text, globalTid, domainId) VALUES (0, 75, 'fxnvtx', ?, 1)", (TID,)
    )
    for number, category in enumerate(("request", "step", "module"), 1):
        database.execute(
            "INSERT INTO NVTX_EVENTS (start, eventType, category, text, globalTid, domainId)"
            " VALUES (0, 33, ?, ?, ?, 1)",
            (number, category, TID),
        )
    correlation, request = 1, 0
    while written[0] + len(spans) < ranges:
        begin = now
        for step in range(STEPS):
            step_begin = now
            model_begin = now = now + 500
            for block in range(BLOCKS):
                block_begin = now = now + 500
                for index, layer in enumerate(LAYERS):
                    start = now
                    now += 400
                    if index & 1:
                        device = max(device, now + 3000) + 50
                        calls.append((now, now + 1500, TID, correlation, call))
                        works.append((device, device + 4000, correlation, PID, kernels[index], kernels[index]))
                        device += 4000
                        correlation += 1
                        now += 2000
                    now += 300
                    spans.append((start, now, 3, TID, text(f"transformer.blocks.{block}.{layer}")))
                now += 200
                spans.append((block_begin, now, 3, TID, text(f"transformer.blocks.{block}")))
            now += 500
            spans.append((model_begin, now, 3, TID, text("transformer")))
            spans.append((step_begin, now + 100, 2, TID, text(f"denoising_step_{step}_t{1000 - step * 20}")))
            now += 1000
            flush(200_000)
            if written[0] + len(spans) >= ranges:
                break
        spans.append((begin, now, 1, TID, text("request#1")))
        now += 5000
        request += 1
    flush(1)
    database.executemany("INSERT INTO StringIds VALUES (?, ?)", [(key, value) for value, key in texts.items()])
    database.execute("INSERT INTO META_DATA_EXPORT VALUES ('EXPORT_SCHEMA_VERSION', '3.7.2')")
    database.commit()
    database.close()
    return written[0], written[1]


READ = """
import json, resource, sys, time
import fxnvtx.report as report
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start, cpu = time.perf_counter(), time.process_time()
found = report.load(sys.argv[1])
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
rows = found.rows(by="tree")
text = report.render_text(found, by="module", fold=True, width=120)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "cpu": cpu, "all": time.perf_counter() - start, "before": before, "peak": peak,
                  "calls": sum(row.calls for row in rows), "rows": len(rows),
                  "kernels": sum(row.kernels for row in rows if row.depth == 0)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", default="0.1,1")
    parser.add_argument("--nsys", action="store_true")
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="fxnvtx-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    titles = ("ranges", "kernels", "file", "read", "cpu", "+ views", "peak", "over import")
    widths = (12, 12, 10, 9, 9, 9, 9, 12)
    print(" ".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)), " nsys stats")
    try:
        for millions in (float(part) for part in arguments.millions.split(",")):
            path = folder / f"bench_{millions:g}.sqlite"
            ranges, kernels = write_capture(path, int(millions * 1e6))
            done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
            seen = json.loads(done.stdout.splitlines()[-1])
            assert seen["calls"] == ranges, (seen, ranges)
            assert seen["kernels"] == kernels, (seen, kernels)
            print(
                f"{ranges:>12,} {kernels:>12,} {path.stat().st_size / 2**20:>6.0f} MiB {seen['seconds']:>7.1f} s"
                f" {seen['cpu']:>7.1f} s"
                f" {seen['all'] - seen['seconds']:>7.2f} s {seen['peak'] / 1024:>5.0f} MiB"
                f" {(seen['peak'] - seen['before']) / 1024:>8.0f} MiB  {nsys_stats(path) if arguments.nsys else '-'}",
                flush=True,
            )
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def nsys_stats(path: Path) -> str:
    """Seconds that nsys needs for the same numbers, report by report."""
    if shutil.which("nsys") is None:
        return "nsys is not on the PATH"
    times = []
    for report in NSYS_REPORTS:
        start = time.perf_counter()
        try:
            done = subprocess.run(
                ["nsys", "stats", "-q", "-r", report, "--format", "csv", "--output", "-", str(path)],
                capture_output=True,
                timeout=600,
            )
            said = f"{time.perf_counter() - start:.1f} s" if done.returncode == 0 else f"failed ({done.returncode})"
        except subprocess.TimeoutExpired:
            said = "over 600 s"
        times.append(f"{report} {said}")
    return ", ".join(times)


if __name__ == "__main__":
    main()
