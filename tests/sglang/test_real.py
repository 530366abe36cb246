"""The real SGLang-Diffusion, its own server and worker processes, a tiny model with random weights, no GPU.

About 25 s a run and 60 s a compiled one; with an environment (see conftest.py) all of it takes some five minutes.
"""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fxnvtx.recording import Recording

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
FLAG = "enable_layerwise_nvtx_marker=true"
RECORD = {"FXNVTX_SGLANG_RECORD": "FOLDER"}
# SGLang's own tests of what the plugin takes the place of
UNIT_TESTS = (
    "test_nvtx_pytorch_hooks.py",
    "test_pipeline_stage_profiling.py",
    "test_component_residency.py",
    "test_component_residency_report.py",
    "test_pipeline_executor.py",
    "test_pipeline_residency_manager_install.py",
)
COMPILE = ("enable_torch_compile=true", "offload_during_compile=false")


def recordings(run):
    """Those of the run's requests, in order."""
    found = sorted(run.folder.glob("request*.json"), key=lambda f: int(re.findall(r"\d+", f.name)[0]))
    return [Recording.load(f) for f in found]


def paths(ranges):
    """(labels from the outermost range to this one) of every range."""
    found = []
    above: list[str] = []
    for r in ranges:
        del above[r.depth :]
        above.append(r.label)
        found.append(tuple(above))
    return found


def last_names(texts):
    """How often each name without the modules above it."""
    found: Counter[tuple[str, str]] = Counter()
    for text, count in texts.items():
        name, _, shapes = text.partition(" in=")
        found[name.rpartition(".")[2], shapes] += count
    return found


def nodes(recording):
    return [n for root in recording.tree() for n in root.walk()]


@pytest.fixture(scope="module")
def plain(run_sglang):
    """Without the flag; the plugin is there."""
    return run_sglang("plain", requests=2, env=RECORD)


def under_nsys():
    """What to put before a command so that a capture lies in its folder; nothing where there is no nsys."""
    nsys = shutil.which("nsys")
    flags = ["--trace=nvtx", "--sample=none", "--cpuctxsw=none", "--export=sqlite", "-f", "true", "-o", "FOLDER/n"]
    return () if nsys is None else (nsys, "profile", *flags)


@pytest.fixture(scope="module")
def eager(run_sglang):
    return run_sglang("eager", FLAG, requests=2, env=RECORD, around=under_nsys())


@pytest.fixture(scope="module")
def compiled(run_sglang):
    return run_sglang("compiled", *COMPILE, FLAG, env=RECORD, around=under_nsys())


def test_the_frames_are_equal_to_the_bit_and_nothing_shows_without_the_flag(plain, eager):
    assert eager.frames == plain.frames
    assert len(set(plain.frames)) == 2
    assert not recordings(plain)
    assert "fxnvtx" not in re.sub(r"\S*fxnvtx\S*/", "", plain.output).replace("plugin fxnvtx", "").replace(
        "plugin: fxnvtx", ""
    )


def test_every_label_of_sglangs_own_is_there(run_sglang, eager):
    """Its markers are names with shapes; ours are the names, with the shapes in a marker inside."""
    own = run_sglang("own", FLAG, requests=2, env={"FXNVTX_SGLANG": "off", "OWN_MARKERS": "FOLDER"})
    assert own.frames == eager.frames
    texts = [line for file in own.folder.glob("*.txt") for line in file.read_text().splitlines()]
    wanted = Counter(texts)
    assert sum(wanted.values()) > 1000
    ours: Counter[Any] = Counter()
    names: Counter[Any] = Counter()
    for recording in recordings(eager):
        assert recording.balanced
        names.update(r.label for r in recording.ranges)
        ours.update(r.label for r in recording.ranges)
        ours.update(m.label for m in recording.marks)
    assert not [text for text in wanted if " in=[" not in text and text not in names]
    # SGLang calls a module that has several names by the first of them; here it goes by the way it is reached
    shared = {text.split(" in=")[0].rpartition(".")[2] for text in wanted - ours}
    assert shared <= {"nonlinearity", "rotary_emb", "act_fn"}
    assert not last_names(wanted) - last_names(ours)


