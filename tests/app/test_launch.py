"""`python -m fxnvtx script.py`: no line in the script, the same output, and ranges."""

from __future__ import annotations

from pathlib import Path

from fxnvtx.recording import Recording

from .test_cli import fxnvtx, one_line_error

SCRIPT = """
import sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    def forward(self, x):
        return self.second(self.first(x))

torch.manual_seed(0)
net = Net()
if "--compile" in sys.argv:
    net = torch.compile(net, backend="eager")
if "--inductor" in sys.argv:
    net = torch.compile(net)
print("arguments", sys.argv[1:])
print("answer", net(torch.ones(8, 16)).sum().item())
if "--fail" in sys.argv:
    raise ValueError("the script's own error")
if "--exit" in sys.argv:
    sys.exit(7)
"""


def script(folder: Path) -> Path:
    path = folder / "script.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_runs_as_ever_and_its_models_show(tmp_path: Path) -> None:
    script(tmp_path)
    done = fxnvtx("run", "-o", "out", "script.py", "--compile-not", "x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "arguments ['--compile-not', 'x']" in done.stdout
    labels = [r.label for r in Recording.load(tmp_path / "out" / "recording.json").ranges]
    assert labels == ["Net", "first", "second", "second.0", "second.1"]
    assert "second.0" in done.stderr, "a Linear and a ReLU are not folded into one row"


def test_the_script_need_not_be_named_as_a_command(tmp_path: Path) -> None:
    script(tmp_path)
    assert "answer" in fxnvtx("script.py", cwd=tmp_path).stdout


def test_a_model_that_the_script_compiles_shows_its_root(tmp_path: Path) -> None:
    script(tmp_path)
    done = fxnvtx("run", "-o", "out", "script.py", "--compile", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    labels = [r.label for r in Recording.load(tmp_path / "out" / "recording.json").ranges]
    assert labels == ["Net"]


def test_what_the_script_compiles_with_inductor_shows_its_layers(tmp_path: Path) -> None:
    script(tmp_path)
    done = fxnvtx("run", "-o", "out", "script.py", "--inductor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    labels = [r.label for r in Recording.load(tmp_path / "out" / "recording.json").ranges]
    assert labels.count("Net") == 1
    assert {"first", "second.0"} <= set(labels)


def test_errors_and_exit_codes_of_the_script_are_its_own(tmp_path: Path) -> None:
    script(tmp_path)
    failed = fxnvtx("run", "-o", "out", "script.py", "--fail", cwd=tmp_path)
    assert failed.returncode == 1
    assert "ValueError: the script's own error" in failed.stderr
    assert Recording.load(tmp_path / "out" / "recording.json").balanced
    assert fxnvtx("run", "script.py", "--exit", cwd=tmp_path).returncode == 7


def test_a_missing_script_is_one_line(tmp_path: Path) -> None:
    assert "no file" in one_line_error(fxnvtx("run", "missing.py", cwd=tmp_path))
