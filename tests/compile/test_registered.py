"""backend="fxnvtx" without installed metadata: from a source tree, and from a zip."""

from __future__ import annotations

import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import fxnvtx
from fxnvtx import compile as registered
from fxnvtx.compile.backend import fxnvtx_backend
from fxnvtx.modules import registry as control

PACKAGE = Path(fxnvtx.__file__).parent

SCRIPT = """
import sys
from importlib import metadata
real = metadata.entry_points
metadata.entry_points = lambda **asked: real(**asked) if asked.get("group") != "torch_dynamo_backends" else real(
    group="no such group"
)
if "dynamo first" in sys.argv:
    import torch._dynamo
import fxnvtx
assert ("zip" in sys.argv) == (".zip" in fxnvtx.__file__), fxnvtx.__file__
import torch
model = fxnvtx.instrument(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU()), "net")
call = torch.compile(model, backend="fxnvtx")
with torch.no_grad(), fxnvtx.record() as recording:
    call(torch.ones(2, 3))
print(sorted({r.label for r in recording.ranges if r.category == "module"}))
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("zip") / "fxnvtx.zip"
    with zipfile.ZipFile(path, "w") as made:
        for file in PACKAGE.rglob("*.py"):
            made.write(file, file.relative_to(PACKAGE.parent))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("order", ["fxnvtx first", "dynamo first"])
@pytest.mark.parametrize("form", ["folder", "zip"])
def test_the_name_is_known(form, order, archive, tmp_path):
    place = archive if form == "zip" else PACKAGE.parent
    environment = {**os.environ, "PYTHONPATH": str(place), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, form, order]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "['net', 'net.0', 'net.1']", done.stdout + done.stderr
    assert "is not shown" not in done.stderr


def test_it_is_the_same_backend_by_name_and_listed_once():
    assert torch._dynamo.list_backends().count("fxnvtx") == 1
    assert torch._dynamo.lookup_backend("fxnvtx") == fxnvtx_backend
    began, before_slots = torch.autograd.profiler._run_on_profiler_start, list(control.before_slots)
    registered.register()  # again: nothing happens
    assert torch._dynamo.lookup_backend("fxnvtx") is fxnvtx_backend
    assert torch.autograd.profiler._run_on_profiler_start is began
    assert control.before_slots == before_slots


def test_a_torch_that_keeps_its_backends_elsewhere_gets_ours_all_the_same():
    seen = {}
    stand_in: Any = types.SimpleNamespace(register_backend=lambda backend, name: seen.update({name: backend}))
    registered._add(stand_in)
    assert seen == {"fxnvtx": fxnvtx_backend}
