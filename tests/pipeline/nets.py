"""Small components and stages for the tests of the runtime."""

from typing import Any

import torch
from torch import nn

from fxnvtx.pipeline import Batch, ComponentUse, ComposedPipeline, PipelineStage, ServerArgs

LAYERS = ServerArgs(enable_layerwise_nvtx_marker=True)
STAGES = ServerArgs(enable_stage_nvtx_marker=True)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return x + self.fc(self.norm(x))


class Net(nn.Module):
    """Embedding, blocks, head; encode and decode besides forward; a buffer that is no parameter."""

    def __init__(self, width=8, depth=3, seed=0):
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks: Any = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, width)
        self.register_buffer("shift", torch.ones(width), persistent=False)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def encode(self, x):
        return self.embed(x)

    def decode(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.shift

    def forward(self, x):
        return self.decode(self.encode(x))


class Uses(PipelineStage):
    """A stage that calls `work(stage, batch, components...)` with the components it declares."""

    def __init__(self, work, *uses):
        self.work = work
        self.uses = [u if isinstance(u, ComponentUse) else ComponentUse(u) for u in uses]

    def component_uses(self, args, stage_name):
        return self.uses

    def forward(self, batch, args):
        self.work(self, batch)
        return batch


def calls(name="net", phase=None):
    """A stage that calls component `name` once."""

    def work(stage, batch):
        with stage.use_component(name, phase) as net:
            batch.latent = net(batch.latent if batch.latent is not None else torch.ones(2, 8))

    return Uses(work, ComponentUse(name, phase))


def pipeline_of(components, stages, args=None, kinds=()):
    """A pipeline of named components and stages."""
    pipeline = ComposedPipeline(args or LAYERS)
    for name, module in components.items():
        pipeline.add_component(name, module, dict(kinds).get(name, "other"))
    for name, stage in stages.items():
        pipeline.add_stage(name, stage)
    return pipeline


def labels(recording, category=None):
    """All labels in order of their starts."""
    return [r.label for r in recording.ranges if category is None or r.category == category]


def shape(nodes):
    """A tree as nested lists of labels, residency left out."""
    return [[n.label, shape(n.children)] for n in nodes if n.category != "residency"]


def weight_bytes(*modules):
    """Bytes of the distinct storages of all parameters and buffers, counted from the tensors themselves."""
    storages = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def clone_weights(module):
    return {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


def same_weights(module, weights):
    now = clone_weights(module)
    return now.keys() == weights.keys() and all(torch.equal(now[n], weights[n]) for n in now)


def batch(**values):
    return Batch(**values)
