"""Real models, compiled plain and with ranges: whose each launch is, and what is wrong.

    python benchmarks/diffusers_sweep.py [--gpuless] [--product FOLDER] [--launches] [--no-plain] [NAME ...]

The models are those of tests/support/diffusers_zoo.py and, where FXNVTX_FOREIGN is set, of foreign_zoo.py. One process
per model, one line of JSON each, problems in it. `--gpuless`: Inductor's code for a GPU that is not there, kernels as
stand-ins; else the CPU's. `--product`: a folder that holds another fxnvtx to measure. `--launches`: each launch too.
`--no-plain`: do not compare with a plain compilation.

one: launches whose innermost range is one module's, the root included; below: those in a range of something below the
root; heavy: matrix products, convolutions and attention that are library calls, by kind, and how many of them lie in
one module's range. GPU templates are in tests/gpuless.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "attention": r"scaled_dot_product|_flash_attention|_efficient_attention",
    "convolution": r"convolution|mkldnn.*conv",
    "matmul": r"(?:^|\.|::)_?(?:bias_)?(?:addmm|mm|bmm|baddbmm|mm_plus_mm|_linear_pointwise|_mkl_linear)\b",
}


def heavy(name: str) -> str | None:
    if "_fused_" in name:
        return None
    return next((kind for kind, pattern in HEAVY.items() if re.search(pattern, name)), None)


def _built(name: str) -> tuple[Any, dict[str, Any]]:
    from benchmarks import foreign_zoo
    from tests.support import diffusers_zoo

    return foreign_zoo.build(name) if name in foreign_zoo.MODELS else diffusers_zoo.build(name)


def one(name: str, gpuless: bool, listed: bool, plain: bool) -> dict[str, Any]:
    import torch

    import fxnvtx

    sys.path.insert(0, str(ROOT))
    from tests.compile.generated import counted, forget_generated_code, kernel_hashes, without_graph_caches
    from tests.compile.launches import empty_ranges, enclosing, witness
    from tests.support.diffusers_zoo import tensors_of

    if gpuless:
        from tests.gpuless import device

        device.install()
    compiled: dict[str, Any] = {}
    for backend in ("inductor", "fxnvtx") if plain else ("fxnvtx",):
        model, arguments = _built(name)
        if backend == "fxnvtx":
            fxnvtx.instrument(model, "net", path="hooks")
        forget_generated_code()
        with counted() as counters, without_graph_caches(), torch.no_grad():
            call = torch.compile(model, backend=backend)
            torch.manual_seed(2)
            outputs = tensors_of(call(**arguments))
        compiled[backend] = counters, kernel_hashes(), outputs
    with torch.no_grad(), witness() as launches, fxnvtx.record() as recording:
        torch.manual_seed(2)
        call(**arguments)
    problems = [f"{what} differ" for i, what in enumerate(("counters", "kernels")) if differs(compiled, i)]
    if plain and not gpuless:
        pairs = zip(compiled["inductor"][2], compiled["fxnvtx"][2], strict=True)
        problems += [] if all(torch.equal(a, b) for a, b in pairs) else ["outputs differ"]
    paths = {"net"} | {f"net.{n}" for n, _ in model.named_modules(remove_duplicate=False) if n}
    counts: Counter[str] = Counter()
    rows = []
    for launch in launches:
        around = [r.label for r in enclosing(recording, launch)]
        kind = heavy(launch.name)
        single = bool(around) and around[-1] in paths
        odd = not around or around[0] != "net" or re.search(r"unknown|\?|one of several", around[-1]) is not None
        counts.update({"launches": 1, "one": single, "below": len(around) > 1, "odd": odd})
        if kind is not None:
            counts.update({kind: 1, f"{kind} one": single})
            problems += [] if single else [f"{launch.name} lies in {around[-1:]}"]
        rows.append([launch.name, around])
    problems += [f"{n} odd ranges" for n in [counts["odd"]] if n]
    if compiled["fxnvtx"][0]["graphs"] == 1:
        problems += [f"{r.label} is empty" for r in empty_ranges(recording, launches)]
    result: dict[str, Any] = {"model": name, **{k: int(v) for k, v in counts.items()}, "problems": problems}
    result["graphs"] = compiled["fxnvtx"][0]["graphs"]
    return {**result, "rows": rows} if listed else result


def differs(compiled: dict[str, Any], index: int) -> bool:
    return "inductor" in compiled and bool(compiled["inductor"][index] != compiled["fxnvtx"][index])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpuless", action="store_true")
    parser.add_argument("--product", default=str(ROOT))
    parser.add_argument("--launches", action="store_true")
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(one(options.names[0], options.gpuless, options.launches, not options.no_plain)))
        return 0
    sys.path.insert(0, str(ROOT))
    from benchmarks import foreign_zoo
    from tests.support import diffusers_zoo

    foreign = list(foreign_zoo.MODELS) if os.environ.get("FXNVTX_FOREIGN") else []
    failed = 0
    for name in options.names or [*diffusers_zoo.MODELS, *foreign]:
        flags = ["--one", *["--gpuless"] * options.gpuless, *["--launches"] * options.launches]
        flags += ["--no-plain"] * options.no_plain
        # the package to measure is found first, the tests beside this file later
        path = os.pathsep.join([options.product, *filter(None, [os.environ.get("PYTHONPATH")])])
        starter = "import sys; sys.path[:] = sys.argv[1:2] + [p for p in sys.path if p]; import fxnvtx; "
        starter += "sys.path[:] = [p for p in sys.path if p != sys.argv[1]]; del sys.argv[1]; "
        starter += f"sys.path.insert(0, {str(ROOT)!r}); import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
        command = [sys.executable, "-c", starter, options.product, *flags, name]
        failed += not answered(name, command, {**os.environ, "PYTHONPATH": path})
    return int(failed > 0)


def answered(name: str, command: list[str], environment: dict[str, str] | None = None) -> bool:
    """Print the line of JSON that a model's process ends with; returns whether it tells of no problem."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    line = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
    found = json.loads(line[0]) if line else {"model": name, "problems": [done.stderr.strip()[-600:]]}
    print(json.dumps(found), flush=True)
    return not found["problems"]


if __name__ == "__main__":
    sys.exit(main())
