"""Real models' operations, layer by layer, against torch's own counter: eager, compiled whole, by block, and trained.

    python benchmarks/work.py [--cpu] [NAME ...]

The models are those of tests/support/diffusers_zoo.py. One process and one line of JSON per model: for each way, how
many layers read what torch.utils.flop_counter counts over the plain model; how many read less, because some of their
work lies in a kernel fused over several modules (it counts to their common ancestor, so that sums stay) or because the
row says that not all is known; and what is wrong. The code is Inductor's for a GPU that is not there (kernels as
stand-ins); --cpu: its code for this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def one(name: str, cpu: bool) -> dict[str, Any]:
    if not cpu:
        from tests.gpuless import device

        device.install()
    from tests.support.work_truth import WAYS, compared

    result: dict[str, Any] = {"model": name, "problems": []}
    for way in WAYS:
        try:
            exact, shared, wrong = compared(name, way)
        except Exception:
            exact, shared, wrong = 0, 0, [traceback.format_exc(limit=-3)]
        result[way] = [exact, shared]
        result["problems"] += [f"{way}: {text}" for text in wrong]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.one:
        print("\n" + json.dumps(one(options.names[0], options.cpu)))
        return 0
    from benchmarks.diffusers_sweep import answered
    from tests.support import diffusers_zoo

    failed = 0
    for name in options.names or list(diffusers_zoo.MODELS):
        command = [sys.executable, __file__, "--one", *["--cpu"] * options.cpu, name]
        failed += not answered(name, command)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
