"""`python -m fxnvtx script.py`: no line in the script, the same output, and ranges."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from fxnvtx import range_pop, range_push, ranges
from fxnvtx.__main__ import words
from fxnvtx.categories import Numbers
from fxnvtx.recording import Recording
from fxnvtx.recording.spool import Spool, Window, read_spool
from fxnvtx.report import from_recording, load

from ..support.limits import CHILD_S
from ..support.nsys import with_capture
from .test_cli import fxnvtx, one_line_error

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    def forward(self, x):
        return self.second(self.first(x))
"""

SCRIPT = (
    "\nimport sys"
    + NET
    + """
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
)


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
    work = Recording.load(tmp_path / "out" / "recording.json").meta["work"]
    multiplied = {entry[0]: entry[5] for entry in work if entry[5]}
    assert multiplied == {"first": {"fp32": 2 * 8 * 16 * 16}, "second.0": {"fp32": 2 * 8 * 16 * 16}}


COUNTED = (
    "\nimport multiprocessing"
    + NET
    + """
class Head(nn.Linear):
    pass

def calls(net, head):
    net(torch.ones(8, 16))
    head(torch.ones(8, 16))
    head(torch.ones(3, 16))

def work():
    calls(Net(), Head(16, 4))

if __name__ == "__main__":
    work()
    child = multiprocessing.get_context("spawn").Process(target=work)
    child.start()
    child.join()
"""
)

WITNESS = """
import fxnvtx
from program import Head, Net, calls

models = fxnvtx.instrument(Net()), fxnvtx.instrument(Head(16, 4))
with fxnvtx.record(work=True) as recording:
    calls(*models)
recording.save("expected.json")
"""


def test_recordings_carry_the_work_that_one_in_the_process_carries(tmp_path: Path) -> None:
    """Of each label and shape, in each process; and the report shows it."""
    (tmp_path / "program.py").write_text(COUNTED)
    (tmp_path / "witness.py").write_text(WITNESS)  # a process of its own: what was compiled in this one matters
    subprocess.run([sys.executable, "witness.py"], cwd=tmp_path, check=True, timeout=CHILD_S)
    expected = Recording.load(tmp_path / "expected.json")
    done = fxnvtx("run", "--work", "-o", "out", "program.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    paths = sorted((tmp_path / "out").glob("recording*.json"))
    assert len(paths) == 2
    for path in paths:
        found = Recording.load(path)
        assert [r.label for r in found.ranges] == [r.label for r in expected.ranges]
        assert sorted(found.meta["work"], key=str) == sorted(expected.meta["work"], key=str)
        labels = [entry[0] for entry in found.meta["work"]]
        assert sorted(labels) == ["Head", "Head", "Net", "first", "second", "second.0", "second.1"]
    flops = {row.path: row.flops for row in from_recording(expected).rows()}
    assert flops["Net", "first"] == 2 * 8 * 16 * 16
    report = load(*paths)
    assert len(report.parts) == 2
    assert {row.path: row.flops for row in report.rows()} == {path: 2 * count for path, count in flops.items()}


def test_errors_and_exit_codes_of_the_script_are_its_own(tmp_path: Path) -> None:
    script(tmp_path)
    failed = fxnvtx("run", "-o", "out", "script.py", "--fail", cwd=tmp_path)
    assert failed.returncode == 1
    assert "ValueError: the script's own error" in failed.stderr
    assert Recording.load(tmp_path / "out" / "recording.json").balanced
    assert fxnvtx("run", "script.py", "--exit", cwd=tmp_path).returncode == 7


def test_a_missing_script_is_one_line(tmp_path: Path) -> None:
    assert "no file" in one_line_error(fxnvtx("run", "missing.py", cwd=tmp_path))


def test_what_an_earlier_run_left_and_cannot_be_removed_is_one_line(tmp_path: Path) -> None:
    script(tmp_path)
    (tmp_path / "out" / "recording.json").mkdir(parents=True)
    done = fxnvtx("run", "-o", "out", "script.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "cannot remove" in one_line_error(done)
    assert "choose another with -o" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["recording.json"]


@pytest.mark.parametrize("nsys", [[], ["--nsys"]])
def test_a_folder_that_cannot_be_written_is_one_line_before_the_program_starts(tmp_path: Path, nsys: list[str]) -> None:
    (tmp_path / "program.py").write_text("open('started', 'w').close()")
    (tmp_path / "file").write_text("")
    done = fxnvtx("run", *nsys, "-o", "file/inside", "program.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "cannot write to file/inside" in one_line_error(done)
    assert not (tmp_path / "started").exists()


def test_an_option_may_stand_where_the_command_would() -> None:
    assert words(["--depth", "1", "x.py"]) == ["run", "--depth", "1", "x.py"]
    assert words(["-m", "pytest", "-q"]) == ["run", "-m", "pytest", "-q"]
    assert words(["a/b", "--help"]) == ["run", "a/b", "--help"]
    for own in (["report", "x.py"], ["--help"], ["--debug", "run", "x.py"], ["--version"], ["nonsense"]):
        assert words(own) == own
    assert words([]) == []


TRACED = """
import threading, torch
from torch import nn

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
    def forward(self, x):
        return self.layer(x)
    def decode(self, x):
        return self.layer(x)

class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()
    def forward(self, x):
        try:
            return self.inner(x)
        except RuntimeError as error:
            raise ValueError("wrapped") from error

x = torch.ones(1, 3)
model = Outer()
thread = threading.Thread(target=model.inner.decode, args=(x,), name="other")
thread.start()
thread.join()
model(x)
"""


def test_the_programs_traceback_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "traced.py").write_text(TRACED)
    alone = subprocess.run([sys.executable, "traced.py"], cwd=tmp_path, capture_output=True, text=True, timeout=CHILD_S)
    ours = fxnvtx("--rows", "0", "traced.py", cwd=tmp_path)
    assert ours.returncode == alone.returncode == 1
    assert "ValueError: wrapped" in alone.stderr
    assert "Exception in thread other" in alone.stderr
    # how torch gets from a module to its forward depends on what lies in the slot's place
    frame = re.compile(r'File "(?!.*/torch/)(.+)", line \d+, in (.+)')
    assert frame.findall(ours.stderr) == frame.findall(alone.stderr)
    assert ("traced.py", "forward") in [(Path(file).name, function) for file, function in frame.findall(ours.stderr)]
    errors = re.compile(r"^\S.*$", re.MULTILINE)
    assert errors.findall(ours.stderr) == errors.findall(alone.stderr)


MODEL = """
import os, sys
import torch
def test_it():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    for _ in range(int(os.environ.get("CALLS", 1))):
        net(torch.ones(1, 4))
if __name__ == "__main__":
    sys.stdout.write(f"argv {sys.argv[1:]}\\n")  # in one piece: several ranks write at once
    test_it()
"""


def recorded(folder: Path) -> list[str]:
    """The labels of all recordings in a folder."""
    return [r.label for path in folder.glob("recording*.json") for r in Recording.load(path).ranges]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("pytest", ["-q", "-p", "no:cacheprovider"]),
        ("torch.distributed.run", ["--standalone", "--nproc-per-node=1"]),
        ("accelerate.commands.launch", ["--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]),
    ],
)
def test_modules_that_start_programs(tmp_path: Path, program: str, options: list[str]) -> None:
    if program.startswith("accelerate"):
        pytest.importorskip("accelerate", reason="needs accelerate: pip install fxnvtx[diffusers]")
    (tmp_path / "model.py").write_text(MODEL)
    given = ["model.py"] if program == "pytest" else ["model.py", "--depth", "3"]
    done = fxnvtx("-o", "out", "-m", program, *options, *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("1 passed" if program == "pytest" else "argv ['--depth', '3']") in done.stdout
    assert recorded(tmp_path / "out") == ["Sequential", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "options", "processes"),
    [
        ("torchrun", ["--standalone", "--nproc-per-node=2"], 2),
        ("accelerate", ["launch", "--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"], 1),
    ],
)
def test_a_console_script_that_starts_others(tmp_path: Path, command: str, options: list[str], processes: int) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if shutil.which(command, path=path) is None:
        pytest.skip(f"{command} is not on the PATH: it comes with torch, or fxnvtx[diffusers]")
    (tmp_path / "model.py").write_text(MODEL)
    done = fxnvtx("run", "-o", "out", command, *options, "model.py", "--depth", "3", cwd=tmp_path, PATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("argv ['--depth', '3']") == processes
    assert recorded(tmp_path / "out") == ["Sequential", "0"] * processes
    if processes == 1:
        return
    assert {p.name.split(".")[1] for p in (tmp_path / "out").glob("recording.rank*")} == {"rank0", "rank1"}


CELLS = [
    "import torch\nnet = torch.nn.Sequential(torch.nn.Linear(4, 4))",
    "print(net(torch.ones(1, 4)).shape)",
    "net(torch.ones(1, 4)); print(__name__)",
]


@pytest.mark.slow
def test_the_kernel_of_a_notebook(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install 'fxnvtx[notebook]'")
    pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'fxnvtx[notebook]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install 'fxnvtx[notebook]'")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbformat.write(notebook, tmp_path / "cells.ipynb")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = ["run", "-o", "out", "jupyter-execute", "--inplace", "cells.ipynb"]
    done = fxnvtx(*words, cwd=tmp_path, PATH=path)
    assert done.returncode == 0, done.stderr
    ran = nbformat.read(tmp_path / "cells.ipynb", as_version=4)
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in ran.cells]
    assert printed == ["", "torch.Size([1, 4])\n", "__main__\n"]
    # the kernel is a process of its own, which imports torch in its first cell
    assert recorded(tmp_path / "out") == ["Sequential", "0"] * 2


@pytest.mark.slow
@pytest.mark.nsys
@pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not on the PATH")
def test_nsys_captures_one_range_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    words = ["--nsys", "-o", "out", "--capture-range", "Sequential"]
    done = with_capture(
        lambda: fxnvtx(*words, "model.py", cwd=tmp_path, CALLS="4"), tmp_path / "out" / "capture.sqlite"
    )
    assert done.returncode == 0, done.stderr
    assert recorded(tmp_path / "out") == ["Sequential", "0"] * 4
    with sqlite3.connect(tmp_path / "out" / "capture.sqlite") as file:
        query = "SELECT coalesce(e.text, s.value) FROM NVTX_EVENTS e LEFT JOIN StringIds s ON s.id = e.textId "
        seen = [text for (text,) in file.execute(query + "WHERE e.eventType = 59 ORDER BY e.start")]
    assert seen == ["Sequential", "0"]
    assert "the capture has" not in done.stderr


def test_under_torchrun_each_launcher_writes_its_own(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    for rank in ("0", "1"):
        assert fxnvtx("-o", "out", "--warmup", "1", "model.py", cwd=tmp_path, RANK=rank, CALLS="3").returncode == 0
    found = sorted(path.name.split(".pid")[0] for path in (tmp_path / "out").iterdir())
    assert found == ["recording.rank0", "recording.rank1", "trace.rank0.json", "trace.rank1.json"]
    assert recorded(tmp_path / "out") == ["Sequential", "0"] * 4


@pytest.mark.slow
@pytest.mark.nsys
@pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not on the PATH")
def test_nsys_hears_only_the_steps_asked_for(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    words = ["--nsys", "-o", "out", "--warmup", "1", "--steps", "2-3"]
    done = with_capture(
        lambda: fxnvtx(*words, "model.py", cwd=tmp_path, CALLS="6"), tmp_path / "out" / "capture.sqlite"
    )
    assert done.returncode == 0, done.stderr
    assert recorded(tmp_path / "out") == ["Sequential", "0"] * 2
    with sqlite3.connect(tmp_path / "out" / "capture.sqlite") as file:
        seen = file.execute("SELECT count(*) FROM NVTX_EVENTS WHERE eventType = 59").fetchone()
    assert seen == (4,)


PIPELINE = """
import sys
from fxnvtx.models.tiny_diffusers import TINY
pipe, arguments = TINY["DiTPipeline"]()
for _ in range(2):
    pipe(**dict(arguments, num_inference_steps=3, output_type="np"))
"""


@pytest.mark.slow
def test_stages_without_layers_and_some_steps_of_each_request(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install fxnvtx[diffusers]")
    (tmp_path / "pipeline.py").write_text(PIPELINE)
    done = fxnvtx("-o", "out", "--stages-only", "--steps", "1-2", "pipeline.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ranges_ = Recording.load(tmp_path / "out" / "recording.json").ranges
    assert not [r for r in ranges_ if r.category == "module"]
    steps = [r.label.split("_t")[0] for r in ranges_ if r.category == "step"]
    assert steps == ["denoising_step_1", "denoising_step_2"] * 2
    assert not [r for r in ranges_ if r.category in ("request", "loop")]


def test_nothing_shown_is_explained(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    for option, why in ((["--warmup", "9"], "leave out every call"), (["--stages-only"], "--stages-only shows")):
        done = fxnvtx(*option, "model.py", cwd=tmp_path)
        assert done.returncode == 0
        assert why in one_line_error(done)
    assert "FXNVTX=off" in one_line_error(fxnvtx("model.py", cwd=tmp_path, FXNVTX="off"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", "3-1"], "'3-1' is an empty range"),
        (["--steps", "x"], "'x' names no requests or steps"),
        (["--nsys"], "--nsys needs -o"),
        (["-o", "out", "--capture-range", "x"], "--capture-range is for --nsys"),
        (["--stages-only", "--work"], "--work counts what layers do"),
    ],
)
def test_options_that_mean_nothing_are_one_line(tmp_path: Path, options: list[str], says: str) -> None:
    (tmp_path / "empty.py").write_text("")
    done = fxnvtx(*options, "empty.py", cwd=tmp_path)
    assert done.returncode == 1
    assert says in one_line_error(done)


@pytest.mark.parametrize(
    ("warmup", "steps", "shown"),
    [
        (0, None, ["a", "a1", "b", "b1", "b2", "b3", "after"]),
        (1, None, ["b", "b1", "b2", "b3", "after"]),
        (0, "1", ["b2"]),
        (0, "0-1", ["a", "a1", "b1", "b2"]),
        (0, ":2", ["a", "a1", "b1", "b2"]),
        (0, "0,2:", ["a", "a1", "b1", "b3", "after"]),
        (1, "2", ["b3"]),
        (2, "0-9", ["after"]),
    ],
)
def test_a_window_shows_whole_ranges(tmp_path: Path, warmup: int, steps: str | None, shown: list[str]) -> None:
    spool = Spool(tmp_path, True, Window(warmup, None if steps is None else Numbers.read(steps)))
    ranges.add_sink(spool)
    try:
        range_push("a", category="module")
        range_push("a1", category="module")
        range_pop()
        range_pop()
        range_push("b", category="request")
        for number in (1, 2, 3):
            range_push(f"b{number}", category="step")
            range_pop()
        range_pop()
        range_push("after", category="module")
        range_pop()
    finally:
        ranges.remove_sink(spool)
        spool.write()
    (path,) = tmp_path.iterdir()
    recording = read_spool(path)
    assert [r.label for r in recording.ranges] == shown
    assert recording.balanced
