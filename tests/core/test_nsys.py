"""Under the real Nsight Systems: the ranges in its SQLite are exactly the recorder's, in name, nesting and number."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import fxnvtx
from fxnvtx.recording import build_tree
from fxnvtx.report import load
from fxnvtx.report.capture import read_file
from fxnvtx.report.capture.recording import read_recording

from ..support.limits import CHILD_S
from ..support.nsys import with_capture
from .tasks_app import PROGRAM, one_by_one
from .tools import shape

pytestmark = [
    pytest.mark.nsys,
    pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys (NVIDIA Nsight Systems) is not on the PATH"),
]
APP = Path(__file__).with_name("nvtx_app.py")
PUSH_POP, START_END, CATEGORY, DOMAIN = 59, 60, 33, 75


def environment():
    return {k: v for k, v in os.environ.items() if k not in {"FXNVTX", "NVTX_DISABLE", "NVTX_INJECTION64_PATH"}}


def under_nsys(command, out):
    def execute():
        return subprocess.run(command, capture_output=True, text=True, timeout=CHILD_S, env=environment(), check=False)

    return with_capture(execute, Path(f"{out}.sqlite"))


def capture(folder, path):
    """(trees per thread in order of the threads' first range, domain id of ours, connection)"""
    out = folder / path
    command = [
        "nsys", "profile", "--trace=nvtx", "--sample=none", "--cpuctxsw=none", "--export=sqlite", "-f", "true",
        "-o", str(out), sys.executable, str(APP), path, "tool", str(folder / "stack.json"),
    ]  # fmt: skip
    done = under_nsys(command, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return sqlite3.connect(f"file:{out}.sqlite?mode=ro", uri=True)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    output = tmp_path_factory.mktemp("recorded") / "r.json"
    command = [sys.executable, str(APP), "hooks", "recorder", str(output)]
    subprocess.run(command, check=True, timeout=CHILD_S, env=environment())
    recording = fxnvtx.Recording.load(output)
    assert recording.ranges
    return recording


@pytest.fixture(scope="module", params=["hooks", "auto"])
def exported(request, tmp_path_factory):
    connection = capture(tmp_path_factory.mktemp("nsys"), request.param)
    yield connection
    connection.close()


def domain_of(connection):
    rows = connection.execute(
        "select e.domainId, coalesce(e.text, s.value) from NVTX_EVENTS e left join StringIds s on s.id = e.textId "
        "where e.eventType = ?",
        (DOMAIN,),
    ).fetchall()
    return next(number for number, name in rows if name == "fxnvtx")


def test_names_nesting_and_number(exported, recorded):
    domain = domain_of(exported)
    rows = exported.execute(
        "select e.start, e.end, e.globalTid, coalesce(e.text, s.value) from NVTX_EVENTS e "
        "left join StringIds s on s.id = e.textId where e.eventType = ? and e.domainId = ? "
        "order by e.start, e.end desc",
        (PUSH_POP, domain),
    ).fetchall()
    assert all(end is not None for _, end, _, _ in rows)  # balanced
    threads: dict[int, list] = {}
    for row in rows:
        threads.setdefault(row[2], []).append(row)
    found = [nest(rows) for rows in threads.values()]
    wanted_threads = list(dict.fromkeys(r.thread_id for r in recorded.ranges))
    wanted = [shape(build_tree([r for r in recorded.ranges if r.thread_id == t])) for t in wanted_threads]
    assert len(rows) == len(recorded.ranges)
    assert found[0] == wanted[0]
    assert sorted(found[1:]) == sorted(wanted[1:])
    assert len(wanted) == 5


def nest(rows):
    """Rows of one thread by start to nested tuples."""
    roots: list = []
    stack: list = []
    for start, end, _, text in rows:
        while stack and stack[-1][0] <= start:
            stack.pop()
        node: tuple[str, list] = (text, [])
        (stack[-1][1][1] if stack else roots).append(node)
        stack.append((end, node))

    def freeze(nodes):
        return tuple((text, freeze(children)) for text, children in nodes)

    return freeze(roots)


def test_tasks_that_interleave(tmp_path):
    out = tmp_path / "tasks"
    command = [
        "nsys", "profile", "--trace=nvtx", "--sample=none", "--cpuctxsw=none", "--export=sqlite", "-f", "true",
        "-o", str(out), sys.executable, "-m", "tests.core.tasks_app", "alone", "-",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=CHILD_S,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with fxnvtx.record() as recording:
        asyncio.run(one_by_one(PROGRAM))
    with contextlib.closing(sqlite3.connect(f"file:{out}.sqlite?mode=ro", uri=True)) as connection:
        rows = connection.execute(
            "select e.eventType, e.end is null, coalesce(e.text, s.value) from NVTX_EVENTS e "
            "left join StringIds s on s.id = e.textId where e.eventType in (?, ?) and e.domainId = ?",
            (PUSH_POP, START_END, domain_of(connection)),
        ).fetchall()
    assert not any(is_open for _, is_open, _ in rows)
    for kind, crossing in ((PUSH_POP, False), (START_END, True)):
        wanted = sorted(r.label for r in recording.ranges if bool(r.crossing) == crossing)
        assert sorted(text for found, _, text in rows if found == kind) == wanted
    shown = [part_of(Path(f"{out}.sqlite")), read_recording(recording)]
    captured, kept = (Counter({n.name.text: n.calls for n in p.side.root.walk() if n.calls}) for p in shown)
    assert captured == kept
    captured, kept = (Counter({n.path(): n.calls for n in p.tree.root.walk() if n.calls}) for p in shown)
    assert captured == kept
    alone = [r for r in recording.ranges if r.label.startswith("alone")]
    assert len(alone) > 50
    assert sum(calls for path, calls in kept.items() if path[-1].text.startswith("alone")) == len(alone)


def part_of(capture):
    (part,) = read_file(capture)
    return part


def test_categories_have_their_names(exported):
    domain = domain_of(exported)
    rows = exported.execute(
        "select e.category, coalesce(e.text, s.value) from NVTX_EVENTS e left join StringIds s on s.id = e.textId "
        "where e.eventType = ? and e.domainId = ?",
        (CATEGORY, domain),
    ).fetchall()
    names = dict(rows)
    assert {"module", "step"} <= set(names.values())
    (category,) = exported.execute(
        "select distinct e.category from NVTX_EVENTS e left join StringIds s on s.id = e.textId "
        "where e.eventType = ? and e.domainId = ? and coalesce(e.text, s.value) = 'step {0}'",
        (PUSH_POP, domain),
    ).fetchone()
    assert names[category] == "step"


def test_labels_are_registered_strings_and_payloads_arrive(exported):
    """`--capture-range=nvtx` matches registered strings only."""
    domain = domain_of(exported)
    rows = exported.execute(
        "select e.textId, e.int64Value, e.doubleValue, s.value from NVTX_EVENTS e "
        "left join StringIds s on s.id = e.textId "
        "where e.eventType = ? and e.domainId = ?",
        (PUSH_POP, domain),
    ).fetchall()
    assert rows
    assert all(text_id is not None for text_id, *_ in rows)
    payloads = {text: (whole, real) for _, whole, real, text in rows}
    assert payloads["step {0}"][0] == 3
    assert payloads["ünïcode 層"][1] == 0.5


WORK = """
import sys
import torch
import fxnvtx

model, x = fxnvtx.instrument(torch.nn.Linear(4, 8), "net"), torch.rand(2, 4)
with torch.no_grad():
    with fxnvtx.record(work=True):
        model(x)
    with fxnvtx.range("captured"):
        model(x)
"""


LATER = ["--capture-range=nvtx", "--nvtx-capture=captured@fxnvtx", "--capture-range-end=stop"]


@pytest.mark.parametrize("window", [[], LATER], ids=["whole", "later"])
def test_work_is_in_the_capture_also_where_it_begins_later(window: list[str], tmp_path: Path) -> None:
    """Registered strings are kept from before a capture range."""
    out = tmp_path / "work"
    command = [
        "nsys", "profile", "--trace=nvtx", "--sample=none", "--cpuctxsw=none", "--export=sqlite", "-f", "true", *window,
        "-o", str(out), sys.executable, "-c", WORK,
    ]  # fmt: skip
    done = under_nsys(command, out)
    assert Path(f"{out}.sqlite").exists(), done.stdout + done.stderr
    (part,) = load(f"{out}.sqlite").parts
    assert [(entry.label, dict(entry.flops), entry.moved, entry.device) for entry in part.work] == [
        ("net", {"fp32": 2 * 2 * 4 * 8}, 4 * (8 + 32 + 8 + 16), "cpu")
    ]
