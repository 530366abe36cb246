"""Windows of steps and the labels of steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxnvtx.errors import ConfigError
from fxnvtx.pipeline.args import ServerArgs
from fxnvtx.pipeline.stages import step_label


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), min_size=1, max_size=5))
def test_a_window_holds_exactly_its_steps(parts):
    text = ", ".join(f"{a}-{a + n}" if n else str(a) for a, n in parts)
    wanted = {s for a, n in parts for s in range(a, a + n + 1)}
    windows = ServerArgs(nvtx_steps=text).step_windows()
    assert {s for s in range(60) if s in windows} == wanted


@pytest.mark.parametrize("text", [None, "", "  "])
def test_no_window_means_every_step(text):
    assert all(step in ServerArgs(nvtx_steps=text).step_windows() for step in range(5))


@pytest.mark.parametrize("text", ["5-2", "a", "-1", "1,,2", "1-2-3", 4, ["4"]])
def test_nonsense_is_refused(text):
    with pytest.raises(ConfigError, match="nvtx_steps"):
        ServerArgs(nvtx_steps=text)


def test_labels_are_made_once():
    assert step_label(3, 500.0) is step_label(3, 500.0)
    assert step_label(3, 500.0).text == "denoising_step_3_t500"
    assert step_label(0, 999.25).text == "denoising_step_0_t999.2"
    assert step_label(0, 1).category == "step"
