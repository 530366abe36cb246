"""Any text is a label, and one text is one label."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxnvtx
from fxnvtx.errors import FxnvtxError, LabelError
from fxnvtx.ranges import CATEGORIES, label
from fxnvtx.ranges import labels as _labels

from .tools import labels


@pytest.mark.slow
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


def test_a_class_goes_with_the_module_that_was_called():
    """Two models without a name may call modules of different classes the same."""
    linear, conv = nn.ModuleDict({"proj": nn.Linear(2, 2)}), nn.ModuleDict({"proj": nn.Conv1d(2, 2, 1)})
    for model in (linear, conv):
        fxnvtx.instrument(model, path="hooks")
    recordings = []
    for called in ([linear], [conv], [linear, conv]):
        with fxnvtx.record() as recording:
            for model in called:
                model["proj"](torch.zeros(2, 2))
        recordings.append(recording.meta["classes"])
    assert [r["proj"] for r in recordings] == ["Linear", "Conv1d", "Conv1d | Linear"]


@pytest.mark.parametrize("path", ["hooks", "auto"])
def test_a_class_is_known_on_every_path(path):
    model = fxnvtx.instrument(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.GELU())), "m", path=path)
    with fxnvtx.record() as recording:
        model(torch.zeros(2, 2))
        model[0] = nn.Sequential(nn.Linear(2, 2))
        model(torch.zeros(2, 2))
    assert recording.meta["classes"] == {
        "m": "Sequential", "m.0": "Linear | Sequential", "m.0.0": "Linear", "m.1": "Sequential", "m.1.0": "GELU",
    }  # fmt: skip


def test_labels_of_modules_go_with_their_model():
    living = _labels._living
    gc.collect()
    before = len(living)
    with fxnvtx.record():
        for number in range(3):
            model = fxnvtx.instrument(nn.Sequential(*(nn.Linear(2, 2) for _ in range(50))), f"unheard-of {number}")
            model(torch.zeros(1, 2))
            assert len(living) > before + 50
            del model
    assert len(living) <= before + 50  # what a recorder saw last may still be on its way out
    gc.collect()
    assert len(living) == before


def test_labels_of_blocks_are_kept_up_to_a_number():
    for number in range(_labels.KEPT + 10):
        with fxnvtx.range(f"once {number}"):
            pass
    assert len(_labels._kept) == _labels.KEPT
    kept = _labels.label("held")
    for number in range(_labels.KEPT):
        _labels.label(f"twice {number}")
    assert _labels.label("held") is kept
