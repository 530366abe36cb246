"""Real diffusers models with hooks, weight_norm and a LoRA, under the real Nsight Systems: graphs as without us."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ...support.nsys import with_capture

for package in ("diffusers", "accelerate", "triton"):
    pytest.importorskip(package, reason=f"{package} is not installed")
pytestmark = pytest.mark.slow

CHILD = "tests.compile.listeners.diffused"
FOREIGN = {"FXNVTX", "NVTX_DISABLE", "NVTX_INJECTION64_PATH"}
LAYERS = {
    "flux": ("flux.transformer_blocks.1.attn.to_q", "flux.single_transformer_blocks.0", "flux.proj_out"),
    "oobleck": ("oobleck.encoder.block.0.conv1", "oobleck.decoder.conv2"),
    "lora": ("lora.transformer_blocks.1.attn1.to_q.lora_A.default", "lora.transformer_blocks.0.attn1.to_q.base_layer"),
}
MODELS = ["flux", "oobleck"] + (["lora"] if importlib.util.find_spec("peft") else [])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffused")

    def run(mode, *before):
        """{model: (what must be equal, labels)} of a process of its own."""
        environment = {k: v for k, v in os.environ.items() if k not in FOREIGN}
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        output = folder / f"{mode}{len(before)}.json"
        command = [*before, sys.executable, "-m", CHILD, mode, str(output)]

        def execute():
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

        done = with_capture(execute, Path(f"{before[-1]}.sqlite")) if before else execute()
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(output.read_text())

    return run


@pytest.fixture(scope="module")
def plain(run):
    return {name: facts for name, (facts, _) in run("plain").items()}


def _differing(plain, found):
    return {name: [f for f in facts if facts[f] != plain[name][f]] for name, (facts, _) in found.items()}


def test_the_lora_is_among_them():
    pytest.importorskip("peft", reason="peft is not installed: no LoRA among the models")
    assert "lora" in MODELS


def test_there_is_something_to_break(plain):
    assert list(plain) == MODELS
    assert all(facts["counters"]["graphs"] >= 1 and len(facts["kernels"]) > 3 for facts in plain.values())
    assert plain["oobleck"]["counters"]["graphs"] == 1


@pytest.mark.parametrize("mode", ["silent", "recorder"])
def test_a_listener_from_the_first_line_changes_nothing(run, plain, mode):
    found = run(mode)
    assert _differing(plain, found) == {name: [] for name in MODELS}
    if mode == "recorder":
        missing = {name: set(LAYERS[name]) - set(labels) for name, (_, labels) in found.items()}
        assert not any(missing.values()), missing


@pytest.mark.nsys
@pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not on the PATH")
def test_graphs_under_nsight_systems_are_those_without_it(run, plain, tmp_path):
    out = tmp_path / "capture"
    options = ["--trace=nvtx", "--sample=none", "--cpuctxsw=none", "--export=sqlite", "-f", "true", "-o", str(out)]
    found = run("silent", "nsys", "profile", *options)
    assert _differing(plain, found) == {name: [] for name in MODELS}
    with sqlite3.connect(f"{out}.sqlite") as database:
        texts = {
            text
            for (text,) in database.execute(
                "select distinct coalesce(s.value, e.text) from NVTX_EVENTS e left join StringIds s on s.id = e.textId "
                "where e.eventType = 59 and e.end is not null"
            )
        }
    missing = {name: set(LAYERS[name]) - texts for name in MODELS}
    assert not any(missing.values()), missing
