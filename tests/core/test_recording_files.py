"""What save() writes, load() gives back; what is no recording is refused in one line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fxnvtx
from fxnvtx.errors import CaptureError, FxnvtxError, OutputError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
program = st.lists(
    st.tuples(
        st.sampled_from(["push", "pop", "stray", "mark"]),
        st.text(max_size=6),
        st.sampled_from(["step", "x"]),
        json_values,
    ),
    max_size=20,
)


@settings(max_examples=60)
@given(program)
def test_round_trip(steps):
    from fxnvtx.ranges import label, local, mark_now

    with fxnvtx.record() as recording:
        recording.meta["note"] = "ü"
        for step, text, category, payload in steps:
            if step == "push":
                fxnvtx.range_push(text, category=category, payload=payload)
            elif step == "mark":
                mark_now(label(text, category), payload)
            else:
                fxnvtx.range_pop()
    with tempfile.TemporaryDirectory() as folder:
        path = recording.save(Path(folder) / "r.json")
        back = fxnvtx.Recording.load(path)
        assert [p.name for p in Path(folder).iterdir()] == ["r.json"]
    assert back.ranges == recording.ranges
    assert back.marks == recording.marks
    assert back.tree() == recording.tree()
    assert (back.meta, back.strays, back.balanced) == (recording.meta, recording.strays, recording.balanced)
    local.unnamed = []
    del local.stack[:]


@pytest.mark.parametrize("payload", [object(), {("a", "b"): 1}, {1, 2}, b"x", 1j, float("inf"), [object()], "\ud800"])
def test_any_payload_can_be_saved(tmp_path, payload):
    with fxnvtx.record() as recording, fxnvtx.range("r", payload=payload), fxnvtx.range("inner"):
        pass
    back = fxnvtx.Recording.load(recording.save(tmp_path / "r.json"))
    assert [r.label for r in back.ranges] == ["r", "inner"]


def test_a_payload_that_contains_itself(tmp_path):
    payload: list[Any] = []
    payload.append(payload)
    with fxnvtx.record() as recording, fxnvtx.range("r", payload=payload):
        pass
    assert [r.label for r in fxnvtx.Recording.load(recording.save(tmp_path / "r.json")).ranges] == ["r"]


def good():
    with fxnvtx.record() as recording, fxnvtx.range("a"), fxnvtx.range("b"):
        pass
    return recording


def one_line(error):
    assert isinstance(error, FxnvtxError)
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"x"', "{}", '{"format": "other"}', "[" * 100_000, '{"format": "fxnvtx-recording"}'],
)
def test_files_that_are_no_recordings(tmp_path, text):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(CaptureError) as caught:
        fxnvtx.Recording.load(path)
    assert "file" in one_line(caught.value)


def test_binary_and_missing_files_and_folders(tmp_path):
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00SQLite")
    for path in (tmp_path / "b", tmp_path / "missing", tmp_path):
        with pytest.raises(CaptureError) as caught:
            fxnvtx.Recording.load(path)
        one_line(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 99),
        ("meta", None),
        ("meta", [1]),
        ("strays", None),
        ("strays", 1e999),
        ("ranges", None),
        ("ranges", {}),
        ("ranges", [[]]),
        ("ranges", [["a"]]),
        ("ranges", [5]),
        ("ranges", ["abcdefgh"]),
        ("ranges", [[1, "c", None, 1, 0, 1, 2, False]]),
        ("ranges", [["a", "c", None, 1, "0", 1, 2, False]]),
        ("ranges", [["a", "c", None, 1, -3, 1, 2, False]]),
        ("ranges", [["a", "c", None, 1, 0, "1", 2, False]]),
        ("ranges", [["a", "c", None, 1, 0, 1, "2", False]]),
        ("ranges", [["a", "c", None, 1, 0, 1, 2, False, 9]]),
        ("marks", None),
        ("marks", [["m", "c", None, 1, "t"]]),
        ("marks", [["m"]]),
    ],
)
def test_damaged_recordings(tmp_path, key, value):
    path = good().save(tmp_path / "r.json")
    document = json.loads(path.read_text())
    document[key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(CaptureError) as caught:
        fxnvtx.Recording.load(path)
    assert "r.json" in one_line(caught.value)


@settings(max_examples=60)
@given(st.data())
def test_any_truncation_is_an_error_of_ours(data):
    with tempfile.TemporaryDirectory() as folder:
        path = good().save(Path(folder) / "r.json")
        text = path.read_text()
        path.write_text(text[: data.draw(st.integers(0, len(text) - 1))])
        with pytest.raises(CaptureError):
            fxnvtx.Recording.load(path)


@pytest.mark.slow
@settings(max_examples=100)
@given(st.data())
def test_a_recording_with_any_value_replaced_loads_whole_or_is_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        path = good().save(Path(folder) / "r.json")
        document = json.loads(path.read_text())
        row = data.draw(st.sampled_from(document["ranges"]))
        row[data.draw(st.integers(0, 7))] = data.draw(json_values)
        path.write_text(json.dumps(document))
        try:
            back = fxnvtx.Recording.load(path)
        except CaptureError:
            return
        assert sum(1 for root in back.tree() for _ in root.walk()) == 2  # usable to the end
        assert back.balanced in {True, False}


def test_unwritable_targets(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "r.json", tmp_path / "file" / "r.json", tmp_path / "folder", "", "/"):
        with pytest.raises(OutputError) as caught:
            good().save(path)
        one_line(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_save_replaces_an_older_file_whole(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("x" * 1_000_000)
    assert good().save(str(path)) == path
    assert len(fxnvtx.Recording.load(str(path)).ranges) == 2
