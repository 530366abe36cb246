"""Exports of nsys as Arrow and Parquet tables, and recordings as tables of pandas."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nanoarrow
import pytest
from click.testing import CliRunner
from nanoarrow.c_array_stream import CArrayStream
from nanoarrow.ipc import StreamWriter

from fxnvtx.cli import cli
from fxnvtx.errors import CaptureError, FxnvtxError, ToolError
from fxnvtx.recording import Range
from fxnvtx.report import load, render_csv

from ..support.nsys import with_capture
from .captures import DATA
from .samples import pipeline, recorded


def arrow_folder(source: Path, folder: Path) -> Path:
    """A capture's tables as `nsys export --type=arrowdir` writes them: a stream of record batches each."""
    folder.mkdir()
    for table, _schema, array in arrow_tables(source):
        with StreamWriter.from_path(str(folder / f"{table}.arrow")) as writer:
            writer.write_stream(array)
    return folder


def arrow_file(source: Path, path: Path) -> Path:
    """The same as `--type=arrow` writes it: one stream after the other, which say whose they are."""
    with open(path, "wb") as file:
        for table, schema, array in arrow_tables(source):
            named = nanoarrow.c_schema(schema).modify(metadata={"table_name": table, "table_desc": "a table"})
            with StreamWriter.from_writable(file) as writer:
                writer.write_stream(CArrayStream.from_c_arrays([array], named, validate=False))
    return path


def arrow_tables(source: Path) -> Iterator[tuple[str, Any, Any]]:
    database = sqlite3.connect(source)
    for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        described = database.execute(f'PRAGMA table_info("{table}")').fetchall()
        rows = database.execute(f'SELECT * FROM "{table}"').fetchall()
        if not rows or table == "sqlite_sequence":
            continue
        kinds = {"TEXT": nanoarrow.string(), "REAL": nanoarrow.float64()}
        schema = nanoarrow.struct({row[1]: kinds.get(row[2], nanoarrow.int64()) for row in described})
        columns = [
            nanoarrow.c_array([row[index] for row in rows], schema.field(index)) for index in range(len(described))
        ]
        yield table, schema, nanoarrow.c_array_from_buffers(schema, len(rows), [None], children=columns)
    database.close()


@pytest.mark.parametrize("made", [arrow_folder, arrow_file])
def test_arrow_tables_say_what_the_capture_does(tmp_path: Path, made: Callable[[Path, Path], Path]) -> None:
    capture = pipeline(tmp_path / "c.sqlite").close()
    folder = made(capture, tmp_path / "exported")
    assert render_csv(load(folder)) == render_csv(load(capture))
    for words in (
        ["report", str(folder)],
        ["report", str(folder), "-o", str(tmp_path / "x.html")],
        ["report", str(folder), "-o", str(tmp_path / "x.chrome.json")],
        ["report", str(folder), "--scrub", "-o", str(tmp_path / "scrubbed.sqlite")],
        ["diff", str(folder), str(capture)],
    ):
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, (words, done.output)
    assert render_csv(load(tmp_path / "scrubbed.sqlite")) == render_csv(load(capture))


