"""Start/end ranges: those of a coroutine nest like push/pop where nothing else happened meanwhile, else they do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fxnvtx.categories import TASK_SWITCH
from fxnvtx.report import load
from fxnvtx.report.attribution.tasks import Switch, Task, apart
from fxnvtx.report.capture import read_file
from fxnvtx.report.part import Part
from fxnvtx.report.render.traces import write_speedscope as write

from .captures import Capture

START_END, MARK = 60, 34


def paths(part: Part, side: bool = False) -> dict[str, tuple[int, int]]:
    """path -> (calls, kernels in all) of the tree, or of what is beside it."""
    tree = part.side if side else part.tree
    return {
        " > ".join(name.text for name in node.path()): (node.calls, node.launches)
        for node in tree.root.walk()
        if node.calls
    }


def read(capture: Capture) -> Part:
    (part,) = read_file(capture.close())
    return part


def handler(path: Path, domain: str | None = "fxnvtx") -> Capture:
    """Two requests one after the other, each a coroutine, in one range around the loop."""
    capture = Capture(path, domain=domain)
    capture.range(0, 1000, "serve", "op")
    for number, at in enumerate((100, 500), 1):
        capture.range(at, at + 200, "request", "request", kind=START_END, number=number)
        capture.range(at + 10, at + 60, "model")
        capture.kernel(at + 30, at + 50, capture.call(at + 20, at + 25))
    return capture


def test_a_coroutine_alone_on_its_thread_keeps_its_tree(tmp_path: Path) -> None:
    part = read(handler(tmp_path / "a.sqlite"))
    assert paths(part) == {"serve": (1, 2), "serve > request": (2, 2), "serve > request > model": (2, 2)}
    assert not paths(part, side=True)
    assert not part.notes


def test_start_end_ranges_of_other_tools_stay_beside_the_tree(tmp_path: Path) -> None:
    part = read(handler(tmp_path / "a.sqlite", domain="mine"))
    assert paths(part) == {"serve": (1, 2), "serve > model": (2, 2)}
    assert {path: calls for path, (calls, _) in paths(part, side=True).items()} == {"request": 2}


def interleaved(path: Path) -> Capture:
    """A and B at once, in one gather(); in B a call of its own, while A waits."""
    capture = Capture(path)
    capture.range(0, 1000, "all", "op", kind=START_END, number=1)
    capture.range(100, 500, "A", kind=START_END, number=2)
    capture.range(150, 150, TASK_SWITCH, "op", kind=MARK, payload=1)
    capture.range(200, 700, "B", kind=START_END, number=3)
    capture.range(250, 300, "B.part", kind=START_END, number=4)
    capture.range(260, 280, "model")
    capture.range(400, 400, TASK_SWITCH, "op", kind=MARK, payload=2)
    capture.range(420, 440, "model")
    return capture


def test_tasks_at_once_stay_beside_it(tmp_path: Path) -> None:
    part = read(interleaved(tmp_path / "a.sqlite"))
    assert {*paths(part)} == {"all", "all > model"}
    assert sum(calls for calls, _ in paths(part, side=True).values()) == 3


def test_what_is_no_task_is_not_shown_inside_one(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "a.sqlite")
    capture.range(100, 500, "waits", kind=START_END, number=1)
    capture.range(150, 150, TASK_SWITCH, "op", kind=MARK, payload=0)
    capture.range(200, 300, "callback")
    part = read(capture)
    assert {*paths(part)} == {"callback"}
    assert {*paths(part, side=True)} == {"waits"}


def test_one_that_crosses_a_push_pop_range_does_not_nest(tmp_path: Path) -> None:
    for number, (start, end) in enumerate([(50, 150), (150, 250), (50, 350), (150, 160), (0, 1000)]):
        capture = Capture(tmp_path / f"{number}.sqlite")
        capture.range(100, 200, "first")
        capture.range(210, 300, "second")
        capture.range(start, end, "task", kind=START_END, number=1)
        nests = number in (2, 3, 4)
        assert bool(paths(read(capture), side=True)) != nests


def test_every_output_has_the_same_nesting(tmp_path: Path) -> None:
    import json

    for name, make, most in (("alone", handler, 3), ("at once", interleaved, 2)):
        source = make(tmp_path / f"{name}.sqlite").close()
        profile = json.loads(Path(write(source, tmp_path / f"{name}.json")).read_text())
        deepest = 0
        for track in profile["profiles"]:
            depth = 0
            for event in track["events"]:
                depth += 1 if event["type"] == "O" else -1
                deepest = max(deepest, depth)
        assert deepest == most
        assert load(source).rows()


@dataclass
class Thread:
    """A thread that tasks share, and what fxnvtx says of it."""

    ranges: list[list[Any]] = field(default_factory=list)  # [start, end, what it lies in]
    pushed: list[tuple[int, int, int]] = field(default_factory=list)
    switches: list[Switch] = field(default_factory=list)
    now: int = 0
    told: int = -1

    def tell(self, inside: int) -> None:
        while self.told >= 0 and self.ranges[self.told][1] is not None:
            self.told = self.ranges[self.told][2]
        if self.told != inside:
            self.switches.append(Switch(self.tick(), inside + 1))
            self.told = inside

    def tick(self) -> int:
        self.now += 1
        return self.now

    def open_around(self, inside: int) -> int:
        while inside >= 0 and self.ranges[inside][1] is not None:
            inside = self.ranges[inside][2]
        return inside


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_against_what_really_lies_in_what(data: st.DataObject) -> None:
    thread, tasks = Thread(), [-1]
    for what, which in data.draw(st.lists(st.tuples(st.sampled_from("bbbeeepn"), st.integers(0, 3)), max_size=24)):
        place = which % len(tasks)
        inside = tasks[place] = thread.open_around(tasks[place])
        if what == "b":
            thread.tell(inside)
            thread.ranges.append([thread.tick(), None, inside])
            thread.told = tasks[place] = len(thread.ranges) - 1
        elif what == "e" and inside >= 0:
            thread.ranges[inside][1] = thread.tick()
        elif what == "p":
            thread.tell(inside)
            thread.pushed.append((thread.tick(), thread.tick(), inside))
        elif what == "n":
            tasks.append(inside)
    last = thread.tick()
    times = [(start, end or last) for start, end, _ in thread.ranges]

    def line(place: int) -> set[int]:
        found = set()
        while place >= 0:
            found.add(place)
            place = thread.ranges[place][2]
        return found

    wanted = []
    for place, (start, end) in enumerate(times):
        fine = all(place in line(inside) for begin, _, inside in thread.pushed if start < begin < end)
        for other, (begin, over) in enumerate(times):
            if other == place or over <= start or end <= begin:
                continue
            around = other in line(place) and begin <= start and end <= over
            within = place in line(other) and start <= begin and over <= end
            fine = fine and (around or within)
        wanted.append(fine)
    given_ = [Task(start, end, number) for number, (start, end) in enumerate(times, 1)]
    events: list[Task | Switch] = [*given_, *thread.switches]
    events.sort(key=lambda e: e.start if isinstance(e, Task) else e.time)
    assert apart(events) == wanted
