"""Files that are broken in every way: one clear error, or an answer that says what is missing."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxnvtx.cli import cli
from fxnvtx.errors import CaptureError, FxnvtxError, ToolError
from fxnvtx.recording import Range
from fxnvtx.report import commands, load, render_text, write_chrome, write_speedscope
from fxnvtx.report.capture import kind_of, schema

from . import mutated
from .captures import DATA, Capture, process
from .samples import recorded

REAL = DATA / "mfu_2gpu_slice.sqlite"


def refused(path: Path) -> str:
    with pytest.raises(CaptureError) as caught:
        load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    return text


def small(path: Path) -> Capture:
    capture = Capture(path)
    capture.range(100, 200, "a")
    capture.kernel(1000, 1010, capture.call(110, 120))
    return capture


def test_no_file(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.sqlite")


def test_a_folder(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path)


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("lacking", [False, True])
def test_a_folder_whose_capture_lost_ranges(tmp_path: Path, device: bool, lacking: bool) -> None:
    """`fxnvtx run` writes into a recording what a capture of the same run has less."""
    capture = Capture(tmp_path / "capture.sqlite")
    capture.range(0, 100, "net", "module")
    if device:
        capture.kernel(20, 30, capture.call(10, 15))
    capture.close()
    recording = recorded([Range("net", "module", None, 1, 0, at, at + 5) for at in (0, 10, 20)])
    recording.meta = {"captured": 1, **recording.meta} if lacking else recording.meta
    recording.save(tmp_path / "recording.pid1.json")
    report = load(tmp_path)
    assert [(row.name, row.calls) for row in report.rows()] == [("net", 3 if lacking and not device else 1)]
    assert report.has_gpu == device
    named = [note for note in report.notes if "recording.pid1.json" in note]
    assert len(named) == (lacking and device)
    by_name = load(tmp_path / "capture.sqlite")
    assert [row.calls for row in by_name.rows()] == [1]
    assert any("recording.pid1.json" in note for note in by_name.notes) == lacking


def test_no_arguments() -> None:
    with pytest.raises(CaptureError, match="no capture given"):
        load()


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.sqlite").touch()
    assert "is empty" in refused(tmp_path / "empty.sqlite")


@pytest.mark.parametrize("content", [b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 5000, b"SQLite format 3\0"])
def test_not_sqlite(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.sqlite").write_bytes(content)
    assert "neither an SQLite export" in refused(tmp_path / "other.sqlite") or content.startswith(b"SQLite")


def test_a_spool_of_brackets(tmp_path: Path) -> None:
    (tmp_path / "1.spool").write_text("[" * 100_000 + "\n")
    assert "damaged" in refused(tmp_path / "1.spool")


def test_another_programs_sqlite(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "mail.sqlite")
    database.execute("CREATE TABLE mails (subject TEXT)")
    database.close()
    assert "no export of Nsight Systems" in refused(tmp_path / "mail.sqlite")


def test_json_that_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert "no fxnvtx recording" in refused(tmp_path / "x.json")


def test_a_recording_with_wrong_types(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(
        '{"format": "fxnvtx-recording", "version": 1, "meta": {}, "strays": 0, "marks": [],'
        ' "ranges": [["a", "module", null, 1, 0, "early", 5, false], ["b", "module", null, 1, 0, 3, 9, false]]}'
    )
    assert "damaged" in refused(tmp_path / "x.json")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_cut_off(tmp_path: Path, part: float) -> None:
    whole = REAL.read_bytes()
    path = tmp_path / "cut.sqlite"
    path.write_bytes(whole[: int(len(whole) * part)])
    assert "is cut off" in refused(path)


def test_a_page_cut_out_of_the_middle(tmp_path: Path) -> None:
    whole = REAL.read_bytes()
    path = tmp_path / "hole.sqlite"
    path.write_bytes(whole[: 4096 * 40] + whole[4096 * 41 :])
    assert "is cut off" in refused(path)


def test_a_page_overwritten(tmp_path: Path) -> None:
    whole = bytearray(REAL.read_bytes())
    whole[4096 * 40 : 4096 * 41] = random.Random(1).randbytes(4096)
    path = tmp_path / "page.sqlite"
    path.write_bytes(whole)
    assert "is damaged" in refused(path)


def test_a_page_in_the_place_of_another(tmp_path: Path) -> None:
    """SQLite reads such a file without complaint: rows would be missing and others counted twice."""
    database = sqlite3.connect(REAL)
    sql = "SELECT pageno FROM dbstat WHERE name = 'NVTX_EVENTS' AND pagetype = 'leaf'"
    try:
        pages = [row[0] for row in database.execute(sql)]
    except sqlite3.OperationalError as error:
        pytest.skip(f"this SQLite cannot tell which page is whose: {error}")
    database.close()
    whole = bytearray(REAL.read_bytes())
    size = int.from_bytes(whole[16:18], "big")
    source, target = pages[3] - 1, pages[20] - 1
    whole[target * size : (target + 1) * size] = whole[source * size : (source + 1) * size]
    path = tmp_path / "twice.sqlite"
    path.write_bytes(whole)
    assert "is damaged" in refused(path)


def test_locked_by_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_BUSY_S", 0.0)
    path = small(tmp_path / "locked.sqlite").close()
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    try:
        assert "is locked" in refused(path)
    finally:
        writer.execute("ROLLBACK")
        writer.close()
    assert load(path).rows()[0].calls == 1


def test_any_file_name(tmp_path: Path) -> None:
    path = small(tmp_path / "a b#c?d%20\u00fc mode=rw&x.sqlite").close()
    assert load(path).rows()[0].calls == 1


def test_two_calls_with_one_correlation_launch_once(tmp_path: Path) -> None:
    """The runtime's and the driver's call of one launch."""
    capture = Capture(tmp_path / "twice.sqlite")
    capture.range(0, 100, "a")
    capture.kernel(1000, 1010, capture.call(10, 50))
    capture._correlation -= 1
    capture.call(20, 30, name="cuLaunchKernel")
    (row,) = load(capture.close()).rows()
    assert (row.kernels, row.gpu_sum, row.gpu) == (1, 10, 10)


def test_wal_mode_leaves_no_files_behind(tmp_path: Path) -> None:
    path = small(tmp_path / "wal.sqlite").close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode = WAL")
    database.close()
    before = path.read_bytes()
    assert load(path).rows()[0].calls == 1
    assert [item.name for item in tmp_path.iterdir()] == ["wal.sqlite"]
    assert path.read_bytes() == before


def test_the_capture_is_never_written(tmp_path: Path) -> None:
    path = small(tmp_path / "mine.sqlite").close()
    before = path.read_bytes()
    path.chmod(0o444)
    load(path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["mine.sqlite"]


@pytest.mark.parametrize("table", ["StringIds", "CUPTI_ACTIVITY_KIND_RUNTIME", "CUPTI_ACTIVITY_KIND_KERNEL"])
def test_half_an_export_gives_what_there_is(tmp_path: Path, table: str) -> None:
    capture = small(tmp_path / "half.sqlite")
    capture.database.execute(f"DROP TABLE {table}")
    report = load(capture.close())
    rows = report.rows()
    assert rows[0].cpu == 100
    if table == "StringIds":
        assert rows[0].name.startswith("(text ")
    if table == "CUPTI_ACTIVITY_KIND_RUNTIME":
        assert any("no CUDA API calls" in note for note in report.notes)
        assert [row.gpu for row in rows if row.name == "cannot attribute: no launching call in this recording"] == [10]
    if table == "CUPTI_ACTIVITY_KIND_KERNEL":
        assert not report.has_gpu


def test_a_table_of_an_unknown_layout_is_told(tmp_path: Path) -> None:
    capture = small(tmp_path / "layout.sqlite")
    capture.database.execute("ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL RENAME COLUMN correlationId TO cid")
    report = load(capture.close())
    assert "table CUPTI_ACTIVITY_KIND_KERNEL was not read: it has no column correlationId" in report.notes


def test_a_table_under_another_name_is_found_by_its_columns(tmp_path: Path) -> None:
    capture = small(tmp_path / "renamed.sqlite")
    for table in ("NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME"):
        capture.database.execute(f"ALTER TABLE {table} RENAME TO NEW_{table}")
    (row,) = load(capture.close()).rows()
    assert (row.name, row.gpu) == ("a", 10)


def test_no_ranges_table(tmp_path: Path) -> None:
    capture = small(tmp_path / "none.sqlite")
    capture.database.execute("DROP TABLE NVTX_EVENTS")
    report = load(capture.close())
    assert any("holds no NVTX ranges" in note for note in report.notes)
    assert [row.kind for row in report.rows()] == ["unknown"]


def test_zero_ranges_is_an_answer(tmp_path: Path) -> None:
    report = load(Capture(tmp_path / "zero.sqlite").close())
    assert report.rows() == []
    assert "the capture holds no push/pop range" in report.notes
    assert "no ranges to show" in render_text(report)


def test_open_and_impossible_ranges_are_told(tmp_path: Path) -> None:
    capture = small(tmp_path / "open.sqlite")
    capture.range(150, None, "open")
    capture.range(500, 400, "backwards")
    capture.insert(
        "NVTX_EVENTS", start=300, end=310, eventType=60, globalTid=process(7) | 1, endGlobalTid=process(7) | 2, text="b"
    )
    report = load(capture.close())
    assert {row.name: row.open for row in report.rows()} == {"a": 0, "open": 1}
    text = " ".join(report.notes)
    assert "1 ranges were still open" in text
    assert "1 ranges end before they begin" in text
    assert "1 ranges that end on another thread" in text


def test_texts_that_are_not_utf8(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "latin.sqlite")
    capture.database.execute("INSERT INTO StringIds VALUES (9000, CAST(x'6be4666572' AS TEXT))")
    capture.insert("NVTX_EVENTS", start=1, end=5, eventType=59, globalTid=process(7) | 1, textId=9000)
    capture.database.execute(
        "INSERT INTO NVTX_EVENTS (start, end, eventType, globalTid, text) VALUES (6, 9, 59, ?, CAST(x'ff80' AS TEXT))",
        (process(7) | 1,),
    )
    assert [row.name for row in load(capture.close()).rows()] == ["k\ufffdfer", "\ufffd\ufffd"]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE NVTX_EVENTS SET start = 'soon'",
        "UPDATE NVTX_EVENTS SET end = x'00ff'",
        "UPDATE NVTX_EVENTS SET globalTid = NULL",
        "UPDATE NVTX_EVENTS SET textId = NULL",
        "UPDATE NVTX_EVENTS SET textId = 'x', domainId = 'y', category = 1.5",
        "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = 'x'",
        "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET correlationId = NULL, globalPid = NULL",
        "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET demangledName = NULL, deviceId = 'gpu'",
        "UPDATE CUPTI_ACTIVITY_KIND_RUNTIME SET end = NULL",
        "UPDATE CUPTI_ACTIVITY_KIND_RUNTIME SET globalTid = 'x', correlationId = 'y'",
        "UPDATE NVTX_EVENTS SET start = 9223372036854775807, end = 9223372036854775807",
        "UPDATE NVTX_EVENTS SET start = -9223372036854775808",
        "UPDATE StringIds SET value = NULL",
    ],
)
def test_columns_with_what_cannot_be_there(tmp_path: Path, change: str) -> None:
    capture = small(tmp_path / "odd.sqlite")
    sql = capture.database.execute("SELECT group_concat(name) FROM sqlite_master").fetchone()
    assert sql
    # exports declare NOT NULL, but the damage does not ask
    capture.database.execute("PRAGMA writable_schema = ON")
    capture.database.execute("UPDATE sqlite_master SET sql = replace(sql, 'NOT NULL', '')")
    capture.database.commit()
    capture.database.close()
    database = sqlite3.connect(capture.path)
    database.execute(change)
    database.commit()
    database.close()
    answered(capture.path)


def test_ranges_of_no_thread_are_told(tmp_path: Path) -> None:
    capture = small(tmp_path / "nobody.sqlite")
    capture.insert("NVTX_EVENTS", start=1, end=5, eventType=59, text="nobody's")
    report = load(capture.close())
    assert [row.name for row in report.rows()] == ["a"]
    assert any("do not say which thread" in note for note in report.notes)


def answered(path: Path) -> None:
    """Read and rendered, or refused in one line; anything else is a bug."""
    refusal = ""
    try:
        report = load(path)
        render_text(report, width=100)
        for view in ("module", "kernel", "range", "step"):
            report.rows(by=view)
    except FxnvtxError as error:
        refusal = str(error)
    assert "\n" not in refusal


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.floats(0, 0.9999), st.binary(min_size=1, max_size=40)), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_fuzzed(tmp_path: Path, changes: list[tuple[float, bytes]], keep: float) -> None:
    source = tmp_path / "source.sqlite"
    if not source.exists():
        capture = small(source)
        for index in range(60):
            capture.range(1000 + index * 10, 1009 + index * 10, f"layer.{index}", registered=bool(index % 2))
            capture.kernel(5000 + index * 10, 5008 + index * 10, capture.call(1001 + index * 10, 1005 + index * 10))
        capture.close()
    content = bytearray(source.read_bytes())
    for place, patch in changes:
        at = int(place * len(content))
        content[at : at + len(patch)] = patch
    if keep < 0.2:
        del content[int(len(content) * keep * 5) :]
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(content)
    answered(broken)


@pytest.mark.slow
def test_fuzzed_recordings(tmp_path: Path) -> None:
    """Every value of a recording replaced by every wrong one."""
    row = ["a", "module", 3, 1, 0, 10, 20, False]
    document = {
        "format": "fxnvtx-recording", "version": 1, "meta": {"pid": 5, "classes": {"a": "A"}}, "strays": 0, "marks": [],
        "ranges": [row, ["b", "step", None, 1, 1, 12, 15, False], ["c", "residency", 7, 2, 0, 5, 9, True]],
    }  # fmt: skip
    wrong: list[object] = [None, "x", -1, 2**70, 1.5, [], {}, True]
    path = tmp_path / "recording.json"
    cases = 0
    for place in range(8):
        for value in wrong:
            for which in range(3):
                changed = json.loads(json.dumps(document))
                changed["ranges"][which][place] = value
                path.write_text(json.dumps(changed))
                _answered_everywhere(path, tmp_path)
                cases += 1
    for key in document:
        for value in wrong:
            path.write_text(json.dumps({**document, key: value}))
            _answered_everywhere(path, tmp_path)
            cases += 1
    assert cases == 8 * 8 * 3 + 6 * 8


def _answered_everywhere(path: Path, folder: Path) -> None:
    answered(path)
    for write in (write_chrome, write_speedscope):
        refusal = ""
        try:
            write(path, folder / "out.json")
        except FxnvtxError as error:
            refusal = str(error)
        assert "\n" not in refusal


def test_nsys_rep_without_nsys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.nsys-rep").write_bytes(b"QDSTRM and so on")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="nsys is not on the PATH"):
        load(tmp_path / "x.nsys-rep")


@pytest.mark.nsys
def test_nsys_rep_that_nsys_refuses(tmp_path: Path) -> None:
    if shutil.which("nsys") is None:
        pytest.skip("Nsight Systems is not on the PATH")
    (tmp_path / "x.nsys-rep").write_bytes(b"QDSTRM and so on" * 100)
    with pytest.raises(ToolError, match="nsys could not export"):
        load(tmp_path / "x.nsys-rep")


@pytest.mark.slow
def test_nsys_rep_of_a_newer_nsys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older nsys prints about it, among other lines: the one that says which versions is kept, in one line."""
    script = tmp_path / "nsys"
    script.write_text(
        "#!/bin/sh\necho 'Importer error status: An unknown error occurred.'\n"
        "echo 'The file was created in 2025.3, which is newer than 2023.4.'\necho 'Export failed.'\nexit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "x.nsys-rep").write_bytes(b"QDSTRM")
    with pytest.raises(ToolError) as caught:
        load(tmp_path / "x.nsys-rep")
    text = str(caught.value)
    assert "created in 2025.3, which is newer than 2023.4" in text
    assert str(tmp_path / "x.nsys-rep") in text
    assert "\n" not in text


def test_a_journal_that_was_left_behind(tmp_path: Path) -> None:
    """A program that ended while it wrote leaves half of its changes in the file, and the way back in a journal."""
    path, copy = small(tmp_path / "written.sqlite").close(), tmp_path / "left.sqlite"
    database = sqlite3.connect(path, isolation_level=None)
    database.executescript("PRAGMA journal_mode = DELETE; PRAGMA cache_size = 2; PRAGMA cache_spill = 1; BEGIN")
    database.execute("UPDATE StringIds SET value = value || ?", ("x" * 4000,))
    for number in range(200):
        database.execute("INSERT INTO StringIds (id, value) VALUES (?, ?)", (9000 + number, "y" * 4000))
    shutil.copy(path, copy)
    shutil.copy(f"{path}-journal", f"{copy}-journal")
    database.execute("ROLLBACK")
    database.close()
    before = copy.read_bytes()
    with pytest.raises(CaptureError, match=r"was being written when its program ended \(left\.sqlite-jo"):
        load(copy)
    assert copy.read_bytes() == before
    assert Path(f"{copy}-journal").exists()


@pytest.mark.slow
def test_a_worker_process_reports_the_same_error(tmp_path: Path) -> None:
    good = small(tmp_path / "good.sqlite").close()
    (tmp_path / "bad.sqlite").write_bytes(b"")
    with pytest.raises(CaptureError, match=r"bad\.sqlite is empty"):
        load(good, tmp_path / "bad.sqlite", jobs=2)


def test_reading_needs_no_memory_per_range(tmp_path: Path) -> None:
    """Ten times the ranges and kernels on the same paths: the same memory, with few rows in it at a time."""
    peaks = []
    for count in (4_000, 40_000):
        capture = Capture(tmp_path / f"{count}.sqlite")
        text, at = capture.text("layer"), process(7) | 1
        capture.range(0, count * 10 + 10, "outer")
        capture.database.executemany(
            "INSERT INTO NVTX_EVENTS (start, end, eventType, globalTid, textId, domainId) VALUES (?, ?, 59, ?, ?, 1)",
            ((10 + index * 10, 18 + index * 10, at, text) for index in range(count)),
        )
        capture.database.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, 0, ?, ?, ?, 0, NULL)",
            ((11 + index * 10, 15 + index * 10, at, index, text) for index in range(count)),
        )
        capture.kernel(0, 0, -1, "layer")
        # each overlaps the next one: the case that needs sorting
        capture.database.execute(
            "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL SELECT k.* FROM CUPTI_ACTIVITY_KIND_KERNEL k, NVTX_EVENTS n"
            " WHERE n.textId = ?",
            (text,),
        )
        capture.database.execute(
            "UPDATE CUPTI_ACTIVITY_KIND_KERNEL"
            " SET start = rowid * 10 + 1, end = rowid * 10 + 16, correlationId = rowid - 2"
        )
        path = capture.close()
        code = (
            "import sys, tracemalloc; from pathlib import Path; from fxnvtx.report.capture import read_sqlite\n"
            "from fxnvtx.report.attribution import captures; from fxnvtx.report.attribution.batches import Limits\n"
            "limits = Limits(batch=500, run=2000, window=1000)\n"
            "tracemalloc.start(); (part,) = read_sqlite(Path(sys.argv[1]), limits=limits)\n"
            "print(tracemalloc.get_traced_memory()[1], part.operations, part.tree.root.gpu)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        peak, operations, busy = map(int, done.stdout.split())
        assert operations == count + 1
        assert busy == count * 10 + 15
        peaks.append(peak)
    assert peaks[1] < peaks[0] * 1.3 + 100_000, peaks


@pytest.mark.slow
def test_damaged_files_of_every_kind_through_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of the cases that `python -m tests.report.mutated` makes by the thousand."""
    said: list[str] = []
    assert mutated.run(cases=72, seed=1, folder=tmp_path, say=said.append) == 0, said

    def broken(*_: object, **__: object) -> None:
        raise ValueError("something of ours")

    monkeypatch.setattr(commands, "load", broken)
    assert mutated.run(cases=4, seed=1, folder=tmp_path / "again", say=said.append) > 0, "it would have been seen"
    assert "something of ours" in said[0]


def test_every_kind_of_file_goes_through_every_command(tmp_path: Path) -> None:
    """Nothing is read by one command and refused by the next; only a copy without names knows no traces."""
    good, *others = files = mutated.sources(tmp_path)
    assert {kind_of(path) for path in files} == {"sqlite", "recording", "spool", "trace"}
    for path in [*others, good]:
        for command in mutated.COMMANDS:
            words = [word.replace("FILE", str(path)).replace("GOOD", str(good)) for word in command]
            words = [str(tmp_path / word) if word.startswith("OUT.") else word for word in words]
            done = CliRunner().invoke(cli, words)
            refused = kind_of(path) == "trace" and "--scrub" in words
            nothing = "no " in done.output and "--steps" in words  # a file without requests or steps
            assert done.exit_code == int(refused) or nothing, (words, done.output)
