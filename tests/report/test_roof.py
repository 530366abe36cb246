"""Work joined with time and peaks: figures to the digit on captures made by hand, and what is not known is said."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fxnvtx import FxnvtxError
from fxnvtx.cli import cli
from fxnvtx.recording import Entry, decoded, encoded, read_entry
from fxnvtx.report import load
from fxnvtx.report.findings import above_the_roof, far_below_the_roof
from fxnvtx.report.part import Gpu
from fxnvtx.report.report import from_recording
from fxnvtx.report.rows import Row
from fxnvtx.report.work import KNOWN, Peaks, parse_peaks, peaks_of

from .captures import Capture
from .samples import recorded

TERA = 10**12


def entry(label: str, calls: int = 1, moved: int = 0, part: str = "forward", **more: Any) -> Entry:
    flops = tuple((kind, more.pop(kind)) for kind in ("bf16", "fp32", "fp8") if kind in more)
    made = Entry(label, "", False, part, calls, flops, moved, "", "cuda")
    return made._replace(**more)


def gpu_table(capture: Capture, name: str, bandwidth: int) -> None:
    capture.database.execute("CREATE TABLE TARGET_INFO_GPU (name TEXT, memoryBandwidth INTEGER, smCount INTEGER)")
    capture.database.execute("INSERT INTO TARGET_INFO_GPU VALUES (?, ?, 132)", (name, bandwidth))


def layers(path: Path, entries: list[Entry], times: dict[str, list[int]], gpu: tuple[str, int] | None = None) -> Path:
    """A model whose layers launch one kernel a call, each of the given length in ns, without a gap between them."""
    capture = Capture(path)
    for item in entries:
        capture.text(encoded(item))
    if gpu is not None:
        gpu_table(capture, *gpu)
    now = device = 1_000_000
    calls = [(label, length) for label, lengths in times.items() for length in lengths]
    capture.range(now, now + 10_000 * len(calls) + 1_000, "net")
    for label, length in calls:
        now += 10_000
        if label != "net":
            capture.range(now - 9_000, now - 1_000, label)
        correlation = capture.call(now - 8_000, now - 7_000)
        device = max(device, now)
        capture.kernel(device, device + length, correlation, f"kernel of {label}")
        device += length
    return capture.close()


def rows_of(path: Path, peak: str | None = None) -> dict[str, Row]:
    return {row.name: row for row in load(path, peak=None if peak is None else parse_peaks(peak)).rows()}


def test_shares_and_headroom_to_the_digit(tmp_path: Path) -> None:
    """Compute: 2 G operations at 1 T/s are 2 ms. Memory: 3 MB at 1 TB/s are 3 us."""
    entries = [entry("net.a", bf16=2 * 10**9, moved=1_000), entry("net.b", moved=3_000_000), entry("net")]
    path = layers(tmp_path / "a.sqlite", entries, {"net.a": [4_000_000, 6_000_000], "net.b": [12_000]})
    rows = rows_of(path, "bf16=1T,mem=1T")
    a, b, net = rows["net.a"], rows["net.b"], rows["net"]
    assert (a.flops, a.moved, a.rated, a.roof) == (4 * 10**9, 2_000, 10_000_000, 4_000_000)
    assert (a.roof_share, a.headroom, a.bound, a.tflops) == (0.4, 6_000_000, "compute", 0.4)
    assert (b.flops, b.moved, b.rated, b.roof) == (0, 3_000_000, 12_000, 3_000)
    assert (b.roof_share, b.headroom, b.bound, b.gbs) == (0.25, 9_000, "memory", 250.0)
    assert (net.flops, net.moved, net.roof) == (a.flops, a.moved + b.moved, a.roof + b.roof)
    assert (net.headroom, a.headroom, b.headroom) == (6_009_000, 6_000_000, 9_000)
    assert not any(row.suspect or row.unrated for row in rows.values())


def test_the_capture_tells_the_device(tmp_path: Path) -> None:
    """989.4 TFLOP/s of an H100's data sheet; the memory's figure is the capture's own."""
    entries = [entry("net.a", bf16=9894 * 10**8, moved=1), entry("net.b", moved=3_000_000), entry("net")]
    times = {"net.a": [2_000_000], "net.b": [2_000]}
    path = layers(tmp_path / "a.sqlite", entries, times, ("NVIDIA H100 80GB HBM3", 3 * TERA))
    report = load(path)
    rows = {row.name: row for row in report.rows()}
    assert (rows["net.a"].roof, rows["net.a"].roof_share) == (1_000_000, 0.5)
    assert (rows["net.b"].roof, rows["net.b"].roof_share) == (1_000, 0.5)
    assert any("NVIDIA H100 data sheet (SXM)" in note for note in report.notes)
    assert rows_of(path, "bf16=1978.8T")["net.a"].roof == 500_000  # and the user knows better
    assert rows_of(path, "bf16=1978.8T")["net.b"].roof == 1_000


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    entries = [
        entry("net.a", bf16=10**9),
        entry("net.shapes", bf16=1), entry("net.shapes", bf16=2),
        entry("net.custom", unknown="no formula for mine.op"),
        entry("net.fp8", fp8=10**9),
    ]  # fmt: skip
    times = {label: [4_000_000] for label in ("net.a", "net.shapes", "net.custom", "net.fp8", "net.stranger")}
    path = layers(tmp_path / "a.sqlite", entries, times)
    report = load(path, peak=parse_peaks("bf16=1T,mem=1T"))
    rows = {row.name: row for row in report.rows()}
    for name in ("net.shapes", "net.custom", "net.stranger"):
        row = rows[name]
        assert (row.rated, row.unrated, row.headroom, row.roof_share, row.bound) == (0, 4_000_000, None, None, None)
    assert (rows["net.fp8"].flops, rows["net.fp8"].tflops) == (10**9, 0.25)
    assert rows["net.fp8"].headroom is None
    assert (rows["net"].rated, rows["net"].unrated) == (8_000_000, 12_000_000)
    assert "the work of 20.0% of the time is not known: no formula for mine.op" in report.notes
    why = "it ran with 2 different shapes, and nothing says how often with each"
    assert f"the work of 20.0% of the time is not known: {why}" in report.notes
    shown = CliRunner().invoke(cli, ["report", str(path), "--peak", "bf16=1T,mem=1T"], env={"COLUMNS": "250"}).output
    line = next(line for line in shown.splitlines() if "custom" in line)
    assert line.count("?") >= 5
    assert "+?" in next(line for line in shown.splitlines() if line.startswith("net "))


