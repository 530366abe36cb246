"""What really arrives at an NVTX tool is what the recorder shows: same ranges, same nesting, balanced on every thread.

The tool is a small injection library of our own (support/nvtx_tap.c), so the path that serves NVTX alone is tested
too, which never runs while a recorder listens.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fxnvtx

from ..support import nvtx_tap
from ..support.limits import CHILD_S
from .tools import in_process, shape

APP = Path(__file__).with_name("nvtx_app.py")


@pytest.fixture(scope="module")
def tap(tmp_path_factory):
    library = nvtx_tap.build(tmp_path_factory.mktemp("tap"))
    if library is None:
        pytest.skip("no C compiler on the PATH to build the NVTX tool with")
    return library


def run_app(path, listener, output, **environment):
    full = {k: v for k, v in os.environ.items() if k not in {"FXNVTX", "NVTX_DISABLE", "NVTX_INJECTION64_PATH"}}
    done = subprocess.run(
        [sys.executable, str(APP), path, listener, str(output)],
        env={**full, **environment},
        capture_output=True,
        text=True,
        timeout=CHILD_S,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The recorder's trees of the first thread and of the others."""
    output = tmp_path_factory.mktemp("recorded") / "r.json"
    run_app("hooks", "recorder", output)
    recording = fxnvtx.Recording.load(output)
    main = recording.ranges[0].thread_id
    first = [r for r in recording.ranges if r.thread_id == main]
    others = {r.thread_id for r in recording.ranges} - {main}
    from fxnvtx.recording import build_tree

    trees = [shape(build_tree([r for r in recording.ranges if r.thread_id == t])) for t in sorted(others)]
    return shape(build_tree(first)), trees


@pytest.fixture(scope="module")
def streams(tap, tmp_path_factory):
    """What arrived at the tool, by (path, whether a recorder listened as well)."""
    folder = tmp_path_factory.mktemp("streams")
    found = {}
    for path, listener in (("hooks", "tool"), ("auto", "tool"), ("auto", "recorder")):
        log = folder / f"{path} {listener}"
        run_app(path, listener, folder / "out", NVTX_INJECTION64_PATH=str(tap), NVTX_TAP_LOG=str(log))
        found[path, listener] = nvtx_tap.read(log)
    return found


@pytest.mark.parametrize("which", [("hooks", "tool"), ("auto", "tool"), ("auto", "recorder")])
def test_a_tool_sees_the_recorders_tree(streams, recorded, which):
    stream = streams[which]
    assert stream.open == {}
    assert stream.stray == 0
    first, others = recorded
    trees = [nvtx_tap.nested(tree) for tree in stream.trees.values() if tree]
    assert trees[0] == first
    assert trees[1:] == others
    assert len(others) == 4
    shared = [text for text, *_ in stream.pushed if text.endswith(".shared")]
    assert {text.split(".")[2] for text in shared} == {"0", "1", "2"}  # a tied module by each of its paths


def test_domain_categories_payloads_and_registered_strings(streams):
    stream = streams["auto", "tool"]
    pushed = {text: (category, payload, registered) for text, category, payload, registered in stream.pushed}
    assert pushed["step {0}"] == ("step", "3", True)
    assert pushed["ünïcode 層"] == ("module", "0.5", True)
    assert pushed["dit.blocks.0.norm"] == ("module", "-", True)
    assert pushed["huge"][1] == pushed["words"][1] == "-"  # NVTX has no place for these; recordings have
    assert all(registered for *_, registered in stream.pushed)


@pytest.mark.parametrize("setting", [{"FXNVTX": "off"}, {"NVTX_DISABLE": "1"}])
def test_switched_off_nothing_arrives_though_a_tool_listens(tap, tmp_path, setting):
    log = tmp_path / "log"
    script = """
        import fxnvtx, torch
        model = fxnvtx.instrument(torch.nn.Sequential(torch.nn.Linear(2, 2)))
        assert not fxnvtx.ranges.listening()
        with fxnvtx.range("r"):
            model(torch.zeros(1, 2))
        assert "_compiled_call_impl" not in model.__dict__
    """
    done = in_process(script, NVTX_INJECTION64_PATH=str(tap), NVTX_TAP_LOG=str(log), **setting)
    assert done.returncode == 0, done.stderr
    assert not log.exists() or nvtx_tap.read(log).pushed == []


def test_shape_markers_arrive_inside_their_range(tap, tmp_path):
    log = tmp_path / "log"
    script = """
        import fxnvtx, torch
        model = fxnvtx.instrument(torch.nn.Sequential(torch.nn.Linear(2, 3)), "m", shapes=True)
        model(torch.zeros(4, 2))
    """
    done = in_process(script, NVTX_INJECTION64_PATH=str(tap), NVTX_TAP_LOG=str(log))
    assert done.returncode == 0, done.stderr
    kinds = [
        (line[0], bytes.fromhex(line.split(" ")[-1].rstrip(".")).decode() if line[0] in "PM" else "")
        for line in log.read_text().splitlines()
        if line[0] in "PMO"
    ]
    assert kinds == [("P", "m"), ("M", "m in=[[4, 2]]"), ("P", "m.0"), ("M", "m.0 in=[[4, 2]]"), ("O", ""), ("O", "")]
