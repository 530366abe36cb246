"""What the ranks do in the parallel tests. Run in processes of their own: `spawn(world, scenario, folder)`."""

import json
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fxnvtx
from fxnvtx.pipeline import (
    Batch,
    ComponentUse,
    ComposedPipeline,
    ParallelExecutor,
    PipelineStage,
    ServerArgs,
    StageParallelism,
    pipelines,
)
from fxnvtx.pipeline.parallel import Group
from fxnvtx.pipeline.stages import DenoisingStage

from ..support.limits import CHILD_S

RANGES = ServerArgs(enable_layerwise_nvtx_marker=True)


class ToldError(Exception):
    """An error that pickles."""


class UntoldError(Exception):
    """An error that does not: its constructor wants more than its text."""

    def __init__(self, code, hint):
        super().__init__(f"code {code}: {hint}")


class Work(PipelineStage):
    """Notes the rank that ran it; fails on one rank where told to."""

    def __init__(self, parallelism, fails_on=None, error=None):
        self.parallelism = parallelism  # type: ignore[misc]
        self.fails_on = fails_on
        self.error = error

    def component_uses(self, args, stage_name):
        return [ComponentUse("net")]

    def forward(self, batch, args):
        rank = dist.get_rank()
        if rank == self.fails_on and batch.extra.get("fail"):
            raise self.error
        with self.use_component("net") as net:
            batch.latent = net(torch.full((1, 4), float(rank + 1)))
        batch.extra["ran_on"] = rank
        return batch


class GatherThenFail(PipelineStage):
    """One rank fails while the others are already waiting for it inside the stage."""

    parallelism = StageParallelism.CFG_PARALLEL

    def __init__(self, group, fails_on):
        self.group = group
        self.fails_on = fails_on

    def forward(self, batch, args):
        if self.group.rank == self.fails_on and batch.extra.get("fail"):
            raise ToldError("failed before the gather")
        batch.extra["gathered"] = [float(t) for t in self.group.gather_cfg(torch.tensor(float(self.group.rank)))]
        return batch


class SwallowsFailure(GatherThenFail):
    """The ranks that wait make nothing of the failure that they are told of."""

    def forward(self, batch, args):
        try:
            return super().forward(batch, args)
        except ToldError:
            if self.group.rank == self.fails_on:
                raise
            return batch


