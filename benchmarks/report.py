"""How long a report takes and how much memory it needs, for captures of 0.1, 1 and 10 million ranges.

    python benchmarks/report.py [--millions 0.1,1,10] [--repeat 3] [--nsys] [--keep FOLDER]

Writes captures in the schema of Nsight Systems 2023.4 (requests of 50 steps over identical blocks, a kernel for every
second range) and prints the processor seconds (user and system) and the peak resident memory of whole commands, each
in a process of its own: `fxnvtx report FILE` as it comes, as CSV, and by module. With --nsys the same files also go
through `nsys stats` (stopped after ten minutes), whose three reports together hold the same numbers; every command is
told how many times faster it is than these.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
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
        for rows in (spans, calls, works):
            rows.clear()

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


CACHED: dict[str, str] = {}  # PYTHONPYCACHEPREFIX, so that nothing is written beside the sources
COMMANDS = {
    "text": [],
    "csv": ["--format", "csv"],
    "by module": ["--by", "module", "--fold"],
    "json": ["--format", "json"],
}
CHECK = """
import sys
import fxnvtx.report as report
rows = report.load(sys.argv[1]).rows(by="tree")
print(sum(row.calls for row in rows if row.kind == "range"), sum(row.kernels for row in rows if row.depth == 0))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", default="0.1,1")
    parser.add_argument("--repeat", type=int, default=3, help="how often each command runs; the least is told")
    parser.add_argument("--nsys", action="store_true")
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="fxnvtx-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    CACHED["PYTHONPYCACHEPREFIX"] = str(folder / "pycache")
    try:
        for millions in (float(part) for part in arguments.millions.split(",")):
            path = folder / f"bench_{millions:g}.sqlite"
            measure(path, int(millions * 1e6), arguments.repeat, arguments.nsys)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def measure(path: Path, wanted: int, repeat: int, nsys: bool) -> None:
    """Write one capture, run all commands on it, print a line for each."""
    ranges, kernels = write_capture(path, wanted)
    print(f"{ranges:,} ranges, {kernels:,} kernels, {path.stat().st_size / 2**20:.0f} MiB", flush=True)
    found = subprocess.run([sys.executable, "-c", CHECK, str(path)], capture_output=True, text=True, check=True).stdout
    assert found.split() == [str(ranges), str(kernels)], (found, ranges, kernels)
    theirs = 0.0
    if nsys:
        for report in NSYS_REPORTS:
            command = ["nsys", "stats", "-q", "-r", report, "--format", "csv", "--output", "-", str(path)]
            seconds, peak, code = run(command, 600)
            theirs += seconds
            said = "" if code == 0 else f", ended with {code}"
            print(f"  nsys {report:<20} {seconds:>8.2f} CPU s {peak:>6.0f} MiB{said}", flush=True)
        print(f"  nsys, all three           {theirs:>8.2f} CPU s", flush=True)
    for title, options in COMMANDS.items():
        command = [sys.executable, "-m", "fxnvtx", "report", str(path), *options]
        runs = [run(command, 600) for _ in range(repeat)]
        seconds, peak, code = min(runs)
        assert code == 0, command
        times = f", {theirs / seconds:.1f} times faster" if theirs else ""
        print(f"  fxnvtx report {title:<11} {seconds:>8.2f} CPU s {peak:>6.0f} MiB{times}", flush=True)


def run(command: list[str], limit: float) -> tuple[float, float, int]:
    """Processor seconds, peak memory in MiB, and exit code of a command and the processes it waited for."""
    with open(os.devnull, "w") as nowhere:
        # as installed: with compiled modules, whatever this shell says about writing them
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        process = subprocess.Popen(
            command, stdout=nowhere, stderr=nowhere, start_new_session=True, env={**environment, **CACHED}
        )
        timer = threading.Timer(limit, lambda: os.killpg(process.pid, signal.SIGKILL))
        timer.start()
        _pid, status, used = os.wait4(process.pid, 0)
        timer.cancel()
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main()