def test_calls_of_several_shapes_say_which_they_are(tmp_path: Path) -> None:
    """By the payload of their range."""
    entries = [
        entry("net.a", bf16=10**9, part="eager", number=0), entry("net.a", bf16=3 * 10**9, part="eager", number=1),
        entry("net"), entry("op", under="net.a", part="eager", number=0, moved=5),
        entry("op", under="net.a", part="eager", number=1, moved=8),
    ]  # fmt: skip
    assert [decoded(encoded(item)) for item in entries] == entries
    capture = Capture(tmp_path / "a.sqlite")
    for item in entries:
        capture.text(encoded(item))
    for number, payload in enumerate((0, 1, 1, 0)):
        at = 1_000_000 * (number + 1)
        capture.range(at, at + 10_000, "net.a", "module", payload=payload)
        capture.range(at + 10, at + 900, "op", "op")
        capture.kernel(at + 2_000, at + 2_000 + 500_000, capture.call(at + 1_000, at + 1_100), "of a")
        capture.kernel(at + 502_000, at + 502_001, capture.call(at + 20, at + 30), "of op")
    rows = rows_of(capture.close(), "bf16=1T,mem=1T")
    assert [(row.name, row.calls) for row in rows.values()] == [("net.a", 4), ("op", 4)], "one row, whatever the shapes"
    assert (rows["net.a"].flops, rows["op"].moved) == (2 * 10**9 + 6 * 10**9, 2 * 5 + 2 * 8)
    assert (rows["net.a"].roof, rows["net.a"].unrated) == (8_000_000, 0)
    assert rows["net.a"].each is not None and rows["net.a"].each.count == 4


def test_parts_add_up_and_alternatives_do_not(tmp_path: Path) -> None:
    entries = [
        entry("net.a", bf16=1_000_000, part="forward"), entry("net.a", bf16=500_000, part="resumed"),
        entry("net.b", calls=2, bf16=4_000_000), entry("net.b", calls=1, bf16=2_000_000),
        entry("net.c", bf16=5, part="eager"), entry("net.c", bf16=5, part="forward"),
        entry("net.d", bf16=5, part="eager"), entry("net.d", bf16=6, part="forward"), entry("net"),
    ]  # fmt: skip
    times = {label: [1_000] for label in ("net.a", "net.b", "net.c", "net.d")}
    rows = rows_of(layers(tmp_path / "a.sqlite", entries, times), "bf16=1T")
    assert (rows["net.a"].flops, rows["net.b"].flops, rows["net.c"].flops) == (1_500_000, 2_000_000, 5)
    assert rows["net.d"].unrated == 1_000