def test_the_structure_of_a_request(eager):
    first, second = recordings(eager)
    for number, recording in enumerate((first, second)):
        (request,) = recording.tree()
        assert (request.label, request.category) == (f"request#{number}", "request")
        stages = [n for n in request.children if n.category == "stage"]
        assert [s.label for s in stages][-2:] == ["stage_denoising_stage", "stage_decoding_stage"]
        (loop,) = (n for n in request.walk() if n.category == "loop")
        assert [s.payload for s in loop.children if s.category == "step"] == [0, 1, 2]
        for step in loop.children:
            predict, scheduler = (n for n in step.children if n.category == "op")
            assert (predict.label, scheduler.label) == ("predict_noise", "scheduler_step")
            assert [p.label for p in predict.children] == ["predict_noise.conditional", "predict_noise.unconditional"]
            for guided in predict.children:
                (transformer,) = guided.children
                assert transformer.label == "denoising_stage.transformer"
                assert [n.label for n in transformer.children if ".layers." in n.label] == [
                    f"denoising_stage.transformer.layers.{n}" for n in (0, 1)
                ]
        decoding = stages[-1]
        roots = [n for n in decoding.children if n.category == "module"]
        assert {r.label for r in roots} == {"decoding_stage.vae"}
        assert all(any(n.label == "decoding_stage.vae.decoder" for n in r.walk()) for r in roots)
        moves = [(n.label, n.payload) for n in nodes(recording) if n.category == "residency"]
        # without a GPU SGLang keeps everything where it is
        assert {("residency.load transformer", 0), ("residency.load vae", 0)} <= set(moves)


@pytest.mark.nsys
@pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys (NVIDIA Nsight Systems) is not on the PATH")
@pytest.mark.parametrize(("name", "many"), [("eager", 2000), ("compiled", 300)])
def test_a_capture_has_the_same_ranges(name, many, request):
    run = request.getfixturevalue(name)
    with sqlite3.connect(f"file:{run.folder}/n.sqlite?mode=ro", uri=True) as connection:
        domain = connection.execute(
            "select domainId, globalTid >> 24 from NVTX_EVENTS where eventType = 75 and text = 'fxnvtx'"
        ).fetchall()
        rows = []
        for number, process in domain:
            rows += connection.execute(
                "select globalTid, start, end, coalesce(text, value) from NVTX_EVENTS "
                "left join StringIds on textId = id "
                "where eventType = 59 and domainId = ? and globalTid >> 24 = ? order by globalTid, start, -end",
                (number, process),
            ).fetchall()
    captured: Counter[tuple[str, ...]] = Counter()
    stack: list[tuple[int, int, str]] = []
    for thread, start, end, text in rows:
        while stack and (stack[-1][0] != thread or stack[-1][1] <= start):
            stack.pop()
        stack.append((thread, end, text))
        captured[tuple(entry[2] for entry in stack)] += 1
    wanted = Counter(path for recording in recordings(run) for path in paths(recording.ranges))
    assert sum(wanted.values()) > many
    if name == "compiled":  # what is compiled outside of requests is in no request's recording
        captured = Counter({path: n for path, n in captured.items() if path[0].startswith("request")})
    assert captured == wanted


def test_compiled_layers(run_sglang, compiled):
    without = run_sglang("compiled-plain", *COMPILE)
    assert compiled.frames == without.frames
    (recording,) = recordings(compiled)
    assert recording.balanced
    (request,) = recording.tree()
    passes = [n for n in request.walk() if n.label.startswith("predict_noise.")]
    assert [p.label for p in passes] == ["predict_noise.conditional", "predict_noise.unconditional"] * 3
    for guided in passes:
        labels = {n.label for n in guided.walk()}
        assert {f"denoising_stage.transformer.layers.{n}" for n in (0, 1)} <= labels
        assert any(re.match(r"denoising_stage\.transformer\.layers\.1\..*attention", text) for text in labels)
    (decoding,) = (n for n in request.walk() if n.label == "stage_decoding_stage")
    roots = [n for n in decoding.children if n.category == "module"]
    assert {r.label for r in roots} == {"decoding_stage.vae"}
    assert any(n.label.startswith("decoding_stage.vae.decoder") for r in roots for n in r.walk())


