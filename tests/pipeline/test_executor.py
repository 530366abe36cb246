"""The executor: requests, warm-ups, groups, and the device profiler."""

import itertools
from typing import Any

import pytest
import torch

import fxnvtx
from fxnvtx.errors import PipelineError
from fxnvtx.pipeline import Batch, PipelineStage, ServerArgs, SyncExecutor
from fxnvtx.pipeline.executor import PipelineExecutor

from .nets import LAYERS, STAGES, Net, Uses, calls, labels, pipeline_of


class Gates(PipelineStage):
    def __init__(self, seen):
        self.seen = seen

    def forward(self, batch, args):
        self.seen.append((self.component_name, batch.seed, self.current_use_nvtx))
        return batch


class Bare:
    pass


@pytest.mark.parametrize(
    ("payload", "wanted"),
    [
        (Batch(), False),
        (Batch(is_warmup=True), True),
        ([], False),
        ([Batch(is_warmup=True)], True),
        ([Batch(is_warmup=True), Batch()], False),
        ([Batch(is_warmup=True), Bare()], False),
        (Bare(), False),
        (None, False),
    ],
)
def test_what_a_warmup_is(payload, wanted):
    assert PipelineExecutor._is_warmup_payload(payload) is wanted


def test_requests_are_numbered_and_warmups_are_not():
    pipeline = pipeline_of({"net": Net()}, {"a": calls()})
    with fxnvtx.record() as recording:
        for warmup in (True, False, True, False):
            pipeline(Batch(is_warmup=warmup))
    assert labels(recording, "request") == ["request#0", "request#1"]
    assert labels(recording, "stage") == ["stage_a", "stage_a"]


@pytest.mark.parametrize("args", [LAYERS, STAGES, ServerArgs()])
def test_a_warmup_shows_nothing_at_all(args):
    args = args.with_values(residency={"net": "component-offload"})
    pipeline = pipeline_of({"net": Net()}, {"a": calls()}, args)
    with fxnvtx.record() as recording:
        batch = pipeline(Batch(is_warmup=True))
    assert recording.ranges == []
    assert recording.marks == []
    assert batch.latent is not None
    assert batch.metrics.range is None


def test_stage_ranges_without_layers():
    pipeline = pipeline_of({"net": Net()}, {"a": calls()}, STAGES)
    with fxnvtx.record() as recording:
        pipeline(Batch())
    assert labels(recording) == ["request#0", "stage_a"]


def test_without_a_flag_nothing_shows():
    pipeline = pipeline_of({"net": Net()}, {"a": calls()}, ServerArgs())
    with fxnvtx.record() as recording:
        pipeline(Batch())
    assert recording.ranges == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_request_that_fails_is_finished_and_the_next_one_works(error):
    def work(stage, batch):
        with stage.use_component("net") as net:
            net(torch.ones(1, 8))
            if batch.seed:
                raise error

    args = LAYERS.with_values(residency={"net": "component-offload"})
    pipeline = pipeline_of({"net": Net()}, {"a": Uses(work, "net")}, args)
    with fxnvtx.record() as recording:
        with pytest.raises(error):
            pipeline(Batch(seed=1))
        assert not pipeline.residency.in_request
        assert pipeline.residency.account.resident_bytes == 0
        pipeline(Batch())
    assert recording.balanced
    assert labels(recording, "request") == ["request#0", "request#1"]
    assert [r.depth for r in recording.ranges if r.category == "request"] == [0, 0]


