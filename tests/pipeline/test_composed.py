"""Names that do not collide, figures that join with ranges."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxnvtx
from fxnvtx.errors import ConfigError, OutputError, PipelineError
from fxnvtx.pipeline import Batch, ComposedPipeline, ParallelExecutor, PipelineStage, ServerArgs, StageParallelism
from fxnvtx.pipeline.executor import profile_names

from .nets import LAYERS, Net, Uses, calls, labels, pipeline_of


class Switch(PipelineStage):
    def forward(self, batch, args):
        return batch


class Other(Switch):
    pass


def named(**stages):
    pipeline = ComposedPipeline(LAYERS)
    for name, stage in stages.items():
        pipeline.add_stage(name, stage)
    return pipeline, {name: stage.profile_stage_name for name, stage in pipeline.stages.items()}


def test_a_class_that_is_there_once_gives_the_profile_name():
    assert named(a=Switch(), b=Other())[1] == {"a": "Switch", "b": "Other"}


def test_two_stages_of_one_class_both_go_by_their_registered_names():
    assert named(on=Switch(), b=Other(), off=Switch())[1] == {"on": "on", "b": "Other", "off": "off"}


def test_a_profile_name_is_never_another_stages_name():
    # "Switch" as the name of another stage: the class name would be taken twice
    assert named(a=Switch(), Switch=Other())[1] == {"a": "a", "Switch": "Other"}
    assert named(Switch=Other(), a=Switch(), b=Other())[1] == {"Switch": "Switch", "a": "a", "b": "b"}
    assert named(Switch=Switch())[1] == {"Switch": "Switch"}


@given(st.dictionaries(st.sampled_from("ABCDE"), st.sampled_from("ABCDE"), max_size=5))
def test_profile_names_are_all_different(classes):
    names = profile_names(classes)
    assert names.keys() == classes.keys()
    assert len(set(names.values())) == len(classes)
    for name, found in names.items():
        assert found in (name, classes[name])
        assert all(found != other for other in classes if other != name)


def test_a_name_or_an_object_twice_is_an_error():
    stage = Switch()
    pipeline, _ = named(a=stage)
    with pytest.raises(PipelineError, match="named 'a' already"):
        pipeline.add_stage("a", Switch())
    with pytest.raises(PipelineError, match="same object as 'a'"):
        pipeline.add_stage("b", stage)
    with pytest.raises(PipelineError, match="PipelineStage"):
        pipeline.add_stage("b", print)
    assert list(pipeline.stages) == ["a"]
    assert stage.component_name == "a"


def test_ranges_and_figures_join_one_to_one():
    pipeline = pipeline_of({"net": Net()}, {"first": calls(), "second": calls(), "switch": Switch()})
    with fxnvtx.record() as recording:
        batch = pipeline(Batch())
    figures = batch.metrics.as_dict()
    assert figures["range"] == "request#0"
    assert [s["range"] for s in figures["stages"]] == labels(recording, "stage")
    assert [s["name"] for s in figures["stages"]] == ["first", "second", "Switch"]
    assert all(s["calls"] == 1 for s in figures["stages"])
    spans = {r.label: (r.end_ns - r.start_ns) / 1e6 for r in recording.ranges}  # type: ignore[operator]
    for stage in figures["stages"]:
        assert 0 < stage["wall_ms"] <= spans[stage["range"]]
    assert spans["request#0"] <= figures["total_ms"]


def test_figures_are_written_as_json(tmp_path):
    batch = pipeline_of({}, {"a": Switch()})(Batch())
    found = json.loads(batch.metrics.save(tmp_path / "metrics.json").read_text())
    assert found == batch.metrics.as_dict()
    with pytest.raises(OutputError, match="cannot write"):
        batch.metrics.save(tmp_path / "missing" / "metrics.json")


def test_memory_snapshots_where_asked_for():
    net = Net()
    args = ServerArgs(memory_snapshots=True)
    batch = pipeline_of({"net": net}, {"a": calls()}, args)(Batch())
    total = sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
    assert batch.metrics.stages["stage_a"].memory["resident_weights"] == total
    assert pipeline_of({"net": net}, {"a": calls()})(Batch()).metrics.stages["stage_a"].memory is None


def test_a_step_that_fails_has_its_figures_too():
    def work(stage, batch):
        with stage.step(fxnvtx.ranges.label("denoising_step_0_t1", "step")):
            raise ValueError

    batch = Batch()
    with pytest.raises(ValueError):
        pipeline_of({}, {"a": Uses(work)})(batch)
    assert [s.range for s in batch.metrics.steps] == ["denoising_step_0_t1"]
    assert batch.metrics.stages["stage_a"].calls == 1


def test_mistakes_are_told():
    with pytest.raises(PipelineError, match="no stages"):
        ComposedPipeline()(Batch())
    with pytest.raises(PipelineError, match="kind='dits'"):
        ComposedPipeline().add_component("dit", torch.nn.Linear(1, 1), "dits")
    for args in (ServerArgs(residency={"dti": "resident"}), ServerArgs(layerwise_offload_components=["dti"])):
        with pytest.raises(ConfigError, match="'dti', which is none of the components: net"):
            pipeline_of({"net": Net()}, {"a": calls()}, args)(Batch())
    with pytest.raises(PipelineError, match="no component 'net'"):
        pipeline_of({}, {"a": calls()})(Batch())
    undeclared = calls()
    undeclared.uses = []
    with pytest.raises(PipelineError, match=r"a\.net was not declared"):
        pipeline_of({"net": Net()}, {"a": undeclared})(Batch())
    for values in ({"steps": 0}, {"steps": True}, {"refine_steps": 1.5}, {"prompt": 3}):
        with pytest.raises(ConfigError):
            Batch(**values)


@pytest.mark.parametrize("mode", ["component-offload", "layerwise-offload", "snapshot-offload", "resident"])
def test_an_offload_that_no_stage_declares_is_refused(mode):
    args = LAYERS.with_values(residency={"other": mode})
    pipeline = pipeline_of({"net": Net(), "other": Net()}, {"a": calls()}, args)
    if mode == "resident":
        pipeline(Batch())
        return
    with pytest.raises(ConfigError, match=f"'other' to be {mode}, but no stage has a ComponentUse"):
        pipeline(Batch())


def test_parallelism_may_follow_from_the_batch():
    asked = []

    class Chooses(Uses):
        def parallelism_for(self, batch):
            asked.append(batch)
            return StageParallelism.MAIN_RANK_ONLY

    batch, group = Batch(), [Batch(), Batch()]
    pipeline = pipeline_of({}, {"a": Chooses(lambda stage, batch: None)})
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        pipeline.executor = ParallelExecutor()
        pipeline(batch)
        pipeline.run_grouped(group)
    finally:
        torch.distributed.destroy_process_group()
    assert [type(a) for a in asked] == [Batch, list]