@pytest.mark.parametrize("mode", ["stages", "window"])
def test_stages_only_and_windows_of_steps(run_sglang, plain, mode):
    env = {"FXNVTX_SGLANG": "stages"} if mode == "stages" else {"FXNVTX_SGLANG_STEPS": "1", "FXNVTX_SGLANG_DEPTH": "1"}
    run = run_sglang(mode, FLAG, env={**RECORD, **env})
    assert run.frames == plain.frames[:1]
    (recording,) = recordings(run)
    steps = [n for n in nodes(recording) if n.category == "step"]
    assert len(steps) == 3
    shown = [sum(n.category == "module" for n in step.walk()) for step in steps]
    modules = {n.label for n in nodes(recording) if n.category == "module"}
    if mode == "stages":
        assert not modules
        assert "residency.load vae" in {n.label for n in nodes(recording)}
    else:
        assert shown[0] == shown[2] == 0
        assert shown[1] > 0
        assert "decoding_stage.vae" in modules
        assert "denoising_stage.transformer.layers.0" in modules
        assert not [m for m in modules if m.startswith("denoising_stage.transformer.layers.0.")]


def test_two_ranks(run_sglang, eager):
    """Sequence parallel, on gloo: a recording of each rank, with all layers. Some 30 s on two quiet cores."""
    run = run_sglang("ranks", FLAG, "num_gpus=2", "ulysses_degree=2", env=RECORD)
    trees = {}
    for file in run.folder.glob("request0-rank*.json"):
        recording = Recording.load(file)
        assert recording.balanced
        (root,) = recording.tree()
        assert root.payload == recording.meta["rank"]
        trees[root.label] = paths(recording.ranges)
    assert set(trees) == {"rank_0", "rank_1"}
    ranges = {rank: Counter(path[1:] for path in found) for rank, found in trees.items()}
    assert ranges["rank_0"] == ranges["rank_1"]
    for path in paths(recordings(eager)[0].ranges):
        if ".layers." in path[-1] or path[-1].startswith("denoising_step"):
            assert path in ranges["rank_0"]


@pytest.fixture(scope="module")
def own_tests(sglang_python):
    """The folder of SGLang's own unit tests."""
    where = [sglang_python, "-c", "import importlib.util as i; print(i.find_spec('sglang').origin)"]
    sglang = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()).parent
    if not (sglang / "multimodal_gen" / "test" / "unit").is_dir():
        pytest.skip("this SGLang comes without its tests")
    return sglang / "multimodal_gen" / "test" / "unit"


def outcome(python, plugin, files, folder):
    """(names of the tests that failed, how many passed) of SGLang's tests with one of active/ in the process."""
    here = Path(__file__).parent
    done = subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", "-p", plugin, "-q", "--tb=line", "-rf", *map(str, files)],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("FXNVTX", "NVTX", "PYTEST"))},
            "PYTHONPATH": os.pathsep.join([str(here / "active"), str(here.parents[1])]),
            "HF_HUB_OFFLINE": "1",
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    output = done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.findall(r"\b(\d+) passed", done.stdout)
    assert passed, output
    assert not re.search(r"\b\d+ errors?\b", done.stdout), output
    return set(re.findall(r"^FAILED \S+::(\w+)", done.stdout, re.MULTILINE)), int(passed[0])


def test_sglangs_own_tests_hold_with_the_plugin(sglang_python, own_tests, tmp_path):
    """All that want no CUDA device."""
    files = [own_tests / name for name in UNIT_TESTS]
    failed, passed = outcome(sglang_python, "plugin_active", files, tmp_path)
    assert not failed
    assert passed >= 91


def test_sglangs_own_tests_hold_for_our_pipeline(own_tests, tmp_path):
    """Through an adapter, without SGLang: 38 of 66. docs/servers.md has a reason for each of the others."""
    files = [shutil.copy(own_tests / name, tmp_path) for name in UNIT_TESTS[:3]]
    failed, passed = outcome(sys.executable, "pipeline_adapter", files, tmp_path)
    document = (Path(__file__).parents[2] / "docs" / "servers.md").read_text()
    explained = document.partition("### SGLang's own tests")[2].partition("### Trying it")[0]
    assert failed == set(re.findall(r"`(test_\w+)`", explained.partition("| test |")[2]))
    assert passed == 38
