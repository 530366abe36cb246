"""Any text is a label, and one text is one label."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fxnvtx
from fxnvtx.errors import FxnvtxError, LabelError
from fxnvtx.ranges import CATEGORIES, label

from .tools import labels


@given(st.text(max_size=40))
def test_every_text_is_recorded_and_readable(text):
    with fxnvtx.record() as recording, fxnvtx.range(text):
        pass
    (only,) = recording.ranges
    assert "\0" not in only.label
    assert only.label.encode("utf-8").decode("utf-8") == only.label
    if "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text):
        assert only.label == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("step {i} of {n}", "step {i} of {n}"),
        ("{", "{"),
        ("%s %d", "%s %d"),
        ("層・Ω🜁", "層・Ω🜁"),
        ("a\0b", "a\\0b"),
        ("\ud800", "\\ud800"),
        ("", ""),
        ("x" * 70_000, "x" * 70_000),
        ("two\nlines", "two\nlines"),
    ],
)
def test_awkward_labels(text, shown):
    with fxnvtx.record() as recording:
        with fxnvtx.range(text):
            pass
        fxnvtx.range(text)(lambda: None)()
        fxnvtx.range_push(text)
        fxnvtx.range_pop()
        with fxnvtx.maybe_nvtx_range(text):
            pass
    assert labels(recording) == [shown] * 4
    assert recording.balanced


def test_one_text_is_one_label_and_survives_pickle():
    first = label("block", "module")
    assert label("block", "module") is first
    assert label("block") is first  # "module" is the default category
    assert label("block", "stage") is not first
    assert pickle.loads(pickle.dumps(first)) is first


@pytest.mark.parametrize("bad", [None, 3, b"bytes", ["a"], object()])
def test_a_label_that_is_no_text_is_refused_in_one_line(bad):
    for make in (fxnvtx.range, fxnvtx.range_push, fxnvtx.maybe_nvtx_range, label):
        with pytest.raises(LabelError) as caught:
            make(bad)
        assert isinstance(caught.value, FxnvtxError)
        assert "\n" not in str(caught.value)
        assert "str" in str(caught.value)


@pytest.mark.parametrize("bad", [{"category": 3}, {"category": ["step"]}, {"color": "red"}, {"color": [1]}])
def test_options_of_the_wrong_type_are_refused(bad):
    with pytest.raises(LabelError) as caught:
        fxnvtx.range("r", **bad)
    assert next(iter(bad)) in str(caught.value)
    with fxnvtx.record() as recording, fxnvtx.range("r", color=-1), fxnvtx.range("r", color=2**40):
        pass
    assert recording.balanced


def test_categories_and_payloads_reach_the_recording():
    with fxnvtx.record() as recording:
        for category in CATEGORIES:
            with fxnvtx.range("r", category=category, payload={"n": 1}):
                pass
    assert [r.category for r in recording.ranges] == list(CATEGORIES)
    assert all(r.payload == {"n": 1} for r in recording.ranges)
    with fxnvtx.record() as recording, fxnvtx.range("r", category="mine", payload=2.5, color=0xFF00FF00):
        pass
    assert (recording.ranges[0].category, recording.ranges[0].payload) == ("mine", 2.5)
