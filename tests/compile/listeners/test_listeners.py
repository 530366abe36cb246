"""Graphs, breaks, recompiles, frames, kernels and outputs do not depend on whether and since when somebody listens."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ...support import nvtx_tap

pytestmark = pytest.mark.slow

CELLS = "tests.compile.listeners.cells"
FOREIGN = {"FXNVTX", "NVTX_DISABLE", "NVTX_INJECTION64_PATH"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("listeners")

    def run(mode):
        """{cell: (what must be equal, labels)} of a process of its own."""
        environment = {k: v for k, v in os.environ.items() if k not in FOREIGN}
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        if mode == "tool":
            library = nvtx_tap.build(folder)
            if library is None:
                pytest.skip("no C compiler on the PATH to build the NVTX tool with")
            environment |= {"NVTX_INJECTION64_PATH": str(library), "NVTX_TAP_LOG": str(folder / "tap.log")}
        output = folder / f"{mode}.json"
        command = [sys.executable, "-m", CELLS, mode, str(output)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        if mode == "tool":
            stream = nvtx_tap.read(folder / "tap.log")
            assert stream.stray == 0
            assert stream.open == {}
            assert stream.pushed
        return json.loads(output.read_text())

    return run


@pytest.fixture(scope="module")
def plain(run):
    return {name: facts for name, (facts, _) in run("plain").items()}


def test_the_matrix_is_worth_its_name(plain):
    """Plain torch compiles nearly every cell into one graph: there is something to break."""
    whole = [facts for name, facts in plain.items() if name.endswith(" whole")]
    assert len(whole) >= 12
    assert all(len(facts["graphs"]) == 1 and not facts["error"] for facts in whole)
    assert not any(facts.get("error") for facts in plain.values())


@pytest.mark.parametrize("mode", ["silent", "recorder", "tool"])
def test_a_listener_changes_nothing(run, plain, mode):
    cells = run(mode)
    assert cells.keys() == plain.keys()
    differing = {}
    for name, (facts, _) in cells.items():
        fields = [f for f, value in plain[name].items() if facts.get(f) != value]
        if fields:
            differing[name] = {f: (plain[name][f], facts.get(f)) for f in fields if f != "results"} or fields
    assert differing == {}
    labels = cells["mixed inductor"][1]
    assert {"net", "net.layers.forward_hook", "net.layers.instance_forward", "net.layers.own_call"} <= set(labels)
    assert "net.layers.weight_norm" in labels
