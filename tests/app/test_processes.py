"""`fxnvtx run` reaches every Python process of a program, and changes none of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from fxnvtx.recording import Recording
from fxnvtx.report import load

from ..support.limits import CHILD_S
from ..support.nsys import with_capture
from .test_cli import fxnvtx

NSYS = shutil.which("nsys") is not None

# Every process says on stdout what it did: "did KIND PID CALLS".
PROGRAM = """
import concurrent.futures, multiprocessing, os, subprocess, sys
import torch
from torch import nn

torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.act = nn.ReLU()
    def forward(self, x):
        return self.act(self.first(x))

def work(kind, times=1):
    net = Net()
    for _ in range(times):
        net(torch.ones(1, 4))
    os.write(1, f"did {kind} {os.getpid()} {times}\\n".encode())


def started(kind, barrier):
    work(kind)
    barrier.wait()

def nested(kind):
    work("executor")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(work, ("nested",))
        pool.close()
        pool.join()

def pool_of(kind, size):
    context = multiprocessing.get_context(kind)
    with context.Manager() as manager:
        barrier = manager.Barrier(size)
        with context.Pool(size) as pool:
            jobs = [pool.apply_async(started, (kind, barrier)) for _ in range(size)]
            for job in jobs:
                job.get(240)
            if kind == "spawn":  # else they are terminated
                pool.close()
                pool.join()

def rank():
    import torch.distributed as dist
    dist.init_process_group("gloo")
    work("rank" + os.environ["RANK"], 2)
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    what = sys.argv[1]
    if what == "rank":
        rank()
    elif what == "exit":
        work("subprocess", 3)
        os._exit(3)
    else:
        work("main")
        pool_of("spawn", 4)
        pool_of("forkserver", 2)
        pool_of("fork", 2)
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            executor.submit(nested, "executor").result(240)
        done = subprocess.run([sys.executable, __file__, "exit"])
        assert done.returncode == 3, done
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        subprocess.run([sys.executable, *torchrun, __file__, "rank"], check=True)
        sys.exit(7)
"""
KINDS = ["main"] + ["spawn"] * 4 + ["forkserver"] * 2 + ["fork"] * 2
KINDS += ["executor", "nested", "subprocess", "rank0", "rank1"]


@dataclass
class Ran:
    folder: Path
    code: int
    said: str
    complained: str
    calls: dict[int, int]  # by pid
    kinds: dict[str, list[int]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The program with all its processes, under nsys where there is one: a recording and a capture of the same run."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "program.py").write_text(PROGRAM)
    words = ["--nsys"] if NSYS else []
    left = folder / "out" / ("capture.sqlite" if NSYS else "recording.json")
    done = with_capture(lambda: fxnvtx(*words, "-o", "out", "program.py", "all", cwd=folder), left)
    calls: dict[int, int] = {}
    kinds: dict[str, list[int]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("did "):
            _, kind, pid, times = line.split()
            calls[int(pid)] = int(times)
            kinds.setdefault(kind, []).append(int(pid))
    return Ran(folder / "out", done.returncode, done.stdout, done.stderr, calls, kinds)


@pytest.mark.slow
def test_every_process_did_its_work_and_the_exit_code_is_the_programs(ran: Ran) -> None:
    assert ran.code == 7, ran.complained
    assert Counter({kind: len(pids) for kind, pids in ran.kinds.items()}) == Counter(KINDS), ran.complained


@pytest.mark.slow
def test_every_process_left_a_recording_of_its_own(ran: Ran) -> None:
    recordings = [Recording.load(path) for path in ran.folder.glob("recording*.json")]
    found = {recording.meta["pid"]: recording for recording in recordings}
    assert set(found) == set(ran.calls)
    for pid, recording in found.items():
        assert [r.label for r in recording.ranges] == ["Net", "first", "act"] * ran.calls[pid]
        assert [r.depth for r in recording.ranges] == [0, 1, 1] * ran.calls[pid]
        assert recording.balanced
        assert recording.meta["classes"]["first"] == "Linear"
    assert Recording.load(ran.folder / "recording.json").meta["pid"] == ran.kinds["main"][0]
    for rank in (0, 1):
        pid = ran.kinds[f"rank{rank}"][0]
        assert (ran.folder / f"recording.rank{rank}.pid{pid}.json").is_file()
        assert found[pid].meta["rank"] == rank
    allowed = {"recording", "trace", "capture"}
    assert {path.name.split(".")[0] for path in ran.folder.iterdir()} <= allowed, "nothing else is left behind"


@pytest.mark.slow
def test_a_report_reads_all_recordings_of_a_folder(ran: Ran, tmp_path: Path) -> None:
    """Also where a capture lies beside them that lost the ends of some processes."""
    report = load(ran.folder)
    assert {row.name: row.calls for row in report.rows("tree")}["Net"] == sum(ran.calls.values())
    assert not report.notes
    for path in ran.folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    rows = {row.name: row for row in load(tmp_path).rows("tree")}
    assert rows["Net"].calls == sum(ran.calls.values())
    done = fxnvtx("report", str(tmp_path), "--format", "csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "first" in done.stdout
    assert "Net" in ran.complained
    trace = json.loads((ran.folder / "trace.json").read_text())
    assert {event["pid"] for event in trace["traceEvents"]} >= set(ran.calls)


@pytest.mark.slow
@pytest.mark.nsys
@pytest.mark.skipif(not NSYS, reason="nsys is not on the PATH")
def test_one_capture_holds_the_ranges_of_all_processes(ran: Ran) -> None:
    with sqlite3.connect(ran.folder / "capture.sqlite") as file:
        rows = file.execute(
            "SELECT (e.globalTid >> 24) & 0xFFFFFF, coalesce(e.text, s.value) FROM NVTX_EVENTS e "
            "LEFT JOIN StringIds s ON s.id = e.textId WHERE e.eventType = 59 AND e.domainId IN "
            "(SELECT domainId FROM NVTX_EVENTS WHERE eventType = 75 AND text = 'fxnvtx') ORDER BY e.start"
        ).fetchall()
    seen: dict[int, list[str]] = {pid: [] for pid in ran.calls}
    for pid, text in rows:
        seen[pid].append(text)
    for kind, pids in ran.kinds.items():
        for pid in pids:
            made = ["Net", "first", "act"] * ran.calls[pid]
            if kind in ("fork", "forkserver", "subprocess"):
                # nsys sends what it has seen now and then: of a process that is terminated or leaves by os._exit it
                # may lose the end; then we are told
                assert seen[pid] == made[: len(seen[pid])], kind
                note = f"the capture has {len(seen[pid])} of the {len(made)} ranges of process {pid}"
                assert (note in ran.complained) == (len(seen[pid]) < len(made))
            else:
                assert seen[pid] == made, kind
                assert f"ranges of process {pid}" not in ran.complained


# ------------------------------------------------------------------------------------------------ nothing changes

LOOK = """
import os, signal, sys
print("path", sys.path)
print("argv", sys.argv, __name__, __file__)
print("modules", sorted(m for m in sys.modules if m not in ("site", "sitecustomize")))
print("site", "sitecustomize" in sys.modules)
names = [getattr(f, "__name__", type(f).__name__) for f in sys.meta_path]
print("finders", [name for name in names if name != "_AtTorch"])
print("signals", [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)])
print("stdin", sys.stdin.read())
sys.stderr.write("to stderr\\n")
if sys.argv[1:] == ["fail"]:
    raise ValueError("its own")
