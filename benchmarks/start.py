"""What `fxnvtx run` costs a Python process that never imports torch, from its start to its end.

    python benchmarks/start.py

Processes with and without what arms them take turns, and so do two lots of processes without: how far those are apart
is what the machine says by itself. Processor time of the process, its own and the system's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from fxnvtx.cli.run import environment

PROCESSES = 150
COMMAND = [sys.executable, "-c", "import json, subprocess"]


def processor_seconds(given: dict[str, str]) -> float:
    process = subprocess.Popen(COMMAND, env=given)
    _, code, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


def main() -> None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode beside it
    plain = {k: v for k, v in os.environ.items() if not k.startswith("FXNVTX")}
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"alone": plain, "alone again": plain, "armed": environment(Path(folder), {})}
        found: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(PROCESSES):
            for name in sorted(kinds, reverse=bool(turn % 2)):
                found[name].append(processor_seconds(kinds[name]))
    alone = median(found["alone"])
    for name, times in found.items():
        print(f"{name:12} {median(times) * 1e3:6.2f} ms   {median(times) / alone:5.3f}")


if __name__ == "__main__":
    main()
