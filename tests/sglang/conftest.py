"""Tests with the real SGLang-Diffusion need an environment of their own.

FXNVTX_SGLANG_PYTHON: a Python that has SGLang-Diffusion (0.5.23) and this fxnvtx installed. FXNVTX_SGLANG_MODEL: a
small model of its; without it `models/Z-Image-Turbo` beside the environment's folder.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..support.limits import CHILD_S

HERE = Path(__file__).parent
ARGS = ("text_encoder_cpu_offload=false", "vae_cpu_offload=false", "dit_cpu_offload=false")


@dataclass
class Run:
    """One run of app.py."""

    frames: list[str]
    output: str
    folder: Path


@pytest.fixture(scope="session")
def sglang_python():
    """The Python of the environment; skips without one."""
    python = os.environ.get("FXNVTX_SGLANG_PYTHON")
    if not python:
        pytest.skip(
            os.environ.get("FXNVTX_SGLANG_MISSING", "FXNVTX_SGLANG_PYTHON names no Python with SGLang-Diffusion")
        )
    return python


@pytest.fixture(scope="session")
def run_sglang(sglang_python, tmp_path_factory):
    """run(name, *server arguments, requests=, env=, around=) -> Run."""
    python = sglang_python
    beside = Path(python).parents[2] / "models" / "Z-Image-Turbo"
    model = os.environ.get("FXNVTX_SGLANG_MODEL", str(beside))
    cache = tmp_path_factory.mktemp("inductor")

    def run(name, *words, requests=1, env=None, around=()):
        folder = tmp_path_factory.mktemp(name)
        given = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("FXNVTX", "NVTX"))},
            "PYTHONPATH": os.pathsep.join([str(HERE / "own_markers"), str(HERE.parents[1])]),
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(cache)),
            "SGLANG_TORCH_COMPILE_MODE": "default",
            **{k: v.replace("FOLDER", str(folder)) for k, v in (env or {}).items()},
        }
        command = [*(a.replace("FOLDER", str(folder)) for a in around), python, str(HERE / "app.py")]
        command += [model, str(requests), *ARGS, *words]
        done = subprocess.run(
            command, env=given, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CHILD_S
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0, output[-4000:]
        frames = [line for line in done.stdout.splitlines() if line.startswith("FRAMES")]
        assert len(frames) == requests, output[-4000:]
        return Run(frames, output, folder)

    return run
