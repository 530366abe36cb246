"""Every model of the diffusers zoo, compiled plain and with ranges: one line each, problems first.

    python benchmarks/diffusers_sweep.py [NAME ...]

One process per model. "one %": launches whose innermost range is one module's, below the root. "warm" times: the C++
compiler's results are there already, the rest of the compilation is not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = (
    f"{'model':12s} {'launches':>8s} {'ranges':>6s} {'fused':>5s} {'root':>4s} {'?':>3s} {'one %':>5s} {'kernels':>7s}"
)


def one(name: str) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.compile.compare import compare

    print(json.dumps(asdict(compare(name, warm=True))))


def main(names: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    from tests.support.diffusers_zoo import MODELS

    failed = 0
    print(f"{HEAD} {'graphs':>6s} {'plain s':>8s} {'ours s':>7s} problems")
    for name in names or list(MODELS):
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], capture_output=True, text=True, check=False, env=os.environ
        )
        if done.returncode:
            failed += 1
            print(f"{name:12s} {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        r = json.loads(done.stdout.strip().splitlines()[-1])
        failed += bool(r["problems"])
        figures = f"{r['launches']:8d} {r['ranges']:6d} {r['fused']:5d} {r['root_only']:4d} {r['unknown']:3d}"
        figures += f" {100 * r['concrete'] / max(1, r['launches']):5.1f}"
        times = f"{r['kernels']:7d} {r['graphs']:6d} {r['plain_s']:8.1f} {r['ours_s']:7.1f}"
        print(f"{name:12s} {figures} {times} {'; '.join(r['problems'][:4]) or 'none'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