def test_a_fused_range_is_told_apart_by_the_module_around_it(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "a.sqlite")
    for number in range(2):
        capture.text(encoded(entry("fused(a, b)", under=f"net.{number}", moved=1_000_000 * (number + 1))))
        at = 1_000_000 + number * 100_000
        capture.range(at, at + 90_000, f"net.{number}")
        capture.range(at + 10_000, at + 20_000, "fused(a, b)", "op")
        capture.kernel(at + 30_000, at + 34_000, capture.call(at + 11_000, at + 12_000), "triton")
    report = load(capture.close(), peak=parse_peaks("mem=1T"))
    assert [row.moved for row in report.rows()] == [1_000_000, 1_000_000, 2_000_000, 2_000_000]
    assert [row.roof_share for row in report.rows()] == [0.25, 0.25, 0.5, 0.5]
    split = report.rows(split_fused=True)
    assert sum(row.moved for row in split if row.depth == 0) == 3_000_000


def test_a_backward_pass_has_work_of_its_own(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "a.sqlite")
    capture.text(encoded(entry("net", bf16=1_000)))
    capture.text(encoded(entry("net", backward=True, bf16=2_000)))
    for at, backward in ((1_000_000, False), (2_000_000, True)):
        if backward:
            capture.range(at, at + 100_000, "backward")
        capture.range(at + 10, at + 90_000, "net")
        capture.kernel(at + 30_000, at + 34_000, capture.call(at + 11_000, at + 12_000), "mm")
    rows = load(capture.close()).rows()
    assert [(row.name, row.flops) for row in rows] == [("net", 1_000), ("backward", 2_000), ("net", 2_000)]


def test_what_is_faster_than_possible_is_suspect(tmp_path: Path) -> None:
    path = layers(tmp_path / "a.sqlite", [entry("net.a", bf16=10**9), entry("net")], {"net.a": [500_000]})
    report = load(path, peak=parse_peaks("bf16=1T"))
    rows = {row.name: row for row in report.rows()}
    assert rows["net.a"].suspect and rows["net.a"].roof_share == 2.0
    found = above_the_roof(report)
    assert found is not None and found.evidence == (("net.a", 500_000),)  # type: ignore[union-attr]
    assert above_the_roof(load(path, peak=parse_peaks("bf16=10T"))) is None
    shown = CliRunner().invoke(cli, ["report", str(path), "--peak", "bf16=1T"], env={"COLUMNS": "200"}).output
    assert "200.0%!" in shown


def test_launches_that_are_waited_for_are_what_bounds(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "a.sqlite")
    capture.text(encoded(entry("net", calls=1, moved=2_000_000)))
    capture.range(1_000_000, 1_100_000, "net")
    for at in (1_010_000, 1_030_000, 1_050_000):
        capture.kernel(at + 2_000, at + 4_000, capture.call(at, at + 1_000), "small")
    (row,) = load(capture.close(), peak=parse_peaks("mem=1T")).rows()
    assert row.gap > row.gpu
    assert (row.bound, row.headroom) == ("launch", 4_000)


def test_the_rule_about_layers_far_below(tmp_path: Path) -> None:
    slow = layers(tmp_path / "a.sqlite", [entry("net.a", bf16=10**9), entry("net")], {"net.a": [5_000_000]})
    found = far_below_the_roof(load(slow, peak=parse_peaks("bf16=1T")))
    assert found.ns == 4_000_000 and found.evidence == (("net.a", 4_000_000),)  # type: ignore[union-attr]
    assert far_below_the_roof(load(slow, peak=parse_peaks("bf16=0.25T"))) is None
    assert type(far_below_the_roof(load(slow))).__name__ == "Silence"