@pytest.mark.nsys
def test_what_nsys_itself_exports(tmp_path: Path) -> None:
    """The same report, with its numbers, from all of nsys' types that are read."""
    if shutil.which("nsys") is None:
        pytest.skip("Nsight Systems is not on the PATH")
    script = "import fxnvtx\nwith fxnvtx.range('request#0', category='request'):\n    fxnvtx.range('net')(len)('')\n"
    (tmp_path / "app.py").write_text(script)
    command = ["nsys", "profile", "-t", "nvtx", "-s", "none", "--cpuctxsw", "none", "-o", str(tmp_path / "c")]
    command += [sys.executable, str(tmp_path / "app.py")]
    with_capture(lambda: subprocess.run(command, capture_output=True, timeout=120), tmp_path / "c.nsys-rep")
    for kind in ("sqlite", "arrow", "arrowdir", "parquetdir"):
        export = ["nsys", "export", "-t", kind, "-o", str(tmp_path / f"{kind}.{kind}"), str(tmp_path / "c.nsys-rep")]
        subprocess.run(export, check=True, capture_output=True, timeout=120)
    expected = load(tmp_path / "sqlite.sqlite").rows()
    assert [row.name for row in expected] == ["request#0", "net"]
    for name in ("arrowdir.arrowdir", "arrow.arrow"):
        found = load(tmp_path / name).rows()
        assert [(row.path, row.calls, row.cpu) for row in found] == [(row.path, row.calls, row.cpu) for row in expected]
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        with pytest.raises(CaptureError, match="pip install pyarrow"):
            load(tmp_path / "parquetdir.parquetdir")
    else:
        found = load(tmp_path / "parquetdir.parquetdir").rows()
        assert [(row.path, row.cpu) for row in found] == [(row.path, row.cpu) for row in expected]


def damaged(content: bytes, rng: random.Random, cut: bool, first: int = 0) -> bytes:
    """Cut off, or with eight other bytes, somewhere from `first` on."""
    at = rng.randrange(first, len(content))
    return content[:at] if cut else content[:at] + rng.randbytes(8) + content[at + 8 :]


def answers_or_one_line(path: Path) -> bool:
    """Whether what lies there is read; what is refused is refused in one line."""
    said = None
    try:
        load(path)
    except FxnvtxError as error:
        said = str(error)
    assert "\n" not in (said or "")
    return said is None


@pytest.mark.slow
def test_damaged_tables_are_one_line(tmp_path: Path) -> None:
    folder = arrow_folder(DATA / "mfu_2gpu_slice.sqlite", tmp_path / "exported")
    broken = tmp_path / "broken"
    answers = 0
    for case in range(40):
        rng = random.Random(case)
        shutil.copytree(folder, broken, dirs_exist_ok=True)
        path = broken / rng.choice(sorted(item.name for item in broken.iterdir()))
        path.write_bytes(damaged(path.read_bytes(), rng, cut=bool(case % 2)))
        answers += answers_or_one_line(broken)
    assert answers < 40, "some are refused"


def test_a_damaged_file_of_tables_is_one_line(tmp_path: Path) -> None:
    whole = arrow_file(pipeline(tmp_path / "c.sqlite").close(), tmp_path / "whole").read_bytes()
    path = tmp_path / "broken"
    answers = 0
    for case in range(40):
        path.write_bytes(damaged(whole, random.Random(case), cut=bool(case % 2), first=4))
        answers += answers_or_one_line(path)
    assert answers < 40, "some are refused"
    path.write_bytes(whole[:4])
    with pytest.raises(FxnvtxError):
        load(path)


def test_an_empty_table_is_said(tmp_path: Path) -> None:
    (tmp_path / "StringIds.arrow").write_bytes(b"")
    with pytest.raises(CaptureError, match=r"StringIds\.arrow is damaged \(it is empty\)"):
        load(tmp_path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "NVTX_EVENTS.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CaptureError, match="pip install pyarrow") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_recording_as_a_table_of_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = recorded(
        [Range("request#0", "request", 3, 1, 0, 2**60, 2**60 + 9), Range("net", "module", None, 1, 1, 2**60 + 1, None)]
    )
    try:
        import pandas  # noqa: F401
    except ImportError:
        with pytest.raises(ToolError, match="pip install pandas"):
            recording.to_pandas()
        return
    frame = recording.to_pandas()
    assert list(frame["label"]) == ["request#0", "net"]
    assert frame["duration_ns"][0] == 9
    assert frame["start_ns"][0] == 2**60
    assert frame["end_ns"].isna().tolist() == [False, True]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ToolError, match="pip install pandas"):
        recording.to_pandas()
