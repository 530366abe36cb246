"""Real captures made here and now: Nsight Systems and fxnvtx's own recorder saw the same run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fxnvtx.report import Report, load

from ..support.limits import CHILD_S
from ..support.nsys import with_capture

pytestmark = [pytest.mark.nsys, pytest.mark.slow]
SCRIPT = """
import sys, threading, time
import fxnvtx

def work(step):
    with fxnvtx.range("denoising_step", category="step", payload=step):
        for block in range(3):
            with fxnvtx.range(f"net.blocks.{block}"):
                with fxnvtx.range(f"net.blocks.{block}.attn"):
                    time.sleep(0.001)
    with fxnvtx.range("residency.load \\u00fcml\\u00e4ut", category="residency", payload=4096):
        pass

with fxnvtx.record() as recording:
    with fxnvtx.range("request#1", category="request"):
        other = threading.Thread(target=work, args=(7,))
        other.start()
        for step in range(3):
            work(step)
        other.join()
    left = fxnvtx.range("never closed")
    left.__enter__()
recording.save(sys.argv[1])
"""


@pytest.fixture(scope="module")
def nsys() -> str:
    found = shutil.which("nsys")
    if found is None:
        pytest.skip("Nsight Systems is not on the PATH")
    return found


def under_nsys(command: list[str], target: Path) -> subprocess.CompletedProcess[str]:
    def execute() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=CHILD_S, check=False)

    return with_capture(execute, target.with_name(f"{target.name}.sqlite"))


def capture(nsys: str, command: list[str], target: Path) -> None:
    words = [
        nsys, "profile", "--trace=nvtx", "--sample=none", "--cpuctxsw=none", "--export=sqlite", "-f", "true",
        "-o", str(target), *command,
    ]  # fmt: skip
    done = under_nsys(words, target)
    assert done.returncode == 0, done.stdout + done.stderr


def check_same(ours: Report, theirs: Report, only_under: str = "") -> None:
    """The same paths with the same counts and categories; times within what an NVTX call costs."""
    mine = {row.path: row for row in ours.rows()}
    other = {row.path: row for row in theirs.rows() if row.path[0].startswith(only_under)}
    assert set(mine) == set(other)
    close = 0
    for path, row in mine.items():
        match = other[path]
        assert (row.calls, row.category, row.payload) == (match.calls, match.category, match.payload), path
        # nsys may close what is open when the process ends; the recorder stopped before
        close += bool(row.open) or abs(match.cpu - row.cpu) <= 0.1 * row.cpu + 300_000 * row.calls
    # a busy machine may stop the thread between the two clocks; not in one range of twenty
    assert close >= 0.95 * len(mine)


def test_nsys_and_the_recorder_tell_of_the_same_run(nsys: str, tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text(SCRIPT, encoding="utf-8")
    capture(nsys, [sys.executable, str(script), str(tmp_path / "recording.json")], tmp_path / "capture")
    recorded = load(tmp_path / "recording.json")
    rows = {row.path: row for row in recorded.rows()}
    assert rows["request#1", "denoising_step[2]", "net.blocks.1", "net.blocks.1.attn"].calls == 1
    assert rows[("denoising_step[7]",)].calls == 1, "the other thread's ranges lie in none of this one's"
    assert any("1 ranges were still open" in note for note in recorded.notes)
    check_same(recorded, load(tmp_path / "capture.sqlite"))
    check_same(recorded, load(tmp_path / "capture.nsys-rep"))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_profile_is_the_same_in_both(nsys: str, tmp_path: Path, compiled: bool) -> None:
    command = [sys.executable, "-m", "fxnvtx", "profile", "--nsys", "--steps", "2", "-o", str(tmp_path / "out")]
    done = under_nsys([*command, *(["--compile"] if compiled else [])], tmp_path / "out" / "capture")
    assert done.returncode == 0, done.stdout + done.stderr
    recorded, captured = load(tmp_path / "out" / "recording.json"), load(tmp_path / "out" / "capture.sqlite")
    names = {row.name for row in recorded.rows()}
    assert len(recorded.rows()) > 100
    assert any(name.startswith("fused(") for name in names) == compiled
    # what the warm-up request emits while it compiles lies outside of every request
    check_same(recorded, captured, only_under="request#")