def test_sorted_by_headroom_in_every_format(tmp_path: Path) -> None:
    entries = [entry(f"net.{name}", bf16=10**9) for name in "abc"] + [entry("net")]
    path = layers(tmp_path / "a.sqlite", entries, {"net.a": [2_000_000], "net.b": [9_000_000], "net.c": [5_000_000]})
    base = ["report", str(path), "--peak", "bf16=1T", "--sort", "headroom", "--by", "module"]
    data = json.loads(CliRunner().invoke(cli, [*base, "--format", "json"]).output)
    assert data["peaks"] == {"flops": {"bf16": 1e12}, "memory": 0.0, "source": ""}
    assert [row["name"] for row in data["rows"]] == ["net", "net.b", "net.c", "net.a"]
    assert [row["headroom"] for row in data["rows"]] == [13_000_000, 8_000_000, 4_000_000, 1_000_000]
    lines = list(csv.DictReader(io.StringIO(CliRunner().invoke(cli, [*base, "--format", "csv"]).output)))
    assert [line["headroom_ns"] for line in lines] == ["13000000", "8000000", "4000000", "1000000"]
    assert {line["bound"] for line in lines} == {"compute"}
    CliRunner().invoke(cli, ["report", str(path), "--peak", "bf16=1T", "-o", str(tmp_path / "a.html")])
    assert '"headroom"' in (tmp_path / "a.html").read_text()


def test_a_recording_carries_its_work() -> None:
    """Times of the host say something about work of the host only."""
    from fxnvtx.recording import Range

    ranges = [Range("net", "module", None, 1, 0, 0, 4_000, False)]
    for device, rated in (("cpu", 4_000), ("cuda", 0)):
        row: list[Any] = [*entry("net", moved=1_000, device=device)]
        row[5] = dict(row[5])
        (shown,) = from_recording(recorded(ranges, work=[row, "junk", [1]]), peak=parse_peaks("mem=1T")).rows()
        assert (shown.moved, shown.rated) == (1_000, rated)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=10) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=12,
    )
)
def test_anything_in_the_place_of_an_entry_is_read_or_left_out(value: object) -> None:
    found = read_entry(value)
    assert found is None or decoded(encoded(found)) == found


@given(
    st.builds(
        Entry,
        st.text(),
        st.text(),
        st.booleans(),
        st.text(),
        st.integers(1, 9),
        st.dictionaries(st.sampled_from(["bf16", "fp32"]), st.integers(0, 2**60)).map(
            lambda d: tuple(sorted(d.items()))
        ),
        st.integers(0, 2**60),
        st.text(),
        st.text(),
    )
)
def test_entries_survive_their_text(made: Entry) -> None:
    assert decoded(encoded(made)) == made


@pytest.mark.parametrize(
    "text", ["", "bf16", "bf16=", "bf17=1T", "mem=0", "mem=-1T", "bf16=1X", "bf16=nan", "bf16=1e99T"]
)
def test_bad_peaks_are_refused_in_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(FxnvtxError, match="peak"):
        parse_peaks(text)
    path = layers(tmp_path / "a.sqlite", [entry("net")], {"net": [1_000]})
    done = CliRunner().invoke(cli, ["report", str(path), "--peak", text])
    assert done.exit_code in (1, 2) and "Traceback" not in done.output


def test_sheets() -> None:
    """Every device is found by its driver's name, and by no other's."""
    names = {
        "NVIDIA B200": 8.0, "NVIDIA H200": 4.8, "NVIDIA H100 PCIe": 2.0, "NVIDIA H100 80GB HBM3": 3.35,
        "NVIDIA A100 80GB PCIe": 1.935, "NVIDIA A100-SXM4-80GB": 2.039, "NVIDIA A100-SXM4-40GB": 1.555,
        "NVIDIA A100-PCIE-40GB": 1.555, "NVIDIA L40S": 0.864, "NVIDIA L4": 0.3, "NVIDIA A10": 0.6,
        "NVIDIA GeForce RTX 4090": 1.008, "Tesla V100-SXM2-16GB": 0.9, "Tesla T4": 0.32,
    }  # fmt: skip
    for name, memory in names.items():
        peaks, said = peaks_of([Gpu(name)])
        assert (peaks.memory == pytest.approx(memory * TERA) and "sheet" in said) or "whitepaper" in said
    assert len(set(names.values())) == len(KNOWN)
    for name in (
        "NVIDIA H100 NVL",
        "NVIDIA GB200",
        "NVIDIA H200 NVL",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 D",
        "AMD",
    ):
        assert peaks_of([Gpu(name)]) == (Peaks(), f"no peaks known of {name}: give --peak")
    assert peaks_of([Gpu("NVIDIA L4"), Gpu("NVIDIA A10")])[0] == Peaks()