def test_a_mixed_group_is_gated_the_same_everywhere():
    seen: list[Any] = []
    pipeline = pipeline_of({"net": Net(depth=1)}, {"a": Gates(seen), "b": calls(), "c": Gates(seen)})
    group = [Batch(seed=0, is_warmup=True), Batch(seed=1), Batch(seed=2)]
    with fxnvtx.record() as recording:
        done = pipeline.run_grouped(group)
    assert done == group
    assert {gate for _, _, gate in seen} == {True}
    assert [(name, seed) for name, seed, _ in seen] == [(n, s) for n in "ac" for s in range(3)]
    assert labels(recording).count("b.net.head") == 3
    (root,) = recording.tree()
    assert (root.label, root.payload) == ("request_group", 3)
    assert [c.label for c in root.children] == ["stage_a", "stage_b", "stage_c"]
    assert [c.label for c in root.children[0].children] == ["request#0", "request#1"]
    assert [c.label for c in root.children[1].children] == ["b.net", "request#0", "request#1"]
    assert [b.metrics.range for b in done] == [None, "request#0", "request#1"]


def test_reading_a_model_is_not_part_of_the_request(monkeypatch):
    from fxnvtx import modules

    seen: list[Any] = []
    real: Any = modules.instrument

    def noted(*args, **kwargs):
        seen.append(len(fxnvtx.ranges.local.stack))
        return real(*args, **kwargs)

    monkeypatch.setattr(modules, "instrument", noted)
    pipeline = pipeline_of({"net": Net()}, {"a": calls()})
    with fxnvtx.record() as recording:
        for _ in range(2):
            pipeline(Batch())
    assert seen == [0]
    assert labels(recording).count("a.net.head") == 2


def test_a_group_of_warmups_shows_nothing():
    seen: list[Any] = []
    pipeline = pipeline_of({"net": Net()}, {"a": Gates(seen), "b": calls()})
    with fxnvtx.record() as recording:
        pipeline.run_grouped([Batch(is_warmup=True), Batch(is_warmup=True)])
    assert recording.ranges == []
    assert {gate for _, _, gate in seen} == {False}


def test_a_deduplicable_stage_runs_once_per_distinct_input():
    class Doubles(PipelineStage):
        deduplicated = ("latent",)
        ran = []

        def deduplication_key(self, batch, args):
            return batch.prompt or None

        def forward(self, batch, args):
            self.ran.append(batch.seed)
            batch.latent = torch.full((1,), float(batch.seed))
            return batch

    pipeline = pipeline_of({}, {"a": Doubles()})
    group = [Batch(prompt=p, seed=s) for s, p in enumerate(["x", "y", "x", "", "", "y"])]
    done = pipeline.run_grouped(group)
    assert Doubles.ran == [0, 1, 3, 4]  # an empty key is none: such a stage runs for each
    assert [int(b.latent) for b in done] == [0, 1, 0, 3, 4, 1]


def test_an_empty_group_is_refused():
    with pytest.raises(PipelineError, match="at least one"):
        pipeline_of({}, {"a": Gates([])}).run_grouped([])


def test_the_label_of_a_request_is_not_a_new_string_for_ever():
    from fxnvtx.pipeline import executor

    counting = SyncExecutor()
    pipeline = pipeline_of({}, {"a": Gates([])})
    pipeline.executor = counting
    counting._numbers = itertools.count(executor.DISTINCT_REQUEST_LABELS + 3)
    with fxnvtx.record() as recording:
        pipeline(Batch())
    assert labels(recording, "request") == ["request#3"]


class Runtime:
    """Stands in for the CUDA runtime, which this machine may not have."""

    def __init__(self, events):
        self.events = events

    def cudaProfilerStart(self):
        self.events.append("start")

    def cudaProfilerStop(self):
        self.events.append("stop")


def test_the_device_profiler_runs_around_requests_that_are_no_warmups(monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(events))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))

    def work(stage, batch):
        events.append("work")
        if batch.seed:
            raise ValueError

    pipeline = pipeline_of({}, {"a": Uses(work)}, ServerArgs(cuda_profiler_range=True))
    pipeline(Batch())
    assert events == ["work"]  # no CUDA: nothing happens
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pipeline(Batch(is_warmup=True))
    assert events == ["work", "work"]
    with pytest.raises(ValueError):
        pipeline(Batch(seed=1))
    assert events[2:] == ["wait", "start", "work", "wait", "stop"]
