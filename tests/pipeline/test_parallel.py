"""Two and four gloo processes: every parallelism type, failures on any rank, ranges that carry their rank."""

import pytest
import torch

import fxnvtx
from fxnvtx.errors import PipelineError
from fxnvtx.models import generate
from fxnvtx.pipeline import Batch, ParallelExecutor, StageParallelism

from . import ranks

pytestmark = pytest.mark.slow
SCENARIOS = [
    "every_type",
    "failures",
    "inside",
    "loading",
    "unpicklable",
    "unreadable",
    "different",
    "images",
    "branches",
]


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    return ranks.spawn(request.param, SCENARIOS, tmp_path_factory.mktemp("ranks"))


def test_who_runs_a_stage_and_who_has_its_result(found):
    world = len(found)
    for rank, result in enumerate(found):
        kinds = result["every_type"]
        assert kinds["REPLICATED"]["ran_on"] == rank
        assert kinds["REPLICATED"]["given"] == rank
        assert kinds["MAIN_RANK_ONLY"]["ran_on"] == (0 if rank == 0 else None)
        sent = kinds["MAIN_RANK_ONLY_AND_SEND_TO_OTHERS"]
        assert (sent["ran_on"], sent["given"]) == (0, 0)
        assert sent["latent"] == found[0]["every_type"]["MAIN_RANK_ONLY"]["latent"]
        assert kinds["CFG_PARALLEL"]["ran_on"] == rank
        assert kinds["CFG_PARALLEL"]["given"] == 0
    own = [r["every_type"]["REPLICATED"]["latent"] for r in found]
    assert len({tuple(latent) for latent in own}) == world


def test_ranges_are_balanced_and_carry_their_rank(found):
    for rank, result in enumerate(found):
        for kind, seen in result["every_type"].items():
            assert seen["balanced"]
            assert seen["meta"] == rank
            assert seen["roots"] == [f"rank_{rank}"]
            assert seen["payloads"][f"rank_{rank}"] == seen["payloads"]["stage_s0"] == rank
            assert ("barrier" in seen["labels"]) == (kind == "MAIN_RANK_ONLY")
            assert ("broadcast" in seen["labels"]) == (kind == "MAIN_RANK_ONLY_AND_SEND_TO_OTHERS")
            assert ("broadcast_cfg" in seen["labels"]) == (kind == "CFG_PARALLEL")
            ran = rank == 0 or kind in ("REPLICATED", "CFG_PARALLEL")
            assert ("s0.net.0" in seen["labels"]) == ran
            assert seen["stages"] == (["Work"] if ran else [])


def test_a_failure_is_the_same_error_on_every_rank_within_seconds(found):
    names = {
        "told": ("ToldError", "out of luck"),
        "untold": ("PipelineError", "UntoldError: code 7: no more"),
        "stop": ("KeyboardInterrupt", "stop"),
    }
    cases = found[0]["failures"]
    assert {case.split()[0] for case in cases} == {kind.name for kind in StageParallelism}
    for result in found:
        assert result["failures"].keys() == cases.keys()
        for case, caught in result["failures"].items():
            assert (caught["type"], caught["text"]) == names[case.split()[2]], case
            assert caught["seconds"] < 10, case
            assert caught["balanced"], case
            assert caught["after"]["type"] is None, case


def test_a_rank_that_fails_while_the_others_wait_inside_the_stage(found):
    for result in found:
        assert result["inside"]["failed"] == {"type": "ToldError", "text": "failed before the gather"}
        assert result["inside"]["swallowed"] == result["inside"]["failed"]
        assert result["inside"]["then"]["type"] is None
        assert result["inside"]["after"] == [float(rank) for rank in range(len(found))]


def test_weights_that_cannot_be_put_away_on_one_rank(found):
    for result in found:
        assert result["loading"]["type"] == "OutputError"
        assert "/nowhere" in result["loading"]["text"]


def test_a_request_that_cannot_be_sent(found):
    for result in found:
        assert result["unpicklable"]["type"] == "PipelineError"
        assert "does not pickle" in result["unpicklable"]["text"]


def test_a_request_that_cannot_be_read(found):
    for result in found:
        assert result["unreadable"] == {"type": "ToldError", "text": "not here", "after": None}


def test_ranks_with_different_pipelines(found):
    for result in found:
        assert result["different"]["type"] == "PipelineError"
        assert "different things" in result["different"]["text"]


def test_shared_guidance_gives_the_same_image_to_the_bit(found):
    wanted = generate("a fox", 2, 0).flatten().tolist()
    for rank, result in enumerate(found):
        seen = result["images"]
        assert seen["image"] == wanted
        assert seen["grouped"][0] == wanted
        assert seen["grouped"][1] != wanted
        assert seen["balanced"]
        assert seen["rank"] == rank
        mine, theirs = ("conditional", "unconditional") if rank % 2 == 0 else ("unconditional", "conditional")
        assert seen["labels"].count(f"predict_noise.{mine}") == 2
        assert f"predict_noise.{theirs}" not in seen["labels"]
        assert seen["labels"].count("gather_cfg") == 2


def test_three_passes_on_any_number_of_ranks(found):
    """An unguided step has the first pass alone, on every rank; a guided one has each pass on some rank."""
    pipeline = ranks.branches_pipeline()
    with fxnvtx.record() as recording:
        wanted = pipeline(Batch(prompt="a fox", steps=3)).image.flatten().tolist()
    guided = ["predict_noise.conditional", "predict_noise.unconditional", "predict_noise.again"]
    alone = [r.label for r in recording.ranges if r.label.startswith("predict_noise.")]
    assert alone == guided * 2 + guided[:1]
    assert [r.payload for r in recording.ranges if r.label == "predict_noise"] == [3, 3, 1]
    world = len(found)
    for rank, result in enumerate(found):
        assert result["branches"]["image"] == wanted
        mine = [guided[(first + rank) % 3] for first in range(0, 3, world)]
        assert result["branches"]["passes"] == mine * 2 + guided[:1]


def test_guidance_groups_smaller_than_the_world(tmp_path):
    found = ranks.spawn(4, ["images"], tmp_path, cfg_size=2)
    wanted = generate("a fox", 2, 0).flatten().tolist()
    assert [r["images"]["image"] == wanted for r in found] == [True] * 4


def test_a_rank_that_went_away(tmp_path):
    (survivor,) = ranks.spawn(2, ["lost"], tmp_path)
    assert survivor["lost"]["type"] == "PipelineError"
    assert "start all ranks again" in survivor["lost"]["text"]
    assert survivor["lost"]["seconds"] < 10


def test_without_torch_distributed():
    assert not torch.distributed.is_initialized()
    with pytest.raises(PipelineError, match="init_process_group"):
        ParallelExecutor()