if sys.argv[1:] == ["term"]:
    os.kill(os.getpid(), signal.SIGTERM)
sys.exit(int(sys.argv[1]))
"""


def both(folder: Path, *words: str, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """A script by itself and under us, from the folder in which it lies."""
    clean = {k: v for k, v in os.environ.items() if k not in {"FXNVTX", "NVTX_INJECTION64_PATH"}}
    clean["PYTHONPATH"] = os.pathsep.join(str(Path(p).absolute()) for p in sys.path if p)
    options = ["-m", "fxnvtx", "--rows", "0"]
    return [
        subprocess.run(
            [sys.executable, *ours, *words],
            cwd=folder,
            env={**clean, **environment},
            input="given",
            capture_output=True,
            text=True,
            timeout=CHILD_S,
        )
        for ours in ([], options)
    ]


@pytest.mark.parametrize("end", ["0", "5", "fail", "term"])
def test_a_program_without_torch_cannot_tell_the_difference(tmp_path: Path, end: str) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    alone, ours = both(tmp_path, "look.py", end)
    assert ours.stdout == alone.stdout
    assert ours.returncode == alone.returncode == {"fail": 1, "term": -signal.SIGTERM}.get(end) or int(end) >= 0
    assert ours.stderr.startswith(alone.stderr)
    rest = ours.stderr.removeprefix(alone.stderr)
    assert rest.startswith("fxnvtx: nothing was instrumented: no process of the program imported torch")


CHILDREN = """
import multiprocessing, subprocess, sys

def loaded():
    return sorted(name for name in sys.modules if name not in ("site", "sitecustomize"))

if __name__ == "__main__":
    command = [sys.executable, "-c", "import sys; print(sorted(sys.modules)); print(sys.flags, sys.path)"]
    print(subprocess.run(command, capture_output=True, text=True).stdout.replace("'sitecustomize', ", ""))
    for kind in ("spawn", "forkserver", "fork"):
        with multiprocessing.get_context(kind).Pool(1) as pool:
            print(kind, pool.apply(loaded))
"""


def test_children_that_never_import_torch_import_nothing_else_either(tmp_path: Path) -> None:
    """What starting costs: the modules a child loads, which are the same ones."""
    (tmp_path / "children.py").write_text(CHILDREN)
    alone, ours = both(tmp_path, "children.py")
    assert alone.returncode == ours.returncode == 0, ours.stderr
    assert alone.stdout.count("'threading'") >= 2
    assert ours.stdout == alone.stdout


PICKLES = """
import copy, hashlib, io, pickle, sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
    def forward(self, x):
        return self.layer(x)
    def decode(self, x):
        return self.layer(x)

