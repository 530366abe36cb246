"""A stage: its order of events, its names, its gate."""

import threading
from typing import Any

import pytest
import torch

import fxnvtx
from fxnvtx.errors import PipelineError
from fxnvtx.pipeline import Batch, PipelineStage, ServerArgs
from fxnvtx.pipeline.request import running, running_with

from ..support.limits import THREAD_S
from .nets import LAYERS, STAGES, Net, Uses, calls, labels, pipeline_of


class Bare(PipelineStage):
    """Never calls super().__init__()."""

    def __init__(self, seen=None):
        self.seen = seen if seen is not None else []

    def forward(self, batch, args):
        self.seen.append(self.current_use_nvtx)
        return batch


def test_the_order_of_events():
    events: list[tuple[Any, ...]] = []

    class Stage(PipelineStage):
        def verify_input(self, batch, args):
            events.append(("input", running().use_nvtx))
            return []

        def forward(self, batch, args):
            events.append(("forward", self.current_use_nvtx, [e.text for e in fxnvtx.ranges.local.stack.labels]))
            return batch

        def verify_output(self, batch, args):
            events.append(("output", running().use_nvtx, len(fxnvtx.ranges.local.stack)))
            return []

    with fxnvtx.record():
        Stage()(Batch(), LAYERS)
    assert events == [("input", None), ("forward", True, ["stage_Stage"]), ("output", None, 0)]


@pytest.mark.parametrize(("where", "word"), [("verify_input", "input"), ("verify_output", "output")])
def test_a_failed_check_names_the_stage_and_the_problem(where, word):
    stage = Bare()
    stage.set_registered_stage_name("one")
    setattr(stage, where, lambda batch, args: ["latent is missing", "steps is 0"])
    with pytest.raises(PipelineError, match=f"stage one: wrong {word}: latent is missing; steps is 0"):
        stage(Batch(), LAYERS)


@pytest.mark.parametrize(
    ("args", "warmup", "wanted"),
    [
        (ServerArgs(), False, False),
        (LAYERS, False, True),
        (LAYERS, True, False),
        (STAGES, False, True),
        (STAGES, True, False),
    ],
)
def test_the_gate_is_flag_and_not_warmup(args, warmup, wanted):
    stage = Bare()
    with fxnvtx.record() as recording:
        stage(Batch(is_warmup=warmup), args)
    assert stage.seen == [wanted]
    assert labels(recording) == (["stage_Bare"] if wanted else [])
    assert not stage.current_use_nvtx


def test_the_gate_cannot_be_written():
    with pytest.raises(AttributeError):
        Bare().current_use_nvtx = True  # type: ignore[misc]


def test_what_the_request_decided_holds_for_every_stage():
    stage = Bare()
    with running_with(use_nvtx=True):
        stage(Batch(is_warmup=True), ServerArgs())
    with running_with(use_nvtx=False):
        stage(Batch(), LAYERS)
    assert stage.seen == [True, False]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_stage_that_raises_restores_the_gate_and_closes_its_range(error):
    class Raises(PipelineStage):
        def forward(self, batch, args):
            raise error

    with fxnvtx.record() as recording:
        with pytest.raises(error):
            Raises()(Batch(), LAYERS)
        assert running().use_nvtx is None
        assert fxnvtx.ranges.local.stack == []
    assert recording.balanced
    assert labels(recording) == ["stage_Raises"]


def test_a_reentrant_stage_keeps_the_gate():
    class Again(PipelineStage):
        seen = []

        def forward(self, batch, args):
            self.seen.append(self.current_use_nvtx)
            if len(self.seen) == 1:
                self(Batch(is_warmup=True), args)
                self.seen.append(self.current_use_nvtx)
            return batch

    Again()(Batch(), LAYERS)
    assert Again.seen == [True, True, True]


def test_one_stage_object_serves_two_threads_at_once():
    meet = threading.Barrier(2, timeout=THREAD_S)
    seen = {}

    class Shared(PipelineStage):
        def forward(self, batch, args):
            meet.wait()
            seen[batch.is_warmup] = self.current_use_nvtx
            meet.wait()
            return batch

    stage = Shared()
    threads = [threading.Thread(target=stage, args=(Batch(is_warmup=w), LAYERS)) for w in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {True: False, False: True}


def test_names_explicit_then_registered_then_class():
    stage = Bare()
    assert (stage.component_name, stage.profile_stage_name) == ("Bare", "Bare")
    stage.set_registered_stage_name("one")
    assert (stage.component_name, stage.profile_stage_name) == ("one", "Bare")
    stage.set_profile_stage_name("profile")
    assert (stage.component_name, stage.profile_stage_name) == ("one", "profile")
    stage._component_name = "explicit"
    assert stage.component_name == "explicit"
    assert stage.active_component_name == "explicit"


def test_the_active_name_is_the_managers_current_stage():
    names = []
    inner = Bare()

    def work(stage, batch):
        names.append((stage.active_component_name, inner.active_component_name))

    pipeline_of({}, {"outer": Uses(work)})(Batch())
    assert names == [("outer", "outer")]
    assert inner.active_component_name == "Bare"


def test_a_router_that_calls_forward_loses_nothing():
    class Loop(PipelineStage):
        def forward(self, batch, args):
            with self.ranged("denoising_loop", "loop"):
                for index in range(2):
                    text = fxnvtx.ranges.label(f"denoising_step_{index}_t0", "step")
                    with self.step(text, index), self.use_component("net") as net:
                        net(torch.ones(1, 8))
            return batch

    loop = Loop()

    def route(stage, batch):
        loop.forward(batch, LAYERS)

    pipeline = pipeline_of({"net": Net(depth=1)}, {"router": Uses(route, "net")})
    with fxnvtx.record() as recording:
        batch = pipeline(Batch())
    steps = ["denoising_step_0_t0", "denoising_step_1_t0"]
    assert labels(recording, "step") == steps
    assert [s.range for s in batch.metrics.steps] == steps
    assert labels(recording).count("router.net.head") == 2
    (request,) = recording.tree()
    assert request.children[0].label == "stage_router"
    assert request.children[0].children[0].label == "denoising_loop"


def test_a_router_that_calls_the_stage_shows_it_inside_its_own():
    pipeline = pipeline_of({}, {"router": Uses(lambda stage, batch: Bare()(batch, LAYERS))})
    with fxnvtx.record() as recording:
        batch = pipeline(Batch())
    assert labels(recording) == ["request#0", "stage_router", "stage_Bare"]
    assert list(batch.metrics.stages) == ["stage_Bare", "stage_router"]


def test_figures_of_an_inner_stage_do_not_mix_with_those_of_its_namesake():
    pipeline = pipeline_of({}, {"one": Bare(), "router": Uses(lambda stage, batch: Bare()(batch, LAYERS))})
    batch = pipeline(Batch())
    assert {s.range: s.name for s in batch.metrics.stages.values()} == {
        "stage_one": "Bare",
        "stage_Bare": "stage_Bare",
        "stage_router": "Uses",
    }


def test_a_stage_outside_of_any_pipeline_uses_its_own_modules():
    stage = calls()
    stage.modules = {"net": Net()}
    assert stage(Batch(), LAYERS).latent.shape == (2, 8)
    stage.modules = {}
    with pytest.raises(PipelineError, match="has no component 'net'"):
        stage(Batch(), LAYERS)


def test_forward_must_be_written():
    with pytest.raises(NotImplementedError, match="forward"):
        PipelineStage()(Batch(), LAYERS)
