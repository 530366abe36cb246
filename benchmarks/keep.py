"""Runs a benchmark and keeps what it printed, with what it ran on.

    python benchmarks/keep.py overhead            # appends a line to benchmarks/results/overhead.jsonl
    python benchmarks/keep.py report --millions 1 # further words go to the benchmark
    python benchmarks/keep.py --show overhead     # all that was kept, oldest first

Absolute times of different machines say nothing about each other; the ratios inside one output do.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def keep(name: str, words: list[str]) -> int:
    load = round(os.getloadavg()[0], 1)  # what else the machine has to do
    done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *words], stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    if done.returncode:
        return done.returncode
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    entry = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "cpus": os.cpu_count(),
        "load": load,
        "words": words,
        "printed": done.stdout.splitlines(),
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    return 0


def show(name: str) -> int:
    for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        printed = entry.pop("printed")
        print(", ".join(f"{key} {value}" for key, value in entry.items()), *printed, "", sep="\n")
    return 0


def main(words: list[str]) -> int:
    showing, words = words[:1] == ["--show"], [word for word in words if word != "--show"]
    names = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "keep")
    if not words or words[0] not in names:
        print(f"{__doc__}\nBenchmarks: {', '.join(names)}", file=sys.stderr)
        return 2
    return show(words[0]) if showing else keep(words[0], words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
