"""What changed between two captures: by module, and told apart from noise."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path

import pytest

from fxnvtx.recording import Range, Recording
from fxnvtx.report import Report, diff, from_recording, load
from fxnvtx.report.diff import CHANGE, NOISE, ONLY_A, ONLY_B, UNSURE, diff_csv, diff_json, diff_text, verdict

from .captures import Capture
from .samples import pipeline, recorded


def steps(times: dict[str, list[int]]) -> Report:
    """A recording of modules with these times, one per step."""
    ranges: list[Range] = []
    now = 0
    for step in range(max(map(len, times.values()))):
        begin = now
        place = len(ranges)
        for name, values in times.items():
            if step < len(values):
                ranges.append(Range(name, "module", None, 1, 1, now, now + values[step]))
                now += values[step]
        ranges.insert(place, Range(f"denoising_step_{step}_t{step}", "step", None, 1, 0, begin, now))
        now += 5
    return from_recording(recorded(ranges))


def test_absolute_and_relative(tmp_path: Path) -> None:
    one = load(pipeline(tmp_path / "a.sqlite").close())
    two = load(pipeline(tmp_path / "b.sqlite", scale=1.5).close())
    found = diff(one, two)
    assert found.measure == "gpu"
    rows = {row.name: row for row in found.rows}
    attn = rows["transformer.blocks.1.attn"]
    assert (attn.a, attn.b, attn.delta, attn.relative, attn.verdict) == (30_000, 45_000, 15_000, 0.5, CHANGE)
    assert (attn.total_a, attn.total_b, attn.count_a) == (8 * 30_000, 8 * 45_000, 8)
    assert rows["transformer"].delta == 3 * 23_000
    assert rows["transformer.blocks.0 fused(norm, attn)"].delta == 3_000
    assert (rows["denoising_step_*"].a, rows["denoising_step_*"].count_a) == (3 * 46_000, 8)
    assert [row.name for row in found.rows[:3]] == ["request#*", "denoising_step_*", "transformer"], "biggest first"


def test_the_same_capture_has_no_changes(tmp_path: Path) -> None:
    path = pipeline(tmp_path / "a.sqlite").close()
    found = diff(load(path), load(path))
    assert {row.delta for row in found.rows} == {0}
    assert {row.verdict for row in found.rows} == {NOISE}


def test_eager_against_compiled_says_what_exists_on_one_side_only(tmp_path: Path) -> None:
    """Compiled, norm has no kernel of its own any more: it lives in fused(norm, attn)."""
    eager, compiled = Capture(tmp_path / "eager.sqlite"), Capture(tmp_path / "compiled.sqlite")
    for capture in (eager, compiled):
        for step in range(4):
            at = step * 1000
            capture.range(at, at + 900, f"denoising_step_{step}_t{step}", "step")
            capture.range(at + 10, at + 800, "net")
            capture.range(at + 300, at + 400, "net.ff")
            capture.kernel(at * 9 + 90, at * 9 + 190, capture.call(at + 310, at + 320))
            name = "net.norm" if capture is eager else "fused(norm, ff)"
            capture.range(at + 100, at + 200, name)
            capture.kernel(at * 9, at * 9 + 50, capture.call(at + 110, at + 120))
    rows = {row.name: row for row in diff(load(eager.close()), load(compiled.close())).rows}
    assert rows["net.norm"].verdict == ONLY_A
    assert (rows["net.norm"].b, rows["net.norm"].relative) == (None, None)
    assert rows["net fused(norm, ff)"].verdict == ONLY_B
    assert rows["net.ff"].verdict == NOISE
    assert rows["net"].delta == 0


def test_resident_against_offloaded(tmp_path: Path) -> None:
    resident, offloaded = Capture(tmp_path / "resident.sqlite"), Capture(tmp_path / "offloaded.sqlite")
    for capture in (resident, offloaded):
        for request in range(4):
            at = request * 10_000_000
            end = at + (1_000_000 if capture is resident else 3_000_000)
            capture.range(at, end, f"request#{request}", "request")
            capture.range(at + 10, end - 500_000, "stage_denoising", "stage")
            capture.range(at + 100_000, at + 400_000, "dit")
            if capture is offloaded:
                capture.range(at + 500_000, at + 2_400_000, "residency.load dit", "residency")
    rows = {row.name: row for row in diff(load(resident.close()), load(offloaded.close())).rows}
    assert (rows["residency.load dit"].verdict, rows["residency.load dit"].b) == (ONLY_B, 1_900_000)
    assert rows["dit"].verdict == NOISE
    assert (rows["stage_denoising"].verdict, rows["stage_denoising"].delta) == (CHANGE, 2_000_000)
    assert rows["request#*"].relative == 2.0


def test_cpu_and_gpu_captures_are_compared_by_cpu_time_and_say_so(tmp_path: Path) -> None:
    gpu = load(pipeline(tmp_path / "a.sqlite").close())
    cpu = steps({"transformer": [100, 100, 100]})
    found = diff(gpu, cpu)
    assert found.measure == "cpu"
    assert found.notes[0] == "only A recorded device work, so CPU time is compared"


def test_noise_is_told_from_change() -> None:
    chance = random.Random(3)
    alarms = missed = 0
    for _ in range(400):
        one = [int(chance.lognormvariate(13, 0.05)) for _ in range(20)]
        two = [int(chance.lognormvariate(13, 0.05)) for _ in range(20)]
        slower = [int(value * 1.15) for value in two]
        alarms += verdict(one, two) == CHANGE
        missed += verdict(one, slower) != CHANGE
    assert alarms <= 8, "of 400 comparisons of the same thing"
    assert missed <= 8, "of 400 slowdowns by 15 % in 5 % noise"


def test_one_slow_first_step_is_no_change() -> None:
    steady = [100_000, 101_000, 99_000, 100_500, 99_500, 100_200]
    assert verdict([900_000, *steady], steady) == NOISE
    assert verdict(steady, [value * 2 for value in steady]) == CHANGE


def test_too_few_repetitions_are_said() -> None:
    assert verdict([100, 110], [200, 210, 220]) == UNSURE
    rows = diff(steps({"a": [100_000]}), steps({"a": [200_000]})).rows
    assert rows[0].verdict == UNSURE


def test_repetitions_are_steps_or_requests() -> None:
    ranges = []
    for request in range(3):
        at = request * 1000
        ranges += [
            Range(f"request#{request}", "request", None, 1, 0, at, at + 900),
            Range("vae", "module", None, 1, 1, at + 10, at + 60),
            Range("vae", "module", None, 1, 1, at + 100, at + 150),
        ]
    recording = recorded(ranges)
    rows = {row.name: row for row in diff(from_recording(recording), from_recording(recording)).rows}
    assert (rows["vae"].count_a, rows["vae"].a) == (3, 100)
    assert (rows["request#*"].count_a, rows["request#*"].a) == (3, 900)


def test_outputs(tmp_path: Path) -> None:
    found = diff(steps({"a": [100_000] * 5, "gone": [7] * 5}), steps({"a": [150_000] * 5, "new": [9] * 5}))
    text = diff_text(found, width=100)
    assert max(map(len, text.splitlines())) <= 100
    assert "+50.0%" in text
    assert "only in A" in text
    assert "only in B" in text
    document = json.loads(diff_json(found))
    assert (document["format"], document["version"], document["measure"]) == ("fxnvtx-diff", 1, "cpu")
    lines = list(csv.DictReader(io.StringIO(diff_csv(found))))
    names = [line["name"] for line in lines]
    assert [row["name"] for row in document["rows"]] == names == ["denoising_step_*", "a", "new", "gone"]
    assert float(lines[1]["relative"]) == pytest.approx(0.5)


def test_depth() -> None:
    one = steps({"net": [5], "net.a": [5], "net.a.b": [5]})
    assert [row.name for row in diff(one, one, depth=2).rows] == [
        "denoising_step_*",
        "net",
        "net.a",
    ]


def test_nothing_to_compare() -> None:
    recording = Recording()
    recording.stop()
    found = diff(from_recording(recording), steps({"a": [1]}))
    assert found.notes == ["A holds no module ranges"]
    assert "only in B" in diff_text(found, width=80)
