"""What each way of keeping weights costs: peak resident bytes, seconds, and where the seconds go.

    python benchmarks/residency.py [--size small] [--steps 2]

One process, one pipeline, the modes in turn. The image must be the same in all of them, to the bit.
"""

from __future__ import annotations

import argparse
from time import perf_counter

import torch

import fxnvtx
from fxnvtx.pipeline import Batch, ServerArgs, pipelines
from fxnvtx.pipeline.args import RESIDENCY_MODES

COMPONENTS = ("text_encoder", "dit", "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small")
    parser.add_argument("--steps", type=int, default=2)
    chosen = parser.parse_args()
    pipeline = pipelines.build_reference(size=chosen.size)
    images = []
    print(f"{'mode':<20}{'peak MiB':>10}{'bound MiB':>11}{'seconds':>9}{'moving':>9}{'waiting':>9}")
    for mode in RESIDENCY_MODES:
        args = ServerArgs(enable_stage_nvtx_marker=True, residency=dict.fromkeys(COMPONENTS, mode))
        pipeline(Batch(prompt="a fox", steps=1, is_warmup=True), args)
        begin = perf_counter()
        with fxnvtx.record() as recording:
            images.append(pipeline(Batch(prompt="a fox", steps=chosen.steps), args).image)
        seconds = perf_counter() - begin
        moving, waiting = (
            sum((r.end_ns or r.start_ns) - r.start_ns for r in recording.ranges if r.label.startswith(kinds)) / 1e9
            for kinds in (("residency.load", "residency.offload", "residency.prefetch"), ("residency.wait",))
        )
        account, bound = pipeline.residency.account, pipeline.residency.bound_bytes
        print(
            f"{mode:<20}{account.peak_bytes / 2**20:>10.1f}{bound / 2**20:>11.1f}"
            f"{seconds:>9.2f}{moving:>9.2f}{waiting:>9.2f}"
        )
    same = all(torch.equal(images[0], image) for image in images)
    print("the same image in all of them" if same else "THE IMAGES DIFFER")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
