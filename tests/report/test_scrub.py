"""A scrubbed copy holds the ranges and nothing about who made them where."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxnvtx.errors import CaptureError, OutputError
from fxnvtx.recording import Recording
from fxnvtx.report import load, scrub

from .captures import Capture
from .samples import pipeline

SECRETS = (
    "HF_TOKEN=hf_abcdef123456",
    "gpu-box-17.corp.example",
    "alice",
    "/home/alice/model.py",
    "python train.py --key s3cr3t",
)


def with_secrets(path: Path) -> Path:
    capture: Capture = pipeline(path, version="2026_2")
    capture.insert("TARGET_INFO_SYSTEM_ENV", devStateName="x", name="EnvVars", nameEnum=1, value=SECRETS[0])
    capture.insert("META_DATA_EXPORT", name="EXPORT_HOST", value=SECRETS[1])
    capture.insert("META_DATA_EXPORT", name="EXPORT_USER", value=SECRETS[2])
    capture.insert("META_DATA_EXPORT", name="EXPORT_SCHEMA_VERSION", value="3.25.0")
    capture.insert("PROCESSES", globalPid=(1 << 48) | (7 << 24), pid=7, name=SECRETS[3])
    capture.insert("ThreadNames", nameId=capture.text(SECRETS[4]), globalTid=5)
    capture.insert("ANALYSIS_FILE", filename=SECRETS[3], contentId=capture.text("printed " + SECRETS[0]), globalPid=0)
    # what the next version of nsys may bring
    capture.database.execute("CREATE TABLE TARGET_INFO_NEW_IN_2031 (value TEXT)")
    capture.database.execute("INSERT INTO TARGET_INFO_NEW_IN_2031 VALUES (?)", (SECRETS[1],))
    # SQLite keeps what was deleted until its page is used again
    capture.database.execute("CREATE TABLE gone AS SELECT ? AS value", (SECRETS[4] * 50,))
    capture.database.execute("DROP TABLE gone")
    return capture.close()


def test_nothing_secret_is_left(tmp_path: Path) -> None:
    path = with_secrets(tmp_path / "capture.sqlite")
    whole = path.read_bytes()
    assert all(secret.encode() in whole for secret in SECRETS), "the test must start from a capture that has them"
    copy = scrub(path, tmp_path / "copy.sqlite")
    left = copy.read_bytes()
    assert [secret for secret in SECRETS if secret.encode() in left] == []
    assert path.read_bytes() == whole


def test_the_report_stays_the_same(tmp_path: Path) -> None:
    path = with_secrets(tmp_path / "capture.sqlite")
    copy = scrub(path, tmp_path / "copy.sqlite")
    for view in ("tree", "kernel", "step"):
        assert load(copy).rows(by=view) == load(path).rows(by=view)


def test_recordings(tmp_path: Path) -> None:
    recording = Recording()
    recording.meta = {"pid": 7, "clock": "perf_counter_ns", "rank": 3, "host": SECRETS[1], "argv": SECRETS[4]}
    recording.stop()
    recording.save(tmp_path / "recording.json")
    copy = scrub(tmp_path / "recording.json", tmp_path / "copy.json")
    meta = Recording.load(copy).meta
    assert set(meta) <= {"pid", "clock", "rank", "classes"}
    assert (meta["pid"], meta["rank"]) == (7, 3)
    assert load(copy).parts[0].rank == 3


def test_what_cannot_be_done(tmp_path: Path) -> None:
    path = with_secrets(tmp_path / "capture.sqlite")
    with pytest.raises(OutputError, match="is what is being read"):
        scrub(path, path)
    with pytest.raises(OutputError, match="cannot write"):
        scrub(path, tmp_path / "none" / "copy.sqlite")
    (tmp_path / "text.sqlite").write_text("no capture")
    with pytest.raises(CaptureError, match="neither an SQLite export"):
        scrub(tmp_path / "text.sqlite", tmp_path / "copy.sqlite")
    assert not [item for item in tmp_path.iterdir() if "copy" in item.name or item.name.endswith(".part")]