def digest(data):
    return len(data), hashlib.sha256(data).hexdigest()

torch.manual_seed(0)
net = Net()
x = torch.ones(1, 4)
for there in ("before a call", "after one"):
    file = io.BytesIO()
    torch.save(net, file)
    print(there, len(pickle.dumps(net)), digest(file.getvalue()))  # pickles hold addresses, files do not
    again = pickle.loads(pickle.dumps(net))
    print(torch.equal(again(x), net(x)), torch.equal(copy.deepcopy(net).decode(x), net.decode(x)))
print(pickle.loads(pickle.dumps(net.decode))(x).shape, Net.forward.__qualname__, Net.decode.__qualname__)
"""


def test_models_are_saved_to_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "pickles.py").write_text(PICKLES)
    alone, ours = both(tmp_path, "pickles.py")
    assert alone.returncode == ours.returncode == 0, ours.stderr
    assert "after one" in alone.stdout
    assert ours.stdout == alone.stdout


def test_a_module_and_a_command_run_like_a_script(tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    alone, ours = both(tmp_path, "-m", "look", "0")
    assert ours.stdout == alone.stdout
    command = tmp_path / "bin" / "look"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\n{LOOK}")
    command.chmod(0o755)
    done = fxnvtx("run", "look", "5", cwd=tmp_path, PATH=f"{command.parent}:{os.environ['PATH']}")
    assert done.returncode == 5
    assert f"argv ['{command}', '5'] __main__" in done.stdout
    (tmp_path / "look").mkdir()  # the command is meant all the same
    assert fxnvtx("run", "look", "4", cwd=tmp_path, PATH=f"{command.parent}:{os.environ['PATH']}").returncode == 4
    shell = tmp_path / "start"
    shell.write_text(f'#!/bin/sh\nexec {sys.executable} look.py "$@"\n')
    shell.chmod(0o755)
    for program in ("start", "./start", str(shell)):
        assert fxnvtx("run", program, "6", cwd=tmp_path).returncode == 6


def test_the_users_own_sitecustomize_runs_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text(
        "import sys\nif sys.orig_argv[1:2] == ['look.py']: print('mine', __name__, __file__)"
    )
    path = os.pathsep.join([str(own), *(str(Path(p).absolute()) for p in sys.path if p)])
    alone, ours = both(tmp_path, "look.py", "0", PYTHONPATH=path)
    assert "mine sitecustomize" in alone.stdout
    assert ours.stdout == alone.stdout
    (own / "sitecustomize.py").write_text("import this_is_not_there")
    alone, ours = both(tmp_path, "look.py", "0", PYTHONPATH=path)
    assert ours.stdout == alone.stdout
    assert "this_is_not_there" in alone.stderr
    assert "this_is_not_there" in ours.stderr


KILLED = """
import os, signal, subprocess, sys, torch
net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
def dies(module, args):
    os.kill(os.getpid(), signal.SIGKILL)
net(torch.ones(1, 4))
if sys.argv[1:]:
    net[1].register_forward_pre_hook(dies)
    net(torch.ones(1, 4))
print(subprocess.run([sys.executable, __file__, "die"]).returncode)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_costs_only_its_own_end(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    done = fxnvtx("run", "-o", "out", "killed.py", cwd=tmp_path)
    assert done.stdout.split() == ["-9"]
    main = Recording.load(tmp_path / "out" / "recording.json")
    assert [r.label for r in main.ranges] == ["Sequential", "0", "1"]
    (path,) = (tmp_path / "out").glob("recording.pid*.json")
    killed = Recording.load(path)
    assert [r.label for r in killed.ranges] == ["Sequential", "0", "1", "Sequential"]
    assert [r.end_ns is None for r in killed.ranges] == [False, False, False, True]
    assert f"process {killed.meta['pid']} ended within Sequential" in done.stderr


def test_signals_reach_the_program_and_a_launcher_that_dies_leaves_readable_recordings(tmp_path: Path) -> None:
    (tmp_path / "serve.py").write_text(
        "import os, sys, torch\n"
        "net = torch.nn.Linear(4, 4)\n"
        "net(torch.ones(1, 4))\n"
        "print(os.getpid(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    words = [sys.executable, "-m", "fxnvtx", "-o", "out", "serve.py"]
    first = subprocess.Popen(words, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    first.stdout.readline()
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=CHILD_S)
    assert first.returncode == -signal.SIGTERM
    assert [r.label for r in Recording.load(tmp_path / "out" / "recording.json").ranges] == ["Linear"]
    second = subprocess.Popen(words, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert second.stdout is not None
    second.stdout.readline()
    second.kill()
    second.wait(100)
    assert load(tmp_path / "out").rows("tree")[0].name == "Linear"
    assert second.stdin is not None
    second.stdin.close()  # ends the program, whose launcher is gone
    second.stdout.read()