def pipeline_of(group, *stages):
    pipeline = ComposedPipeline(RANGES, executor=ParallelExecutor(group))
    torch.manual_seed(0)
    pipeline.add_component("net", nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    for index, stage in enumerate(stages):
        pipeline.add_stage(f"s{index}", stage)
    return pipeline


def every_type(group, _):
    """Each parallelism type: who ran it, what everybody has afterwards, and every range."""
    found = {}
    for kind in StageParallelism:
        pipeline = pipeline_of(group, Work(kind))
        with fxnvtx.record() as recording:
            batch = pipeline(Batch(extra={"given": group.rank}))
        found[kind.name] = {
            "ran_on": batch.extra.get("ran_on"),
            "given": batch.extra["given"],
            "latent": None if batch.latent is None else batch.latent.flatten().tolist(),
            "stages": [s.name for s in batch.metrics.stages.values()],
            "labels": [r.label for r in recording.ranges],
            "payloads": {r.label: r.payload for r in recording.ranges},
            "roots": [n.label for n in recording.tree()],
            "balanced": recording.balanced,
            "meta": recording.meta.get("rank"),
        }
    return found


def failures(group, _):
    """A stage that fails on one rank, for every type; the request after it works."""
    found = {}
    errors = {"told": ToldError("out of luck"), "untold": UntoldError(7, "no more"), "stop": KeyboardInterrupt("stop")}
    for kind in StageParallelism:
        everybody = kind in (StageParallelism.REPLICATED, StageParallelism.CFG_PARALLEL)
        for rank in (0, group.size - 1) if everybody else (0,):
            for name, error in errors.items():
                pipeline = pipeline_of(group, Work(StageParallelism.REPLICATED), Work(kind, rank, error))
                with fxnvtx.record() as recording:
                    begin = time.monotonic()
                    caught = _caught(lambda p=pipeline: p(Batch(extra={"fail": True})))
                    caught["seconds"] = time.monotonic() - begin
                caught["balanced"] = recording.balanced
                caught["after"] = _caught(lambda p=pipeline: p(Batch()))
                found[f"{kind.name} {rank} {name}"] = caught
    return found


def inside(group, _):
    """A rank fails while the others wait for its part of a gather; one that catches the error is not believed."""
    pipeline = pipeline_of(group, GatherThenFail(group, group.size - 1))
    failed = _caught(lambda: pipeline(Batch(extra={"fail": True})))
    after = pipeline(Batch()).extra["gathered"]
    swallowing = pipeline_of(group, SwallowsFailure(group, group.size - 1))
    swallowed = _caught(lambda: swallowing(Batch(extra={"fail": True})))
    return {"failed": failed, "after": after, "swallowed": swallowed, "then": _caught(lambda: swallowing(Batch()))}


def loading(group, _):
    """The weights of one rank cannot be put away: its residency fails before any stage."""
    args = ServerArgs(residency={"net": "component-offload"}, residency_dir="/nowhere" if group.rank == 0 else None)
    pipeline = ComposedPipeline(executor=ParallelExecutor(group))
    pipeline.add_component("net", nn.Linear(4, 4))
    pipeline.add_stage("s", Work(StageParallelism.REPLICATED))
    return _caught(lambda: pipeline(Batch(), args))


def images(group, _):
    """The reference pipeline, its guidance passes shared among the ranks."""
    pipeline = pipelines.build_reference(RANGES, executor=ParallelExecutor(group))
    with fxnvtx.record() as recording:
        batch = pipeline(Batch(prompt="a fox", steps=2))
    grouped = pipeline.run_grouped([Batch(prompt="a fox", steps=2, seed=s) for s in (0, 1)])
    return {
        "image": batch.image.flatten().tolist(),
        "grouped": [b.image.flatten().tolist() for b in grouped],
        "labels": [r.label for r in recording.ranges],
        "balanced": recording.balanced,
        "rank": recording.meta["rank"],
    }


class ThreeBranches(DenoisingStage):
    """Guidance by three passes: the text, none, and the text once more."""

    def branches(self, batch):
        return [*super().branches(batch), ("again", batch.embedding)]

    def combine(self, passes, guidance):
        conditional, unconditional, again = passes
        return unconditional + guidance.scale * (conditional - unconditional) + (again - conditional)


def branches_pipeline(executor=None):
    """The reference pipeline with three passes a step."""
    args = RANGES.with_values(guidance_interval=(0, 1))
    pipeline = pipelines.build_reference(args, executor=executor)
    pipeline.stages["denoising"].__class__ = ThreeBranches
    return pipeline


def branches(group, _):
    """Three passes on whatever number of ranks."""
    pipeline = branches_pipeline(ParallelExecutor(group))
    with fxnvtx.record() as recording:
        batch = pipeline(Batch(prompt="a fox", steps=3))
    passes = [r.label for r in recording.ranges if r.label.startswith("predict_noise.")]
    return {"image": batch.image.flatten().tolist(), "passes": passes}


def lost(group, _):
    """Rank 1 goes away without a word."""
    group.barrier()
    if group.rank == 1:
        dist.recv(torch.empty(1), src=0)  # so rank 0 is out of the barrier
        os._exit(0)
    dist.send(torch.zeros(1), dst=1)
    pipeline = pipeline_of(group, Work(StageParallelism.REPLICATED))
    begin = time.monotonic()
    caught = _caught(lambda: pipeline(Batch()))
    return {**caught, "seconds": time.monotonic() - begin}


def unpicklable(group, _):
    """A batch that cannot be sent fails on every rank."""
    pipeline = pipeline_of(group, Work(StageParallelism.MAIN_RANK_ONLY_AND_SEND_TO_OTHERS))
    return _caught(lambda: pipeline(Batch(extra={"no": lambda: None})))


class OnlyOnRankZero:
    """Pickles everywhere, unpickles on rank 0 alone."""

    def __reduce__(self):
        return _refuse, ()


def _refuse():
    if dist.get_rank():
        raise ToldError("not here")
    return OnlyOnRankZero()


def unreadable(group, _):
    """A batch that one rank can send and another cannot read; the request after it works."""
    pipeline = pipeline_of(group, Work(StageParallelism.CFG_PARALLEL))
    caught = _caught(lambda: pipeline(Batch(extra={"no": OnlyOnRankZero()})))
    return {**caught, "after": _caught(lambda: pipeline(Batch()))["type"]}


def different(group, _):
    """Ranks with different pipelines are told so."""
    kind = StageParallelism.REPLICATED if group.rank else StageParallelism.MAIN_RANK_ONLY
    return _caught(lambda: pipeline_of(group, Work(kind))(Batch()))


def _caught(work):
    try:
        work()
    except BaseException as error:
        return {"type": type(error).__name__, "text": str(error)}
    return {"type": None, "text": ""}


def _rank(rank, world, scenarios, cfg_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=CHILD_S)
    )
    found = {}
    try:
        group = Group(cfg_size, timeout_s=CHILD_S)
        for name in scenarios:
            found[name] = globals()[name](group, folder)
    except BaseException:
        found["crash"] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # a rank that lost the others cannot shut down with them


def spawn(world, scenarios, folder, cfg_size=None):
    """The findings of every rank, by rank."""
    processes = mp.start_processes(  # type: ignore[attr-defined]
        _rank, (world, scenarios, cfg_size, str(folder)), nprocs=world, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + CHILD_S
    while not processes.join(timeout=5):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            raise AssertionError("the ranks hang")
    found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world) if _wrote(folder, rank)]
    for rank in found:
        assert "crash" not in rank, rank["crash"]
    return found


def _wrote(folder, rank):
    return Path(folder, f"{rank}.json").exists()
