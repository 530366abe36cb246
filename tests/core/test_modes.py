"""FXNVTX=auto|on|off, and the one line that says why nothing was emitted."""

from __future__ import annotations

import pytest

from .tools import in_process

PROGRAM = """
import sys, logging
logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
import torch, fxnvtx
model = fxnvtx.instrument(torch.nn.Sequential(torch.nn.Linear(2, 2)))
{body}
print("listening", fxnvtx.ranges.listening())
"""
RUN = "model(torch.zeros(1, 2))"
RECORD = """
with fxnvtx.record() as recording:
    model(torch.zeros(1, 2))
print("ranges", len(recording.ranges))
"""


INSIDE = """
def f():
    fxnvtx.instrument(torch.nn.Linear(1, 1))
fxnvtx.uninstrument(model)
f()
"""
NOT_CALLED = """
for _ in range(2):
    with fxnvtx.record():
        pass
"""


def lines(done):
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1], [line for line in done.stderr.splitlines() if line.startswith("fxnvtx")]


@pytest.mark.parametrize(
    ("mode", "body", "printed", "told"),
    [
        ("auto", RUN, ["listening False"], ["2 modules", "no NVTX tool is attached"]),
        ("auto", RECORD, ["ranges 2", "listening False"], None),
        ("on", RUN, ["listening True"], None),
        ("ON ", RECORD, ["ranges 2", "listening True"], None),
        ("off", RECORD, ["ranges 0", "listening False"], ["FXNVTX=off"]),
        ("nonsense", RECORD, ["ranges 2", "listening False"], ["nonsense", "auto, on or off"]),
        ("auto", NOT_CALLED, ["listening False"], ["was called"]),
        ("auto", "fxnvtx.set_enabled(model, False)" + RECORD, ["ranges 0", "listening False"], ["switched off"]),
        ("auto", INSIDE, ["listening False"],
         ["1 modules", "no NVTX tool"]),
        ("auto", "fxnvtx.uninstrument(model)", ["listening False"], None),
    ],
)  # fmt: skip
def test_modes(mode, body, printed, told):
    out, err = lines(in_process(PROGRAM.replace("{body}", body), FXNVTX=mode))
    assert out == printed
    if told is None:
        assert err == []
    else:
        assert len([line for line in err if told[-1] in line]) == 1, err
        assert all(any(word in line for line in err) for word in told), err


def test_importing_is_quiet_and_light():
    done = in_process(
        """
        import sys, warnings
        warnings.simplefilter("error")
        import fxnvtx
        heavy = [m for m in ("torch._dynamo", "torch._inductor", "diffusers", "transformers") if m in sys.modules]
        assert not heavy, heavy
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
