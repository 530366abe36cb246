"""What the eager path relies on: code that Dynamo does not see, and knowing whether Dynamo is watching."""

from __future__ import annotations

import subprocess
import sys

import torch

from fxnvtx.compile.torch_private import dynamo_active, hide_from_dynamo

from ..support.limits import CHILD_S


def _compiled_frames(function, *args):
    """The code names that Dynamo compiled while `function` ran under it."""
    seen: list[str] = []

    def spy(graph_module, example_inputs):
        seen.append("graph")
        return graph_module.forward

    torch._dynamo.reset()
    result = torch.compile(function, backend=spy)(*args)
    return seen, result


def test_hidden_code_runs_natively_and_what_it_calls_is_compiled():
    def below(x):
        return x * 2

    active: list[bool] = []

    def watched(x):
        active.append(dynamo_active())
        return below(x) + 1

    hide_from_dynamo(watched.__code__)
    seen, result = _compiled_frames(watched, torch.ones(2))
    assert result.tolist() == [3.0, 3.0]
    assert active == [True]  # it was executed, not traced
    assert seen == ["graph"]  # `below` alone


def test_visible_code_is_traced():
    def plain(x):
        return x * 2 + 1

    seen, _ = _compiled_frames(plain, torch.ones(2))
    assert seen == ["graph"]
    assert dynamo_active() is False


def test_neither_question_loads_dynamo():
    script = (
        "import sys, types\n"
        "from fxnvtx.compile.torch_private import dynamo_active, hide_from_dynamo\n"
        "hide_from_dynamo((lambda: None).__code__)\n"
        "assert dynamo_active() is False\n"
        "assert 'torch._dynamo' not in sys.modules and 'torch._inductor' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=CHILD_S)
    assert done.returncode == 0, done.stderr
