"""Text, JSON, CSV, Chrome trace and speedscope say the same as the rows."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from fxnvtx import range as nvtx_range
from fxnvtx import record
from fxnvtx.errors import OutputError
from fxnvtx.output import write_text
from fxnvtx.report import (
    Report,
    from_recording,
    load,
    render_csv,
    render_json,
    render_text,
    write_chrome,
    write_speedscope,
)
from fxnvtx.report.render import data, middle, readable_bytes, readable_ns

from .captures import DATA, Capture
from .samples import pipeline


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory.mktemp("outputs") / "pipeline.sqlite").close()


@pytest.fixture(scope="module")
def report(capture: Path) -> Report:
    return load(capture)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 132, 200])
@pytest.mark.parametrize("by", ["tree", "module", "kernel", "step"])
def test_the_table_fits_the_width(report: Report, width: int, by: str) -> None:
    text = render_text(report, by=by, width=width, everything=True)
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= width
    assert len(lines) == len(report.rows(by=by)) + 1
    assert "total" in lines[0] or by == "kernel"


def test_the_table_shows_every_level_of_a_deep_tree(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "deep.sqlite")
    for depth in range(60):
        capture.range(depth, 1000 - depth, f"level{depth}")
    lines = render_text(load(capture.close()), width=80).splitlines()
    assert len(lines) == 61
    assert "level59" in lines[-1]
    assert max(map(len, lines)) <= 80


def test_long_names_keep_what_tells_them_apart(report: Report) -> None:
    lines = render_text(report, width=60, everything=True).splitlines()
    assert any("….attn" in line for line in lines)
    assert any("….norm" in line for line in lines)


def test_text_limit_says_what_is_left_out(report: Report) -> None:
    rows = len(report.rows())
    assert f"... and {rows - 5} more rows" in render_text(report, width=100, limit=5, everything=True)


def test_names_with_markup_are_shown_as_they_are(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "markup.sqlite")
    capture.range(0, 10, "[bold]x[/bold] :smile:")
    assert "[bold]x[/bold] :smile:" in render_text(load(capture.close()), width=100)


def test_json_is_versioned_and_equals_the_rows(report: Report) -> None:
    document = json.loads(render_json(report, by="module"))
    assert (document["format"], document["version"], document["unit"]) == ("fxnvtx-report", 2, "ns")
    assert document["gpu"] is True
    rows = report.rows(by="module")
    assert [row["name"] for row in document["rows"]] == [row.name for row in rows]
    assert [row["gpu"] for row in document["rows"]] == [row.gpu for row in rows]
    assert document["rows"][0]["each"]["middle"] == rows[0].each.middle  # type: ignore[union-attr]


def test_every_json_field_is_documented(report: Report) -> None:
    documented = data.__doc__ or ""
    row = json.loads(render_json(report))["rows"][0]
    assert not [name for name in row if name not in documented]


def test_csv_equals_the_rows(report: Report) -> None:
    lines = list(csv.DictReader(io.StringIO(render_csv(report))))
    rows = report.rows()
    assert [line["path"] for line in lines] == ["/".join(row.path) for row in rows]
    assert [int(line["gpu_ns"]) for line in lines] == [row.gpu for row in rows]
    assert {line["fused"] for line in lines} == {"", "norm; attn"}


def check_chrome(path: Path) -> list[dict[str, Any]]:
    """The trace event format, as Perfetto's importer wants it: complete events nest on their track."""
    document = json.loads(path.read_text())
    events = document["traceEvents"]
    assert document["displayTimeUnit"] in ("ms", "ns")
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        assert 0 <= event["pid"] < 2**31
        assert 0 <= event["tid"] < 2**31
        assert event["ph"] in ("X", "M")
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        open_ends: list[float] = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_ends and open_ends[-1] <= start + 1e-6:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 1e-6, "crosses the event around it"
            open_ends.append(end)
    return [event for event in events if event["ph"] == "X"]


def test_chrome_trace_of_a_capture(capture: Path, tmp_path: Path, report: Report) -> None:
    events = check_chrome(write_chrome(capture, tmp_path / "trace.json"))
    ranges = [event for event in events if event["cat"] != "kernel"]
    assert len(ranges) == sum(row.calls for row in report.rows())
    assert sum(event["dur"] for event in events if event["name"] == "attn_k") == pytest.approx(24 * 30)
    load_range = next(event for event in ranges if event["cat"] == "residency")
    assert load_range["args"] == {"payload": 1 << 20}


def test_ranks_side_by_side_in_one_trace(capture: Path, tmp_path: Path) -> None:
    events = check_chrome(write_chrome([capture, capture, DATA / "h100_2gpu_slice.sqlite"], tmp_path / "trace.json"))
    assert len({event["pid"] for event in events if event["cat"] != "kernel"}) == 4
    assert len({event["pid"] for event in events if event["cat"] == "kernel"}) == 4


