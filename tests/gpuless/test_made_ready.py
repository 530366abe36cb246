"""What tests/gpu stands on, as far as it can be tried without a device."""

from __future__ import annotations

import json
import zipfile
from importlib.metadata import version

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fxnvtx

from ..gpu.elsewhere import ROOT, name_of, requirements, unpack_missing
from ..gpu.witness import launches_of


def test_the_devices_witness_reads_a_trace(tmp_path):
    """A real session's trace; of each matrix product a launch is made that led to a kernel and to a memset."""
    model = fxnvtx.instrument(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), "net", path="hooks")
    with profile(activities=[ProfilerActivity.CPU]) as session:
        model(torch.ones(2, 3))
        torch.mm(torch.ones(2, 3), torch.ones(3, 2))
    path = tmp_path / "trace.json"
    session.export_chrome_trace(str(path))
    trace = json.loads(path.read_text())
    events = trace["traceEvents"]
    products = [e for e in events if e.get("cat") == "cpu_op" and e["name"] in ("aten::addmm", "aten::mm")]
    assert len(products) == 3
    for number, event in enumerate(products):
        for category, name in (("kernel", "gemm"), ("gpu_memset", "Memset (Device)")):
            given = {"correlation": 10 * number + len(name)}
            at = {"ts": event["ts"], "dur": event["dur"] / 2, "pid": event["pid"], "tid": event["tid"], "args": given}
            call = "cudaLaunchKernel" if category == "kernel" else "cudaMemsetAsync"
            events.append({"ph": "X", "cat": "cuda_runtime", "name": call, **at})
            events.append({**at, "ph": "X", "cat": category, "name": name, "ts": 1e12, "tid": 7, "pid": 0})
    found = launches_of(trace)
    assert [launch.work for launch in found].count("gemm") == 3
    assert [launch.labels for launch in found[::2]] == [("net", "net.0"), ("net", "net.1"), ()]
    assert [launch.labels for launch in found[1::2]] == [launch.labels for launch in found[::2]]


def test_what_is_carried_is_what_is_declared():
    wanted = {name_of(line) for line in requirements((ROOT / "setup.cfg").read_text())}
    assert {"nvtx", "numpy", "click", "rich", "pytest", "hypothesis", "pytest-timeout"} <= wanted
    assert wanted.isdisjoint({"torch", "nbclient", "matplotlib"})


def test_only_what_is_missing_is_unpacked(tmp_path):
    for name, number in (("nowhere_installed", "1.0"), ("pytest", version("pytest"))):
        with zipfile.ZipFile(tmp_path / f"{name}-{number}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "ANSWER = 42\n")
    assert unpack_missing(tmp_path, tmp_path / "packages") == ["nowhere-installed"]
    assert [p.name for p in (tmp_path / "packages").iterdir()] == ["nowhere_installed.py"]
