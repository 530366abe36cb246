"""Every mistake a user can make with the core is told in one line, by our own type, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import fxnvtx
from fxnvtx import errors
from fxnvtx.errors import FxnvtxError, InstrumentError, SelectionError, TraceError
from fxnvtx.modules.registry import controls, controls_of

from . import zoo
from .test_soundness_forms import x
from .tools import labels, run_recorded


def told(kind, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) > 20
    return text


@pytest.mark.parametrize("bad", ["not a module", None, 3, nn.Linear, [nn.Linear(1, 1)], torch.zeros(1), lambda x: x])
def test_not_a_module(bad):
    for function in (fxnvtx.instrument, fxnvtx.uninstrument):
        assert "torch.nn.Module" in told(InstrumentError, function, bad)
    told(InstrumentError, fxnvtx.set_enabled, bad, True)
    told(InstrumentError, fxnvtx.insert_ranges, bad)


@pytest.mark.parametrize("path", ["", "FX", "hook", None, 3, ["fx"], ("auto",)])
def test_an_unknown_path(path):
    model = zoo.Straight()
    text = told(InstrumentError, fxnvtx.instrument, model, path=path)
    assert "'auto'" in text
    assert "'hooks'" in text
    assert controls_of(model) is None


@pytest.mark.parametrize("name", [3, b"n", ["n"], nn.Linear(1, 1)])
def test_a_name_that_is_no_text(name):
    told(InstrumentError, fxnvtx.instrument, zoo.Straight(), name)


@pytest.mark.parametrize("kind", zoo.REFUSED, ids=lambda k: k.__name__)
def test_path_fx_on_an_untraceable_model(kind):
    model = nn.Sequential(nn.Linear(4, 4), kind())
    before = len(controls())
    text = told(TraceError, fxnvtx.instrument, model, "net", path="fx")
    assert "net.1" in text
    assert kind.__name__ in text
    assert 'path="auto"' in text
    assert len(controls()) == before
    assert run_recorded(model, x())[1].ranges == []


def test_a_failed_instrument_leaves_the_earlier_one():
    model = fxnvtx.instrument(zoo.Decides(), "mine")
    told(TraceError, fxnvtx.instrument, model, "other", path="fx")
    told(SelectionError, fxnvtx.instrument, model, "other", include="nope")
    assert labels(run_recorded(model, x())[1])[0] == "mine"


def test_switching_what_is_not_instrumented():
    for model in (
        zoo.Straight(),
        fxnvtx.uninstrument(fxnvtx.instrument(zoo.Straight())),
        fx.symbolic_trace(zoo.Straight()),
    ):
        assert "fxnvtx.instrument(model)" in told(InstrumentError, fxnvtx.set_enabled, model, True)
    fxnvtx.uninstrument(zoo.Straight())  # nothing to take out is no mistake


def test_every_error_is_ours_and_fits_its_builtin():
    builtin = {
        errors.LabelError: TypeError,
        InstrumentError: TypeError,
        SelectionError: ValueError,
        TraceError: RuntimeError,
        errors.CaptureError: RuntimeError,
        errors.OutputError: OSError,
    }
    for kind, base in builtin.items():
        assert issubclass(kind, FxnvtxError)
        assert issubclass(kind, base)


def test_a_model_that_cannot_be_run_is_still_instrumented():
    class Broken(nn.Module):
        def forward(self, x):
            return self.nothing(x)  # type: ignore[operator]

    model = fxnvtx.instrument(nn.Sequential(Broken(), zoo.Straight()))
    result, recording = run_recorded(model, x())
    assert result == ("error", AttributeError)
    assert labels(recording) == ["Sequential", "0"]
    assert recording.balanced


def test_a_model_without_forward():
    class Nothing(nn.Module):
        pass

    for model in (Nothing(), nn.ModuleList([nn.Linear(1, 1)])):
        fxnvtx.instrument(model)
        assert run_recorded(model, x())[0] == ("error", NotImplementedError)
        fxnvtx.uninstrument(model)