@pytest.mark.parametrize("name", ["h100_2gpu_slice.sqlite", "mfu_2gpu_slice.sqlite"])
def test_chrome_trace_of_real_captures(name: str, tmp_path: Path) -> None:
    assert len(check_chrome(write_chrome(DATA / name, tmp_path / "trace.json"))) > 5000


def test_chrome_trace_of_a_recording(tmp_path: Path) -> None:
    with record() as recording:
        for step in range(3):
            with nvtx_range("outer", payload={"step": step}), nvtx_range("inner", category="op"):
                pass
    recording.save(tmp_path / "recording.json")
    for source in (recording, tmp_path / "recording.json"):
        events = check_chrome(write_chrome(source, tmp_path / "trace.json"))
        assert [event["name"] for event in sorted(events, key=lambda e: (e["ts"], -e["dur"]))] == ["outer", "inner"] * 3
        assert [event["args"]["payload"]["step"] for event in events if event["name"] == "outer"] == [0, 1, 2]
        for event, item in zip(sorted(events, key=lambda e: (e["ts"], -e["dur"])), recording.ranges, strict=True):
            assert event["dur"] * 1000 == pytest.approx(item.end_ns - item.start_ns, abs=0.5)  # type: ignore[operator]


def check_speedscope(path: Path) -> dict[str, list[dict[str, Any]]]:
    """speedscope's file-format-schema: evented profiles whose events are sorted and close what they opened."""
    document = json.loads(path.read_text())
    assert document["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    frames = document["shared"]["frames"]
    assert all(set(frame) <= {"name", "file", "line", "col"} for frame in frames)
    found = {}
    for profile in document["profiles"]:
        assert profile["type"] == "evented"
        assert profile["unit"] == "nanoseconds"
        stack: list[int] = []
        last = profile["startValue"]
        for event in profile["events"]:
            assert event["at"] >= last
            last = event["at"]
            if event["type"] == "O":
                stack.append(event["frame"])
            else:
                assert stack.pop() == event["frame"]
            assert 0 <= event["frame"] < len(frames)
        assert not stack
        assert last <= profile["endValue"]
        found[profile["name"]] = profile["events"]
    return found


def test_speedscope_of_captures(capture: Path, tmp_path: Path, report: Report) -> None:
    found = check_speedscope(write_speedscope(capture, tmp_path / "out.json"))
    assert list(found) == ["process 7, thread 1", "process 7, GPU 0 stream 7", "process 7, GPU 0 stream 9"]
    assert len(found["process 7, thread 1"]) == 2 * sum(row.calls for row in report.rows())
    for name in ("h100_2gpu_slice.sqlite", "mfu_2gpu_slice.sqlite"):
        assert check_speedscope(write_speedscope(DATA / name, tmp_path / "real.json"))


def test_crossing_ranges_are_cut_in_timelines(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "crossing.sqlite")
    capture.range(0, 100, "left")
    capture.range(50, 150, "right")
    path = capture.close()
    check_speedscope(write_speedscope(path, tmp_path / "s.json"))
    events = check_chrome(write_chrome(path, tmp_path / "c.json"))
    assert {event["name"]: event["dur"] for event in events} == {"left": 0.1, "right": 0.05}


def test_outputs_are_whole_or_not_there(tmp_path: Path, capture: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_text(tmp_path / "none" / "x.txt", "text")
    broken = tmp_path / "broken.sqlite"
    content = bytearray(capture.read_bytes())
    content[4096 * 3 : 4096 * 6] = b"\xff" * (4096 * 3)
    broken.write_bytes(content)
    (tmp_path / "out").mkdir()
    for writer in (write_chrome, write_speedscope):
        with pytest.raises(Exception, match="damaged"):
            writer(broken, tmp_path / "out" / "x.json")
    assert not list((tmp_path / "out").iterdir())


def test_numbers_people_read() -> None:
    assert [readable_ns(value) for value in (0, 999, 1_000, 12_345, 1e6, 123.4e6, 1e9, 7.2e12)] == [
        "0 ns", "999 ns", "1.00 us", "12.35 us", "1.00 ms", "123.4 ms", "1.00 s", "7200.0 s",
    ]  # fmt: skip
    assert [readable_ns(value) for value in (999.6, 99_996, 999_960, 999_960_000, -1500)] == [
        "1.00 us", "100.0 us", "1.00 ms", "1.00 s", "-1.50 us",
    ]  # fmt: skip
    assert [readable_bytes(value) for value in (5, 2048, 3 << 30)] == ["5 B", "2.0 KiB", "3.0 GiB"]
    assert middle("transformer.blocks.0.attn", 12) == "tra…s.0.attn"
    assert middle("short", 12) == "short"


def test_a_notebook_shows_the_tree() -> None:
    with record() as recording, nvtx_range("a <b>&", category="op"):
        for _ in range(3):
            with nvtx_range("net.blocks.0"):
                pass
    for shown in (recording._repr_html_(), from_recording(recording)._repr_html_()):
        assert shown.startswith("<pre>range ")
        assert "a &lt;b&gt;&amp;" in shown
        assert "net.blocks.*" in shown
        assert "\x1b" not in shown
