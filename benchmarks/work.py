"""Real models' operations, layer by layer, against torch's own counter: eager, compiled whole, by block, and trained.

    python benchmarks/work.py [--cpu] [NAME ...]

The models are those of tests/support/diffusers_zoo.py. One process and one line of JSON per model: for each way, how many
layers have operations, and each layer where fxnvtx's figure is not that of torch.utils.flop_counter over the plain model.
The code is Inductor's for a GPU that is not there (kernels as stand-ins); --cpu: its code for this machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("eager", "whole", "by block", "trained")


def one(name: str, cpu: bool) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    if not cpu:
        from tests.gpuless import device

        device.install()
    result: dict[str, Any] = {"model": name, "problems": []}
    for way in WAYS:
        try:
            layers, wrong = compared(name, way)
        except Exception:
            layers, wrong = 0, [traceback.format_exc(limit=-3)]
        result[way] = layers
        result["problems"] += [f"{way}: {text}" for text in wrong]
    return result


def compared(name: str, way: str) -> tuple[int, list[str]]:
    """How many layers have operations, and what differs."""
    import torch
    from torch import nn

    import fxnvtx
    from tests.support import diffusers_zoo as zoo
    from tests.support.work_truth import shown_flops, trained_flops, true_flops

    torch._dynamo.reset()
    trained = way == "trained"
    root = way.replace(" ", "_")  # a name of its own: of two living models with one name nobody could say whose work it is
    model, arguments = zoo.build(name)
    model.requires_grad_(trained)

    def run(call: Callable[..., Any]) -> None:
        torch.manual_seed(2)
        outputs = zoo.tensors_of(call(**arguments))
        if trained:
            sum(t.sum() for t in outputs).backward()  # type: ignore[union-attr]

    with torch.set_grad_enabled(trained):
        counts = (trained_flops if trained else true_flops)(model, lambda: run(model), root)
        truth = {label: flops for label, flops in counts.items() if flops}
        call: Any = fxnvtx.instrument(model, root, path="hooks")
        if way in ("whole", "trained"):
            call = torch.compile(model, backend="fxnvtx")
        elif way == "by block":
            for block in (b for child in model.children() if isinstance(child, nn.ModuleList) for b in child):
                block.compile(backend="fxnvtx")
        run(call)
        with fxnvtx.record(work=way in ("eager", "by block")):
            run(call)
        with fxnvtx.record(work=way == "eager") as recording:
            run(call)
    shown = shown_flops(recording)
    for label, flops in shown_flops(recording, backward=True).items() if trained else ():
        shown[label] = shown.get(label, 0) + flops
    labels = sorted(shown.keys() | truth.keys())
    wrong = [f"{x}: {shown.get(x)}, not {truth.get(x)}" for x in labels if shown.get(x) != truth.get(x)]
    return len(truth), wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(one(options.names[0], options.cpu)))
        return 0
    sys.path.insert(0, str(ROOT))
    from tests.support import diffusers_zoo

    failed = 0
    for name in options.names or list(diffusers_zoo.MODELS):
        command = [sys.executable, __file__, "--one", *["--cpu"] * options.cpu, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        line = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
        found = json.loads(line[0]) if line else {"model": name, "problems": [done.stderr.strip()[-600:]]}
        failed += bool(found["problems"])
        print(json.dumps(found), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
