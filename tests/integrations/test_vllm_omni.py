"""vLLM-Omni's plugin: nothing without its variable, every model's layers with it. The entry point as it is declared."""

from __future__ import annotations

import configparser
import json
from pathlib import Path

import pytest

from ..core.tools import in_process

GROUP = "vllm_omni.general_plugins"

# as vLLM-Omni's pipelines are: modules that own the models and are entered through forward()
PROGRAM = """
import json, os, sys
os.environ.update({environment})
from importlib.metadata import EntryPoint
register = EntryPoint("fxnvtx", {value!r}, {group!r}).load()
register()
register()
early = "torch" in sys.modules
import fxnvtx, torch
from torch import nn

class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

class Pipeline(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = Transformer()
        self.vae = Transformer()
    def forward(self, x):
        return self.vae(self.transformer(x))

with fxnvtx.record() as recording:
    Pipeline().forward(torch.ones(1, 4))
print(json.dumps([early, [(r.depth, r.label) for r in recording.ranges]]))
"""


@pytest.mark.parametrize(
    ("environment", "depth"),
    [({}, None), ({"FXNVTX_VLLM_OMNI": "0"}, None), ({"FXNVTX_VLLM_OMNI": "1"}, 2),
     ({"FXNVTX_VLLM_OMNI": "1", "FXNVTX_VLLM_OMNI_DEPTH": "1"}, 1)],
)  # fmt: skip
def test_the_plugin(environment: dict[str, str], depth: int | None) -> None:
    declared = configparser.ConfigParser()
    declared.read(Path(__file__).parents[2] / "setup.cfg")
    _, _, value = declared["options.entry_points"][GROUP].strip().partition(" = ")
    code = PROGRAM.format(environment=environment, value=value, group=GROUP)
    done = in_process(code)
    assert done.returncode == 0, done.stderr
    early, found = json.loads(done.stdout.splitlines()[-1])
    wanted = []
    for model in ("transformer", "vae"):
        wanted += [(0, model), *((1, f"{model}.blocks.{i}") for i in range(2))]
    if depth is None:
        assert not early, "switched off, it imports nothing"
        wanted = []
    assert [(level, label) for level, label in found] == [item for item in wanted if depth != 1 or not item[0]]
